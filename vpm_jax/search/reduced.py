"""A store's features reduced to fewer channels, to find candidates quickly in a gallery of millions.

Beside the store's own files are `reduction.npz` (`vpm_jax.reduction`) and the folder `reduced`, a store of the same
images with fewer channels.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64
from ml_collections import ConfigDict

from vpm_jax.description import Description
from vpm_jax.errors import UserError
from vpm_jax.matching import nearest
from vpm_jax.reduction import Reduction
from vpm_jax.search.store import Store, Writer

_CHUNK = 2048  # images reduced at a time


class Reduced(NamedTuple):
    """The images of a store with fewer channels."""

    reduction: Reduction
    store: Store

    @classmethod
    def of(cls, store: Store, path: Path) -> Reduced:
        """Opens the reduced features of a store, by the reduction in the file `path`.

        Raises:
          UserError: if they are missing, damaged or not up to date.
        """
        folder = store.folder / "reduced"
        reduced = Store(folder) if path.exists() and folder.exists() else None
        if reduced is None or reduced.entries != store.entries:
            raise UserError(
                f"{store.folder} has no reduced features of all its images: write them with python -m vpm_jax.search "
                "index --reduce D, or query without --candidates."
            )
        reduction = Reduction.load(path)
        reduction.check(store.about.model)
        reduced.check_model(store.about.model, str(store.folder))
        reduced.verify()
        return cls(reduction, reduced)

    def nearest(
        self, match: ConfigDict, query: Description, store: Store, k: int, candidates: int
    ) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
        """As `matching.nearest`, of the images that are among the `candidates` nearest by reduced features."""
        small = Description(self.reduction(query.features), query.visibility)
        _, rows = nearest(match, small, self.store, max(k, candidates))
        distance, index = (np.empty((len(rows), min(k, rows.shape[1])), x) for x in (np.float32, np.int64))
        for number, row in enumerate(np.sort(rows)):  # in gallery order, as equal distances rank
            found, at = nearest(match, query[number], Description(store.features[row], store.visibility[row]), k)
            distance[number], index[number] = found[0], row[at[0]]
        return distance, index


def write(store: Store, reduction: Reduction) -> None:
    """Brings the reduced features of a store up to date. Raises as `search.store.Writer`."""
    folder, channels = store.folder / "reduced", reduction.matrix.shape[2]
    if folder.exists() and Store(folder).about.channels != channels:
        shutil.rmtree(folder)
    about = dataclasses.replace(store.about, channels=channels, count=0, generation=0, checksums={}, names_bytes=0)
    with Writer(folder, about) as writer:
        stored = Store(folder).entries
        current, known = set(store.entries), set(stored)
        writer.keep(np.array([entry in current for entry in stored], bool))
        fresh = np.flatnonzero([entry not in known for entry in store.entries])
        for start in range(0, len(fresh), _CHUNK):
            rows = fresh[start : start + _CHUNK]
            entries = [store.entries[row] for row in rows]
            writer.append(entries, reduction(store.features[rows]), store.visibility[rows])


def remove(store: Store) -> None:
    """Removes the reduced features of a store."""
    shutil.rmtree(store.folder / "reduced", ignore_errors=True)
