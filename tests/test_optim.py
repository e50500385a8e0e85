"""Schedules of every recipe at every step, and the optimiser against PyTorch's SGD written out in NumPy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import recipe

from vpm_jax import cli, optim
from vpm_jax.config import default, stage
from vpm_jax.schedule import notes as schedule_notes
from vpm_jax.schedule import schedule, triplet_weight
from vpm_jax.training import resolve


class Market:
    """What `resolve` asks of Market-1501's training set."""

    num_identities = 751

    def __len__(self):
        return 12936


def total_steps(config):
    return schedule(config)[-1].end_step


def stage_starts(config):
    return [stage.first_step for stage in schedule(config)]


def schedules(config):
    """(learning rate, triplet weight) of every step, and one step beyond."""
    steps = jnp.arange(total_steps(config) + 1)
    return (np.asarray(jax.vmap(one(config))(steps)) for one in (optim.learning_rate, optim.triplet_weight))


def test_market_trains_50_epochs_of_202_steps_and_80_of_93():
    config = resolve(recipe("market"), Market())
    assert total_steps(config) == 50 * 202 + 80 * 93
    assert stage_starts(config) == [0, 50 * 202]
    rate, triplet = schedules(config)
    high1, low1, high2 = 30 * 202, 20 * 202, 30 * 93
    low2 = 50 * 93 + 1
    np.testing.assert_allclose(rate, [0.1] * high1 + [0.01] * low1 + [0.1] * high2 + [0.01] * low2, rtol=1e-6)
    np.testing.assert_array_equal(triplet, [0] * 50 * 202 + [1] * (80 * 93 + 1))


def test_market_released_trains_130_epochs_of_93_steps():
    config = resolve(recipe("market_released"), Market())
    assert total_steps(config) == 130 * 93 and stage_starts(config) == [0]
    rate, triplet = schedules(config)
    np.testing.assert_allclose(rate, [0.1] * 80 * 93 + [0.02] * (50 * 93 + 1), rtol=1e-6)
    np.testing.assert_array_equal(triplet, 3)


def test_small_warms_up_and_follows_a_cosine():
    config = resolve(recipe("market", "small"), Market())
    # What is tuned may change here; the shape may not.
    epochs, warmup, start = (config.stage2[key] for key in ("epochs", "warmup_epochs", "triplet_start"))
    peak, weight = config.stage2.learning_rate, config.stage2.triplet_weight
    assert total_steps(config) == epochs * 93 and warmup > 0 and 0 < start < epochs
    rate, triplet = schedules(config)
    steps = np.arange(epochs * 93 + 1)
    cosine = peak * (1 + np.cos(np.pi * steps / (epochs * 93))) / 2
    np.testing.assert_allclose(rate, cosine * np.minimum((steps + 1) / (warmup * 93), 1), rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(triplet, np.where(steps >= start * 93, np.float32(weight), 0))


# --- the optimiser ------------------------------------------------------------------------------------

STEPS, BOUNDARY = 9, 4


def sgd_config(nesterov):
    config = default()
    config.optim.nesterov = nesterov
    config.optim.weight_decay = 0.05
    config.stage1 = stage(epochs=2, steps_per_epoch=2, learning_rate=0.1, decay_epochs=(1,))
    config.stage2 = stage(epochs=5, steps_per_epoch=1, learning_rate=0.2, decay_epochs=(3,), decay=0.5)
    assert total_steps(config) == STEPS and stage_starts(config)[1] == BOUNDARY
    return config


RATES = [0.1, 0.1, 0.01, 0.01, 0.2, 0.2, 0.2, 0.1, 0.1]


def problem():
    """(parameters, a gradient for every step), float64: a leaf of the backbone, two beside it."""
    random = np.random.default_rng(0)
    params = {"backbone": {"kernel": (3, 4)}, "heads": {"scale": (4,)}, "locator_kernel": (4, 2)}
    params = jax.tree.map(lambda shape: random.normal(size=shape), params, is_leaf=lambda x: isinstance(x, tuple))
    return params, [jax.tree.map(lambda p: random.normal(size=p.shape), params) for _ in range(STEPS)]


def run_optax(config, gradients=None):
    params, given = problem()
    gradients = gradients or given
    with jax.enable_x64(True):
        tx = optim.optimizer(config)
        state = tx.init(params)
        update = jax.jit(tx.update)
        for gradient in gradients:
            updates, state = update(gradient, state, params)
            params = optax.apply_updates(params, updates)
    return jax.tree.map(np.asarray, params)


@pytest.mark.parametrize("nesterov", [True, False])
def test_optimizer_is_pytorchs_sgd(nesterov):
    config = sgd_config(nesterov)
    o = config.optim
    assert (o.momentum, o.backbone_multiplier) == (0.9, 0.1)
    params, gradients = problem()
    expected = {}
    for group in params:
        [p], structure = jax.tree.flatten(params[group])
        momentum = np.zeros_like(p)
        for step, gradient in enumerate(gradients):
            g = jax.tree.leaves(gradient[group])[0] + o.weight_decay * p  # coupled, whatever the parameter
            if step == BOUNDARY:
                momentum = np.zeros_like(p)
            momentum = o.momentum * momentum + g
            direction = g + o.momentum * momentum if nesterov else momentum
            p = p - RATES[step] * (0.1 if group == "backbone" else 1) * direction
        expected[group] = jax.tree.unflatten(structure, [p])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), run_optax(config), expected)


