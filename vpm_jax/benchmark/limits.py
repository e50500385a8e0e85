"""This machine's limits for matrix products and memory bandwidth, measured with JAX."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from vpm_jax.benchmark.timing import best, matmul_size

COPY_BYTES = {"cpu": 2**28}  # far beyond any cache; 2**30 elsewhere


def accelerator() -> str:
    """The name of JAX's first device; "" for a CPU."""
    device = jax.devices()[0]
    return "" if device.platform == "cpu" else device.device_kind


def build() -> tuple[str, dict[str, Callable]]:
    """`accelerator` as the facts of a `step.Side` that measures nothing."""
    return accelerator(), {}


def limits(dtype: str, precision: str | None = None) -> tuple[dict[str, float], dict[str, Callable[[int], None]]]:
    """{"matmul": FLOPs, "copy": bytes} of one repetition, and both as functions of the number of repetitions.

    The product has `dtype` and, by default, the precision of a model's products.
    """
    platform = jax.devices()[0].platform
    size, moved = matmul_size(platform), COPY_BYTES.get(platform, 2**30)
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    x = jnp.zeros(moved // 4, jnp.float32)
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: new pages would cost more than the copy

    def matmul(repetitions: int) -> None:
        for _ in range(repetitions):
            out = product(a)
        out.block_until_ready()

    def copies(repetitions: int) -> None:
        nonlocal x
        for _ in range(repetitions):
            x = copy(x)
        x.block_until_ready()

    return {"matmul": 2.0 * size**3, "copy": 2.0 * moved}, {"matmul": matmul, "copy": copies}


def matmul_limit(dtype: str, clock: str, precision: str | None = None) -> tuple[float, str]:
    """(FLOP/s of the product of `limits`, the limit's name)."""
    amounts, work = limits(dtype, precision)
    repetitions = 1 if jax.default_backend() == "cpu" else 20
    peak = amounts["matmul"] * repetitions / best(partial(work["matmul"], repetitions), clock=clock)
    return peak, f"matmul at {peak / 1e9:,.0f} GFLOP/s"
