"""torchvision's, timm's and the released code's weights: names, features, and what a wrong file says."""

from __future__ import annotations

import jax
import ml_dtypes
import numpy as np
import pytest
import torch_files as files
from safetensors.numpy import save_file

from vpm_jax import models
from vpm_jax.errors import UserError
from vpm_jax.models.resnet import ResNet
from vpm_jax.pretrained import Network, apply_to, load, torchvision


def write(path, tensors: dict[str, np.ndarray]):
    """By the path's suffix; "old.pth" is the older format."""
    if path.suffix == ".safetensors":
        save_file({name: np.array(x, order="C") for name, x in tensors.items()}, path)
        return path
    return files.save(path, tensors, legacy=path.name == "old.pth")


def assert_trees_equal(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# ---- Names ----


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_names_and_shapes_are_torchvisions(depth):
    torch, vision = pytest.importorskip("torch"), pytest.importorskip("torchvision")
    with torch.device("meta"):
        state = getattr(vision.models, f"resnet{depth}")().state_dict()
    theirs = {name: tuple(x.shape) for name, x in state.items() if not name.endswith("tracked") and name[:2] != "fc"}
    assert torchvision.expected(Network(depth)) == theirs


@pytest.mark.parametrize("file", ["new.pth", "old.pth", "a.safetensors"])
@pytest.mark.parametrize("depth", [18, 50])
def test_every_tensor_arrives(tmp_path, file, depth):
    tensors = files.resnet(depth)
    path = write(tmp_path / file, tensors)
    weights = load(str(path))
    assert (weights.stride_on, weights.bn_epsilon, weights.network) == ("3x3", 1e-5, Network(depth, 4))
    assert (weights.mean, weights.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    back = torchvision.to_torch(weights.flat())
    kept = {name: x for name, x in tensors.items() if not name.startswith("fc") and not name.endswith("tracked")}
    assert set(back) == set(kept)
    for name, x in kept.items():
        np.testing.assert_array_equal(back[name], x)
    np.testing.assert_array_equal(weights.params["conv_stem"]["kernel"][2, 3, 1], tensors["conv1.weight"][:, 1, 2, 3])
    np.testing.assert_array_equal(weights.classifier["kernel"], tensors["fc.weight"].T)
    for kind in ("torchvision", "timm"):
        assert_trees_equal(load(f"{kind}:{path}").params, weights.params)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_orig_mod.module."])
def test_wrappers_are_taken_off(tmp_path, prefix):
    tensors = files.resnet(classes=0, counters=False)
    plain = load(str(write(tmp_path / "a.pth", tensors)))
    wrapped = load(str(write(tmp_path / "b.pth", {prefix + name: x for name, x in tensors.items()})))
    assert plain.classifier is wrapped.classifier is None
    assert_trees_equal(plain.params, wrapped.params)


def imitation(project: str) -> tuple[str, dict[str, np.ndarray], str]:
    """(the entry of the checkpoint with the state dict, its tensors, the ResNet's prefix) as a project saves them."""

    def tensors(*names: str) -> dict[str, np.ndarray]:
        return {name: np.ones((3, 1, 1), np.float32) for name in names}

    bare, classified = files.resnet(18, classes=0), files.resnet(18)
    momentum = {name: x + 1 for name, x in bare.items()}
    wrap, network, prefix, rest = {
        "fast-reid": (
            "model",
            bare,
            "backbone.",
            tensors("pixel_mean", "pixel_std", "heads.bottleneck.0.weight", "heads.classifier.weight"),
        ),
        "strong-baseline": ("", bare, "base.", tensors("bottleneck.weight", "classifier.weight")),
        "layumi": ("", classified, "model.", tensors("classifier.add_block.0.weight", "classifier.classifier.0.bias")),
        "a loop of one's own": ("net", bare, "base_model.", {}),
        "another": ("model_state_dict", bare, "model.base.", tensors("model.embed.weight")),
        "Lightning": ("state_dict", bare, "model.backbone.", tensors("model.head.weight", "loss.centers")),
        "MMLab": ("state_dict", bare, "backbone.", tensors("head.fc.weight", "head.fc.bias")),
        "MoCo": (
            "state_dict",
            bare | tensors("fc.0.weight", "fc.0.bias", "fc.2.weight"),
            "module.encoder_q.",
            {f"module.encoder_k.{name}": x for name, x in momentum.items()} | tensors("module.queue"),
        ),
        "DINO": ("teacher", bare, "module.backbone.", tensors("module.head.mlp.0.weight")),
    }[project]
    return wrap, rest | {prefix + name: x for name, x in network.items()}, prefix


PROJECTS = "fast-reid|strong-baseline|layumi|a loop of one's own|another|Lightning|MMLab|MoCo|DINO"


@pytest.mark.parametrize("project", PROJECTS.split("|"))
def test_a_resnet_inside_another_network_is_found(tmp_path, project):
    wrap, tensors, prefix = imitation(project)
    plain = load(str(write(tmp_path / "plain.pth", files.resnet(18))))
    path = str(files.save(tmp_path / "a.pth", tensors, wrap=wrap))
    for spec in (path, f"partial:{path}", f"torchvision:{path}"):
        weights = load(spec)
        assert_trees_equal((weights.params, weights.batch_stats), (plain.params, plain.batch_stats))
        assert f"names after {prefix.removeprefix('module.')}, " in weights.source and not weights.skipped
    inside = [name for name in tensors if name.startswith(prefix) and not name.startswith(f"{prefix}fc.")]
    others = set(tensors) - set(inside) - {f"{prefix}fc.weight", f"{prefix}fc.bias"}
    others = {name for name in others if not name.endswith("num_batches_tracked")}
    assert (f"without {len(others)} other tensors: " in weights.source) == bool(others)


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "float16"), (ml_dtypes.bfloat16, "bfloat16")])
@pytest.mark.parametrize("file", ["a.pth", "a.safetensors"])
def test_half_precision_is_read_as_float32_and_said(tmp_path, dtype, name, file):
    tensors = files.resnet(dtype=dtype)
    weights = load(str(write(tmp_path / file, tensors)))
    assert f", {name})" in weights.source
    kernel = weights.params["conv_stem"]["kernel"]
    assert kernel.dtype == np.float32
    np.testing.assert_array_equal(kernel, tensors["conv1.weight"].astype(np.float32).transpose(2, 3, 1, 0))


