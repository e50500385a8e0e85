"""An inventory recognizes the data of a split wherever it lies, and counts what differs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from images import Memory
from market_files import config, jpeg, make_folder, make_zip

from vpm_jax.data.inventory import Inventory, digest_of_test_set
from vpm_jax.data.sources import load_dataset
from vpm_jax.data.split import Split


def split_of(people: dict[str, str], seed: int = 0) -> Split:
    """A split of {name: identity}; the seed changes every image."""
    names = sorted(people)
    identity = np.unique([people[name] for name in names], return_inverse=True)[1].astype(np.int32)
    data = tuple(jpeg(1000 * seed + i) for i in range(len(names)))
    return Split("train", tuple(names), identity, None, Memory(data))


PEOPLE = {f"{who}{n}.jpg": who for who in ("anna", "carl", "dora") for n in range(4)}


@pytest.mark.parametrize(
    ("now", "differences"),
    [
        (PEOPLE, ""),
        (PEOPLE | {"bea0.jpg": "bea", "bea1.jpg": "bea"}, "images: 2 added"),
        ({k: v for k, v in PEOPLE.items() if v != "anna"}, "images: 4 removed"),
        (PEOPLE | {"anna0.jpg": "carl"}, "images: 1 relabeled"),
        (PEOPLE | {"anna0.jpg": "bea"}, "images: 1 relabeled"),  # the classes of carl and dora move
        ({k: v for k, v in PEOPLE.items() if k != "anna0.jpg"} | {"eve.jpg": "eve", "anna1.jpg": "dora"}, None),
        (PEOPLE | {k: "zoe" for k in PEOPLE if k.startswith("anna")}, "the same images, with identities"),
    ],
)
def test_differences_are_counted(now, differences):
    before, after = Inventory.of(split_of(PEOPLE)), Inventory.of(split_of(now))
    expected = "images: 1 added, 1 removed, 1 relabeled" if differences is None else differences
    assert before.differences(after).startswith(expected) and bool(expected) == bool(before.differences(after))
    assert (before.digest == after.digest) == (now == PEOPLE)


def test_other_images_under_the_same_names_are_other_data_but_a_repaired_one_is_not():
    before, other = split_of(PEOPLE), split_of(PEOPLE, seed=1)
    assert "(12 of 12 compared)" in Inventory.of(before).differences(Inventory.of(other))
    repaired = replace(before, reader=Memory((jpeg(77), *before.reader.data[1:])))
    assert Inventory.of(before).differences(Inventory.of(repaired)) == ""


def test_the_place_and_the_form_of_a_dataset_do_not_matter(tmp_path):
    folder = make_folder(tmp_path / "one")
    roots = [folder, make_zip(folder, tmp_path / "market.zip"), shutil.copytree(folder, tmp_path / "deep" / "moved")]
    datasets = [load_dataset(config(root)) for root in roots]
    assert len({Inventory.of(dataset.train).digest for dataset in datasets}) == 1
    assert len({digest_of_test_set(dataset.query, dataset.gallery) for dataset in datasets}) == 1
    listed = [split_of({f"{root}/{name}": who for name, who in PEOPLE.items()}) for root in ("/a", "/b/c")]
    assert Inventory.of(listed[0]) == Inventory.of(listed[1])  # a CSV with absolute paths


def test_a_record_is_read_back_and_damage_is_noticed():
    whole = Inventory.of(split_of(PEOPLE | {"caf\udce9.jpg": "anna"}))
    record = json.loads(json.dumps(whole.to_json()))
    assert Inventory.from_json(record) == whole and record["images"] == 13 and record["identities"] == 3
    for key, value in (("labels", [0] * 13), ("names", ["a"]), ("checksums", {})):
        with pytest.raises(ValueError, match="digest"):
            Inventory.from_json(record | {key: value})


def test_a_test_set_is_known_by_matches_and_cameras():
    query, gallery = split_of({"q": "anna"}), split_of({"g": "anna", "h": "bob"})
    digest = digest_of_test_set(query, gallery)
    renumbered = [replace(split, identity=split.identity + 5) for split in (query, gallery)]
    assert digest_of_test_set(*renumbered) == digest
    assert digest_of_test_set(replace(query, identity=np.array([1], np.int32)), gallery) != digest
    cameras = [replace(split, camera=np.zeros(len(split), np.int32)) for split in (query, gallery)]
    assert digest_of_test_set(*cameras) != digest


def test_an_image_that_cannot_be_read_is_left_to_its_reader(tmp_path: Path):
    folder = make_folder(tmp_path / "one")
    dataset = load_dataset(config(folder))
    before = Inventory.of(dataset.train)
    min((folder / "bounding_box_train").glob("*.jpg")).unlink()
    assert before.differences(Inventory.of(dataset.train)) == ""
