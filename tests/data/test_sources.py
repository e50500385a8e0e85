"""Folder, zip and ArrayRecord are one dataset; what is missing is said in one sentence."""

import pickle
import re
import shutil
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from market_files import FILES, TRAIN, config, content, fails, jpeg, make_folder, make_zip
from paths import REAL_DATA
from PIL import Image

from vpm_jax.data.sources import load_dataset
from vpm_jax.data.split import Split, boxes
from vpm_jax.errors import UserError


@pytest.fixture
def folder(tmp_path) -> Path:
    return make_folder(tmp_path / "images")


def test_folder_is_parsed_and_sorted(folder):
    data = load_dataset(config(folder))
    assert data.train.names == tuple(f"bounding_box_train/{name}" for name in TRAIN)
    assert data.train.identity.tolist() == [2, 2, 7, 7, 7, 11, 11, 30, 30]
    assert data.train.camera.tolist() == [1, 3, 1, 2, 2, 1, 1, 6, 6]
    assert data.train.labels().tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3]
    assert data.train.num_identities == 4
    assert data.gallery.identity.tolist() == [-1, 0, 1, 3] and data.gallery.camera.tolist() == [5, 1, 2, 4]
    assert data.query.identity.dtype == data.query.camera.dtype == data.train.labels().dtype == np.int32
    for i, name in enumerate(data.train.names):
        assert data.train.read(i) == (folder / name).read_bytes()


def test_notes_say_what_is_ignored_and_missing(folder):
    notes = " ".join(load_dataset(config(folder)).notes)
    assert (
        "9 training images of 4 identities, 2 query images of 2 identities, 3 gallery images of 2 identities" in notes
    )
    assert "1 more are junk" in notes
    assert "Ignored 3 files" in notes and "Thumbs.db" in notes and "readme.txt" in notes and "someone.jpg" in notes
    assert "it has 9 images of 4 identities, Market-1501 12,936 of 751" in notes
    assert "19,732 of 750" in notes and "in both the training and the test set" not in notes


def test_training_images_of_nobody_are_left_out(folder):
    for name in ("-1_c1s1_000001_01.jpg", "0000_c1s1_000001_01.jpg"):
        (folder / "bounding_box_train" / name).write_bytes(jpeg(99))
    data = load_dataset(config(folder))
    assert data.train.names == tuple(f"bounding_box_train/{name}" for name in TRAIN)
    left_out = "Left out 1 training image of identity"
    assert f"{left_out} -1, which means junk." in data.notes
    person = "if it is a person, set config.data.identity_zero=person."
    assert f"{left_out} 0, which means distractor: {person}" in data.notes
    assert data.train.read(0) == (folder / data.train.names[0]).read_bytes()


def test_identities_in_both_sets_are_noted(folder):
    (folder / "bounding_box_train" / "0001_c1s1_000009_01.jpg").write_bytes(jpeg(99))
    (folder / "bounding_box_test" / "0003_c4s1_000001_00.jpg").unlink()
    notes = load_dataset(config(folder)).notes
    assert "1 identity is in both the training and the test set." in notes
    assert "1 query identity has no image in the gallery." in notes


@pytest.mark.parametrize("inside", ["Market-1501-v15.09.15/", "", "some/where/else/"])
def test_zip_equals_folder(folder, tmp_path, inside):
    path = make_zip(folder, tmp_path / "any name.zip", inside)
    assert content(load_dataset(config(path))) == content(load_dataset(config(folder)))


@pytest.mark.parametrize("where", ["Market-1501-v15.09.15", "market1501/Market-1501-v15.09.15", "Market1501"])
def test_found_below_a_parent(folder, tmp_path, where, monkeypatch):
    root = tmp_path / "data"
    (root / "something else" / "query").mkdir(parents=True)
    shutil.copytree(folder, root / where)
    expected = content(load_dataset(config(folder)))
    assert content(load_dataset(config(root))) == expected
    monkeypatch.setenv("VPM_DATA", str(root))
    assert content(load_dataset(config(""))) == expected
    monkeypatch.delenv("VPM_DATA")
    monkeypatch.chdir(tmp_path)
    data = load_dataset(config(""))  # ./data
    monkeypatch.chdir("/")  # a relative root is held to what it meant
    assert content(data) == expected


def test_zip_found_below_a_parent(folder, tmp_path):
    root = tmp_path / "data"
    root.mkdir()
    make_zip(folder, root / "Market-1501-v15.09.15.zip")
    (root / "weights.zip").write_bytes(b"no zip")
    assert content(load_dataset(config(root))) == content(load_dataset(config(folder)))


def test_zip_with_two_datasets_takes_the_named_one(folder, tmp_path):
    path = make_zip(folder, tmp_path / "all.zip")
    with zipfile.ZipFile(path, "a") as archive:
        for name in FILES:
            archive.writestr(f"DukeMTMC-reID/{name}/0005_c2_f0046985.jpg", b"duke")
    assert len(load_dataset(config(path)).train) == len(TRAIN)
    assert load_dataset(config(path, "dukemtmc")).train.read(0) == b"duke"


