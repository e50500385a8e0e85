"""Parity with PyTorch: the same weights and batches through the JAX model and through tests/helpers/torch_reference.py.

Every test runs against the committed golden arrays (written by that reference, in float64), and against the reference
itself where PyTorch is installed (`pip install -e '.[parity]'`). A difference is |a - b| / |b| of one tensor, by norms.
"""

from __future__ import annotations

import functools
import re
import runpy
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import parity_cases as cases
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from paths import CONFIGS, FUSION_EMITTERS

from vpm_jax import losses, models
from vpm_jax import step as step_lib
from vpm_jax.config import set_key, stage
from vpm_jax.models.resnet import ResNet
from vpm_jax.models.vpm import ExampleDropout

DTYPES = ["float64", "float32"]
FORWARD = {"float64": 1e-8, "float32": 1e-5}
GRADIENT = {"float64": 1e-8, "float32": 1e-3}
LOSSES = ("loss", "loss_region", "loss_identity", "loss_triplet")  # metrics, in the reference's order
FILES = {"paper": CONFIGS / "market.py", "released": CONFIGS / "market_released.py"}


def fast(dtype: str) -> dict:
    """Compiler options: compiling is what these tests would spend their time on. In float32 XLA fuses as for users."""
    options = {"xla_backend_optimization_level": 0}
    return options | {FUSION_EMITTERS: dtype == "float32"} if FUSION_EMITTERS else options


# --- the two sides ----------------------------------------------------------------------------------------


@functools.cache
def reference_results(source: str) -> dict[str, np.ndarray]:
    if source == "golden":
        return cases.load()
    pytest.importorskip("torch")
    import torch_reference

    return torch_reference.everything()


@pytest.fixture(params=["golden", "torch"])
def reference(request):
    """PyTorch's side: `.difference(name, ours)`, `.names(prefix)` that a case holds, and `.get(name)`, the tensor."""
    results = reference_results(request.param)

    def difference(name: str, ours) -> float:
        ours, theirs = np.asarray(ours, np.float64), results[name]
        if request.param == "golden":
            ours = cases.sample(ours)
        assert ours.shape == theirs.shape, name
        apart, norm = np.linalg.norm(ours - theirs), np.linalg.norm(theirs)
        return float(apart / norm) if norm else float(apart > 0)

    def names(prefix: str) -> list[str]:
        found = [name.removeprefix(prefix) for name in results if name.startswith(prefix)]
        assert found, prefix
        return found

    return SimpleNamespace(difference=difference, names=names, get=results.__getitem__)


def assert_within(differences: dict[str, float], limit: float) -> None:
    beyond = {name: d for name, d in differences.items() if not d < limit}
    assert differences and not beyond, f"{len(beyond)} of {len(differences)} beyond {limit}: {beyond}"


def torch_names(path: str, heads: int) -> list[str]:
    """The PyTorch tensors that make up one of ours: several for the heads, which we keep stacked."""
    _, *where, leaf = path.split("/")
    leaf = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}.get(leaf, leaf)
    if where[:1] == ["backbone"]:
        _, *block, layer = where
        layer = {"conv_stem": "conv1", "bn_stem": "bn1", "conv_shortcut": "downsample.0"}.get(layer, layer)
        layer = layer.replace("bn_shortcut", "downsample.1")
        if block:
            number = re.fullmatch(r"stage(\d)_block(\d+)", block[0])
            layer = f"layer{number[1]}.{int(number[2]) - 1}.{layer}"
        return [f"base.{layer}.{leaf}"]
    if where[:1] == ["heads"]:
        part = "bn." + leaf if where[1:] == ["bn"] else {"bias": "classifier.bias"}.get(leaf, f"{leaf}.weight")
        return [f"heads.{i}.{part}" for i in range(heads)]
    return [{"locator_kernel": "locator.weight", "locator_bias": "locator.bias"}[leaf]]


def torch_tensors(path: str, ours) -> dict[str, np.ndarray]:
    """One of our arrays as PyTorch's tensors."""
    ours = np.asarray(ours)
    names = torch_names(path, len(ours))
    leaf = path.rsplit("/", 1)[1]
    if names[0].startswith("heads."):
        return {name: x.T for name, x in zip(names, ours, strict=True)}
    if leaf == "locator_kernel":
        ours = ours[None, None]
    if leaf in ("kernel", "locator_kernel"):
        ours = ours.transpose(3, 2, 0, 1)  # HWIO -> OIHW
    return {names[0]: ours}


