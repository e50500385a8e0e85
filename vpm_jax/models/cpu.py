"""Faster formulations of the network's operations for XLA:CPU (jaxlib 0.10.2); other platforms use the plain ones.

XLA:CPU has a fast bfloat16 product, twice as fast as float32 on processors with AVX512-BF16, but only for matrices,
only with a float32 result, and only if both operands are already laid out in memory as they are multiplied. Everything
else, including convolutions, it computes in float32. Here a bfloat16 convolution is such a product, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float


@cache
def _multiplies_bfloat16() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return "avx512_bf16" in file.read()
    except OSError:  # not Linux
        return False


def suits(x: Array, kernel: Array) -> bool:
    """Whether `convolve` is faster than XLA's own; gathering patches of few channels costs more than it saves."""
    size, _, channels, out = kernel.shape
    fixed = isinstance(x.shape[0], int)  # the batch size of an exported network is symbolic
    return (
        fixed
        and x.dtype == kernel.dtype == jnp.bfloat16
        and (size == 1 or (size == 3 and min(channels, out) >= 128))
        and _multiplies_bfloat16()
    )


def convolve(x: Array, kernel: Array, stride: int) -> Array:
    if len(kernel) == 1:
        x = x[:, ::stride, ::stride]
        return _product(x.reshape(-1, x.shape[-1]), kernel[0, 0]).astype(jnp.bfloat16).reshape(*x.shape[:3], -1)
    x, shape = _patches(x, len(kernel), stride)
    y = _product(x.reshape(-1, x.shape[-1]), kernel.reshape(x.shape[-1], -1)).astype(jnp.bfloat16)
    return _joined(y.reshape(*x.shape[:2], *shape, -1))


def input_gradient(kernel: Array, g: Array) -> Array:
    """The input gradient of a convolution with stride 1: the convolution of g with the flipped kernel."""
    return convolve(g, kernel[::-1, ::-1].swapaxes(2, 3), 1)


def kernel_gradient(
    plain: Callable[[Array, Array], Array], x: Array, g: Array, kernel: Array, stride: int
) -> Float[Array, "k k in out"]:
    """`plain(x, g)`, the kernel gradient of a convolution, up to four times as fast."""
    size = len(kernel)
    if suits(x, kernel):
        return _bfloat16_kernel_gradient(x, g, size, stride)
    if size == 1:  # a matrix product: contracting three dimensions would transpose both operands
        x, g = (a.reshape(-1, a.shape[-1]) for a in (x[:, ::stride, ::stride], g))
        if x.shape[1] > g.shape[1]:  # the wider operand goes right; without the barrier XLA swaps them back
            return lax.optimization_barrier(g.T @ x).T[None, None]
        return (x.T @ g)[None, None]
    # In groups of about 16 examples, which fit in cache; each group takes examples from every device.
    n = next(n for n in range(max(len(x) // 16, 1), 0, -1) if len(x) % n == 0)
    x, g = (a.reshape(-1, n, *a.shape[1:]) for a in (x, g))
    return sum(plain(x[:, i], g[:, i]) for i in range(n))  # type: ignore[return-value]


def channel_sum(x: Float[Array, "b h w c"]) -> Float[Array, " c"]:
    """The sum over all but the channels, up to 20 times as fast, and pairwise, so more accurate.

    XLA:CPU reduces down the columns of [cells, channels]. Here halves of the images are added, contiguous in memory,
    and the few cells left are summed by a product with ones.
    """
    for axis in (1, 2):  # not the examples, which may be sharded over devices
        while x.shape[axis] % 2 == 0:
            x = sum(jnp.split(x, 2, axis))  # type: ignore[assignment]
    x = x.reshape(-1, x.shape[-1])
    return jnp.ones(len(x), x.dtype) @ x


def in_float32(function: Callable[..., Array]) -> Callable[..., Array]:
    """`function` computed in float32: XLA:CPU pads and stacks bfloat16 slowly."""
    return lambda *arrays: function(*(x.astype(jnp.float32) for x in arrays)).astype(arrays[0].dtype)


def _bfloat16_kernel_gradient(x: Array, g: Array, size: int, stride: int) -> Array:
    x = _groups(x[:, ::stride, ::stride]) if size == 1 else _patches(x, size, stride)[0]
    x, g = (a.reshape(len(a), -1, a.shape[-1]) for a in (x, _groups(g)))
    narrow = x.shape[-1] < g.shape[-1]  # the narrower operand is transposed
    kernel = _sum_of_products(x, g) if narrow else _sum_of_products(g, x).T
    return kernel.reshape(size, size, -1, g.shape[-1]).astype(jnp.bfloat16)


def _product(a: Array, b: Array) -> Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _sum_of_products(a: Array, b: Array) -> Array:
    """[n, m, i] and [n, m, o] to float32 [i, o].

    Slicing into groups keeps XLA from folding the transpose into the product, which would then be a float32 one or,
    depending on its surroundings, fail at run time ("Unsupported element type for DotThunk"). A single group has no
    slice, hence the conversion.
    """
    if len(a) == 1:
        return a[0].T.astype(jnp.float32) @ b[0].astype(jnp.float32)
    a = a.swapaxes(1, 2)
    return sum(_product(a[i], b[i]) for i in range(len(a)))  # type: ignore[return-value]


def _groups(x: Array) -> Array:
    """[B, ...] to [n, B / n, ...] with n at most 4, each group with examples from every device."""
    n = next(n for n in (4, 3, 2, 1) if len(x) % n == 0)
    return x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1)


def _joined(x: Array) -> Array:
    """The inverse of `_groups`."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def _patches(x: Array, size: int, stride: int) -> tuple[Array, tuple[int, int]]:
    """The patch around every stride-th cell, [n, B / n, cells, size * size * C], and the output's (h, w)."""
    _, h, w, c = x.shape
    pad, shape = size // 2, (-(-h // stride), -(-w // stride))
    x = _groups(jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))))
    x = x.reshape(*x.shape[:2], -1, c)
    top, left = (np.arange(0, n, stride)[:, None] + np.arange(size) for n in (h, w))
    cells = top[:, None, :, None] * (w + 2 * pad) + left[:, None, :]  # [h, w, size, size]
    # A separate loop copies whole rows of channels; fused with the reshape below, XLA would copy cell by cell.
    x = lax.map(lambda group: jnp.take(group, cells.reshape(-1), axis=1, mode="clip"), x)
    return x.reshape(*x.shape[:2], -1, size * size * c), shape
