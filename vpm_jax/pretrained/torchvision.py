"""torchvision's ResNet names, shared by timm: conv1, bn1, layer1.0.conv1, layer1.0.downsample.0, fc.

Converts in both directions. PyTorch's kernels are [out, in, h, w], ours [h, w, in, out].
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import numpy as np

from vpm_jax.models.resnet import STAGE_BLOCKS, STEMS
from vpm_jax.pretrained.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    File,
    Network,
    Pretrained,
    as_floats,
    dtype_note,
    nested,
    some,
    split_name,
    take,
)

ADVICE = "give the weights of torchvision's or timm's resnet18, 34, 50 or 101, or load what matches with partial:PATH"


def torch_name(ours: str) -> str:
    """params/stage2_block1/bn3/scale -> layer2.0.bn3.weight"""
    kind, position, stage, block, leaf = split_name(ours)
    leaf = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}.get(leaf, leaf)
    if not stage:
        return f"{kind}1.{leaf}"
    module = f"downsample.{0 if kind == 'conv' else 1}" if position == "shortcut" else f"{kind}{position}"
    return f"layer{stage}.{block - 1}.{module}.{leaf}"


def to_torch(ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames and transposes a backbone under our names."""
    return {
        torch_name(name): np.ascontiguousarray(x.transpose(3, 2, 0, 1)) if x.ndim == 4 else x
        for name, x in ours.items()
    }


def from_torch(theirs: Mapping[str, np.ndarray], network: Network, prefix: str = "") -> dict[str, np.ndarray]:
    """The inverse of `to_torch`, for the tensors that are present."""
    names = {name: prefix + torch_name(name) for name in network.shapes()}
    present = {ours: theirs[name] for ours, name in names.items() if name in theirs}
    return {name: x.transpose(2, 3, 1, 0) if x.ndim == 4 else x for name, x in present.items()}


def expected(network: Network, prefix: str = "") -> dict[str, tuple[int, ...]]:
    """{PyTorch's name: PyTorch's shape}."""
    return {
        prefix + torch_name(name): (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape
        for name, shape in network.shapes().items()
    }


def network_of(tensors: Mapping[str, np.ndarray], prefix: str = "") -> Network:
    """The network whose names, and first kernel, these are closest to."""
    shape = tensors[f"{prefix}conv1.weight"].shape if f"{prefix}conv1.weight" in tensors else (64, 3, 7, 7)
    width, size = (shape[0], shape[2]) if len(shape) == 4 and 0 < shape[0] <= 1024 else (64, 7)

    def differences(depth: int) -> int:
        return len(set(expected(Network(depth), prefix)) ^ {name for name in tensors if name.startswith(prefix)})

    usual_first = sorted(STAGE_BLOCKS, key=lambda depth: depth != 50)
    # Without a stem of that size, `take` lists the difference.
    stem = next((stem for stem, (kernel, _) in STEMS.items() if kernel == size), "7x7")
    return Network(min(usual_first, key=differences), width, stem)


def without_counters(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Drops num_batches_tracked, which newer PyTorch versions store with batch norm statistics."""
    suffix = "num_batches_tracked"
    counters = {name for name in tensors if name.endswith(suffix) and name.replace(suffix, "running_mean") in tensors}
    return {name: x for name, x in tensors.items() if name not in counters or x.ndim != 0}


def with_classifier(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, np.ndarray]
) -> dict[str, tuple[int, ...]]:
    """`shapes`, plus those of the ImageNet classifier (fc), with any number of classes, if the tensors have one."""
    if not {"fc.weight", "fc.bias"} & set(tensors):
        return dict(shapes)
    features = shapes["layer4.0.downsample.1.bias"][0]
    classes = tensors["fc.bias"].shape[0] if "fc.bias" in tensors and tensors["fc.bias"].ndim else 1000
    return {**shapes, "fc.weight": (classes, features), "fc.bias": (classes,)}


def classifier(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """The value of `Pretrained.classifier`; None unless both tensors are present."""
    if not {"fc.weight", "fc.bias"} <= set(tensors):
        return None
    return {"kernel": tensors["fc.weight"].T, "bias": tensors["fc.bias"]}


def prefix_of(names: Iterable[str]) -> str | None:
    """The prefix of a ResNet inside a larger network, such as "backbone." in fast-reid's; None without a ResNet.

    Of two encoders, it is the one that is meant for use: MoCo's encoder_q, or a teacher.
    """
    first = "layer1.0.conv1.weight"
    prefixes = {name.removesuffix(first) for name in names if name == first or name.endswith("." + first)}
    return min(prefixes, key=lambda p: (not {"encoder_q", "teacher"} & set(p.split(".")), len(p), p), default=None)


def read(file: File, partial: bool = False) -> Pretrained:
    """Reads a ResNet's state dict, with or without the classifier (fc), or that of a network with one (`prefix_of`).

    Its stride is on the 3x3 convolution, its BN epsilon is 1e-5, and images are normalized by ImageNet's mean and std.

    Raises:
      UserError: if tensors are missing, unexpected, of another shape, not floats, or NaN.
    """
    where = f"{file.path} is not a ResNet's state dict"
    prefix = prefix_of(file.tensors) or ""
    tensors = without_counters(file.tensors)
    others = [name for name in tensors if not name.startswith(prefix) or re.match(r"fc\.\d", name.removeprefix(prefix))]
    tensors = {name.removeprefix(prefix): x for name, x in tensors.items() if name not in others}
    network = network_of(tensors)
    fits, differences = take(tensors, with_classifier(expected(network), tensors), where, ADVICE, partial)
    floats = as_floats(fits, str(file.path), "fetch or save it again")
    place = f" after {prefix}" * bool(prefix) + f", without {len(others)} other tensors: {some(others)}" * bool(others)
    return Pretrained(
        **nested(from_torch(floats, network)),
        stride_on="3x3",
        bn_epsilon=1e-5,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        source=f"{network} (torchvision's names{place}, {file.path.name}{dtype_note(fits)})",
        network=network,
        classifier=classifier(floats),
        skipped=differences,
    )


def has_its_names(names: Mapping[str, np.ndarray]) -> bool:
    own = any(re.match(r"(conv1|bn1|layer[1-4]\.\d+|fc)\.", name) for name in names)
    return own or prefix_of(names) is not None