def as_torch(tree) -> dict[str, np.ndarray]:
    """{PyTorch name: array} of our variables, or of anything shaped like our params."""
    if not {"params", "batch_stats"} & set(tree):
        tree = {"params": tree}
    found: dict[str, np.ndarray] = {}
    for path, leaf in flatten_dict(tree, sep="/").items():
        found |= torch_tensors(path, leaf)
    return found


def filled(shapes, dtype: str) -> dict:
    """Variables with the weights of the comparison, from their shapes (Flax's own running statistics are float32)."""

    def fill(path, leaf):
        names = torch_names(path, leaf.shape[0])
        parts = []
        for name in names:
            if name.startswith("heads."):
                parts.append(cases.weight(name, leaf.shape[1:][::-1]).T)
            elif path.endswith("kernel"):
                *spatial, inputs, outputs = (1, 1, 1, 1, *leaf.shape)[-4:]
                value = cases.weight(name, (outputs, inputs, *spatial)).transpose(2, 3, 1, 0)
                parts.append(value.reshape(leaf.shape))
            else:
                parts.append(cases.weight(name, leaf.shape))
        return (np.stack(parts) if len(names) > 1 else parts[0]).astype(dtype)

    return unflatten_dict({k: fill("/".join(k), v) for k, v in flatten_dict(shapes).items()})


def configure(recipe: str, dtype: str):
    """The recipe's own config file, shrunk; dropout off; the schedule that `cases.SCHEDULES` writes out."""
    config = runpy.run_path(str(FILES[recipe]))["get_config"]()
    changes = {
        "data.height": cases.HEIGHT,
        "data.width": cases.IMAGE_WIDTH,
        "model.depth": 18,
        "model.width": cases.WIDTH,
        "model.grid": (cases.REGIONS, 1),
        "model.head_dim": cases.HEAD_DIM,
        "model.num_identities": cases.IDENTITIES,
        "model.dtype": dtype,
        "model.head_dropout": 0.0,
        "model.locator_dropout": 0.0,
    }
    for key, value in changes.items():
        set_key(config, key, value)
    if recipe == "paper":
        config.stage1 = stage(epochs=2, steps_per_epoch=2, decay_epochs=(1,))
        config.stage2 = stage(
            epochs=3, steps_per_epoch=2, decay_epochs=(2,), triplet_weight=config.stage2.triplet_weight
        )
    else:
        old = config.stage2
        config.stage2 = stage(
            epochs=5, steps_per_epoch=2, decay_epochs=(3,), decay=old.decay, triplet_weight=old.triplet_weight
        )
    return config


# --- the backbone -----------------------------------------------------------------------------------------


