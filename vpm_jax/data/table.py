"""Own images, listed in a CSV: the path, the identity, the split and, where it is known, the camera of each.

    path,identity,camera,split
    images/anna_1.jpg,anna,1,train
    images/anna_2.jpg,anna,2,train
    images/bob_1.jpg,bob,entrance,query
    images/bob_2.jpg,bob,hall,gallery

Paths are relative to the CSV's folder. Identities and cameras are any text or numbers, 7 and 007 the same identity;
identity -1 is junk, which is neither trained on nor ranked. Without cameras nothing is dropped by them. Columns may
have other usual names (`ALIASES`); the separator and the encoding are guessed. Every error names the line it is about.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vpm_jax.data.split import Listing, number, number_identities, printable
from vpm_jax.errors import UserError

COLUMNS = ("path", "identity", "camera", "split")
SPLITS = ("train", "query", "gallery")
ALIASES = {
    "path": ("img_path", "image_path", "file_path", "filepath", "filename", "image", "img"),
    "identity": ("pid", "person_id", "id"),
    "camera": ("camid", "cam_id", "camera_id", "cam"),
    "split": ("subset", "set"),
}
_SPLIT_ALIASES = {"training": "train", "probe": "query"}
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
# Of files that are not UTF-8. The first leaves bytes as they are: so may the names of the files on the disk be.
_ENCODINGS = (("utf-8", "surrogateescape"), ("gb18030", "strict"), ("latin-1", "strict"))


class _Row(NamedTuple):
    line: int  # from 1, as an editor counts
    path: str
    identity: str
    camera: str
    split: str


def read(path: Path) -> tuple[dict[str, Listing], list[str]]:
    """The images of each split that has any, sorted by path, and notes.

    Identities are numbered from 1, numbers first and in their order, then the rest by name. Cameras that are not all
    whole numbers are numbered likewise.

    Raises:
      UserError: that names the file and the line, for a missing column or file, an unknown split, an empty value, a
        path that is there twice.
    """
    rows, notes = _rows_and_notes(path)
    if not rows:
        raise UserError(f"{path} lists no image: expected a line for each below the header.")
    with_query = any(row.split == "query" for row in rows)
    first: dict[str, int] = {}  # the line of each path
    for row in rows:
        for column in ("path", "identity", "split"):
            if not getattr(row, column):
                raise _error(path, row.line, f"the {column} is empty", "fill it in, or remove the line")
        if row.split not in SPLITS and not (row.split == "test" and with_query):
            expected = f"expected {', '.join(SPLITS[:2])} or gallery"
            if row.split == "test":
                expected += " (test means gallery where there are query images)"
            raise _error(path, row.line, f"the split is {row.split!r}", expected)
        key = os.path.normpath(row.path)
        if key in first:
            raise _error(path, row.line, f"{row.path} is also in line {first[key]}", "list every image once")
        first[key] = row.line
        if not _exists(path, row):
            raise _error(
                path,
                row.line,
                f"there is no file {row.path!r}",
                f"paths are relative to the folder of the CSV, {path.parent.absolute()}",
            )
    numbers = number_identities({row.identity for row in rows})
    cameras = _cameras(path, rows)
    listings = {}
    for split in SPLITS:
        taken = (split, "test") if split == "gallery" else (split,)
        order = [i for i, row in enumerate(rows) if row.split in taken]
        order.sort(key=lambda i: os.path.normpath(rows[i].path))
        if order:
            identity = np.array([numbers[rows[i].identity] for i in order], np.int32)
            camera = None if cameras is None else cameras[order]
            listings[split] = Listing(tuple(rows[i].path for i in order), identity, camera)
    return listings, notes


def _exists(path: Path, row: _Row) -> bool:
    return "\0" not in row.path and os.path.isfile(path.parent / row.path)


def _rows_and_notes(path: Path) -> tuple[list[_Row], list[str]]:
    """The rows that hold anything, read by the encoding by which most of their files are there."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"The CSV {path} cannot be read: {error.strerror}.") from error
    for bom, encoding in ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"), (b"", "utf-8-sig")):
        if data.startswith(bom) and (text := _decode(data, encoding)) is not None and "\0" not in text:
            return _rows(path, text)
    if b"\0" in data:
        raise UserError(f"{path} is no text: save it as UTF-8 (in Excel: 'CSV UTF-8 (Comma delimited)').")
    best: tuple[int, str, list[_Row], list[str]] = (-1, "", [], [])
    for encoding, errors in _ENCODINGS:
        if (text := _decode(data, encoding, errors)) is not None:
            rows, notes = _rows(path, text)
            there = sum(_exists(path, row) for row in rows)
            if there > best[0]:
                best = there, encoding, rows, notes
            if there == len(rows):
                break
    *_, encoding, rows, notes = best
    if encoding != "utf-8":
        notes.append(f"{path.name} is not UTF-8 and was read as {encoding}.")
    return rows, notes


