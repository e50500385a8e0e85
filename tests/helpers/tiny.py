"""Small things that the tests of the models, the optimiser and the step share. Imported after conftest."""

from __future__ import annotations

import runpy

import flax.linen as nn
import jax
import numpy as np
from ml_collections import ConfigDict
from paths import CONFIGS, FUSION_EMITTERS

from vpm_jax import Description
from vpm_jax.config import flatten, set_key
from vpm_jax.models.resnet import STAGE_BLOCKS

SHRUNK = {
    "pretrained": "none",
    "data.height": 64,
    "data.width": 32,
    "model.depth": 10,
    "model.width": 4,
    "model.grid": (3, 1),
    "model.head_dim": 6,
    "model.num_identities": 4,
    "model.dtype": "float32",
}


def recipe(file: str, variant: str = "", **changes) -> ConfigDict:
    """The config of configs/FILE.py; changes are keys with __ for the dots."""
    get_config = runpy.run_path(str(CONFIGS / f"{file}.py"))["get_config"]
    config = get_config(variant) if variant else get_config()
    for key, value in changes.items():
        set_key(config, key.replace("__", "."), value)
    return config


def shrunk(file: str, **changes) -> ConfigDict:
    """configs/FILE.py with a ResNet-10 of width 4 on 64 x 32 images, of three regions and four identities."""
    config = recipe(file)
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in (SHRUNK | changes).items():
        assert key in flatten(config)
        set_key(config, key, value)
    return config


def other(value):
    """Another value of a key's type."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, tuple):
        return (*value, 0.123)
    return f"other {value}" if isinstance(value, str) else value + 1


# Changes to a config on small images for a ResNet-10 that is its stem alone: for what does not depend on the blocks,
# most of the time to compile.
NO_BLOCKS = (0, 0, 0, 0)
STEM_ALONE = {"model__stem": "4x4", "model__strides": (1, 1, 1), "model__width": 32}


def drop_blocks() -> None:
    """Leaves the stem alone of every ResNet-10 of this process; the fixture `stem_alone` does so for a test."""
    STAGE_BLOCKS[10] = NO_BLOCKS


def optimized(function):
    """jax.jit as users have it: XLA has miscompiled reductions that it optimizes (jax#39103)."""
    options = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    options |= {FUSION_EMITTERS: True} if FUSION_EMITTERS else {}
    return jax.jit(function, compiler_options=options)


class Given(nn.Module):
    """A backbone for tests: its feature map is the image itself, times a parameter."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        return {"stage4": x * self.param("scale", nn.initializers.ones, x.shape[-1:], x.dtype)}


def fill(shapes, seed: int = 0):
    """Random NumPy values for a tree of shapes, by the leaves' names; what an initialiser would take seconds for.

    Kernels are He-normal by fan-in, batch norms are anything but the identity, all else is zero.
    """
    random = np.random.default_rng(seed)

    def one(path, leaf):
        keys = jax.tree_util.keystr(path)
        if "opt_state" in keys or np.issubdtype(leaf.dtype, np.integer):
            value = np.zeros(leaf.shape)
        elif keys.endswith(("scale']", "var']")):
            value = random.uniform(0.5, 1.5, leaf.shape)
        elif keys.endswith(("bias']", "mean']")):
            value = random.normal(0, 0.1, leaf.shape)
        else:
            fan_in = leaf.shape[1] if keys.endswith(("reducer']", "classifier']")) else np.prod(leaf.shape[:-1])
            value = random.normal(0, np.sqrt(2 / fan_in), leaf.shape)
        return value.astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, shapes)


def assert_equal(a: Description, b: Description, atol: float = 0) -> None:
    for x, y in ((a.features, b.features), (a.visibility, b.visibility), (a.region_maps, b.region_maps)):
        np.testing.assert_allclose(x, y, rtol=0, atol=atol, strict=True)
