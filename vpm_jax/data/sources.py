"""Loading a dataset from a folder, an official zip, ArrayRecord or a CSV.

`load_dataset` reads only names; a Split reads the encoded images on demand, in any process.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vpm_jax.data import folders, synthetic, table
from vpm_jax.data.datasets import DATASETS, TITLES, further_sets
from vpm_jax.data.files import FolderReader
from vpm_jax.data.folders import Place
from vpm_jax.data.split import Dataset, Listing, Reader, Split, counted, groups, join, some
from vpm_jax.errors import UserError, printable

_FLAGS = "--config.data.root (evaluate and benchmark data: --root, prepare: --source)"


def data_root(root: str | os.PathLike) -> Path:
    """The path for `config.data.root`; "" is $VPM_DATA, otherwise ./data."""
    return Path(os.path.expanduser(root or os.environ.get("VPM_DATA") or "data"))


def load_dataset(config_data: ConfigDict, preparing: bool = False) -> Dataset:
    """Finds and lists the dataset that `config.data` names.

    The root is the dataset's folder, its official zip, an output of `vpm_jax.prepare`, its CSV (see
    `vpm_jax.data.table`), or a folder that contains one of these under a usual name. Synthetic pedestrians are rendered
    under the root on first use. Test-only datasets have an empty training set.

    Args:
      config_data: `config.data`, checked by `vpm_jax.config.check`.
      preparing: keep training images of identity 0 whatever they mean, and do not require a test set.

    Raises:
      UserError: for a missing or incomplete dataset, and unusable images unless config.data.corrupt is "skip". Counts
        that differ from the official ones are only notes, because people use subsets.
    """
    place, splits, notes = _load(config_data, preparing)
    notes = list(dict.fromkeys(notes))  # a prepared dataset repeats notes
    unofficial = tuple(_unofficial(config_data.name, splits, _has_distractors(config_data)))
    dataset = Dataset(config_data.name, **splits, notes=tuple(notes), unofficial=unofficial)  # type: ignore[arg-type]
    if config_data.distractors:
        dataset = _with_distractors(dataset, config_data, place)
    dataset = _hold_out(dataset, config_data.holdout_identities)
    if config_data.also_train:
        dataset = _with_further(dataset, config_data, place)
    for test in (dataset.query, dataset.gallery):
        if not len(test) and not preparing:
            raise UserError(
                f"{place} has no {test.name} images, expected some to evaluate on: add them, or set "
                "config.data.holdout_identities to use training identities."
            )
    return replace(dataset, notes=tuple(map(printable, dataset.notes)))


def load_test_set(config_data: ConfigDict) -> Dataset:
    """`load_dataset` without the training sets of config.data.also_train, for evaluations."""
    config_data = config_data.copy_and_resolve_references()
    config_data.also_train = ""
    return load_dataset(config_data)


def _load(config_data: ConfigDict, preparing: bool = False) -> tuple[Place, dict[str, Split], list[str]]:
    """The location of the dataset, its splits, and notes, of which the first is a summary."""
    name, root = config_data.name, data_root(config_data.root)
    place = _synthetic_place(config_data, root) if name == "synthetic" else _place(config_data, root)
    notes: list[str] = []
    folder = place.path.name
    if name == "synthetic" and folder.startswith("synthetic-v"):
        others = folder != synthetic.folder_name(**config_data.synthetic)
        notes += [f"These are the pedestrians of {folder}, not those of config.data.synthetic."] * others
    if place.form == "prepared":
        from vpm_jax.data import arrayrecord  # TFDS takes a second to import

        splits, prepared_notes = arrayrecord.read(place.path.absolute(), name)
        notes += prepared_notes
    else:
        splits = _file_splits(place, config_data, notes, preparing)
    for split in {"train", "query", "gallery"} - set(splits):
        splits[split] = Split(split, (), np.empty(0, np.int32), None)
    if "multi_query" in splits:
        multi_query = splits.pop("multi_query")
        of_query, of_box = groups(splits["query"], multi_query)
        if (of_a_query := np.isin(of_box, of_query)).any():
            splits["multi_query"] = multi_query.take(of_a_query)
    has_distractors = _has_distractors(config_data)
    all_train = splits["train"]
    splits["train"] = _people_only(all_train, has_distractors, place, notes, preparing)
    notes = [_summary(name, place, splits, has_distractors), *notes, *_unexpected(name, splits, has_distractors)]
    if preparing:
        splits["train"] = all_train.take(all_train.identity >= 0)
    return place, splits, notes


def _has_distractors(config_data: ConfigDict) -> bool:
    """Whether identity 0 means distractor."""
    return DATASETS[config_data.name].distractors and config_data.identity_zero == "distractor"


def _people_only(train: Split, has_distractors: bool, place: Place, notes: list[str], preparing: bool) -> Split:
    """The training images without junk (identity -1) and, if the dataset has them, distractors (identity 0)."""
    excluded = train.identity <= (0 if has_distractors else -1)
    if not len(train) or not excluded.any():
        return train
    if excluded.all():
        raise UserError(
            f"{place} has no training image of an identity above 0: add some, or if identity 0 is a person, set "
            "config.data.identity_zero=person."
        )
    zeros = int((train.identity == 0).sum()) if has_distractors else 0
    if zeros and not preparing:
        notes.append(
            f"Left out {counted(zeros, 'training image')} of identity 0, which means distractor: if it is a person, "
            "set config.data.identity_zero=person."
        )
    if junk := int((train.identity < 0).sum()):
        notes.append(f"Left out {counted(junk, 'training image')} of identity -1, which means junk.")
    return train.take(~excluded)


def _with_distractors(dataset: Dataset, config_data: ConfigDict, place: Place) -> Dataset:
    """Adds the images at config.data.distractors, which may be a path inside the dataset, to the gallery."""
    path = Path(os.path.expanduser(config_data.distractors))
    if not path.exists():
        path = place.path / path
    if not path.exists():
        raise UserError(
            f"config.data.distractors is {config_data.distractors}, but neither that nor {path} exists: set it to a "
            "folder or zip of images."
        )
    reader, listing = folders.list_distractors(path)
    notes = list(dataset.notes)
    _refuse_unusable({"distractors": listing}, config_data.corrupt, notes)
    camera = None if dataset.gallery.camera is None else listing.camera
    more = Split("gallery", listing.names, listing.identity, camera, reader)
    notes.append(f"Added {counted(len(more), 'distractor')} from {path.name} to the gallery.")
    return replace(dataset, gallery=join(dataset.gallery, more), notes=tuple(notes))


def _with_further(dataset: Dataset, config_data: ConfigDict, place: Place) -> Dataset:
    """Adds the training sets of config.data.also_train, renumbering their identities and cameras to be distinct."""
    train, notes, places = dataset.train, list(dataset.notes), [place.path.resolve()]
    for name, root in further_sets(config_data.also_train):
        if name not in DATASETS:
            known = ", ".join(entry.name for entry in DATASETS.values() if entry.trains)
            raise UserError(
                f"config.data.also_train names {name!r}: expected NAME or NAME:PATH, separated by commas, with one of "
                f"{known}."
            )
        further = config_data.copy_and_resolve_references()
        further.name, further.root = name, root or root_of_further(config_data.root, name)
        further_place, splits, further_notes = _load(further)
        if further_place.path.resolve() in places:
            raise UserError(
                f"config.data.also_train names {further_place}, which is already a training set: leave it out."
            )
        places.append(further_place.path.resolve())
        more = splits["train"]
        if not len(more):
            raise UserError(
                f"config.data.also_train names {name}, but {further_place} has no training images: leave it out."
            )
        identity = more.identity - more.identity.min() + 1 + train.identity.max(initial=0)
        camera = more.camera
        if camera is not None and train.camera is not None:
            camera = camera - camera.min() + 1 + train.camera.max(initial=0)
        names = (*train.names, *(f"{name}/{image}" for image in more.names))
        train = replace(join(train, replace(more, identity=identity, camera=camera)), names=names)
        summary = further_notes[0].replace(f" from {further_place}", "")  # notes stand on artefacts, paths do not
        notes += [f"Also trained on: {summary}", *further_notes[1:]]
    images, identities = len(train), train.num_identities
    notes.append(f"Together {counted(images, 'training image')} of {counted(identities, 'identity', 'identities')}.")
    return replace(dataset, train=train, notes=tuple(notes))


def root_of_further(root: str, name: str) -> str:
    """The root of a further training set without a path: config.data.root if that contains it too, otherwise ""."""
    return root if root and data_root(root).is_dir() and folders.locate(data_root(root), name) else ""


def _place(config_data: ConfigDict, root: Path) -> Place:
    title = TITLES[config_data.name]
    origin = "" if config_data.root else f" ({'$VPM_DATA' if os.environ.get('VPM_DATA') else 'the default'})"
    if config_data.name == "csv":
        problem = "no CSV: neither dataset.csv nor exactly one other"
        advice = f"set {_FLAGS} to a CSV with the header {','.join(table.COLUMNS)}"
    else:
        layout = DATASETS[config_data.name].layout
        assert layout is not None
        official = ", ".join(dict.fromkeys(layout.official.values()))
        problem = f"no {title}: neither the folders {official}, nor a folder or zip under a usual name such as {title}"
        advice = f"put the folder or zip of {title} there, or " + (
            f"set {_FLAGS} to it, or use the dataset synthetic, which needs no download"
            if "train" in layout.folders
            else "set python -m vpm_jax.evaluate --root to it"
        )
    if not root.exists():
        raise UserError(f"{root}{origin} does not exist: {advice}.")
    place = folders.locate(root, config_data.name)
    if place is None and not any(root.iterdir()):
        raise UserError(f"{root}{origin} is empty: {advice}.")
    if place is None and config_data.name != "csv" and (named := folders.under_usual_name(root, config_data.name)):
        problem = f"no {title}: the folder {named.name} has none of {official}"
        if named.is_file():
            problem = f"no readable {title}: unpack {named.name} first"
    if place is None:
        raise UserError(f"{root}{origin} contains {problem}; {advice}.")
    return place


def _synthetic_place(config_data: ConfigDict, root: Path) -> Place:
    # Without a search: datasets below the root may have been rendered with other parameters.
    place = folders.locate(root, "synthetic", search=False) if root.exists() else None
    if place is not None:
        return place
    return Place("folder", synthetic.ensure(root, **config_data.synthetic, progress=_show_rendering))


def _show_rendering(done: int, total: int) -> None:
    if done == total or (done % 50 == 0 and sys.stderr.isatty()):
        start, end = "\r" * sys.stderr.isatty(), "\n" * (done == total)
        print(f"{start}Rendering synthetic pedestrians: {done:,} of {total:,}", end=end, file=sys.stderr, flush=True)


def _file_splits(place: Place, config_data: ConfigDict, notes: list[str], preparing: bool) -> dict[str, Split]:
    """The splits of a folder, zip or CSV. Adds to `notes`."""
    reader: Reader
    if place.form == "csv":
        listings, more_notes = table.read(place.path)
        reader = FolderReader(place.path.absolute().parent)
    else:
        reader, listings, more_notes = folders.list_splits(place, config_data.name)
    notes += more_notes
    _refuse_unusable(listings, "error" if preparing else config_data.corrupt, notes)
    own = DATASETS[config_data.name].own
    return {
        split: Split(split, listing.names, listing.identity, listing.camera, reader, upright=own)
        for split, listing in listings.items()
    }


def _refuse_unusable(listings: dict[str, Listing], corrupt: str, notes: list[str]) -> None:
    """Raises UserError for unusable images or, if config.data.corrupt is "skip", adds a note about them."""
    for split, listing in listings.items():
        if not listing.unusable:
            continue
        count = counted(len(listing.unusable), "image")
        problem = f"{count} of {len(listing.unusable) + len(listing.names):,} ({split}) cannot be used"
        if corrupt == "skip" or split == "multi_query":
            notes.append(f"Left out: {problem}, such as broken links: {some(listing.unusable)}.")
        else:
            raise UserError(
                f"{problem}, such as broken links or unsupported formats: {some(listing.unusable)}; get them (git "
                "annex get, dvc pull), convert them, or leave them out with config.data.corrupt=skip (prepare: remove "
                "them)."
            )


def _summary(name: str, place: Place, splits: dict[str, Split], has_distractors: bool) -> str:
    counts = []
    for split, title in (("train", "training image"), ("query", "query image"), ("gallery", "gallery image")):
        if not len(splits[split]):
            continue
        images, identities = _counts(splits[split], has_distractors)
        counts.append(f"{counted(images, title)} of {counted(identities, 'identity', 'identities')}")
    junk = int((splits["gallery"].identity == -1).sum())
    tail = f" ({junk:,} more are junk, never ranked)." if junk else "."
    return f"{TITLES[name]} from {place}: {', '.join(counts)}{tail}"


def _unexpected(name: str, splits: dict[str, Split], has_distractors: bool) -> list[str]:
    """Notes about counts that differ from the official ones, and identities in unexpected splits."""
    notes = []
    entry = DATASETS[name]
    for split, counts in _unofficial(name, splits, has_distractors).items():
        expected = " or ".join(f"{images:,} of {identities:,}" for images, identities in entry.official(split))
        assert entry.layout is not None
        notes.append(
            f"{entry.layout.official[split]} is not the official one: it has {counts[0]:,} images of {counts[1]:,} "
            f"identities, {TITLES[name]} {expected}; results are not comparable with published ones."
        )
    people = {split: set(_people(splits[split], has_distractors).tolist()) for split in ("train", "query", "gallery")}
    both = people["train"] & (people["query"] | people["gallery"])
    if both:
        notes.append(f"{counted(len(both), 'identity is', 'identities are')} in both the training and the test set.")
    absent = people["query"] - people["gallery"]
    if absent:
        notes.append(f"{counted(len(absent), 'query identity has', 'query identities have')} no image in the gallery.")
    if has_distractors and (zeros := int((splits["query"].identity == 0).sum())):
        notes.append(
            f"{counted(zeros, 'query is', 'queries are')} of identity 0, which means distractor: if it is a person, "
            "set config.data.identity_zero=person."
        )
    return notes


def _unofficial(name: str, splits: dict[str, Split], has_distractors: bool) -> dict[str, tuple[int, int]]:
    """{split: (images, identities)} where these are not the official counts."""
    entry = DATASETS[name]
    counted_splits = {
        split: _counts(splits[split], has_distractors, junk=True)
        for split in (entry.layout.official if entry.layout else ())
        if entry.official(split)
    }
    return {split: counts for split, counts in counted_splits.items() if counts not in entry.official(split)}


def _counts(split: Split, has_distractors: bool, junk: bool = False) -> tuple[int, int]:
    """(images, identities); junk images count only if `junk`."""
    return len(split) if junk else int((split.identity != -1).sum()), len(_people(split, has_distractors))


def _people(split: Split, has_distractors: bool) -> np.ndarray:
    """The identities of people, without junk and distractors."""
    return np.unique(split.identity[split.identity > (0 if has_distractors else -1)])


def _hold_out(dataset: Dataset, count: int) -> Dataset:
    """Replaces query and gallery by `count` evenly spaced training identities, for model selection."""
    if count == 0:
        return dataset
    train = dataset.train
    identities = np.unique(train.identity)
    if not 0 < count <= len(identities) - 2:
        raise UserError(
            f"config.data.holdout_identities is {count}, expected 0 to {max(len(identities) - 2, 0)}: the training set "
            f"has {len(identities)} identities, of which at least 2 must remain for training."
        )
    chosen = identities[(2 * np.arange(count) + 1) * len(identities) // (2 * count)]
    held = np.flatnonzero(np.isin(train.identity, chosen))
    cameras = np.zeros_like(train.identity) if train.camera is None else train.camera
    pairs = np.stack([train.identity[held], cameras[held]], axis=1)
    first = np.unique(pairs, axis=0, return_index=True)[1]  # the first image by name of each identity and camera
    query, gallery = held[np.sort(first)], np.delete(held, first)
    if not len(gallery):
        raise UserError(
            f"config.data.holdout_identities is {count}, but these identities have one image per camera, which all "
            "become queries and leave the gallery empty: hold out more identities, or use a larger training set."
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
        held_out=count,
        unofficial=tuple(split for split in dataset.unofficial if split == "train"),
    )
