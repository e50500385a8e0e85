"""Same person or not, by a distance: error rates of a threshold, with and without a mate in the gallery (NumPy only).

Verification decides for a pair of images; open-set identification decides for a query and a whole gallery, which may
not hold the person (Grother and Ngan, NIST IR 8009, call its rates false positive and true positive identification
rate).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Integer

BINS = 4096  # thresholds that `Pairs` counts at
SAMPLES = 200  # bootstrap samples of a confidence interval
LEVEL = 0.95  # of confidence intervals


class Rate(NamedTuple):
    """A rate with its confidence interval; NaN where too few pairs determine it."""

    value: float
    low: float
    high: float


class Pairs:
    """Counts of the distances of same-person and different-person pairs, from blocks of a distance matrix.

    A pair of the same identity and camera does not count, as in `metrics.rank_metrics`. Distractors (identity 0) match
    no query of another identity. The gallery must not contain junk. Distances are counted at BINS thresholds, where
    all rates are exact. Confidence intervals are bootstrap percentiles over query identities, because pairs of the same
    person are not independent.

    Args:
      query_ids, gallery_ids: identities.
      query_cameras, gallery_cameras: give both or neither.
      most: the largest possible finite distance.
    """

    def __init__(
        self,
        query_ids: Integer[np.ndarray, " q"],
        gallery_ids: Integer[np.ndarray, " g"],
        query_cameras: Integer[np.ndarray, " q"] | None,
        gallery_cameras: Integer[np.ndarray, " g"] | None,
        most: float,
    ):
        self._ids = query_ids, gallery_ids
        self._cameras = query_cameras, gallery_cameras
        self._people, self._person = np.unique(query_ids, return_inverse=True)
        self.thresholds: Float[np.ndarray, " t"] = np.linspace(0, most, BINS + 1)[1:]
        """Distances below a threshold are accepted."""
        self._counts = {same: np.zeros((len(self._people), BINS + 1), np.int64) for same in (True, False)}
        self._nearest = {same: np.full(len(query_ids), np.inf) for same in (True, False)}
        self._has_mate = np.zeros(len(query_ids), bool)

    def add(
        self, distance: Float[np.ndarray, "q2 g2"], rows: slice | np.ndarray = slice(None), columns: slice = slice(None)
    ) -> None:
        """Counts a block: the distances of the queries `rows` to the gallery images `columns`."""
        everyone, gallery_ids = self._ids[0], self._ids[1][columns]
        for query, values in zip(np.arange(len(everyone))[rows], distance, strict=True):
            same = gallery_ids == everyone[query]
            counted = np.ones_like(same)
            if self._cameras[0] is not None and self._cameras[1] is not None:
                counted = ~(same & (self._cameras[1][columns] == self._cameras[0][query]))
            for is_same in (True, False):
                chosen = values[counted & (same == is_same)].astype(np.float64)
                self._has_mate[query] |= is_same and len(chosen) > 0
                bins = np.minimum(chosen * (BINS / self.thresholds[-1]), BINS).astype(np.int64)  # BINS: +inf too
                self._counts[is_same][self._person[query]] += np.bincount(bins, minlength=BINS + 1)
                self._nearest[is_same][query] = min(self._nearest[is_same][query], chosen.min(initial=np.inf))

    @property
    def count(self) -> dict[str, int]:
        """The number of pairs."""
        return {"same": int(self._counts[True].sum()), "different": int(self._counts[False].sum())}

    def curve(self) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
        """(true match rate, false match rate) at each threshold: the ROC."""
        true, false = self._curves(np.ones((1, len(self._people))))
        return true[0], false[0]

    def true_match_rate(self, false_match_rate: float) -> tuple[float, Rate]:
        """(the largest threshold whose false match rate is at most this, the true match rate there).

        Both are NaN if this rate allows less than one false match among the counted pairs.
        """
        if false_match_rate * self.count["different"] < 1:
            return np.nan, Rate(np.nan, np.nan, np.nan)
        true, false = self._bootstrap
        last = (false <= false_match_rate).sum(1) - 1  # thresholds increase, and so do rates
        values = np.where(last < 0, 0.0, np.take_along_axis(true, np.maximum(last, 0)[:, None], 1)[:, 0])
        return (float(self.thresholds[last[0]]) if last[0] >= 0 else 0.0), _rate(values)

    def equal_error_rate(self) -> Rate:
        """Where as many same pairs are rejected as different pairs are accepted."""
        true, false = self._bootstrap
        gap = false - (1 - true)
        at = np.argmin(np.abs(gap), axis=1)[:, None]
        errors = (np.take_along_axis(false, at, 1) + 1 - np.take_along_axis(true, at, 1)) / 2
        return _rate(errors[:, 0])

    def identification_rate(self, false_alarm_rate: float) -> tuple[float, Rate]:
        """Open-set identification: (the threshold, the share of queries whose nearest image is a mate below it).

        At the threshold, this share of queries would have an image below it if their mates were not in the gallery.
        Only queries with a mate count. Both are NaN if this rate allows less than one false alarm among them.
        """
        has_mate = self._has_mate
        mate, other = self._nearest[True][has_mate], self._nearest[False][has_mate]
        allowed = int(false_alarm_rate * len(mate))
        if allowed < 1:
            return np.nan, Rate(np.nan, np.nan, np.nan)
        threshold = np.sort(other)[allowed]  # distances below it are accepted: `allowed` of them, or fewer if some tie
        found = (mate < other) & (mate < threshold)
        people, person, totals = np.unique(self._person[has_mate], return_inverse=True, return_counts=True)
        hits, weights = np.bincount(person, found), _weights(len(people))
        return float(threshold), _rate((weights @ hits) / (weights @ totals))

    @property
    def _bootstrap(self) -> tuple[np.ndarray, np.ndarray]:
        return self._curves(_weights(len(self._people)))

    def _curves(self, weights: Float[np.ndarray, "s i"]) -> tuple[np.ndarray, np.ndarray]:
        """(true match rates, false match rates) [S, T] with each query identity weighted."""
        rates = []
        for same in (True, False):
            counts = weights @ self._counts[same]
            rates.append(np.cumsum(counts, 1)[:, :-1] / np.maximum(counts.sum(1), 1)[:, None])
        return rates[0], rates[1]


def _weights(people: int) -> Float[np.ndarray, "s i"]:
    """How often each identity is drawn: all once, then SAMPLES bootstrap samples (seed 0)."""
    drawn = np.random.default_rng(0).multinomial(people, np.full(people, 1 / people), SAMPLES)
    return np.concatenate([np.ones((1, people)), drawn])


def _rate(values: Float[np.ndarray, " s"]) -> Rate:
    """The first value, and the interval of the others."""
    low, high = np.quantile(values[1:], ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Rate(float(values[0]), float(low), float(high))
