"""Batch normalization of feature maps, with ReLU, in few passes over memory.

Training on accelerators is bound by the bytes that it moves, and batch norm moves most of them. Autodiff reads the
feature maps more often than needed, and writes masks and gradients that are cheaper to compute again.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from vpm_jax.models import cpu


def channel_sum(x: Float[Array, "b h w c"]) -> Float[Array, " c"]:
    """The sum over all but the channels."""
    return lax.platform_dependent(x, cpu=cpu.channel_sum, default=partial(jnp.sum, axis=(0, 1, 2)))


def _separate(*arrays: Array) -> tuple[Array, ...]:
    """A barrier, behind which XLA computes again what it would otherwise keep in memory or read twice.

    None on TPU, where three blocks of ResNet-50 move 7.9 GB without it and 9.2 with it.
    """
    return lax.platform_dependent(
        *arrays, tpu=lambda *arrays: arrays, default=lambda *arrays: lax.optimization_barrier(arrays)
    )


def _means(a: Array, b: Array, axis_name: str | None) -> Array:
    """The means [2, C] of two maps [B, h, w, C] over all but the channels, and over the devices in one reduction."""
    means = jnp.stack([channel_sum(a), channel_sum(b)]) / (a.size // a.shape[-1])
    return lax.pmean(means, axis_name) if axis_name else means


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def normalize(
    x: Float[Array, "b h w c"],
    scale: Float[Array, " c"],
    bias: Float[Array, " c"],
    origin: Float[Array, " c"],
    epsilon: float,
    relu: bool,
    axis_name: str | None,
) -> tuple[Float[Array, "b h w c"], Float[Array, " c"], Float[Array, " c"]]:
    """Batch norm by the batch's own statistics, and ReLU: (y of x's dtype, mean, variance).

    Both moments are taken about `origin` in one pass over x. The variance loses digits if the mean is many standard
    deviations away from it. The mean and the variance have no gradient.
    """
    return _normalize(x, scale, bias, origin, epsilon, relu, axis_name)[0]


def _normalize(
    x: Array, scale: Array, bias: Array, origin: Array, epsilon: float, relu: bool, axis_name: str | None
) -> tuple[tuple[Array, Array, Array], tuple[Array, ...]]:
    wide = x.astype(origin.dtype)
    difference = wide - origin
    offset, square = _means(difference, jnp.square(difference), axis_name)
    mean, var = origin + offset, jnp.maximum(square - jnp.square(offset), 0)
    inverse = lax.rsqrt(var + epsilon)
    y = (wide - mean) * (inverse * scale) + bias
    y = nn.relu(y) if relu else y
    return (y.astype(x.dtype), mean, var), (x, scale, bias, mean, inverse)


def _normalize_gradient(
    epsilon: float, relu: bool, axis_name: str | None, saved: tuple[Array, ...], gradients: tuple[Array, Array, Array]
) -> tuple[Array, Array, Array, Array]:
    x, scale, bias, mean, inverse = saved
    g = gradients[0]

    def wide(x: Array, g: Array) -> tuple[Array, Array]:
        difference, g = x.astype(mean.dtype) - mean, g.astype(mean.dtype)
        return difference, jnp.where(difference * (inverse * scale) + bias > 0, g, 0) if relu else g

    difference, masked = wide(x, g)
    product = masked * difference
    by_bias, by_variance = channel_sum(masked), channel_sum(product)
    # Without the barrier, XLA keeps the wide arrays in memory instead of computing them again from x and g.
    x, g, by_bias, by_variance = _separate(x, g, by_bias, by_variance)
    difference, masked = wide(x, g)
    means = jnp.stack([by_bias, by_variance]) / (x.size // x.shape[-1])
    mean_gradient, mean_product = lax.pmean(means, axis_name) if axis_name else means
    dx = (masked - mean_gradient - difference * (jnp.square(inverse) * mean_product)) * (inverse * scale)
    return dx.astype(x.dtype), by_variance * inverse, by_bias, jnp.zeros_like(mean)


normalize.defvjp(_normalize, _normalize_gradient)


@jax.custom_vjp
def add_relu(x: Float[Array, "b h w c"], y: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
    """ReLU of x + y. The sum is kept for the gradient, as the next layer does anyway."""
    return nn.relu(x + y)


def _add_relu_gradient(total: Array, g: Array) -> tuple[Array, Array]:
    total, g = _separate(total, g)  # otherwise XLA adds again, which reads two arrays instead of one
    g = jnp.where(total > 0, g, 0)
    return g, g


add_relu.defvjp(lambda x, y: (total := add_relu(x, y), total), _add_relu_gradient)


class BatchNorm(nn.Module):
    """Batch norm per channel, with the variables of `flax.linen.BatchNorm`; with ReLU if the call asks for it.

    In training, moments are taken about the running mean. Statistics and arithmetic are float32 (float64 for float64
    inputs); the result has `dtype`.
    """

    train: bool
    momentum: float = 0.9
    epsilon: float = 1e-5
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], relu: bool = False) -> Float[Array, "b h w c"]:
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, channels, self.param_dtype)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        wide = jnp.promote_types(x.dtype, jnp.float32)
        if not self.train:
            y = (x.astype(wide) - running_mean.value) * (scale * lax.rsqrt(running_var.value + self.epsilon)) + bias
            return (nn.relu(y) if relu else y).astype(self.dtype)
        axis_name = None if self.is_initializing() else self.axis_name
        origin = running_mean.value.astype(wide)
        y, mean, var = normalize(x, scale, bias, origin, self.epsilon, relu, axis_name)
        if not self.is_initializing():
            for running, value in ((running_mean, mean), (running_var, var)):
                running.value = self.momentum * running.value + (1 - self.momentum) * value
        return y.astype(self.dtype)
