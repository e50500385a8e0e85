"""The synthetic pedestrians: the folder's layout, bytes that depend on the arguments alone, and what goes wrong."""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from paths import ROOT

from vpm_jax.data import synthetic
from vpm_jax.data.pedestrians.canvas import Canvas
from vpm_jax.data.pedestrians.figure import Pose, draw_person
from vpm_jax.data.pedestrians.people import FAMILY, person, visible_differences
from vpm_jax.errors import UserError

SMALL = dict(seed=5, train_identities=3, test_identities=4, images_per_camera=3, cameras=2)
NAME = re.compile(r"^(-1|\d{4})_c(\d)s\d_\d{6}_\d{2}\.jpg$")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthetic.ensure(tmp_path_factory.mktemp("data"), **SMALL)


def listing(folder: Path, split: str) -> list[tuple[int, int]]:
    """(identity, camera) of every file, read from the names as the readers of Market-1501 do."""
    matches = [NAME.match(file.name) for file in (folder / split).iterdir()]
    assert all(matches)
    return [(int(m[1]), int(m[2])) for m in matches if m]


def digest(folder: Path) -> dict[str, str]:
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*.jpg")}


def test_layout(folder: Path) -> None:
    train, query, gallery = (listing(folder, s) for s in ("bounding_box_train", "query", "bounding_box_test"))
    people = {identity for identity, _ in gallery} - {-1, 0}
    assert (
        Counter(train) == {(i, c): 3 for i in {i for i, _ in train} for c in (1, 2)} and len({i for i, _ in train}) == 3
    )
    assert Counter(query) == {(i, c): 1 for i in people for c in (1, 2)} and len(people) == 4
    assert Counter(x for x in gallery if x[0] > 0) == {(i, c): 2 for i in people for c in (1, 2)}
    assert {-1, 0} < {identity for identity, _ in gallery}
    assert not people & {i for i, _ in train}
    assert min(people | {i for i, _ in train}) > 0


def test_images(folder: Path) -> None:
    contents = set()
    for file in folder.rglob("*.jpg"):
        image = cv2.imread(str(file))
        assert image.shape == (128, 64, 3) and image.std() > 10
        contents.add(image.tobytes())
    assert len(contents) == len(digest(folder))  # no two images are the same


def test_the_same_bytes_in_another_process(folder: Path, tmp_path: Path) -> None:
    code = f"import sys; from vpm_jax.data import synthetic; synthetic.ensure(sys.argv[1], **{SMALL})"
    code += "; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, cwd=ROOT)
    assert digest(tmp_path / folder.name) == digest(folder)


def test_other_arguments_make_another_folder(tmp_path: Path, folder: Path) -> None:
    other = synthetic.ensure(tmp_path, **{**SMALL, "seed": 6})
    assert other.name != folder.name
    mine, theirs = digest(folder), digest(other)
    assert mine.keys() == theirs.keys() and not set(mine.values()) & set(theirs.values())


def test_rendered_once_with_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []
    folder = synthetic.ensure(tmp_path, **SMALL, progress=lambda done, total: calls.append((done, total)))
    total = len(digest(folder))
    assert calls == [(i, total) for i in range(1, total + 1)]
    monkeypatch.setattr(synthetic, "encode", lambda *_: pytest.fail("rendered again"))
    assert synthetic.ensure(tmp_path, **SMALL) == folder
    min((folder / "query").iterdir()).unlink()
    with pytest.raises(UserError, match=r"lacks 1 of its \d+ images, such as query/.*: delete the folder"):
        synthetic.ensure(tmp_path, **SMALL)


def test_interrupted_rendering_leaves_nothing(tmp_path: Path, folder: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synthetic.ensure(tmp_path, **SMALL, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    # A killed process cannot clean up: what it leaves is neither taken for the dataset nor in the way.
    leftover = tmp_path / f".{folder.name}.1-00000000" / "query"
    leftover.mkdir(parents=True)
    (leftover / "0004_c1s1_000001_01.jpg").write_bytes(b"half")
    assert digest(synthetic.ensure(tmp_path, **SMALL)) == digest(folder)


def test_two_processes_at_once(tmp_path: Path, folder: Path) -> None:
    first: list[Path] = []

    def race(done: int, total: int) -> None:
        if done == total:  # another one finishes just before us
            first.append(synthetic.ensure(tmp_path, **SMALL))

    assert synthetic.ensure(tmp_path, **SMALL, progress=race) == first[0]
    assert [p.name for p in tmp_path.iterdir()] == [folder.name] and digest(first[0]) == digest(folder)


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "read-only"), (errno.EIO, "error: choose")]
)
def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str) -> None:
    def fail(self: Path, data: bytes) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(UserError, match=words) as error:
        synthetic.ensure(tmp_path, **SMALL)
    assert str(tmp_path) in str(error.value) and "config.data.root" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file"):
        synthetic.ensure(tmp_path / "file", **SMALL)


@pytest.mark.parametrize(
    "change",
    [
        dict(train_identities=0),
        dict(test_identities=9999),
        dict(cameras=1),
        dict(cameras=10),
        dict(images_per_camera=1),
    ],
)
def test_numbers_that_make_no_dataset(tmp_path: Path, change: dict[str, int]) -> None:
    with pytest.raises(UserError, match=r"config\.data\.synthetic"):
        synthetic.ensure(tmp_path, **{**SMALL, **change})
    assert list(tmp_path.iterdir()) == []


def test_families_dress_alike_and_differ_visibly() -> None:
    for family in range(20):
        people = [person(0, synthetic.TEST, family * FAMILY + i) for i in range(FAMILY)]
        for a, b in itertools.combinations(people, 2):
            assert visible_differences(a, b) >= 1
        assert all(visible_differences(people[0], other) <= 2 for other in people)
    strangers = [person(0, synthetic.TEST, i * FAMILY) for i in range(20)]
    differences = [visible_differences(a, b) for a, b in itertools.combinations(strangers, 2)]
    assert np.mean(differences) > 4.5


def test_a_print_shows_from_the_front_only() -> None:
    who = person(0, 0, 0)
    changes = dict(
        upper="tshirt",
        upper_pattern="print",
        upper_color=(0.1, 0.1, 0.1),
        upper_second=(0.9, 0.1, 0.1),
        bag="none",
        hair="crop",
    )
    who = replace(who, **changes)
    red = []
    for yaw in (0.0, np.pi):
        canvas = Canvas(np.full((3, 256, 128), 0.5, np.float32), np.array([0.0, -0.6, 0.8]))
        pose = Pose(yaw=yaw, pitch=0.1, phase=0.0, stride=0.3, swing=0.3, bend=0.3, lean=0.0)
        draw_person(canvas, who, pose, x=64, ground=246, scale=230)
        chest = canvas.pixels[:, 60:110, 52:76]
        red.append(float((chest[0] - chest[1] > 0.3).mean()))
    assert red[0] > 0.2 and red[1] == 0.0