@functools.cache
def backbone(depth: int, stride_on: str, dtype: str):
    with jax.enable_x64(dtype == "float64"):
        network = ResNet(depth, cases.WIDTH, stride_on=stride_on, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
        pixels = cases.images("backbone", 2).astype(dtype) / 255
        image = ((pixels - np.array(cases.MEAN)) / np.array(cases.STD)).astype(dtype)
        shapes = jax.eval_shape(network.init, jax.random.key(0), image)
        variables = {
            k: v["backbone"] for k, v in filled({k: {"backbone": v} for k, v in shapes.items()}, dtype).items()
        }
        return jax.device_get(jax.jit(network.apply, compiler_options=fast(dtype))(variables, image))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("depth, stride_on", cases.BACKBONES)
def test_backbone_features(reference, depth, stride_on, dtype):
    stages = backbone(depth, stride_on, dtype)
    prefix = f"backbone {depth} {stride_on}/"
    assert set(stages) == set(reference.names(prefix))
    assert_within({k: reference.difference(prefix + k, v) for k, v in stages.items()}, FORWARD[dtype])


@pytest.mark.slow
def test_resnet50_features_at_full_size():
    """Width 64, 384 x 128, float32, against PyTorch in float64."""
    torch = pytest.importorskip("torch")
    import torch_reference

    image = cases.images("full size", 2).repeat(6, 1).repeat(4, 2)
    base = torch_reference.filled(torch.nn.ModuleDict({"base": torch_reference.ResNet(50, 64)})).eval()["base"]
    with torch.no_grad():
        theirs = base(torch_reference.normalize(image))
    network = ResNet(50, 64)
    normalized = ((image / 255 - np.array(cases.MEAN)) / np.array(cases.STD)).astype(np.float32)
    shapes = jax.eval_shape(network.init, jax.random.key(0), normalized)
    variables = filled({k: {"backbone": v} for k, v in shapes.items()}, "float32")
    stages = jax.jit(network.apply)({k: v["backbone"] for k, v in variables.items()}, normalized)
    assert stages["stage4"].shape == (2, 24, 8, 2048)
    for name, x in stages.items():
        expected = theirs[name].permute(0, 2, 3, 1).numpy()
        assert np.linalg.norm(x - expected) / np.linalg.norm(expected) < 1e-5, name


# --- locator, pooling, heads and losses -------------------------------------------------------------------


class Given(nn.Module):
    """In place of the backbone: the image is the feature map."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        return {"stage4": x}


def fed(kept):
    """Makes every dropout keep what it is told to."""

    def interceptor(call, args, kwargs, context):
        if not isinstance(context.module, ExampleDropout) or context.module.rate == 0:
            return call(*args, **kwargs)
        x, train = args
        return jnp.where(kept[context.module.name], x / (1 - cases.DROPOUT), 0) if train else x

    return nn.intercept_methods(interceptor)


@functools.cache
def parts(recipe: str, dtype: str):
    """Outputs, losses and gradients, by the reference's names."""
    with jax.enable_x64(dtype == "float64"):
        config = configure(recipe, dtype)
        set_key(config, "model.head_dropout", cases.DROPOUT)
        set_key(config, "model.locator_dropout", cases.DROPOUT if recipe == "released" else 0.0)
        model = models.create(config).clone(backbone=Given())
        T, batch, kept = cases.feature_map(recipe).astype(dtype), cases.batch(recipe, 0), cases.dropout(recipe)
        variables = filled(jax.eval_shape(model.init, jax.random.key(0), T), dtype)
        identity, visible = batch["identity"], batch["visible"]

        def losses_of(params, T):
            kind = {"rngs": {"dropout": jax.random.key(0)}, "mutable": ["batch_stats"]}
            with fed(kept):
                (_, out), _ = model.apply({**variables, "params": params}, T, train=True, visible=visible, **kind)
            logits, shown = out["logits"], visible
            if config.model.global_head:
                logits = jnp.concatenate([logits, out["global_logits"][:, None]], axis=1)
                shown = np.concatenate([visible, np.ones((cases.BATCH, 1), bool)], axis=1)
            total, count = losses.region_loss(out["locator_logits"], batch["labels"])
            per_head, images = losses.identity_loss(logits, identity, shown)
            by_image = config.loss.identity_reduction == "image"
            unit = step_lib.l2_normalize(out["region_features"])
            pairs = {"pairs": config.loss.triplet_pairs, "visibility": out["visibility"]}
            triplet, anchors = losses.triplet_loss(unit, identity, visible, config.loss.margin, **pairs)
            values = {
                "region": total / count,
                "identity": per_head.sum() / cases.BATCH if by_image else (per_head / images).sum(),
                "triplet": triplet / anchors,
            }
            return values, (values, out)

        def all_of_it(params, T):
            gradients, (values, out) = jax.jacrev(losses_of, argnums=(0, 1), has_aux=True)(params, T)
            _, plain = model.apply(variables, T, train=False)
            return values, out, gradients, plain

        found = jax.jit(all_of_it, compiler_options=fast(dtype))(variables["params"], T)
        values, out, gradients, plain = jax.device_get(found)

    results = {f"loss/{kind}": value for kind, value in values.items()}
    for kind, (by_params, by_map) in gradients.items():
        results[f"gradient of {kind}/feature_map"] = by_map
        results |= {f"gradient of {kind}/{name}": x for name, x in as_torch(by_params).items()}
    for mode, outputs in (("eval", plain), ("train", out)):
        for name, x in outputs.items():
            if name not in ("feature_map", "stage4"):
                results[f"{mode}/{name}"] = x
    shown = visible if recipe == "paper" else np.ones_like(visible)
    results["train/logits"] = out["logits"][shown]
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", cases.RECIPES)
def test_locator_heads_and_losses(reference, recipe, dtype):
    ours, prefix = parts(recipe, dtype), f"{recipe} parts/"
    assert set(ours) == set(reference.names(prefix))
    differences = {k: reference.difference(prefix + k, v) for k, v in ours.items()}
    gradients = {k: d for k, d in differences.items() if k.startswith("gradient")}
    assert_within(gradients, GRADIENT[dtype])
    assert_within({k: d for k, d in differences.items() if k not in gradients}, FORWARD[dtype])


@functools.cache
def variants(dtype: str):
    with jax.enable_x64(dtype == "float64"):
        draw = cases.random("variants")
        features = draw.normal(size=(cases.BATCH, cases.REGIONS, 5)).astype(dtype)
        logits = draw.normal(size=(cases.BATCH, cases.REGIONS, cases.IDENTITIES)).astype(dtype)
        batch = cases.batch("paper", 0)
        identity, visible = batch["identity"], batch["visible"]

        def identity_loss(shown, smoothing=0.0):
            return lambda x: losses.identity_loss(x, identity, shown, smoothing)[0].sum() / cases.BATCH

        def triplet_loss(margin=1.0, pairs="visible"):
            def loss(x):
                unit = step_lib.l2_normalize(x)
                total, count = losses.triplet_loss(unit, identity, visible, margin, pairs=pairs)
                return total / count

            return loss

        wanted = {
            "smoothing": (identity_loss(visible, 0.1), logits),
            "MVPM-3": (identity_loss(np.ones_like(visible)), logits),
            "MVPM-2": (triplet_loss(pairs="all"), features),
            "margin": (triplet_loss(margin=0.3), features),
        }

        def all_of_it(inputs):
            return {name: jax.value_and_grad(loss)(inputs[name]) for name, (loss, _) in wanted.items()}

        found = jax.jit(all_of_it, compiler_options=fast(dtype))({name: x for name, (_, x) in wanted.items()})
        found = jax.device_get(found)
    return {name: v for name, (v, _) in found.items()} | {f"gradient of {name}": g for name, (_, g) in found.items()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_losses_of_the_ablations(reference, dtype):
    ours = variants(dtype)
    assert set(ours) == set(reference.names("variants/"))
    for name, x in ours.items():
        limit = (GRADIENT if name.startswith("gradient") else FORWARD)[dtype]
        assert_within({name: reference.difference(f"variants/{name}", x)}, limit)


# --- training ---------------------------------------------------------------------------------------------


@functools.cache
def train(recipe: str, dtype: str):
    """Ten steps of the package's own step: the states before, after one and after all, and every step's metrics."""
    with jax.enable_x64(dtype == "float64"):
        config = configure(recipe, dtype)
        batches = [cases.batch(recipe, number) for number in range(cases.STEPS)]
        shapes = jax.eval_shape(models.create(config).init, jax.random.key(0), batches[0]["image"])
        state = step_lib.new_state(config, filled(shapes, dtype))
        step = jax.jit(step_lib.make_step(config)).lower(state, batches[0]).compile(fast(dtype))
        states, metrics = [state], []
        for batch in batches:
            state, measured = step(state, batch)
            states.append(state)
            metrics.append(measured)
        states, metrics = jax.device_get((states, metrics))
    return SimpleNamespace(config=config, step=step, batches=batches, states=states, metrics=metrics)


def momentum(state):
    return as_torch(state.opt_state[0].inner[1].trace)


def variables_of(state):
    return as_torch(step_lib.evaluated(state))


def unbiased(ours: dict, start: dict, steps: int, samples) -> dict:
    """Our variables with the running variances that PyTorch would have.

    Both mix a batch's variance into the running one with weight 0.1. Flax (and our heads) take the biased variance,
    over n values, PyTorch n / (n - 1) times that. What is left of the initial variance is not rescaled.
    """
    converted = dict(ours)
    for name, value in ours.items():
        if name.endswith("running_var"):
            n, left = float(samples(name.removesuffix(".running_var"))), 0.9**steps * start[name]
            converted[name] = left + (value - left) * n / (n - 1)
    return converted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recipe", cases.RECIPES)
def test_gradients_of_the_whole_loss(reference, recipe, dtype):
    run, prefix = train(recipe, dtype), f"{recipe} train/gradient/"
    decay = run.config.optim.weight_decay
    # From zero, momentum after one step is the gradient and the weight decay.
    start, trace = as_torch(run.states[0].params), momentum(run.states[1])
    gradients = {name: x - decay * start[name] for name, x in trace.items()}
    assert set(gradients) == set(reference.names(prefix))
    assert_within({k: reference.difference(prefix + k, v) for k, v in gradients.items()}, GRADIENT[dtype])


def differences_after(reference, recipe, dtype, steps):
    """{"state/..." or "momentum/...": difference} after so many steps."""
    run, prefix = train(recipe, dtype), f"{recipe} train/"
    start, ours = variables_of(run.states[0]), variables_of(run.states[steps])
    ours = unbiased(ours, start, steps, lambda name: reference.get(f"{prefix}samples/{name}").item())
    assert set(ours) == set(reference.names(f"{prefix}state {steps}/"))
    differences = {f"state/{k}": reference.difference(f"{prefix}state {steps}/{k}", v) for k, v in ours.items()}
    for name, value in momentum(run.states[steps]).items():
        differences[f"momentum/{name}"] = reference.difference(f"{prefix}momentum {steps}/{name}", value)
    return differences


@pytest.mark.parametrize("recipe", cases.RECIPES)
@pytest.mark.parametrize("steps", [1, cases.STEPS])
def test_state_in_float64(reference, recipe, steps):
    """Parameters, running statistics and momentum: Nesterov, weight decay, the backbone's rate, decay, both stages."""
    assert_within(differences_after(reference, recipe, "float64", steps), 1e-8)
    for number in range(steps):
        ours = np.array([train(recipe, "float64").metrics[number][k] for k in LOSSES])
        assert_within({f"step {number}": reference.difference(f"{recipe} train/losses/{number}", ours)}, 1e-8)


@pytest.mark.parametrize("recipe", cases.RECIPES)
def test_state_in_float32(reference, recipe):
    """After one step, whose losses are compared too. For ten see the next test."""
    ours = np.array([train(recipe, "float32").metrics[0][k] for k in LOSSES])
    assert_within({"losses": reference.difference(f"{recipe} train/losses/0", ours)}, FORWARD["float32"])
    differences = differences_after(reference, recipe, "float32", 1)
    assert_within({k: d for k, d in differences.items() if k.startswith("momentum")}, GRADIENT["float32"])
    assert_within({k: d for k, d in differences.items() if k.startswith("state")}, 1e-4)


@pytest.mark.parametrize("recipe", cases.RECIPES)
def test_each_of_ten_steps_in_float32(recipe):
    """Each from where float64, PyTorch's equal, has come to.

    Ten in a row are not compared, for training amplifies rounding: in float64 the paper's recipe, at this learning
    rate, takes 1e-14 after one step to 1e-11 after ten (the released one to 1e-13), and in float32 hardest pairs and
    ReLUs flip on the way.
    """
    exact, run = train(recipe, "float64"), train(recipe, "float32")
    with jax.enable_x64(False):
        for number, (before, after) in enumerate(zip(exact.states[:-1], exact.states[1:], strict=True)):
            before = jax.tree.map(lambda a, b: np.asarray(a, b.dtype), before, run.states[0])
            found, _ = run.step(before, run.batches[number])
            for kind, limit, of in (("momentum", GRADIENT["float32"], momentum), ("state", 1e-4, variables_of)):
                ours, expected = of(jax.device_get(found)), of(after)
                apart = {k: np.linalg.norm(ours[k] - x) / np.linalg.norm(x) for k, x in expected.items()}
                assert_within({f"step {number} {kind} {k}": float(d) for k, d in apart.items()}, limit)


@pytest.mark.parametrize("recipe", cases.RECIPES)
def test_running_variance_is_biased_where_pytorch_is_not(reference, recipe):
    """The one known difference of state. Unconverted it is 0.1 / (n - 1) of the batch's variance after a step."""
    run, prefix = train(recipe, "float64"), f"{recipe} train/"
    ours = variables_of(run.states[1])
    raw = {k: reference.difference(f"{prefix}state 1/{k}", v) for k, v in ours.items() if k.endswith("running_var")}
    assert min(raw.values()) > 1e-6 and max(raw.values()) < 0.1
    counts = {k: reference.get(f"{prefix}samples/{k.removesuffix('.running_var')}").item() for k in raw}
    stem, last, head = (counts[f"{k}.running_var"] for k in ("base.bn1", "base.layer4.1.bn2", "heads.2.bn"))
    assert stem == cases.BATCH * cases.HEIGHT * cases.IMAGE_WIDTH / 4 and last == cases.BATCH * 4 * 2
    assert head == (5 if recipe == "paper" else cases.BATCH)  # region 2 is invisible in three of eight images


def test_golden_arrays_are_small():
    assert cases.GOLDEN.stat().st_size < 300_000
