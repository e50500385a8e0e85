"""The training step: its losses, its gradients, and that any placement of the batch trains alike."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import Given, fill, other, shrunk

from vpm_jax import losses, models, parallel
from vpm_jax import step as step_lib
from vpm_jax.config import flatten, set_key, stage
from vpm_jax.models.resnet import STAGE_BLOCKS

# Two virtual devices compile every step again: without the compiler's optimisations that takes a third of the time.
FAST = {"xla_backend_optimization_level": 0}
BATCH, IDENTITIES = 8, 4
RECIPES = ["market", "market_released"]

two_devices = pytest.mark.skipif(
    jax.device_count() < 2 or BATCH % jax.device_count() != 0, reason="needs 2, 4 or 8 devices"
)


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module", autouse=True)
def two_blocks():
    """A ResNet-10 ends after stage 2: both kinds of its blocks, in half the time to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STAGE_BLOCKS, 10, (1, 1, 0, 0))
        yield


def shrink(file, **changes):
    return shrunk(file, model__strides=(1, 2, 1), **changes)


def configure(file, **changes):
    """A shrunk recipe in float64; the second stage, with the triplet loss and new momentum, starts at step 2."""
    config = shrink(file, model__dtype="float64", **changes)
    config.stage1 = stage(epochs=1, steps_per_epoch=2)
    config.stage2 = stage(epochs=9, steps_per_epoch=2, triplet_weight=config.stage2.triplet_weight)
    return config


def new_state(config):
    return fill(step_lib.state_shapes(config))


def new_batch(config, seed=0):
    """Each identity once in each half, so that positives are on the other device; the halves show different regions."""
    random = np.random.default_rng(seed)
    visible = np.ones((BATCH, 3), bool)
    visible[[0, 1, 2, 5], 2] = False
    visible[[1, 6], 1] = False
    return {
        "image": random.integers(0, 256, (BATCH, config.data.height, config.data.width, 3), np.uint8),
        "identity": np.arange(BATCH, dtype=np.int32) % IDENTITIES,
        "labels": random.integers(0, 3, (BATCH, *models.map_shape(config)), np.int32),
        "visible": visible,
    }


def assert_close(found, expected, tolerance=1e-10):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


@pytest.fixture(scope="module", params=RECIPES)
def one_device(request):
    """The compiled step of a recipe on one device, and where three steps from `state` lead."""
    config = configure(request.param)
    state, batches = new_state(config), [new_batch(config, seed) for seed in range(3)]
    compiled = jax.jit(step_lib.make_step(config)).lower(state, batches[0]).compile(FAST)
    states, metrics = [state], []
    for batch in batches:
        after, measured = compiled(states[-1], batch)
        states.append(after)
        metrics.append(measured)
    return SimpleNamespace(config=config, step=compiled, batches=batches, states=states, metrics=metrics)


@pytest.fixture
def no_backbone(monkeypatch):
    """The image is the feature map: what the backbone does not matter for compiles in a fraction of the time."""
    create = models.create
    monkeypatch.setattr(models, "create", lambda *args: create(*args).clone(backbone=Given()))
    shape = {"row": lambda data: (data.height, 1), "pixel": lambda data: (data.height, data.width)}
    monkeypatch.setattr(models, "map_shape", lambda config: shape[config.model.locator](config.data))