def test_a_large_gradient_is_scaled_down_as_a_whole():
    config = sgd_config(True)
    _, gradients = problem()
    gradients = [jax.tree.map(lambda g, i=i: g * (i + 1) / 4, gradient) for i, gradient in enumerate(gradients)]
    norms = [np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(g))) for g in gradients]
    limit = float(np.median(norms))
    assert min(norms) < limit < max(norms)
    clipped = [
        jax.tree.map(lambda leaf, n=n: leaf * min(1, limit / n), g) for g, n in zip(gradients, norms, strict=True)
    ]
    expected = run_optax(config, clipped)
    config.optim.clip = limit
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), run_optax(config, gradients), expected)


def test_adamw_decays_apart_from_the_gradient_and_each_stage_starts_with_new_moments():
    config = sgd_config(True)
    config.optim.name = "adamw"
    decay, beta = config.optim.weight_decay, config.optim.momentum
    params, gradients = problem()
    found = run_optax(config)
    for group in params:
        [p] = jax.tree.leaves(params[group])
        for step, gradient in enumerate(gradients):
            [g] = jax.tree.leaves(gradient[group])
            if step in (0, BOUNDARY):  # a stage starts with new moments
                first, second, count = np.zeros_like(p), np.zeros_like(p), 0
            first, second, count = beta * first + (1 - beta) * g, 0.999 * second + 0.001 * g**2, count + 1
            direction = first / (1 - beta**count) / (np.sqrt(second / (1 - 0.999**count)) + 1e-8)
            rate = RATES[step] * (config.optim.backbone_multiplier if group == "backbone" else 1)
            p = p - rate * (direction + decay * p)
        np.testing.assert_allclose(jax.tree.leaves(found[group])[0], p, rtol=1e-9)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, ""),
        ({"triplet_start": 80.0}, "The triplet loss never starts (stage2.triplet_start 80 of 80 epochs)."),
        ({"triplet_start": 80.0, "triplet_weight": 0.0}, ""),
        ({"warmup_epochs": 80.0}, "The learning rate never reaches 0.1 (stage2.warmup_epochs 80 of 80 epochs)."),
        ({"decay_epochs": (90,)}, "The learning rate never decays (stage2.decay_epochs 90 of 80 epochs)."),
        ({"decay_epochs": (90,), "schedule": "cosine"}, ""),
        ({"identities": 1, "images_per_identity": 64}, "No triplet can be mined: batches hold one identity (stage2"),
        ({"identities": 64, "images_per_identity": 1}, "No triplet can be mined: batches hold one image of each ident"),
    ],
)
def test_what_a_schedule_never_does_is_said(changes, sentence):
    config = default()
    config.stage2.update(changes)
    found = schedule_notes(config)
    assert len(found) == bool(sentence) and "".join(found).startswith(sentence)


@pytest.mark.parametrize("name", [*cli.recipes(), "market:small", "market:pretrained", "own:small", "duke"])
def test_every_recipe_does_what_its_keys_say(name):
    config = cli.load_config(name)
    assert schedule_notes(config) == []


def test_the_epochs_of_own_images_follow_the_data():
    class Few(Market):
        num_identities = 40

    config = cli.load_config("own:small", ["--config.data.aspect=2.0"])  # otherwise read from the images
    steps = [total_steps(resolve(config, data())) for data in (Few, Market)]
    assert steps == [160, 160 * (751 // 32)]


def test_the_weight_of_the_triplet_loss_is_that_of_the_step():
    config = default()
    config.stage1.update(epochs=1, steps_per_epoch=3)
    config.stage2.update(epochs=2, steps_per_epoch=4, triplet_start=1.0, triplet_weight=2.0)
    with_jax = optim.triplet_weight(config)
    for steps in range(1, 12):
        assert triplet_weight(config, steps) == float(with_jax(steps - 1))
