"""Every dataset of the table: a tree as it is distributed is read, counted, and the same in every form."""

from __future__ import annotations

import os
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from market_files import FILES, config, content, fails, jpeg, make_folder
from partial_files import picture
from paths import ROOT

from vpm_jax.data import arrayrecord, datasets
from vpm_jax.data.datasets import DATASETS
from vpm_jax.data.sources import load_dataset, load_test_set
from vpm_jax.data.split import boxes
from vpm_jax.errors import UserError
from vpm_jax.prepare import main as prepare

MARKET = {
    "bounding_box_train/0002_c1s1_000451_03.jpg": ("train", 2, 1),
    "bounding_box_train/0007_c3s3_077419_03.jpg": ("train", 7, 3),
    "query/0001_c1s1_001051_00.jpg": ("query", 1, 1),
    "bounding_box_test/-1_c1s1_000401_03.jpg": ("gallery", -1, 1),
    "bounding_box_test/0000_c1s1_000151_01.jpg": ("gallery", 0, 1),
    "bounding_box_test/0001_c2s1_000301_00.jpg": ("gallery", 1, 2),
}
DUKE = {
    "bounding_box_train/0001_c2_f0046182.jpg": ("train", 1, 2),
    "bounding_box_test/0005_c2_f0046985.jpg": ("gallery", 5, 2),
    "query/0005_c8_f0055072.jpg": ("query", 5, 8),
}
PARTIAL_REID = {
    "occluded_body_images/001_001.jpg": ("occluded", 1, None),
    "partial_body_images/001_001.jpg": ("partial", 1, None),
    "partial_body_images/002_003.jpg": ("partial", 2, None),
    "whole_body_images/001_001.jpg": ("gallery", 1, None),
    "whole_body_images/002_001.jpg": ("gallery", 2, None),
}
PARTIAL_ILIDS = {
    "Gallery/1.jpg": ("gallery", 1, None),
    "Gallery/63.jpg": ("gallery", 63, None),
    "Probe/1.jpg": ("probe", 1, None),
    "Probe/63.jpg": ("probe", 63, None),
    "partial_iLIDS_Probe_nocrop/63.jpg": ("nocrop", 63, None),
}


def query_is(name: str, tree: dict) -> dict:
    """The tree with the split called so as queries; other query sets are not read."""
    return {p: (s.replace(name, "query"), *rest) for p, (s, *rest) in tree.items()}


def msmt(train: str, test: str) -> dict:
    return {
        f"{train}/0000/0000_000_01_0303morning_0015_0.jpg": ("train", 1, 1),
        f"{train}/0000/0000_001_15_0303noon_0016_1.jpg": ("train", 1, 15),
        f"{train}/0001/0001_000_03_0113noon_0008_0.jpg": ("train", 2, 3),
        f"{test}/0000/0000_000_02_0302morning_0010_0.jpg": ("query", 3, 2),
        f"{test}/0000/0000_003_07_0302morning_0011_0.jpg": ("gallery", 3, 7),
        f"{test}/0001/0001_000_02_0302morning_0012_0.jpg": ("gallery", 4, 2),
        "list_train.txt": b"0000/0000_000_01_0303morning_0015_0.jpg 0\n0001/0001_000_03_0113noon_0008_0.jpg 1\n",
        "list_val.txt": b"0000/0000_001_15_0303noon_0016_1.jpg 0\n",
        "list_query.txt": b"0000/0000_000_02_0302morning_0010_0.jpg 0\n",
        "list_gallery.txt": b"0000/0000_003_07_0302morning_0011_0.jpg 0\r\n"
        b"0001/0001_000_02_0302morning_0012_0.jpg 1\r\n",
    }


