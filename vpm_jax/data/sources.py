"""Datasets from a folder, an official zip or ArrayRecord, and own images listed in a CSV.

`load_dataset` reads names only. A Split hands out the encoded bytes of an image, and travels to loader
processes, which open the files themselves.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from vpm_jax.data import folders, table
from vpm_jax.data.folders import TITLES, Place
from vpm_jax.data.split import Dataset, Reader, Split
from vpm_jax.errors import UserError

# Images and identities (above 0) of each split, as the datasets' authors give them.
OFFICIAL = {
    "market1501": {"train": (12936, 751), "query": (3368, 750), "gallery": (19732, 750)},
    "dukemtmc": {"train": (16522, 702), "query": (2228, 702), "gallery": (17661, 1110)},
    "partial_reid": {"query": (300, 60), "gallery": (300, 60)},
    "partial_ilids": {"query": (119, 119), "gallery": (119, 119)},
}

# How the commands name a dataset's place.
_BY = "by --config.data.root (evaluate and benchmark data: --root, prepare: --source)"


def data_root(root: str) -> Path:
    """The path that `config.data.root` means: "" is $VPM_DATA, else ./data."""
    return Path(root or os.environ.get("VPM_DATA") or "data").expanduser()


def load_dataset(config_data: Any) -> Dataset:
    """Finds and lists the dataset that `config.data` names (keys name, root, synthetic, holdout_identities).

    The root is a dataset's folder, its official zip, a folder of `vpm_jax.prepare`, or a folder that holds one of
    these under a usual name; of own images it is their CSV (see `vpm_jax.data.table`), or the folder that holds it.
    Synthetic pedestrians are rendered under the root unless it is such a dataset itself. A dataset for testing alone
    has an empty training set. Raises UserError for an unknown name, and when no whole dataset is there. Counts that
    differ from the official ones are notes, not errors: people use subsets.
    """
    name, root = config_data.name, data_root(config_data.root)
    if name not in TITLES:
        raise UserError(f"config.data.name is {name!r}, but the known datasets are {', '.join(TITLES)}.")
    place = _synthetic_place(config_data, root) if name == "synthetic" else _place(config_data, root)
    notes: list[str] = []
    splits = _prepared_splits(place, name, notes) if place.form == "prepared" else _file_splits(place, name, notes)
    for split in {"train", "query", "gallery"} - set(splits):
        splits[split] = Split(split, (), np.empty(0, np.int32), None)
    notes = [_summary(name, place, splits), *notes, *_unexpected(name, splits)]
    dataset = Dataset(name, notes=tuple(dict.fromkeys(notes)), **splits)  # a prepared one repeats what it was told
    dataset = _hold_out(dataset, config_data.holdout_identities)
    for test in (dataset.query, dataset.gallery):
        if not len(test):
            raise UserError(
                f"{place} has no {test.name} image, so nothing can be evaluated: "
                "add some, or set config.data.holdout_identities to make them of training identities."
            )
    return dataset


def _place(config_data: Any, root: Path) -> Place:
    title = TITLES[config_data.name]
    origin = "" if config_data.root else f" ({'$VPM_DATA' if os.environ.get('VPM_DATA') else 'the default'})"
    if config_data.name == "csv":
        lacks = "no CSV: neither dataset.csv nor exactly one other"
        advice = f"give a CSV with the header {','.join(table.COLUMNS)} {_BY}"
    else:
        official = ", ".join(folders.LAYOUTS[config_data.name].official.values())
        lacks = f"no {title}: neither the folders {official}, nor a folder or zip under a usual name such as {title}"
        advice = f"put the folder or the zip of {title} there, or " + (
            f"give it {_BY}, or take the dataset synthetic, which needs no download"
            if "train" in folders.LAYOUTS[config_data.name].folders
            else "give it by python -m vpm_jax.evaluate --root"
        )
    if not root.exists():
        raise UserError(f"{root}{origin} does not exist: {advice}.")
    place = folders.locate(root, config_data.name)
    if place is None and not any(root.iterdir()):
        raise UserError(f"{root}{origin} is empty: {advice}.")
    if place is None and config_data.name != "csv" and (named := folders.under_usual_name(root, config_data.name)):
        lacks = f"no {title}: the folder {named.name} has none of {official}"
    if place is None:
        raise UserError(f"{root}{origin} holds {lacks}; {advice}.")
    return place


def _synthetic_place(config_data: Any, root: Path) -> Place:
    # Only the root itself is looked at: what else lies below it may have been rendered with other parameters.
    place = folders.locate(root, "synthetic", search=False) if root.exists() else None
    if place is not None:
        return place
    from vpm_jax.data import synthetic

    return Place("folder", synthetic.ensure(root, **config_data.synthetic, progress=_show_rendering))


def _show_rendering(done: int, total: int) -> None:
    if done % 50 == 0 or done == total:
        end = "\n" if done == total else ""
        print(f"\rRendering synthetic pedestrians: {done:,} of {total:,}", end=end, file=sys.stderr, flush=True)


def _file_splits(place: Place, name: str, notes: list[str]) -> dict[str, Split]:
    """The splits of a folder, a zip or a CSV; what was left out goes to `notes`."""
    reader: Reader
    if place.form == "zip":
        inside, listings, found = folders.list_zip(place.path, name)
        reader = folders.ZipReader(place.path.absolute(), inside)
    elif place.form == "csv":
        listings, found = table.read(place.path)
        reader = folders.FolderReader(place.path.absolute().parent)
    else:
        listings, found = folders.list_folder(place.path, name)
        reader = folders.FolderReader(place.path.absolute())
    notes += found
    splits = {}
    for split, listing in listings.items():
        splits[split] = Split(split, listing.names, listing.identity, listing.camera, reader, upright=name == "csv")
    if "train" in splits:
        nobody = splits["train"].identity <= 0
        if nobody.all():
            raise UserError(f"{place} has no training image of an identity above 0, so nothing can be learned from it.")
        if nobody.any():
            images = _count(nobody.sum(), "training image")
            notes.append(f"Left out {images} of identity -1 or 0, which stand for nobody.")
            splits["train"] = splits["train"].take(~nobody)
    return splits


def _prepared_splits(place: Place, name: str, notes: list[str]) -> dict[str, Split]:
    from vpm_jax.data import arrayrecord  # imports TFDS, which takes a second

    splits, prepared_notes = arrayrecord.read(place.path.absolute(), name)
    notes += prepared_notes
    return splits


def _summary(name: str, place: Place, splits: dict[str, Split]) -> str:
    parts = []
    for split, title in (("train", "training image"), ("query", "query image"), ("gallery", "gallery image")):
        if not len(splits[split]):
            continue
        images, identities = _counts(splits[split])
        parts.append(f"{_count(images, title)} of {_count(identities, 'identity', 'identities')}")
    junk = int((splits["gallery"].identity == -1).sum())
    tail = f" ({junk:,} more are junk, never ranked)." if junk else "."
    return f"{TITLES[name]} from {place}: {', '.join(parts)}{tail}"


def _unexpected(name: str, splits: dict[str, Split]) -> list[str]:
    notes = []
    official = folders.LAYOUTS[name].official if name in OFFICIAL else {}
    for split, (images, identities) in OFFICIAL.get(name, {}).items():
        have, who = _counts(splits[split], junk=True)
        if (have, who) != (images, identities):
            notes.append(
                f"{official[split]} is not the official one: it has {have:,} images of {who:,} identities, "
                f"{TITLES[name]} {images:,} of {identities:,}; results do not compare with published ones."
            )
    people = {split: set(_people(s).tolist()) for split, s in splits.items()}
    both = people["train"] & (people["query"] | people["gallery"])
    if both:
        notes.append(f"{_count(len(both), 'identity is', 'identities are')} in both the training and the test set.")
    absent = people["query"] - people["gallery"]
    if absent:
        notes.append(f"{_count(len(absent), 'query identity has', 'query identities have')} no image in the gallery.")
    return notes


def _counts(split: Split, junk: bool = False) -> tuple[int, int]:
    """Images (without identity -1 unless `junk`) and identities."""
    return len(split) if junk else int((split.identity != -1).sum()), len(_people(split))


def _people(split: Split) -> np.ndarray:
    """The identities: 0 stands for distractors in Market-1501's layout, which has cameras, for a person elsewhere."""
    return np.unique(split.identity[split.identity > (-1 if split.camera is None else 0)])


