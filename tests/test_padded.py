"""A model of padded images: files, splits, exports and searches describe an image alike."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from raising import raises
from tiny_runs import make_run, save_run, tiny_run

from vpm_jax import VPM, UserError, evaluation, export, extents, parallel
from vpm_jax import config as config_lib
from vpm_jax import search as search_command
from vpm_jax.data.decode import decode
from vpm_jax.data.pipeline import eval_crops, eval_picture
from vpm_jax.data.sources import load_dataset
from vpm_jax.description import Describer
from vpm_jax.regions import visible_heights
from vpm_jax.training import resolve


@pytest.fixture(scope="module")
def run(pedestrians, tmp_path_factory):
    config = tiny_run(pedestrians, data__fit="pad", stage2__epochs=1)
    workdir = tmp_path_factory.mktemp("padded") / "run"
    save_run(workdir, resolve(config, load_dataset(config.data).train))
    return workdir


@pytest.fixture(scope="module")
def model(run):
    return VPM.load(run)


@pytest.fixture(scope="module")
def query(run):
    return load_dataset(config_lib.read(run).data).query


def test_an_image_is_described_as_in_an_evaluation(model, query):
    describer = Describer(model.config, parallel.data_mesh(model.config.eval.batch), region_maps=True)
    crops = eval_crops("top", 0.5, len(query))
    pictures = [eval_picture(query, i, crops[i]) for i in range(len(query))]
    expected = describer.split(model.variables, query, 0.5, "top")
    for described in (model(pictures), model(pictures, batch=3)):
        np.testing.assert_allclose(described.features, expected.features, atol=1e-5)
        np.testing.assert_allclose(described.visibility, expected.visibility, atol=1e-4)
        np.testing.assert_allclose(described.region_maps, expected.region_maps, atol=1e-5)
    covered = expected.region_maps.sum(-1)
    h = covered.shape[1]
    np.testing.assert_allclose(covered[:, : h // 2], 1, atol=1e-5)
    assert not covered[:, h // 2 :].any()  # half a person covers half of the map
    assert (visible_heights(expected.region_maps, model.grid)[:, 1] <= 1).all()
    np.testing.assert_array_equal(model.prepare(pictures[0])[len(pictures[0]) // 4 :][-1, 0], [124, 116, 104])


def test_a_known_place_has_a_name(model, query):
    pictures = [eval_picture(query, i, crop) for i, crop in enumerate(eval_crops("bottom", 0.5, 3))]
    h = model(pictures).region_maps.shape[1]
    default, named = model(pictures), {place: model(pictures, places=place) for place in model.places}
    for (place, described), y in zip(named.items(), (0, 0.5, 1), strict=True):
        np.testing.assert_array_equal(described.features, model(pictures, places=[(y, 0.5)] * 3).features)
        rows = described.region_maps.sum(-1).any((0, 2))
        start = round(y * h / 2)
        np.testing.assert_array_equal(np.flatnonzero(rows), np.arange(start, start + h // 2), err_msg=place)
    np.testing.assert_array_equal(named["top"].features, default.features)
    mixed = model(pictures, places=["bottom", None, (0.5, 0.5)]).features
    np.testing.assert_allclose(mixed[0], named["bottom"].features[0], atol=1e-5)
    np.testing.assert_allclose(mixed[1], default.features[1], atol=1e-5)
    np.testing.assert_allclose(mixed[2], named["center"].features[2], atol=1e-5)


@pytest.mark.parametrize("place", ["left", "random", (1, 2), (-0.1, 0), (np.nan, 0), (0.5,), 1, ("a", "b"), b"top"])
def test_a_wrong_place_is_named(model, place):
    with raises("bad-place") as error:
        model([np.zeros((8, 8, 3), np.uint8)], places=[place])
    assert "expected top, center, bottom, or the fractions" in str(error.value)


def test_extreme_images_are_described(model):
    pictures = [np.full(size, 90, np.uint8) for size in [(1, 400, 3), (400, 1, 3), (1, 1, 3)]]
    described = model(pictures)
    assert np.isfinite(described.features).all() and (described.visibility.sum(1) >= 0.99).all()


@pytest.mark.parametrize(("places", "sentence"), [(2, "only 2 places"), (4, "only 3 images")])
def test_every_image_has_a_place(model, places, sentence):
    pictures = [np.full((20, 16, 3), 90, np.uint8)] * 3
    assert len(model(pictures, places=[(1, 0.5)] * 3)) == 3
    with pytest.raises(UserError, match=f"There are {sentence}: give a place for each image"):
        model(pictures, places=[(1, 0.5)] * places)


def test_an_export_takes_the_covered_cells_too(run, model, query, tmp_path):
    pytest.importorskip("flatbuffers", reason="jax.export writes and reads with it")
    export.main(["--workdir", str(run), "--output", str(tmp_path / "a.stablehlo")])
    export.main(["--workdir", str(run), "--output", str(tmp_path / "a.safetensors")])
    pictures = [decode(query.read(i), query.names[i])[: 20 + 5 * i] for i in range(5)]
    expected = model(pictures)
    for path in tmp_path.glob("*.s*[osl]"):
        if path.suffix in (".stablehlo", ".safetensors"):
            loaded = VPM.load(path)
            np.testing.assert_allclose(loaded(pictures).features, expected.features, atol=1e-3)
            assert loaded.fingerprint == model.fingerprint
    said = json.loads((tmp_path / "a.stablehlo.json").read_text())["input"]
    assert said["aspect"] == 2.0 and said["valid"]["shape"] == ["b", *expected.region_maps.shape[1:3]]


def test_fingerprints_depend_on_how_images_are_fitted(model):
    from vpm_jax.api import fingerprint

    config = model.config.copy_and_resolve_references()
    seen = {fingerprint(config, model.variables)}
    for key, value in (("place", "center"), ("aspect", 2.5), ("fit", "stretch")):
        config.data[key] = value
        seen.add(fingerprint(config, model.variables))
    assert len(seen) == 4
    config.data.aspect = 3.0  # which stretching does not use
    assert fingerprint(config, model.variables) in seen


def test_a_search_finds_padded_images(run, model, query, tmp_path, capsys):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(6):
        Image.fromarray(decode(query.read(i), query.names[i])).save(folder / f"{i}.png")
    Image.fromarray(decode(query.read(3), query.names[3])[:32]).save(tmp_path / "half.png")
    index = ["index", str(folder), "--workdir", str(run), "--index", str(tmp_path / "store")]
    assert search_command.main([*index, "--crops", "0.5"]) == 0
    arguments = ["query", str(tmp_path / "half.png"), "--index", str(tmp_path / "store"), "--top", "6"]
    assert (
        search_command.main([*arguments, "--json", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]) == 0
    )
    [answer] = json.loads((tmp_path / "a.json").read_text())["queries"]
    ranked = {result["image"]: result["distance"] for result in answer["results"]}
    crop = answer["compared_with"]
    pictures = [decode(query.read(i), query.names[i]) for i in range(6)]
    if crop != "whole":
        side, gamma = crop.split()
        pictures = [p[: round(float(gamma) * len(p))] if side == "top" else p for p in pictures]
    expected = model.match(str(tmp_path / "half.png"), pictures)[0]
    for i in range(6):
        assert ranked[f"{i}.png"] == pytest.approx(expected[i], abs=2e-3)  # the store holds float16
    assert "<svg" in (tmp_path / "a.html").read_text() or "<img" in (tmp_path / "a.html").read_text()
    told = [*arguments, "--place", "bottom", "--json", str(tmp_path / "b.json")]
    assert search_command.main(told) == 0
    [bottom] = json.loads((tmp_path / "b.json").read_text())["queries"]
    shown = model(str(tmp_path / "half.png"), places="bottom").visibility[0]
    assert bottom["place"] == "bottom" and bottom["visibility"] == pytest.approx(shown.tolist(), rel=1e-4)
    assert answer["place"] is None and answer["visibility"] != bottom["visibility"]
    make_run(tmp_path / "stretched")
    index = ["index", str(folder), "--workdir", str(tmp_path / "stretched"), "--index", str(tmp_path / "other")]
    assert search_command.main(index) == 0
    with pytest.raises(UserError, match=r"^--place bottom: .* stretches images"):
        search_command.main(
            ["query", str(tmp_path / "half.png"), "--index", str(tmp_path / "other"), "--place", "bottom"]
        )
    assert extents.main([str(folder), "--workdir", str(run)]) == 0
    assert evaluation.matching_in_words(model.config)
