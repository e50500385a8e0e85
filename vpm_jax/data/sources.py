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
from vpm_jax.data.datasets import DATASETS, TITLES
from vpm_jax.data.files import FolderReader
from vpm_jax.data.folders import Place
from vpm_jax.data.split import Dataset, Listing, Split, join, printable, some
from vpm_jax.errors import UserError

# How the commands name a dataset's place.
_BY = "by --config.data.root (evaluate and benchmark data: --root, prepare: --source)"


def data_root(root: str) -> Path:
    """The path that `config.data.root` means: "" is $VPM_DATA, else ./data."""
    return Path(root or os.environ.get("VPM_DATA") or "data").expanduser()


def load_dataset(config_data: Any, preparing: bool = False) -> Dataset:
    """Finds and lists the dataset that `config.data` names.

    The root is a dataset's folder, its official zip, a folder of `vpm_jax.prepare`, or a folder that holds one of
    these under a usual name; of own images it is their CSV (see `vpm_jax.data.table`), or the folder that holds it.
    Synthetic pedestrians are rendered under the root unless it is such a dataset itself. A dataset for testing alone
    has an empty training set.

    Args:
      config_data: the keys name, root, synthetic, holdout_identities, corrupt, identity_zero, distractors, also_train.
      preparing: keeps training images of identity 0, whatever they stand for, and needs no test set.

    Raises:
      UserError: for an unknown name, when no whole dataset is there, and for images that cannot be used unless
        config.data.corrupt is "skip". Counts that differ from the official ones are notes, not errors: people use
        subsets.
    """
    place, splits, notes = _load(config_data, preparing)
    dataset = Dataset(config_data.name, notes=tuple(dict.fromkeys(notes)), **splits)  # a prepared one repeats itself
    if config_data.distractors:
        dataset = _with_distractors(dataset, config_data, place)
    dataset = _hold_out(dataset, config_data.holdout_identities)
    if config_data.also_train:
        dataset = _with_further(dataset, config_data, place)
    for test in (dataset.query, dataset.gallery):
        if not len(test) and not preparing:
            raise UserError(
                f"{place} has no {test.name} image, so nothing can be evaluated: "
                "add some, or set config.data.holdout_identities to make them of training identities."
            )
    return replace(dataset, notes=tuple(map(printable, dataset.notes)))


def _load(config_data: Any, preparing: bool = False) -> tuple[Place, dict[str, Any], list[str]]:
    """Where the dataset lies, its splits (the fields of `Dataset`), and notes, the first of which sums it up."""
    name, root = config_data.name, data_root(config_data.root)
    if name not in DATASETS:
        raise UserError(f"config.data.name is {name!r}, but the known datasets are {', '.join(DATASETS)}.")
    place = _synthetic_place(config_data, root) if name == "synthetic" else _place(config_data, root)
    notes: list[str] = []
    splits: dict[str, Any]
    if place.form == "prepared":
        splits = _prepared_splits(place, name, notes)
    else:
        splits = _file_splits(place, config_data, notes, preparing)
    for split in {"train", "query", "gallery"} - set(splits):
        splits[split] = Split(split, (), np.empty(0, np.int32), None)
    if (multi := splits.get("multi_query")) is not None:
        splits["multi_query"] = _of_queries(multi, splits["query"])
    zero = DATASETS[name].distractors and config_data.identity_zero == "distractor"  # whether 0 stands for nobody
    whole = splits["train"]
    splits["train"] = _somebody(whole, zero, place, notes, preparing)
    notes = [_summary(name, place, splits, zero), *notes, *_unexpected(name, splits, zero)]
    if preparing:
        splits["train"] = whole.take(whole.identity >= 0)
    return place, splits, notes


def _somebody(train: Split, zero: bool, place: Place, notes: list[str], preparing: bool) -> Split:
    """The training images of a person: not of identity -1, nor of 0 where `zero` stands for nobody."""
    nobody = train.identity <= (0 if zero else -1)
    if not len(train) or not nobody.any():
        return train
    if nobody.all():
        raise UserError(f"{place} has no training image of an identity above 0, so nothing can be learned from it.")
    zeros = int((train.identity == 0).sum()) if zero else 0
    if zeros and not preparing:
        notes.append(
            f"Left out {_count(zeros, 'training image')} of identity 0, which stands for nobody: where it is a person, "
            "set config.data.identity_zero=person."
        )
    if junk := int((train.identity < 0).sum()):
        notes.append(f"Left out {_count(junk, 'training image')} of identity -1, which stands for nobody.")
    return train.take(~nobody)