# dataset, the usual name of its folder, its files with (split, identity, camera)
TREES = {
    "market1501": ("market1501", "Market-1501-v15.09.15", MARKET),
    "dukemtmc": ("dukemtmc", "DukeMTMC-reID", DUKE),
    "occluded duke": ("occluded_dukemtmc", "Occluded_Duke", DUKE),
    "msmt v1": ("msmt17", "MSMT17_V1", msmt("train", "test")),
    "msmt v2": ("msmt17", "msmt17/MSMT17_V2", msmt("mask_train_v2", "mask_test_v2")),
    "cuhk03 labeled": ("cuhk03_np", "cuhk03-np/labeled", MARKET),
    "cuhk03 detected": ("cuhk03_np", "CUHK03-NP/detected", MARKET),
    "p-duke": (
        "p_dukemtmc",
        "P-DukeMTMC-reid",
        {
            "train/occluded_body_images/0001/0001_2_0046182.jpg": ("train", 1, None),
            "train/whole_body_images/0001/0001_1_0046985.jpg": ("train", 1, None),
            "train/whole_body_images/0008/0008_1_0046985.jpg": ("train", 8, None),
            "test/occluded_body_images/0005/0005_2_0046985.jpg": ("query", 5, None),
            "test/whole_body_images/0005/0005_1_0046985.jpg": ("gallery", 5, None),
            "test/whole_body_images/0009/0009_1_0046985.jpg": ("gallery", 9, None),
        },
    ),
    "occluded-reid": (
        "occluded_reid",
        "ICME2018_Occluded-Person-Reidentification_datasets/Occluded_REID",
        {
            "occluded_body_images/001/001_01.tif": ("query", 1, None),
            "occluded_body_images/200/200_05.tif": ("query", 200, None),
            "whole_body_images/001/001_01.tif": ("gallery", 1, None),
            "whole_body_images/200/200_04.tif": ("gallery", 200, None),
        },
    ),
    "partial-reid": ("partial_reid", "Partial-REID_Dataset", query_is("partial", PARTIAL_REID)),
    "partial-reid occluded": ("partial_reid_occluded", "PartialREID", query_is("occluded", PARTIAL_REID)),
    "partial-ilids": ("partial_ilids", "Partial_iLIDS", query_is("probe", PARTIAL_ILIDS)),
    "partial-ilids whole": ("partial_ilids_nocrop", "Partial_iLIDS", query_is("nocrop", PARTIAL_ILIDS)),
    "own folders": (
        "identity_folders",
        "identity_folders",
        {
            "train/0002/0002_c1s1_000451_03.jpg": ("train", 1, 1),
            "train/anna/front_c3.jpg": ("train", 3, 3),
            "query/0010/c2.png": ("query", 2, 2),
            "gallery/0010/c4s1_x.jpg": ("gallery", 2, 4),
            "gallery/-1/c4.jpg": ("gallery", -1, 4),
        },
    ),
    "own folders without cameras": (
        "identity_folders",
        "identity_folders",
        {
            "query/bob/1.webp": ("query", 1, None),
            "gallery/bob/music2.jpg": ("gallery", 1, None),
            "gallery/carl/1.jpg": ("gallery", 2, None),
        },
    ),
}


def test_every_dataset_has_a_tree():
    assert {name for name, *_ in TREES.values()} == set(DATASETS) - {"synthetic", "csv"}


def write(root: Path, tree: dict) -> Path:
    """The files of a tree: bytes as they are, otherwise images, no two alike."""
    for seed, (name, what) in enumerate(tree.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        suffix = path.suffix if path.suffix in (".tif", ".png") else ".jpg"
        path.write_bytes(what if isinstance(what, bytes) else picture(seed, suffix))
    return root


def pack(folder: Path, path: Path, inside: str = "") -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, inside + file.relative_to(folder).as_posix())
    return path


def expected(root: Path, tree: dict) -> dict:
    """{split: rows of name, identity, camera, bytes} in the order of the names."""
    rows: dict = {"train": [], "query": [], "gallery": []}
    for name, what in sorted(tree.items()):
        if not isinstance(what, bytes) and what[0] in rows:
            rows[what[0]].append((name, *what[1:], (root / name).read_bytes()))
    return rows


def rows(dataset) -> dict:
    found = {}
    for split in (dataset.train, dataset.query, dataset.gallery):
        cameras = [None] * len(split) if split.camera is None else split.camera.tolist()
        bytes_ = [split.read(i) for i in range(len(split))]
        found[split.name] = list(zip(split.names, split.identity.tolist(), cameras, bytes_, strict=True))
    return found


