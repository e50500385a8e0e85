"""VPM's own layers under PyTorch's names: locator.weight, heads.N.reducer.weight, heads.N.bn.weight and so on.

N is the region, row-major from 0; the global head, if there is one, comes last. In PyTorch, each head is Linear
(reducer, no bias), BatchNorm1d, Linear (classifier), preceded by a BatchNorm1d without bias if the model has a neck.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import jax
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, FrozenConfigDict

from vpm_jax import models

# Our names, with a leading axis of heads -> PyTorch's names within a head.
HEAD = {
    "params/neck/scale": "neck.weight",
    "batch_stats/neck/mean": "neck.running_mean",
    "batch_stats/neck/var": "neck.running_var",
    "params/heads/reducer": "reducer.weight",
    "params/heads/bn/scale": "bn.weight",
    "params/heads/bn/bias": "bn.bias",
    "batch_stats/heads/bn/mean": "bn.running_mean",
    "batch_stats/heads/bn/var": "bn.running_var",
    "params/heads/classifier": "classifier.weight",
    "params/heads/bias": "classifier.bias",
}
LOCATOR = {
    "params/locator_kernel": "locator.weight",
    "params/locator_bias": "locator.bias",
    "params/locator_hidden_kernel": "locator.hidden.weight",
    "params/locator_hidden_bias": "locator.hidden.bias",
}


def shapes(config: ConfigDict) -> dict[str, tuple[int, ...]]:
    """{"params/heads/reducer": shape, ...} of the config's model without its backbone."""
    return dict(_shapes(FrozenConfigDict(config)))


@functools.lru_cache(maxsize=2)
def _shapes(config: FrozenConfigDict) -> dict[str, tuple[int, ...]]:
    image = np.zeros((1, config.data.height, config.data.width, 3), np.uint8)
    tree = flatten_dict(jax.eval_shape(models.create(config).init, jax.random.key(0), image), sep="/")
    return {name: x.shape for name, x in tree.items() if name.split("/")[1] != "backbone"}


def _conv_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The PyTorch shape of a locator's bias or kernel [in, out] or [k, k, in, out]."""
    height, width, *channels = shape if len(shape) == 4 else (1, 1, *shape)
    return (*channels[::-1], height, width) if len(shape) > 1 else shape


def to_torch(ours: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames, splits by head and transposes heads under our flat names."""
    result = {}
    for name, x in ours.items():
        if name in LOCATOR:
            y = x if x.ndim == 1 else np.moveaxis(x, (-1, -2), (0, 1))
            result[LOCATOR[name]] = np.ascontiguousarray(y).reshape(_conv_shape(x.shape))
        else:
            for n, head in enumerate(x):
                result[f"heads.{n}.{HEAD[name]}"] = np.ascontiguousarray(head.T)
    return result


def expected(ours: Mapping[str, tuple[int, ...]], rename: Callable[[str], str] = str) -> dict[str, tuple[int, ...]]:
    """{PyTorch's name, passed through `rename`: PyTorch's shape}."""
    result: dict[str, tuple[int, ...]] = {}
    for name, shape in ours.items():
        if name in LOCATOR:
            result[rename(LOCATOR[name])] = _conv_shape(shape)
        else:
            result |= {rename(f"heads.{n}.{HEAD[name]}"): shape[:0:-1] for n in range(shape[0])}
    return result


def from_torch(
    theirs: Mapping[str, np.ndarray], ours: Mapping[str, tuple[int, ...]], rename: Callable[[str], str] = str
) -> dict[str, np.ndarray]:
    """The inverse of `to_torch`, for the names and shapes in `ours`; all must be present."""
    result = {}
    for name, shape in ours.items():
        if name in LOCATOR:
            x = theirs[rename(LOCATOR[name])]
            result[name] = x if len(shape) == 1 else x.transpose(2, 3, 1, 0).reshape(shape)
        else:
            result[name] = np.stack([theirs[rename(f"heads.{n}.{HEAD[name]}")].T for n in range(shape[0])])
    return result
