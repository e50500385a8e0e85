"""Our own weights: the workdir of a training run, and the files written by `vpm_jax.convert`.

A file's metadata hold what names and shapes do not: stride placement, BN epsilon, input normalization and, for a whole
VPM, its config.
"""

from __future__ import annotations

import ast
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from vpm_jax import config as config_lib
from vpm_jax.data.datasets import further_sets
from vpm_jax.disk import make_folder, replacing, write_arrays, write_atomically
from vpm_jax.errors import UserError
from vpm_jax.models.resnet import BOTTLENECK, STEMS
from vpm_jax.pretrained import files, heads, torchvision
from vpm_jax.pretrained.weights import IMAGENET_MEAN, IMAGENET_STD, File, Network, Pretrained, as_floats, nested, take

SAVED, CONFIG = "model.safetensors", "config.json"  # the files of a folder that VPM.save_pretrained wrote
FORMAT = "vpm_jax"  # the metadata key that marks our files; its value is the format version
TORCH_EPSILON = 1e-5  # nn.BatchNorm2d's
ADVICE = "write it again with python -m vpm_jax.convert, or load what matches with partial:PATH"


# ---- Folders ----


def read_folder(path: Path) -> Pretrained:
    """Reads a whole VPM: the newest checkpoint of a training run, or what VPM.save_pretrained wrote.

    Raises:
      UserError: if the folder holds neither, no checkpoint, or unreadable files.
    """
    from vpm_jax import step
    from vpm_jax.runs.checkpoints import Checkpoints

    config, saved = config_lib.read(path), path / SAVED
    if config is not None and saved.is_file():
        file = files.read(saved)
        weights = read_file(file) if is_ours(file) else None
        if weights is None or weights.config != config:
            raise UserError(
                f"{saved} is not the model of the {CONFIG} beside it: copy both from where they came.",
                code="wrong-weights",
            )
        return replace(weights, source=file.metadata["source"])
    if config is None or not (path / "checkpoints").is_dir():
        raise UserError(
            f"{path} holds no run ({CONFIG} and checkpoints) and no saved model ({CONFIG} and {SAVED}): give the "
            "--workdir of a training run.",
            code="no-run",
        )
    with Checkpoints(path, keep=0) as checkpoints:
        state, _ = checkpoints.restore(step.state_shapes(config))
    flat = {name: np.asarray(x) for name, x in flatten_dict(step.evaluated(state), sep="/").items()}
    flat = as_floats(flat, str(path), "train again or choose another checkpoint")
    source = f"{_network(config)} and its heads (step {int(state.step)} of the run {path.resolve().name})"
    return whole(config, unflatten_dict(flat, sep="/"), source)


def whole(config: ConfigDict, variables: Mapping[str, Any], source: str) -> Pretrained:
    """A whole VPM from its config and its variables, {"params", "batch_stats"}."""
    flat = flatten_dict(dict(variables), sep="/")
    in_backbone = {name.replace("/backbone/", "/"): x for name, x in flat.items() if "/backbone/" in name}
    return Pretrained(
        **nested(in_backbone),
        stride_on=config.model.stride_on,
        bn_epsilon=config.model.bn_epsilon,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        source=source,
        network=_network(config),
        heads=nested({name: x for name, x in flat.items() if "/backbone/" not in name}),
        config=config,
    )


def _network(config: ConfigDict) -> Network:
    m = config.model
    return Network(m.depth, m.width, m.stem, tuple(m.strides))


