"""vpm_jax.export: what was written computes what the model does, without the package; what does not is never kept."""

from __future__ import annotations

import hashlib
import json
import pickle
import subprocess
import sys

import jax
import jax.export
import numpy as np
import pytest
from disk import largest_file
from flax import traverse_util
from raising import raises
from tiny import assert_equal
from tiny_runs import make_run

from vpm_jax import VPM, UserError, api, export, step
from vpm_jax import config as config_lib
from vpm_jax.pretrained import own

pytest.importorskip("flatbuffers", reason="jax.export writes and reads with it")

PICTURES = np.random.default_rng(4).integers(0, 256, (5, 64, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=["market", "market_released"])
def exported(request, tmp_path_factory):
    """(workdir, the .stablehlo of it): a pixel locator's and a row locator's."""
    folder = tmp_path_factory.mktemp("export")
    make_run(folder / "run", request.param)
    export.main(["--workdir", str(folder / "run"), "--output", str(folder / "a.stablehlo")])
    return folder / "run", folder / "a.stablehlo"


def test_an_export_is_the_model(exported):
    live, loaded = VPM.load(exported[0]), pickle.loads(pickle.dumps(VPM.load(exported[1])))
    assert_equal(loaded(PICTURES), live(PICTURES), 1e-4)
    assert_equal(loaded(PICTURES[:3], batch=1), live(PICTURES[:3]), 1e-4)
    assert loaded.fingerprint == live.fingerprint
    assert (loaded.grid, loaded.image_size) == (live.grid, live.image_size)
    np.testing.assert_allclose(loaded.match(PICTURES[:2], PICTURES), live.match(PICTURES[:2], PICTURES), atol=1e-3)
    assert len(loaded([])) == 0


def test_it_takes_any_batch_on_every_platform(exported):
    program = jax.export.deserialize(bytearray(exported[1].read_bytes()))
    assert program.platforms == ("cpu", "cuda", "tpu")
    (image,) = program.in_avals
    assert image.dtype == np.uint8 and image.shape[1:] == (64, 32, 3) and not isinstance(image.shape[0], int)
    said = json.loads(exported[1].with_name("a.stablehlo.json").read_text())
    for batch in (1, 2, 7):
        out = jax.eval_shape(program.call, jax.ShapeDtypeStruct((batch, 64, 32, 3), np.uint8))
        assert {name: [*x.shape] for name, x in out.items()} == {
            name: [batch, *x["shape"][1:]] for name, x in said["output"].items()
        }


# Nothing of this package, and nothing that it is made with, can be imported.
ALONE = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("vpm_jax", "flax", "orbax", "optax", "grain", "ml_collections"):
            raise ImportError(name)
sys.meta_path.insert(0, Nothing())
import jax, jax.export, numpy as np
model = jax.jit(jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read())).call)
np.savez(sys.argv[3], **model(np.load(sys.argv[2])))
"""


def test_it_runs_in_a_process_without_the_package(exported, tmp_path):
    np.save(tmp_path / "in.npy", PICTURES)
    arguments = [exported[1], tmp_path / "in.npy", tmp_path / "out.npz"]
    subprocess.run([sys.executable, "-c", ALONE, *map(str, arguments)], check=True, cwd=tmp_path)
    live = VPM.load(exported[0])(PICTURES)
    with np.load(tmp_path / "out.npz") as out:
        assert set(out) == set(export.OUTPUTS)
        for name, x in out.items():
            np.testing.assert_allclose(x, getattr(live, name), atol=1e-4, strict=True)


def run_main(workdir, output, *more) -> None:
    export.main(["--workdir", str(workdir), "--output", str(output), *more])


def test_a_wrong_program_is_never_kept(exported, tmp_path, monkeypatch):
    make = step.make_feature_step

    def wrong(config, region_maps=False):
        features = make(config, region_maps)
        return lambda variables, image: (
            features(variables, image) | {"visibility": features(variables, image)["visibility"] * 1.01}
        )

    model = VPM.load(exported[0])
    monkeypatch.setattr(step, "make_feature_step", wrong)
    (tmp_path / "b.stablehlo").write_text("what was there before")
    with pytest.raises(UserError, match="differ from the model"):
        export.write_stablehlo(tmp_path / "b.stablehlo", model)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("b.stablehlo", "what was there before")]


def test_wrong_parameters_are_never_kept(exported, tmp_path, monkeypatch):
    right = own.torch_tensors

    def wrong(weights, backbone_only=False):
        tensors = right(weights, backbone_only)
        return tensors | {"layer4.0.conv2.weight": tensors["layer4.0.conv2.weight"][:, ::-1].copy()}

    monkeypatch.setattr(own, "torch_tensors", wrong)
    with raises("wrong-export"):
        run_main(exported[0], tmp_path / "b.safetensors")
    assert not list(tmp_path.iterdir())


def with_variables(model: VPM, change) -> VPM:
    """The model with `change`(name, array) for each of its arrays."""
    flat = traverse_util.flatten_dict(model.variables, sep="/")
    variables = traverse_util.unflatten_dict({name: change(name, x) for name, x in flat.items()}, sep="/")
    return VPM(model.config, api._step(model.config, variables), model.fingerprint, "changed", variables)


def undecided(name: str, x: np.ndarray) -> np.ndarray:
    """A locator with large logits, the same for all regions: the last bit decides."""
    return np.repeat(1e3 * x[..., :1], x.shape[-1], axis=-1) if "locator" in name and x.ndim > 1 else x


@pytest.mark.parametrize("locator", [lambda name, x: x, undecided], ids=["random", "undecided"])
def test_what_is_rounding_follows_the_model(exported, locator):
    model = with_variables(VPM.load(exported[0]), locator)
    moved = export.rounding(model, model.inputs(export._test_images(model)))["region_maps"]
    assert moved.min() > 2e-5 if locator is undecided else moved.max() < 2e-5

    def neighbour(name, x):  # the next number: what another order of additions amounts to
        return np.nextafter(x, np.float32(1))

    def one_kernel(name, x):
        return x * np.float32(1.003) if name.endswith("stage3_block1/conv1/kernel") else x

    def epsilon(name, x):
        return x + np.float32(1e-3) if name.endswith("/var") else x

    export.compare(model, with_variables(model, neighbour).step)
    with raises("wrong-export"):
        export.compare(model, lambda images: model.step(images[..., ::-1]))
    for wrong in () if locator is undecided else (one_kernel, epsilon):  # smaller than what the last bit does there
        with raises("wrong-export"):
            export.compare(model, with_variables(model, wrong).step)


def test_a_file_that_is_given_away_names_no_path(tmp_path):
    folder = tmp_path / "run"
    config, _ = make_run(folder)
    config.data.root, config.pretrained = f"{tmp_path}/own.csv", f"torchvision:{tmp_path}/r18.pth"
    (folder / "config.json").write_text(config_lib.to_json(config))
    run_main(folder, tmp_path / "a.stablehlo")
    run_main(folder, tmp_path / "a.safetensors")
    (tensors,) = tmp_path.glob("a*.safetensors")
    for path in (tmp_path / "a.stablehlo", tmp_path / "a.stablehlo.json", tensors):
        assert str(tmp_path).encode() not in path.read_bytes()
    said = json.loads((tmp_path / "a.stablehlo.json").read_text())
    assert "of the run run)" in said["source"] and said["fingerprint"] == VPM.load(folder).fingerprint
    assert (said["config"]["pretrained"], said["config"]["data"]["root"]) == ("torchvision:r18.pth", "")


def test_parameters_for_pytorch_are_compared_too(exported, tmp_path, capsys):
    run_main(exported[0], tmp_path / "b.safetensors")
    (path,) = tmp_path.glob("b*.safetensors")
    assert "from the live model" in capsys.readouterr().out
    assert_equal(VPM.load(path)(PICTURES), VPM.load(exported[0])(PICTURES), 1e-4)


def test_what_an_export_cannot_be(exported, tmp_path):
    run, file = exported
    (tmp_path / "folder.stablehlo").mkdir()
    for workdir, output, more, sentence in [
        (run, tmp_path / "a.pth", (), "ends in .stablehlo or .onnx or .safetensors"),
        (run, tmp_path / "a", ("--format", "stablehlo"), "ends in .stablehlo"),
        (run, tmp_path / "a.stablehlo", ("--format", "safetensors"), "ends in .safetensors"),
        (run, tmp_path / "a.onnx", ("--dtype", "bfloat16"), "expected float32 or float16 or int8 for a .onnx"),
        (run, tmp_path / "a.stablehlo", ("--layout", "nchw"), "expected only for a .onnx"),
        (run, tmp_path / "none" / "a.stablehlo", (), "there is no folder"),
        (run, tmp_path / "folder.stablehlo", (), "that is a folder"),
        (tmp_path, tmp_path / "a.stablehlo", (), "holds no run"),
        (tmp_path / "nowhere", tmp_path / "a.safetensors", (), "does not exist"),
        (file, tmp_path / "a.stablehlo", (), "is an export already"),
        (file, tmp_path / "a.onnx", (), "is an export already"),
    ]:
        with pytest.raises(UserError) as error:
            run_main(workdir, output, *more)
        assert sentence in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.stablehlo"]


def test_a_full_disk_leaves_nothing(exported, tmp_path):
    model = VPM.load(exported[0])
    with largest_file(2000), raises("not-written"):
        export.write_stablehlo(tmp_path / "b.stablehlo", model)
    assert not list(tmp_path.iterdir())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_damage_is_noticed(exported, tmp_path):
    path = tmp_path / "a.stablehlo"
    beside, data = path.with_name("a.stablehlo.json"), exported[1].read_bytes()
    text = exported[1].with_name("a.stablehlo.json").read_text()
    older = text.replace('"checksum"', '"other"')  # as before there was a checksum
    for change, sentence in [
        (lambda: path.write_bytes(data), "a.stablehlo.json cannot be read"),
        (lambda: beside.write_text("{}"), "was not written by an export"),
        (lambda: beside.write_text(text.replace('"depth": 10', '"depth": 17')), "json is damaged"),
        (lambda: beside.write_text(older.replace('"depth": 10', '"depth": 17')), "depth"),
        (lambda: beside.write_text(older), ""),
        (lambda: beside.write_text(text), ""),
        (lambda: path.write_bytes(data[:99]), "is not the file that a.stablehlo.json describes"),
        (lambda: beside.write_text(older.replace(*map(sha256, (data, data[:99])))), "by JAX"),
    ]:
        change()
        if sentence:
            with pytest.raises(UserError, match=sentence):
                VPM.load(path)
        else:
            VPM.load(path)