def _of_queries(multi_query: Split, query: Split) -> Split | None:
    """The images that show an identity in a camera as a query does."""
    assert query.camera is not None and multi_query.camera is not None
    asked = set(zip(query.identity.tolist(), query.camera.tolist(), strict=True))
    keys = zip(multi_query.identity.tolist(), multi_query.camera.tolist(), strict=True)
    chosen = multi_query.take([i for i, key in enumerate(keys) if key in asked])
    return chosen if len(chosen) else None


def _with_distractors(dataset: Dataset, config_data: Any, place: Place) -> Dataset:
    """Adds the images at config.data.distractors to the gallery; the path may be one beside the splits."""
    path = Path(config_data.distractors).expanduser()
    if not path.exists():
        path = place.path / path
    if not path.exists():
        raise UserError(
            f"config.data.distractors is {config_data.distractors}, but neither that nor {path} exists: give a folder "
            "or a zip of images."
        )
    reader, listing = folders.list_distractors(path)
    notes = list(dataset.notes)
    _refuse_unusable({"distractors": listing}, config_data.corrupt, notes)
    camera = None if dataset.gallery.camera is None else listing.camera
    more = Split("gallery", listing.names, listing.identity, camera, reader)
    notes.append(f"Added {_count(len(more), 'distractor')} from {path} to the gallery.")
    return replace(dataset, gallery=join(dataset.gallery, more), notes=tuple(notes))


def _with_further(dataset: Dataset, config_data: Any, place: Place) -> Dataset:
    """Adds the training sets of config.data.also_train; their identities and cameras get numbers of their own."""
    train, notes, places = dataset.train, list(dataset.notes), [place.path.resolve()]
    for item in config_data.also_train.split(","):
        name, _, root = item.strip().partition(":")
        if name not in DATASETS:
            known = ", ".join(entry.name for entry in DATASETS.values() if entry.trains)
            raise UserError(
                f"config.data.also_train names {name!r}: expected NAME or NAME:PATH, separated by commas, with one of "
                f"{known}."
            )
        further = config_data.copy_and_resolve_references()
        further.name = name
        further.root = root
        if not root and config_data.root and data_root(config_data.root).is_dir():
            # A folder that holds both; else where datasets lie by default.
            further.root = config_data.root if folders.locate(data_root(config_data.root), name) else ""
        where, splits, found = _load(further)
        if where.path.resolve() in places:
            raise UserError(f"config.data.also_train names {where}, which is already trained on: leave it out.")
        places.append(where.path.resolve())
        more: Split = splits["train"]
        if not len(more):
            raise UserError(f"config.data.also_train names {name}, but {where} has no training images.")
        identity = more.identity - more.identity.min() + 1 + train.identity.max(initial=0)
        camera = more.camera
        if camera is not None and train.camera is not None:
            camera = camera - camera.min() + 1 + train.camera.max(initial=0)
        names = (*train.names, *(f"{name}/{image}" for image in more.names))
        train = replace(join(train, replace(more, identity=identity, camera=camera)), names=names)
        notes += [f"Also trained on: {found[0]}", *found[1:]]
    images, identities = len(train), train.num_identities
    notes.append(f"Together {_count(images, 'training image')} of {_count(identities, 'identity', 'identities')}.")
    return replace(dataset, train=train, notes=tuple(notes))


def _place(config_data: Any, root: Path) -> Place:
    title = TITLES[config_data.name]
    origin = "" if config_data.root else f" ({'$VPM_DATA' if os.environ.get('VPM_DATA') else 'the default'})"
    if config_data.name == "csv":
        lacks = "no CSV: neither dataset.csv nor exactly one other"
        advice = f"give a CSV with the header {','.join(table.COLUMNS)} {_BY}"
    else:
        layout = DATASETS[config_data.name].layout
        assert layout is not None
        official = ", ".join(dict.fromkeys(layout.official.values()))
        lacks = f"no {title}: neither the folders {official}, nor a folder or zip under a usual name such as {title}"
        advice = f"put the folder or the zip of {title} there, or " + (
            f"give it {_BY}, or take the dataset synthetic, which needs no download"
            if "train" in layout.folders
            else "give it by python -m vpm_jax.evaluate --root"
        )
    if not root.exists():
        raise UserError(f"{root}{origin} does not exist: {advice}.")
    place = folders.locate(root, config_data.name)
    if place is None and not any(root.iterdir()):
        raise UserError(f"{root}{origin} is empty: {advice}.")
    if place is None and config_data.name != "csv" and (named := folders.under_usual_name(root, config_data.name)):
        lacks = f"no {title}: the folder {named.name} has none of {official}"
        if named.is_file():
            lacks = f"no {title} that can be read: unpack {named.name} first"
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


