"""Feature stores: features and visibility of galleries larger than memory, on disk (NumPy only).

A store is a folder. Its files are append-only, and `store.json` holds their committed lengths. It is replaced
atomically, so killing a writer loses only images that were not committed.

  store.json         format version, images, regions, channels, dtype, model, config, checksums, generation N
  features-N.bin     float16 or float32 [G, P, C], Eq. 3
  visibility-N.bin   float32 [G, P], Eq. 2
  names-N.jsonl      one line per image: [name, file size in bytes, mtime in ns]

Removing images writes the files of generation N + 1 and then switches to them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import mmap
import os
import weakref
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from vpm_jax.disk import make_folder, write_atomically, writing
from vpm_jax.errors import UserError

VERSION = 1
DTYPES = ("float16", "float32")
_COPY_BYTES = 32 * 2**20  # read or written at a time
_AGAIN = "create it again (python -m vpm_jax.search index) in another folder."


class Entry(NamedTuple):
    """An image of a store; size and mtime show whether its file has changed."""

    name: str
    size: int = 0  # bytes
    mtime_ns: int = 0


@dataclasses.dataclass(frozen=True)
class About:
    """The content of store.json."""

    model: str  # the fingerprint of the model that described the images
    config: str  # a digest of its config
    regions: int
    channels: int
    dtype: str = "float16"  # of the features
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # JSON of the caller
    count: int = 0  # images
    generation: int = 0
    checksums: dict[str, int] = dataclasses.field(default_factory=dict)  # CRC-32 of each file's committed bytes
    names_bytes: int = 0
    version: int = VERSION

    def bytes_of(self, kind: str) -> int:
        """The committed size of a file: "features", "visibility" or "names"."""
        if kind == "names":
            return self.names_bytes
        width = self.regions * self.channels * np.dtype(self.dtype).itemsize if kind == "features" else 4 * self.regions
        return self.count * width


_KINDS = {"features": "bin", "visibility": "bin", "names": "jsonl"}


def _file(folder: Path, kind: str, generation: int) -> Path:
    return folder / f"{kind}-{generation}.{_KINDS[kind]}"


class _File:
    """A file open for reading, closed when garbage-collected."""

    def __init__(self, path: Path):
        self.path, self.fd = path, os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.fd)


class Rows:
    """An array [G, ...] in a file, memory-mapped a slice at a time, so that pages are freed with the slice.

    Slices are read-only views of the file; rows selected by an index array are copies.
    """

    def __init__(self, file: _File, dtype: str, shape: tuple[int, ...]):
        self._file, self.dtype, self.shape = file, np.dtype(dtype), shape
        self._row_bytes = int(np.prod(shape[1:])) * self.dtype.itemsize

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice | np.ndarray) -> np.ndarray:
        if not isinstance(rows, slice):
            first, last = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
            return self._map(first, last, scattered=2 * len(rows) < last - first)[rows - first]
        first, last, step = rows.indices(len(self))
        if step < 1:
            raise ValueError(f"rows {rows}, expected a positive step")
        return self._map(first, max(first, last))[::step]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self._map(0, len(self)), dtype)

    def _map(self, first: int, last: int, scattered: bool = False) -> np.ndarray:
        if first == last:
            return np.empty((0, *self.shape[1:]), self.dtype)
        start = first * self._row_bytes
        aligned = start - start % mmap.ALLOCATIONGRANULARITY
        length = last * self._row_bytes - aligned
        mapped = mmap.mmap(self._file.fd, length, access=mmap.ACCESS_READ, offset=aligned)
        if scattered and hasattr(mmap, "MADV_RANDOM"):  # or the system also reads far around each row
            mapped.madvise(mmap.MADV_RANDOM)
        values = np.frombuffer(mapped, self.dtype, (last - first) * int(np.prod(self.shape[1:])), start - aligned)
        return values.reshape(last - first, *self.shape[1:])


class Store:
    """A store opened for reading: a snapshot that later writes do not change.

    Attributes:
      about: the model, shapes and the number of images.
      features: [G, P, C], memory-mapped (see `Rows`).
      visibility: float32 [G, P], in memory: the predicted scores of Eq. 2, see `matching.match_visibility`.

    Raises:
      UserError: if the folder holds no store, or one that is damaged, truncated or of another version.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        for attempt in range(5):  # a writer may switch generations between two reads
            self.about = _read_about(self.folder)
            try:
                self._files = {kind: _File(_file(self.folder, kind, self.about.generation)) for kind in _KINDS}
                break
            except OSError as error:
                if attempt == 4:
                    raise UserError(
                        f"{error.filename} cannot be read ({error.strerror}): the store is damaged, {_AGAIN}"
                    ) from error
        about = self.about
        for kind, file in self._files.items():
            size, expected = os.fstat(file.fd).st_size, about.bytes_of(kind)
            if size < expected:
                raise UserError(f"{file.path} is cut short ({size} bytes, expected {expected}): {_AGAIN}")
        self.features = Rows(self._files["features"], about.dtype, (about.count, about.regions, about.channels))
        scores = np.frombuffer(self._checked("visibility"), np.float32)
        self.visibility = scores.reshape(about.count, about.regions)

    def __len__(self) -> int:
        return self.about.count

    def __repr__(self) -> str:
        about = self.about
        return f"Store({self.folder}: {len(self)} images, {about.regions} x {about.channels} {about.dtype})"

    @cached_property
    def entries(self) -> list[Entry]:
        """The images, in the order of the features."""
        lines = self._checked("names").decode().splitlines()
        try:
            entries = [Entry(*fields) for fields in json.loads("[" + ",".join(lines) + "]")]
        except (ValueError, TypeError) as error:
            raise UserError(f"{self._files['names'].path} is damaged ({error}): {_AGAIN}") from error
        if len(entries) != len(self):
            reason = f"{len(entries)} names for {len(self)} images"
            raise UserError(f"{self._files['names'].path} is damaged ({reason}): {_AGAIN}")
        return entries

    @property
    def names(self) -> list[str]:
        return [entry.name for entry in self.entries]

    def check_model(self, model: str, source: str) -> None:
        """Raises UserError unless the model with this fingerprint made the store; `source` names the model."""
        if model != self.about.model:
            raise UserError(
                f"{self.folder} was made by another model (fingerprint {self.about.model}, that of {source} is "
                f"{model}) and features of different models are not comparable: use the model that made it, or another "
                "store."
            )

    def path(self, key: str) -> Path | None:
        """The path stored as `key` of About.extra, or None. Raises UserError for any other type."""
        value = self.about.extra.get(key) or None
        if not isinstance(value, str | None):
            raise UserError(f"{self.folder / 'store.json'} is damaged ({key} is {value!r}, expected a path): {_AGAIN}")
        return None if value is None else Path(value)

    def verify(self) -> None:
        """Reads all files and compares their checksums. Raises UserError if one is damaged."""
        for kind in _KINDS:
            self._checked(kind, keep=False)
        _ = self.entries

    def _checked(self, kind: str, keep: bool = True) -> bytes:
        """The committed bytes of a file, if they are to `keep`."""
        size, offset, checksum, chunks = self.about.bytes_of(kind), 0, 0, []
        while chunk := os.pread(self._files[kind].fd, min(size - offset, _COPY_BYTES), offset):
            offset, checksum = offset + len(chunk), zlib.crc32(chunk, checksum)
            if keep:
                chunks.append(chunk)
        if offset < size or checksum != self.about.checksums.get(kind, 0):
            raise UserError(f"{self._files[kind].path} is damaged (its checksum differs): {_AGAIN}")
        return b"".join(chunks)