# --- what a step computes -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, changes",
    [
        ("market", {}),
        ("market_released", {}),
        ("market", {"loss__identity_regions": "all", "loss__triplet_pairs": "all", "loss__label_smoothing": 0.1}),
        (
            "market",
            {
                "loss__identity_reduction": "region",
                "loss__identity_weight": 0.25,
                "loss__margin": 0.3,
                "loss__region_smoothing": 0.2,
                "loss__triplet_normalize": False,
                "loss__hinge": "soft",
            },
        ),
    ],
)
def test_losses_are_those_of_the_loss_functions(no_backbone, file, changes):
    config = configure(file, data__height=8, data__width=4, model__locator_groups=1, **changes)
    weights, per_image = config.loss, config.loss.identity_reduction == "image"

    def expected(state, batch, triplet_weight):
        identity, visible = batch["identity"], batch["visible"]
        shown = jnp.ones_like(visible) if weights.identity_regions == "all" else visible
        (logits, out), _ = models.create(config).apply(
            step_lib.evaluated(state),
            batch["image"],
            train=True,
            visible=shown,
            rngs={"dropout": jax.random.fold_in(jax.random.key(config.seed), state.step)},
            mutable=["batch_stats"],
        )
        if config.model.global_head:
            logits = jnp.concatenate([logits, out["global_logits"][:, None]], 1)
            shown = jnp.concatenate([shown, jnp.ones((BATCH, 1), bool)], 1)
        total, count = losses.region_loss(out["locator_logits"], batch["labels"], weights.region_smoothing)
        region = total / count
        total, count = losses.identity_loss(logits, identity, shown, weights.label_smoothing)
        identity_term = total.sum() / BATCH if per_image else (total / count).sum()
        unit = out["region_features"]
        if weights.triplet_normalize:
            unit /= jnp.linalg.norm(unit, axis=-1, keepdims=True)
        pairs = {"pairs": weights.triplet_pairs, "visibility": out["visibility"], "hinge": weights.hinge}
        total, anchors = losses.triplet_loss(unit, identity, visible, weights.margin, **pairs)
        triplet = total / anchors
        right = (jnp.argmax(logits, -1) == identity[:, None]) & shown
        located = jnp.argmax(out["locator_logits"], -1) == batch["labels"]
        return {
            "loss": weights.region_weight * region + weights.identity_weight * identity_term + triplet_weight * triplet,
            "loss_region": region,
            "loss_identity": identity_term,
            "loss_triplet": triplet,
            "accuracy_identity": right.sum(0) / shown.sum(0),
            "accuracy_locator": located.mean(),
            "comparable": anchors / BATCH,
        }

    state, batch = new_state(config), new_batch(config)
    step = jax.jit(step_lib.make_step(config), compiler_options=FAST)
    expected = jax.jit(expected, compiler_options=FAST)
    for number, triplet_weight in [(1, 0.0), (2, config.stage2.triplet_weight)]:
        state = state.replace(step=np.int32(number))
        _, metrics = step(state, batch)
        assert metrics.pop("grad_norm") > 0 and np.isclose(metrics.pop("learning_rate"), 0.1)
        assert_close(metrics, expected(state, batch, triplet_weight))
        assert metrics["loss_triplet"] > 0 and metrics["comparable"] > 0


