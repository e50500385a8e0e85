"""Planning training batches: which images, and how to flip, crop and augment them, from (seed, step) alone.

The whole global batch is drawn as numbers before any image is read, so it does not depend on the number of hosts and
workers or on where a run was resumed. The numbers come from the raw stream of Philox, which is stable across NumPy
versions, unlike the methods of Generator.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vpm_jax.errors import UserError
from vpm_jax.geometry import PLACES
from vpm_jax.regions import Crop, draw_crop
from vpm_jax.schedule import Stage, schedule, stage_at

# The purpose of a random stream, a part of its key.
_ORDER, _PICK, _AUGMENT, _CROP, _SHIFT, _JITTER, _ERASE, _PLACE, _STRETCH = range(9)


class Plan(NamedTuple):
    """How to make a global batch of B images."""

    indices: np.ndarray  # int64 [B], into the split
    flips: np.ndarray  # bool [B], mirror before the crop
    crops: tuple[Crop, ...]  # B boxes, fractions of the flipped image
    shifts: np.ndarray  # float64 [B, 2], move the box down and right by these fractions of its height and width
    jitters: np.ndarray  # float64 [B, 2], brightness and contrast
    places: np.ndarray  # float64 [B, 2], positions of padded images, see `geometry.fit_box`
    stretches: np.ndarray  # float64 [B], how far padded images are stretched, see `geometry.fit_box`
    erased: np.ndarray  # int64 [B, 4], (top, left, bottom, right) in pixels of the input; all 0: nothing


def uniform(key: tuple[int, ...], count: int) -> np.ndarray:
    """float64 [count] in [0, 1), determined by `key` (non-negative integers) in any NumPy version."""
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return (raw >> np.uint64(11)) * 2.0**-53


@lru_cache(maxsize=8)  # a batch needs one pass, rarely two, and loader threads may be several steps apart
def _pass_order(seed: int, stage: int, number: int, count: int) -> np.ndarray:
    """The order of one pass over `count` images or identities, int64 [count]."""
    order = np.argsort(uniform((seed, stage, _ORDER, number), count), kind="stable")
    order.flags.writeable = False
    return order


def kept_ratios(quantiles: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Kept area ratios drawn from the distribution of config.data.gamma: float64 [B].

    Args:
      quantiles: float64 [n >= 2], ascending and equally spaced, with linear interpolation: U(low, high) for n = 2.
        Ratios above 1 become 1.
      draws: float64 [B] in [0, 1).
    """
    position = (len(quantiles) - 1) * draws
    below = np.minimum(position.astype(int), len(quantiles) - 2)  # a draw just below 1 may be rounded up
    return np.minimum(1.0, quantiles[below] + np.diff(quantiles)[below] * (position - below))


