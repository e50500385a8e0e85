"""vpm_jax.convert: what comes back from every format it writes, and what PyTorch makes of them."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest
import tiny
import torch_files as files
from disk import flip
from flax.traverse_util import flatten_dict
from keras_files import write_keras
from raising import raises
from safetensors import safe_open
from tiny_runs import make_run

from vpm_jax import config as config_lib
from vpm_jax import convert, models, step
from vpm_jax.errors import UserError
from vpm_jax.models.resnet import ResNet
from vpm_jax.pretrained import Network, heads, load, own
from vpm_jax.runs.checkpoints import Checkpoints

pytestmark = pytest.mark.usefixtures("undrawn")


def run(*arguments) -> int:
    return convert.main([str(a) for a in arguments])


def assert_same(a, b, whole: bool = True) -> None:
    for x, y in ((a.params, b.params), (a.batch_stats, b.batch_stats), (a.classifier, b.classifier)):
        assert jax.tree.structure(x) == jax.tree.structure(y)
        jax.tree.map(np.testing.assert_array_equal, x, y)
    if whole:
        jax.tree.map(np.testing.assert_array_equal, a.heads, b.heads)
    assert (a.stride_on, a.bn_epsilon, a.network) == (b.stride_on, b.bn_epsilon, b.network)
    np.testing.assert_array_equal([a.mean, a.std], [b.mean, b.std])


def outputs(weights, image: np.ndarray) -> dict[str, np.ndarray]:
    config = weights.config.copy_and_resolve_references()
    config.model.dtype, config.model.bn_epsilon = "float32", weights.bn_epsilon
    _, out = jax.jit(models.create(config).apply)(weights.variables(), image)
    return {name: np.asarray(out[name]) for name in ("region_features", "visibility", "logits", "stage4")}


IMAGE = np.random.default_rng(3).integers(0, 256, (2, 64, 32, 3), dtype=np.uint8)


# ---- Backbones ----


@pytest.mark.parametrize("kind", ["keras", "torchvision"])
def test_a_backbone_as_npz_comes_back_as_it_was(tmp_path, capsys, kind):
    if kind == "keras":
        write_keras(tmp_path / "ResNet50")
        source = f"keras:{tmp_path / 'ResNet50'}"
    else:
        source = str(files.save(tmp_path / "a.pth", files.resnet(18)))
    run(source, "--output", tmp_path / "out.npz")
    assert f"--config.pretrained={tmp_path / 'out.npz'}" in capsys.readouterr().out
    assert_same(load(str(tmp_path / "out.npz")), load(source))
    assert_same(load(f"vpm:{tmp_path / 'out.npz'}"), load(source))


def test_torchvisions_weights_leave_as_they_came(tmp_path, capsys):
    tensors = files.resnet(50, width=64, classes=3, counters=False)
    run(files.save(tmp_path / "a.pth", tensors), "--output", tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", framework="numpy") as file:  # nothing differs, so nothing is in the name
        assert set(file.keys()) == set(tensors)
        for name, x in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(name), x)
        assert (file.metadata()["stride_on"], file.metadata()["bn_epsilon"]) == ("3x3", "1e-05")
    assert "something else" not in capsys.readouterr().out


def test_what_names_cannot_say_is_in_the_metadata_and_the_files_name(tmp_path, capsys):
    write_keras(tmp_path / "ResNet50", epsilon=1e-3)
    source = f"keras:{tmp_path / 'ResNet50'}"
    run(source, "--output", tmp_path / "a.safetensors", "--keep-epsilon")
    path = tmp_path / "a-width4-stride1x1-eps1e-3-input.safetensors"
    assert_same(load(str(path)), load(source))
    printed = capsys.readouterr().out
    assert "every batch norm's eps is 1e-3" in printed and "each stage's stride is on the first 1x1" in printed
    assert "x / 255 - (0.48502, 0.457957, 0.407604)) / (0.00392157," in printed
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    assert (metadata["stride_on"], metadata["bn_epsilon"], metadata["channels"]) == ("1x1", "0.001", "RGB")

    run(source, "--output", tmp_path / "a.safetensors")
    folded = load(str(tmp_path / "a-width4-stride1x1-input.safetensors"))
    assert folded.bn_epsilon == 1e-5
    assert "folded from epsilon 0.001 to PyTorch's 1e-5: exact in eval mode" in capsys.readouterr().out


def test_folding_keeps_every_feature():
    shapes = Network(18, 4).shapes()
    random = np.random.default_rng(0)
    # Variances down to a hundredth of the larger epsilon, where the two differ most.
    flat = {
        n: random.uniform(1e-5, 1, s) if n.endswith(("var", "scale")) else random.normal(0, 0.3, s)
        for n, s in shapes.items()
    }
    weights = own.Pretrained(
        **own.nested(flat),
        stride_on="3x3",
        bn_epsilon=1e-3,
        mean=(0, 0, 0),
        std=(1, 1, 1),
        source="",
        network=Network(18, 4),
    )
    image = random.normal(0, 1, (1, 32, 32, 3)).astype(np.float32)

    def features(w, **changes):
        network = ResNet(depth=18, width=4, **({"bn_epsilon": w.bn_epsilon} | changes))
        return np.asarray(network.apply({"params": w.params, "batch_stats": w.batch_stats}, image)["stage4"])

    folded = own.fold_epsilon(weights)
    assert folded.bn_epsilon == 1e-5
    expected = features(weights)
    assert np.linalg.norm(features(folded) - expected) < 1e-5 * np.linalg.norm(expected)
    assert np.linalg.norm(features(weights, bn_epsilon=1e-5) - expected) > 1e-2 * np.linalg.norm(expected)


# ---- Whole models ----


def test_a_trained_run_goes_out_and_comes_back(tmp_path, capsys):
    config, state = make_run(tmp_path / "run", model__bn_epsilon=1e-3)
    loaded = load(str(tmp_path / "run"))
    assert "step 0 of the run" in loaded.source  # `fill` leaves the step at zero
    np.testing.assert_array_equal(loaded.heads["params"]["heads"]["reducer"], state.params["heads"]["reducer"])
    kernel = state.params["backbone"]["conv_stem"]["kernel"]
    np.testing.assert_array_equal(loaded.params["conv_stem"]["kernel"], kernel)

    run(tmp_path / "run", "--output", tmp_path / "m.safetensors", "--keep-epsilon")
    back = load(str(tmp_path / "m-width4-eps1e-3-last1.safetensors"))
    assert_same(back, loaded)
    assert config_lib.to_json(back.config) == config_lib.to_json(config)

    run(tmp_path / "run", "--output", tmp_path / "m.safetensors")
    path = tmp_path / "m-width4-last1.safetensors"
    folded, expected = outputs(load(str(path)), IMAGE), outputs(loaded, IMAGE)
    for name, x in expected.items():
        assert np.linalg.norm(folded[name] - x) < 1e-5 * np.linalg.norm(x), name
    with safe_open(path, framework="numpy") as file:
        names, metadata = set(file.keys()), file.metadata()
        np.testing.assert_array_equal(file.get_tensor("heads.2.reducer.weight"), state.params["heads"]["reducer"][2].T)
        assert file.get_tensor("locator.weight").shape == (3, 32, 1, 1)
    assert metadata["bn_folded_from"] == "0.001" and metadata["grid"] == "[3, 1]" and metadata["recipe"] == "paper"
    assert json.loads(metadata["config"])["model"]["width"] == 4

    run(tmp_path / "run", "--output", tmp_path / "b.safetensors", "--backbone-only")
    with safe_open(tmp_path / "b-width4-last1.safetensors", framework="numpy") as file:
        assert set(file.keys()) == {name for name in names if not name.startswith(("heads.", "locator."))}


def test_a_changed_number_is_noticed(tmp_path):
    make_run(tmp_path / "run")
    run(tmp_path / "run", "--output", tmp_path / "m.safetensors")
    path = tmp_path / "m-width4-last1.safetensors"
    flip(path)
    with raises("damaged-weights"):
        load(str(path))


def test_a_small_stem_and_strides_come_back(tmp_path):
    make_run(tmp_path / "run", model__stem="4x4", model__strides=(2, 1, 2), model__locator="stripes")
    run(tmp_path / "run", "--output", tmp_path / "m.safetensors")
    assert_same(load(str(tmp_path / "m-stem4x4-width4-strides212-last1.safetensors")), load(str(tmp_path / "run")))


@pytest.mark.parametrize("source", ["released", "own"])
def test_a_whole_vpm_becomes_a_workdir(tmp_path, capsys, source):
    """For the released code's checkpoints: what `vpm_jax.evaluate` restores are their tensors."""
    if source == "released":
        path = files.save(tmp_path / "a.pth.tar", files.released(), legacy=True, wrap="state_dict")
    else:
        make_run(tmp_path / "run", "market_released", model__bn_epsilon=1e-3)
        run(tmp_path / "run", "--output", tmp_path / "m.safetensors")
        path = tmp_path / "m-width4-last1.safetensors"
    weights = load(str(path))
    run(path, "--output", tmp_path / "workdir", "--config.data.name=dukemtmc")
    assert f"vpm_jax.evaluate --workdir {tmp_path / 'workdir'}" in capsys.readouterr().out
    assert_same(load(str(tmp_path / "workdir")), weights)

    config = config_lib.read(tmp_path / "workdir")
    assert config.data.name == "dukemtmc" and config.match.squared and config.model.bn_epsilon == 1e-5
    with Checkpoints(tmp_path / "workdir", keep=0) as checkpoints:
        state, _ = checkpoints.restore(tiny.fill(step.state_shapes(config)))
    flat = flatten_dict(state.params["heads"])
    np.testing.assert_array_equal(flat[("reducer",)], weights.heads["params"]["heads"]["reducer"])
    with pytest.raises(UserError, match="exists already"):
        run(path, "--output", tmp_path / "workdir")


