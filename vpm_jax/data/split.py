"""A dataset as names and numbers: splits of images that are read when asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np


class Reader(Protocol):
    """Reads one image of a source by its name, or by its position there. Picklable."""

    def read(self, name: str, position: int) -> bytes: ...


@dataclass(frozen=True, eq=False)
class Split:
    """N images of one split; picklable."""

    name: str  # "train" | "query" | "gallery"
    names: tuple[str, ...]  # an image's path inside the dataset
    identity: np.ndarray  # int32 [N], as in the dataset: -1 junk, 0 distractor
    camera: np.ndarray | None  # int32 [N]; None: the dataset has no cameras, so metrics drop nothing by camera
    reader: Reader | None = None
    position: np.ndarray | None = None  # int64 [N], of each image in the reader's source; None: 0..N-1
    upright: bool = False  # whether images are turned as their EXIF orientation says: own pictures, no dataset's

    def __len__(self) -> int:
        return len(self.names)

    def read(self, i: int) -> bytes:
        """The encoded image i. UserError, naming it, if it cannot be read."""
        assert self.reader is not None, "this split has no files"
        return self.reader.read(self.names[i], int(i if self.position is None else self.position[i]))

    def take(self, indices) -> Split:
        """The images `indices` (integers [M], or a mask bool [N]), in that order, as a Split."""
        chosen = np.arange(len(self))[indices]
        return replace(
            self,
            names=tuple(self.names[i] for i in chosen),
            identity=self.identity[chosen],
            camera=None if self.camera is None else self.camera[chosen],
            position=chosen if self.position is None else self.position[chosen],
        )

    def labels(self) -> np.ndarray:
        """int32 [N]: the identities renumbered 0..K-1, in increasing order."""
        return np.unique(self.identity, return_inverse=True)[1].astype(np.int32)

    @property
    def num_identities(self) -> int:
        """K, the number of different identities."""
        return len(np.unique(self.identity))


@dataclass(frozen=True, eq=False)
class Dataset:
    name: str
    train: Split  # empty where there is nothing to train on: Partial-REID, Partial-iLIDS
    query: Split
    gallery: Split
    notes: tuple[str, ...]  # plain sentences: where it was found, what is missing or unexpected
