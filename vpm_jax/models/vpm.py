"""The Visibility-aware Part Model: region locator, visibility scores, region features, identity heads.

Section 3.1 of the paper. What the recipes do differently are fields, so the compared models are values
too: grid (1, 1) is the global feature, locator "stripes" is PCB's uniform partition.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from vpm_jax.models.resnet import ResNet, kaiming_fan_out


class ExampleDropout(nn.Module):
    """Dropout whose mask depends on the step's key and the example's index in the global batch alone.

    Placement of the batch over devices therefore changes nothing.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        if not train or self.rate == 0:
            return x
        first = lax.axis_index(self.axis_name) * len(x) if self.axis_name else 0
        key = self.make_rng("dropout")
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(len(x)))
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - self.rate), 0)


class MaskedBatchNorm(nn.Module):
    """Batch norm of x [B, P, D] per region and channel, over the examples where `mask` [B, P] is true.

    Totals and counts are summed over devices before dividing, so devices may hold different numbers of
    visible examples. A region that nobody shows keeps its running statistics. `shift` is the learned bias.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    param_dtype: Any = jnp.float32
    shift: bool = True

    @nn.compact
    def __call__(self, x, mask, train: bool):
        shape = x.shape[1:]
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype) if self.shift else None
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, self.param_dtype)
        if not train:
            mean, var = running_mean.value, running_var.value
        else:

            def total(values):
                values = jnp.sum(values, axis=0)
                return lax.psum(values, self.axis_name) if self.axis_name else values

            weight = mask[..., None].astype(x.dtype)
            count = total(weight)
            mean = total(weight * x) / jnp.maximum(count, 1)
            var = total(weight * jnp.square(x - mean)) / jnp.maximum(count, 1)
            if not self.is_initializing():
                for running, value in ((running_mean, mean), (running_var, var)):
                    mixed = self.momentum * running.value + (1 - self.momentum) * value
                    running.value = jnp.where(count > 0, mixed, running.value)
        x = (x - mean) * lax.rsqrt(var + self.epsilon) * scale
        return x if bias is None else x + bias


class IdentityHeads(nn.Module):
    """IP_i of Eq. 6, one head per region: dropout, dense (no bias), batch norm, dense to the identities.

    With dim 0 the first dense and its batch norm are left out.
    """

    classes: int
    dim: int
    dropout: float
    visible_only: bool
    axis_name: str | None = None
    param_dtype: Any = jnp.float32
    bias: bool = True

    @nn.compact
    def __call__(self, features, visible, train: bool):
        """features [B, P, C], visible [B, P] -> logits [B, P, classes]."""
        _, regions, channels = features.shape
        x = ExampleDropout(self.dropout, self.axis_name, name="dropout")(features, train)
        if self.dim:
            reducer_init = nn.initializers.variance_scaling(2.0, "fan_out", "normal", batch_axis=(0,))
            reducer = self.param("reducer", reducer_init, (regions, channels, self.dim), self.param_dtype)
            x = jnp.einsum("bpc,pcd->bpd", x, reducer)
            mask = visible if self.visible_only else jnp.ones_like(visible)
            x = MaskedBatchNorm(axis_name=self.axis_name, param_dtype=self.param_dtype, name="bn")(x, mask, train)
        shape = (regions, self.dim or channels, self.classes)
        classifier = self.param("classifier", nn.initializers.normal(0.001), shape, self.param_dtype)
        logits = jnp.einsum("bpd,pdk->bpk", x, classifier)
        if self.bias:
            logits += self.param("bias", nn.initializers.zeros, (regions, self.classes), self.param_dtype)
        return logits


def _mean_over(x, valid, axes):
    """The mean of x [B, h, w, C] over axes of its cells, over those that are `valid` [B, h, w] if given."""
    if valid is None:
        return jnp.mean(x, axes)
    return jnp.sum(jnp.where(valid[..., None], x, 0), axes) / jnp.maximum(jnp.sum(valid, axes), 1)[..., None]


class VPM(nn.Module):
    """VPM on a ResNet.

    Call with image [B, H, W, 3]: uint8 RGB, normalised here with `mean` and `std`, or floats that are
    normalised already. `visible` bool [B, P] is the visible set, used in training alone (default: all). `valid` bool
    [B, h, w] are the cells of T that the picture covers (default: all): others take no part in Eqs. 1 to 3.
    Training needs the "dropout" key and, to keep statistics, `mutable=["batch_stats"]`. Other shapes and types of
    images raise ValueError.

    Returns (logits [B, P, K], out) with out holding, in float32 unless said:
      feature_map [B, h, w, C]     T, in the compute dtype
      locator_logits [B, h, w, P]  before the softmax of Eq. 1; [B, h, 1, P] for a row locator
      probability [B, h, w, P]     Eq. 1 (P of a row locator: [B, h, 1, P])
      visibility [B, P]            Eq. 2, in cells
      region_features [B, P, C]    Eq. 3
      neck_features [B, P, C]      the same after the neck, where there is one
      logits [B, P, K], and global_logits [B, K] with a global head
      stem, stage1 ... stage4      the backbone's feature maps, in the compute dtype
    """

    backbone: ResNet
    grid: tuple[int, int]
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    locator: str = "pixel"
    locator_hidden: int = 0
    locator_stage: int = 4
    locator_dropout: float = 0.0
    locator_groups: int = 1
    locator_init_std: float = 0.0
    pool_gradient: bool = True
    neck: str = "none"
    head_dim: int = 256
    head_dropout: float = 0.5
    head_bias: bool = True
    head_bn_visible_only: bool = True
    global_head: bool = False
    axis_name: str | None = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, image, train: bool = False, visible=None, valid=None):
        bytes_or_floats = image.dtype == jnp.uint8 or jnp.issubdtype(image.dtype, jnp.floating)
        if image.ndim != 4 or not bytes_or_floats:
            raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 or normalised floats [B, H, W, 3]")
        regions = self.grid[0] * self.grid[1]
        if visible is None:
            visible = jnp.ones((image.shape[0], regions), bool)  # len() wants a number, and exporting has a symbol
        if image.dtype == jnp.uint8:
            mean, std = (jnp.asarray(v, self.param_dtype) for v in (self.mean, self.std))
            image = (image.astype(self.param_dtype) / 255 - mean) / std
        stages = self.backbone(image, train)
        feature_map = stages["stage4"].astype(self.param_dtype)

        located = feature_map if self.locator_stage == 4 else stages["stage3"].astype(self.param_dtype)
        locator_logits = self.locate(located, train, valid)
        log_probability = nn.log_softmax(locator_logits)
        if valid is not None:
            by_row = self.locator == "row"
            cells = jnp.any(valid, axis=2, keepdims=True) if by_row else valid
            log_probability = jnp.where(cells[..., None], log_probability, -jnp.inf)
        probability = jnp.exp(log_probability)
        visibility = jnp.sum(probability, axis=(1, 2))
        # Eq. 3, where the weights' scale cancels: 1 at the likeliest cell, for a region may be unlikely everywhere.
        likeliest = lax.stop_gradient(jnp.max(log_probability, axis=(1, 2), keepdims=True))
        weights = jnp.exp(log_probability - jnp.maximum(likeliest, jnp.finfo(likeliest.dtype).min))
        if not self.pool_gradient:
            weights, visibility = lax.stop_gradient((weights, visibility))
        # The mean over the map; a row's weight applies to the sum over its cells.
        spread = jnp.broadcast_to(weights, (*feature_map.shape[:3], regions))
        total = jnp.sum(weights, axis=(1, 2))
        if valid is not None:  # an image without a cell has no features
            spread, total = jnp.where(valid[..., None], spread, 0), jnp.where(total > 0, total, 1)
        region_features = jnp.einsum("bhwp,bhwc->bpc", spread, feature_map) / total[..., None]

        features, shown = region_features, visible
        if self.global_head:
            pooled = _mean_over(feature_map, valid, (1, 2))[:, None]
            features = jnp.concatenate([features, pooled], axis=1)
            shown = jnp.concatenate([shown, jnp.ones_like(shown[:, :1])], axis=1)
        if self.neck == "bn":
            mask = shown if self.head_bn_visible_only else jnp.ones_like(shown)
            neck = MaskedBatchNorm(axis_name=self.axis_name, param_dtype=self.param_dtype, shift=False, name="neck")
            features = neck(features, mask, train)
        heads = IdentityHeads(
            self.classes,
            self.head_dim,
            self.head_dropout,
            self.head_bn_visible_only,
            self.axis_name,
            self.param_dtype,
            self.head_bias,
            name="heads",
        )
        logits = heads(features, shown, train)
        out = {
            "feature_map": stages["stage4"],
            "locator_logits": locator_logits,
            "probability": probability,
            "visibility": visibility,
            "region_features": region_features,
            "logits": logits[:, :regions],
            **stages,
        }
        if self.neck == "bn":
            out["neck_features"] = features[:, :regions]
        if self.global_head:
            out["global_logits"] = logits[:, regions]
        return out["logits"], out

    def locate(self, feature_map, train: bool, valid=None):
        """The region locator's logits [B, h, w, P], or [B, h, 1, P] by row."""
        batch, h, w, channels = feature_map.shape
        rows, cols = self.grid
        regions = rows * cols
        if self.locator == "stripes":
            # PCB: the uniform partition, whatever the image shows; 50 in the logits is a one-hot softmax.
            row = jnp.arange(h) * rows // h
            col = jnp.arange(w) * cols // w
            onehot = nn.one_hot(row[:, None] * cols + col, regions, dtype=feature_map.dtype)
            return jnp.broadcast_to(50 * onehot, (batch, h, w, regions))
        init = nn.initializers.normal(self.locator_init_std) if self.locator_init_std else kaiming_fan_out
        x = ExampleDropout(self.locator_dropout, self.axis_name, name="locator_dropout")(feature_map, train)
        if self.locator == "row":
            x = x.reshape(batch, h, w, channels // self.locator_groups, self.locator_groups)
            x = x.mean((2, 4))[:, :, None] if valid is None else _mean_over(x.mean(4), valid, 2)[:, :, None]
        if self.locator_hidden:
            shape, he = (3, 3, channels, self.locator_hidden), nn.initializers.he_normal()
            hidden = self.param("locator_hidden_kernel", he, shape, self.param_dtype)
            x = lax.conv_general_dilated(x, hidden, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = nn.relu(x + self.param("locator_hidden_bias", nn.initializers.zeros, shape[-1:], self.param_dtype))
        kernel = self.param("locator_kernel", init, (x.shape[-1], regions), self.param_dtype)
        logits = x @ kernel
        if self.locator == "row":
            logits += self.param("locator_bias", nn.initializers.zeros, (regions,), self.param_dtype)
        return logits