def test_take(folder):
    train = load_dataset(config(folder)).train
    some = train.take([5, 0, 5]).take([1, 0])
    assert some.names == (train.names[0], train.names[5])
    assert some.identity.tolist() == [2, 11] and some.read(1) == train.read(5)
    mask = train.camera == 1
    assert train.take(mask).names == tuple(n for n, m in zip(train.names, mask, strict=True) if m)
    assert len(train.take([])) == 0


def read_all(split: Split) -> list[bytes]:
    return [split.read(i) for i in range(len(split))]


@pytest.mark.parametrize("form", ["folder", "zip", "prepared"])
def test_splits_travel_to_threads_and_processes(folder, tmp_path, form):
    root = folder
    if form == "zip":
        root = make_zip(folder, tmp_path / "market.zip")
    elif form == "prepared":
        from vpm_jax.data import arrayrecord

        root = arrayrecord.write(load_dataset(config(folder)), tmp_path / "out")
    train = load_dataset(config(root)).train
    expected = [(folder / name).read_bytes() for name in train.names]
    assert read_all(train) == expected  # the parent's handle is open from here on
    assert read_all(pickle.loads(pickle.dumps(train))) == expected
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(train.read, list(range(len(train))) * 20)) == expected * 20
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(read_all, train).result() == expected


def test_holdout(folder):
    full = load_dataset(config(folder))
    data = load_dataset(config(folder, holdout=2))
    assert np.unique(data.train.identity).tolist() == [2, 11]  # evenly spaced: the 2nd and 4th of 2, 7, 11, 30 leave
    # One query per identity and camera, the first by name; the rest is the gallery.
    assert [name.split("/")[1] for name in data.query.names] == [
        "0007_c1s1_000001_01.jpg",
        "0007_c2s1_000001_01.jpg",
        "0030_c6s1_000001_00.jpg",
    ]
    assert [name.split("/")[1] for name in data.gallery.names] == ["0007_c2s1_000002_01.jpg", "0030_c6s1_000002_00.jpg"]
    assert (data.train.name, data.query.name, data.gallery.name) == ("train", "query", "gallery")
    assert data.train.labels().tolist() == [0, 0, 1, 1]
    everything = {**{n: b for rows in content(data).values() for n, _, _, b in rows}}
    assert everything == {n: b for n, _, _, b in content(full)["train"]}
    assert "Held out 2 of 4 training identities" in data.notes[-1] and "the test set is not used" in data.notes[-1]


def test_bad_holdout(folder):
    fails(config(folder, holdout=3), "holdout_identities is 3", "expected 0 to 2", "has 4 identities")
    fails(config(folder, holdout=-1), "holdout_identities is -1")
    (folder / "bounding_box_train" / "0011_c1s1_000002_00.jpg").unlink()
    fails(config(folder, holdout=1), "leave the gallery empty")


def test_nothing_there(tmp_path, monkeypatch):
    fails(
        config(tmp_path / "nowhere"),
        "nowhere does not exist",
        "--config.data.root",
        "evaluate and benchmark data: --root",
    )
    fails(config(tmp_path), "is empty", "Market-1501")
    (tmp_path / "file.txt").write_text("")
    fails(config(tmp_path), "contains no Market-1501", "bounding_box_train, query, bounding_box_test")
    fails(config(tmp_path / "file.txt"), "file.txt is not a zip: expected a dataset's folder or its official zip")
    (tmp_path / "Market-1501-v15.09.15").mkdir()
    fails(
        config(tmp_path), "the folder Market-1501-v15.09.15 has none of bounding_box_train, query, bounding_box_test; "
    )
    monkeypatch.setenv("VPM_DATA", str(tmp_path / "unset"))
    fails(config(""), "unset ($VPM_DATA) does not exist: put the folder or zip of Market-1501 there, or")


@pytest.mark.parametrize("form", ["folder", "zip"])
def test_incomplete(folder, tmp_path, form):
    def root():
        return folder if form == "folder" else make_zip(folder, tmp_path / "market.zip")

    shutil.rmtree(folder / "query")
    fails(config(root()), "has bounding_box_train, bounding_box_test but no query", str(root()))
    (folder / "query").mkdir()
    fails(config(root()), "has no file in query", "IDENTITY_cCAMERA")
    (folder / "query" / "holiday.jpg").write_bytes(jpeg(0))
    fails(config(root()), "has no image among 1 file such as holiday.jpg in query")
    (folder / "query" / "0001_c1.jpg").write_bytes(jpeg(0))
    for name in TRAIN:
        (folder / "bounding_box_train" / name).unlink()
    (folder / "bounding_box_train" / "-1_c1.jpg").write_bytes(jpeg(0))
    fails(config(root()), "no training image of an identity above 0")