def _read_about(folder: Path) -> About:
    path = folder / "store.json"
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} holds no feature store (no store.json): create one with python -m vpm_jax.search index."
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}): {_AGAIN}") from None
    try:
        values = json.loads(text)
        version = values["version"]
        if version == VERSION:
            about = About(**values)
            numbers = (about.regions, about.channels, about.count + 1, about.generation + 1, about.names_bytes + 1)
            if not all(type(number) is int for number in (*numbers, *about.checksums.values())):
                raise ValueError("numbers that are not whole")
            if min(numbers) < 1 or about.dtype not in DTYPES or not isinstance(about.extra, dict):
                raise ValueError("values out of range")
            return about
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): {_AGAIN}") from None
    raise UserError(f"{folder} is a feature store of format {version}, this program reads format {VERSION}: {_AGAIN}")


class Writer:
    """A context manager that appends to a store, created if missing. A store has one writer at a time.

    Leaving the context without an error commits.

    Args:
      folder: of the store.
      about: of a new store. An existing store must have the same model, shapes and dtype, and takes the `config` and
        `extra` given here.

    Raises:
      UserError: for a store of another model, shape or dtype, one that is damaged or being written, or a folder that
        cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], about: About):
        self.folder = Path(folder)
        if about.dtype not in DTYPES:
            raise UserError(f"A store holds {' or '.join(DTYPES)}, not {about.dtype}.")
        if self.folder.is_dir() and not (self.folder / "store.json").exists():
            leftovers = {"lock"} | {_file(self.folder, kind, 0).name for kind in _KINDS}  # of a killed writer
            for path in self.folder.iterdir():
                if path.name not in leftovers and not path.name.startswith("."):
                    raise UserError(
                        f"{self.folder} holds other files ({path.name}): choose a new folder for the store."
                    )
        make_folder(self.folder)
        self._lock = (self.folder / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._lock.close()
            raise UserError(f"{self.folder} is being written by another process: wait for it to end.") from None
        self._files: dict[str, BinaryIO] = {}
        try:
            self._start(about)
        except BaseException:
            self._close()
            self._lock.close()
            raise

    def _start(self, about: About) -> None:
        """Opens the store or creates it."""
        self.about = about
        if (self.folder / "store.json").exists():
            store = Store(self.folder)
            store.check_model(about.model, "the given one")
            shape, expected = ((a.regions, a.channels, a.dtype) for a in (about, store.about))
            if shape != expected:
                raise UserError(
                    f"{self.folder} holds {expected[0]} x {expected[1]} {expected[2]}, not {shape[0]} x {shape[1]} "
                    f"{shape[2]}: use the same shape and dtype, or another folder."
                )
            store.verify()
            self.about = dataclasses.replace(store.about, config=about.config, extra=about.extra)
        self._open(self.about.generation)
        self._remove_strays()
        self.commit()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        try:
            if error is None:
                self.commit()
        finally:
            self._close()
            self._lock.close()

    def append(self, entries: Sequence[Entry], features: np.ndarray, visibility: np.ndarray) -> None:
        """Adds images: features [n, P, C], visibility [n, P]. `commit` makes them permanent.

        Raises:
          ValueError: for other shapes, features that are not finite in the store's dtype, or a visibility that is
            negative or not finite.
          UserError: if the disk is full.
        """
        about = self.about
        with np.errstate(over="ignore"):  # reported below
            values = np.ascontiguousarray(features, about.dtype)
        scores = np.ascontiguousarray(visibility, np.float32)
        expected = (len(entries), about.regions, about.channels)
        if values.shape != expected or scores.shape != expected[:2]:
            raise ValueError(f"features {values.shape} with visibility {scores.shape}, expected {expected}")
        if not np.isfinite(values).all():
            raise ValueError(f"features are not finite as {about.dtype}")
        if not ((scores >= 0) & np.isfinite(scores)).all():
            raise ValueError("visibility is negative or not finite")
        lines = "".join(json.dumps(list(entry)) + "\n" for entry in entries).encode()
        data = {"features": values.tobytes(), "visibility": scores.tobytes(), "names": lines}
        for kind, chunk in data.items():
            with writing(Path(self._files[kind].name)):
                self._files[kind].write(chunk)
        checksums = {kind: zlib.crc32(chunk, about.checksums.get(kind, 0)) for kind, chunk in data.items()}
        self.about = dataclasses.replace(
            about, count=about.count + len(entries), names_bytes=about.names_bytes + len(lines), checksums=checksums
        )

    def commit(self) -> None:
        """Makes appended images permanent. Raises UserError if the disk is full."""
        for file in self._files.values():
            with writing(Path(file.name)):
                file.flush()
                os.fsync(file.fileno())
        write_atomically(self.folder / "store.json", json.dumps(dataclasses.asdict(self.about), indent=1) + "\n")

    def keep(self, mask: np.ndarray) -> None:
        """Keeps these images, bool [G], and removes all others, atomically.

        Takes as much disk space as the kept images. Raises UserError if the disk is full.
        """
        self.commit()
        if mask.all():
            return
        store, rows = Store(self.folder), np.flatnonzero(mask)
        old, before = self._files, self.about
        fresh = dataclasses.replace(before, count=0, names_bytes=0, checksums={}, generation=before.generation + 1)
        try:
            self._files, self.about = {}, fresh
            self._open(fresh.generation)
            step = max(1, _COPY_BYTES // (before.regions * before.channels * 4))
            for start in range(0, len(rows), step):
                chunk = rows[start : start + step]
                self.append([store.entries[i] for i in chunk], store.features[chunk], store.visibility[chunk])
            self.commit()
        except BaseException:
            self._close()
            self._files, self.about = old, before
            raise
        for file in old.values():
            file.close()
        self._remove_strays()

    def _open(self, generation: int) -> None:
        """Opens the files for appending and truncates what was not committed."""
        for kind in _KINDS:
            path = _file(self.folder, kind, generation)
            with writing(path):
                file = path.open("r+b" if path.exists() else "w+b")
                self._files[kind] = file
                file.truncate(self.about.bytes_of(kind))
                file.seek(0, os.SEEK_END)

    def _remove_strays(self) -> None:
        """Removes the files of other generations."""
        current = {_file(self.folder, kind, self.about.generation) for kind in _KINDS}
        for kind, suffix in _KINDS.items():
            for path in set(self.folder.glob(f"{kind}-*.{suffix}")) - current:
                path.unlink(missing_ok=True)

    def _close(self) -> None:
        for file in self._files.values():
            with contextlib.suppress(OSError):  # a full disk was already reported
                file.close()
