"""Generated features for splits of any size, a piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from ml_collections import ConfigDict

from vpm_jax.benchmark.matching import images
from vpm_jax.data.split import Split
from vpm_jax.description import CroppedSplit, Description, FeatureSource, Variables
from vpm_jax.progress import Progress

DIFFERENT = 2048  # images, which are repeated with their channels shifted


class GeneratedFeatures(FeatureSource):
    """Features of `channels` channels per region. Images of an identity are similar; identity 0 is distractors."""

    def __init__(self, config: ConfigDict, channels: int):
        self.config = config
        regions, random = config.model.grid[0] * config.model.grid[1], np.random.default_rng(0)
        self._features, self._visibility = images(DIFFERENT, regions, channels, random)
        self._people, _ = images(64, regions, channels, random)

    def stream(
        self, variables: Variables, images: CroppedSplit, stops: Sequence[int], progress: Progress
    ) -> Iterator[Description]:
        split = images.split
        for begin, end in pairwise([0, *stops, len(split)]):
            shape = end - begin, *self._features.shape[1:]
            piece = Description(np.empty(shape, np.float32), np.empty(shape[:2], np.float32))
            for first in range(begin - begin % DIFFERENT, end, DIFFERENT):
                rows = slice(max(begin, first), min(first + DIFFERENT, end))
                target = slice(rows.start - begin, rows.stop - begin)
                piece.features[target], piece.visibility[target] = self._rows(split, rows)
            progress.add(end - begin)
            yield piece

    def _rows(self, split: Split, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Features and visibility of images with the same index // DIFFERENT."""
        index, identity = np.arange(len(split))[rows] % DIFFERENT, split.identity[rows]
        shift = 1 + rows.start // DIFFERENT + 997 * (split.name == "query")
        features = np.roll(self._features, shift, axis=-1)[index]
        features[identity > 0] += self._people[identity[identity > 0] % len(self._people)]
        features /= np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
        return features, self._visibility[(index + shift) % DIFFERENT]
