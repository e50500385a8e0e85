"""Types and checks shared by the readers of pretrained weights."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from vpm_jax.errors import UserError
from vpm_jax.models.resnet import ResNet

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Network(NamedTuple):
    """The architecture that weights belong to: fields of `ResNet`."""

    depth: int = 50
    width: int = 64
    stem: str = "7x7"
    strides: tuple[int, int, int] = (1, 2, 2)  # with a stride, the first stage has a shortcut convolution

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{"params/conv_stem/kernel": shape, ...} of all parameters and statistics."""
        return _shapes(self)

    def __str__(self) -> str:
        return f"ResNet-{self.depth} of width {self.width} with the {self.stem} stem"


@functools.lru_cache(maxsize=8)
def _shapes(network: Network) -> dict[str, tuple[int, ...]]:
    module = ResNet(**network._asdict())
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return {name: x.shape for name, x in flatten_dict(shapes, sep="/").items()}


@dataclass(frozen=True)
class Pretrained:
    """A backbone's weights and the settings that they require.

    `params` and `batch_stats` are the nested dicts of `ResNet` (NumPy, float32 or float64). `classifier` is the
    ImageNet head, {"kernel" [C, classes], "bias" [classes]}, on the spatial mean of the last stage. The network needs
    `stride_on` and `bn_epsilon`, and RGB images normalized as (x / 255 - mean) / std.

    A whole VPM has `heads`, its locator and identity heads as {"params": ..., "batch_stats": ...} without the backbone,
    and the `config` of its model and input.
    """

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    stride_on: str
    bn_epsilon: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    source: str  # the name of these weights in messages
    network: Network
    classifier: dict[str, np.ndarray] | None = None
    heads: dict[str, Any] | None = None
    config: ConfigDict | None = None
    skipped: str = ""  # the differences that partial loading ignored, in words

    def variables(self) -> dict[str, Any]:
        """{"params", "batch_stats"} of a whole VPM."""
        assert self.heads is not None
        return {
            "params": {"backbone": self.params, **self.heads["params"]},
            "batch_stats": {"backbone": self.batch_stats, **self.heads["batch_stats"]},
        }

    def flat(self) -> dict[str, np.ndarray]:
        """The backbone by the names of `Network.shapes`."""
        return flatten_dict({"params": self.params, "batch_stats": self.batch_stats}, sep="/")


class File(NamedTuple):
    """The content of a file of weights."""

    path: Path
    tensors: dict[str, np.ndarray]
    metadata: dict[str, str]


def take(
    arrays: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]], where: str, advice: str, partial: bool = False
) -> tuple[dict[str, Any], str]:
    """(the arrays whose name and shape are as expected, the differences in words).

    Raises:
      UserError: listing arrays that are missing, unexpected or of another shape; with `partial`, only if none matches.
    """
    present = {name: arrays[name] for name in expected if name in arrays}
    fits = {name: x for name, x in present.items() if x.shape == expected[name]}
    misfits = {name: x for name, x in present.items() if name not in fits}
    differences = {
        "missing": [name for name in expected if name not in arrays],
        "unexpected": [name for name in arrays if name not in expected],
        "of another shape": [f"{name} {x.shape} instead of {expected[name]}" for name, x in misfits.items()],
    }
    listed = "; ".join(f"{len(names)} {kind} ({some(names)})" for kind, names in differences.items() if names)
    if listed and not (partial and fits):
        raise UserError(f"{where}: of {len(expected)} tensors expected, {listed}: {advice}.")
    return fits, listed


def some(names: Iterable[str], most: int = 5) -> str:
    names = [name if len(name) <= 80 else name[:77] + "..." for name in names]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def as_floats(tensors: Mapping[str, np.ndarray], where: str, advice: str) -> dict[str, np.ndarray]:
    """Converts floats to float32, except float64.

    Raises:
      UserError: if a tensor is not of floats, or holds NaN, infinity or a negative variance.
    """
    # NumPy's kind of ml_dtypes' floats is "V".
    wrong = [name for name, x in tensors.items() if x.dtype.kind != "f" and "float" not in x.dtype.name]
    if wrong:
        dtypes = ", ".join(sorted({tensors[name].dtype.name for name in wrong}))
        raise UserError(f"{where}: {some(wrong)} hold {dtypes}, expected floats: {advice}.")
    floats = {name: np.asarray(x, np.float64 if x.dtype == np.float64 else np.float32) for name, x in tensors.items()}
    wrong = [name for name, x in floats.items() if not np.isfinite(x).all()]
    variances = ("/moving_variance", "running_var", "/var")
    wrong += [name for name, x in floats.items() if name.endswith(variances) and np.less(x, 0).any()]
    if wrong:
        raise UserError(f"{where}: NaN, infinity or a negative variance in {some(wrong)}: {advice}.")
    return floats


def dtype_note(tensors: Mapping[str, np.ndarray]) -> str:
    """Suffix for the source of weights stored in other dtypes than float32, such as ", float16"."""
    dtypes = {x.dtype.name for x in tensors.values() if "float" in x.dtype.name} - {"float32"}
    return "".join(f", {name}" for name in sorted(dtypes))


def apply_to(variables: Mapping[str, Any], pretrained: Pretrained) -> dict[str, Any]:
    """The model's `variables` with pretrained weights in params["backbone"] and batch_stats["backbone"].

    Keeps the dtype of every array, and the arrays that partial loading did not find. Raises UserError if the backbone
    has other parameters than the weights (another depth, width or stem).
    """
    result = dict(variables)
    advice = f"the weights are those of a {pretrained.source}: give config.model its depth, width and stem, or train "
    advice += "from scratch with --config.pretrained=none"
    for collection, tree in (("params", pretrained.params), ("batch_stats", pretrained.batch_stats)):
        ours = flatten_dict(variables[collection]["backbone"], sep="/")
        theirs = flatten_dict(tree, sep="/")
        expected = {name: x.shape for name, x in ours.items()}
        where = f"the backbone's {collection}"
        fits, _ = take(theirs, expected, where, advice, partial=bool(pretrained.skipped))
        # Copies: the file's arrays share a read-only buffer, which must not be donated.
        new = {name: jnp.array(fits[name], dtype=x.dtype) if name in fits else x for name, x in ours.items()}
        result[collection] = {**variables[collection], "backbone": unflatten_dict(new, sep="/")}
    return result


def split_name(ours: str) -> tuple[str, str, int, int, str]:
    """The parts of one of our names: params/stage2_block1/bn3/scale -> ("bn", "3", 2, 1, "scale").

    The position in the block may also be "shortcut" and, in the stem with stage and block 0, "stem".
    """
    _, *block, layer, leaf = ours.split("/")
    kind, position = re.fullmatch(r"(conv|bn)_?(\w+)", layer).groups()  # type: ignore[union-attr]
    stage, number = re.fullmatch(r"stage(\d)_block(\d+)", block[0]).groups() if block else (0, 0)  # type: ignore[union-attr]
    return kind, position, int(stage), int(number), leaf


def nested(flat: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """{"params": {...}, "batch_stats": {...}} from arrays named "params/..." and "batch_stats/..."."""
    return {"params": {}, "batch_stats": {}} | unflatten_dict(dict(flat), sep="/")
