"""Writing to disk: atomically, with errors in words."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import secrets
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vpm_jax.errors import UserError, encodable


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` and renames it to `path` when the block succeeds.

    Raises:
      UserError: when the disk is full or read-only.
    """
    # Not named by the process id, which may be the same in several containers that share a disk.
    temporary = path.with_name(f".{secrets.token_hex(8)}-{path.name}")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Creates the folder and its parents. Raises UserError if it cannot be written."""
    if trouble := no_writing(folder):
        raise UserError(f"{folder} could not be written: {trouble}.", code="not-written")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file, as UTF-8, that is never seen half-written. Raises as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(encodable(text), encoding="utf-8")


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON record with its "checksum", for `intact`."""
    values = {key: value for key, value in record.items() if key != "checksum"}
    return values | {"checksum": hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()}


def intact(record: Mapping[str, Any]) -> bool:
    """Whether a JSON record is as it was `sealed`; those of earlier versions have no checksum."""
    return "checksum" not in record or record["checksum"] == sealed(record)["checksum"]


def check_utf8(folder: Path, need: str) -> None:
    """Raises UserError unless the absolute path of the folder is UTF-8; `need` names what needs it."""
    if encodable(folder.absolute()) != str(folder.absolute()):
        raise UserError(f"The path {folder.absolute()} is not UTF-8, which {need} need: choose another folder.")


_DISK = {
    errno.ENOSPC: "the disk is full: free some space and run the same command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the same command again",
    errno.EFBIG: "a file reached the size limit (ulimit -f): raise the limit and run the same command again",
    errno.EROFS: "that file system is read-only: choose another folder",
    errno.EACCES: "permission denied: choose another folder or change its permissions",
}


def disk_trouble(error: BaseException) -> str | None:
    """The problem with the disk and what to do, or None. Sees through libraries that wrap or quote the OS error."""
    cause: BaseException | None = error
    while cause is not None:
        for number, sentence in _DISK.items():
            if getattr(cause, "errno", None) == number or os.strerror(number) in str(cause):
                return sentence
        cause = cause.__cause__ or cause.__context__
    return None


def no_writing(folder: Path) -> str | None:
    """Why `folder` cannot be written or created, and what to do; None if it can."""
    folder = folder.absolute()
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not existing.is_dir():
        return f"{existing} is a file, expected a folder: choose another"
    if os.access(existing, os.W_OK | os.X_OK):
        return None
    return _DISK[errno.EROFS if os.statvfs(existing).f_flag & os.ST_RDONLY else errno.EACCES]


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns an OSError in the block into a UserError: `path` could not be written, and why."""
    try:
        yield
    except OSError as error:
        trouble = disk_trouble(error) or f"{error.strerror or error}: choose another folder"
        raise UserError(f"{path} could not be written: {trouble}.", code="not-written") from error


# What reading a damaged .npz raises. RuntimeError: damage can ask for what zipfile cannot do, such as decryption.
DAMAGED = (OSError, EOFError, ValueError, KeyError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error)


def write_arrays(path: str | os.PathLike[str], arrays: Mapping[str, Any]) -> None:
    """Writes a .npz under exactly this name, atomically. Raises as `replacing` does."""
    path = Path(os.path.expanduser(path))
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


@contextlib.contextmanager
def read_arrays(path: str | os.PathLike[str], kind: str) -> Iterator[dict[str, np.ndarray]]:
    """Gives the arrays of a .npz. Turns an error in reading or using them into a UserError that names the `kind`."""
    path = Path(os.path.expanduser(path))
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("not a .npz")
            file.seek(0)
            with np.load(file) as arrays:
                yield dict(arrays)
    except (*DAMAGED, AttributeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path} is not a saved {kind} ({reason}): save it again.") from None
