"""Search from Python: a gallery that images are added to and queried, beside what the commands make of it."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from images import blobs, encode
from PIL import Image
from raising import raises
from tiny_runs import make_run

from vpm_jax import VPM, Gallery
from vpm_jax.errors import UserError
from vpm_jax.regions import GalleryCrop
from vpm_jax.search import command
from vpm_jax.search.gallery import stored_crops
from vpm_jax.search.ranking import query_record
from vpm_jax.search.store import Store

RANDOM = np.random.default_rng(3)


def picture() -> np.ndarray:
    return np.asarray(blobs(RANDOM))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    make_run(folder := tmp_path_factory.mktemp("gallery") / "run")
    return folder


@pytest.fixture(scope="module")
def model(run):
    return VPM.load(run)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Files, 1.png to 5.png."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{i}.png" for i in range(1, 6)]
    for path in paths:
        Image.fromarray(picture()).save(path)
    return paths


def assert_ranks_as_matching(gallery, model, query, images):
    """`images` are by the gallery's names."""
    assert set(gallery.store.names) == set(images)
    distance = model.match(query, list(images.values()))[0]
    (ranking,) = gallery.query(query, k=3)
    order = np.argsort(distance, kind="stable")[:3]
    assert [result.name for result in ranking.results] == [list(images)[i] for i in order]
    np.testing.assert_allclose([result.distance for result in ranking.results], distance[order], atol=2e-3)
    local, weight = model.match_regions(query, [images[result.name] for result in ranking.results])
    np.testing.assert_allclose([result.region_distance for result in ranking.results], local[0], atol=5e-3)
    np.testing.assert_allclose([result.weight for result in ranking.results], weight[0], atol=5e-3)
    assert not ranking.nobody and ranking.query.region_maps.shape[0] == 1


def test_images_of_any_kind_are_added_and_found(tmp_path, model, pictures, capsys):
    gallery = Gallery.open(tmp_path / "store", model)
    assert len(gallery) == 0 and not (tmp_path / "store").exists()  # opening writes nothing
    kinds = [picture(), encode(Image.fromarray(picture()), "PNG"), Image.fromarray(picture())]
    assert gallery.add(pictures[:2]).new == 2
    assert gallery.add(kinds, names=["array", "bytes", "pillow"]).new == 3
    images = dict(zip([*map(str, pictures[:2]), "array", "bytes", "pillow"], [*pictures[:2], *kinds], strict=True))
    for query in (picture(), pictures[0], io.BytesIO(encode(Image.fromarray(picture()), "PNG"))):
        assert_ranks_as_matching(gallery, model, query, images)
    assert capsys.readouterr().out == ""
    again = Gallery.open(tmp_path / "store", model)  # on disk
    assert_ranks_as_matching(again, model, pictures[3], images)


def test_an_image_of_the_same_name_takes_its_place(tmp_path, model, pictures):
    gallery = Gallery.open(tmp_path / "store", model)
    gallery.add([picture(), picture()], names=["a", "b"])
    gallery.add([*pictures[:1]])
    images = {"a": picture(), "b": picture()}
    update = gallery.add(images.values(), names=images)
    assert (update.new, update.changed, len(gallery)) == (0, 2, 3)
    assert gallery.add(pictures[:1]).changed == 0  # the same file
    assert_ranks_as_matching(gallery, model, picture(), {str(pictures[0]): pictures[0]} | images)


def test_added_images_outlive_another_index_of_the_folder(tmp_path, run, model, pictures):
    folder, store = pictures[0].parent, tmp_path / "store"
    assert command.main(["index", str(folder), "--workdir", str(run), "--index", str(store)]) == 0
    assert Gallery.open(store).index(str(folder)).new == 0
    elsewhere = tmp_path / "x.png"
    Image.fromarray(picture()).save(elsewhere)
    gallery = Gallery.open(store)  # the recorded model
    assert gallery.model.fingerprint == model.fingerprint
    added = picture()
    gallery.add([elsewhere, pictures[0]])
    gallery.add([added], ["added"])
    assert command.main(["index", str(folder), "--index", str(store)]) == 0
    images = {path.name: path for path in pictures} | {str(elsewhere): elsewhere, "added": added}
    assert_ranks_as_matching(Gallery.open(store, model), model, added, images)
    file = tmp_path / "ranking.json"
    assert command.main(["query", str(pictures[2]), "--index", str(store), "--top", "3", "--json", str(file)]) == 0
    (ranking,) = Gallery.open(store, model).query([pictures[2]], k=3)
    assert [r["image"] for r in json.loads(file.read_text())["queries"][0]["results"]] == [
        result.name for result in ranking.results
    ]


