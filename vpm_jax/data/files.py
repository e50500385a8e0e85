"""The files of a dataset, in a folder or in a zip as it is: listing them, and reading one by its name.

A zip may lie in another zip, as Partial-REID's and Partial-iLIDS's do; such an inner zip is held in memory.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from dataclasses import dataclass
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

from vpm_jax.errors import UserError

LARGEST_INNER = 2**30  # bytes of an inner zip
_UNPACK = "unpack it and set config.data.root to the folder inside"
# How other archives start, and what they are called.
_ARCHIVES = {
    b"\x1f\x8b": "a gzip (tar.gz) archive",
    b"BZh": "a bzip2 (tar.bz2) archive",
    b"\xfd7zXZ": "an xz (tar.xz) archive",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7z archive",
}
ARCHIVE_SUFFIXES = (".tar", ".gz", ".tgz", ".bz2", ".xz", ".rar", ".7z")


class Entries(NamedTuple):
    """What a folder holds, by name."""

    folders: list[str]
    files: list[str]
    broken: list[str]  # neither: links that lead nowhere, what may not be looked at


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
    """Reads images of a zip. Holds no handle: each process opens the zip once, when it first reads."""

    path: Path
    inside: str = ""  # the folder inside, "" or ending in "/"
    member: str = ""  # of a zip in the zip, its name there

    def read(self, name: str, position: int) -> bytes:
        try:
            archive = open_zip(str(self.path), self.member, os.getpid())
            return archive.zip.read(archive.entries[self.inside + name])
        except (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"The image {name} in the zip {self.path} cannot be read ({error}): get the zip again."
            ) from error


class FolderTree:
    """A folder on disk."""

    def __init__(self, root: Path):
        self.root, self.where = root, f"The folder {root}"
        self._entries: dict[str, Entries] = {}

    def entries(self, folder: str = "") -> Entries:
        """What `folder`, a path below the root, holds."""
        if folder not in self._entries:
            found = Entries([], [], [])
            try:
                with os.scandir(self.root / folder) as scan:
                    for entry in scan:
                        if entry.name != "__MACOSX":
                            found[_kind(entry)].append(entry.name)
            except OSError as error:
                raise UserError(f"{error.filename} cannot be listed: {error.strerror}.") from error
            self._entries[folder] = found
        return self._entries[folder]

    def read(self, name: str) -> bytes:
        return self.reader.read(name, 0)

    @property
    def reader(self) -> FolderReader:
        return FolderReader(self.root.absolute())


def _kind(entry: os.DirEntry) -> int:
    """The field of `Entries` that an entry of a folder belongs to."""
    try:
        return 0 if entry.is_dir() else 1 if entry.is_file() else 2
    except OSError:
        return 2


class ZipTree:
    """A folder in a zip, or in a zip in a zip. Raises UserError where the zip cannot be used."""

    def __init__(self, path: Path, member: str = "", inside: str = "", folders: dict[str, Entries] | None = None):
        self.path, self.member, self.inside = path, member, inside
        self.where = f"The zip {path}"
        self.folders = _folders(path, member) if folders is None else folders  # of the whole zip, by their paths

    def entries(self, folder: str = "") -> Entries:
        return self.folders.get((self.inside + folder).rstrip("/"), Entries([], [], []))

    def read(self, name: str) -> bytes:
        return self.reader.read(name, 0)

    def at(self, inside: str) -> ZipTree:
        """A folder of the zip; "" is the zip itself."""
        return ZipTree(self.path, self.member, inside and inside + "/", self.folders)

    @property
    def reader(self) -> ZipReader:
        return ZipReader(self.path.absolute(), self.inside, self.member)


def _folders(path: Path, member: str) -> dict[str, Entries]:
    """What every folder of a zip holds, by its path; the zip itself is ""."""
    found = {"": Entries([], [], [])}
    for name in open_zip(str(path), member, os.getpid()).entries:
        *parents, file = name.split("/")  # the name is "" where the entry is a folder
        if "__MACOSX" in parents:
            continue
        for depth, parent in enumerate(parents):
            here = "/".join(parents[: depth + 1])
            if here not in found:
                found[here] = Entries([], [], [])
                found["/".join(parents[:depth])].folders.append(parent)
        if file:
            found["/".join(parents)].files.append(file)
    return found


Tree = FolderTree | ZipTree


def below(tree: Tree, folder: str, depth: int) -> tuple[list[str], list[str]]:
    """The files of a folder and up to `depth` folders deeper, as paths below it, and what is broken there."""
    here = tree.entries(folder)
    files, broken = list(here.files), list(here.broken)
    for child in here.folders if depth else ():
        found = below(tree, f"{folder}/{child}" if folder else child, depth - 1)
        files += [f"{child}/{name}" for name in found[0]]
        broken += [f"{child}/{name}" for name in found[1]]
    return files, broken


class Archive(NamedTuple):
    zip: zipfile.ZipFile
    entries: dict[str, zipfile.ZipInfo]  # by name, with slashes where Windows wrote backslashes


@lru_cache(maxsize=4)
def open_zip(path: str, member: str, process: int) -> Archive:
    """One handle per process (`process` is its id), shared by its threads: a fork would share the file's offset."""
    where = f"{path}/{member}" if member else path
    try:
        if member:
            outer = open_zip(path, "", process)
            if outer.entries[member].file_size > LARGEST_INNER:
                raise UserError(f"{path} holds {member}, a zip too large to be read inside another: {_UNPACK}.")
            archive = zipfile.ZipFile(BytesIO(outer.zip.read(outer.entries[member])))
        else:
            archive = zipfile.ZipFile(path)
    except (zipfile.BadZipFile, zlib.error) as error:
        if kind := other_archive(Path(path)):
            raise UserError(f"{path} is no zip but {kind}: {_UNPACK}.") from None
        if not where.lower().endswith(".zip"):
            raise UserError(f"{path} is no zip: expected a dataset's folder or its official zip.") from None
        raise UserError(
            f"{where} is not a whole zip ({error}): it is truncated or of another kind, so get it again."
        ) from error
    except OSError as error:
        raise UserError(f"The zip {path} cannot be opened: {error.strerror or error}.") from error
    entries = archive.infolist()
    if any(entry.flag_bits & 1 for entry in entries):
        raise UserError(f"{where} is locked by a password: {_UNPACK}.")
    return Archive(archive, {entry.filename.replace("\\", "/"): entry for entry in entries})


def other_archive(path: Path) -> str | None:
    """What kind of archive a file is, if it is one that is not read; None for all else."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError:
        return None
    if start[257:262] == b"ustar":
        return "a tar archive"
    return next((kind for magic, kind in _ARCHIVES.items() if start.startswith(magic)), None)
