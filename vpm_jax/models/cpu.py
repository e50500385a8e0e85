"""Convolutions of bfloat16 written for XLA:CPU.

XLA:CPU (jaxlib 0.10.2) has a fast product of bfloat16, on processors with AVX512-BF16 twice as fast as float32's,
only for matrices, only with a result of float32, and only where both lie in memory as they are multiplied. All else,
convolutions too, it computes in float32. So a convolution is written as such a product here; its sums are rounded once.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import lax


def suits(x, kernel) -> bool:
    """Whether the below is faster than XLA's own: patches of few channels take longer than the product saves."""
    size, _, channels, out = kernel.shape
    known = isinstance(x.shape[0], int)  # an exported network takes any number of images, which has no parts
    return (
        known and x.dtype == kernel.dtype == jnp.bfloat16 and (size == 1 or (size == 3 and min(channels, out) >= 128))
    )


def convolve(x, kernel, stride: int):
    if len(kernel) == 1:
        x = x[:, ::stride, ::stride]
        return _product(x.reshape(-1, x.shape[-1]), kernel[0, 0]).astype(jnp.bfloat16).reshape(*x.shape[:3], -1)
    x, shape = _patches(x, len(kernel), stride)
    y = _product(x.reshape(-1, x.shape[-1]), kernel.reshape(x.shape[-1], -1)).astype(jnp.bfloat16)
    return _joined(y.reshape(*x.shape[:2], *shape, -1))


def input_gradient(kernel, g):
    """Of a convolution with stride 1: one of g, with the kernel turned round."""
    return convolve(g, kernel[::-1, ::-1].swapaxes(2, 3), 1)


def kernel_gradient(x, g, size: int, stride: int):
    x = _parts(x[:, ::stride, ::stride]) if size == 1 else _patches(x, size, stride)[0]
    x, g = (a.reshape(len(a), -1, a.shape[-1]) for a in (x, _parts(g)))
    narrow = x.shape[-1] < g.shape[-1]  # and so the one to transpose
    kernel = _sum_of_products(x, g) if narrow else _sum_of_products(g, x).T
    return kernel.reshape(size, size, -1, g.shape[-1]).astype(jnp.bfloat16)


def _product(a, b):
    return jnp.dot(a, b, preferred_element_type=jnp.float32)


def _sum_of_products(a, b):
    """a [n, m, i], b [n, m, o] to a float32 [i, o].

    In parts, as slices keep XLA from folding the transpose into the product: folded, it is one of float32 or, depending
    on what surrounds it, one that fails as it runs ("Unsupported element type for DotThunk"). So not in one part.
    """
    if len(a) == 1:
        return a[0].T.astype(jnp.float32) @ b[0].astype(jnp.float32)
    a = a.swapaxes(1, 2)
    return sum(_product(a[i], b[i]) for i in range(len(a)))


def _parts(x):
    """x [B, ...] as [n, B / n, ...] with n at most 4, each of examples of every device."""
    n = next(n for n in (4, 3, 2, 1) if len(x) % n == 0)
    return x.reshape(-1, n, *x.shape[1:]).swapaxes(0, 1)


def _joined(x):
    """`_parts` undone."""
    return x.swapaxes(0, 1).reshape(-1, *x.shape[2:])


def _patches(x, size: int, stride: int):
    """The cells around every stride-th cell side by side, [n, B / n, cells, size * size * C], and the new (h, w)."""
    _, h, w, c = x.shape
    pad, shape = size // 2, (-(-h // stride), -(-w // stride))
    x = _parts(jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0))))
    x = x.reshape(*x.shape[:2], -1, c)
    top, left = (np.arange(0, n, stride)[:, None] + np.arange(size) for n in (h, w))
    seen = top[:, None, :, None] * (w + 2 * pad) + left[:, None, :]  # [h, w, size, size]
    # A loop of its own copies whole rows of channels; fused with the reshape that follows, XLA would go cell by cell.
    x = lax.map(lambda part: jnp.take(part, seen.reshape(-1), axis=1, mode="clip"), x)
    return x.reshape(*x.shape[:2], -1, size * size * c), shape