@pytest.mark.parametrize("case", TREES)
def test_as_distributed_in_every_form(tmp_path, case):
    name, usual, tree = TREES[case]
    root = write(tmp_path / "data" / usual, tree)
    wanted = expected(root, tree)
    dataset = load_dataset(config(root, name))
    assert rows(dataset) == wanted
    assert dataset.notes[0].startswith(f"{DATASETS[name].title} from the folder ")
    assert rows(load_dataset(config(tmp_path / "data", name))) == wanted  # below, under its usual name
    zipped = pack(root, tmp_path / "any.zip", f"{root.name}/")
    assert rows(load_dataset(config(zipped, name))) == wanted
    outer = pack(write(tmp_path / "outer", {f"{root.name}.zip": zipped.read_bytes()}), tmp_path / "outer.zip")
    assert rows(load_dataset(config(outer, name))) == wanted
    prepare([name, "--source", str(root), "--output", str(tmp_path / "out")])
    prepared = load_dataset(config(arrayrecord.folder_of(tmp_path / "out", name), name))
    assert rows(prepared) == wanted and prepared.notes[1:] == dataset.notes[1:]


@pytest.mark.parametrize("case", TREES)
def test_other_counts_are_named(tmp_path, case):
    name, _, tree = TREES[case]
    notes = " ".join(load_dataset(config(write(tmp_path / "root", tree), name)).notes)
    for split in ("train", "query", "gallery"):
        for images, identities in DATASETS[name].official(split):
            assert f"{images:,} of {identities:,}" in notes


USUAL = {
    "market1501": ["Market-1501-v15.09.15", "market1501", "Market"],
    "dukemtmc": ["DukeMTMC-reID", "dukemtmcreid", "duke"],
    "occluded_dukemtmc": ["Occluded_Duke", "Occluded-DukeMTMC", "Occluded-DukeMTMC-reID", "Occluded-DukeMTMC-Dataset"],
    "p_dukemtmc": ["P-DukeMTMC-reid", "P_DukeMTMC"],
    "occluded_reid": ["Occluded_REID", "OccludedREID", "occluded-reid"],
    "msmt17": ["MSMT17", "MSMT17_V1", "msmt17_v2"],
    "cuhk03_np": ["cuhk03-np", "CUHK03", "CUHK03-NP-labeled"],
    "partial_reid": ["Partial-REID_Dataset", "PartialREID", "partial_reid"],
    "partial_ilids": ["Partial_iLIDS", "PartialiLIDS", "Partial-iLIDS"],
}


def test_usual_names_tell_one_dataset():
    for name, called in USUAL.items():
        for folder in called:
            found = [other for other in USUAL if DATASETS[other].is_usual(folder)]
            assert found == [name], folder


def test_the_documentation_has_every_dataset():
    text = (ROOT / "docs" / "data.md").read_text()
    assert datasets.table() in text, "python -m vpm_jax.data.datasets prints the table"
    for name in DATASETS:
        if name != "csv":
            assert re.search(rf"(--dataset|--config\.data\.name=) ?{name}\b|configs/\w+\.py", text), name
        assert f"`{name}`" in text


def test_protocols_are_in_words():
    assert str(DATASETS["market1501"].protocol) == "all-shot, same camera dropped; R-1, R-5, R-10, mAP"
    assert str(DATASETS["partial_reid"].protocol) == "all-shot and single-shot, no cameras; R-1, R-3, R-5, mAP"
    assert str(DATASETS["partial_ilids"].protocol) == "single-shot, no cameras; R-1, R-3, R-5"


def test_two_forms_of_a_dataset_are_not_mixed_up(tmp_path):
    for form in ("labeled", "detected"):
        write(tmp_path / "cuhk03-np" / form, MARKET)
    fails(config(tmp_path, "cuhk03_np"), "contains ", "detected and ", "labeled: set config.data.root")
    dataset = load_dataset(config(tmp_path / "cuhk03-np" / "labeled", "cuhk03_np"))
    assert "These are the labeled images of CUHK03-NP." in dataset.notes
    pack(tmp_path / "cuhk03-np", tmp_path / "both.zip")
    fails(config(tmp_path / "both.zip", "cuhk03_np"), "several datasets (detected/, labeled/)")


def test_partial_reid_is_not_taken_for_occluded_reid(tmp_path):
    write(tmp_path / "root", PARTIAL_REID)
    fails(config(tmp_path / "root", "occluded_reid"), "contains no Occluded-REID")
    for name in ("partial_reid", "partial_reid_occluded"):
        assert len(load_dataset(config(tmp_path / "root", name)).gallery) == 2


@pytest.mark.parametrize("names", [("005/1.tif", "005/2.tif"), ("005/1.tif", "006/1.tif")])
def test_folders_that_contradict_names_are_refused(tmp_path, names):
    tree = {f"{folder}/{name}": None for folder in ("occluded_body_images", "whole_body_images") for name in names}
    write(tmp_path / "root", tree)
    fails(config(tmp_path / "root", "occluded_reid"), names[0], names[1], "disagree about the identity")