def test_a_folder_that_is_indexed_later_holds_its_images_once(tmp_path, model, pictures):
    gallery = Gallery.open(tmp_path / "store", model)
    gallery.add(pictures[:2])  # under absolute names
    gallery.add([picture()], [str(pictures[0].parent / "named")])
    gallery.index(pictures[0].parent)
    assert sorted(gallery.store.names) == sorted([*(path.name for path in pictures), str(pictures[0].parent / "named")])


def test_a_gallery_keeps_what_another_process_wrote(tmp_path, model, pictures):
    gallery = Gallery.open(tmp_path / "store", model)  # before there is a store
    Gallery.open(tmp_path / "store", model, crops=[0.5], dtype="float32").index(pictures[0].parent)
    gallery.add([picture()], ["added"])
    again = Gallery.open(tmp_path / "store", model)
    assert len(again) == len(pictures) + 1
    assert set(pictures) < {result.path for result in again.query(pictures[0], 6)[0].results}
    assert stored_crops(again.store) == {GalleryCrop("top", 0.5): True}
    assert len(Store(tmp_path / "store" / "top-0.5")) == len(again)


def test_a_model_may_be_a_link(tmp_path, run, model, pictures):
    model.save_pretrained(tmp_path / "shared")
    blob = (tmp_path / "shared" / "model.safetensors").rename(tmp_path / "blob")  # as a cache of downloads keeps it
    link = tmp_path / "model.safetensors"
    link.symlink_to(blob)
    Gallery.open(tmp_path / "store", link).add(pictures[:1])
    assert Gallery.open(tmp_path / "store").model.fingerprint == model.fingerprint
    (tmp_path / "latest").symlink_to(run)
    Gallery.open(tmp_path / "other", tmp_path / "latest").add(pictures[:1])
    (tmp_path / "latest").unlink()  # a newer run may take its place
    assert Gallery.open(tmp_path / "other").model.fingerprint == model.fingerprint


def test_crops_of_added_images_are_searched(tmp_path, model, monkeypatch):
    gallery = Gallery.open(tmp_path / "store", model, crops=[0.5])
    images = {name: picture() for name in "abcd"}
    gallery.add(images.values(), names=images)
    halves = {name: image[:40] for name, image in images.items()}
    monkeypatch.setattr("vpm_jax.description.visible_heights", lambda maps, grid: np.array([[0.0, 0.5]] * len(maps)))
    for opened in (gallery, Gallery.open(tmp_path / "store", model)):
        assert_ranks_as_matching(opened, model, picture()[:40], halves)


def test_crops_do_not_depend_on_how_a_run_is_evaluated(tmp_path, model):
    config = model.config.copy_and_resolve_references()
    config.match.rerank, config.eval.multi_query, config.eval.crop = True, True, "bottom"
    evaluated = VPM(config, model.step, model.fingerprint, model.source)
    Gallery.open(tmp_path / "store", evaluated, crops=[0.5]).add([picture()], ["a"])
    assert Store(tmp_path / "store" / "top-0.5").names == ["a"]


def test_nobody_is_near_enough(tmp_path, model, pictures):
    gallery = Gallery.open(tmp_path / "store", model)
    gallery.add(pictures)
    nearest = gallery.query(pictures[0])[0].results
    one, nobody = (gallery.query(pictures[0], max_distance=limit)[0] for limit in (nearest[1].distance, 0.0))
    assert [result.name for result in one.results] == [str(pictures[0])] and not one.nobody
    assert nobody.nobody and nobody.results == [] and nobody.nearest == nearest[0].distance
    (half,) = gallery.query(pictures[0], max_distance=np.float32(0.5))
    assert json.loads(json.dumps(query_record(half)))["max_distance"] == 0.5


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda gallery, path: gallery.add([picture()]), "image 0 is ndarray, not a path: give names"),
        (lambda gallery, path: gallery.add([path], ["a", "b"]), "2 names for 1 images"),
        (lambda gallery, path: gallery.add([path, path]), "2 images have 1 different names"),
        (lambda gallery, path: gallery.add([path], [path]), "The name of image 0 is PosixPath.*, expected text"),
        (lambda gallery, path: gallery.query(path, k=0), "k is 0, expected a whole number of at least 1"),
        (lambda gallery, path: gallery.query(path, k=2.5), "k is 2.5, expected a whole number of at least 1"),
        (lambda gallery, path: gallery.query(path, max_distance=np.nan), "max_distance is nan, expected a number of"),
        (lambda gallery, path: gallery.query(path, max_distance="0.3"), "max_distance is '0.3', expected a number of"),
        (lambda gallery, path: gallery.query(path, 1, 0.3, 0.01), "are both given: choose one"),
        (lambda gallery, path: gallery.query(path), "holds no images yet"),
    ],
)
def test_what_cannot_be_done_changes_nothing(tmp_path, model, pictures, call, sentence):
    with pytest.raises(UserError, match=sentence):
        call(Gallery.open(tmp_path / "store", model), pictures[0])
    assert not (tmp_path / "store").exists()


