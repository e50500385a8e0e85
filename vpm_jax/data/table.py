"""Reading a dataset from a CSV with the path, identity, split and optionally camera of each image.

    path,identity,camera,split
    images/anna_1.jpg,anna,1,train
    images/anna_2.jpg,anna,2,train
    images/bob_1.jpg,bob,entrance,query
    images/bob_2.jpg,bob,hall,gallery

Paths are relative to the CSV's folder. Identities and cameras are text or numbers; 7 and 007 are the same identity.
Identity -1 is junk, which is neither trained on nor ranked. Without cameras, metrics drop nothing by camera. Columns
may have other common names (`ALIASES`); the separator and the encoding are detected. Errors name the line.
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

from vpm_jax.data.split import Listing, number, number_identities
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
# Tried in order if a file is not UTF-8. The first one keeps undecodable bytes, which names of files on disk may have.
_ENCODINGS = (("utf-8", "surrogateescape"), ("gb18030", "strict"), ("latin-1", "strict"))


class _Row(NamedTuple):
    line: int  # from 1
    path: str
    identity: str
    camera: str
    split: str


def read(path: Path) -> tuple[dict[str, Listing], list[str]]:
    """Reads a CSV: ({split: images sorted by path}, notes).

    Identities are numbered from 1 (see `split.number`). So are cameras, unless all are whole numbers.

    Raises:
      UserError: naming the line, for a missing column or file, an unknown split, an empty value or a duplicate path.
    """
    rows, notes = _rows_and_notes(path)
    if not rows:
        raise UserError(f"{path} lists no images: expected one line per image below the header.")
    if any(row.split == "query" for row in rows):
        rows = [row._replace(split="gallery") if row.split == "test" else row for row in rows]
    lines: dict[str, int] = {}  # by path
    for row in rows:
        for column in ("path", "identity", "split"):
            if not getattr(row, column):
                raise _error(path, row.line, f"the {column} is empty", "fill it in, or remove the line")
        if row.split not in SPLITS:
            hint = " (test means gallery if there are query images)" * (row.split == "test")
            raise _error(path, row.line, f"the split is {row.split!r}", f"expected train, query or gallery{hint}")
        key = os.path.normpath(row.path)
        if key in lines:
            raise _error(path, row.line, f"{row.path} is also in line {lines[key]}", "list every image once")
        lines[key] = row.line
        if not os.path.isfile(path.parent / row.path):
            advice = f"paths are relative to the folder of the CSV, {path.parent.absolute()}"
            raise _error(path, row.line, f"there is no file {row.path!r}", advice)
    numbers = number_identities({row.identity for row in rows})
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


def _rows_and_notes(path: Path) -> tuple[list[_Row], list[str]]:
    """The non-empty rows, decoded with the encoding under which most listed files exist, and notes."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"The CSV {path} cannot be read: {error.strerror}.") from error
    for bom, encoding in ((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"), (b"", "utf-8-sig")):
        if data.startswith(bom) and (text := _decode(data, encoding)) is not None and "\0" not in text:
            return _rows(path, text)
    if b"\0" in data:
        raise UserError(f"{path} is not a text file: save it as UTF-8 (in Excel: 'CSV UTF-8 (Comma delimited)').")
    readings = []
    for encoding, errors in _ENCODINGS:
        if (text := _decode(data, encoding, errors)) is not None:
            rows, notes = _rows(path, text)
            existing = sum(os.path.isfile(path.parent / row.path) for row in rows)
            readings.append((existing, encoding, rows, notes))
            if existing == len(rows):
                break
    _, encoding, rows, notes = max(readings, key=lambda reading: reading[0])
    if encoding != "utf-8":
        notes.append(f"{path.name} is not UTF-8 and was read as {encoding}.")
    return rows, notes


def _decode(data: bytes, encoding: str, errors: str = "strict") -> str | None:
    try:
        return data.decode(encoding, errors)
    except UnicodeError:
        return None


def _rows(path: Path, text: str) -> tuple[list[_Row], list[str]]:
    """The non-empty rows with stripped values, and notes."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    separator = _separator(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    header: list[str] = []
    notes: list[str] = []
    rows = []
    end = 0  # the last line of the previous row
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
                problem = f"{len(values)} value{'s' * (len(values) > 1)} for the {len(header)} columns of the header"
                separators = _SEPARATORS[separator]
                raise _error(path, line, problem, f"separate values by {separators} and quote values that contain them")
            row = dict(zip(header, values, strict=True))
            identity = row["identity"]
            if re.fullmatch(r"[+-]?[0-9]{1,18}", identity):
                identity = str(int(identity))  # 007 is 7
            image, split = row["path"].replace("\\", "/"), row["split"].lower()
            rows.append(_Row(line, image, identity, row.get("camera", ""), _SPLIT_ALIASES.get(split, split)))
    except csv.Error as error:
        raise _error(path, end + 1, f"unbalanced quotes ({error})", "fix them") from None
    if not header:
        raise UserError(f"{path} is empty: expected the header {','.join(COLUMNS)} and a line for each image.")
    return rows, notes


def _separator(text: str) -> str:
    """The separator that splits the header into the most known columns."""
    header = next(filter(str.strip, text.split("\n")), "")

    def known_columns(separator: str) -> int:
        return sum(_column(value) is not None for value in header.split(separator))

    return max(_SEPARATORS, key=known_columns)


def _column(value: str) -> str | None:
    """The column that a header value means, None if it is unknown."""
    name = value.strip().strip('"').lower()
    return next((column for column, aliases in ALIASES.items() if name == column or name in aliases), None)


def _header(path: Path, line: int, values: list[str], notes: list[str]) -> list[str]:
    header = [value.lower() for value in values]
    for column, aliases in ALIASES.items():
        if column not in header:  # otherwise a column with an alias is an unrelated one
            header = [column if value in aliases else value for value in header]
    missing = [column for column in COLUMNS if column not in header and column != "camera"]
    if missing:
        problem = f"there is no column {' and no '.join(missing)} in the header {','.join(values)!r}"
        raise _error(path, line, problem, f"expected {','.join(COLUMNS)}; camera is optional")
    for column in COLUMNS:
        if header.count(column) > 1:
            raise _error(path, line, f"the column {column} occurs twice", "remove one")
    unknown = [value for value, column in zip(values, header, strict=True) if value and column not in COLUMNS]
    if unknown:
        notes.append(f"Ignored the column{'s' * (len(unknown) > 1)} {', '.join(unknown)}.")
    return header


def _cameras(path: Path, rows: list[_Row]) -> np.ndarray | None:
    """int32 [rows]; None if no row has a camera."""
    if not any(row.camera for row in rows):
        return None
    for row in rows:
        if not row.camera:
            raise _error(path, row.line, "the camera is empty", "fill it in, or remove the column")
    if all(re.fullmatch(r"[0-9]{1,9}", row.camera) for row in rows):
        return np.array([int(row.camera) for row in rows], np.int32)
    numbers = number({row.camera for row in rows})
    return np.array([numbers[row.camera] for row in rows], np.int32)


def _error(path: Path, line: int, problem: str, advice: str) -> UserError:
    return UserError(f"Line {line} of {path}: {problem}; {advice}.")
