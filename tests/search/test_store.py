"""Stores: what is written is read, whatever kills the writer; what is damaged is one sentence."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from disk import flip
from raising import raises
from stores import write

from vpm_jax.errors import UserError
from vpm_jax.search import store as store_lib
from vpm_jax.search.store import About, Entry, Rows, Store, Writer

ABOUT = About(model="0123456789abcdef", config="c0ffee", regions=3, channels=5, dtype="float32")


def example(count, dtype="float32", seed=0):
    draw = np.random.default_rng(seed)
    features = draw.standard_normal((count, 3, 5)).astype(dtype)
    return [f"{seed}/{i:04d}.jpg" for i in range(count)], features, draw.random((count, 3), np.float32)


@pytest.fixture
def folder(tmp_path):
    """A store of 7 images, written in two goes."""
    names, features, visibility = example(7)
    write(tmp_path / "store", ABOUT, names[:4], features[:4], visibility[:4])
    write(tmp_path / "store", ABOUT, names[4:], features[4:], visibility[4:])
    return tmp_path / "store"


def contents(store):
    return store.names, np.asarray(store.features), store.visibility


def assert_same(found, expected):
    assert found[0] == expected[0]
    for x, y in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(x, y, strict=True)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_what_is_written_is_read(tmp_path, dtype):
    names, features, visibility = example(9, dtype)
    write(tmp_path, dataclasses.replace(ABOUT, dtype=dtype, extra={"root": "/x"}), names, features, visibility)
    store = Store(tmp_path)
    assert_same(contents(store), (names, features, visibility))
    assert (len(store), store.about.model, store.about.config, store.about.extra) == (
        9,
        ABOUT.model,
        "c0ffee",
        {"root": "/x"},
    )
    store.verify()


def test_names_may_be_anything(tmp_path):
    names = ["a\nb.jpg", 'q"\\.jpg', "行人.jpg", os.fsdecode(b"\xff\xfe.jpg"), "\u2028.jpg", ""]
    entries = [Entry(name, i, 10**18 + i) for i, name in enumerate(names)]
    with Writer(tmp_path, ABOUT) as writer:
        writer.append(entries, *example(6)[1:])
    assert Store(tmp_path).entries == entries


def test_rows_are_mapped_slices(folder):
    features, expected = Store(folder).features, example(7)[1]
    assert features.shape == (7, 3, 5) and features.dtype == np.float32 and len(features) == 7
    for rows in (slice(None), slice(2, 5), slice(5, 100), slice(4, 2), slice(1, None, 3), slice(-2, None)):
        np.testing.assert_array_equal(features[rows], expected[rows])
    np.testing.assert_array_equal(features[np.array([6, 0, 6])], expected[[6, 0, 6]])
    assert isinstance(features, Rows) and not features[1:3].flags.writeable
    with pytest.raises(ValueError, match="positive step"):
        features[::-1]


def test_mapping_starts_anywhere_in_a_large_file(tmp_path):
    """Pages are mapped from multiples of their size; rows start where they will."""
    features = np.arange(3000 * 15, dtype=np.float32).reshape(3000, 3, 5)
    write(tmp_path, ABOUT, map(str, range(3000)), features, np.ones((3000, 3)))
    store = Store(tmp_path)
    for first in (1, 137, 1365, 2999):
        np.testing.assert_array_equal(store.features[first : first + 40], features[first : first + 40])
    for scattered in ([2999, 5, 137, 5], [2000], range(7, 900, 31), range(40, 90), []):
        rows = np.array(scattered, int)
        np.testing.assert_array_equal(store.features[rows], features[rows])


def test_an_empty_store(tmp_path):
    write(tmp_path, ABOUT, [], np.empty((0, 3, 5)), np.empty((0, 3)))
    assert_same(contents(Store(tmp_path)), ([], np.empty((0, 3, 5), np.float32), np.empty((0, 3), np.float32)))


def test_only_what_is_committed_counts(folder):
    more = example(2, seed=1)
    writer = Writer(folder, ABOUT)
    writer.append([Entry(name) for name in more[0]], *more[1:])
    assert_same(contents(Store(folder)), example(7))
    writer.commit()
    assert len(Store(folder)) == 9
    writer.append([Entry(name) for name in more[0]], *more[1:])
    with pytest.raises(KeyError):
        writer.__exit__(KeyError, KeyError(), None)
        raise KeyError
    assert len(Store(folder)) == 9
    Writer(folder, ABOUT).__exit__(None, None, None)  # what lies past the end is cut off
    assert (folder / "features-0.bin").stat().st_size == 9 * 60


@pytest.mark.parametrize("kept", [[], [0], [1, 2, 6], [0, 2, 3, 4, 5]])
@pytest.mark.parametrize("copy_bytes", [1, 2**20])
def test_keeping_some(folder, monkeypatch, kept, copy_bytes):
    monkeypatch.setattr(store_lib, "_COPY_BYTES", copy_bytes)
    names, features, visibility = example(7)
    before = Store(folder)
    with Writer(folder, ABOUT) as writer:
        writer.keep(np.isin(np.arange(7), kept))
        more = example(2, seed=1)
        writer.append([Entry(name) for name in more[0]], *more[1:])
    expected = (
        [names[i] for i in kept] + more[0],
        np.concatenate([features[kept], more[1]]),
        np.concatenate([visibility[kept], more[2]]),
    )
    after = Store(folder)
    assert_same(contents(after), expected)
    after.verify()
    assert_same(contents(before), (names, features, visibility))  # as it was opened
    files = {path.name for path in folder.iterdir()}
    assert files == {"store.json", "lock", "features-1.bin", "visibility-1.bin", "names-1.jsonl"}


def test_keeping_all_writes_nothing(folder):
    with Writer(folder, ABOUT) as writer:
        writer.keep(np.ones(7, bool))
    assert Store(folder).about.generation == 0


def test_a_failed_removal_leaves_all(folder, monkeypatch):
    with Writer(folder, ABOUT) as writer:
        monkeypatch.setattr(writer, "append", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(OSError):
            writer.keep(np.arange(7) < 3)
        monkeypatch.undo()
        more = example(1, seed=1)
        writer.append([Entry("new")], *more[1:])
    assert Store(folder).names == [*example(7)[0], "new"]


WRITER = """
import sys, numpy as np
from vpm_jax.search.store import About, Entry, Writer
about = About(model="m", config="c", regions=2, channels=3, dtype="float32")
with Writer(sys.argv[1], about) as writer:
    print("ready", flush=True)
    at = writer.about.count and int(__import__("vpm_jax.search.store").search.store.Store(sys.argv[1]).names[-1]) + 1
    while True:
        numbers = np.arange(at, at + 5)
        writer.append([Entry(str(i)) for i in numbers], np.tile(numbers[:, None, None], (1, 2, 3)),
                      np.tile(numbers[:, None], (1, 2)))
        at += 5
        if at % 3 == 0: writer.commit()
        if at % 200 == 0: writer.keep(np.arange(writer.about.count) % 2 == 0)
