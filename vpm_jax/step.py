"""The training and feature steps: pure functions of (state, batch), independent of how they are mapped over devices."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax
from jaxtyping import Bool, Float, Shaped
from ml_collections import ConfigDict, FrozenConfigDict

from vpm_jax import config as config_lib
from vpm_jax import losses, models, optim
from vpm_jax.arrays import AnyArray, StepBatch
from vpm_jax.keys import FEATURES, NO_RESULT, PROTOCOL, RESUME
from vpm_jax.schedule import schedule

Metrics = dict[str, Array]


@flax.struct.dataclass
class State:
    """Everything needed to resume training; the data are a function of `step`."""

    step: Any  # int32 scalar, the number of finished steps; a ShapeDtypeStruct in `state_shapes`
    params: Any
    batch_stats: Any
    opt_state: Any


@flax.struct.dataclass
class AveragedState(State):
    """The state with optim.ema. It is a separate type so that checkpoints without `ema` stay readable."""

    ema: Any  # {"params", "batch_stats"}, averaged over steps


@flax.struct.dataclass
class Numbers:
    """The seed and the schedule, as arguments of the step: runs that differ in nothing else share one program."""

    key: Any  # uint32, the data of a random key
    schedules: optim.Schedules  # tables


def numbers(config: ConfigDict) -> Numbers:
    """The numbers of a resolved config."""
    with on_cpu():
        tables = optim.tabulate(optim.schedules(config), schedule(config)[-1].end_step)
        return Numbers(jax.random.key_data(jax.random.key(config.seed)), tables)


def on_cpu() -> contextlib.AbstractContextManager[Any]:
    """Computes on the CPU in the block, where programs that run once compile in a fraction of the time."""
    try:
        return jax.default_device(jax.local_devices(backend="cpu")[0])
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return contextlib.nullcontext()


def evaluated(state: State) -> dict[str, Any]:
    """The variables {"params", "batch_stats"} to extract features with: the averaged ones if the state has any."""
    if isinstance(state, AveragedState):
        return state.ema
    return {"params": state.params, "batch_stats": state.batch_stats}


def _average(config: ConfigDict, state: AveragedState) -> AveragedState:
    """Updates the average. Its decay grows from 0.1 so that it does not retain the initial weights."""
    decay = jnp.minimum(config.optim.ema, state.step / (state.step + 9))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    ema = jax.tree.map(lambda old, new: old + (1 - decay).astype(old.dtype) * (new - old), state.ema, variables)
    return replace(state, ema=ema)


def program(config: ConfigDict) -> FrozenConfigDict:
    """What the training step depends on besides `Numbers`: configs with equal programs share a compiled step."""
    no_program = RESUME | NO_RESULT | PROTOCOL
    return config_lib.keep(
        config, lambda key: not key.flags & no_program and not key.name.startswith(("stage1.", "stage2."))
    )


def feature_program(config: ConfigDict) -> FrozenConfigDict:
    """What the feature step depends on."""
    return config_lib.keep(config, lambda key: FEATURES in key.flags or key.name.startswith("model."))


def _init(config: ConfigDict) -> Callable[[Array], Any]:
    """The function from a random key to the model's variables."""
    model = models.create(config)
    image = jnp.zeros((2, config.data.height, config.data.width, 3), jnp.uint8)
    return lambda key: model.init(key, image)


@lru_cache(maxsize=8)
def _compiled_init(config: FrozenConfigDict) -> Callable[[Array], Any]:
    # It runs once or a few times: optimizing it would take far longer than it saves.
    return jax.jit(_init(config), compiler_options={"xla_backend_optimization_level": "0"})


def init_state(config: ConfigDict) -> State:
    """A state initialized from config.seed. The backbone is random too: `pretrained.apply_to` loads weights."""
    with on_cpu():
        variables = _compiled_init(program(config))(jax.random.key(config.seed))
    return new_state(config, variables)