# ---- Features ----


@pytest.mark.parametrize("depth", [18, 50])
def test_features_equal_pytorchs(tmp_path, depth):
    torch = pytest.importorskip("torch")
    import torch_reference

    model = torch_reference.ResNet(depth, 4)
    model.load_state_dict({n: torch.from_numpy(np.array(x)) for n, x in files.resnet(depth, classes=0).items()})
    torch.save(model.state_dict(), tmp_path / "a.pth")
    weights = load(str(tmp_path / "a.pth"))
    image = np.random.default_rng(2).integers(0, 256, (1, 75, 50, 3), dtype=np.uint8)
    with torch.no_grad():
        theirs = model.double().eval()(torch_reference.normalize(image))
    network = ResNet(depth=depth, width=4, stride_on=weights.stride_on, bn_epsilon=weights.bn_epsilon)
    x = ((image / 255 - np.array(weights.mean)) / np.array(weights.std)).astype(np.float32)
    ours = jax.jit(network.apply)({"params": weights.params, "batch_stats": weights.batch_stats}, x)
    for stage, y in theirs.items():
        y = y.permute(0, 2, 3, 1).numpy()
        assert np.linalg.norm(ours[stage] - y) < 1e-5 * np.linalg.norm(y), stage


# ---- Wrong files ----