"""


def test_a_kill_at_any_moment_leaves_a_whole_store(tmp_path):
    draw = random.Random(0)
    last = -1
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path / "s"], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(draw.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        store = Store(tmp_path / "s")
        store.verify()
        numbers = np.array([int(name) for name in store.names])
        np.testing.assert_array_equal(np.asarray(store.features), np.tile(numbers[:, None, None], (1, 2, 3)))
        np.testing.assert_array_equal(store.visibility, np.tile(numbers[:, None], (1, 2)))
        assert (np.diff(numbers) > 0).all()
        assert not len(numbers) or numbers[-1] >= last
        last = numbers[-1] if len(numbers) else last
    assert last > 0


def test_one_writer_at_a_time(folder):
    with Writer(folder, ABOUT), pytest.raises(UserError, match="is being written by another process"):
        Writer(folder, ABOUT)
    with Writer(folder, ABOUT):
        pass


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "f" * 16}, r"made by another model \(fingerprint 0123456789abcdef, that of .* is f{16}\)"),
        ({"channels": 6}, "holds 3 x 5 float32, not 3 x 6 float32"),
        ({"dtype": "float16"}, "holds 3 x 5 float32, not 3 x 5 float16"),
        ({"dtype": "int8"}, "holds float16 or float32, not int8"),
    ],
)
def test_what_does_not_fit_the_store(folder, change, sentence):
    with pytest.raises(UserError, match=sentence) as raised:
        Writer(folder, dataclasses.replace(ABOUT, **change))
    Writer(folder, ABOUT).__exit__(None, None, None)  # though `raised` still holds the one that failed
    assert raised.value.__traceback__ is not None
    assert len(Store(folder)) == 7


@pytest.mark.parametrize(
    ("features", "visibility", "sentence"),
    [
        (np.zeros((2, 3, 4)), np.zeros((2, 3)), r"expected \(2, 3, 5\)"),
        (np.zeros((2, 3, 5)), np.zeros((3, 3)), r"expected \(2, 3, 5\)"),
        (np.full((2, 3, 5), 1e39), np.zeros((2, 3)), "not finite as float32"),
        (np.full((2, 3, 5), np.nan), np.zeros((2, 3)), "not finite as float32"),
        (np.zeros((2, 3, 5)), np.full((2, 3), -1), "negative or not finite"),
    ],
)
def test_what_cannot_be_stored(folder, features, visibility, sentence):
    with Writer(folder, ABOUT) as writer, pytest.raises(ValueError, match=sentence):
        writer.append([Entry("a"), Entry("b")], features, visibility)
    assert_same(contents(Store(folder)), example(7))


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match=r"holds other files \(thesis\.tex\)"):
        Writer(tmp_path, ABOUT)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("path", [".", "nowhere", "store/features-0.bin"])
def test_a_folder_without_a_store_is_refused(folder, path):
    with pytest.raises(UserError, match=r"holds no feature store \(no store\.json\): create one with"):
        Store(folder.parent / path)


def edit(folder, **changes):
    about = json.loads((folder / "store.json").read_text())
    (folder / "store.json").write_text(json.dumps(about | changes))


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda f: edit(f, version=2), "feature store of format 2, this program reads format 1"),
        (lambda f: (f / "store.json").write_text('{"version": 1, '), r"store\.json is damaged"),
        (lambda f: (f / "store.json").write_text("[]"), r"store\.json is damaged"),
        (lambda f: (f / "store.json").write_bytes(b"\xff\x00"), r"store\.json cannot be read"),
        (lambda f: edit(f, count=-1), r"store\.json is damaged \(values out of range"),
        (lambda f: edit(f, count="7"), r"store\.json is damaged"),
        (lambda f: edit(f, count=7.0), r"store\.json is damaged \(numbers that are not whole"),
        (lambda f: edit(f, channels=float("nan")), r"store\.json is damaged"),
        (lambda f: edit(f, checksums={"names": 0.5}), r"store\.json is damaged"),
        (lambda f: edit(f, checksums=[]), r"store\.json is damaged"),
        (lambda f: edit(f, colour=1), r"store\.json is damaged .*colour"),
        (lambda f: edit(f, dtype="int8"), r"store\.json is damaged"),
        (lambda f: (f / "features-0.bin").unlink(), r"features-0\.bin cannot be read"),
        (lambda f: os.truncate(f / "features-0.bin", 100), r"features-0\.bin is cut short \(100 bytes, expected 420\)"),
        (lambda f: os.truncate(f / "names-0.jsonl", 9), r"names-0\.jsonl is cut short"),
        (lambda f: flip(f / "visibility-0.bin"), r"visibility-0\.bin is damaged \(its checksum differs\)"),
        (lambda f: flip(f / "names-0.jsonl"), r"names-0\.jsonl is damaged"),
        (lambda f: flip(f / "features-0.bin"), r"features-0\.bin is damaged"),
    ],
)
def test_damage_is_one_sentence(folder, damage, sentence):
    damage(folder)
    with pytest.raises(UserError, match=sentence) as raised:
        Store(folder).verify()
    assert str(raised.value).endswith(".") and "\n" not in str(raised.value)
    with pytest.raises(UserError):  # nothing is appended to it
        Writer(folder, ABOUT)


def test_a_path_that_is_none(folder):
    with Writer(folder, dataclasses.replace(ABOUT, extra={"model": 3, "folder": "", "other": "a/b"})):
        pass
    store = Store(folder)
    assert (store.path("folder"), store.path("none"), store.path("other")) == (None, None, Path("a/b"))
    with pytest.raises(UserError, match=r"store\.json is damaged \(model is 3, expected a path\)"):
        store.path("model")


def test_a_full_disk_keeps_what_was_committed(folder, monkeypatch):
    writer = Writer(folder, ABOUT)
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    names, *arrays = example(2)
    writer.append([Entry(name) for name in names], *arrays)
    with raises("not-written"):
        writer.commit()
    monkeypatch.undo()
    writer.__exit__(UserError, UserError(), None)
    assert_same(contents(Store(folder)), example(7))