def _decode(data: bytes, encoding: str, errors: str = "strict") -> str | None:
    try:
        return data.decode(encoding, errors)
    except UnicodeError:
        return None


def _rows(path: Path, text: str) -> tuple[list[_Row], list[str]]:
    """The rows that hold anything, their values stripped, and notes."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    separator = _separator(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] = []
    notes: list[str] = []
    rows = []
    end = 0  # the line at which the last row ended
    try:
        for values in reader:
            line, end = end + 1, reader.line_num
            values = [value.strip() for value in values]
            if not any(values):
                continue
            if not header:
                header = _header(path, line, values, notes)
                continue
            if len(values) != len(header):
                found = f"{len(values)} value{'s' * (len(values) > 1)} for the {len(header)} columns of the header"
                raise _error(
                    path, line, found, f"separate them by {_SEPARATORS[separator]}; a value with one needs quotes"
                )
            row = dict(zip(header, values, strict=True))
            identity = row["identity"]
            if re.fullmatch(r"[+-]?[0-9]{1,18}", identity):
                identity = str(int(identity))  # 007 is 7
            # Windows writes a\b.jpg, which is a/b.jpg everywhere.
            image, split = row["path"].replace("\\", "/"), row["split"].lower()
            rows.append(_Row(line, image, identity, row.get("camera", ""), _SPLIT_ALIASES.get(split, split)))
    except csv.Error as error:
        raise _error(path, end + 1, f"the quotes do not pair up ({error})", "mend them") from None
    if not header:
        raise UserError(f"{path} is empty: expected the header {','.join(COLUMNS)} and a line for each image.")
    return rows, notes


def _separator(text: str) -> str:
    """The separator by which most columns of the header are known."""
    header = next(filter(str.strip, text.split("\n")), "")

    def known(separator: str) -> int:
        return sum(_column(value) is not None for value in header.split(separator))

    return max(_SEPARATORS, key=known)


def _column(value: str) -> str | None:
    """The column that a value of the header names; None if it is none of ours."""
    name = value.strip().strip('"').lower()
    return next((column for column, others in ALIASES.items() if name == column or name in others), None)


def _header(path: Path, line: int, values: list[str], notes: list[str]) -> list[str]:
    header = [value.lower() for value in values]
    for column, others in ALIASES.items():
        if column not in header:  # else another name is that of a column that is not used
            header = [column if value in others else value for value in header]
    missing = [column for column in COLUMNS if column not in header and column != "camera"]
    if missing:
        raise _error(
            path,
            line,
            f"there is no column {' and no '.join(missing)} in the header {','.join(values)!r}",
            f"expected {','.join(COLUMNS)}, where camera may be left out",
        )
    for column in COLUMNS:
        if header.count(column) > 1:
            raise _error(path, line, f"the column {column} is there twice", "remove one")
    unknown = [value for value, column in zip(values, header, strict=True) if value and column not in COLUMNS]
    if unknown:
        notes.append(f"Ignored the column{'s' * (len(unknown) > 1)} {', '.join(unknown)}.")
    return header


def _cameras(path: Path, rows: list[_Row]) -> np.ndarray | None:
    """int32 [rows], or None if no row has a camera."""
    if not any(row.camera for row in rows):
        return None
    for row in rows:
        if not row.camera:
            raise _error(path, row.line, "the camera is empty", "fill it in, or leave the column out for all images")
    if all(re.fullmatch(r"[0-9]{1,9}", row.camera) for row in rows):
        return np.array([int(row.camera) for row in rows], np.int32)
    numbers = number({row.camera for row in rows}, 1)
    return np.array([numbers[row.camera] for row in rows], np.int32)


def _error(path: Path, line: int, found: str, advice: str) -> UserError:
    return UserError(printable(f"Line {line} of {path}: {found}; {advice}."))