def test_every_parameter_gets_a_gradient(one_device):
    # A stage starts without momentum: after its first step, the momentum is the gradient with its weight decay.
    before, after = one_device.states[2], one_device.states[3]
    assert int(before.step) == 2 and one_device.metrics[2]["loss_triplet"] > 0
    momentum = after.opt_state[0].inner[1].trace
    decay = one_device.config.optim.weight_decay
    gradient = jax.tree.map(lambda m, p: np.asarray(m) - decay * np.asarray(p), momentum, before.params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-7, jax.tree_util.keystr(path)
    norm = np.sqrt(sum(np.square(leaf).sum() for leaf in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(one_device.metrics[2]["grad_norm"], norm, rtol=1e-9)


def test_a_step_is_a_pure_function(one_device):
    state, batch = one_device.states[0], one_device.batches[0]
    copies = jax.tree.map(np.copy, (state, batch))
    found = one_device.step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, found, (one_device.states[1], one_device.metrics[0]))
    jax.tree.map(np.testing.assert_array_equal, (state, batch), copies)
    # Another step number is another dropout.
    _, other = one_device.step(state.replace(step=np.int32(1)), batch)
    assert other["loss_identity"] != found[1]["loss_identity"]


def test_the_losses_fall(one_device):
    state = one_device.states[0].replace(step=np.int32(2))
    history = []
    for _ in range(10):
        state, metrics = one_device.step(state, one_device.batches[0])
        history.append(metrics)
    for key in ("loss", "loss_region", "loss_identity"):
        assert np.mean([m[key] for m in history[-4:]]) < np.mean([m[key] for m in history[:2]]), key
    assert int(state.step) == 12


def test_a_batch_without_a_comparable_pair(one_device):
    batch = dict(one_device.batches[0], identity=np.arange(BATCH, dtype=np.int32) % IDENTITIES)
    # The two images of an identity share no region, and nobody shows the middle one.
    batch["visible"] = np.repeat([[True, False, False], [False, False, True]], BATCH // 2, axis=0)
    if one_device.config.loss.triplet_pairs == "soft":  # weighs by predicted scores: only an identity alone is left out
        batch["identity"] = np.zeros(BATCH, np.int32)
    after, metrics = one_device.step(one_device.states[2], batch)
    assert metrics["loss_triplet"] == 0 and metrics["comparable"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((after, metrics)))


@pytest.mark.parametrize("file, dtype", [("market", "bfloat16"), ("market_released", "float32")])
def test_a_step_keeps_every_type(file, dtype):
    """So that the second step is not compiled again, and donation finds buffers of the same kind."""
    with jax.enable_x64(False):
        config = shrink(file, model__dtype=dtype)
        config.stage1 = stage()
        config.stage2.steps_per_epoch = 2
        state = step_lib.state_shapes(config)
        batch = new_batch(config)
        after, metrics = jax.eval_shape(step_lib.make_step(config), state, batch)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    kinds = ([(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(tree)] for tree in (after, state))
    assert next(kinds) == next(kinds)
    assert {leaf.dtype.name for leaf in jax.tree.leaves((after.params, after.batch_stats, metrics))} == {"float32"}
    heads = 4 if config.model.global_head else 3
    assert {key: leaf.shape for key, leaf in metrics.items() if leaf.shape} == {"accuracy_identity": (heads,)}


# --- the average of the weights -----------------------------------------------------------------------


def test_the_average_is_of_every_step_and_changes_none(no_backbone):
    small = {"data__height": 8, "data__width": 4}
    plain, averaged = configure("market", **small), configure("market", **small, optim__ema=0.5)
    state = new_state(averaged)
    assert isinstance(state, step_lib.AveragedState)
    one = step_lib.State(state.step, state.params, state.batch_stats, state.opt_state)
    assert jax.tree.structure(one) == jax.tree.structure(new_state(plain))
    run_plain, run_averaged = (jax.jit(step_lib.make_step(c), compiler_options=FAST) for c in (plain, averaged))
    expected, moved = state.ema, 0.0
    for number in range(1, 13):
        batch = new_batch(plain, number)
        one, metrics = run_plain(one, batch)
        state, other = run_averaged(state, batch)
        assert_close(step_lib.State(state.step, state.params, state.batch_stats, state.opt_state), one)
        assert_close(other, metrics)
        decay = min(0.5, number / (number + 9))  # 0.1 after the first step, 0.5 from the ninth on
        variables = {"params": one.params, "batch_stats": one.batch_stats}
        assert jax.tree.structure(expected) == jax.tree.structure(variables)
        expected = jax.tree.map(lambda e, x, d=decay: d * np.asarray(e) + (1 - d) * np.asarray(x), expected, variables)
        assert_close(state.ema, expected, 1e-6)  # the decay is a float32
        moved = max(moved, np.abs(expected["params"]["locator_kernel"] - one.params["locator_kernel"]).max())
    assert moved > 1e-3


def test_the_averaged_weights_are_the_evaluated_ones(no_backbone):
    config = configure("market", data__height=8, data__width=4, optim__ema=0.9)
    state = step_lib.init_state(config)
    own = {"params": state.params, "batch_stats": state.batch_stats}
    jax.tree.map(np.testing.assert_array_equal, state.ema, own)  # it starts as they do
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)  # else they could not be donated
    other = state.replace(ema=jax.tree.map(lambda x: x + 1, state.ema))
    assert step_lib.evaluated(other) is other.ema
    assert (
        step_lib.evaluated(step_lib.State(*(getattr(state, k) for k in ("step", "params", "batch_stats", "opt_state"))))
        == own
    )


def test_seeds_and_schedules_share_a_program(no_backbone):
    """As arguments, the seed and the schedule give the same step as constants, in the same program for all."""
    small = {"data__height": 8, "data__width": 4}
    config = configure("market", **small)
    other = configure("market", **small, seed=7, optim__schedule="cosine", stage2__triplet_start=1.0)
    other.stage1.update(epochs=0)
    other.stage2.update(epochs=3, learning_rate=0.3, warmup_epochs=0.5)
    state, batch = new_state(config), new_batch(config)
    one, two = (
        jax.jit(step_lib.make_step(each)).lower(state, batch, step_lib.numbers(each)) for each in (config, other)
    )
    assert one.as_text() == two.as_text()
    argument = one.compile(FAST)
    for each in (config, other):
        constant, numbers = jax.jit(step_lib.make_step(each), compiler_options=FAST), step_lib.numbers(each)
        for step in (0, 1, 2, 5):
            now = replace(state, step=jnp.int32(step), opt_state=at_step(state.opt_state, step))
            assert_close(argument(now, batch, numbers), constant(now, batch), 1e-12)


def with_others(config, keys):
    """The config with other values of the keys."""
    values, config = flatten(config), config.copy_and_resolve_references()
    for key in keys:
        set_key(config, key, other(values[key]))
    return config


def test_steps_do_not_depend_on_what_their_programs_leave_out(no_backbone):
    changes = {"data__height": 8, "data__width": 4, "reduce_dtype": "bfloat16", "loss__margin": 0.7, "eval__flip": True}
    config = configure("market", **changes)
    state, batch = new_state(config), new_batch(config)
    variables = step_lib.evaluated(state)
    for make, program, inputs in (
        (step_lib.make_step, step_lib.program, (state, batch, step_lib.numbers(config))),
        (step_lib.make_feature_step, step_lib.feature_program, (variables, batch["image"])),
    ):
        left_out = [key for key in flatten(config) if program(with_others(config, [key])) == program(config)]
        assert {"seed", "recipe", "data.root", "stage2.epochs", "eval.batch"} <= set(left_out)
        changed = with_others(config, left_out)
        texts = {jax.jit(make(each)).lower(*inputs).as_text() for each in (config, program(config), changed)}
        assert len(texts) == 1


def at_step(opt_state, step):
    return jax.tree.map(lambda x: jnp.int32(step) if x.ndim == 0 else x, opt_state)


# --- many devices -------------------------------------------------------------------------------------


@two_devices
@pytest.mark.parametrize("one_device", ["market"], indirect=True)  # the partitioner does not care for recipes
def test_sharded_batches_equal_one_device(one_device):
    config, mesh = one_device.config, parallel.data_mesh(BATCH)
    state = parallel.replicate(mesh, one_device.states[0])
    first = state
    batches = [parallel.shard(mesh, batch) for batch in one_device.batches]
    numbers = parallel.replicate(mesh, step_lib.numbers(config))
    assert len(batches[0]["image"].sharding.device_set) == jax.device_count()
    step = parallel.placement("jit", mesh).compile(step_lib.make_step, config)
    compiled = step.lower(state, batches[0], numbers).compile(FAST)
    for batch, metrics in zip(batches, one_device.metrics, strict=True):
        state, measured = compiled(state, batch, numbers)
        assert_close(measured, metrics)
    assert_close(state, one_device.states[-1])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first.params))  # donated


@two_devices
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_the_backbone_are_summed_in_the_dtype_of_its_key(no_backbone, dtype):
    config, mesh = configure("market", reduce_dtype=dtype, data__height=8, data__width=4), parallel.data_mesh(BATCH)
    state, batch = new_state(config), new_batch(config)
    step = parallel.placement("jit", mesh).compile(step_lib.make_step, config)
    assert ("xbf16>" in step.lower(state, batch).as_text()) == (dtype == "bfloat16")
    _, metrics = jax.jit(step_lib.make_step(config), compiler_options=FAST)(state, batch)
    _, measured = step.lower(state, batch).compile(FAST)(parallel.replicate(mesh, state), parallel.shard(mesh, batch))
    assert_close(measured, metrics, 1e-10 if dtype == "float32" else 1e-2)


@two_devices
def test_pmap_equals_one_device(one_device):
    config, devices = one_device.config, jax.device_count()

    def split(batch):
        return {k: v.reshape(devices, -1, *v.shape[1:]) for k, v in batch.items()}

    def share(tree, device):
        return jax.tree.map(lambda leaf: np.asarray(leaf)[device], tree)

    state = jax.tree.map(lambda leaf: np.stack([leaf] * devices), one_device.states[0])
    step = jax.pmap(step_lib.make_step(config, axis_name="data"), axis_name="data", donate_argnums=0)
    compiled = step.lower(state, split(one_device.batches[0])).compile(FAST)
    for batch, metrics in zip(one_device.batches, one_device.metrics, strict=True):
        state, measured = compiled(state, split(batch))
        for device in range(devices):
            assert_close(share(measured, device), metrics)
    for device in range(devices):
        assert_close(share(state, device), one_device.states[-1])


@two_devices
def test_every_part_equals_one_device_under_pmap(no_backbone):
    """What is off in the recipes above, on at once, on given feature maps."""
    changes = {
        "model__neck": "bn",
        "model__head_dim": 0,
        "model__head_bias": False,
        "model__global_head": True,
        "model__locator_hidden": 5,
        "loss__label_smoothing": 0.1,
        "loss__region_smoothing": 0.1,
        "loss__triplet_normalize": False,
        "loss__hinge": "soft",
        "loss__triplet_pairs": "soft",
        "optim__clip": 0.5,
        "optim__ema": 0.9,
    }
    config, devices = configure("market", data__height=8, data__width=4, **changes), jax.device_count()
    batches = [new_batch(config, seed) for seed in range(3)]
    one = new_state(config)
    many = jax.tree.map(lambda leaf: np.stack([leaf] * devices), one)
    step = jax.jit(step_lib.make_step(config), compiler_options=FAST)
    split = [{k: v.reshape(devices, -1, *v.shape[1:]) for k, v in batch.items()} for batch in batches]
    mapped = jax.pmap(step_lib.make_step(config, axis_name="data"), axis_name="data")
    mapped = mapped.lower(many, split[0]).compile(FAST)
    for batch, parts in zip(batches, split, strict=True):
        (one, metrics), (many, measured) = step(one, batch), mapped(many, parts)
        for device in range(devices):
            assert_close(jax.tree.map(lambda leaf, d=device: np.asarray(leaf)[d], (many, measured)), (one, metrics))
        assert metrics["grad_norm"] > config.optim.clip


# --- the feature step ---------------------------------------------------------------------------------


def test_features_are_of_unit_length_and_float32(no_backbone):
    config = configure("market", data__height=8, data__width=4)
    variables, image = step_lib.evaluated(new_state(config)), new_batch(config)["image"]
    found = jax.jit(step_lib.make_feature_step(config), compiler_options=FAST)(variables, image)
    assert {k: (v.shape, v.dtype.name) for k, v in found.items()} == {
        "features": ((BATCH, 3, 3), "float32"),
        "visibility": ((BATCH, 3), "float32"),
    }
    np.testing.assert_allclose(np.linalg.norm(found["features"], axis=-1), 1, rtol=1e-6)
    np.testing.assert_allclose(found["visibility"].sum(-1), 8 * 4, rtol=1e-6)


@pytest.mark.parametrize("locator", ["pixel", "stripes"])
def test_flip_test_is_the_mean_with_the_mirror_image(no_backbone, locator):
    changes = {"model__grid": (2, 3), "model__locator": locator}
    config = configure("market", data__height=8, data__width=6, **changes)
    variables = step_lib.evaluated(new_state(config))
    image = np.random.default_rng(0).integers(0, 256, (BATCH, 8, 6, 3), np.uint8)

    def run(image, flip):
        config.eval.flip = flip
        return jax.jit(step_lib.make_feature_step(config, region_maps=True), compiler_options=FAST)(variables, image)

    found = run(image, True)
    if locator == "stripes":  # the mirror image shows the same regions, from the right
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, run(image, False))
    outputs = [models.create(config).apply(variables, x)[1] for x in (image, np.flip(image, 2))]
    for b, region in np.ndindex(BATCH, 6):
        row, col = divmod(region, 3)
        places = [(b, region), (b, 3 * row + 2 - col)]
        mean = sum(np.asarray(out["region_features"][place]) for out, place in zip(outputs, places, strict=True)) / 2
        np.testing.assert_allclose(found["features"][b, region], mean / np.linalg.norm(mean), atol=1e-6)
        visibility = [out["visibility"][place] for out, place in zip(outputs, places, strict=True)]
        np.testing.assert_allclose(found["visibility"][b, region], np.mean(visibility), rtol=1e-6)
    np.testing.assert_allclose(found["region_maps"].sum((1, 2)), found["visibility"], rtol=1e-6)


def test_l2_normalize_of_zero_has_a_finite_gradient():
    x = np.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(step_lib.l2_normalize(x), [[0, 0], [0.6, 0.8]], rtol=1e-12)
    assert np.isfinite(jax.grad(lambda x: step_lib.l2_normalize(x).sum())(x)).all()
