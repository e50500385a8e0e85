"""Optimiser and schedules: SGD with Nesterov momentum and coupled weight decay, in one or two stages.

Everything is a function of the step, so that both stages are one compiled training step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

Schedule = Callable[[Any], Any]


def stages(config: ConfigDict) -> list[ConfigDict]:
    """The stages that train at all, in order."""
    return [s for s in (config.stage1, config.stage2) if s.epochs > 0]


def total_steps(config: ConfigDict) -> int:
    """Steps of the whole training; needs resolved steps_per_epoch."""
    return sum(s.epochs * s.steps_per_epoch for s in stages(config))


def stage_starts(config: ConfigDict) -> list[int]:
    """The first step of each stage."""
    starts, step = [], 0
    for s in stages(config):
        starts.append(step)
        step += s.epochs * s.steps_per_epoch
    return starts


def _join(parts: list[Schedule], config: ConfigDict) -> Schedule:
    return optax.join_schedules(parts, stage_starts(config)[1:])


def learning_rate(config: ConfigDict) -> Schedule:
    """step -> learning rate of the new layers (the backbone's is times optim.backbone_multiplier)."""

    def one(s) -> Schedule:
        per_epoch = s.steps_per_epoch
        if s.schedule == "cosine":
            main = optax.cosine_decay_schedule(s.learning_rate, max(s.epochs * per_epoch, 1))
        else:
            main = optax.piecewise_constant_schedule(
                s.learning_rate, {int(epoch * per_epoch): s.decay for epoch in s.decay_epochs}
            )
        warmup = s.warmup_epochs * per_epoch
        if not warmup:
            return main
        return lambda step: main(step) * jnp.minimum((step + 1) / warmup, 1)

    return _join([one(s) for s in stages(config)], config)


def triplet_weight(config: ConfigDict) -> Schedule:
    """step -> weight of the triplet loss."""

    def one(s) -> Schedule:
        start = int(s.triplet_start * s.steps_per_epoch)
        return lambda step: jnp.where(step >= start, s.triplet_weight, 0.0)

    return _join([one(s) for s in stages(config)], config)


class RestartState(NamedTuple):
    steps: jax.Array  # int32, updates so far
    inner: Any  # the state of what is restarted


def restart(inner: optax.GradientTransformation, steps: list[int]) -> optax.GradientTransformation:
    """`inner`, its state made new at each of `steps`: a stage starts without the last one's momentum."""

    def init(params):
        return RestartState(jnp.zeros([], jnp.int32), inner.init(params))

    def update(updates, state, params=None):
        fresh = inner.init(params)
        now = jnp.isin(state.steps, jnp.asarray(steps, jnp.int32))
        old = jax.tree.map(lambda new, kept: jnp.where(now, new, kept), fresh, state.inner)
        updates, new = inner.update(updates, old, params)
        return updates, RestartState(state.steps + 1, new)

    return optax.GradientTransformation(init, update)


def optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """PyTorch's SGD: weight decay joins the gradient of every parameter before momentum."""
    o = config.optim

    def multiply(updates, params=None):
        del params
        return {
            k: jax.tree.map(lambda u: u * o.backbone_multiplier, v) if k == "backbone" else v
            for k, v in updates.items()
        }

    sgd = optax.chain(optax.add_decayed_weights(o.weight_decay), optax.trace(o.momentum, o.nesterov))
    return optax.chain(
        restart(sgd, stage_starts(config)[1:]),
        optax.stateless(multiply),
        optax.scale_by_learning_rate(learning_rate(config)),
    )
