"""Batch norm of feature maps against its formulas in float64 NumPy, alone and shared by devices."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import fill, optimized

from vpm_jax.models.batch_norm import BatchNorm, add_relu, channel_sum

EXACT = dict(rtol=1e-12, atol=1e-12)
SHAPES = [(4, 16, 8, 3), (2, 12, 5, 3), (1, 1, 1, 2), (6, 7, 6, 1)]


def sample(shape, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(3, 2, size=shape), random.normal(size=shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_sum_over_all_but_the_channels(float64, shape):
    x, _ = sample(shape)
    np.testing.assert_allclose(jax.jit(channel_sum)(x), x.sum((0, 1, 2)), **EXACT)


def test_sum_keeps_the_digits_of_float32():
    x = np.random.default_rng(1).uniform(0, 1, size=(4, 96, 32, 8)).astype(np.float32)
    exact = x.astype(np.float64).sum((0, 1, 2))
    assert np.abs(optimized(channel_sum)(x) / exact - 1).max() < 3e-7


def reference(x, g, scale, bias, epsilon, relu=False):
    """The normalised x, and the gradients of sum(g * it) by x, scale and bias (Ioffe and Szegedy, ICML 2015)."""
    mean, deviation = x.mean((0, 1, 2)), np.sqrt(x.var((0, 1, 2)) + epsilon)
    normal = (x - mean) / deviation
    y = normal * scale + bias
    if relu:
        y, g = np.maximum(y, 0), g * (y > 0)
    by_scale, by_bias = (g * normal).sum((0, 1, 2)), g.sum((0, 1, 2))
    count = x[..., 0].size
    by_x = scale / deviation * (g - by_bias / count - normal * by_scale / count)
    return y, (by_x, by_scale, by_bias)


@pytest.mark.parametrize("devices", [None, 2])
@pytest.mark.parametrize("shape, relu", [(SHAPES[0], False), (SHAPES[1], True)])
def test_training_mode(float64, shape, relu, devices):
    x, g = sample(shape)
    net = BatchNorm(True, 0.8, 1e-3, jnp.float64, jnp.float64, axis_name="data" if devices else None)
    variables = fill(jax.eval_shape(net.init, jax.random.key(0), x))
    params, before = variables["params"], variables["batch_stats"]

    def gradients(x, g):
        def apply(x, params):
            return net.apply({"params": params, "batch_stats": before}, x, relu, mutable=["batch_stats"])

        y, back, updates = jax.vjp(apply, x, params, has_aux=True)
        by_x, by_params = back(g)
        # As the step does: what devices share is differentiated on each, and then summed.
        return y, by_x, jax.lax.psum(by_params, "data") if devices else by_params, updates

    if devices:
        halves = (a.reshape(2, -1, *shape[1:]) for a in (x, g))
        y, by_x, by_params, updates = optimized(jax.vmap(gradients, axis_name="data"))(*halves)
        y, by_x = y.reshape(shape), by_x.reshape(shape)
        jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf[0], leaf[1]), (by_params, updates))
        by_params, updates = jax.tree.map(lambda leaf: leaf[0], (by_params, updates))
    else:
        y, by_x, by_params, updates = optimized(gradients)(x, g)

    expected, expected_gradients = reference(x, g, params["scale"], params["bias"], 1e-3, relu)
    np.testing.assert_allclose(y, expected, **EXACT)
    for got, want in zip((by_x, by_params["scale"], by_params["bias"]), expected_gradients, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-11)
    for name, value in (("mean", x.mean((0, 1, 2))), ("var", x.var((0, 1, 2)))):
        np.testing.assert_allclose(updates["batch_stats"][name], 0.8 * before[name] + 0.2 * value, **EXACT)


def test_variance_survives_a_large_mean_that_the_running_mean_follows():
    x = (sample((2, 16, 8, 4))[0] * 0.5 + 3000).astype(np.float32)
    net = BatchNorm(train=True)
    variables = net.init(jax.random.key(0), x)
    variables["batch_stats"]["mean"] += 2990
    y, _ = jax.jit(partial(net.apply, mutable=["batch_stats"]))(variables, x)
    expected, _ = reference(x.astype(np.float64), 0 * x, 1, 0, 1e-5)
    assert np.abs(y - expected).max() < 1e-3  # of E[x^2] - E[x]^2 no digit would be left


def test_add_relu_and_its_gradient(float64):
    (x, y), g = sample((3, 4, 5, 6)), sample((3, 4, 5, 6), 1)[1]
    total, back = jax.vjp(jax.jit(add_relu), x, y)
    np.testing.assert_array_equal(total, np.maximum(x + y, 0))
    for gradient in back(g):
        np.testing.assert_array_equal(gradient, g * (x + y > 0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_variables_and_eval_mode_are_those_of_flax(dtype):
    x = sample((2, 4, 6, 5))[0].astype(dtype)
    net, flax = BatchNorm(train=False, dtype=dtype), nn.BatchNorm(use_running_average=True, dtype=dtype)
    shapes = [jax.eval_shape(module.init, jax.random.key(0), x) for module in (net, flax)]
    assert shapes[0] == shapes[1]
    variables = fill(shapes[0])
    got, expected = (optimized(module.apply)(variables, x) for module in (net, flax))
    assert got.dtype == dtype
    np.testing.assert_allclose(got.astype(np.float32), expected.astype(np.float32), rtol=1e-5, atol=1e-5)
