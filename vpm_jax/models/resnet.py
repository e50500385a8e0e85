"""ResNet-10/18/34/50/101 for re-ID (He et al., CVPR 2016), which returns every stage.

The last stage may keep its resolution (`last_stride=1`), any width is allowed, and a bottleneck's stride is on its 3x3
convolution (torchvision) or its first 1x1 (Caffe, Keras).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Float

from vpm_jax.arrays import AnyArray
from vpm_jax.geometry import STEMS
from vpm_jax.models import cpu
from vpm_jax.models.batch_norm import BatchNorm, add_relu

STAGE_BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
BOTTLENECK = {10: False, 18: False, 34: False, 50: True, 101: True}

# He et al., ICCV 2015, with fan-out: the initializer of torchvision's ResNet and of the released code.
kaiming_fan_out = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _convolve(x: Array, kernel: Array, stride: int) -> Array:
    k = len(kernel)
    if k == 1:
        if stride > 1:  # XLA:GPU fails a check if it fuses the slice into a product with a split sum
            x = lax.optimization_barrier(x[:, ::stride, ::stride])
        return x @ kernel[0, 0]
    strides, padding = (stride, stride), [(k // 2, k // 2)] * 2
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _gradients(stride: int, inputs: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = inputs

    def kernel_gradient(x: Array, g: Array) -> Array:
        return jax.linear_transpose(lambda kernel: _convolve(x, kernel, stride), kernel)(g)[0]

    def kernel_gradient_on_cpu(x: Array, g: Array) -> Array:
        return cpu.kernel_gradient(kernel_gradient, x, g, kernel, stride)

    def input_gradient(kernel: Array, g: Array) -> Array:
        return jax.linear_transpose(lambda x: _convolve(x, kernel, stride), x)(g)[0]

    if stride == 1 and cpu.suits(x, kernel):
        dx = lax.platform_dependent(kernel, g, cpu=cpu.input_gradient, default=input_gradient)
    else:
        dx = input_gradient(kernel, g)
    return dx, lax.platform_dependent(x, g, cpu=kernel_gradient_on_cpu, default=kernel_gradient)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve(
    x: Float[Array, "b h w in"], kernel: Float[Array, "k k in out"], stride: int
) -> Float[Array, "b h2 w2 out"]:
    """Convolves x with a kernel of odd size k, zero-padded by k // 2, at every stride-th cell."""
    default = partial(_convolve, stride=stride)
    if cpu.suits(x, kernel):
        return lax.platform_dependent(x, kernel, cpu=partial(cpu.convolve, stride=stride), default=default)
    return default(x, kernel)


convolve.defvjp(lambda x, kernel, stride: (convolve(x, kernel, stride), (x, kernel)), _gradients)


def _windows(x: Array) -> list[Array]:
    """The nine cells of every window of `max_pool`, row by row, each [B, ceil(h / 2), ceil(w / 2), C]."""
    _, h, w, _ = x.shape
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    return [x[:, i : i + h : 2, j : j + w : 2] for i in range(3) for j in range(3)]


@jax.custom_vjp
def max_pool(x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 c"]:
    """Max pooling with 3x3 windows, stride 2 and padding 1; equal cells share the gradient.

    The gradient is assembled from the four kinds of cells (even or odd row and column), each of which has fixed
    positions in fixed windows. Autodiff of a reduce_window gives a scatter, with three times the memory traffic on GPU;
    autodiff of the nine shifted maps gives nine masks. Either takes four times as long on CPU. On TPU, whose arrays are
    tiled, the reduce_window and its scatter move less than half the bytes; the first of equal cells gets the gradient.
    """
    return lax.platform_dependent(x, tpu=_reduce_window, default=lambda x: reduce(jnp.maximum, _windows(x)))


def _reduce_window(x: Array) -> Array:
    padding = ((0, 0), (1, 1), (1, 1), (0, 0))
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)


def _scatter(x: Array, y: Array, g: Array) -> Array:
    return jax.vjp(_reduce_window, x)[1](g)[0]


def _max_pool_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y = max_pool(x)
    return y, (x, y)


def _max_pool_gradient(inputs: tuple[Array, Array], g: Array) -> tuple[Array]:
    x, y = inputs
    on_cpu = cpu.in_float32(_distribute) if g.dtype == jnp.bfloat16 else _distribute
    return (lax.platform_dependent(x, y, g, cpu=on_cpu, tpu=_scatter, default=_distribute),)