def test_an_unreadable_image_is_reported_after_the_others_are_added(tmp_path, model, pictures):
    gallery = Gallery.open(tmp_path / "store", model)
    with pytest.raises(UserError, match=r"1 of 2 images could not be added: .*none\.png cannot be read"):
        gallery.add([tmp_path / "none.png", pictures[0]])
    with raises("damaged-image"):
        gallery.add([encode(Image.fromarray(picture()), "JPEG")[:-100]], ["cut"])
    assert len(gallery) == 1 and Store(tmp_path / "store").names == [str(pictures[0])]


def test_stores_without_a_model_and_of_another(tmp_path, run, model, pictures):
    with pytest.raises(UserError, match="holds no feature store"):
        Gallery.open(tmp_path / "store")
    Gallery.open(tmp_path / "store", model).add(pictures)
    with pytest.raises(UserError, match="records no model"):  # it came from another program
        Gallery.open(tmp_path / "store")
    make_run(tmp_path / "other", model__grid=(2, 1))
    with pytest.raises(UserError, match="made by another model"):
        Gallery.open(tmp_path / "store", tmp_path / "other")


def test_two_stages_find_what_one_does(tmp_path, model, pictures, monkeypatch):
    """With as many channels as there are, reduced features rank as whole ones."""
    gallery = Gallery.open(tmp_path / "store", model, crops=[0.5], dtype="float32")
    gallery.add(pictures)
    channels = gallery.store.about.channels
    gallery.reduce(3 * channels)
    images = {name: picture() for name in ("new", "other")}
    gallery.add(images.values(), names=images)  # reduced, too
    gallery.add([picture()], names=["new"])  # in place of the other, at another row

    def results(candidates, k=3):
        opened = Gallery.open(tmp_path / "store", model, candidates=candidates)
        return [(result.name, result.distance) for result in opened.query(pictures[0], k)[0].results]

    for heights in ([[0.0, 1.0]], [[0.0, 0.5]]):
        monkeypatch.setattr(
            "vpm_jax.description.visible_heights", lambda maps, grid, heights=heights: np.array(heights)
        )
        assert results(None) == results(3)
    gallery.reduce(3)  # one number per region: candidates are whatever is nearest by it
    assert results(7) == results(None) and set(results(4)) < set(results(None, k=7))
    gallery.reduce(0)
    with pytest.raises(UserError, match=r"no reduced features .* index --reduce D, or query without --candidates"):
        results(3)


def test_reduced_features_that_lag_behind_are_refused(tmp_path, model, pictures, monkeypatch):
    gallery = Gallery.open(tmp_path / "store", model)
    gallery.add(pictures[:4])
    gallery.reduce(9)
    monkeypatch.setattr(gallery, "_write_reduced", lambda reduction: None)  # as if killed before
    gallery.add(pictures[4:])
    assert len(gallery.query(pictures[0])[0].results) == 5
    for candidates, sentence in (
        (3, "no reduced features of all its images"),
        (0, "candidates is 0, expected a whole"),
    ):
        gallery.candidates = candidates
        with pytest.raises(UserError, match=sentence):
            gallery.query(pictures[0])


def test_the_commands_search_in_two_stages(tmp_path, run, pictures):
    store, ranking = tmp_path / "store", tmp_path / "ranking.json"
    index = ["index", str(pictures[0].parent), "--workdir", str(run), "--index", str(store)]
    assert command.main([*index, "--reduce", "9"]) == 0
    query = ["query", str(pictures[0]), "--index", str(store), "--json", str(ranking)]
    assert command.main([*query, "--candidates", "2", "--top", "1"]) == 0
    assert json.loads(ranking.read_text())["queries"][0]["results"][0]["image"] == "1.png"


def test_thresholds_are_beside_the_model(tmp_path, model):
    (tmp_path / "model.safetensors").touch()
    for path in (tmp_path, tmp_path / "model.safetensors"):
        gallery = Gallery(tmp_path / "store", model, None, str(path), [], "float16")
        assert gallery.thresholds_file == tmp_path / "thresholds.json"
