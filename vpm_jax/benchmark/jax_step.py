"""The training step as training runs it, and the limits of the machine under it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vpm_jax import config as config_lib
from vpm_jax import parallel
from vpm_jax.benchmark.timing import clocked, matmul_size, threads

COPY_BYTES = {"cpu": 2**28}  # far beyond any cache; 2**30 elsewhere


def describe() -> dict[str, Any]:
    """The facts about the device that JAX finds."""
    parallel.prepare_backend()
    import jax

    device = jax.devices()[0]
    name = f"the CPU ({threads()} thread{'s' * (threads() > 1)})" if device.platform == "cpu" else device.device_kind
    return {"platform": device.platform, "device": name}


def limits(dtype: str) -> tuple[dict[str, float], dict[str, Callable[[int], None]]]:
    """{"matmul": FLOPs, "copy": bytes} of one repetition, and these two as functions of the repetitions.

    The product is of `dtype`, at the precision that the model's own products have.
    """
    import jax
    import jax.numpy as jnp

    platform = jax.devices()[0].platform
    size, moved = matmul_size(platform), COPY_BYTES.get(platform, 2**30)
    a = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)
    x = jnp.zeros(moved // 4, jnp.float32)
    product = jax.jit(lambda a: a @ a)
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)  # in place: new pages would cost more than the copying

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


def build(config_json: str, batch: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Callable]]:
    """What `step.Side` serves: facts, and {"step", "matmul", "copy"}, functions of the repetitions."""
    facts = describe()
    import jax

    from vpm_jax import step

    jax.config.update("jax_enable_compilation_cache", False)  # compiling is measured too
    config = config_lib.from_json(config_json, "config")
    state, on_device = step.init_state(config), jax.device_put(batch)
    train_step = jax.jit(step.make_step(config), donate_argnums=0)
    facts["compiled"], compiled = clocked(lambda: train_step.lower(state, on_device).compile())
    cost = compiled.cost_analysis() or {}
    facts |= {"flops": cost.get("flops"), "bytes": cost.get("bytes accessed")}

    def steps(repetitions: int) -> None:
        nonlocal state
        for _ in range(repetitions):
            state, metrics = compiled(state, on_device)
        jax.block_until_ready((state, metrics))

    facts["limits"], work = limits(config.model.dtype)
    return facts, {"step": steps, **work}
