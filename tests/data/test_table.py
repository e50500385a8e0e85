"""Own images listed in a CSV: what is accepted, and that an error names the line."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from market_files import config, content, fails, jpeg
from PIL import Image

from vpm_jax import config as config_lib
from vpm_jax.data import arrayrecord
from vpm_jax.data.pipeline import eval_batches
from vpm_jax.data.sources import load_dataset
from vpm_jax.errors import UserError
from vpm_jax.prepare import main as prepare

ROWS = """path,identity,camera,split
images/a1.jpg,anna,1,train
images/a2.jpg,anna,2,train
images/b1.jpg,10,1,train
images/b2.jpg,9,1,train
images/c1.jpg,carl,1,query
images/c2.jpg,carl,2,gallery
images/d1.jpg,-1,2,gallery
"""


@pytest.fixture
def table(tmp_path) -> Path:
    return make(tmp_path)


def make(root: Path, text: str | bytes = ROWS) -> Path:
    """A CSV with these bytes, and every image that ROWS names, no two alike."""
    for seed, line in enumerate(ROWS.splitlines()[1:]):
        image = root / line.split(",")[0]
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(jpeg(seed))
    (root / "own.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    return root / "own.csv"


def read(table: Path):
    return load_dataset(config(table, "csv"))


def test_what_a_table_says(table):
    dataset = read(table)
    assert dataset.train.names == ("images/a1.jpg", "images/a2.jpg", "images/b1.jpg", "images/b2.jpg")
    # Numbered: 9, 10, anna, carl.
    assert dataset.train.identity.tolist() == [3, 3, 2, 1] and dataset.train.camera.tolist() == [1, 2, 1, 1]
    assert dataset.train.labels().tolist() == [2, 2, 1, 0]
    assert (dataset.query.identity.tolist(), dataset.query.camera.tolist()) == ([4], [1])
    assert (dataset.gallery.identity.tolist(), dataset.gallery.camera.tolist()) == ([4, -1], [2, 2])
    assert dataset.train.identity.dtype == dataset.train.camera.dtype == np.int32
    for split in (dataset.train, dataset.query, dataset.gallery):
        assert [split.read(i) for i in range(len(split))] == [(table.parent / n).read_bytes() for n in split.names]
    assert dataset.notes[0] == (
        f"own images from the CSV {table}: 4 training images of 3 identities, 1 query image of 1 identity, "
        "1 gallery image of 1 identity (1 more are junk, never ranked)."
    )
    assert len(dataset.notes) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: b"\xef\xbb\xbf" + text.encode(),  # Excel's "CSV UTF-8"
        lambda text: (b"\xef\xbb\xbf" + text.encode()).replace(b"\n", b"\r\n"),
        lambda text: text.replace("images/", "images\\"),  # Windows
        lambda text: text.replace("images/", "./images/").replace("./", "", 3),
        lambda text: text.replace("path,identity,camera,split", " Path , IDENTITY,Camera,Split"),
        lambda text: text.replace("train", "Train").replace(",", " , "),
        lambda text: text.replace("\n", "\n\n,,,\n").rstrip(",\n"),
        lambda text: "\n".join([text.splitlines()[0], *reversed(text.splitlines()[1:])]),
        lambda text: text.replace("images/a1.jpg", '"images/a1.jpg"').replace("anna,1", '"anna",1'),
        lambda text: text.replace(",", ";"),  # Excel in many countries
        lambda text: text.replace(",", "\t").encode("utf-16"),  # Excel's "Unicode text"
        lambda text: text.replace(",", "|"),
        lambda text: text.replace("path,identity,camera,split", "img_path,pid,camid,subset"),
        lambda text: text.replace("path,identity,camera,split", "image,person_id,cam_id,set").replace("query", "probe"),
        lambda text: text.replace("gallery", "test"),
        lambda text: text.replace(",9,", ",009,").replace(",10,", ",+10,"),
        lambda text: "\n".join(",".join([*line.split(",")[::-1], "more"]) for line in text.splitlines()),
    ],
    ids=lambda change: None,
)
def test_the_same_table_written_otherwise(table, change):
    def plain(dataset):
        return {split: [(os.path.normpath(n), *rest) for n, *rest in rows] for split, rows in content(dataset).items()}

    expected = plain(read(table))
    make(table.parent, change(ROWS))
    dataset = read(table)
    assert plain(dataset) == expected
    assert ("Ignored the column more." in dataset.notes) == ("more" in table.read_text(errors="replace"))


def test_paths_may_lie_elsewhere(tmp_path):
    make(tmp_path / "pictures")
    lines = ROWS.replace("images/a", f"{tmp_path}/pictures/images/a").replace("images/b", "../pictures/images/b")
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "own.csv").write_text(
        lines.replace("images/c", "../pictures/images/c").replace("images/d", "../pictures/images/d")
    )
    dataset = read(tmp_path / "lists" / "own.csv")
    assert sorted(dataset.train.read(i) for i in range(4)) == sorted(jpeg(seed) for seed in range(4))


def test_identities_are_any_text(tmp_path):
    names = ["Ünal", "0", "-1", "-2", "a,b", "12345678901234567890123", "Ünal ", "7.0", "7"]
    rows = [f'{i}.jpg,"{name}",query' for i, name in enumerate(names)]
    for i in range(len(names)):
        (tmp_path / f"{i}.jpg").write_bytes(jpeg(i))
    query = read(make(tmp_path, "\n".join(["path,identity,split", *rows, "images/a1.jpg,0,gallery"]))).query
    # Numbers in their order, -2, 0 and 7, then the names; "-1" is junk; spaces around a name do not count.
    assert query.identity.tolist() == [7, 2, -1, 1, 6, 4, 7, 5, 3]


def test_cameras_are_any_text(tmp_path):
    text = ROWS.replace(",1,", ",hall,").replace(",2,", ",entrance 10,").replace("anna,hall", "anna,-1")
    dataset = read(make(tmp_path, text))
    assert dataset.train.camera.tolist() == [1, 2, 3, 3]
    assert (dataset.query.camera.tolist(), dataset.gallery.camera.tolist()) == ([3], [2, 2])


@pytest.mark.parametrize("encoding", ["latin-1", "gbk", "utf-8"])
@pytest.mark.parametrize("disk", ["same bytes", "utf-8"])
def test_names_in_any_encoding(tmp_path, encoding, disk):
    name = "zoë" if encoding == "latin-1" else "王芳"
    table = make(tmp_path, ROWS.replace("anna", name).replace("a2.jpg", f"{name}.jpg").encode(encoding))
    there = os.path.join(os.fsencode(tmp_path / "images"), name.encode(encoding if disk == "same bytes" else "utf-8"))
    os.rename(tmp_path / "images" / "a2.jpg", there + b".jpg")
    dataset = read(table)
    first, *others, last = dataset.train.identity
    assert first == last and first not in others
    assert dataset.train.read(3) == jpeg(1)
    assert any("was read as" in note for note in dataset.notes) == (encoding != "utf-8" and disk == "utf-8")
    for note in dataset.notes:
        note.encode()
    folder = arrayrecord.write(dataset, tmp_path / "out")
    prepared = load_dataset(config(folder, "csv"))
    assert prepared.train.names == dataset.train.names and prepared.train.read(3) == jpeg(1)


def test_without_cameras(tmp_path):
    def without(keep: str) -> str:
        rows = [line.split(",") for line in ROWS.splitlines()]
        return "\n".join(
            ",".join([path, identity, *([""] * (keep == "empty")), split]) for path, identity, _, split in rows
        )

    for text in (without("").replace("camera,", ""), without("empty").replace("identity,,", "identity,camera,")):
        dataset = read(make(tmp_path, text))
        assert dataset.train.camera is dataset.query.camera is dataset.gallery.camera is None
        assert dataset.query.identity.tolist() == [4]


def test_training_alone_is_enough_with_held_out_identities(tmp_path):
    lines = ["path,identity,split", *(f"images/{s}{i}.jpg,{s},train" for s in "abcd" for i in (1, 2))]
    table = make(tmp_path, "\n".join(lines))
    for i, name in enumerate(("c1", "c2", "d1", "d2")):
        (tmp_path / "images" / f"{name}.jpg").write_bytes(jpeg(10 + i))
    fails(config(table, "csv"), f"the CSV {table} has no query image", "config.data.holdout_identities")
    held = load_dataset(config(table, "csv", holdout=2))
    # Without cameras the first image of an identity is the query.
    assert held.train.identity.tolist() == [1, 1, 3, 3] and held.train.camera is None
    assert held.query.names == ("images/b1.jpg", "images/d1.jpg")
    assert held.gallery.names == ("images/b2.jpg", "images/d2.jpg")


def test_a_table_for_testing_alone(tmp_path):
    lines = [line for line in ROWS.splitlines() if not line.endswith("train")]
    dataset = read(make(tmp_path, "\n".join(lines)))
    assert len(dataset.train) == 0 and len(dataset.query) == 1 and len(dataset.gallery) == 2


def test_where_a_table_is_found(tmp_path, monkeypatch):
    fails(config(tmp_path / "nowhere", "csv"), "nowhere does not exist", "header path,identity,camera,split")
    (tmp_path / "data").mkdir()
    fails(config(tmp_path / "data", "csv"), "is empty")
    (tmp_path / "data" / "readme.txt").write_text("")
    fails(config(tmp_path / "data", "csv"), "contains no CSV: neither dataset.csv nor exactly one other")
    expected = content(read(make(tmp_path / "data")))
    assert content(load_dataset(config(tmp_path / "data", "csv"))) == expected
    monkeypatch.setenv("VPM_DATA", str(tmp_path / "data"))
    assert content(load_dataset(config("", "csv"))) == expected
    (tmp_path / "data" / "other.CSV").write_text("")
    fails(
        config(tmp_path / "data", "csv"), "contains several CSV files (other.CSV, own.csv): set config.data.root to one"
    )
    (tmp_path / "data" / "own.csv").rename(tmp_path / "data" / "dataset.csv")
    assert content(load_dataset(config(tmp_path / "data", "csv"))) == expected
    (tmp_path / "data" / "csv.zip").write_bytes(b"another thing")
    assert content(load_dataset(config(tmp_path / "data", "csv"))) == expected


def changed(old: str, new: str) -> str:
    assert old in ROWS
    return ROWS.replace(old, new, 1)


@pytest.mark.parametrize(
    ("text", "line", "parts"),
    [
        (changed("identity,", "person,"), 1, ["there is no column identity in the header 'path,person,camera,split'"]),
        (changed("path,identity", "file,name"), 1, ["no column path and no identity", "camera is optional"]),
        (ROWS.split("\n", 1)[1], 1, ["there is no column path", "expected path,identity,camera,split"]),
        (changed("camera", "split"), 1, ["the column split occurs twice"]),
        (changed("carl,1,query", "carl,1,test"), 6, ["the split is 'test'", "expected train, query or gallery"]),
        (changed("carl,1,query", "carl,1,"), 6, ["the split is empty"]),
        (changed("images/b2.jpg", "images/none.jpg"), 5, ["there is no file 'images/none.jpg'", "relative to"]),
        (changed("images/b2.jpg", "images"), 5, ["there is no file 'images'"]),
        (changed("images/b2.jpg,9", ",9"), 5, ["the path is empty"]),
        (changed(",10,", ", ,"), 4, ["the identity is empty"]),
        (changed("9,1", "9,"), 5, ["the camera is empty", "remove the column"]),
        (changed("images/c2.jpg", "images/a2.jpg"), 7, ["images/a2.jpg is also in line 3", "every image once"]),
        (changed("images/c2.jpg", "images/../images/a2.jpg"), 7, ["is also in line 3"]),
        (changed("images/c2.jpg", "images\\a2.jpg"), 7, ["is also in line 3"]),
        (changed("anna,2,train", "anna,2"), 3, ["3 values for the 4 columns of the header", "by commas"]),
        (changed("anna,2,train", "anna,2").replace(",", ";"), 3, ["3 values for the 4 columns", "by semicolons"]),
        (changed("anna,2,train", "anna,2,train,x"), 3, ["5 values for the 4 columns"]),
        (changed("anna,2", "Smith, Anna,2"), 3, ["quote values that contain them"]),
        (changed("anna,2", '"anna,2'), 3, ["unbalanced quotes"]),
        (changed("anna,2", '"an"na,2'), 3, ["unbalanced quotes"]),
        (changed("carl,1,query", "carl,1,test").replace("\n", "\r\n"), 6, ["the split is 'test'"]),
        ("\n\n" + changed("carl,1,query", "carl,1,test"), 8, ["the split is 'test'"]),
        (changed("anna,1", '"an\nna",1').replace("9,1", "9,"), 6, ["the camera is empty"]),
        (changed("camera", "pid").replace("identity", "pid"), 1, ["the column identity occurs twice"]),
    ],
)
def test_errors_name_the_line(tmp_path, text, line, parts):
    table = make(tmp_path, text)
    fails(config(table, "csv"), f"Line {line} of {table}: ", *parts)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (jpeg(1), "is not a text file: save it as UTF-8"),
        (b"", "is empty: expected the header path,identity,camera,split"),
        (b"\n\n,,\n", "is empty"),
        (ROWS.splitlines()[0].encode(), "own.csv lists no image"),
    ],
)
def test_other_data_are_not_tables(tmp_path, data, part):
    fails(config(make(tmp_path, data), "csv"), str(tmp_path), part)


def test_prepared_is_the_same(table, tmp_path, capsys):
    expected = content(read(table))
    for number, text in enumerate((ROWS, ROWS.replace("camera", "notes"))):
        make(tmp_path, text)
        output = tmp_path / f"out{number}"
        prepare(["csv", "--source", str(table), "--output", str(output)])
        folder = arrayrecord.folder_of(output, "csv")
        assert f"--config.data.name=csv --config.data.root={folder}" in capsys.readouterr().out
        for root in (output, folder):
            dataset = load_dataset(config(root, "csv"))
            if number:
                assert dataset.train.camera is None and "Ignored the column notes." in dataset.notes
                assert dataset.train.read(2) == expected["train"][2][3]
            else:
                assert content(dataset) == expected


def test_own_pictures_are_turned_as_a_viewer_shows_them(table):
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 255  # white on the right; the tag says that this side is to be the bottom
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(table.parent / "images" / "c1.jpg", exif=exif)
    settings = config_lib.default()
    settings.data.height, settings.data.width, settings.data.threads, settings.eval.batch = 16, 8, 0, 1
    for root in (table, arrayrecord.write(read(table), table.parent / "out")):
        [batch] = eval_batches(settings, load_dataset(config(root, "csv")).query)
        assert batch["image"][0, :6].max() < 50 and batch["image"][0, 10:].min() > 200
        assert batch["camera"].tolist() == [1]


def test_an_image_that_vanished_is_named(table):
    dataset = read(table)
    (table.parent / "images" / "b1.jpg").unlink()
    with pytest.raises(UserError, match=r"images/b1\.jpg cannot be read: No such file"):
        dataset.train.read(2)