def test_lists_are_checked(tmp_path):
    tree = msmt("train", "test")
    root = write(tmp_path / "root", tree)
    for name in ("list_train.txt", "list_query.txt"):
        whole = (root / name).read_bytes()
        last = len(whole.splitlines()) + 1
        there = whole.split()[0]
        for line in (
            b"0000/0000_000_01_x.jpg",
            b"0000/0000_000_01_x.jpg one",
            b"0000/0000.jpg 0",
            there + b" 9999999999",
        ):
            (root / name).write_bytes(whole + line + b"\n")
            fails(config(root, "msmt17"), f"Line {last} of {name}", "expected a path and an identity")
        (root / name).write_bytes(whole + b"0009/0009_000_01_gone.jpg 9\n")
        fails(config(root, "msmt17"), "cannot be used", "0009/0009_000_01_gone.jpg")
        (root / name).write_bytes(whole)
    (root / "list_val.txt").unlink()
    notes = load_dataset(config(root, "msmt17")).notes
    assert "There is no list_val.txt." in notes
    assert "Left out 1 image of train missing from the lists: 0000/0000_001_15_0303noon_0016_1.jpg." in notes
    (root / "list_gallery.txt").unlink()
    fails(config(root, "msmt17"), "has no list_gallery.txt")


def test_cameras_in_only_some_names_are_refused(tmp_path):
    write(tmp_path / "root", {"query/a/1_c1.jpg": 0, "gallery/a/2.jpg": 0})
    fails(config(tmp_path / "root", "identity_folders"), "query/a/1_c1.jpg", "gallery/a/2.jpg", "CSV")


def test_own_folders_for_training_alone(tmp_path):
    tree = {f"train/{identity}/{image}.jpg": 0 for identity in "abcd" for image in (1, 2)}
    root = write(tmp_path / "root", tree | {"train/loose.jpg": 0})
    fails(config(root, "identity_folders"), "has no query image", "holdout_identities")
    held = load_dataset(config(root, "identity_folders", holdout=1))
    assert held.train.num_identities == 3 and held.query.names == ("train/c/1.jpg",)
    assert "Ignored 1 file not named like an image of a person: train/loose.jpg." in held.notes
    write(root, {"query/a/1.jpg": 0})
    fails(config(root, "identity_folders"), "but no gallery")


# ---- Distractors, multi-query and further training sets ----


def test_distractors_join_the_gallery(tmp_path):
    root = make_folder(tmp_path / "market")
    names = ["0000_c1s1_000001_01.jpg", "-1_c3s1_000001_01.jpg", "deeper/photo.png", "Thumbs.db"]
    write(root / "images", dict.fromkeys(names))
    plain = load_dataset(config(root))
    zipped = pack(root / "images", tmp_path / "distractors.zip")
    for where in ("images", str(root / "images"), str(zipped)):
        data = config(root)
        data.distractors = where
        dataset = load_dataset(data)
        gallery, first = dataset.gallery, len(plain.gallery)
        assert gallery.names[:first] == plain.gallery.names
        assert gallery.names[first:] == ("-1_c3s1_000001_01.jpg", "0000_c1s1_000001_01.jpg", "deeper/photo.png")
        assert gallery.identity[first:].tolist() == [0, 0, 0] and gallery.camera[first:].tolist() == [3, 1, 0]
        ranked = gallery.take(gallery.identity != -1)
        assert ranked.read(len(ranked) - 1) == (root / "images" / "deeper" / "photo.png").read_bytes()
        assert ranked.read(0) == (root / ranked.names[0]).read_bytes()
        assert f"Added 3 distractors from {Path(where).name} to the gallery." in dataset.notes
        assert dataset.train.names == plain.train.names
    data.distractors = "nowhere"
    fails(data, "config.data.distractors is nowhere")
    data.distractors = str(root / "query")
    fails(data, "query (config.data.distractors) contains 0001_c1s1_000001_00.jpg, named like an image of a person")


