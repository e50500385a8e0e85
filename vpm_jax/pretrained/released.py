"""Checkpoints of the VPM authors' released code (PyTorch 1.0): a whole VPM.

The state dict (under "state_dict", often with the prefix "module.") has a torchvision ResNet as `base`, whose fc is
untrained; the row locator's 1x1 convolution as `local_mask`; and a sequence of dropout, linear, batch norm and
classifier for each region, and one for the global average, as `instance.N`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from vpm_jax import config as config_lib
from vpm_jax.errors import UserError
from vpm_jax.pretrained import heads, torchvision
from vpm_jax.pretrained.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    File,
    Pretrained,
    as_floats,
    dtype_note,
    nested,
    take,
)

ADVICE = "give a checkpoint of the released code, or load what matches with partial:PATH"
# The children of a ResNet that was turned into a Sequential.
CHILDREN = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
# The recipe's model and matching; configs/market_released.py has its training.
SETTINGS = {
    "recipe": "released",
    "pretrained": "none",
    "model.locator": "row",
    "model.locator_dropout": 0.5,
    "model.pool_gradient": False,
    "model.head_bn_visible_only": False,
    "model.dummy_classes": 1,
    "match.squared": True,
}


def has_its_names(names: Mapping[str, np.ndarray]) -> bool:
    return any(name.startswith(("local_mask.", "instance.")) for name in names)


def read(file: File, partial: bool = False) -> Pretrained:
    """Reads a whole VPM. Its config is the released recipe, with sizes taken from the tensors.

    Raises:
      UserError: if tensors are missing, unexpected, of another shape, not floats, or NaN.
    """
    where = f"{file.path} is not a checkpoint of the released code"
    tensors = torchvision.without_counters({_layer(name): x for name, x in file.tensors.items()})
    network = torchvision.network_of(tensors, "base.")
    regions, reduced = _shape(tensors, "local_mask.weight", (6, 256))[:2]
    instances = 1 + max((int(n) for n in re.findall(r"\binstance\.(\d{1,3})\.", " ".join(tensors))), default=regions)
    # Dropout occupies a number in the sequence but has no parameters.
    numbers = sorted({int(n) for n in re.findall(r"\binstance\.0\.(\d{1,3})\.", " ".join(tensors))})
    numbers = numbers if len(numbers) == 3 else [1, 2, 3]
    layers = dict(zip(("reducer", "bn", "classifier"), numbers, strict=True))

    def rename(name: str) -> str:
        """heads.0.bn.weight -> instance.0.2.weight"""
        if name.startswith("locator"):
            return name.replace("locator", "local_mask")
        _, n, layer, leaf = name.split(".")
        return f"instance.{n}.{layers[layer]}.{leaf}"

    channels = torchvision.expected(network, "base.")["base.layer4.0.downsample.1.bias"][0]
    head_dim = _shape(tensors, rename("heads.0.reducer.weight"), (256,))[0]
    classes = _shape(tensors, rename("heads.0.classifier.weight"), (752,))[0]
    if not (1 <= regions <= 99 and reduced and channels % reduced == 0 and head_dim and classes > 1):
        raise UserError(f"{where}: {regions} regions, {reduced} of {channels} channels, {classes} classes: {ADVICE}.")
    config = config_lib.default()
    settings = SETTINGS | {
        "model.depth": network.depth,
        "model.width": network.width,
        "model.stem": network.stem,
        "model.grid": (regions, 1),
        "model.locator_groups": channels // reduced,
        "model.head_dim": head_dim,
        "model.global_head": instances > regions,
        "model.num_identities": classes - 1,
        "data.mean": IMAGENET_MEAN,
        "data.std": IMAGENET_STD,
    }
    for key, value in settings.items():
        config_lib.set_key(config, key, value)

    ours = heads.shapes(config)
    in_heads = heads.expected(ours, rename)
    for name in in_heads:  # a linear layer stored as a 1x1 convolution
        if name in tensors and tensors[name].shape == (*in_heads[name], 1, 1) and name != "local_mask.weight":
            tensors[name] = tensors[name][:, :, 0, 0]
    shapes = torchvision.expected(network, "base.") | in_heads
    shapes |= {name: tensors[name].shape for name in ("base.fc.weight", "base.fc.bias") if name in tensors}
    fits, differences = take(tensors, shapes, where, ADVICE, partial)
    floats = as_floats(fits, str(file.path), "fetch or save it again")
    whole = set(in_heads) <= set(floats)
    return Pretrained(
        **nested(torchvision.from_torch(floats, network, "base.")),
        stride_on="3x3",
        bn_epsilon=1e-5,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        source=f"{network} and {instances} heads (released code, {file.path.name}{dtype_note(fits)})",
        network=network,
        heads=nested(heads.from_torch(floats, ours, rename)) if whole else None,
        config=config if whole else None,
        skipped=differences,
    )


def _layer(name: str) -> str:
    """base.4.0.conv1.weight -> base.layer1.0.conv1.weight"""
    base, _, rest = name.partition(".")
    child, dot, leaf = rest.partition(".")
    return f"base.{CHILDREN[child]}.{leaf}" if base == "base" and dot and child in CHILDREN else name


def _shape(tensors: Mapping[str, np.ndarray], name: str, usual: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor, or the usual shape if it is missing or has too few axes, which `take` then reports."""
    return tensors[name].shape if name in tensors and tensors[name].ndim >= len(usual) else usual
