"""Splits of a dataset: names, identities and cameras, with images read on demand."""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from vpm_jax.errors import printable


class Reader(Protocol):
    """Reads one image of a source, by its name or its position there. Must pickle."""

    def read(self, name: str, position: int) -> bytes: ...


@dataclass(frozen=True, eq=False)
class Split:
    """The N images of one split. Pickles."""

    name: str  # "train" | "query" | "gallery" | "multi_query"
    names: tuple[str, ...]  # paths inside the dataset
    identity: np.ndarray  # int32 [N], as in the dataset: -1 junk, 0 distractor
    camera: np.ndarray | None  # int32 [N]; None: the dataset has no cameras, and metrics drop nothing by camera
    reader: Reader | None = None
    position: np.ndarray | None = None  # int64 [N], in the reader's source; None: 0..N-1
    upright: bool = False  # rotate by the EXIF orientation; for the user's own images

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        """The encoded image i. Raises UserError if it cannot be read."""
        assert self.reader is not None, "this split has no files"
        return self.reader.read(self.names[i], int(i if self.position is None else self.position[i]))

    def take(self, indices: np.ndarray | list[int]) -> Split:
        """Selects images by integers [M], in that order, or by a bool mask [N]."""
        chosen = np.arange(len(self))[indices]
        return replace(
            self,
            names=tuple(self.names[i] for i in chosen),
            identity=self.identity[chosen],
            camera=None if self.camera is None else self.camera[chosen],
            position=chosen if self.position is None else self.position[chosen],
        )

    def labels(self) -> np.ndarray:
        """int32 [N]: the identities renumbered 0..K-1, in ascending order."""
        return np.unique(self.identity, return_inverse=True)[1].astype(np.int32)

    @property
    def num_identities(self) -> int:
        """K, the number of identities."""
        return len(np.unique(self.identity))


@dataclass(frozen=True, eq=False)
class Dataset:
    """The splits of a dataset."""

    name: str
    train: Split  # empty for test-only datasets, such as Partial-REID
    query: Split
    gallery: Split
    notes: tuple[str, ...]  # sentences for the user: the location, and what is missing or unexpected
    multi_query: Split | None = None  # more images of the query identities, for multi-query evaluation: see `boxes`
    all_queries: int = 0  # the number of queries of the whole set, if `query` holds only some of them
    held_out: int = 0  # the number of training identities that are query and gallery instead of the test set
    unofficial: tuple[str, ...] = ()  # the splits whose counts are not the official ones


@dataclass(frozen=True)
class Listing:
    """The files of one split, sorted by name so that folders and zips give the same order."""

    names: tuple[str, ...]  # "bounding_box_train/0002_c1s1_000451_03.jpg"
    identity: np.ndarray  # int32 [N]
    camera: np.ndarray | None  # int32 [N]; None: the dataset has no cameras
    ignored: tuple[str, ...] = ()  # files not named like an image of a person
    unusable: tuple[str, ...] = ()  # images that cannot be read, such as broken links


@dataclass(frozen=True, eq=False)
class _Joined:
    """Reads images of concatenated splits by position."""

    splits: tuple[Split, ...]
    first: tuple[int, ...]  # the position of each split's first image

    def read(self, name: str, position: int) -> bytes:
        i = bisect.bisect_right(self.first, position) - 1
        return self.splits[i].read(position - self.first[i])


def join(*splits: Split) -> Split:
    """Concatenates splits under the name of the first. The result has cameras if all splits do."""
    name = splits[0].name
    splits = tuple(filter(len, splits)) or splits[:1]
    cameras = [split.camera for split in splits if split.camera is not None]
    first = tuple(itertools.accumulate((len(split) for split in splits[:-1]), initial=0))
    return Split(
        name,
        tuple(itertools.chain.from_iterable(split.names for split in splits)),
        np.concatenate([split.identity for split in splits]),
        np.concatenate(cameras) if len(cameras) == len(splits) else None,
        _Joined(splits, first),
        upright=any(split.upright for split in splits),
    )


def groups(query: Split, multi_query: Split) -> tuple[np.ndarray, np.ndarray]:
    """int [Q] and int [multi-query images], equal for equal identities and cameras."""
    assert query.camera is not None and multi_query.camera is not None
    identity = np.concatenate([query.identity, multi_query.identity])
    camera = np.concatenate([query.camera, multi_query.camera])
    group = np.unique(np.stack([identity, camera]), axis=1, return_inverse=True)[1]
    return group[: len(query)], group[len(query) :]


def boxes(query: Split, multi_query: Split) -> tuple[Split, np.ndarray, np.ndarray]:
    """The images that stand for each query in multi-query evaluation: those of its identity and camera.

    A query without any stands for itself.

    Returns:
      (the images; int [images], the group of each; int [Q], the group of each query).
    """
    of_query, of_box = groups(query, multi_query)
    wanted, alone = np.isin(of_box, of_query), ~np.isin(of_query, of_box)
    images = join(multi_query.take(wanted), query.take(alone))
    return images, np.concatenate([of_box[wanted], of_query[alone]]), of_query


def number(texts: Collection[str]) -> dict[str, int]:
    """Numbers texts from 1: whole numbers first, in numeric order, then the rest in alphabetical order."""

    def order(text: str) -> tuple[bool, int, str]:
        whole = re.fullmatch(r"-?[0-9]{1,18}", text)
        return not whole, int(text) if whole else 0, text

    return {text: i for i, text in enumerate(sorted(set(texts), key=order), 1)}


def number_identities(texts: Collection[str]) -> dict[str, int]:
    """Numbers identities with `number`. Junk, "-1", stays -1."""
    return number(set(texts) - {"-1"}) | {"-1": -1}


def counted(n: int, one: str, many: str = "") -> str:
    """3, "image" -> "3 images"."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def some(names: Sequence[str]) -> str:
    """The first three names, for messages."""
    return printable(", ".join(names[:3])) + ", ..." * (len(names) > 3)
