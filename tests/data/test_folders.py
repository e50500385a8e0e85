"""Partial-REID and Partial-iLIDS in the layouts that go round: what is read, what is said, what is refused."""

from __future__ import annotations

import shutil
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from market_files import config, fails
from partial_files import LAYOUTS, make, pack, picture
from PIL import Image

from vpm_jax.data import arrayrecord
from vpm_jax.data.decode import decode
from vpm_jax.data.sources import load_dataset
from vpm_jax.data.split import Dataset, Split
from vpm_jax.prepare import main as prepare


def content(split: Split) -> list[tuple[int, bytes]]:
    return [(int(identity), split.read(i)) for i, identity in enumerate(split.identity)]


def assert_is(dataset: Dataset, expected: dict[str, list[tuple[int, bytes]]]) -> None:
    assert {"query": content(dataset.query), "gallery": content(dataset.gallery)} == expected
    assert dataset.query.camera is None and dataset.gallery.camera is None
    assert len(dataset.train) == dataset.train.num_identities == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_as_folder_and_as_zip(tmp_path, layout):
    name, folder = LAYOUTS[layout][:2]
    (tmp_path / "data").mkdir()
    expected = make(tmp_path / "data", layout)
    assert_is(load_dataset(config(tmp_path / "data" / folder, name)), expected)
    assert_is(load_dataset(config(tmp_path / "data", name)), expected)  # below, under its usual name
    zipped = pack(tmp_path / "data", tmp_path / "any.zip")
    assert_is(load_dataset(config(zipped, name)), expected)
    usual = tmp_path / "zips" / f"{Path(folder).name}.zip"
    usual.parent.mkdir()
    assert_is(load_dataset(config(pack(tmp_path / "data" / folder, usual).parent, name)), expected)


def test_images_of_every_format_keep_their_sizes(tmp_path):
    for layout in LAYOUTS:
        expected = make(tmp_path / layout, layout)["query"]
        query = load_dataset(config(tmp_path / layout, LAYOUTS[layout][0])).query
        shapes = {decode(query.read(i), query.names[i]).shape for i in range(len(query))}
        assert shapes == {(*reversed(Image.open(BytesIO(data)).size), 3) for _, data in expected} and len(shapes) > 1


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_what_is_odd_is_counted_and_said(tmp_path, form):
    make(tmp_path, "original")
    root = tmp_path / "Partial-REID_Dataset"
    for name in (".DS_Store", "Thumbs.db", "._001_001.jpg", "holiday.jpg", "1x_1.jpg"):
        (root / "whole_body_images" / name).write_bytes(b"junk")
    (root / "occluded_body_images").mkdir()
    for image in range(4):
        (root / "occluded_body_images" / f"001_00{image}.jpg").write_bytes(picture(image))
    (root / "Probe.txt").write_text("partial_body_images/001_001.jpg\n")
    if form == "zip":
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            for file in root.rglob("*"):
                archive.write(file, file.relative_to(tmp_path).as_posix())
    dataset = load_dataset(config(tmp_path / "a.zip" if form == "zip" else root, "partial_reid"))
    assert len(dataset.gallery) == len(dataset.query) == 6
    assert dataset.notes[0].startswith("Partial-REID from the ")
    assert dataset.notes[0].endswith("6 query images of 3 identities, 6 gallery images of 3 identities.")
    text = " ".join(dataset.notes)
    assert "Ignored 5 files not named like an image of a person: whole_body_images/.DS_Store" in text
    assert "Left out occluded_body_images (4 images), which the protocol does not use." in text
    assert (
        "partial_body_images is not the official one: it has 6 images of 3 identities, Partial-REID 300 of 60" in text
    )
    assert "whole_body_images is not the official one" in text


@pytest.mark.parametrize(("layout", "identities", "images"), [("original", 60, 5), ("probe", 119, 1)])
def test_the_official_counts_leave_nothing_to_say(tmp_path, layout, identities, images):
    make(tmp_path, layout, identities, images)
    dataset = load_dataset(config(tmp_path, LAYOUTS[layout][0]))
    assert len(dataset.notes) == 1
    assert f"{identities * images} query images of {identities} identities" in dataset.notes[0]
    # An image less, and a query that nobody in the gallery matches, are said.
    next(iter(sorted((tmp_path / LAYOUTS[layout][1] / LAYOUTS[layout][3]).iterdir()))).unlink()
    notes = load_dataset(config(tmp_path, LAYOUTS[layout][0])).notes
    assert f"{LAYOUTS[layout][3]} is not the official one: it has {identities * images - 1} images" in notes[1]
    assert ("1 query identity has no image in the gallery." in notes) == (images == 1)