def state_shapes(config: ConfigDict) -> State:
    """The shapes and dtypes of `init_state`, without computing it: the target to restore a checkpoint into."""
    return jax.eval_shape(lambda: new_state(config, _init(config)(jax.random.key(0))))


def new_state(config: ConfigDict, variables: Mapping[str, Any]) -> State:
    """The state at step 0 with the variables {"params", "batch_stats"}."""
    params = variables["params"]
    # The backbone's statistics start in float32 even for float64 parameters. The first step would change their dtype,
    # and the step would compile twice.
    dtype = jnp.promote_types(models.compute_dtype(config.model.dtype), jnp.float32)
    with on_cpu():
        batch_stats = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), variables["batch_stats"])
        state = State(jnp.zeros([], jnp.int32), params, batch_stats, optim.optimizer(config).init(params))
        if not config.optim.ema:
            return state
        # Copies: the step donates its state, and a donated buffer must not appear twice.
        ema = jax.tree.map(jnp.copy, {"params": params, "batch_stats": batch_stats})
    return AveragedState(**vars(state), ema=ema)


def l2_normalize(features: Float[AnyArray, "*n c"]) -> Float[AnyArray, "*n c"]:
    """Scales features to unit length; a zero feature stays zero, with a finite gradient."""
    squared = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    return features * lax.rsqrt(jnp.maximum(squared, 1e-24))


