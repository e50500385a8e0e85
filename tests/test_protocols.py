"""Each dataset by its own protocol: a generated tree as it is distributed, evaluated as a float64 evaluator does.

Trees, labels and rules are written from the datasets' descriptions, independently of the readers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from market_files import config as data_config
from plain_matching import reference as plain_distance
from plain_metrics import reference

from vpm_jax import config as config_lib
from vpm_jax import evaluation
from vpm_jax.data.datasets import DATASETS
from vpm_jax.data.sources import load_test_set
from vpm_jax.description import Description, FeatureSource

PEOPLE = range(11, 19)


class Image(NamedTuple):
    path: str
    split: str  # "query" | "gallery" | "box": of a query's identity and camera | "": not evaluated
    identity: int
    camera: int | None = None


def cross_camera(path: Callable[[str, int, int, int], str], junk: bool = False) -> list[Image]:
    """Each person as query of one or two cameras and in the gallery of all but one; distractors and junk if asked."""
    images = []
    for i in PEOPLE:
        for camera in (1, 2, 3):
            if camera <= 1 + i % 2:
                images.append(Image(path("query", i, camera, 0), "query", i, camera))
            if camera != i % 3 + 1:
                images += [Image(path("gallery", i, camera, n), "gallery", i, camera) for n in (1, 2)]
    for i in (-1, 0) if junk else ():
        images += [Image(path("gallery", i, n % 3 + 1, n), "gallery", i, n % 3 + 1) for n in range(4)]
    images += [Image(path("train", i, 1, n), "", i, 1) for i in (1, 2) for n in (1, 2)]
    return images


def market(middle: str) -> list[Image]:
    folders = {"query": "query", "gallery": "bounding_box_test", "train": "bounding_box_train"}

    def path(split: str, identity: int, camera: int, number: int) -> str:
        who = "-1" if identity == -1 else f"{identity:04d}"
        return f"{folders[split]}/{who}_c{camera}{middle}{number:06d}.jpg"

    return cross_camera(path, junk=True)


def msmt(train: str, test: str) -> list[Image]:
    """The lists are written by `write`. Identities count from 0, apart in training and test; cameras are the third
    field of a name."""

    def path(split: str, identity: int, camera: int, number: int) -> str:
        folder = train if split == "train" else test
        return f"{folder}/{identity:04d}/{identity:04d}_{number:03d}_{camera:02d}_0303morning_{split}_0.jpg"

    return cross_camera(path)


def folders_of_people(cameras: bool) -> list[Image]:
    def path(split: str, identity: int, camera: int, number: int) -> str:
        return f"{split}/person {identity}/{number}_{f'c{camera}' if cameras else camera}.png"

    return [image if cameras else image._replace(camera=None) for image in cross_camera(path)]


def partial_and_whole(query: str, gallery: str, name: str, images: int, other: str = "") -> list[Image]:
    """`images` query and gallery images of each person, in two folders; a third is not used."""
    used = {query: "query", gallery: "gallery"} | ({other: ""} if other else {})
    return [
        Image(f"{folder}/{name.format(i=i, n=n)}", split, i)
        for folder, split in used.items()
        for i in PEOPLE
        for n in range(1, images + 1)
    ]


OCCLUDED, WHOLE, PARTIAL = "occluded_body_images", "whole_body_images", "partial_body_images"
P_DUKE = partial_and_whole(f"test/{OCCLUDED}", f"test/{WHOLE}", "{i:04d}/{i:04d}_{n}_00{n}.jpg", 3)
P_DUKE += [Image(f"train/{folder}/0001/0001_{n}.jpg", "", 1) for folder in (OCCLUDED, WHOLE) for n in (1, 2)]

# name of the case: (dataset, images, the same camera is dropped, single-shot is reported too)
CASES = {
    "market1501": ("market1501", market("s1_"), True, False),
    "dukemtmc": ("dukemtmc", market("_f"), True, False),
    "occluded_dukemtmc": ("occluded_dukemtmc", market("_f"), True, False),
    "cuhk03_np": ("cuhk03_np", market("_"), True, False),
    "msmt17 v1": ("msmt17", msmt("train", "test"), True, False),
    "msmt17 v2": ("msmt17", msmt("mask_train_v2", "mask_test_v2"), True, False),
    "p_dukemtmc": ("p_dukemtmc", P_DUKE, False, False),
    "occluded_reid": (
        "occluded_reid",
        partial_and_whole(OCCLUDED, WHOLE, "{i:03d}/{i:03d}_{n:02d}.tif", 5),
        False,
        False,
    ),
    "partial_reid": (
        "partial_reid",
        partial_and_whole(PARTIAL, WHOLE, "{i:03d}_{n:03d}.jpg", 5, OCCLUDED),
        False,
        True,
    ),
    "partial_reid_occluded": (
        "partial_reid_occluded",
        partial_and_whole(OCCLUDED, WHOLE, "{i:03d}_{n:03d}.jpg", 5, PARTIAL),
        False,
        True,
    ),
    "partial_ilids": ("partial_ilids", partial_and_whole("Probe", "Gallery", "{i}.jpg", 1), False, False),
    "partial_ilids_nocrop": (
        "partial_ilids_nocrop",
        partial_and_whole("partial_iLIDS_Probe_nocrop", "Gallery", "{i}.jpg", 1, "Probe"),
        False,
        False,
    ),
    "identity_folders": ("identity_folders", folders_of_people(True), True, False),
    "identity_folders without cameras": ("identity_folders", folders_of_people(False), False, False),
    "csv": ("csv", folders_of_people(True), True, False),
}


def write(root: Path, images: list[Image], name: str = "") -> Path:
    for image in images:
        path = root / image.path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    if any(image.path.startswith(("mask_", "test/0")) for image in images):  # MSMT17
        lists = {"query": "query", "gallery": "gallery", "": "train"}
        for split, title in lists.items():
            lines = [
                f"{i.path.partition('/')[2]} {i.identity - (11 if split else 1)}" for i in images if i.split == split
            ]
            (root / f"list_{title}.txt").write_text("\n".join(lines) + "\n")
    if name == "csv":
        lines = [f"{i.path},{i.identity},{i.camera},{i.split or 'train'}" for i in images]
        (root / "images.csv").write_text("\n".join(["path,identity,camera,split", *lines]))
    return root


def features_of(name: str, identity: int) -> tuple[np.ndarray, np.ndarray]:
    """Features [P, C] of unit length and visibility [P] of an image; those of an identity are similar."""
    random = np.random.default_rng(zlib.crc32(name.encode()))
    x = random.standard_normal((3, 4)) + np.random.default_rng(identity + 1).standard_normal((3, 4))
    return np.float32(x / np.linalg.norm(x, axis=-1, keepdims=True)), np.float32(random.uniform(0, 9, 3))


class Files(FeatureSource):
    """Features by the names of images, as `features_of` gives them to the plain evaluator."""

    def __init__(self, config, identities: dict[str, int]):
        self.config, self._identities = config, identities

    def stream(self, variables, images, stops, progress):
        described = [features_of(name, self._identities[name]) for name in images.split.names]
        progress.add(len(described))
        for begin, end in zip([0, *stops], [*stops, len(described)], strict=True):
            yield Description(*(np.stack(arrays) for arrays in zip(*described[begin:end], strict=True)))


def stacked(images: list[Image]) -> tuple[np.ndarray, np.ndarray]:
    features, visibility = zip(*(features_of(image.path, image.identity) for image in images), strict=True)
    return np.stack(features), np.stack(visibility)


def evaluated(root: Path, name: str, images: list[Image], **keys):
    config = config_lib.default()
    config.data = data_config(root, name)
    config.eval.gammas = (1.0,)
    for key, value in keys.items():
        config_lib.set_key(config, key.replace("__", "."), value)
    dataset = load_test_set(config.data)
    evaluation.check(config, dataset)
    source = Files(config, {image.path: image.identity for image in images})
    return evaluation.evaluate(source, {}, dataset)


def plain(query, gallery, distance, drops: bool):
    cameras = [[image.camera for image in images] for images in (query, gallery)] if drops else []
    expected, _ = reference(distance, [i.identity for i in query], [i.identity for i in gallery], *cameras)
    return expected


def assert_same(found, expected) -> None:
    np.testing.assert_allclose(found["cmc"], expected["cmc"][: len(found["cmc"])])
    assert found["mAP"] == pytest.approx(expected["mAP"]) and found["skipped"] == expected["skipped"]


def test_every_dataset_has_a_case():
    assert {name for name, *_ in CASES.values()} == set(DATASETS) - {"synthetic"}  # which has Market-1501's layout


@pytest.mark.parametrize("case", CASES)
def test_metrics_are_those_of_the_protocol(tmp_path, case):
    name, images, drops, single_shot = CASES[case]
    results = evaluated(write(tmp_path / "root", images, name), name, images)
    query, gallery = ([i for i in images if i.split == split] for split in ("query", "gallery"))
    ranked = [image for image in gallery if image.identity != -1]
    distance = plain_distance(*stacked(query), *stacked(ranked))
    expected = plain(query, ranked, distance, drops)
    assert 0 < expected["mAP"] < 1
    is_partial = name.startswith(("partial", "occluded", "p_"))
    assert list(results) == (["all-shot"] + ["single-shot"] * single_shot if is_partial else [1.0])
    assert_same(next(iter(results.values())), expected)
    if single_shot:  # the k-th image of each person against the g-th
        pairs = [(k, g) for k in range(5) for g in range(5)]
        firsts = [plain(query[k::5], ranked[g::5], distance[k::5, g::5], False) for k, g in pairs]
        for rank in (1, 3, 5):
            mean = np.mean([first["cmc"][rank - 1] for first in firsts])
            assert results["single-shot"]["cmc"][rank - 1] == pytest.approx(mean)


def test_same_camera_may_stay(tmp_path):
    name, images, *_ = CASES["market1501"]
    results = evaluated(write(tmp_path, images), name, images, eval__same_camera="keep")
    query, ranked = ([i for i in images if i.split == s and i.identity != -1] for s in ("query", "gallery"))
    assert_same(results[1.0], plain(query, ranked, plain_distance(*stacked(query), *stacked(ranked)), False))


def test_distractors_are_nobody(tmp_path, monkeypatch):
    """Market-1501 + 500k: distractors may have names of junk and distractors, or none."""
    monkeypatch.setattr("vpm_jax.distances.PIECE_BYTES", 1)
    name, images, *_ = CASES["market1501"]
    more = ["0000_c1s1_000000_01.jpg", *(f"{n}.jpg" for n in range(20))]
    write(tmp_path, images)
    write(tmp_path / "images", [Image(path, "", 0) for path in more])
    images = images + [Image(path, "gallery", 0, 0) for path in more]
    found = evaluated(tmp_path, name, images, data__distractors="images", eval__batch=4)
    query, ranked = ([i for i in images if i.split == s and i.identity != -1] for s in ("query", "gallery"))
    expected = plain(query, ranked, plain_distance(*stacked(query), *stacked(ranked)), True)
    assert_same(found[1.0], expected)
    assert (
        expected["mAP"]
        < plain(query, ranked[:-21], plain_distance(*stacked(query), *stacked(ranked[:-21])), True)["mAP"]
    )


def test_multiple_query(tmp_path):
    """Market-1501's gt_bbox: the boxes of a query's identity and camera stand for it, averaged by visibility."""
    name, images, *_ = CASES["market1501"]
    boxes = [
        Image(f"gt_bbox/{q.identity:04d}_c{q.camera}s1_{n}.jpg", "box", q.identity, q.camera)
        for q in images
        if q.split == "query"
        for n in range(1 + q.identity % 3)
    ]
    boxes.append(Image("gt_bbox/0011_c3s1_7.jpg", "", 11, 3))  # not a query's camera
    root = write(tmp_path, images + boxes)
    found = evaluated(root, name, images + boxes, eval__multi_query=True)
    query, ranked = ([i for i in images if i.split == s and i.identity != -1] for s in ("query", "gallery"))
    pooled = []
    for q in query:
        features, visibility = stacked([b for b in boxes if (b.split, *b[2:]) == ("box", *q[2:])])
        weight = np.float64(visibility)
        mean = (weight[..., None] * features).sum(0)
        pooled.append((mean / np.linalg.norm(mean, axis=-1, keepdims=True), (weight**2).sum(0) / weight.sum(0)))
    distance = plain_distance(*(np.stack(x) for x in zip(*pooled, strict=True)), *stacked(ranked))
    assert_same(found[1.0], plain(query, ranked, distance, True))