def _file_splits(place: Place, config_data: Any, notes: list[str], preparing: bool) -> dict[str, Any]:
    """The splits of a folder, a zip or a CSV; what was left out goes to `notes`."""
    if place.form == "csv":
        listings, found = table.read(place.path)
        reader: Any = FolderReader(place.path.absolute().parent)
    else:
        reader, listings, found = folders.list_splits(place, config_data.name)
    notes += found
    _refuse_unusable(listings, "error" if preparing else config_data.corrupt, notes)
    own = DATASETS[config_data.name].own
    return {
        split: Split(split, listing.names, listing.identity, listing.camera, reader, upright=own)
        for split, listing in listings.items()
    }


def _refuse_unusable(listings: dict[str, Listing], corrupt: str, notes: list[str]) -> None:
    """Raises UserError for images that cannot be used; with config.data.corrupt "skip" says that they are left out."""
    for split, listing in listings.items():
        if not listing.unusable:
            continue
        count = _count(len(listing.unusable), "image")
        of = f"{count} of {len(listing.unusable) + len(listing.names):,} ({split}) cannot be used"
        if corrupt == "skip" or split == "multi_query":
            notes.append(f"Left out: {of}, such as links that lead nowhere: {some(listing.unusable)}.")
        else:
            raise UserError(
                f"{of}, such as links that lead nowhere or a format that is not read: {some(listing.unusable)}; get "
                "them (git annex get, dvc pull), convert them, or leave them out by config.data.corrupt=skip (prepare: "
                "remove them)."
            )


def _prepared_splits(place: Place, name: str, notes: list[str]) -> dict[str, Any]:
    from vpm_jax.data import arrayrecord  # imports TFDS, which takes a second

    splits, prepared_notes = arrayrecord.read(place.path.absolute(), name)
    notes += prepared_notes
    return splits


def _summary(name: str, place: Place, splits: dict[str, Any], zero: bool) -> str:
    parts = []
    for split, title in (("train", "training image"), ("query", "query image"), ("gallery", "gallery image")):
        if not len(splits[split]):
            continue
        images, identities = _counts(splits[split], zero)
        parts.append(f"{_count(images, title)} of {_count(identities, 'identity', 'identities')}")
    junk = int((splits["gallery"].identity == -1).sum())
    tail = f" ({junk:,} more are junk, never ranked)." if junk else "."
    return f"{TITLES[name]} from {place}: {', '.join(parts)}{tail}"


def _unexpected(name: str, splits: dict[str, Any], zero: bool) -> list[str]:
    notes = []
    entry = DATASETS[name]
    for split, folder in (entry.layout.official if entry.layout else {}).items():
        have, who = _counts(splits[split], zero, junk=True)
        if (official := entry.official(split)) and (have, who) not in official:
            expected = " or ".join(f"{images:,} of {identities:,}" for images, identities in official)
            notes.append(
                f"{folder} is not the official one: it has {have:,} images of {who:,} identities, "
                f"{TITLES[name]} {expected}; results do not compare with published ones."
            )
    people = {split: set(_people(splits[split], zero).tolist()) for split in ("train", "query", "gallery")}
    both = people["train"] & (people["query"] | people["gallery"])
    if both:
        notes.append(f"{_count(len(both), 'identity is', 'identities are')} in both the training and the test set.")
    absent = people["query"] - people["gallery"]
    if absent:
        notes.append(f"{_count(len(absent), 'query identity has', 'query identities have')} no image in the gallery.")
    if zero and (zeros := int((splits["query"].identity == 0).sum())):
        notes.append(
            f"{_count(zeros, 'query is', 'queries are')} of identity 0, which stands for nobody: where it is a person, "
            "set config.data.identity_zero=person."
        )
    return notes


def _counts(split: Split, zero: bool, junk: bool = False) -> tuple[int, int]:
    """Images (without identity -1 unless `junk`) and identities."""
    return len(split) if junk else int((split.identity != -1).sum()), len(_people(split, zero))


def _people(split: Split, zero: bool) -> np.ndarray:
    """The identities of persons: above -1, or above 0 where `zero` stands for nobody."""
    return np.unique(split.identity[split.identity > (0 if zero else -1)])


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
