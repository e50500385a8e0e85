"""Where a dataset lies and how its files are read: a plain folder, or the official zip as it is.

Market-1501's layout, which DukeMTMC-reID and the synthetic pedestrians share: three folders of images whose
names start with the identity and the camera, as in `bounding_box_train/0002_c1s1_000451_03.jpg`.
"""

from __future__ import annotations

import os
import re
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from vpm_jax.errors import UserError

FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
TITLES = {"market1501": "Market-1501", "dukemtmc": "DukeMTMC-reID", "synthetic": "synthetic pedestrians"}
PREPARED = "dataset_info.json"  # the file that TFDS writes into a prepared dataset

# Usual names of a copy, lower case and without punctuation: Market-1501-v15.09.15, DukeMTMC-reID.zip, market1501 ...
_USUAL = {
    "market1501": re.compile(r"market(1501.*)?"),
    "dukemtmc": re.compile(r"duke(mtmc(reid.*)?)?"),
    "synthetic": re.compile(r"synthetic"),
}
_FORMS = ("prepared", "folder", "zip")  # in order of preference
_NAME = re.compile(r"(-1|\d{4})_c(\d)")
_SUFFIXES = (".jpg", ".jpeg", ".png")


@dataclass(frozen=True)
class Place:
    """A dataset that was found: its form ("folder" | "zip" | "prepared"), its path and, in a zip, the folder inside."""

    form: str
    path: Path
    inside: str = ""

    def __str__(self) -> str:
        return f"the {'prepared folder' if self.form == 'prepared' else self.form} {self.path}"


@dataclass(frozen=True)
class Listing:
    """The images of one split, sorted by file name so that every file system and form gives the same order."""

    names: tuple[str, ...]  # "bounding_box_train/0002_c1s1_000451_03.jpg"
    identity: np.ndarray  # int32 [N]
    camera: np.ndarray  # int32 [N]
    ignored: tuple[str, ...]  # names of files that are no images of a person


def locate(root: Path, name: str, search: bool = True) -> Place | None:
    """Finds the dataset `name` at `root` and, with `search`, under its usual names below `root`; None if there is none.

    A prepared copy goes before a folder and a folder before a zip; among equals the first by name.
    """
    if root.is_file():
        return Place("prepared", root.parent) if root.name == PREPARED else Place("zip", root)
    try:
        places = sorted(_places(root, name, 2 if search else 0), key=lambda p: _FORMS.index(p.form))
    except OSError as error:
        raise UserError(f"{error.filename} cannot be listed: {error.strerror}.") from error
    return places[0] if places else None


def _places(root: Path, name: str, depth: int) -> Iterable[Place]:
    if (root / PREPARED).is_file():
        yield Place("prepared", root)
        return
    if any((root / folder).is_dir() for folder in FOLDERS.values()):
        yield Place("folder", root)
    for child in sorted(root.iterdir()):
        if re.fullmatch(r"\d+\.\d+\.\d+", child.name) and (child / PREPARED).is_file():
            yield Place("prepared", child)
        elif depth and child.is_dir() and _usual(child.name, name):
            yield from _places(child, name, depth - 1)
        elif depth and child.suffix.lower() == ".zip" and _usual(child.stem, name):
            yield Place("zip", child)


def _usual(file_name: str, name: str) -> bool:
    return _USUAL[name].fullmatch(re.sub(r"[^a-z0-9]", "", file_name.lower())) is not None


def list_folder(root: Path) -> dict[str, Listing]:
    """Lists the three splits of a dataset folder. UserError for a missing folder, or one without images."""
    files = {}
    for split, folder in FOLDERS.items():
        try:
            with os.scandir(root / folder) as entries:
                files[split] = [entry.name for entry in entries if entry.is_file()]
        except FileNotFoundError:
            pass
        except OSError as error:
            raise UserError(f"{root / folder} cannot be listed: {error.strerror}.") from error
    return _listings(files, f"The folder {root}")


def list_zip(path: Path, name: str) -> tuple[str, dict[str, Listing]]:
    """Lists the three splits of an official zip as it is; returns also the folder inside, "" or ending in "/".

    UserError for a truncated zip, or one that holds no dataset or several.
    """
    open_zip.cache_clear()  # the file may have been replaced since this process last read it
    wanted = set(FOLDERS.values())
    found: dict[str, dict[str, list[str]]] = {}  # folder inside -> split folder -> file names
    for entry in open_zip(str(path), os.getpid()).namelist():
        parent, _, file_name = entry.rpartition("/")
        inside, _, folder = parent.rpartition("/")
        if folder in wanted and not entry.startswith("__MACOSX/"):
            files = found.setdefault(inside + "/" if inside else "", {}).setdefault(folder, [])
            if file_name:  # else the entry is the folder itself
                files.append(file_name)
    # A folder named "query" alone says nothing: other things in a zip may have that name.
    telling = {FOLDERS["train"], FOLDERS["gallery"]}
    datasets = {inside: files for inside, files in found.items() if telling & set(files)}
    if len(datasets) > 1:
        datasets = {k: v for k, v in datasets.items() if _usual(k.rstrip("/").rpartition("/")[2], name)} or datasets
    if len(datasets) != 1:
        what = f"several datasets ({', '.join(sorted(datasets))})" if datasets else f"no folder {FOLDERS['train']}"
        raise UserError(
            f"The zip {path} holds {what}; expected one dataset with the folders {', '.join(FOLDERS.values())}: "
            "get the official zip, or unpack this one and set config.data.root to the folder inside."
        )
    [(inside, folders)] = datasets.items()
    listed = {split: folders[folder] for split, folder in FOLDERS.items() if folder in folders}
    return inside, _listings(listed, f"The zip {path}")


def _listings(files: dict[str, list[str]], where: str) -> dict[str, Listing]:
    missing = [FOLDERS[split] for split in FOLDERS if split not in files]
    if missing:
        present = ", ".join(FOLDERS[split] for split in files)
        raise UserError(
            f"{where} has {present} but no {' and no '.join(missing)}; expected all of {', '.join(FOLDERS.values())}: "
            "complete it from the official archive."
        )
    return {split: _listing(FOLDERS[split], names, where) for split, names in files.items()}


def _listing(folder: str, files: Iterable[str], where: str) -> Listing:
    kept, ignored = [], []
    for name in sorted(set(files)):
        match = _NAME.match(name)
        if match and name.lower().endswith(_SUFFIXES):
            kept.append((f"{folder}/{name}", int(match[1]), int(match[2])))
        else:
            ignored.append(f"{folder}/{name}")
    if not kept:
        held = f"no image among {len(ignored):,} file{'s' * (len(ignored) > 1)}" if ignored else "no file"
        raise UserError(
            f"{where} has {held} in {folder}; expected images named IDENTITY_cCAMERA..., such as "
            "0002_c1s1_000451_03.jpg: complete it from the official archive."
        )
    names, identity, camera = zip(*kept, strict=True)
    return Listing(names, np.array(identity, np.int32), np.array(camera, np.int32), tuple(ignored))


@dataclass(frozen=True)
class FolderReader:
    """Reads images of a dataset folder."""

    root: Path

    def read(self, name: str, position: int) -> bytes:
        try:
            with open(os.path.join(self.root, name), "rb", buffering=0) as file:  # 1.4 times Path.read_bytes
                return file.read()
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
        raise UserError(
            f"{path} is not a whole zip ({error}): it is truncated or of another kind, so get it again."
        ) from error
    except OSError as error:
        raise UserError(f"The zip {path} cannot be opened: {error.strerror or error}.") from error
