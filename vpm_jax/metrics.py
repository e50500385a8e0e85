"""CMC, mAP and mINP of a distance matrix under the Market-1501 single-query protocol (NumPy only)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Integer, Real

RANKS = 50  # the longest CMC curve

# Counting takes one pass over the row per match; sorting the row costs about as much as 100 passes.
SORT_ABOVE = 100

# NumPy or JAX arrays (this module does not import JAX), or lists.
Distance = Real[Any, "q g"] | Sequence[Sequence[float]]
QueryLabels = Integer[Any, " q"] | Sequence[int]
GalleryLabels = Integer[Any, " g"] | Sequence[int]


def rank_metrics(
    distance: Distance,
    query_ids: QueryLabels,
    gallery_ids: GalleryLabels,
    query_cameras: QueryLabels | None = None,
    gallery_cameras: GalleryLabels | None = None,
) -> dict[str, Any]:
    """CMC, mAP and mINP under the Market-1501 single-query protocol.

    Gallery images with identity -1 are junk and are removed. Identity 0 is a distractor, which stays and matches no
    query of a real identity. If cameras are given, gallery images with both the query's identity and its camera are
    removed for that query. Queries without a match are excluded from every mean. Equal distances rank in gallery
    order, and +inf (no shared region) is a valid distance. AP is the mean precision at the matches; mINP is the mean of
    (number of matches) / (rank of the last match).

    Args:
      distance: of each query to each gallery image.
      query_ids, gallery_ids: identities.
      query_cameras, gallery_cameras: give both or neither.

    Returns:
      "cmc": float64 [min(G, 50)], entry k - 1 is the rank-k accuracy; "mAP", "mINP": floats in [0, 1];
      "skipped": the number of queries without a match.

    Raises:
      ValueError: if the shapes do not match, a set is empty, a distance is NaN, or no query has a match.
    """
    protocol = _Protocol(query_ids, gallery_ids, query_cameras, gallery_cameras)
    hits = np.zeros(min(protocol.shape[1], RANKS))
    precisions: list[float] = []
    penalties: list[float] = []
    for _, ranks in protocol.ranks(distance):
        if ranks[0] <= len(hits):
            hits[ranks[0] - 1] += 1
        precisions.append(float(np.mean(np.arange(1, len(ranks) + 1) / ranks)))
        penalties.append(float(len(ranks) / ranks[-1]))
    protocol.require_matches(len(precisions))
    return {
        "cmc": np.cumsum(hits) / len(precisions),
        "mAP": float(np.mean(precisions)),
        "mINP": float(np.mean(penalties)),
        "skipped": protocol.shape[0] - len(precisions),
    }


def average_precision(
    distance: Distance,
    query_ids: QueryLabels,
    gallery_ids: GalleryLabels,
    query_cameras: QueryLabels | None = None,
    gallery_cameras: GalleryLabels | None = None,
) -> Float[np.ndarray, " q"]:
    """The average precision of each query, NaN without a match; its mean is the mAP of `rank_metrics`.

    Arguments and errors are those of `rank_metrics`, except that no query needs a match.
    """
    protocol = _Protocol(query_ids, gallery_ids, query_cameras, gallery_cameras)
    precision = np.full(protocol.shape[0], np.nan)
    for query, ranks in protocol.ranks(distance):
        precision[query] = np.mean(np.arange(1, len(ranks) + 1) / ranks)
    return precision


def chance_rank1(
    query_ids: QueryLabels,
    gallery_ids: GalleryLabels,
    query_cameras: QueryLabels | None = None,
    gallery_cameras: GalleryLabels | None = None,
) -> float:
    """The expected rank-1 accuracy of a random ranking, under the protocol of `rank_metrics`.

    Returns:
      The mean, over queries with a match, of the fraction of their ranked images that match.

    Raises:
      ValueError: as `rank_metrics`.
    """
    protocol = _Protocol(query_ids, gallery_ids, query_cameras, gallery_cameras)
    images = len(protocol.kept_index)
    shares = [len(matches) / (images - len(removed)) for _, matches, removed in protocol.queries() if len(matches)]
    protocol.require_matches(len(shares))
    return float(np.mean(shares))


def rank_k(cmc: Sequence[float] | np.ndarray, k: int) -> float:
    """The rank-k accuracy of a CMC curve; its last entry if the gallery has fewer than k images."""
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
    """The matches of each query. Junk is removed once, and the gallery is indexed by identity."""

    def __init__(
        self,
        query_ids: QueryLabels,
        gallery_ids: GalleryLabels,
        query_cameras: QueryLabels | None,
        gallery_cameras: GalleryLabels | None,
    ):
        self.query_ids, self.gallery_ids = np.asarray(query_ids), np.asarray(gallery_ids)
        if self.query_ids.ndim != 1 or self.gallery_ids.ndim != 1 or not self.query_ids.size * self.gallery_ids.size:
            raise ValueError(
                f"query identities {self.query_ids.shape} and gallery identities {self.gallery_ids.shape}, "
                "expected [Q] and [G] with at least one image each"
            )
        self.shape = (len(self.query_ids), len(self.gallery_ids))
        if (query_cameras is None) != (gallery_cameras is None):
            raise ValueError("cameras of only one of query and gallery, expected both or neither")
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
        # A slice avoids copying the rows when there is no junk.
        self.kept = slice(None) if len(self.kept_index) == self.shape[1] else self.kept_index
        ids = self.gallery_ids[self.kept_index]
        self._order = np.argsort(ids, kind="stable")
        self._sorted_ids = ids[self._order]

    def queries(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Yields (query, its matches, its removed images), as increasing positions among the kept images."""
        first = np.searchsorted(self._sorted_ids, self.query_ids, side="left")
        last = np.searchsorted(self._sorted_ids, self.query_ids, side="right")
        for query in range(self.shape[0]):
            same = self._order[first[query] : last[query]]
            if self.cameras is None:
                yield query, same, same[:0]
            else:
                here = self.cameras[1][self.kept_index[same]] == self.cameras[0][query]
                yield query, same[~here], same[here]

    def ranks(self, distance: Distance) -> Iterator[tuple[int, np.ndarray]]:
        """Yields (query, the 1-based ranks of its matches, increasing) for queries with a match. ValueError for NaN."""
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
    """The 1-based ranks of the matches, increasing, in a row of distances from which some images are removed."""
    matches = matches[np.argsort(row[matches], kind="stable")]  # stable: equal distances in gallery order
    values = row[matches]
    if len(matches) > SORT_ABOVE:
        ordered = np.sort(row)
        before = np.searchsorted(ordered, values, side="left")
        until = np.searchsorted(ordered, values, side="right")
    else:
        before = np.array([np.count_nonzero(row < value) for value in values])
        until = np.array([np.count_nonzero(row <= value) for value in values])
    # Break ties by gallery order. `until - before` includes the match itself.
    for value in np.unique(values[until - before > 1]):
        tied = values == value
        before[tied] += np.searchsorted(np.flatnonzero(row == value), matches[tied])
    removed_values = row[removed]
    before -= (removed_values < values[:, None]).sum(axis=1)
    before -= ((removed_values == values[:, None]) & (removed < matches[:, None])).sum(axis=1)
    return before + 1
