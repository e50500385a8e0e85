"""Optimizer and schedules: SGD with Nesterov momentum and coupled weight decay, or AdamW, in one or two stages.

Everything is a function of the step, so that both stages share one compiled training step; as tables, which are its
arguments, schedules share it too. Configs are resolved (`training.resolve`): their stages have steps per epoch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from vpm_jax.schedule import Stage, schedule

Schedule = Callable[[Any], Any]  # step, an int or traced, -> value


def _starts(config: ConfigDict) -> list[int]:
    """The first step of each stage after the first."""
    return [stage.first_step for stage in schedule(config)[1:]]


def learning_rate(config: ConfigDict) -> Schedule:
    """The learning rate of the new layers; the backbone's is multiplied by optim.backbone_multiplier."""
    stages = schedule(config)
    total = stages[-1].end_step if config.optim.schedule == "cosine" else 0

    def of_stage(stage: Stage) -> Schedule:
        s, per_epoch = config[stage.name], stage.steps_per_epoch
        if total:
            whole = optax.cosine_decay_schedule(s.learning_rate, total)
            main: Schedule = lambda step: whole(stage.first_step + step)  # noqa: E731
        elif s.schedule == "cosine":
            main = optax.cosine_decay_schedule(s.learning_rate, max(stage.steps, 1))
        else:
            main = optax.piecewise_constant_schedule(
                s.learning_rate, {int(epoch * per_epoch): s.decay for epoch in s.decay_epochs}
            )
        warmup = s.warmup_epochs * per_epoch
        if not warmup:
            return main
        return lambda step: main(step) * jnp.minimum((step + 1) / warmup, 1)

    return optax.join_schedules([of_stage(stage) for stage in stages], _starts(config))


def triplet_weight(config: ConfigDict) -> Schedule:
    """The weight of the triplet loss."""

    def of_stage(stage: Stage) -> Schedule:
        s = config[stage.name]
        start = int(s.triplet_start * stage.steps_per_epoch)
        return lambda step: jnp.where(step >= start, s.triplet_weight, 0.0)

    return optax.join_schedules([of_stage(stage) for stage in schedule(config)], _starts(config))


class Schedules(NamedTuple):
    """What depends on the step: functions of it, or their tables."""

    learning_rate: Any
    triplet_weight: Any
    restarts: Any  # whether the optimizer starts again: a stage does not inherit momentum


def schedules(config: ConfigDict) -> Schedules:
    """The functions of a config."""
    starts = jnp.asarray(_starts(config) if config.optim.schedule == "stages" else [], jnp.int32)
    return Schedules(learning_rate(config), triplet_weight(config), lambda step: jnp.isin(step, starts))


def tabulate(functions: Schedules, steps: int) -> Schedules:
    """The values at each step, as arrays whose length is a power of two: schedules of most lengths share one shape."""
    index = jnp.arange(max(2**16, 1 << (steps - 1).bit_length()), dtype=jnp.int32)
    return jax.jit(jax.vmap(lambda step: Schedules(*(jnp.asarray(function(step)) for function in functions))))(index)


def look_up(tables: Schedules) -> Schedules:
    """The functions of the tables."""
    return Schedules(*(partial(operator.getitem, table) for table in tables))


class RestartState(NamedTuple):
    steps: jax.Array  # int32, updates so far
    inner: Any  # the state of the inner transformation


def restart(inner: optax.GradientTransformation, restarts: Schedule) -> optax.GradientTransformation:
    """Resets the state of `inner` before each of the steps for which `restarts` is true."""

    def init(params: optax.Params) -> RestartState:
        return RestartState(jnp.zeros([], jnp.int32), inner.init(params))

    def update(
        updates: optax.Updates, state: RestartState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, RestartState]:
        fresh = inner.init(params)
        now = restarts(state.steps)
        old = jax.tree.map(lambda new, kept: jnp.where(now, new, kept), fresh, state.inner)
        updates, new = inner.update(updates, old, params)
        return updates, RestartState(state.steps + 1, new)

    return optax.GradientTransformation(init, update)


def optimizer(config: ConfigDict, by_step: Schedules | None = None) -> optax.GradientTransformation:
    """PyTorch's SGD, which adds weight decay to every parameter's gradient before momentum, or its AdamW.

    Args:
      config: a resolved config.
      by_step: functions of the step (default: the config's).
    """
    o = config.optim
    by_step = by_step or schedules(config)

    def multiply(updates: Any, params: optax.Params | None = None) -> Any:
        del params
        return {
            k: jax.tree.map(lambda u: u * o.backbone_multiplier, v) if k == "backbone" else v
            for k, v in updates.items()
        }

    decay = optax.add_decayed_weights(o.weight_decay)
    if o.name == "adamw":
        transforms = [optax.scale_by_adam(b1=o.momentum), decay]
    else:
        transforms = [decay, optax.trace(o.momentum, o.nesterov)]
    if o.clip:
        transforms.insert(0, optax.clip_by_global_norm(o.clip))
    return optax.chain(
        restart(optax.chain(*transforms), by_step.restarts),
        optax.stateless(multiply),
        optax.scale_by_learning_rate(by_step.learning_rate),
    )
