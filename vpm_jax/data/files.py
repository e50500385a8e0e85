"""Listing and reading the files of a dataset in a folder or a zip, which is never unpacked.

A zip may be inside another zip, as for Partial-REID and Partial-iLIDS; the inner zip is then kept in memory.
"""

from __future__ import annotations

import os
import struct
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
# Unsupported archives by their first bytes.
_ARCHIVES = {
    b"\x1f\x8b": "a gzip (tar.gz) archive",
    b"BZh": "a bzip2 (tar.bz2) archive",
    b"\xfd7zXZ": "an xz (tar.xz) archive",
    b"Rar!": "a RAR archive",
    b"7z\xbc\xaf": "a 7z archive",
}
ARCHIVE_SUFFIXES = (".tar", ".gz", ".tgz", ".bz2", ".xz", ".rar", ".7z")


class Entries(NamedTuple):
    """The names in a folder."""

    folders: list[str]
    files: list[str]
    broken: list[str]  # broken links and entries without permission


@dataclass(frozen=True)
class FolderReader:
    """Reads images of a dataset folder."""

    root: Path

    def read(self, name: str, position: int) -> bytes:
        try:
            # The name is absolute if a CSV lists absolute paths. Not Path.read_bytes, which takes twice as long.
            with open(os.path.join(self.root, name), "rb", buffering=0) as file:
                return file.readall()
        except OSError as error:
            raise UserError(f"The image {self.root / name} cannot be read: {error.strerror}.") from error


