"""Own images, listed in a CSV: the path, the identity, the split and, where it is known, the camera of each.

    path,identity,camera,split
    images/anna_1.jpg,anna,1,train
    images/anna_2.jpg,anna,2,train
    images/bob_1.jpg,bob,1,query
    images/bob_2.jpg,bob,2,gallery

Paths are relative to the CSV's folder. Identities are any text or numbers, 7 and 007 the same; -1 is junk, which is
neither trained on nor ranked. Without cameras nothing is dropped by them. Every error names the line it is about.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vpm_jax.data.split import Listing
from vpm_jax.errors import UserError

COLUMNS = ("path", "identity", "camera", "split")
SPLITS = ("train", "query", "gallery")
_SEPARATORS = {";": "semicolons, as Excel writes it in many countries", "\t": "tabs"}


class _Row(NamedTuple):
    line: int  # from 1, as an editor counts
    path: str
    identity: str
    camera: str
    split: str


def read(path: Path) -> tuple[dict[str, Listing], list[str]]:
    """The images of each split that has any, sorted by path, and notes.

    Identities are numbered from 1, numbers first and in their order, then the rest by name.

    Raises:
      UserError: that names the file and the line, for a missing column or file, an unknown split, an empty value, a
        camera that is no number, a path that is there twice, another separator or encoding.
    """
    notes: list[str] = []
    rows = list(_rows(path, notes))
    first: dict[str, int] = {}  # the line of each path
    for row in rows:
        for column in ("path", "identity", "split"):
            if not getattr(row, column):
                raise _error(path, row.line, f"the {column} is empty", "fill it in, or remove the line")
        if row.split not in SPLITS:
            raise _error(path, row.line, f"the split is {row.split!r}", f"expected {', '.join(SPLITS[:2])} or gallery")
        key = os.path.normpath(row.path)
        if key in first:
            raise _error(path, row.line, f"{row.path} is also in line {first[key]}", "list every image once")
        first[key] = row.line
        if "\0" in row.path or not os.path.isfile(path.parent / row.path):
            raise _error(
                path,
                row.line,
                f"there is no file {row.path!r}",
                f"paths are relative to the folder of the CSV, {path.parent.absolute()}",
            )
    numbers = _number({row.identity for row in rows})
    cameras = _cameras(path, rows)
    listings = {}
    for split in SPLITS:
        order = [i for i, row in enumerate(rows) if row.split == split]
        order.sort(key=lambda i: os.path.normpath(rows[i].path))
        if order:
            identity = np.array([numbers[rows[i].identity] for i in order], np.int32)
            camera = None if cameras is None else cameras[order]
            listings[split] = Listing(tuple(rows[i].path for i in order), identity, camera)
    return listings, notes


def _rows(path: Path, notes: list[str]) -> Iterator[_Row]:
    """The rows that hold anything, their values stripped."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    header: list[str] = []
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
                raise _error(path, line, found, "separate them by commas; a value with a comma needs quotes")
            row = dict(zip(header, values, strict=True))
            identity = row["identity"]
            if re.fullmatch(r"[+-]?[0-9]{1,18}", identity):
                identity = str(int(identity))  # 007 is 7
            # Windows writes a\b.jpg, which is a/b.jpg everywhere.
            image = row["path"].replace("\\", "/")
            yield _Row(line, image, identity, row.get("camera", ""), row["split"].lower())
    except csv.Error as error:
        raise _error(path, end + 1, f"the quotes do not pair up ({error})", "mend them") from None
    if not header:
        raise UserError(f"{path} is empty: expected the header {','.join(COLUMNS)} and a line for each image.")


def _text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"The CSV {path} cannot be read: {error.strerror}.") from error
    advice = "save it as UTF-8 (in Excel: 'CSV UTF-8 (Comma delimited)')"
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data:
        raise UserError(f"{path} is no text in UTF-8 but in UTF-16, or no text at all: {advice}.")
    data = data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _error(path, line, f"the byte 0x{data[error.start]:02x} is not UTF-8", advice) from None


def _header(path: Path, line: int, values: list[str], notes: list[str]) -> list[str]:
    header = [value.lower() for value in values]
    missing = [column for column in COLUMNS if column not in header and column != "camera"]
    if missing:
        for separator, what in _SEPARATORS.items():
            if separator in "".join(values):
                raise _error(path, line, f"the values are separated by {what}", "separate them by commas")
        raise _error(
            path,
            line,
            f"there is no column {' and no '.join(missing)} in the header {','.join(values)!r}",
            f"expected {','.join(COLUMNS)}, where camera may be left out",
        )
    for column in COLUMNS:
        if header.count(column) > 1:
            raise _error(path, line, f"the column {column} is there twice", "remove one")
    others = [value for value in values if value and value.lower() not in COLUMNS]
    if others:
        notes.append(f"Ignored the column{'s' * (len(others) > 1)} {', '.join(others)}.")
    return header


def _cameras(path: Path, rows: list[_Row]) -> np.ndarray | None:
    """int32 [rows], or None if no row has a camera."""
    if not any(row.camera for row in rows):
        return None
    for row in rows:
        if not row.camera:
            raise _error(path, row.line, "the camera is empty", "fill it in, or leave the column out for all images")
        if not re.fullmatch(r"[0-9]{1,9}", row.camera):
            raise _error(path, row.line, f"the camera is {row.camera!r}", "expected a whole number from 0")
    return np.array([int(row.camera) for row in rows], np.int32)


def _number(identities: set[str]) -> dict[str, int]:
    """A number from 1 for each identity, and -1 for "-1"."""

    def order(identity: str) -> tuple[bool, int, str]:
        number = re.fullmatch(r"-?[0-9]{1,18}", identity)
        return not number, int(identity) if number else 0, identity

    numbers = {identity: i for i, identity in enumerate(sorted(identities - {"-1"}, key=order), start=1)}
    return numbers | {"-1": -1}


def _error(path: Path, line: int, found: str, advice: str) -> UserError:
    return UserError(f"Line {line} of {path}: {found}; {advice}.")
