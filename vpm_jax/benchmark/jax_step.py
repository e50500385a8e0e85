"""The training step, as in training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from vpm_jax import config as config_lib
from vpm_jax import step
from vpm_jax.benchmark.limits import limits
from vpm_jax.benchmark.timing import clocked


def build(config_json: str, batch: dict[str, np.ndarray]) -> tuple[dict[str, Any], dict[str, Callable]]:
    """The facts and the timed functions of a `step.Side`: {"step", "matmul", "copy"}, functions of the repetitions."""
    jax.config.update("jax_enable_compilation_cache", False)  # compile time is reported
    config = config_lib.from_json(config_json, "config")
    state, on_device, numbers = jax.device_put((step.init_state(config), batch, step.numbers(config)))
    train_step = jax.jit(step.make_step(config), donate_argnums=0)

    def compile_step() -> tuple[Any, Any]:
        lowered = train_step.lower(state, on_device, numbers)
        return lowered, lowered.compile()

    seconds, (lowered, compiled) = clocked(compile_step)
    # FLOPs before compiling: compilation for GPU replaces convolutions by cuDNN calls, which are not counted.
    flops = (lowered.cost_analysis() or {}).get("flops")
    accessed = (compiled.cost_analysis() or {}).get("bytes accessed")

    def steps(repetitions: int) -> None:
        nonlocal state
        for _ in range(repetitions):
            state, metrics = compiled(state, on_device, numbers)
        jax.block_until_ready((state, metrics))

    amounts, work = limits(config.model.dtype)
    facts = {"compiled": seconds, "flops": flops, "bytes": accessed, "limits": amounts}
    return facts, {"step": steps, **work}
