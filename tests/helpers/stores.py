"""Feature stores of given arrays."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vpm_jax.search.store import About, Entry, Writer


class Streamed:
    """Features that can only be read by slices and by index arrays, with the number of rows of each reading."""

    def __init__(self, features):
        self.features, self.shape, self.dtype = features, features.shape, features.dtype
        self.slices: list[int] = []
        self.scattered: list[int] = []

    def __getitem__(self, rows):
        found = self.features[rows]
        (self.slices if isinstance(rows, slice) else self.scattered).append(len(found))
        return found


def write(folder: Path, about: About, names: Iterable[str], features: np.ndarray, visibility: np.ndarray) -> None:
    """Appends features [G, P, C] and visibility [G, P] with one name per image."""
    with Writer(folder, about) as writer:
        writer.append([Entry(name) for name in names], features, visibility)