@dataclass(frozen=True)
class ZipReader:
    """Reads images of a zip. Keeps no open file, so that it pickles; each process opens the zip on its first read."""

    path: Path
    inside: str = ""  # the dataset's folder in the zip, "" or ending in "/"
    member: str = ""  # the name of an inner zip, or ""

    def read(self, name: str, position: int) -> bytes:
        try:
            archive = open_zip(str(self.path), self.member, os.getpid())
            return archive.zip.read(archive.entries[self.inside + name])
        except (OSError, EOFError, KeyError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(
                f"The image {name} in the zip {self.path} cannot be read ({error}): download the zip again."
            ) from error


class FolderTree:
    """A folder on disk."""

    def __init__(self, root: Path):
        self.root, self.where = root, f"The folder {root}"
        self._entries: dict[str, Entries] = {}

    def entries(self, folder: str = "") -> Entries:
        """The entries of `folder`, a path below the root."""
        if folder not in self._entries:
            entries = Entries([], [], [])
            try:
                with os.scandir(self.root / folder) as scan:
                    for entry in scan:
                        if entry.name != "__MACOSX":
                            entries[_kind(entry)].append(entry.name)
            except OSError as error:
                raise UserError(f"{error.filename} cannot be listed: {error.strerror}.") from error
            self._entries[folder] = entries
        return self._entries[folder]

    @property
    def reader(self) -> FolderReader:
        return FolderReader(self.root.absolute())


def _kind(entry: os.DirEntry) -> int:
    """The index of the `Entries` field for a directory entry."""
    try:
        return 0 if entry.is_dir() else 1 if entry.is_file() else 2
    except OSError:
        return 2


class ZipTree:
    """A folder in a zip or an inner zip. Raises UserError if the zip cannot be used."""

    def __init__(self, path: Path, member: str = "", inside: str = "", folders: dict[str, Entries] | None = None):
        self.path, self.member, self.inside = path, member, inside
        self.where = f"The zip {path}"
        self.folders = _folders(path, member) if folders is None else folders  # of the whole zip

    def entries(self, folder: str = "") -> Entries:
        return self.folders.get((self.inside + folder).rstrip("/"), Entries([], [], []))

    def at(self, inside: str) -> ZipTree:
        """Another folder of the zip; "" is its top level."""
        return ZipTree(self.path, self.member, inside and inside + "/", self.folders)

    @property
    def reader(self) -> ZipReader:
        return ZipReader(self.path.absolute(), self.inside, self.member)


def _folders(path: Path, member: str) -> dict[str, Entries]:
    """The entries of every folder of a zip by its path; the top level is ""."""
    folders, archive = {"": Entries([], [], [])}, open_zip(str(path), member, os.getpid())
    _check_headers(archive.zip, f"{path}/{member}" if member else str(path))
    for name in archive.entries:
        *parents, file = name.split("/")  # file is "" for a folder
        if "__MACOSX" in parents:
            continue
        for depth, parent in enumerate(parents):
            folder = "/".join(parents[: depth + 1])
            if folder not in folders:
                folders[folder] = Entries([], [], [])
                folders["/".join(parents[:depth])].folders.append(parent)
        if file:
            folders["/".join(parents)].files.append(file)
    return folders


def _check_headers(archive: zipfile.ZipFile, where: str) -> None:
    """Raises UserError unless the zip's directory describes its entries as their headers do.

    Otherwise, damage could turn the name of an image into one that is ignored, or leave nothing of its data.
    """
    file = archive.fp
    assert file is not None
    for entry in archive.infolist():
        file.seek(max(0, entry.header_offset))  # a damaged offset may be negative
        flags, *sizes, length = struct.unpack("<6xH6x3IH2x", file.read(30).ljust(30, b"\0"))
        encoding = "utf-8" if entry.flag_bits & 0x800 else "cp437"
        same = file.read(length) == entry.orig_filename.encode(encoding, "replace")
        # Checksum and sizes may follow the data instead (flag 8), and larger sizes are elsewhere.
        if any(sizes) and not flags & 8 and 0xFFFFFFFF not in sizes:
            same = same and sizes == [entry.CRC, entry.compress_size, entry.file_size]
        if not same:
            raise UserError(
                f"{where} is damaged (its directory and its headers describe {entry.filename} differently): "
                "download it again."
            )


Tree = FolderTree | ZipTree


def below(tree: Tree, folder: str, depth: int) -> tuple[list[str], list[str]]:
    """(files, broken entries) of a folder and up to `depth` levels below it, as paths relative to the folder."""
    entries = tree.entries(folder)
    files, broken = list(entries.files), list(entries.broken)
    for child in entries.folders if depth else ():
        child_files, child_broken = below(tree, f"{folder}/{child}" if folder else child, depth - 1)
        files += [f"{child}/{name}" for name in child_files]
        broken += [f"{child}/{name}" for name in child_broken]
    return files, broken


class Archive(NamedTuple):
    zip: zipfile.ZipFile
    entries: dict[str, zipfile.ZipInfo]  # by name; backslashes, which Windows may write, are replaced by slashes


@lru_cache(maxsize=4)
def open_zip(path: str, member: str, process: int) -> Archive:
    """The open zip, one per process (`process` is its id): after a fork, processes would share the file offset."""
    where = f"{path}/{member}" if member else path
    try:
        if member:
            outer = open_zip(path, "", process)
            if outer.entries[member].file_size > LARGEST_INNER:
                raise UserError(f"{path} contains {member}, a zip too large to read inside another: {_UNPACK}.")
            archive = zipfile.ZipFile(BytesIO(outer.zip.read(outer.entries[member])))
        else:
            archive = zipfile.ZipFile(path)
    # RuntimeError: a compression that zipfile does not know. ValueError: bad names and offsets.
    except (zipfile.BadZipFile, RuntimeError, ValueError, zlib.error) as error:
        if kind := other_archive(Path(path)):
            raise UserError(f"{path} is {kind}, expected a zip: {_UNPACK}.") from None
        if not where.lower().endswith(".zip"):
            raise UserError(f"{path} is not a zip: expected a dataset's folder or its official zip.") from None
        raise UserError(f"{where} is not an intact zip ({error}): download it again.") from error
    except OSError as error:
        raise UserError(f"The zip {path} cannot be opened: {error.strerror or error}.") from error
    entries = archive.infolist()
    if any(entry.flag_bits & 1 for entry in entries):
        raise UserError(f"{where} is protected by a password: {_UNPACK}.")
    return Archive(archive, {entry.filename.replace("\\", "/"): entry for entry in entries})


def other_archive(path: Path) -> str | None:
    """The type of an unsupported archive, None for any other file."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError:
        return None
    if start[257:262] == b"ustar":
        return "a tar archive"
    return next((kind for magic, kind in _ARCHIVES.items() if start.startswith(magic)), None)
