"""CMC, mAP and mINP of a distance matrix, by the Market-1501 single-query protocol (NumPy only)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

RANKS = 50  # the longest CMC curve

# Counting costs one pass over the row for every positive, sorting the row about as much as 100 passes.
SORT_ABOVE = 100


def rank_metrics(
    distance: ArrayLike,
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cameras: ArrayLike | None = None,
    gallery_cameras: ArrayLike | None = None,
) -> dict[str, Any]:
    """How well distances rank the gallery, by the Market-1501 single-query protocol.

    Gallery images of identity -1 are junk and removed; identity 0 is a distractor, an ordinary image that matches no
    query of a real identity. When cameras are given, gallery images of the query's identity *and* camera are
    removed for that query. A query without a match leaves every mean. Equal distances rank in gallery order, and
    +inf (no shared region) is a distance like any other. AP is the mean of the precision at the hits; mINP the mean
    of (number of matches) / (rank of the last match).

    No row is sorted for the usual number of matches: the rank of a match is the number of images before it.

    Args:
      distance: float [Q, G].
      query_ids: int [Q].
      gallery_ids: int [G].
      query_cameras: int [Q], with gallery_cameras or not at all.
      gallery_cameras: int [G].

    Returns:
      "cmc": float64 [min(G, 50)], entry k - 1 is the rank-k accuracy; "mAP", "mINP": floats in [0, 1];
      "skipped": the number of queries without a match.

    Raises:
      ValueError: for shapes that do not fit, an empty set, a NaN distance, or when no query at all has a match
        (there is nothing to average).
    """
    protocol = _Protocol(query_ids, gallery_ids, query_cameras, gallery_cameras)
    hits = np.zeros(min(protocol.shape[1], RANKS))
    precisions: list[float] = []
    penalties: list[float] = []
    for _, ranks in protocol.ranks(distance):
        if ranks[0] <= len(hits):
            hits[ranks[0] - 1] += 1
        found = np.arange(1, len(ranks) + 1)
        precisions.append(float(np.mean(found / ranks)))
        penalties.append(float(len(ranks) / ranks[-1]))
    protocol.require_matches(len(precisions))
    return {
        "cmc": np.cumsum(hits) / len(precisions),
        "mAP": float(np.mean(precisions)),
        "mINP": float(np.mean(penalties)),
        "skipped": protocol.shape[0] - len(precisions),
    }


def average_precision(
    distance: ArrayLike,
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cameras: ArrayLike | None = None,
    gallery_cameras: ArrayLike | None = None,
) -> np.ndarray:
    """The AP of each query, whose mean is the mAP of `rank_metrics`: float64 [Q], NaN without a match.

    Arguments and errors as those of `rank_metrics`, but no query needs a match.
    """
    protocol = _Protocol(query_ids, gallery_ids, query_cameras, gallery_cameras)
    precision = np.full(protocol.shape[0], np.nan)
    for query, ranks in protocol.ranks(distance):
        precision[query] = np.mean(np.arange(1, len(ranks) + 1) / ranks)
    return precision


def chance_rank1(
    query_ids: ArrayLike,
    gallery_ids: ArrayLike,
    query_cameras: ArrayLike | None = None,
    gallery_cameras: ArrayLike | None = None,
) -> float:
    """The rank-1 accuracy that random rankings reach on average, under the same protocol as `rank_metrics`.

    Returns:
      The mean, over the queries that have a match, of their share of matches among the images they rank.

    Raises:
      ValueError: as `rank_metrics`.
    """
    protocol = _Protocol(query_ids, gallery_ids, query_cameras, gallery_cameras)
    images = len(protocol.kept_index)
    shares = [len(matches) / (images - len(removed)) for _, matches, removed in protocol.queries() if len(matches)]
    protocol.require_matches(len(shares))
    return float(np.mean(shares))


def rank_k(cmc: Sequence[float] | np.ndarray, k: int) -> float:
    """The rank-k accuracy of a CMC [ranks]. A gallery smaller than k is exhausted before rank k: its last entry."""
    return float(cmc[min(k, len(cmc)) - 1])


def gamma_table(results: Mapping[float, Mapping[str, Any]]) -> str:
    """The results of `rank_metrics` for every gamma (kept area ratio) as a Markdown table, in percent."""
    lines = ["| gamma | R-1 | R-5 | R-10 | mAP | mINP |", "|---:|---:|---:|---:|---:|---:|"]
    for gamma in sorted(results):
        result = results[gamma]
        values = [rank_k(result["cmc"], k) for k in (1, 5, 10)] + [result["mAP"], result["mINP"]]
        lines.append(f"| {gamma:g} | " + " | ".join(f"{100 * value:.1f}" for value in values) + " |")
    return "\n".join(lines) + "\n"


class _Protocol:
    """Who matches whom: junk removed once, the rest looked up by identity instead of scanned for every query."""

    def __init__(
        self,
        query_ids: ArrayLike,
        gallery_ids: ArrayLike,
        query_cameras: ArrayLike | None,
        gallery_cameras: ArrayLike | None,
    ):
        self.query_ids, self.gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
        if self.query_ids.ndim != 1 or self.gallery_ids.ndim != 1 or not self.query_ids.size * self.gallery_ids.size:
            raise ValueError(
                f"query identities {self.query_ids.shape} and gallery identities {self.gallery_ids.shape}, "
                "expected [Q] and [G] with at least one image each"
            )
        self.shape = (len(self.query_ids), len(self.gallery_ids))
        if (query_cameras is None) != (gallery_cameras is None):
            raise ValueError("cameras of only one of query and gallery, expected those of both or of neither")
        self.cameras = None
        if query_cameras is not None and gallery_cameras is not None:
            self.cameras = np.asarray(query_cameras), np.asarray(gallery_cameras)
            shapes = tuple(x.shape for x in self.cameras)
            if shapes != (self.query_ids.shape, self.gallery_ids.shape):
                raise ValueError(
                    f"query cameras {shapes[0]} and gallery cameras {shapes[1]} for {self.shape[0]} queries and "
                    f"{self.shape[1]} gallery images, expected one for each"
                )
        self.kept_index = np.flatnonzero(self.gallery_ids != -1)
        # Without junk a row is used as it is, not copied.
        self.kept = slice(None) if len(self.kept_index) == self.shape[1] else self.kept_index
        ids = self.gallery_ids[self.kept_index]
        self._order = np.argsort(ids, kind="stable")
        self._sorted_ids = ids[self._order]

    def queries(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """(query, its matches, what is removed for it), the last two as increasing positions among the kept images."""
        first = np.searchsorted(self._sorted_ids, self.query_ids, side="left")
        last = np.searchsorted(self._sorted_ids, self.query_ids, side="right")
        for query in range(self.shape[0]):
            same = self._order[first[query] : last[query]]
            if self.cameras is None:
                yield query, same, same[:0]
            else:
                here = self.cameras[1][self.kept_index[same]] == self.cameras[0][query]
                yield query, same[~here], same[here]

    def ranks(self, distance: ArrayLike) -> Iterator[tuple[int, np.ndarray]]:
        """(query, the ranks from 1 of its matches, increasing), of the queries that have any. ValueError for NaN."""
        distance = np.asarray(distance)
        if distance.shape != self.shape:
            raise ValueError(
                f"a distance matrix {distance.shape} for {self.shape[0]} queries and {self.shape[1]} gallery images, "
                f"expected {self.shape}"
            )
        for query, matches, removed in self.queries():
            row = distance[query]
            if np.isnan(row).any():
                raise ValueError(f"the distance of query {query} to gallery image {np.isnan(row).argmax()} is NaN")
            if len(matches):
                yield query, _ranks(row[self.kept], matches, removed)

    def require_matches(self, counted: int) -> None:
        if not counted:
            raise ValueError(
                f"none of the {self.shape[0]} queries has a match among the {self.shape[1]} gallery images, expected "
                "shared identities" + ("" if self.cameras is None else " seen by another camera")
            )


def _ranks(row: np.ndarray, matches: np.ndarray, removed: np.ndarray) -> np.ndarray:
    """The ranks from 1 of the matches, increasing, in a row of distances from which some images are removed."""
    matches = matches[np.argsort(row[matches], kind="stable")]  # stable: equal distances in gallery order
    values = row[matches]
    if len(matches) > SORT_ABOVE:
        ordered = np.sort(row)
        before = np.searchsorted(ordered, values, side="left")
        until = np.searchsorted(ordered, values, side="right")
    else:
        before = np.array([np.count_nonzero(row < value) for value in values])
        until = np.array([np.count_nonzero(row <= value) for value in values])
    # Equal distances: those earlier in the gallery come before. The image itself is one of `until - before`.
    for value in np.unique(values[until - before > 1]):
        tied = values == value
        before[tied] += np.searchsorted(np.flatnonzero(row == value), matches[tied])
    gone = row[removed]
    before -= (gone < values[:, None]).sum(axis=1)
    before -= ((gone == values[:, None]) & (removed < matches[:, None])).sum(axis=1)
    return before + 1