def test_boxes_of_a_query(tmp_path):
    root = make_folder(tmp_path / "market")
    names = ["0001_c1s1_000001_00.jpg", "0001_c1s2_000009_00.jpg", "0001_c2s1_000001_00.jpg", "0002_c1s1_000001_00.jpg"]
    write(root / "gt_bbox", dict.fromkeys([*names, "0003_c2s1_000001_00.jpg", "Thumbs.db"]))
    expected = ["gt_bbox/0001_c1s1_000001_00.jpg", "gt_bbox/0001_c1s2_000009_00.jpg", "gt_bbox/0003_c2s1_000001_00.jpg"]
    arrayrecord.write(load_dataset(config(root)), tmp_path / "out")
    for where in (root, tmp_path / "out"):
        dataset = load_dataset(config(where))
        assert dataset.multi_query is not None and list(dataset.multi_query.names) == expected
        images, group, group_of_query = boxes(dataset.query, dataset.multi_query)
        assert images.names == tuple(expected) and group.tolist() == [0, 0, 1] and group_of_query.tolist() == [0, 1]
        assert dataset.multi_query.read(1) == (root / expected[1]).read_bytes()
    assert load_dataset(config(root, holdout=1)).multi_query is None
    assert load_dataset(config(make_folder(tmp_path / "plain"))).multi_query is None


def test_further_training_sets_keep_their_identities_apart(tmp_path):
    market = make_folder(tmp_path / "data" / "Market-1501")
    write(tmp_path / "data" / "MSMT17_V1", msmt("train", "test"))
    write(tmp_path / "elsewhere", DUKE)
    one = load_dataset(config(market))
    data = config(tmp_path / "data")
    data.also_train = f"msmt17, dukemtmc:{tmp_path / 'elsewhere'}"
    dataset = load_dataset(data)
    train, first = dataset.train, len(one.train)
    assert content(dataset)["query"] == content(one)["query"] and content(dataset)["gallery"] == content(one)["gallery"]
    assert train.identity[:first].tolist() == one.train.identity.tolist()
    assert train.identity[first:].tolist() == [31, 31, 32, 33]  # Market's go to 30
    assert train.camera[first:].tolist() == [7, 21, 9, 22]  # and its cameras to 6
    assert train.names[first:][::3] == (
        "msmt17/train/0000/0000_000_01_0303morning_0015_0.jpg",
        "dukemtmc/bounding_box_train/0001_c2_f0046182.jpg",
    )
    assert train.read(len(train) - 1) == (tmp_path / "elsewhere/bounding_box_train/0001_c2_f0046182.jpg").read_bytes()
    assert train.read(0) == one.train.read(0) and train.num_identities == 7
    assert "Together 13 training images of 7 identities." in dataset.notes
    assert str(tmp_path) not in "".join(dataset.notes[1:])  # which stand on artefacts
    data.holdout_identities = 1  # of Market alone
    held = load_dataset(data)
    assert set(held.query.identity) <= set(one.train.identity) and len(held.train) > len(train) - first


def test_an_evaluation_loads_no_further_training_sets(tmp_path):
    data = config(make_folder(tmp_path / "market"))
    data.also_train = "msmt17:nowhere"
    fails(data, "nowhere does not exist")
    assert content(load_test_set(data)) == content(load_dataset(config(tmp_path / "market")))
    assert data.also_train == "msmt17:nowhere"


def test_further_training_sets_that_cannot_be(tmp_path):
    market = make_folder(tmp_path / "market")
    data = config(market)
    for also, part in (
        ("market", "also_train names 'market': expected NAME or NAME:PATH"),
        (f"market1501:{market}", "which is already a training set"),
        (f"msmt17:{market}", "contains no MSMT17"),
        (f"partial_reid:{write(tmp_path / 'partial', PARTIAL_REID)}", "has no training images"),
    ):
        data.also_train = also
        fails(data, part)


def test_a_test_set_with_another_training_set(tmp_path):
    market = make_folder(tmp_path / "market")
    data = config(write(tmp_path / "partial", PARTIAL_REID), "partial_reid")
    data.also_train = f"market1501:{market}"
    dataset = load_dataset(data)
    assert len(dataset.query) == 2 and dataset.train.read(0) == load_dataset(config(market)).train.read(0)
    assert dataset.train.num_identities == 4


# ---- Names, and files that cannot be used ----


def market(root: Path, train: list[str]) -> Path:
    tree = dict.fromkeys(f"bounding_box_train/{name}" for name in train)
    return write(root, tree | {"query/0001_c1.jpg": 0, "bounding_box_test/0001_c2.jpg": 0})