def test_pytorch_loads_what_was_written(tmp_path):
    """torchvision's own loader (here the reference's, of the same names), strictly, gives the same features."""
    torch = pytest.importorskip("torch")
    import torch_reference
    from safetensors.torch import load_file

    make_run(tmp_path / "run", model__bn_epsilon=1e-3)
    run(tmp_path / "run", "--output", tmp_path / "b.safetensors", "--backbone-only")
    model = torch_reference.ResNet(18, 4)
    model.load_state_dict(load_file(tmp_path / "b-width4-last1.safetensors"))
    with torch.no_grad():
        theirs = model.double().eval()(torch_reference.normalize(IMAGE))["stage4"].permute(0, 2, 3, 1).numpy()
    ours = outputs(load(str(tmp_path / "run")), IMAGE)["stage4"]
    assert np.linalg.norm(ours - theirs) < 1e-5 * np.linalg.norm(theirs)


def test_torchvision_loads_what_was_written(tmp_path):
    pytest.importorskip("torch")
    vision = pytest.importorskip("torchvision")
    from safetensors.torch import load_file

    run(files.save(tmp_path / "a.pth", files.resnet(18, width=64, classes=7)), "--output", tmp_path / "b.safetensors")
    vision.models.resnet18(num_classes=7).load_state_dict(load_file(tmp_path / "b.safetensors"))


