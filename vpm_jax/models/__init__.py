"""Models: `create(config)` builds the Linen module of a config."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vpm_jax.geometry import map_shape
from vpm_jax.models.resnet import ResNet
from vpm_jax.models.vpm import VPM

__all__ = ["VPM", "ResNet", "create", "map_shape"]


def compute_dtype(name: str) -> np.dtype:
    """The dtype of config.model.dtype; "auto" is bfloat16 on GPU and TPU, float32 on CPU."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def create(config: ConfigDict, axis_name: str | None = None) -> VPM:
    """The `VPM` of config.model; `axis_name` is the mapped axis of a pmapped step."""
    m = config.model
    dtype = compute_dtype(m.dtype)
    param_dtype = jnp.promote_types(dtype, jnp.float32)  # parameters, statistics and heads
    backbone = ResNet(
        depth=m.depth,
        width=m.width,
        stem=m.stem,
        strides=tuple(m.strides),
        last_stride=m.last_stride,
        stride_on=m.stride_on,
        bn_epsilon=m.bn_epsilon,
        dtype=dtype,
        param_dtype=param_dtype,
        axis_name=axis_name,
    )
    return VPM(
        backbone=backbone,
        grid=tuple(m.grid),
        classes=m.num_identities + m.dummy_classes,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        locator=m.locator,
        locator_hidden=m.locator_hidden,
        locator_stage=m.locator_stage,
        locator_dropout=m.locator_dropout,
        locator_groups=m.locator_groups,
        locator_init_std=m.locator_init_std,
        pool_gradient=m.pool_gradient,
        neck=m.neck,
        head_dim=m.head_dim,
        head_dropout=m.head_dropout,
        head_bias=m.head_bias,
        head_bn_visible_only=m.head_bn_visible_only,
        global_head=m.global_head,
        axis_name=axis_name,
        param_dtype=param_dtype,
    )