def spoil(kind: str) -> tuple[dict[str, np.ndarray], str]:
    tensors = files.resnet(50)
    match kind:
        case "extra keys":
            return tensors | {"layer5.0.conv1.weight": np.ones(3)}, "of 267 tensors expected, 1 unexpected (layer5.0."
        case "missing":
            del tensors["layer3.5.bn2.bias"], tensors["layer1.0.downsample.0.weight"]
            return tensors, "267 tensors expected, 2 missing (layer1.0.downsample.0.weight, layer3.5.bn2.bias):"
        case "a wide ResNet":
            tensors["layer1.0.conv2.weight"] = np.ones((8, 8, 3, 3), np.float32)
            return tensors, "1 of another shape (layer1.0.conv2.weight (8, 8, 3, 3) instead of (4, 4, 3, 3)):"
        case "another network":
            return {
                "conv1.weight": np.ones((8, 3, 3, 3)),
                "fc.bias": np.ones(2),
            }, "missing (bn1.running_mean, bn1.running_var, layer1."
        case "nobody's":
            return {"encoder.weight": np.ones(3)}, "holds weights of an unknown network (encoder.weight): expected"
        case "half a classifier":
            del tensors["fc.bias"]
            return tensors, "1 missing (fc.bias); 1 of another shape"
        case "NaN":
            tensors["layer2.1.conv3.weight"][3, 2] = np.nan
            return tensors, "NaN, infinity or a negative variance in layer2.1.conv3.weight: fetch"
        case "negative variance":
            tensors["bn1.running_var"][1] = -1e-3
            return tensors, "NaN, infinity or a negative variance in bn1.running_var: fetch"
        case "integers":
            tensors["bn1.bias"] = np.arange(4)
            return tensors, "bn1.bias hold int64, expected floats"
    raise AssertionError(kind)


KINDS = "extra keys|missing|a wide ResNet|another network|nobody's|half a classifier|NaN|negative variance|integers"


@pytest.mark.parametrize("kind", KINDS.split("|"))
@pytest.mark.parametrize("file", ["a.pth", "a.safetensors"])
def test_what_is_wrong_is_named(tmp_path, kind, file):
    tensors, expected = spoil(kind)
    with pytest.raises(UserError) as error:
        load(str(write(tmp_path / file, tensors)))
    message = str(error.value)
    assert message.startswith(str(tmp_path / file)) and expected in message
    assert "\n" not in message and len(message) < 700


def test_a_truncated_safetensors_is_refused(tmp_path):
    path = write(tmp_path / "a.safetensors", files.resnet(18))
    whole = path.read_bytes()
    for cut in (10, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(
            UserError, match=r"a\.safetensors is damaged or truncated \([^\n]*\): fetch or save it again"
        ):
            load(str(path))


def test_files_of_other_kinds_are_named(tmp_path):
    path = tmp_path / "weights.h5"
    path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    with pytest.raises(UserError, match="HDF5"):
        load(str(path))
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match="Git LFS pointer"):
        load(f"torchvision:{path}")