def test_identity_0_is_a_person_where_there_are_no_distractors(tmp_path):
    make(tmp_path, "probe")
    for split in ("Probe", "Gallery"):
        (tmp_path / "Partial_iLIDS" / split / "000.jpg").write_bytes(picture(1))
    dataset = load_dataset(config(tmp_path, "partial_ilids"))
    assert "4 query images of 4 identities" in dataset.notes[0]


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_half_a_dataset_is_refused_in_one_sentence(tmp_path, form):
    def root(folder: str) -> Path:
        return tmp_path / folder if form == "folder" else pack(tmp_path / folder, tmp_path / "half.zip")

    make(tmp_path, "original")
    images = tmp_path / "Partial-REID_Dataset" / "whole_body_images"
    for image in images.iterdir():
        image.unlink()
    fails(config(root(images.parent.name), "partial_reid"), " file", " in whole_body_images", "such as 001_001.jpg")
    (images / "readme.txt").write_text("")
    fails(config(root(images.parent.name), "partial_reid"), "has no image among ", " in whole_body_images")
    shutil.rmtree(images)
    parts = "has partial_body_images but no whole_body_images; expected all of partial_body_images, whole_body_images"
    fails(config(root(images.parent.name), "partial_reid"), parts, str(tmp_path))
    make(tmp_path, "probe")
    shutil.rmtree(tmp_path / "Partial_iLIDS" / "Probe")
    shutil.copytree(tmp_path / "Partial_iLIDS", tmp_path / "above" / "Partial_iLIDS")
    fails(config(root("above"), "partial_ilids"), "has Gallery but no Probe; expected all of Probe, Gallery")
    (tmp_path / "above" / "Partial_iLIDS").rename(tmp_path / "above" / "other")  # where "Gallery" may be anything
    expected = (
        "contains no Partial-iLIDS: neither the folders Probe, Gallery" if form == "folder" else "no folder Probe"
    )
    fails(config(root("above"), "partial_ilids"), expected)


def test_nothing_there_says_what_to_give(tmp_path):
    fails(config(tmp_path / "nowhere", "partial_reid"), "nowhere does not exist", "folder or zip of Partial-REID")
    fails(
        config(tmp_path, "partial_ilids"),
        "is empty: put the folder or zip of Partial-iLIDS there, or",
        "evaluate --root",
    )
    (tmp_path / "a.rar").write_bytes(b"Rar!")
    fails(config(tmp_path / "a.rar", "partial_reid"), "a.rar is a RAR archive")


def test_a_zip_of_several_datasets_gives_each(tmp_path):
    reid, ilids = (make(tmp_path / "all", layout) for layout in ("market style", "dashed"))
    for folder in ("occluded_body_images", "whole_body_images"):
        shutil.copytree(
            tmp_path / "all" / "Partial_REID" / "whole_body_images", tmp_path / "all" / "Occluded_REID" / folder
        )
    shutil.copytree(tmp_path / "all" / "Partial-iLIDS", tmp_path / "all" / "OccludedREID")
    for root in (tmp_path / "all", pack(tmp_path / "all", tmp_path / "all.zip")):
        assert_is(load_dataset(config(root, "partial_reid")), reid)
        assert_is(load_dataset(config(root, "partial_ilids")), ilids)


def test_prepared_is_the_same(tmp_path, capsys):
    expected = make(tmp_path, "renamed")
    prepare(["partial_reid", "--source", str(tmp_path), "--output", str(tmp_path / "out")])
    folder = arrayrecord.folder_of(tmp_path / "out", "partial_reid")
    printed = capsys.readouterr().out
    assert "6 query and 6 gallery images" in printed
    assert f"python -m vpm_jax.evaluate --workdir RUN --dataset partial_reid --root {folder}" in printed
    for root in (tmp_path / "out", folder):
        dataset = load_dataset(config(root, "partial_reid"))
        assert_is(dataset, expected)
    assert sum("not the official one" in note for note in dataset.notes) == 2


def test_training_has_nothing_to_learn_from(tmp_path):
    make(tmp_path, "probe")
    fails(config(tmp_path, "partial_ilids", holdout=5), "holdout_identities is 5", "the training set has 0 identities")