def _hold_out(dataset: Dataset, count: int) -> Dataset:
    """Makes query and gallery of `count` training identities, evenly spaced, so that choices never see the test set."""
    if count == 0:
        return dataset
    train = dataset.train
    identities = np.unique(train.identity)
    if not 0 < count <= len(identities) - 2:
        raise UserError(
            f"config.data.holdout_identities is {count}, but it must lie between 0 and {max(len(identities) - 2, 0)}: "
            f"the training set has {len(identities)} identities and at least 2 must be left to train."
        )
    chosen = identities[(2 * np.arange(count) + 1) * len(identities) // (2 * count)]
    held = np.flatnonzero(np.isin(train.identity, chosen))
    cameras = np.zeros_like(train.identity) if train.camera is None else train.camera
    pairs = np.stack([train.identity[held], cameras[held]], axis=1)
    first = np.unique(pairs, axis=0, return_index=True)[1]  # of each identity and camera, the first image by name
    query, gallery = held[np.sort(first)], np.delete(held, first)
    if not len(gallery):
        raise UserError(
            f"config.data.holdout_identities is {count}, but each image of those identities is the only one of its "
            "camera and so a query, which leaves the gallery empty: hold out more, or use a larger training set."
        )
    note = (
        f"Held out {count:,} of {len(identities):,} training identities as query ({len(query):,} images, one per "
        f"identity and camera) and gallery ({len(gallery):,}); the test set is not used."
    )
    return Dataset(
        dataset.name,
        train=train.take(~np.isin(train.identity, chosen)),
        query=replace(train.take(query), name="query"),
        gallery=replace(train.take(gallery), name="gallery"),
        notes=(*dataset.notes, note),
    )


def _count(n: int, one: str, many: str = "") -> str:
    return f"{n:,} {one if n == 1 else many or one + 's'}"
