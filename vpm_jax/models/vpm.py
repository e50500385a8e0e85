"""The Visibility-aware Part Model: region locator, visibility scores, region features, identity heads.

Section 3.1 of the paper. Recipes and baselines differ only in its fields: grid (1, 1) is the global feature,
locator "stripes" is PCB's uniform partition.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Shaped

from vpm_jax.arrays import AnyArray
from vpm_jax.models.resnet import ResNet, kaiming_fan_out


class ExampleDropout(nn.Module):
    """Dropout whose mask depends only on the key and on each example's index in the global batch.

    The result does not depend on how the batch is placed on devices.
    """

    rate: float
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[AnyArray, "b ..."], train: bool) -> Float[Array, "b ..."]:
        if not train or self.rate == 0:
            return jnp.asarray(x)
        first = lax.axis_index(self.axis_name) * len(x) if self.axis_name else 0
        key = self.make_rng("dropout")
        keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(len(x)))
        keep = jax.vmap(lambda k: jax.random.bernoulli(k, 1 - self.rate, x.shape[1:]))(keys)
        return jnp.where(keep, x / (1 - self.rate), 0)


class MaskedBatchNorm(nn.Module):
    """Batch norm per region and channel, over the examples where `mask` is true.

    Totals and counts are summed over devices before dividing, since devices may hold different numbers of visible
    examples. A region that is visible in no example keeps its running statistics. `shift` adds a learned bias.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    param_dtype: DTypeLike = jnp.float32
    shift: bool = True

    @nn.compact
    def __call__(self, x: Float[AnyArray, "b p d"], mask: Bool[AnyArray, "b p"], train: bool) -> Float[Array, "b p d"]:
        shape = x.shape[1:]
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype) if self.shift else None
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, self.param_dtype)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, self.param_dtype)
        if not train:
            mean, var = running_mean.value, running_var.value
        else:

            def total(values: AnyArray) -> Array:
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
        y = (jnp.asarray(x) - mean) * lax.rsqrt(var + self.epsilon) * scale
        return y if bias is None else y + bias


class IdentityHeads(nn.Module):
    """IP_i of Eq. 6, one head per region: dropout, dense (no bias), batch norm, dense to the identities.

    With dim = 0, the first dense layer and its batch norm are omitted.
    """

    classes: int
    dim: int
    dropout: float
    visible_only: bool
    axis_name: str | None = None
    param_dtype: DTypeLike = jnp.float32
    bias: bool = True

    @nn.compact
    def __call__(
        self, features: Float[AnyArray, "b p c"], visible: Bool[AnyArray, "b p"], train: bool
    ) -> Float[Array, "b p k"]:
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


def _mean_over(
    x: Float[Array, "b h w c"], valid: Bool[AnyArray, "b h w"] | None, axes: int | tuple[int, ...]
) -> Float[Array, "b *n c"]:
    """The mean over the axes of the cells, restricted to `valid` cells if given."""
    if valid is None:
        return jnp.mean(x, axes)
    return jnp.sum(jnp.where(valid[..., None], x, 0), axes) / jnp.maximum(jnp.sum(valid, axes), 1)[..., None]


class VPM(nn.Module):
    """VPM on a ResNet.

    Call arguments:
      image: uint8 RGB, normalized here with `mean` and `std`, or normalized floats.
      train: needs the "dropout" key and, to update statistics, `mutable=["batch_stats"]`.
      visible: the visible set, used only in training (default: all regions).
      valid: the cells of T that the image covers (default: all). Other cells are excluded from Eqs. 1 to 3.

    Returns (logits [B, P, K], out), where out holds, in float32 unless noted:
      feature_map [B, h, w, C]     T, in the compute dtype
      locator_logits [B, h, w, P]  before the softmax of Eq. 1; w is 1 for a row locator
      probability [B, h, w, P]     Eq. 1; w is 1 for a row locator
      visibility [B, P]            Eq. 2, in cells
      region_features [B, P, C]    Eq. 3
      neck_features [B, P, C]      the region features after the neck, if there is one
      logits [B, P, K], and global_logits [B, K] with a global head
      stem, stage1 ... stage4      the backbone's feature maps, in the compute dtype

    Raises ValueError for images of another shape or dtype.
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
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(
        self,
        image: Shaped[AnyArray, "b H W c"],
        train: bool = False,
        visible: Bool[AnyArray, "b p"] | None = None,
        valid: Bool[AnyArray, "b h w"] | None = None,
    ) -> tuple[Float[Array, "b p k"], dict[str, Array]]:
        bytes_or_floats = image.dtype == jnp.uint8 or jnp.issubdtype(image.dtype, jnp.floating)
        if image.ndim != 4 or not bytes_or_floats:
            raise ValueError(f"image is {image.dtype} {image.shape}, expected uint8 or normalized floats [B, H, W, 3]")
        regions = self.grid[0] * self.grid[1]
        if visible is None:
            visible = jnp.ones((image.shape[0], regions), bool)  # not len(): the batch size may be symbolic
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
        # The scale of the weights cancels in Eq. 3. It is 1 at the most likely cell, since a region may underflow.
        likeliest = lax.stop_gradient(jnp.max(log_probability, axis=(1, 2), keepdims=True))
        weights = jnp.exp(log_probability - jnp.maximum(likeliest, jnp.finfo(likeliest.dtype).min))
        if not self.pool_gradient:
            weights, visibility = lax.stop_gradient((weights, visibility))
        # The weight of a row applies to all of its cells.
        cell_weights = jnp.broadcast_to(weights, (*feature_map.shape[:3], regions))
        total = jnp.sum(weights, axis=(1, 2))
        if valid is not None:  # an image that covers no cell has zero features
            cell_weights, total = jnp.where(valid[..., None], cell_weights, 0), jnp.where(total > 0, total, 1)
        region_features = jnp.einsum("bhwp,bhwc->bpc", cell_weights, feature_map) / total[..., None]

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

    def locate(
        self, feature_map: Float[Array, "b h w c"], train: bool, valid: Bool[AnyArray, "b h w"] | None = None
    ) -> Float[Array, "b h w_or_1 p"]:
        """The region locator's logits; one per row for a row locator."""
        batch, h, w, channels = feature_map.shape
        rows, cols = self.grid
        regions = rows * cols
        if self.locator == "stripes":
            # PCB: a uniform partition, independent of the image; logits of 50 make the softmax one-hot.
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