class Sampler:
    """Plans batches of a split. Stateless: `plan(step)` depends only on the config and the step.

    A "plain" stage runs through the images without replacement, in a new order each pass; passes ignore epochs. A "pk"
    stage does the same with identities, except that it drops an incomplete batch at the end of a pass. It draws
    `images_per_identity` images of each identity without replacement; identities with fewer images repeat them as
    evenly as possible.

    Args:
      config: of the experiment, checked by `vpm_jax.config.check`.
      labels: int [N], the identities of the split's images, 0..K-1.

    Raises:
      UserError: as `schedule`, and for a split without images.
    """

    def __init__(self, config: ConfigDict, labels: np.ndarray):
        labels = np.asarray(labels)
        if not len(labels):
            raise UserError("The training set has no images: check config.data.root.")
        # The images of each identity.
        self._images = np.split(np.argsort(labels, kind="stable"), np.cumsum(np.bincount(labels))[:-1])
        self._num_images = len(labels)
        self.stages = schedule(config, self._num_images, len(self._images))
        self._seed, self._data = int(config.seed), config.data

    @property
    def batch(self) -> int:
        return self.stages[0].batch

    def plan(self, step: int) -> Plan:
        """Plans the global batch of a step. Raises ValueError for a step outside the schedule.

        Every augmentation has its own stream, so that turning it on does not change the other numbers.
        """
        stage, data = stage_at(self.stages, step), self._data
        step -= stage.first_step
        indices = self._plain(stage, step) if stage.sampling == "plain" else self._balanced(stage, step)

        def draw(purpose: int, count: int) -> np.ndarray:  # [B, count]
            return uniform((self._seed, stage.index, purpose, step), count * stage.batch).reshape(stage.batch, count)

        draws = draw(_AUGMENT, 5)
        gammas = kept_ratios(np.array(data.gamma, float), draws[:, 1])
        strategies = [data.crop] * stage.batch
        if data.whole or data.mix:
            share = draw(_CROP, 1)[:, 0]
            choices = np.array([data.crop, "none", data.mix_crop])
            strategies = choices[np.where(share < data.whole, 1, 2 * (share < data.whole + data.mix))].tolist()
        crops = tuple(
            draw_crop(strategy, gamma, (a, b, c))
            for strategy, gamma, (a, b, c) in zip(strategies, gammas.tolist(), draws[:, 2:].tolist(), strict=True)
        )
        shifts, jitters = np.zeros((stage.batch, 2)), np.ones((stage.batch, 2))
        places = draw(_PLACE, 2) if data.place == "random" else np.tile(PLACES[data.place], (stage.batch, 1))
        stretches = data.stretch * draw(_STRETCH, 1)[:, 0] if data.stretch else np.zeros(stage.batch)
        erased = np.zeros((stage.batch, 4), np.int64)
        if data.pad:
            shifts = data.pad * (2 * draw(_SHIFT, 2) - 1)
        if data.jitter:
            jitters = 1 + data.jitter * (2 * draw(_JITTER, 2) - 1)
        if data.erasing:
            erased = self._erasures(stage, draw(_ERASE, 5))
        return Plan(indices, draws[:, 0] < data.flip, crops, shifts, jitters, places, stretches, erased)

    def _erasures(self, stage: Stage, draws: np.ndarray) -> np.ndarray:
        """Plan.erased from draws [B, 5] in [0, 1). Rectangles fit into the image."""
        low, high = self._data.erasing_area
        size = np.array([stage.height, stage.width])
        area = (low + (high - low) * draws[:, 1]) * size.prod()
        aspect = 0.3 ** (1 - 2 * draws[:, 2])  # height over width
        sides = np.sqrt(np.stack([area * aspect, area / aspect], axis=1))
        sides = np.clip(np.rint(sides), 1, size)
        corner = np.floor(draws[:, 3:] * (size - sides + 1))
        boxes = np.concatenate([corner, corner + sides], axis=1).astype(np.int64)
        return np.where(draws[:, :1] < self._data.erasing, boxes, 0)

    def _plain(self, stage: Stage, step: int) -> np.ndarray:
        """Positions [step * B, (step + 1) * B) of the concatenated passes."""
        first, last = step * stage.batch, (step + 1) * stage.batch
        slices = []
        while first < last:
            number, start = divmod(first, self._num_images)
            stop = min(self._num_images, start + last - first)
            slices.append(_pass_order(self._seed, stage.index, number, self._num_images)[start:stop])
            first += stop - start
        return np.concatenate(slices)

    def _balanced(self, stage: Stage, step: int) -> np.ndarray:
        """The next P identities of the pass with K images each, identity by identity."""
        number, position = divmod(step, len(self._images) // stage.identities)
        order = _pass_order(self._seed, stage.index, number, len(self._images))
        chosen = order[position * stage.identities : (position + 1) * stage.identities]
        key = (self._seed, stage.index, _PICK, step)
        picked = []
        for slot, identity in enumerate(chosen.tolist()):
            images, wanted = self._images[identity], stage.images_per_identity
            rounds = -(-wanted // len(images))
            draws = uniform((*key, slot), rounds * len(images)).reshape(rounds, -1)
            picked.append(images[np.argsort(draws, axis=1, kind="stable").reshape(-1)[:wanted]])
        return np.concatenate(picked)