def make_step(config: ConfigDict, axis_name: str | None = None) -> Callable[..., tuple[State, Metrics]]:
    """The training step of a resolved config: (state, batch, numbers) -> (state, metrics).

    Without `Numbers`, the seed and the schedule are constants of the program.

    Under jit, the batch is the global batch. Under a mapped axis `axis_name` it is the share of one device: totals and
    counts are summed over the axis, and triplets are mined over all of it.

    Metrics are float32 scalars, except accuracy_identity, which has one value per head. docs/recipes.md explains them.
    """
    model = models.create(config, axis_name)
    weights = config.loss

    def psum(x: Any) -> Any:
        return lax.psum(x, axis_name) if axis_name else x

    def reduced(grads: Any) -> Any:
        """The gradients, summed over devices."""
        if not axis_name or config.reduce_dtype == "float32":
            return psum(grads)
        narrow = psum(jax.tree.map(lambda g: g.astype(config.reduce_dtype), grads["backbone"]))
        rest = psum({key: value for key, value in grads.items() if key != "backbone"})
        return rest | {"backbone": jax.tree.map(lambda g, like: g.astype(like.dtype), narrow, grads["backbone"])}

    def loss_fn(
        params: Any, state: State, batch: StepBatch, key: Array, triplet_weight: Array
    ) -> tuple[Array, tuple[Metrics, Any]]:
        variables = {"params": params, "batch_stats": state.batch_stats}
        identity, visible, valid = batch["identity"], batch["visible"], batch.get("valid")
        shown = jnp.ones_like(visible) if weights.identity_regions == "all" else visible
        (logits, out), updates = model.apply(
            variables,
            batch["image"],
            train=True,
            visible=shown,
            valid=valid,
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        images = psum(jnp.float32(len(identity)))

        # Totals are local to a device; counts are global and have no gradient. Summing the devices' gradients then
        # gives the gradient of the global mean.
        if valid is not None and config.model.locator == "row":
            valid = jnp.any(valid, axis=2, keepdims=True)
        region, cells = losses.region_loss(out["locator_logits"], batch["labels"], weights.region_smoothing, valid)
        region = region / psum(cells)

        if config.model.global_head:
            logits = jnp.concatenate([logits, out["global_logits"][:, None]], axis=1)
            shown = jnp.concatenate([shown, jnp.ones_like(shown[:, :1])], axis=1)
        per_head, head_count = losses.identity_loss(logits, identity, shown, weights.label_smoothing)
        head_count = psum(head_count)
        if weights.identity_reduction == "image":
            identity_term = jnp.sum(per_head) / images
        else:
            identity_term = jnp.sum(per_head / jnp.maximum(head_count, 1))

        triplet, anchors = losses.triplet_loss(
            l2_normalize(out["region_features"]) if weights.triplet_normalize else out["region_features"],
            identity,
            visible,
            weights.margin,
            pairs=weights.triplet_pairs,
            hinge=weights.hinge,
            visibility=out["visibility"],
            axis_name=axis_name,
        )
        anchors = psum(anchors)
        triplet = triplet / jnp.maximum(anchors, 1)

        loss = weights.region_weight * region + weights.identity_weight * identity_term + triplet_weight * triplet
        correct = (jnp.argmax(logits, axis=-1) == identity[:, None]) & shown
        located = jnp.argmax(out["locator_logits"], axis=-1) == batch["labels"]
        located = located if valid is None else located & valid
        metrics = {
            "loss": psum(loss),
            "loss_region": psum(region),
            "loss_identity": psum(identity_term),
            "loss_triplet": psum(triplet),
            "accuracy_identity": psum(jnp.sum(correct, axis=0)) / jnp.maximum(head_count, 1),
            "accuracy_locator": psum(jnp.sum(located)) / psum(cells),
            "comparable": anchors / images,
        }
        return loss, (metrics, updates["batch_stats"])

    def step(state: State, batch: StepBatch, numbers: Numbers | None = None) -> tuple[State, Metrics]:
        if numbers is None:
            key, by_step = jax.random.key(config.seed), optim.schedules(config)
        else:
            key, by_step = jax.random.wrap_key_data(numbers.key), optim.look_up(numbers.schedules)
        key, triplet_weight = jax.random.fold_in(key, state.step), by_step.triplet_weight(state.step)
        grads, (metrics, batch_stats) = jax.grad(loss_fn, has_aux=True)(state.params, state, batch, key, triplet_weight)
        grads = reduced(grads)
        updates, opt_state = optim.optimizer(config, by_step).update(grads, state.opt_state, state.params)
        metrics |= {"grad_norm": optax.tree.norm(grads), "learning_rate": by_step.learning_rate(state.step)}
        params = optax.apply_updates(state.params, updates)
        after = replace(state, step=state.step + 1, params=params, batch_stats=batch_stats, opt_state=opt_state)
        return _average(config, after) if isinstance(after, AveragedState) else after, metrics

    return step


def make_feature_step(config: ConfigDict, region_maps: bool = False) -> Callable[..., dict[str, Array]]:
    """The feature step: (variables, image [B, H, W, 3]) -> {"features" [B, P, C], "visibility" [B, P]}, float32.

    Features have unit length. An optional third argument, `valid` bool [B, h, w], marks the cells that padded images
    cover (data.fit). `region_maps` adds the probabilities [B, h, w, P] of Eq. 1; w is 1 for a row locator. With
    eval.flip, all outputs are averaged over the image and its mirror image, features before normalization.
    """
    model = models.create(config)
    feature = "region_features" if config.match.feature == "before" else "neck_features"
    rows, cols = config.model.grid
    # Where each region lies in the mirror image.
    mirrored = np.arange(rows * cols).reshape(rows, cols)[:, ::-1].reshape(-1)

    def features(
        variables: Any,
        image: Shaped[AnyArray, "b H W c"],
        valid: Bool[AnyArray, "b h w"] | None = None,
    ) -> dict[str, Array]:
        _, out = model.apply(variables, image, train=False, valid=valid)
        result = {"features": out[feature], "visibility": out["visibility"]}
        if region_maps:
            result["region_maps"] = out["probability"]
        if config.eval.flip:
            mirror = None if valid is None else valid[:, :, ::-1]
            _, out = model.apply(variables, image[:, :, ::-1], train=False, valid=mirror)
            other = {
                "features": out[feature][:, mirrored],
                "visibility": out["visibility"][:, mirrored],
                "region_maps": out["probability"][:, :, ::-1, mirrored],
            }
            result = {key: (value + other[key]) / 2 for key, value in result.items()}
        result["features"] = l2_normalize(result["features"])
        return {key: value.astype(jnp.float32) for key, value in result.items()}

    return features
