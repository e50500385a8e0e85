"""Where a dataset lies and how its files are read: a plain folder, or the official zip as it is.

A layout is a folder of images for each split, whose names start with the identity: Market-1501's, which DukeMTMC-reID
and the synthetic pedestrians share (`bounding_box_train/0002_c1s1_000451_03.jpg`), and those of Partial-REID
(`partial_body_images/001_001.jpg`) and Partial-iLIDS (`Probe/001.jpg`), which have no training set and no cameras.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from vpm_jax.errors import UserError

PREPARED = "dataset_info.json"  # the file that TFDS writes into a prepared dataset
TITLES = {
    "market1501": "Market-1501",
    "dukemtmc": "DukeMTMC-reID",
    "synthetic": "synthetic pedestrians",
    "partial_reid": "Partial-REID",
    "partial_ilids": "Partial-iLIDS",
    "csv": "own images",
}

# Usual names of a copy, lower case and without punctuation: Market-1501-v15.09.15, DukeMTMC-reID.zip, Partial_iLIDS ...
_USUAL = {
    "market1501": re.compile(r"market(1501.*)?"),
    "dukemtmc": re.compile(r"duke(mtmc(reid.*)?)?"),
    "synthetic": re.compile(r"synthetic"),
    "partial_reid": re.compile(r"partial(person)?reid(dataset)?"),
    "partial_ilids": re.compile(r"partialilids(dataset)?"),
    "csv": re.compile(r"csv"),
}
_FORMS = ("prepared", "csv", "folder", "zip")  # in order of preference
_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Layout:
    """The folders of a dataset, and how its images are named."""

    folders: dict[str, tuple[str, ...]]  # by split, the names that its folder goes by in any case, the official first
    name: re.Pattern[str]  # from the start of an image's name: the identity and, where there are any, the camera
    example: str  # of such a name, for messages
    unused: tuple[str, ...] = ()  # folders of the dataset that no split takes
    subfolders: bool = False  # whether images may lie one folder deeper, as in one for each identity

    @property
    def known(self) -> set[str]:
        """The names, in lower case, of all folders that the dataset may have."""
        return {name.lower() for names in (*self.folders.values(), self.unused) for name in names}

    @property
    def official(self) -> dict[str, str]:
        """{split: the official name of its folder}."""
        return {split: names[0] for split, names in self.folders.items()}

    def find(self, names: Iterable[str]) -> dict[str, str]:
        """{split: the name of its folder among `names`}, without the splits that have none."""
        given = {name.lower(): name for name in sorted(names, reverse=True)}
        found = {}
        for split, known in self.folders.items():
            present = [given[name.lower()] for name in known if name.lower() in given]
            if present:
                found[split] = present[0]
        return found

    def tells(self, found: dict[str, str], usual: bool) -> bool:
        """Whether these folders are the dataset, or a part: "query" alone may be of any other, unless it lies in a
        folder of the `usual` name."""
        return len(found) > 1 or any(usual or name.lower() not in ("query", "gallery") for name in found.values())


_MARKET = Layout(
    {"train": ("bounding_box_train",), "query": ("query",), "gallery": ("bounding_box_test",)},
    re.compile(r"(-1|\d{4})_c(\d{1,3})"),
    "IDENTITY_cCAMERA..., such as 0002_c1s1_000451_03.jpg",
)
_NUMBERED = re.compile(r"(\d{1,9})(?![0-9A-Za-z])")
LAYOUTS = {
    "market1501": _MARKET,
    "dukemtmc": _MARKET,
    "synthetic": _MARKET,
    "partial_reid": Layout(
        {
            "query": ("partial_body_images", "query"),
            "gallery": ("whole_body_images", "gallery"),
        },
        _NUMBERED,
        "IDENTITY_NUMBER, such as 001_001.jpg",
        unused=("occluded_body_images",),
        subfolders=True,
    ),
    "partial_ilids": Layout(
        {"query": ("Probe", "query"), "gallery": ("Gallery",)},
        _NUMBERED,
        "IDENTITY, such as 001.jpg",
        subfolders=True,
    ),
}


@dataclass(frozen=True)
class Place:
    """A dataset that was found: its form ("folder" | "zip" | "prepared" | "csv") and its path."""

    form: str
    path: Path

    def __str__(self) -> str:
        return f"the {dict(prepared='prepared folder', csv='CSV').get(self.form, self.form)} {self.path}"


@dataclass(frozen=True)
class Listing:
    """The images of one split, sorted by file name so that every file system and form gives the same order."""

    names: tuple[str, ...]  # "bounding_box_train/0002_c1s1_000451_03.jpg"
    identity: np.ndarray  # int32 [N]
    camera: np.ndarray | None  # int32 [N]; None: the dataset has no cameras
    ignored: tuple[str, ...] = ()  # names of files that are no images of a person


def locate(root: Path, name: str, search: bool = True) -> Place | None:
    """Finds the dataset `name` at `root` and, with `search`, under its usual names below `root`; None if there is none.

    A prepared copy goes before a folder and a folder before a zip; among equals the first by name.
    """
    if root.is_file():
        form = "csv" if name == "csv" else "zip"
        return Place("prepared", root.parent) if root.name == PREPARED else Place(form, root)
    try:
        places = sorted(_places(root, name, 2 if search else 0), key=lambda p: _FORMS.index(p.form))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}.") from error
    return places[0] if places else None


def _places(root: Path, name: str, depth: int) -> Iterator[Place]:
    if (root / PREPARED).is_file():
        yield Place("prepared", root)
        return
    children = sorted(root.iterdir())
    if name == "csv":
        tables = [child for child in children if child.suffix.lower() == ".csv" and child.is_file()]
        tables = [table for table in tables if table.name.lower() == "dataset.csv"] or tables
        if len(tables) > 1:
            some = ", ".join(table.name for table in tables[:5]) + ", ..." * (len(tables) > 5)
            raise UserError(f"{root} holds several CSV files ({some}): set config.data.root to one of them.")
        yield from (Place("csv", table) for table in tables)
    else:
        found = LAYOUTS[name].find(child.name for child in children if child.is_dir())
        if LAYOUTS[name].tells(found, _usual(root.name, name)):
            yield Place("folder", root)
    for child in children:
        if re.fullmatch(r"\d+\.\d+\.\d+", child.name) and (child / PREPARED).is_file():
            yield Place("prepared", child)
        elif depth and child.is_dir() and _usual(child.name, name):
            yield from _places(child, name, depth - 1)
        elif depth and name in LAYOUTS and child.suffix.lower() == ".zip" and _usual(child.stem, name):
            yield Place("zip", child)


def _usual(file_name: str, name: str) -> bool:
    return _USUAL[name].fullmatch(re.sub(r"[^a-z0-9]", "", file_name.lower())) is not None


def under_usual_name(root: Path, name: str) -> Path | None:
    """The first folder in `root` that is called as the dataset `name` is, whatever it holds; None without one."""
    return next((path for path in sorted(root.iterdir()) if path.is_dir() and _usual(path.name, name)), None)


def list_folder(root: Path, name: str) -> tuple[dict[str, Listing], list[str]]:
    """The splits of the dataset `name` in a folder, and notes. UserError if one is missing, or has no images."""
    layout = LAYOUTS[name]
    try:
        with os.scandir(root) as entries:
            folders = [entry.name for entry in entries if entry.is_dir() and entry.name.lower() in layout.known]
        files = {folder: list(_files(root / folder, layout.subfolders)) for folder in sorted(folders)}
    except OSError as error:
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}.") from error
    return _listings(files, layout, f"The folder {root}")


def _files(folder: Path, subfolders: bool) -> Iterator[str]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file():
                yield entry.name
            elif subfolders and entry.is_dir() and entry.name != "__MACOSX":
                yield from (f"{entry.name}/{file}" for file in _files(folder / entry.name, False))


def list_zip(path: Path, name: str) -> tuple[str, dict[str, Listing], list[str]]:
    """The splits of the dataset `name` in its official zip as it is, and notes.

    Returns first the folder inside, "" or ending in "/". UserError for a truncated zip, or one that holds no dataset
    or several.
    """
    open_zip.cache_clear()  # the file may have been replaced since this process last read it
    layout = LAYOUTS[name]
    wanted = layout.known
    found: dict[str, dict[str, list[str]]] = {}  # folder inside -> split folder -> file names
    for entry in open_zip(str(path), os.getpid()).namelist():
        *parents, file_name = entry.split("/")  # the name is "" where the entry is a folder
        if "__MACOSX" in parents:
            continue
        for below in (0, 1) if layout.subfolders else (0,):
            place = len(parents) - 1 - below
            if place >= 0 and parents[place].lower() in wanted:
                inside = "".join(parent + "/" for parent in parents[:place])
                files = found.setdefault(inside, {}).setdefault(parents[place], [])
                if file_name:
                    files.append("/".join([*parents[place + 1 :], file_name]))
                break
    usual = {inside: _usual(inside.rstrip("/").rpartition("/")[2], name) for inside in found}
    datasets = {inside: files for inside, files in found.items() if layout.tells(layout.find(files), usual[inside])}
    if len(datasets) > 1:
        datasets = {inside: files for inside, files in datasets.items() if usual[inside]} or datasets
    if len(datasets) != 1:
        official = list(layout.official.values())
        what = f"several datasets ({', '.join(sorted(datasets))})" if datasets else f"no folder {official[0]}"
        raise UserError(
            f"The zip {path} holds {what}; expected one dataset with the folders {', '.join(official)}: "
            "get the official zip, or unpack this one and set config.data.root to the folder inside."
        )
    [(inside, folders)] = datasets.items()
    return inside, *_listings(folders, layout, f"The zip {path}")


def _listings(files: dict[str, list[str]], layout: Layout, where: str) -> tuple[dict[str, Listing], list[str]]:
    """The listings of the splits, from the files of each folder, and notes."""
    found = layout.find(files)
    missing = [official for split, official in layout.official.items() if split not in found]
    if missing:
        raise UserError(
            f"{where} has {', '.join(found.values())} but no {' and no '.join(missing)}; expected all of "
            f"{', '.join(layout.official.values())}: complete it from the official archive."
        )
    listings = {split: _listing(folder, files[folder], layout, where) for split, folder in found.items()}
    notes = []
    ignored = [name for listing in listings.values() for name in listing.ignored]
    if ignored:
        some = ", ".join(ignored[:3]) + (", ..." if len(ignored) > 3 else "")
        one = "file" if len(ignored) == 1 else "files"
        notes.append(f"Ignored {len(ignored):,} {one} not named as an image of a person: {some}.")
    for folder in sorted(set(files) - set(found.values())):
        images = sum(name.lower().endswith(_SUFFIXES) for name in files[folder])
        plural = "s" * (images != 1)
        notes.append(f"Left out {folder} ({images:,} image{plural}), which the protocol does not use.")
    return listings, notes


def _listing(folder: str, files: Iterable[str], layout: Layout, where: str) -> Listing:
    kept, ignored = [], []
    for name in sorted(set(files)):
        match = layout.name.match(name.rpartition("/")[2])
        if match and name.lower().endswith(_SUFFIXES):
            kept.append((f"{folder}/{name}", *map(int, match.groups())))
        else:
            ignored.append(f"{folder}/{name}")
    if not kept:
        held = f"no image among {len(ignored):,} file{'s' * (len(ignored) > 1)}" if ignored else "no file"
        raise UserError(
            f"{where} has {held} in {folder}; expected images named {layout.example}: "
            "complete it from the official archive."
        )
    names, identity, *camera = zip(*kept, strict=True)
    cameras = np.array(camera[0], np.int32) if camera else None
    return Listing(names, np.array(identity, np.int32), cameras, tuple(ignored))


@dataclass(frozen=True)
class FolderReader:
    """Reads images of a dataset folder."""

    root: Path

    def read(self, name: str, position: int) -> bytes:
        try:
            path = os.path.join(self.root, name)  # which may be absolute: a CSV of own images may list such
            file = os.open(path, os.O_RDONLY)  # in half the time of open() and read()
            try:
                parts = []
                while part := os.read(file, 2**16):
                    parts.append(part)
            finally:
                os.close(file)
            return b"".join(parts)
        except OSError as error:
            raise UserError(f"The image {self.root / name} cannot be read: {error.strerror}.") from error


@dataclass(frozen=True)
class ZipReader:
    """Reads images of an official zip. Holds no handle: each process opens the zip once, when it first reads."""

    path: Path
    inside: str

    def read(self, name: str, position: int) -> bytes:
        try:
            return open_zip(str(self.path), os.getpid()).read(self.inside + name)
        except (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"The image {name} in the zip {self.path} cannot be read ({error}): get the zip again."
            ) from error


@lru_cache(maxsize=4)
def open_zip(path: str, process: int) -> zipfile.ZipFile:
    """One handle per process (`process` is its id), shared by its threads: a fork would share the file's offset."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        if not path.lower().endswith(".zip"):
            raise UserError(f"{path} is no zip: expected a dataset's folder or its official zip.") from None
        raise UserError(
            f"{path} is not a whole zip ({error}): it is truncated or of another kind, so get it again."
        ) from error
    except OSError as error:
        raise UserError(f"The zip {path} cannot be opened: {error.strerror or error}.") from error