def _distribute(x: Array, y: Array, g: Array) -> Array:
    """Gives the gradient g of y = max_pool(x) to the largest cells of each window."""
    b, h, w, c = x.shape
    largest = [cell == y for cell in _windows(x)]
    share = (g / sum(cell.astype(jnp.float32) for cell in largest)).astype(g.dtype)
    upper, middle, lower = ([jnp.where(cell, share, 0) for cell in largest[row : row + 3]] for row in range(0, 9, 3))

    def from_below(v: Array) -> Array:  # of the windows one row further down
        return jnp.pad(v[:, 1:], ((0, 0), (0, 1), (0, 0), (0, 0)))

    def columns(row: list[Array]) -> tuple[Array, Array]:
        """Even columns, which are window centers, and odd ones, which are two windows' edges."""
        left, center, right = row
        return center, right + jnp.pad(left[:, :, 1:], ((0, 0), (0, 0), (0, 1), (0, 0)))

    even, odd = columns(middle), [a + from_below(b) for a, b in zip(columns(lower), columns(upper), strict=True)]
    rows = [jnp.stack(cells, 3).reshape(b, y.shape[1], -1, c) for cells in (even, odd)]
    return jnp.stack(rows, 2).reshape(b, 2 * y.shape[1], -1, c)[:, :h, :w]


max_pool.defvjp(_max_pool_forward, _max_pool_gradient)


class Conv(nn.Module):
    """A convolution with "same" padding and without bias; kernel [k, k, in, out]."""

    channels: int
    size: int
    stride: int = 1
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 out"]:
        k, s = self.size, self.stride
        kernel = self.param("kernel", kaiming_fan_out, (k, k, x.shape[-1], self.channels), self.param_dtype)
        kernel = kernel.astype(self.dtype)
        if k == s > 1:  # patches: moved into the channels, for a 1x1 convolution
            b, h, w, c = x.shape
            x = jnp.pad(x, ((0, 0), (0, -h % k), (0, -w % k), (0, 0)))
            x = x.reshape(b, -(-h // k), k, -(-w // k), k, c).transpose(0, 1, 3, 2, 4, 5)
            x, kernel, s = x.reshape(*x.shape[:3], -1), kernel.reshape(1, 1, -1, self.channels), 1
        return convolve(x, kernel, s)


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, or the bottleneck 1x1, 3x3, 1x1 with 4 * width output channels."""

    width: int
    stride: int
    bottleneck: bool
    stride_on: str
    conv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h2 w2 out"]:
        out = 4 * self.width if self.bottleneck else self.width
        if self.bottleneck:
            first, second = (self.stride, 1) if self.stride_on == "1x1" else (1, self.stride)
            layers = [(self.width, 1, first), (self.width, 3, second), (out, 1, 1)]
        else:
            layers = [(self.width, 3, self.stride), (out, 3, 1)]
        y = x
        for i, (channels, size, stride) in enumerate(layers, 1):
            y = self.conv(channels, size, stride, name=f"conv{i}")(y)
            y = self.norm(name=f"bn{i}")(y, relu=i < len(layers))
        if x.shape != y.shape:
            x = self.conv(out, 1, self.stride, name="conv_shortcut")(x)
            x = self.norm(name="bn_shortcut")(x)
        return add_relu(x, y)


class ResNet(nn.Module):
    """The convolutional layers of a ResNet.

    Takes normalized RGB images and returns the feature maps "stem" and "stage1" ... "stage4", each [B, h, w, C] in
    `dtype`. H and W need not be multiples of the stride.
    """

    depth: int = 50
    width: int = 64
    stem: str = "7x7"
    strides: tuple[int, int, int] = (1, 2, 2)  # of stages 1 to 3
    last_stride: int = 1
    stride_on: str = "3x3"
    bn_epsilon: float = 1e-5
    bn_momentum: float = 0.9
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x: Float[AnyArray, "b H W 3"], train: bool = False) -> dict[str, Array]:
        conv = partial(Conv, dtype=self.dtype, param_dtype=self.param_dtype)
        norm = partial(
            BatchNorm,
            train=train,
            momentum=self.bn_momentum,
            epsilon=self.bn_epsilon,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            axis_name=self.axis_name,
        )
        stages = {}
        x = jnp.asarray(x, self.dtype)
        size, stride = STEMS[self.stem]
        x = conv(self.width, size, stride, name="conv_stem")(x)
        x = stages["stem"] = norm(name="bn_stem")(x, relu=True)
        if self.stem == "7x7":
            x = max_pool(x)
        strides = (*self.strides, self.last_stride)
        for s, (blocks, stage_stride) in enumerate(zip(STAGE_BLOCKS[self.depth], strides, strict=True), 1):
            for b in range(blocks):
                x = Block(
                    width=self.width * 2 ** (s - 1),
                    stride=stage_stride if b == 0 else 1,
                    bottleneck=BOTTLENECK[self.depth],
                    stride_on=self.stride_on,
                    conv=conv,
                    norm=norm,
                    name=f"stage{s}_block{b + 1}",
                )(x)
            stages[f"stage{s}"] = x
        return stages