# ---- What is refused ----


def test_extra_keys_are_left_out_only_when_asked(tmp_path, capsys):
    path = files.save(tmp_path / "a.pth", files.resnet(18) | {"extra": np.ones(2, np.float32)})
    with pytest.raises(UserError, match=r"1 unexpected \(extra\)"):
        run(path, "--output", tmp_path / "b.npz")
    run(path, "--output", tmp_path / "b.npz", "--partial")
    assert "Skipped: 1 unexpected (extra)." in capsys.readouterr().out
    assert load(str(tmp_path / "b.npz")).skipped == ""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--output", "b.pth"], "ends in '.pth': expected .npz, .safetensors or a folder"),
        (["--output", "nowhere/b.npz"], "there is no folder nowhere"),
        (["--output", "b.npz", "--config.seed=1"], "--config.seed=1: config keys are for an --output that is a folder"),
        (["--output", "b.npz", "--backbone-only"], "are for an --output that ends in .safetensors"),
        (["--output", "workdir"], "a workdir needs a whole VPM, and ResNet-18 of width 4"),
    ],
)
def test_a_wrong_output_is_named(tmp_path, monkeypatch, arguments, expected):
    monkeypatch.chdir(tmp_path)
    files.save(tmp_path / "a.pth", files.resnet(18))
    with pytest.raises(UserError) as error:
        run("a.pth", *arguments)
    assert expected in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_source_that_is_not_there_is_named_so(tmp_path):
    with pytest.raises(UserError, match=r'^SOURCE is "nowhere\.safetensors", but that file does not exist'):
        run("nowhere.safetensors", "--output", tmp_path / "b.npz")


def test_a_part_is_not_converted(tmp_path):
    tensors = files.resnet(18)
    del tensors["bn1.bias"]
    with pytest.raises(UserError, match=r"lacks 1 of the backbone's tensors \(params/bn_stem/bias"):
        run(files.save(tmp_path / "a.pth", tensors), "--output", tmp_path / "b.npz", "--partial")


@pytest.mark.parametrize("change", [{"stride_on": "5x5"}, {"depth": "50"}, {"mean": "[1, 2]"}, {"config": "{}}"}])
def test_metadata_that_do_not_fit_are_refused(tmp_path, change):
    from safetensors.numpy import load_file, save_file

    run(files.save(tmp_path / "a.pth", files.resnet(18)), "--output", tmp_path / "b.safetensors")
    path = tmp_path / "b-width4.safetensors"
    with safe_open(path, framework="numpy") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata | change)
    with pytest.raises(UserError, match=r"b-width4\.safetensors [^\n]*$"):
        load(str(path))


def test_a_folder_without_a_run_is_named(tmp_path):
    with raises("no-run"):
        load(f"vpm:{tmp_path}")


def test_a_neck_and_a_hidden_locator_have_names_for_pytorch_too():
    parts = {"model__neck": "bn", "model__head_dim": 0, "model__head_bias": False, "model__locator_hidden": 7}
    shapes = heads.shapes(tiny.shrunk("market", **parts))
    random = np.random.default_rng(0)
    ours = {name: random.normal(size=shape) for name, shape in shapes.items()}
    theirs = heads.to_torch(ours)
    assert {name: x.shape for name, x in theirs.items()} == heads.expected(shapes)
    assert set(theirs) == {"locator.weight", "locator.hidden.weight", "locator.hidden.bias"} | {
        f"heads.{n}.{leaf}"
        for n in range(3)
        for leaf in ("neck.weight", "neck.running_mean", "neck.running_var", "classifier.weight")
    }
    # PyTorch's convolutions are [out, in, k, k], ours [k, k, in, out]; a 1x1 has no k here.
    assert theirs["locator.weight"][2, 5, 0, 0] == ours["params/locator_kernel"][5, 2]
    assert theirs["locator.hidden.weight"][6, 5, 0, 2] == ours["params/locator_hidden_kernel"][0, 2, 5, 6]
    jax.tree.map(np.testing.assert_array_equal, heads.from_torch(theirs, shapes), ours)