def write_workdir(path: Path, weights: Pretrained, steps: int = 0) -> None:
    """Writes a workdir for `vpm_jax.evaluate`: the config and a checkpoint.

    Args:
      path: a new or empty folder.
      weights: of a whole VPM.
      steps: how many steps they were trained for, where that is known.

    Raises:
      UserError: if the weights are not a whole VPM, or the folder is not empty.
    """
    from vpm_jax import models, step
    from vpm_jax.runs.checkpoints import Checkpoints

    if weights.heads is None or weights.config is None:
        raise UserError(
            f"--output {path}: a workdir needs a whole VPM, and {weights.source} has no heads: write a .npz or "
            ".safetensors and train from it with --config.pretrained."
        )
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--output {path} exists already: choose a new folder, or a name that ends in .npz.")
    config = config_lib.for_weights(weights.config, weights)
    for stage in (config.stage1, config.stage2):  # normally derived from the training set
        if stage.epochs and not stage.steps_per_epoch:
            stage.steps_per_epoch = max(config.model.num_identities // stage.identities, 1)
    dtype = jax.numpy.promote_types(models.compute_dtype(config.model.dtype), np.float32)
    variables = jax.tree.map(lambda x: jax.numpy.asarray(x, dtype), weights.variables())
    state = replace(step.new_state(config, variables), step=jax.numpy.asarray(steps, jax.numpy.int32))
    make_folder(path)
    with Checkpoints(path, keep=1) as checkpoints:
        checkpoints.save(steps, state, {"seconds": 0.0, "pending": [], "best": None})
    write_atomically(path / CONFIG, config_lib.to_json(config))


# ---- Files ----


def metadata(weights: Pretrained, **more: Any) -> dict[str, str]:
    """The metadata of a file; values are text, with numbers in Python's and JSON's notation."""
    network = weights.network
    values: dict[str, Any] = {
        FORMAT: 1,
        "depth": network.depth,
        "width": network.width,
        "stem": network.stem,
        "strides": list(network.strides),
        "stride_on": weights.stride_on,
        "bn_epsilon": weights.bn_epsilon,
        "mean": list(weights.mean),
        "std": list(weights.std),
        "channels": "RGB",
        "source": weights.source,
        **more,
    }
    if weights.config is not None:
        config = weights.config
        values |= {
            "last_stride": config.model.last_stride,
            "grid": list(config.model.grid),
            "recipe": config.recipe,
            "config": json.dumps(without_paths(config).to_dict()),
        }
    return {key: str(value) for key, value in values.items()}


def without_paths(config: ConfigDict) -> ConfigDict:
    """A copy for sharing, without this machine's paths; the file name of the pretrained weights stays."""
    config = config.copy_and_resolve_references()
    kind, colon, path = config.pretrained.rpartition(":")
    config.data.root = config.data.distractors = ""
    config.data.also_train = ",".join(name for name, _ in further_sets(config.data.also_train))
    config.pretrained = kind + colon + Path(path).name
    return config


def is_ours(file: File) -> bool:
    return FORMAT in file.metadata


def read_file(file: File, partial: bool = False) -> Pretrained:
    """Reads a file written by `write_npz` or `write_safetensors`.

    Raises:
      UserError: if tensors are missing, unexpected, of another shape or NaN, or the metadata are invalid.
    """
    where, tensors, meta = str(file.path), dict(file.tensors), file.metadata
    if "crc32" in meta and meta["crc32"] != str(_checksum(tensors, meta)):
        raise UserError(f"{where} is damaged (its checksum does not match): {ADVICE}.", code="damaged-weights")
    try:
        first, second, third = (int(n) for n in ast.literal_eval(meta["strides"]))
        network = Network(int(meta["depth"]), int(meta["width"]), meta["stem"], (first, second, third))
        mean, std = ((float(r), float(g), float(b)) for r, g, b in map(ast.literal_eval, (meta["mean"], meta["std"])))
        epsilon, stride_on = float(meta["bn_epsilon"]), meta["stride_on"]
        known = network.depth in BOTTLENECK and network.stem in STEMS and 0 < network.width <= 1024
        known = known and set(network.strides) <= {1, 2} and stride_on in ("1x1", "3x3")
        if not (known and 0 < epsilon < 1 and min(std) > 0):
            raise ValueError(f"{network}, stride on {stride_on}, epsilon {epsilon}")
    except (KeyError, ValueError, TypeError, SyntaxError) as error:
        raise UserError(f"{where} has invalid metadata ({error!r}): {ADVICE}.") from None
    config = config_lib.from_json(meta["config"], where) if "config" in meta else None
    if any(name.startswith("params/") for name in tensors):  # an .npz, with our names
        tensors = {name: x.transpose(3, 2, 0, 1) if x.ndim == 4 else x for name, x in tensors.items()}
        names = {name: torchvision.torch_name(name) for name in network.shapes()}
        tensors = {names.get(name, name): x for name, x in tensors.items()}
    expected = torchvision.with_classifier(torchvision.expected(network), tensors)
    in_heads: dict[str, tuple[int, ...]] = {}
    if config is not None and any(name.startswith(("locator.", "heads.")) for name in tensors):
        in_heads = heads.shapes(config)
        expected |= heads.expected(in_heads)
    fits, differences = take(tensors, expected, f"{where} does not match its metadata", ADVICE, partial)
    floats = as_floats(fits, where, ADVICE)
    whole = bool(in_heads) and set(heads.expected(in_heads)) <= set(floats)
    return Pretrained(
        **nested(torchvision.from_torch(floats, network)),
        stride_on=stride_on,
        bn_epsilon=epsilon,
        mean=mean,
        std=std,
        source=f"{network}{' and its heads' * whole} ({file.path.name})",
        network=network,
        classifier=torchvision.classifier(floats),
        heads=nested(heads.from_torch(floats, in_heads)) if whole else None,
        config=config if whole else None,
        skipped=differences,
    )


def _fc(weights: Pretrained) -> dict[str, np.ndarray]:
    """The classifier under PyTorch's names, if there is one."""
    head = weights.classifier
    return {} if head is None else {"fc.weight": head["kernel"].T, "fc.bias": head["bias"]}


def torch_tensors(weights: Pretrained, backbone_only: bool = False) -> dict[str, np.ndarray]:
    """All tensors under PyTorch's names: the backbone as torchvision's, the classifier as fc, VPM's as in `heads`."""
    tensors = torchvision.to_torch(weights.flat()) | _fc(weights)
    if weights.heads is not None and not backbone_only:
        tensors |= heads.to_torch(flatten_dict(weights.heads, sep="/"))
    return {name: np.ascontiguousarray(x) for name, x in tensors.items()}


def write_npz(path: Path, weights: Pretrained) -> None:
    """Writes the backbone (and classifier) under our names. Raises UserError if the disk is full or read-only."""
    text = json.dumps(metadata(replace(weights, config=None)))
    write_arrays(path, {"metadata": np.array(text), **weights.flat(), **_fc(weights)})


def write_safetensors(
    path: Path,
    weights: Pretrained,
    backbone_only: bool = False,
    check: Callable[[Path], object] | None = None,
    **more: Any,
) -> None:
    """Writes `torch_tensors` with `metadata`. Raises UserError if the disk is full or read-only.

    `check` is called with the temporary file before it is moved into place; if it raises, nothing is written.
    """
    from safetensors.numpy import save

    kept = replace(weights, config=None) if backbone_only else weights
    tensors, about = torch_tensors(weights, backbone_only), metadata(kept, **more)
    data = save(tensors, about | {"crc32": str(_checksum(tensors, about))})
    with replacing(path) as temporary:
        temporary.write_bytes(data)
        if check is not None:
            check(temporary)


def _checksum(tensors: Mapping[str, np.ndarray], about: Mapping[str, str]) -> int:
    """CRC-32 of tensors and metadata; .safetensors has none of its own."""
    total = 0
    for name, tensor in sorted(tensors.items()):
        total = zlib.crc32(
            np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data, zlib.crc32(name.encode(), total)
        )
    return zlib.crc32(json.dumps(sorted(item for item in about.items() if item[0] != "crc32")).encode(), total)


def fold_epsilon(weights: Pretrained) -> Pretrained:
    """The same backbone with PyTorch's BN epsilon, its scales adjusted.

    scale / sqrt(var + old) = scale' / sqrt(var + new) is exact for the running variance, hence in eval mode; in
    training mode, with the batch's variance, the two differ.
    """
    flat = dict(weights.flat())
    for name in flat:
        if name.endswith("/scale"):
            var = flat[name.replace("params/", "batch_stats/").replace("/scale", "/var")].astype(np.float64)
            factor = np.sqrt((var + TORCH_EPSILON) / (var + weights.bn_epsilon))
            flat[name] = (flat[name] * factor).astype(flat[name].dtype)
    config = weights.config
    if config is not None:
        config = config.copy_and_resolve_references()
        config.model.bn_epsilon = TORCH_EPSILON
    return replace(weights, **nested(flat), bn_epsilon=TORCH_EPSILON, config=config)


def differences_from_torchvision(weights: Pretrained) -> dict[str, str]:
    """{suffix of a file's name: sentence} for every difference from torchvision's backbone."""
    network, differences = weights.network, {}
    if network.stem != "7x7":
        differences[f"stem{network.stem}"] = f"the stem is {network.stem}, without max pooling"
    if network.width != 64:
        differences[f"width{network.width}"] = f"the width is {network.width}, not 64"
    if network.strides != (1, 2, 2):
        numbers = "".join(map(str, network.strides))
        differences[f"strides{numbers}"] = f"the strides of the first three stages are {network.strides}"
    if weights.stride_on == "1x1" and BOTTLENECK[network.depth]:
        differences["stride1x1"] = (
            "each stage's stride is on the first 1x1 convolution (conv1.stride, not conv2.stride)"
        )
    if weights.bn_epsilon != TORCH_EPSILON:
        mantissa, exponent = f"{weights.bn_epsilon:.2e}".split("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
        differences[f"eps{text}"] = f"every batch norm's eps is {text}"
    if weights.config is not None and weights.config.model.last_stride == 1:
        differences["last1"] = "the last stage has stride 1"
    if not np.allclose([weights.mean, weights.std], [IMAGENET_MEAN, IMAGENET_STD], atol=1e-9):
        mean, std = (", ".join(f"{x:.6g}" for x in values) for values in (weights.mean, weights.std))
        differences["input"] = f"RGB images are normalized as (x / 255 - ({mean})) / ({std})"
    return differences


def write_for_torch(
    path: Path,
    weights: Pretrained,
    backbone_only: bool = False,
    keep_epsilon: bool = False,
    check: Callable[[Path], object] | None = None,
) -> Path:
    """Writes the .safetensors and prints notes for PyTorch users, which its name summarizes; returns its path.

    `check` is called with the temporary file before it is moved into place; if it raises, nothing is written.
    """
    folded_from = None
    if not keep_epsilon and weights.bn_epsilon != TORCH_EPSILON:
        folded_from, weights = weights.bn_epsilon, fold_epsilon(weights)
    differences = differences_from_torchvision(weights)
    suffixes = [suffix for suffix in differences if suffix not in path.stem]
    path = path.with_name("-".join([path.stem, *suffixes]) + path.suffix)
    more = {} if folded_from is None else {"bn_folded_from": folded_from}
    write_safetensors(path, weights, backbone_only, check, **more)
    print(f"Wrote {path}.")
    if differences:
        print("A torchvision ResNet loads these names but computes something else, unless it is changed:")
        for sentence in differences.values():
            print(f"  - {sentence}")
    if folded_from is not None:
        print(
            f"Batch norms were folded from epsilon {folded_from:g} to PyTorch's 1e-5: exact in eval mode; to train "
            "further, convert with --keep-epsilon."
        )
    return path
