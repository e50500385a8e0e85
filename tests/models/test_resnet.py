"""What the backbone writes itself and its gradients, against sums in float64 NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import optimized

from vpm_jax.models import resnet
from vpm_jax.models.resnet import convolve, max_pool


@pytest.mark.parametrize("batch", [1, 6, 48, 35])  # whole, and in parts
@pytest.mark.parametrize("size, stride", [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_convolution_and_its_gradients(float64, size, stride, batch):
    random = np.random.default_rng(0)
    x, kernel = random.normal(size=(batch, 7, 6, 3)), random.normal(size=(size, size, 3, 2))
    y, back = jax.vjp(jax.jit(lambda x, kernel: convolve(x, kernel, stride)), x, kernel)
    g = random.normal(size=y.shape)
    by_x, by_kernel = back(g)

    pad = size // 2
    padded = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    expected, expected_by_kernel, by_padded = np.zeros(y.shape), np.zeros(kernel.shape), np.zeros(padded.shape)
    for i, j in np.ndindex(size, size):
        seen = np.s_[:, i : i + 7 : stride, j : j + 6 : stride]
        window = padded[seen][:, : y.shape[1], : y.shape[2]]
        expected += window @ kernel[i, j]
        expected_by_kernel[i, j] = np.einsum("bhwi,bhwo->io", window, g)
        by_padded[seen][:, : y.shape[1], : y.shape[2]] += g @ kernel[i, j].T
    for got, want in (
        (y, expected),
        (by_kernel, expected_by_kernel),
        (by_x, by_padded[:, pad : pad + 7, pad : pad + 6]),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("batch", [1, 2, 5, 12])
@pytest.mark.parametrize("size, stride, into, out", [(1, 1, 8, 5), (1, 2, 5, 8), (3, 1, 128, 136), (3, 2, 136, 128)])
def test_bfloat16_is_float32_rounded_once(size, stride, into, out, batch):
    random = np.random.default_rng(0)
    x = jnp.asarray(random.normal(size=(batch, 7, 5, into)), jnp.bfloat16)
    kernel = jnp.asarray(random.normal(size=(size, size, into, out)), jnp.bfloat16)
    g = jnp.asarray(random.normal(size=(batch, -(-7 // stride), -(-5 // stride), out)), jnp.bfloat16)

    @optimized
    def everything(x, kernel, g):
        y, back = jax.vjp(lambda x, kernel: convolve(x, kernel, stride), x, kernel)
        return y, *back(g)

    expected = everything(*(a.astype(jnp.float32) for a in (x, kernel, g)))
    for got, want in zip(everything(x, kernel, g), expected, strict=True):
        assert got.dtype == jnp.bfloat16
        difference = np.abs(got.astype(np.float32) - want)
        assert np.all(difference <= 2.0**-8 * np.abs(want) + 1e-4)  # half of bfloat16's last digit, and float32's own


@pytest.mark.parametrize("pool", [max_pool, resnet._reduce_window], ids=["here", "on TPU"])
@pytest.mark.parametrize("height, width", [(8, 6), (7, 5), (1, 4), (2, 1)])
def test_max_pool_and_its_gradient(float64, height, width, pool):
    random = np.random.default_rng(0)
    x = random.permutation(2 * height * width * 3).reshape(2, height, width, 3) - 20.0  # no two alike, many negative
    y, back = jax.vjp(jax.jit(pool), x)
    g = random.normal(size=y.shape)
    expected, by_x = np.zeros((2, -(-height // 2), -(-width // 2), 3)), np.zeros(x.shape)
    for b, i, j, c in np.ndindex(expected.shape):
        top, left = max(2 * i - 1, 0), max(2 * j - 1, 0)
        window = x[b, top : 2 * i + 2, left : 2 * j + 2, c]
        row, column = np.unravel_index(window.argmax(), window.shape)
        expected[b, i, j, c] = window.max()
        by_x[b, top + row, left + column, c] += g[b, i, j, c]
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(back(g)[0], by_x, rtol=1e-12, atol=1e-12)


def test_max_pool_of_bfloat16():
    random = np.random.default_rng(0)
    x, g = (jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in ((2, 7, 5, 3), (2, 4, 3, 3)))
    x32, g32 = x.astype(jnp.float32), g.astype(jnp.float32)
    got, expected = (jax.vjp(max_pool, a)[1](b)[0] for a, b in ((x, g), (x32, g32)))
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(np.float32), expected, rtol=2.0**-8, atol=1e-6)


def test_equal_cells_share_the_gradient_of_max_pool(float64):
    g = np.random.default_rng(0).normal(size=(1, 3, 2, 1))
    _, back = jax.vjp(max_pool, np.zeros((1, 5, 4, 1)))
    by_x = back(g)[0]
    np.testing.assert_allclose(by_x.sum(), g.sum(), rtol=1e-12)
    # The corner's window has four cells, its neighbour to the right six; both see the second cell.
    np.testing.assert_allclose(by_x[0, 0, :2, 0], [g[0, 0, 0, 0] / 4, g[0, 0, 0, 0] / 4 + g[0, 0, 1, 0] / 6])