def test_bad_zips(folder, tmp_path):
    path = make_zip(folder, tmp_path / "market.zip")
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:size])
        fails(config(path), "market.zip is not an intact zip", "download it again")
    name = b"bounding_box_test/0001_c2s1_000001_00.jpg"
    at = whole.rindex(name)  # in the zip's directory, at its end
    for new, shown in ((b"cx", "cx"), (b"\n2", r"\n2")):
        path.write_bytes(whole[:at] + name.replace(b"c2", new) + whole[at + len(name) :])
        fails(config(path), "its directory and its headers describe", f"0001_{shown}s1_000001_00.jpg differently")
    entry = whole.rindex(b"PK\1\2")  # of the directory: the flags are at 8, the name at 46
    path.write_bytes(whole[: entry + 9] + b"\x08" + whole[entry + 10 : entry + 46] + b"\xed" + whole[entry + 47 :])
    fails(config(path), "market.zip is not an intact zip ('utf-8' codec can't decode")
    path.write_bytes(whole[: entry + 16] + bytes(12) + whole[entry + 28 :])  # no checksum and no data
    fails(config(path), "its directory and its headers describe")
    path.write_bytes(whole[: entry + 6] + b"\x63" + whole[entry + 7 :])
    fails(config(path), "market.zip is not an intact zip (zip file version 9.9)")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("holiday.jpg", b"")
        archive.writestr("x/query/0001_c1.jpg", b"")
    fails(config(path), "contains no folder bounding_box_train")
    with zipfile.ZipFile(path, "w") as archive:
        for inside in ("a", "b"):
            archive.writestr(f"{inside}/bounding_box_train/0001_c1.jpg", b"")
    fails(config(path), "contains several datasets (a/, b/)")


def test_unreadable_images_are_named(folder, tmp_path):
    path = make_zip(folder, tmp_path / "market.zip")
    data, zipped = load_dataset(config(folder)), load_dataset(config(path))
    (folder / data.train.names[3]).unlink()
    with pytest.raises(UserError, match=f"{re.escape(data.train.names[3])} cannot be read: No such file"):
        data.train.read(3)
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo("Market-1501-v15.09.15/" + data.train.names[3]).header_offset
    damaged = bytearray(path.read_bytes())
    damaged[start + 120 : start + 400] = bytes(280)
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=f"{re.escape(data.train.names[3])} in the zip .* cannot be read"):
        zipped.train.read(3)


def test_synthetic_root_may_be_a_dataset_itself(folder, tmp_path):
    assert content(load_dataset(config(folder, "synthetic"))) == content(load_dataset(config(folder)))


def test_synthetic_is_rendered_and_read(tmp_path):
    data = config(tmp_path / "new", "synthetic")
    data.synthetic.update(train_identities=2, test_identities=2, cameras=2)
    loaded = load_dataset(data)
    assert loaded.train.num_identities == 2 and len(loaded.train) == 8
    assert set(loaded.query.identity.tolist()) <= set(loaded.gallery.identity.tolist())
    assert Image.open(BytesIO(loaded.query.read(0))).size == (64, 128)
    data.root = str(next((tmp_path / "new").iterdir()))
    assert not any("not those of" in note for note in load_dataset(data).notes)
    data.synthetic.seed = 5
    assert any("train2-test2-images2-cameras2, not those of" in note for note in load_dataset(data).notes)


@pytest.mark.parametrize("name", ["partial_reid", "partial_reid_occluded", "partial_ilids", "partial_ilids_nocrop"])
def test_real_zip_of_zips(name):
    path = REAL_DATA / "dataset2.zip"
    if not path.is_file():
        pytest.skip(f"no {path}")
    dataset = load_dataset(config(path, name))
    assert not any("official" in note for note in dataset.notes)
    assert all(Image.open(BytesIO(split.read(len(split) - 1))).size for split in (dataset.query, dataset.gallery))


def test_real_market():
    try:
        data = load_dataset(config(REAL_DATA))
    except UserError as error:
        pytest.skip(f"no real Market-1501: {error}")
    if any("not the official one" in note for note in data.notes):
        pytest.skip("only a part of Market-1501")
    assert [len(s) for s in (data.train, data.query, data.gallery)] == [12936, 3368, 19732]
    assert data.train.num_identities == 751 and data.train.labels().max() == 750
    assert (data.gallery.identity != -1).sum() == 15913 and (data.gallery.identity == 0).sum() == 2798
    assert set(data.train.camera) == set(data.query.camera) == {1, 2, 3, 4, 5, 6}
    if data.multi_query is not None:  # Market-1501-v15.09.15 has gt_bbox
        assert len(data.multi_query) == 12688
        images, groups, group_of_query = boxes(data.query, data.multi_query)
        found = {(name.partition("/")[2], group) for name, group in zip(images.names, groups, strict=True)}
        assert {(n.partition("/")[2], g) for n, g in zip(data.query.names, group_of_query, strict=True)} <= found
    held = load_dataset(config(REAL_DATA, holdout=100))
    assert held.train.num_identities == 651 and len(np.unique(held.query.identity)) == 100
    assert len(held.train) + len(held.query) + len(held.gallery) == 12936
    image = Image.open(BytesIO(held.query.read(0)))
    assert image.size == (64, 128)
