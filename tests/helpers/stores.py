"""Feature stores of given arrays."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from vpm_jax.search.store import About, Entry, Writer


def write(folder: Path, about: About, names: Iterable[str], features: np.ndarray, visibility: np.ndarray) -> None:
    """Appends features [G, P, C] and visibility [G, P] with one name per image."""
    with Writer(folder, about) as writer:
        writer.append([Entry(name) for name in names], features, visibility)