def test_a_part_is_loaded_only_when_asked(tmp_path):
    tensors = files.resnet(18)
    del tensors["layer1.0.conv1.weight"]
    tensors["extra.weight"] = np.ones(3, np.float32)
    path = write(tmp_path / "a.pth", tensors)
    with pytest.raises(UserError, match=r"1 missing \(layer1.0.conv1.weight\); 1 unexpected \(extra.weight\)"):
        load(str(path))
    weights = load(f"partial:{path}")
    assert weights.skipped == "1 missing (layer1.0.conv1.weight); 1 unexpected (extra.weight)"
    assert_trees_equal(weights.params, load(str(path), partial=True).params)

    shapes = jax.eval_shape(ResNet(depth=18, width=4).init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
    fresh = jax.tree.map(lambda x: np.full(x.shape, 7, x.dtype), shapes)
    loaded = apply_to({name: {"backbone": tree} for name, tree in fresh.items()}, weights)["params"]["backbone"]
    assert (loaded["stage1_block1"]["conv1"]["kernel"] == 7).all()  # as it was
    kernel = tensors["layer1.0.conv2.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(loaded["stage1_block1"]["conv2"]["kernel"], kernel)


# ---- The released code's checkpoints ----


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("children", ["names", "numbers"])
def test_a_released_checkpoint_is_a_whole_vpm(tmp_path, prefix, children):
    tensors = files.released(prefix=prefix)
    if children == "numbers":
        numbers = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
        for name, number in numbers.items():
            old, new = f"{prefix}base.{name}.", f"{prefix}base.{number}."
            tensors = {key.replace(old, new): x for key, x in tensors.items()}
        tensors = {key: x for key, x in tensors.items() if ".fc." not in key}
    weights = load(str(files.save(tmp_path / "a.pth.tar", tensors, legacy=True, wrap="state_dict")))
    m = weights.config.model
    assert (m.locator, m.locator_groups, tuple(m.grid), m.global_head) == ("row", 8, (3, 1), True)
    assert (m.head_dim, m.num_identities, m.dummy_classes, m.width) == (6, 4, 1, 4)
    heads = weights.heads["params"]["heads"]
    assert heads["reducer"].shape == (4, 128, 6) and heads["classifier"].shape == (4, 6, 5)
    np.testing.assert_array_equal(heads["reducer"][3], tensors[f"{prefix}instance.3.1.weight"].T)
    np.testing.assert_array_equal(weights.heads["params"]["locator_bias"], tensors[f"{prefix}local_mask.bias"])
    assert weights.classifier is None  # base.fc was never trained


def test_a_released_checkpoint_computes_what_pytorch_does(tmp_path):
    torch = pytest.importorskip("torch")
    import parity_cases as cases
    import torch_reference

    model = torch_reference.filled(torch_reference.ReleasedVPM(torch_reference.ResNet(50, 4), 128)).eval()
    model.locator.weight.data *= 0.01  # random weights give large features, and these a visibility score of zero
    parts = {"reducer": 1, "bn": 2, "classifier": 3}

    def released_name(name: str) -> str:
        if name.startswith("heads"):
            _, n, part, leaf = name.split(".")
            return f"module.instance.{n}.{parts[part]}.{leaf}"
        return "module." + name.replace("locator", "local_mask")

    state = {released_name(name): x.float() if x.is_floating_point() else x for name, x in model.state_dict().items()}
    checkpoint = {"state_dict": state, "epoch": 60, "best_top1": np.float64(0.9)}
    torch.save(checkpoint, tmp_path / "checkpoint.pth.tar", _use_new_zipfile_serialization=False)
    weights = load(f"released:{tmp_path / 'checkpoint.pth.tar'}")

    image = cases.images("released checkpoint", 3)
    with torch.no_grad():
        theirs = model(torch_reference.normalize(image), torch.ones(3, cases.REGIONS, dtype=torch.bool), {})
    weights.config.model.dtype = "float32"
    _, ours = jax.jit(models.create(weights.config).apply)(weights.variables(), image)
    for name in ("locator_logits", "visibility", "region_features", "logits", "global_logits"):
        y = theirs[name].numpy()
        assert ours[name].shape == y.shape
        assert np.linalg.norm(ours[name] - y) < 1e-5 * np.linalg.norm(y), name


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"instance.1.2.running_var": None}, "1 missing (instance.1.2.running_var)"),
        ({"instance.4.1.weight": np.ones((6, 128))}, "1 unexpected (instance.4.1.weight)"),
        ({"local_mask.weight": np.ones((3, 15, 1, 1))}, "15 of 128 channels"),
        ({"base.conv1.weight": None}, "missing (base.conv1.weight)"),
        (
            {"instance.0.3.weight": np.full((5, 6), np.nan)},
            "NaN, infinity or a negative variance in instance.0.3.weight",
        ),
    ],
)
def test_a_wrong_released_checkpoint_is_named(tmp_path, change, expected):
    tensors = files.released(prefix="") | {key: x for key, x in change.items() if x is not None}
    tensors = {key: x for key, x in tensors.items() if not (key in change and change[key] is None)}
    with pytest.raises(UserError) as error:
        load(str(write(tmp_path / "a.pth", tensors)))
    assert expected in str(error.value) and "\n" not in str(error.value)
