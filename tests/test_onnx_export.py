"""vpm_jax.onnx_export: ONNX Runtime computes what the model does, for every kind of network."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from raising import raises
from tiny_runs import make_run

from vpm_jax import VPM, Description, export, onnx_export
from vpm_jax.data import synthetic
from vpm_jax.models.resnet import STAGE_BLOCKS

onnx = pytest.importorskip("onnx", reason="the extra onnx")
pytest.importorskip("onnxruntime", reason="the extra onnx")

RANDOM = np.random.default_rng(4)
PICTURES = [RANDOM.integers(0, 256, shape, np.uint8) for shape in [(64, 32, 3), (30, 32, 3), (64, 12, 3)]]
PADDED = {"data__fit": "pad", "data__aspect": 2.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx") / "run"
    make_run(folder)
    return folder


def exported(run, path, *more):
    assert not export.main(["--workdir", str(run), "--output", str(path), *more])
    return VPM.load(run, "float32"), path.read_bytes()


# Together they have every value of every key that the network depends on.
NETWORKS = {
    "market": {},
    "released": {"file": "market_released", "match__visibility": "saturated"},
    "padded row": PADDED | {"file": "market_released", "model__strides": (1, 2, 1), "data__height": 60},
    "mirrored": PADDED
    | {"model__stem": "4x4", "model__locator_stage": 3, "model__locator_hidden": 5, "match__visibility": "binary"}
    | {"eval__flip": True, "model__grid": (2, 2), "model__neck": "bn", "match__feature": "after"},
    "bottleneck": {"model__depth": 50, "model__stem": "3x3", "model__stride_on": "1x1", "model__last_stride": 2}
    | {"model__locator": "stripes", "match__visibility": "uniform"},
}


@pytest.mark.parametrize("changes", NETWORKS.values(), ids=list(NETWORKS))
def test_it_computes_what_the_model_does(tmp_path, monkeypatch, changes):
    monkeypatch.setitem(STAGE_BLOCKS, 50, (2, 1, 1, 1))  # both kinds of blocks, in a third of the time to compile
    make_run(tmp_path / "run", **changes)
    live, data = exported(tmp_path / "run", tmp_path / "a.onnx")
    onnx.checker.check_model(onnx.load_from_string(data), full_check=True)
    step, given = onnx_export.runtime_step(data), live.inputs(PICTURES)
    uncovered = [(given[0], np.zeros_like(valid)) for valid in given[1:]]
    for inputs in (given, *uncovered):
        expected = {name: np.asarray(x) for name, x in live.step(*inputs).items()}
        described = Description(**expected)
        expected |= {"embedding": live.embedding(described), "embedding_whole": live.embedding(described, whole=True)}
        for count in (1, 3):
            out = step(*(x[:count] for x in inputs))
            assert list(out) == ["embedding", "features", "visibility", "region_maps", "embedding_whole"]
            for name in out:
                scale = max(1, expected[name].sum(axis=-1).max()) if name == "visibility" else 1
                np.testing.assert_allclose(
                    out[name] / scale, expected[name][:count] / scale, rtol=0, atol=2e-5, strict=True, err_msg=name
                )


def test_kernels_in_float16_take_half_the_size(run, tmp_path):
    live, data = exported(run, tmp_path / "a.onnx")
    exported(run, tmp_path / "b.onnx", "--dtype", "float16")
    half = onnx.load(tmp_path / "b.onnx")
    kernels = [x for x in half.graph.initializer if len(x.dims) == 4]
    assert {x.data_type for x in kernels} == {onnx.TensorProto.FLOAT16}
    saved = sum(2 * int(np.prod(x.dims)) for x in kernels)
    assert len(data) - saved <= (tmp_path / "b.onnx").stat().st_size < len(data) - 0.8 * saved
    inputs = live.inputs(PICTURES)
    vectors = [onnx_export.runtime_step(x)(*inputs)["embedding"] for x in (data, (tmp_path / "b.onnx").read_bytes())]
    assert 1e-6 < np.abs(vectors[0] - vectors[1]).max() < 5e-3
    assert {entry.key: entry.value for entry in half.metadata_props}["kernels"] == "float16"


@pytest.mark.parametrize("layout", onnx_export.LAYOUTS)
def test_convolutions_in_int8_are_near_the_model(whole, tmp_path, monkeypatch, layout):
    path = tmp_path / "a.onnx"
    live, data = exported(whole, path, "--dtype", "int8", "--layout", layout)
    proto = onnx.load_from_string(data)
    convolutions = [x for x in proto.graph.node if x.op_type == "Conv"]
    in_int8 = {x.output[0] for x in proto.graph.node if x.op_type == "DequantizeLinear"}
    assert [x.input[1] in in_int8 for x in convolutions] == [True] * (len(convolutions) - 1) + [False]
    said = {entry.key: entry.value for entry in proto.metadata_props}
    assert (said["kernels"], said["fingerprint"]) == ("int8", live.fingerprint)
    images = sorted((pedestrians_of(live) / "query").glob("*.jpg"))[:8]
    vectors = onnx_export.runtime_step(data, layout)(*live.inputs(images))["embedding"]
    assert ((vectors * live.embedding(images)).sum(1) > 0.97).all()
    path.unlink()
    monkeypatch.setattr(export, "FURTHEST", 1e-6)
    with raises("wrong-export"):
        export.write_onnx(path, live, "int8")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{}, PADDED | {"eval__flip": True}], ids=["stretched", "padded, mirrored"])
def test_images_in_the_layout_of_trackers(tmp_path, changes):
    make_run(tmp_path / "run", **changes, data__mean=(0.4, 0.5, 0.3), data__std=(0.2, 0.3, 0.25))
    live, data = exported(tmp_path / "run", tmp_path / "a.onnx", "--layout", "nchw")
    step = onnx_export.packages()[1].InferenceSession(data)
    pixels, *valid = live.inputs(PICTURES)
    images = ((pixels / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]).transpose(0, 3, 1, 2).astype(np.float32)
    given = dict(zip(("images", "valid"), (images, *valid), strict=False))
    np.testing.assert_allclose(step.run(["embedding"], given)[0], live.embedding(PICTURES), rtol=0, atol=2e-5)
    said = json.loads(step.get_modelmeta().custom_metadata_map["input"])
    assert (said["dtype"], said["shape"]) == ("float32", ["b", 3, 64, 32])
    assert (said["mean"], said["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def pedestrians_of(model):
    return synthetic.ensure(Path(model.config.data.root), **model.config.data.synthetic)


def test_the_file_says_what_it_is(run, tmp_path):
    live, data = exported(run, tmp_path / "a.onnx")
    proto = onnx.load_from_string(data)
    said = {entry.key: entry.value for entry in proto.metadata_props}
    assert said["fingerprint"] == live.fingerprint
    assert json.loads(said["config"])["model"]["depth"] == 10
    assert json.loads(said["input"])["channels"] == "RGB"
    sides = [
        [[d.dim_param or d.dim_value for d in x.type.tensor_type.shape.dim] for x in s]
        for s in (proto.graph.input, proto.graph.output)
    ]
    assert sides == [[["b", 64, 32, 3]], [x["shape"] for x in json.loads(said["output"]).values()]]
    assert str(tmp_path).encode() not in data and str(run.parent).encode() not in data


def wrong_kernel(graph, name, x, *rest, operator=onnx_export._Graph.__call__, **attributes):
    if name == "MatMul":
        x = operator(graph, "Mul", x, np.linspace(0.99, 1.01, 32, dtype=np.float32))
    return operator(graph, name, x, *rest, **attributes)


def wrong_share(graph, name, x, *rest, operator=onnx_export._Graph.__call__, **attributes):
    if name == "Mul" and x.startswith("Flatten"):
        x = operator(graph, "Add", x, 1e-4)
    return operator(graph, name, x, *rest, **attributes)


@pytest.mark.parametrize(
    "change",
    [
        lambda patch: patch.setattr(onnx_export._Graph, "__call__", wrong_kernel),
        lambda patch: patch.setattr(onnx_export, "_match_visibility", lambda g, x, mode: g("Mul", x, x)),
        lambda patch: patch.setattr(onnx_export._Graph, "__call__", wrong_share),
        lambda patch: patch.setattr(
            onnx_export, "serialize", lambda *args, whole=onnx_export.serialize: whole(*args)[:2000]
        ),
    ],
    ids=["features", "embedding", "embedding of a whole image", "damaged"],
)
def test_a_wrong_file_is_never_kept(run, tmp_path, monkeypatch, change):
    (tmp_path / "a.onnx").write_text("what was there before")
    change(monkeypatch)
    with raises("wrong-export"):
        exported(run, tmp_path / "a.onnx")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("a.onnx", "what was there before")]


def test_without_the_packages_it_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with raises("missing-package") as error:
        exported(run, tmp_path / "a.onnx")
    assert "pip install onnx onnxruntime" in str(error.value)
    assert not list(tmp_path.iterdir())
