"""The models: their contract, and every equation against float64 NumPy on feature maps that the test chooses."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from tiny import Given, fill, recipe, shrunk

from vpm_jax import losses, models
from vpm_jax.config import default
from vpm_jax.geometry import feature_map_shape
from vpm_jax.models.batch_norm import BatchNorm
from vpm_jax.models.resnet import Block, Conv, ResNet
from vpm_jax.models.vpm import VPM, ExampleDropout, IdentityHeads, MaskedBatchNorm
from vpm_jax.regions import Crop, RegionGrid, project_regions
from vpm_jax.step import l2_normalize

EXACT = dict(rtol=1e-12, atol=1e-12)


def shapes(config):
    """((x, out), variables) of the model as shapes: nothing is computed."""
    image = jax.ShapeDtypeStruct((2, config.data.height, config.data.width, 3), jnp.uint8)
    return jax.eval_shape(models.create(config).init_with_output, jax.random.key(0), image)


def of(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), tree)


# --- the contract -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("file", ["market", "market_released"])
def test_contract(file, dtype):
    config = recipe(file, model__num_identities=751, model__dtype=dtype)
    (x, out), variables = shapes(config)
    released = file == "market_released"
    classes = 752 if released else 751
    locator = ((2, 24, 1 if released else 8, 6), "float32")
    expected = {
        "feature_map": ((2, 24, 8, 2048), dtype),
        "locator_logits": locator,
        "probability": locator,
        "visibility": ((2, 6), "float32"),
        "region_features": ((2, 6, 2048), "float32"),
        "logits": ((2, 6, classes), "float32"),
        "stem": ((2, 192, 64, 64), dtype),
        "stage1": ((2, 96, 32, 256), dtype),
        "stage2": ((2, 48, 16, 512), dtype),
        "stage3": ((2, 24, 8, 1024), dtype),
        "stage4": ((2, 24, 8, 2048), dtype),
    }
    if released:
        expected["global_logits"] = ((2, classes), "float32")
    assert of(out) == expected and of(x) == expected["logits"]
    assert models.map_shape(config) == ((24, 1) if released else (24, 8))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(variables)} == {"float32"}
    heads = 7 if released else 6
    new = {k: v for k, v in variables["params"].items() if k != "backbone"}
    expected = {
        "locator_kernel": (256 if released else 2048, 6),
        "heads": {
            "reducer": (heads, 2048, 256),
            "bn": {"scale": (heads, 256), "bias": (heads, 256)},
            "classifier": (heads, 256, classes),
            "bias": (heads, classes),
        },
    } | ({"locator_bias": (6,)} if released else {})
    assert jax.tree.map(lambda leaf: leaf.shape, new) == expected


@pytest.mark.parametrize(
    "depth, torchvision, channels",
    [(18, 11_689_512, 512), (34, 21_797_672, 512), (50, 25_557_032, 2048), (101, 44_549_160, 2048)],
)
def test_backbone_has_torchvisions_parameters_without_fc(depth, torchvision, channels):
    image = jax.ShapeDtypeStruct((1, 64, 32, 3), jnp.float32)
    variables = jax.eval_shape(ResNet(depth).init, jax.random.key(0), image)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert count == torchvision - 1000 * (channels + 1)


@pytest.mark.parametrize("last_stride", [1, 2])
@pytest.mark.parametrize("stem", ["7x7", "3x3", "4x4"])
def test_feature_shape_is_that_of_the_last_stage(stem, last_stride):
    net, config = ResNet(18, width=1, stem=stem, last_stride=last_stride), default()
    config.model.update(stem=stem, last_stride=last_stride)
    for size in [(64, 32), (77, 35), (33, 1), (62, 47)]:
        stages, _ = jax.eval_shape(
            net.init_with_output, jax.random.key(0), jax.ShapeDtypeStruct((1, *size, 3), "float32")
        )
        assert stages["stage4"].shape[1:3] == feature_map_shape(config, size)


def test_initial_values():
    net = models.VPM(Given(), (2, 1), 50, (0.0,) * 3, (1.0,) * 3, head_dim=40)
    key = jax.random.key(0, impl="rbg")  # compiles in a fraction of the default's time
    params = jax.jit(net.init)(key, jnp.zeros((1, 2, 2, 3000)))["params"]
    heads = params["heads"]
    assert not heads["bias"].any()
    # Kaiming fan-out: 2 outputs of the locator, 40 of a reducer. A standard deviation of n values is known to
    # about 1 / sqrt(2 n); the smallest n here is 4000.
    for values, deviation in (
        (params["locator_kernel"], np.sqrt(2 / 2)),
        (heads["reducer"], np.sqrt(2 / 40)),
        (heads["classifier"], 0.001),
        (Conv(40, 3).init(key, jnp.zeros((1, 4, 4, 20)))["params"]["kernel"], np.sqrt(2 / (9 * 40))),
    ):
        assert abs(values.std() / deviation - 1) < 0.06 and abs(values.mean() / deviation) < 0.08


# --- the backbone -------------------------------------------------------------------------------------


def test_a_patch_stem_is_a_convolution_padded_below_and_to_the_right(float64):
    random = np.random.default_rng(0)
    kernel = random.normal(size=(4, 4, 3, 5))
    for height, width in [(8, 12), (9, 5), (10, 7)]:
        x = random.normal(size=(2, height, width, 3))
        padding = [(0, -n % 4) for n in (height, width)]
        expected = lax.conv_general_dilated(x, kernel, (4, 4), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        found = Conv(5, 4, 4, jnp.float64, jnp.float64).apply({"params": {"kernel": kernel}}, x)
        np.testing.assert_allclose(found, expected, **EXACT)


def test_stride_on_says_which_convolution_skips_pixels():
    random = np.random.default_rng(0)
    x = random.normal(size=(1, 6, 6, 4)).astype(np.float32)
    odd = x.copy()
    odd[:, 1::2] += random.normal(size=(1, 3, 6, 4))
    odd[:, :, 1::2] += random.normal(size=(1, 6, 3, 4))
    outputs = {}
    for stride_on in ("1x1", "3x3"):
        norm = partial(BatchNorm, train=False)
        block = Block(2, 2, bottleneck=True, stride_on=stride_on, conv=Conv, norm=norm)
        variables = fill(jax.eval_shape(block.init, jax.random.key(0), x))
        outputs[stride_on] = [jax.jit(block.apply)(variables, image) for image in (x, odd)]
        assert outputs[stride_on][0].shape == (1, 3, 3, 8)
    # A strided 1x1 never sees an odd row or column, as the shortcut never does; a strided 3x3 does.
    np.testing.assert_array_equal(*outputs["1x1"])
    assert np.abs(np.subtract(*outputs["3x3"])).max() > 0.1


@pytest.fixture(scope="module")
def evaluation():
    """The shrunk released model in eval mode, compiled: image uint8 [3, 64, 32, 3] -> (x, out)."""
    config = shrunk("market_released")
    net = models.create(config)
    image = jnp.zeros((3, 64, 32, 3), jnp.uint8)
    shapes = jax.eval_shape(net.init_with_output, jax.random.key(0), image)
    run = jax.jit(partial(net.apply, fill(shapes[1])))
    return run, shapes[0]


def test_eval_mode_is_deterministic_and_independent_of_the_batch(evaluation):
    run, expected = evaluation
    image = np.random.default_rng(0).integers(0, 256, (3, 64, 32, 3), np.uint8)
    first, again = run(image), run(image)
    assert of(first) == of(expected)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    others = image.copy()
    others[0], others[2] = 0, 255
    changed = run(others)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1], b[1], rtol=1e-5, atol=1e-5), first, changed)
    assert np.abs(first[0][0] - changed[0][0]).max() > 1e-3
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(first))


def test_uint8_is_normalised_on_the_device(float64):
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    net = models.VPM(Given(), (2, 1), 3, mean, std, head_dim=2, param_dtype=jnp.float64)
    image = np.random.default_rng(0).integers(0, 256, (2, 4, 3, 3), np.uint8)
    normalised = (image / 255 - mean) / std
    variables = fill(jax.eval_shape(net.init, jax.random.key(0), image))
    variables["params"]["backbone"]["scale"][:] = 1
    apply = jax.jit(net.apply)
    x, out = apply(variables, image)
    np.testing.assert_allclose(out["feature_map"], normalised, **EXACT)
    np.testing.assert_allclose(x, apply(variables, normalised)[0], **EXACT)


# --- Section 3.1 --------------------------------------------------------------------------------------


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def located(feature_map, locator, grid, **fields):
    """(parameters, out) of a VPM whose feature map is given, in eval mode, in float64."""
    net = models.VPM(
        Given(), grid, 5, (0.0,) * 3, (1.0,) * 3, locator=locator, head_dim=4, param_dtype=jnp.float64, **fields
    )
    variables = fill(jax.eval_shape(net.init, jax.random.key(0), feature_map))
    variables["params"]["backbone"]["scale"][:] = 1
    x, out = jax.jit(net.apply)(variables, feature_map)
    np.testing.assert_array_equal(x, out["logits"])
    np.testing.assert_array_equal(out["feature_map"], feature_map)
    return variables["params"], jax.tree.map(np.asarray, out)


def test_pixel_locator_is_equations_1_to_3(float64):
    feature_map = np.random.default_rng(1).normal(size=(2, 5, 3, 16))
    params, out = located(feature_map, "pixel", (2, 2))
    logits = np.einsum("bhwc,cp->bhwp", feature_map, params["locator_kernel"])
    probability = softmax(logits)  # Eq. 1
    visibility = probability.sum((1, 2))  # Eq. 2
    features = np.einsum("bhwp,bhwc->bpc", probability, feature_map) / visibility[..., None]  # Eq. 3
    for key, expected in (
        ("locator_logits", logits),
        ("probability", probability),
        ("visibility", visibility),
        ("region_features", features),
    ):
        np.testing.assert_allclose(out[key], expected, **EXACT)
    np.testing.assert_allclose(out["visibility"].sum(-1), 15, rtol=1e-12)  # every cell is shared out


class TwoStages(nn.Module):
    """Both maps are the image times a parameter, the second of its first channels alone."""

    @nn.compact
    def __call__(self, x, train: bool = False):
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], x.dtype)
        return {"stage4": x * scale, "stage3": x[..., :3] ** 2}


@pytest.mark.parametrize("stage", [4, 3])
def test_a_hidden_layer_of_the_locator_sees_the_neighbours(float64, stage):
    feature_map = np.random.default_rng(10).normal(size=(2, 5, 3, 4))
    net = models.VPM(
        TwoStages(), (2, 1), 5, (0.0,) * 3, (1.0,) * 3, locator_hidden=6, locator_stage=stage, param_dtype=jnp.float64
    )
    variables = fill(jax.eval_shape(net.init, jax.random.key(0), feature_map))
    variables["params"]["backbone"]["scale"][:] = 1
    params = variables["params"]
    _, out = jax.jit(net.apply)(variables, feature_map)
    read = feature_map if stage == 4 else feature_map[..., :3] ** 2
    assert params["locator_hidden_kernel"].shape == (3, 3, read.shape[-1], 6)
    assert np.abs(params["locator_hidden_bias"]).min() > 1e-3
    around = np.pad(read, ((0, 0), (1, 1), (1, 1), (0, 0)))
    for b, y, x in np.ndindex(2, 5, 3):
        window = around[b, y : y + 3, x : x + 3]
        hidden = (window[..., None] * params["locator_hidden_kernel"]).sum((0, 1, 2))
        hidden = np.maximum(hidden + params["locator_hidden_bias"], 0)
        np.testing.assert_allclose(out["locator_logits"][b, y, x], hidden @ params["locator_kernel"], **EXACT)
    pooled = np.einsum("bhwp,bhwc->bpc", out["probability"], feature_map) / out["visibility"][..., None]
    np.testing.assert_allclose(out["region_features"], pooled, **EXACT)  # of T, whatever the locator reads


def test_row_locator_averages_groups_of_channels_and_the_width(float64):
    random = np.random.default_rng(2)
    feature_map = random.normal(size=(2, 6, 3, 24))
    params, out = located(feature_map, "row", (4, 1), locator_groups=8, pool_gradient=False)
    grouped = np.stack([feature_map[..., 8 * i : 8 * i + 8].mean(-1) for i in range(3)], -1)
    logits = grouped.mean(2) @ params["locator_kernel"] + params["locator_bias"]
    assert np.abs(params["locator_bias"]).min() > 0.001
    probability = softmax(logits)  # [B, h, P]
    visibility = probability.sum(1)
    share = probability / visibility[:, None]
    features = np.einsum("bhp,bhc->bpc", share, feature_map.sum(2))
    for key, expected in (
        ("locator_logits", logits[:, :, None]),
        ("probability", probability[:, :, None]),
        ("visibility", visibility),
        ("region_features", features),
    ):
        np.testing.assert_allclose(out[key], expected, **EXACT)


@pytest.mark.parametrize("grid", [(1, 1), (4, 1), (2, 3)])
def test_stripes_are_the_uniform_partition(float64, grid):
    feature_map = np.random.default_rng(3).normal(size=(2, 8, 6, 5))
    params, out = located(feature_map, "stripes", grid)
    assert "locator_kernel" not in params
    labels, _ = project_regions(Crop(0, 0, 1, 1), RegionGrid(*grid), (8, 6))
    count = grid[0] * grid[1]
    expected = np.stack([feature_map[:, labels == region].mean(1) for region in range(count)], 1)
    np.testing.assert_allclose(out["region_features"], expected, **EXACT)
    np.testing.assert_allclose(out["visibility"], np.full((2, count), 48 / count), **EXACT)
    if grid == (1, 1):  # the global feature
        np.testing.assert_allclose(out["region_features"][:, 0], feature_map.mean((1, 2)), **EXACT)


def test_global_head_sees_the_average(float64):
    feature_map = np.random.default_rng(4).normal(size=(2, 4, 3, 8))
    params, out = located(feature_map, "pixel", (3, 1), global_head=True)
    assert out["logits"].shape == (2, 3, 5) and params["heads"]["reducer"].shape == (4, 8, 4)
    pooled = feature_map.mean((1, 2), keepdims=True)
    _, averaged = located(np.broadcast_to(pooled, feature_map.shape), "pixel", (3, 1), global_head=True)
    np.testing.assert_allclose(out["global_logits"], averaged["global_logits"], **EXACT)
    _, other = located(np.broadcast_to(pooled + 1e-3, feature_map.shape), "pixel", (3, 1), global_head=True)
    assert np.abs(other["global_logits"] - out["global_logits"]).max() > 1e-5


# --- the heads ----------------------------------------------------------------------------------------


def test_identity_heads_in_eval_mode(float64):
    random = np.random.default_rng(5)
    features, visible = random.normal(size=(4, 3, 8)), random.random((4, 3)) > 0.5
    heads = IdentityHeads(7, 5, dropout=0.5, visible_only=True, param_dtype=jnp.float64)
    variables = fill(jax.eval_shape(partial(heads.init, train=False), jax.random.key(0), features, visible))
    params, statistics = variables["params"], variables["batch_stats"]["bn"]
    expected = np.zeros((4, 3, 7))
    for region in range(3):
        x = features[:, region] @ params["reducer"][region]
        x = (x - statistics["mean"][region]) / np.sqrt(statistics["var"][region] + 1e-5)
        x = x * params["bn"]["scale"][region] + params["bn"]["bias"][region]
        expected[:, region] = x @ params["classifier"][region] + params["bias"][region]
    np.testing.assert_allclose(heads.apply(variables, features, visible, train=False), expected, **EXACT)


@pytest.mark.parametrize("devices", [None, 2])
def test_masked_batch_norm_is_batch_norm_of_the_visible(float64, devices):
    random = np.random.default_rng(6)
    x = random.normal(3, 2, size=(8, 4, 5))
    mask = random.random((8, 4)) > 0.4
    mask[:, 2] = False  # nobody shows it
    mask[:, 3] = [False] * 7 + [True]  # one image does, on the second device
    assert len(set(mask[:4].sum(0) - mask[4:].sum(0))) > 1
    net = MaskedBatchNorm(axis_name="data" if devices else None, param_dtype=jnp.float64)
    variables = fill(
        jax.eval_shape(partial(MaskedBatchNorm(param_dtype=jnp.float64).init, train=True), jax.random.key(0), x, mask)
    )
    before = variables["batch_stats"]

    apply = jax.jit(partial(net.apply, variables, train=True, mutable=["batch_stats"]))
    if devices:
        halves = (x.reshape(2, 4, 4, 5), mask.reshape(2, 4, 4))
        y, updates = jax.vmap(apply, axis_name="data")(*halves)
        y, statistics = y.reshape(8, 4, 5), jax.tree.map(lambda leaf: leaf[0], updates["batch_stats"])
        jax.tree.map(lambda leaf: np.testing.assert_array_equal(leaf[0], leaf[1]), updates)
    else:
        y, updates = apply(x, mask)
        statistics = updates["batch_stats"]
    for region in range(4):
        shown = x[mask[:, region], region]
        if not len(shown):
            for key in ("mean", "var"):
                np.testing.assert_array_equal(statistics[key][region], before[key][region])
            continue
        mean, var = shown.mean(0), shown.var(0)  # biased
        scale, bias = (variables["params"][key][region] for key in ("scale", "bias"))
        expected = (x[:, region] - mean) / np.sqrt(var + 1e-5) * scale + bias
        np.testing.assert_allclose(y[:, region][mask[:, region]], expected[mask[:, region]], **EXACT)
        for key, value in (("mean", mean), ("var", var)):
            np.testing.assert_allclose(statistics[key][region], 0.9 * before[key][region] + 0.1 * value, **EXACT)
    assert np.isfinite(y).all()


def test_dropout_of_an_example_depends_on_its_place_in_the_global_batch_alone():
    x = np.random.default_rng(7).normal(size=(8, 400)).astype(np.float32)
    rngs = {"dropout": jax.random.key(3)}

    def drop(x, axis_name=None, rngs=rngs):
        return ExampleDropout(0.25, axis_name).apply({}, x, train=True, rngs=rngs)

    whole = drop(x)
    kept = np.asarray(whole != 0)
    np.testing.assert_allclose(whole, np.where(kept, x / 0.75, 0), rtol=1e-6)
    assert abs(kept.mean() - 0.75) < 0.03  # 3200 draws: a standard deviation of 0.008
    assert len({row.tobytes() for row in kept}) == 8
    np.testing.assert_allclose(drop(x[:3]), whole[:3], rtol=1e-6)
    halves = jax.vmap(partial(drop, axis_name="data"), axis_name="data")(x.reshape(2, 4, 400))
    np.testing.assert_allclose(halves.reshape(8, 400), whole, rtol=1e-6)
    assert ((drop(x, rngs={"dropout": jax.random.key(4)}) != 0) != kept).any()
    np.testing.assert_array_equal(ExampleDropout(0.25).apply({}, x, train=False), x)


@pytest.mark.parametrize("visible_only", [True, False])
def test_the_neck_is_batch_norm_between_the_region_feature_and_its_head(float64, visible_only):
    random = np.random.default_rng(9)
    feature_map = random.normal(1, 2, size=(8, 4, 3, 6))
    visible = random.random((8, 2)) > 0.4
    net = models.VPM(
        Given(), (2, 1), 5, (0.0,) * 3, (1.0,) * 3, head_bn_visible_only=visible_only, param_dtype=jnp.float64,
        neck="bn", head_dim=0, head_dropout=0.0, head_bias=False, global_head=True,
    )  # fmt: skip
    variables = fill(jax.eval_shape(net.init, jax.random.key(0), feature_map))
    params, statistics = variables["params"], variables["batch_stats"]["neck"]
    assert {k: {n: x.shape for n, x in params[k].items()} for k in ("neck", "heads")} == {
        "neck": {"scale": (3, 6)},
        "heads": {"classifier": (3, 6, 5)},
    }

    def head(x, mean, var, region):
        normal = (x - mean) / np.sqrt(var + 1e-5) * params["neck"]["scale"][region]
        return normal, normal @ params["heads"]["classifier"][region]

    (x, out), updates = jax.jit(partial(net.apply, train=True, mutable=["batch_stats"]))(
        variables, feature_map, visible=visible, rngs={"dropout": jax.random.key(0)}
    )
    pooled = np.mean(out["feature_map"], (1, 2))
    for region in range(3):
        found = pooled if region == 2 else np.asarray(out["region_features"][:, region])
        shown = np.ones(8, bool) if region == 2 or not visible_only else visible[:, region]
        mean, var = found[shown].mean(0), found[shown].var(0)
        normal, logits = head(found, mean, var, region)
        np.testing.assert_allclose(out["global_logits"] if region == 2 else x[:, region], logits, **EXACT)
        if region < 2:
            np.testing.assert_allclose(out["neck_features"][:, region], normal, **EXACT)
        for key, value in (("mean", mean), ("var", var)):
            expected = 0.9 * statistics[key][region] + 0.1 * value
            np.testing.assert_allclose(updates["batch_stats"]["neck"][key][region], expected, **EXACT)
    x, out = jax.jit(net.apply)(variables, feature_map)
    for region in range(2):
        moments = statistics["mean"][region], statistics["var"][region]
        normal, logits = head(np.asarray(out["region_features"][:, region]), *moments, region)
        np.testing.assert_allclose(out["neck_features"][:, region], normal, **EXACT)
        np.testing.assert_allclose(x[:, region], logits, **EXACT)


# --- gradients ----------------------------------------------------------------------------------------

B, P, C = 8, 3, 6


def gradients(net, what, visible):
    """d(identity loss + triplet loss)/d(parameters) and /d(a perturbation of the region features [B, P, C])."""
    random = np.random.default_rng(8)
    feature_map = random.normal(size=(B, 4, 2, C))
    identity = np.repeat(np.arange(4), 2)
    variables = fill(jax.eval_shape(net.init, jax.random.key(0), feature_map))

    def loss(params, perturbation):
        def perturb(call, args, kwargs, context):
            if context.module.name == ("neck" if net.neck == "bn" else "heads") and context.method_name == "__call__":
                args = (args[0] + perturbation, *args[1:])
            return call(*args, **kwargs)

        with nn.intercept_methods(perturb):
            (x, out), _ = net.apply(
                variables | {"params": params},
                feature_map,
                train=True,
                visible=visible,
                rngs={"dropout": jax.random.key(1)},
                mutable=["batch_stats"],
            )
        total, _ = losses.identity_loss(x, identity, visible)
        triplet, _ = losses.triplet_loss(l2_normalize(out["region_features"] + perturbation), identity, visible)
        return {"identity": total.sum(), "both": total.sum() + triplet}[what]

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(variables["params"], np.zeros((B, P, C)))


def small_vpm(**fields):
    fields = {"head_dim": 5} | fields
    return models.VPM(Given(), (P, 1), 4, (0.0,) * 3, (1.0,) * 3, param_dtype=jnp.float64, **fields)


@pytest.mark.parametrize("neck", ["none", "bn"])
@pytest.mark.parametrize("visible_only", [True, False])
def test_invisible_regions_get_no_gradient_through_the_heads(float64, visible_only, neck):
    visible = np.ones((B, P), bool)
    visible[[0, 3, 5], 2] = visible[6, 1] = False
    visible[1, 0] = False
    head_dim = 5 if neck == "none" else 0
    net = small_vpm(head_bn_visible_only=visible_only, neck=neck, head_dim=head_dim, head_dropout=0.0)
    _, found = gradients(net, "both", visible)
    assert np.isfinite(found).all()
    assert (np.abs(found).max(-1)[visible] > 1e-6).all()
    # Statistics over every image leak a gradient into the invisible (the released recipe does): the test can fail.
    assert (found[~visible] == 0).all() if visible_only else (np.abs(found).max(-1)[~visible] > 1e-8).all()


@pytest.mark.parametrize("locator", ["pixel", "row"])
@pytest.mark.parametrize("pool_gradient", [True, False])
def test_pool_gradient_lets_the_identity_loss_move_the_locator(float64, locator, pool_gradient):
    net = small_vpm(locator=locator, pool_gradient=pool_gradient, head_dropout=0)
    params, _ = gradients(net, "identity", np.ones((B, P), bool))
    largest = np.abs(params["locator_kernel"]).max()
    assert largest > 1e-6 if pool_gradient else largest == 0
    assert np.abs(params["backbone"]["scale"]).min() > 1e-6  # the features themselves always learn


def test_a_region_that_underflows_everywhere_has_the_features_of_its_likeliest_cells():
    """Its visibility is 0, and its feature still Eq. 3's: a mean of cells, not 0 / 0."""
    locator = np.zeros((4, 2), np.float32)
    locator[:, 0] = 100.0  # region 1's probability is exp(-400 x): 0 in float32

    def total(image):
        grid_model = VPM(Given(), (2, 1), 3, (0.0,) * 3, (1.0,) * 3)
        variables = grid_model.init(jax.random.key(0), image)
        params = variables["params"] | {"locator_kernel": jnp.asarray(locator)}
        _, out = grid_model.apply({**variables, "params": params}, image)
        return jnp.sum(out["region_features"]), out

    image = jnp.full((2, 4, 2, 4), 4.0).at[0, 2].set(3.0)  # where region 1 is e^100 times as likely as elsewhere
    (value, out), gradient = jax.value_and_grad(total, has_aux=True)(image)
    assert (out["visibility"][:, 1] == 0).all()
    np.testing.assert_allclose(out["region_features"][:, 1, 0], [3.0, 4.0], rtol=1e-6)
    assert np.isfinite(value) and np.isfinite(gradient).all()


@pytest.mark.usefixtures("unchecked_shapes")
def test_images_of_another_shape_or_dtype_are_refused():
    model = VPM(Given(), (2, 1), 3, (0.0,) * 3, (1.0,) * 3)
    for image in (np.zeros((4, 2, 3), np.uint8), np.zeros((1, 4, 2, 3), np.int32)):
        with pytest.raises(
            ValueError, match=r"image is u?int\d+ \(.*expected uint8 or normalized floats \[B, H, W, 3\]"
        ):
            model.init(jax.random.key(0), image)