def test_identities_may_have_any_number_of_digits(tmp_path):
    root = market(tmp_path / "market", ["7_c1.jpg", "12345_c2.jpg", "1234567_c10s1.jpg", "1234567890_c1.jpg"])
    dataset = load_dataset(config(root))
    assert dataset.train.identity.tolist() == [1234567, 12345, 7] and dataset.train.camera.tolist() == [10, 2, 1]
    assert "Ignored 1 file not named like an image of a person: bounding_box_train/1234567890_c1.jpg." in dataset.notes


def test_a_folder_of_which_most_is_named_otherwise_is_refused(tmp_path):
    root = market(tmp_path / "market", ["0001_c1.jpg", "anna_c1.jpg", "bob_c2.jpg"])
    fails(
        config(root),
        "2 of 3 images in bounding_box_train that are not named",
        "bounding_box_train/0001_c1.jpg is, bounding_box_train/anna_c1.jpg is not",
    )
    for number in range(9):  # of a Mac
        (root / "query" / f"._000{number}_c1.jpg").write_bytes(b"")
    (root / "bounding_box_train" / "bob_c2.jpg").unlink()
    load_dataset(config(root))


def test_identity_0_may_be_a_person(tmp_path):
    root = market(tmp_path / "market", ["0000_c1.jpg", "0000_c2.jpg", "0001_c1.jpg", "-1_c1.jpg"])
    write(root, {"query/0000_c3.jpg": 0, "bounding_box_test/0000_c1.jpg": 0})
    prepare(["market1501", "--source", str(root), "--output", str(tmp_path / "out")])
    for where in (root, tmp_path / "out"):
        data = config(where)
        notes = " ".join(load_dataset(data).notes)
        assert "Left out 2 training images of identity 0, which means distractor: if it is a person" in notes
        assert "1 query is of identity 0" in notes and len(load_dataset(data).train) == 1
        data.identity_zero = "person"
        dataset = load_dataset(data)
        assert dataset.train.labels().tolist() == [0, 0, 1]
        assert "3 training images of 2 identities, 2 query images of 2 identities" in dataset.notes[0]
        assert not any("Left out 2" in note for note in dataset.notes)


@pytest.mark.parametrize("split", ["bounding_box_train", "query", "bounding_box_test"])
def test_images_that_cannot_be_used_are_counted_and_named(tmp_path, split):
    root = make_folder(tmp_path / "market")
    link = root / split / "0005_c1s1_000001_00.jpg"
    link.symlink_to(".git/annex/objects/gone.jpg")
    (root / split / "Icon.jpg").symlink_to("nowhere")  # not named like an image of a person
    os.mkfifo(root / split / "0006_c1s1_000001_00.jpg")
    (root / split / "0008_c1s1_000001_00.heic").write_bytes(b"")
    data = config(root)
    total = sum(name.startswith(("0", "-")) for name in FILES[split]) + 3
    fails(data, f"3 images of {total} (", "0005_c1s1_000001_00.jpg", "0006_", "0008_", "data.corrupt=skip", "dvc pull")
    data.corrupt = "skip"
    dataset = load_dataset(data)
    assert any(note.startswith(f"Left out: 3 images of {total}") for note in dataset.notes)
    assert content(dataset) == content(load_dataset(config(make_folder(tmp_path / "plain"))))
    with pytest.raises(UserError, match=r"3 images .*prepare: remove them"):
        prepare(["market1501", "--source", str(root), "--output", str(tmp_path / "out")])
    link.unlink()
    link.symlink_to(root / FILES[split][0])  # a link to another
    write(root, {FILES[split][0]: 0})
    fails(config(root), f"2 images of {total}")


def test_identities_that_lead_nowhere(tmp_path):
    name, _, tree = TREES["occluded-reid"]
    root = write(tmp_path / "root", tree)
    (root / "whole_body_images" / "007").symlink_to("gone")
    fails(config(root, name), "1 image of 3 (gallery) cannot be used", "whole_body_images/007")


def test_names_that_are_not_utf8(tmp_path, capsys):
    root = market(tmp_path / "market", ["0001_c1.jpg"])
    odd = os.fsdecode(b"0002_c1_\xcd\xf5.jpg")
    other = os.fsdecode(b"\xcd\xf5.jpg")
    for name in (odd, other):
        (root / "bounding_box_train" / name).write_bytes(jpeg(3))
    dataset = load_dataset(config(root))
    assert dataset.train.identity.tolist() == [1, 2] and dataset.train.read(1) == jpeg(3)
    assert r"bounding_box_train/\xcd\xf5.jpg" in " ".join(dataset.notes)
    prepare(["market1501", "--source", str(root), "--output", str(tmp_path / "out")])
    prepared = load_dataset(config(tmp_path / "out"))
    assert prepared.train.names == dataset.train.names and prepared.train.read(1) == jpeg(3)
    prepare(["market1501", "--source", str(root), "--output", str(tmp_path / "out")])
    assert "Already prepared" in capsys.readouterr().out
    (root / "bounding_box_train" / odd).unlink()
    (root / "bounding_box_train" / odd).symlink_to("gone")
    fails(config(root), r"0002_c1_\xcd\xf5.jpg")


def test_prepare_takes_a_table_for_training_alone(tmp_path, capsys):
    for name in ("a1", "a2", "b1", "b2", "c1", "c2"):
        write(tmp_path, {f"{name}.jpg": 0})
    rows = "".join(f"{name}{n}.jpg,{name},train\n" for name in "abc" for n in (1, 2))
    (tmp_path / "own.csv").write_text("path,identity,split\n" + rows)
    prepare(["csv", "--source", str(tmp_path), "--output", str(tmp_path / "out")])
    assert "--config.data.holdout_identities=N" in capsys.readouterr().out
    fails(config(tmp_path / "out", "csv"), "has no query image")
    held = load_dataset(config(tmp_path / "out", "csv", holdout=1))
    assert len(held.train) == 4 and len(held.query) == len(held.gallery) == 1


# ---- Zips and other archives ----


def test_a_zip_of_zips(tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    for name, tree in (("Partial-REID_Dataset", PARTIAL_REID), ("Partial_iLIDS", PARTIAL_ILIDS)):
        pack(write(tmp_path / name, tree), inner / f"{name}.zip", f"{name}/")
    write(inner, {"__MACOSX/._Partial_iLIDS.zip": b"junk"})
    outer = pack(inner, tmp_path / "dataset2.zip")
    for where in (outer, tmp_path / "below"):
        (tmp_path / "below").mkdir(exist_ok=True)
        (tmp_path / "below" / "dataset2.zip").write_bytes(outer.read_bytes())
        for case in ("partial-reid", "partial-reid occluded", "partial-ilids", "partial-ilids whole"):
            name, _, tree = TREES[case]
            root = tmp_path / ("Partial-REID_Dataset" if "reid" in case else "Partial_iLIDS")
            assert rows(load_dataset(config(where, name))) == expected(root, tree)
    fails(config(outer, "market1501"), "contains no folder bounding_box_train")
    write(inner, {"Partial_iLIDS.zip": b"no zip"})
    fails(config(pack(inner, outer), "partial_ilids"), "Partial_iLIDS.zip is not an intact zip")


def test_backslashes_in_a_zip(tmp_path):
    root = make_folder(tmp_path / "market")
    path = pack(root, tmp_path / "market.zip")
    data = path.read_bytes()
    for folder in FILES:  # as Windows writes them
        data = data.replace(f"{folder}/".encode(), f"{folder}\\".encode())
    path.write_bytes(data)
    assert content(load_dataset(config(path))) == content(load_dataset(config(root)))


def test_locked_zips_and_other_archives_are_refused_at_once(tmp_path):
    root = make_folder(tmp_path / "market")
    path = pack(root, tmp_path / "market.zip")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1  # the flag of a password
    path.write_bytes(data)
    fails(config(path), "market.zip is protected by a password: unpack it and set config.data.root")
    for suffix, mode in (("tar", "w"), ("tar.gz", "w:gz"), ("tar.bz2", "w:bz2"), ("tar.xz", "w:xz")):
        archive = tmp_path / suffix / f"Market-1501.{suffix}"
        archive.parent.mkdir()
        with tarfile.open(archive, mode) as file:
            file.add(root, "market")
        fails(config(archive), f"Market-1501.{suffix} is a", "archive, expected a zip: unpack it")
        fails(config(archive.parent), f"contains no readable Market-1501: unpack Market-1501.{suffix} first")


def test_boxes_without_any():
    from vpm_jax.data.split import Split

    query = Split("query", ("a",), np.array([5], np.int32), np.array([1], np.int32))
    empty = Split("multi_query", (), np.empty(0, np.int32), np.empty(0, np.int32))
    images, group, group_of_query = boxes(query, empty)  # it stands for itself
    assert images.names == ("a",) and group.tolist() == group_of_query.tolist() == [0]
