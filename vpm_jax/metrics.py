"""CMC, mAP and mINP of a distance matrix under the Market-1501 single-query protocol (NumPy only)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    ranking = Ranking(query_ids, gallery_ids, query_cameras, gallery_cameras)
    ranking.add(distance)
    return ranking.metrics()


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
    ranking = Ranking(query_ids, gallery_ids, query_cameras, gallery_cameras)
    ranking.add(distance)
    return ranking.average_precision()


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
    protocol = Protocol(query_ids, gallery_ids, query_cameras, gallery_cameras)
    images = int((~protocol.junk).sum())
    queries = map(protocol.images_of, range(protocol.shape[0]))
    shares = [len(matches) / (images - len(removed)) for matches, removed in queries if len(matches)]
    protocol.require_matches(len(shares))
    return float(np.mean(shares))


def rank_k(cmc: Sequence[float] | np.ndarray, k: int) -> float:
    """The rank-k accuracy of a CMC curve; its last entry if the gallery has fewer than k images."""
    return float(cmc[min(k, len(cmc)) - 1])


class Ranking:
    """The metrics of a distance matrix [Q, G] that arrives in blocks and never exists as a whole.

    A query's blocks come in gallery order, and the first one holds every gallery image of its identity. Memory beyond
    the labels is proportional to the number of matches.

    Args:
      query_ids, gallery_ids, query_cameras, gallery_cameras: as for `rank_metrics`.
      keep: how many of each query's nearest images `nearest` returns.

    Raises:
      ValueError: as `rank_metrics`.
    """

    def __init__(
        self,
        query_ids: QueryLabels,
        gallery_ids: GalleryLabels,
        query_cameras: QueryLabels | None = None,
        gallery_cameras: GalleryLabels | None = None,
        keep: int = 0,
    ):
        self._protocol = Protocol(query_ids, gallery_ids, query_cameras, gallery_cameras)
        self._keep = keep
        queries = self._protocol.shape[0]
        # For each query whose first block came: its matches from nearest to farthest, their distances and their ranks.
        self._found: list[tuple[np.ndarray, np.ndarray, np.ndarray] | None] = [None] * queries
        self._nearest = [(np.empty(0, np.int64), np.empty(0, np.float32))] * queries

    def add(self, distance: Distance, rows: slice | np.ndarray = slice(None), columns: slice = slice(None)) -> None:
        """Takes the distances of the queries `rows` to the gallery images `columns`."""
        queries, images = np.arange(self._protocol.shape[0])[rows], np.arange(self._protocol.shape[1])[columns]
        distance = np.asarray(distance)
        if distance.shape != (len(queries), len(images)):
            raise ValueError(
                f"a distance matrix {distance.shape} for {len(queries)} queries and {len(images)} gallery images, "
                f"expected {(len(queries), len(images))}"
            )
        people = ~self._protocol.junk[images]
        whole = bool(people.all())  # then rows need no copy
        kept = images[people]
        for query, row in zip(queries.tolist(), distance, strict=True):
            if np.isnan(row).any():
                wrong = images[np.isnan(row).argmax()]
                raise ValueError(f"the distance of query {query} to gallery image {wrong} is NaN")
            self._add(query, row if whole else row[people], kept)

    def _add(self, query: int, row: np.ndarray, images: np.ndarray) -> None:
        """Takes a row of distances to `images`, increasing positions in the gallery without junk."""
        found = self._found[query]
        removed = images[:0]
        if found is None:
            matches, removed = self._protocol.images_of(query)
            at, removed_at = (np.searchsorted(images[:-1], some) for some in (matches, removed))
            if not (np.array_equal(images[at], matches) and np.array_equal(images[removed_at], removed)):
                raise ValueError(f"the first distances of query {query} lack gallery images of its identity")
            values, removed_values = row[at], row[removed_at]
            order = np.argsort(values, kind="stable")  # stable: equal distances in gallery order
            matches, values = matches[order], values[order]
            ranks = 1 + _before(row, images, matches, values, own=1)
            ranks -= (removed_values < values[:, None]).sum(axis=1)
            ranks -= ((removed_values == values[:, None]) & (removed < matches[:, None])).sum(axis=1)
        else:
            matches, values, ranks = found
            ranks = ranks + _before(row, images, matches, values, own=0)
        self._found[query] = matches, values, ranks
        if self._keep:
            ranked, (index, near) = ~np.isin(images, removed), self._nearest[query]
            index, near = np.concatenate([index, images[ranked]]), np.concatenate([near, row[ranked]])
            if len(near) > self._keep:
                chosen = np.flatnonzero(near <= np.partition(near, self._keep - 1)[self._keep - 1])
                index, near = index[chosen], near[chosen]
            order = np.argsort(near, kind="stable")[: self._keep]
            self._nearest[query] = index[order], near[order]

    def metrics(self) -> dict[str, Any]:
        """The result of `rank_metrics`. Raises ValueError if no query has a match."""
        hits = np.zeros(min(self._protocol.shape[1], RANKS))
        penalties: list[float] = []
        for ranks in self._ranks():
            if len(ranks):
                if ranks[0] <= len(hits):
                    hits[ranks[0] - 1] += 1
                penalties.append(float(len(ranks) / ranks[-1]))
        self._protocol.require_matches(len(penalties))
        return {
            "cmc": np.cumsum(hits) / len(penalties),
            "mAP": float(np.nanmean(self.average_precision())),
            "mINP": float(np.mean(penalties)),
            "skipped": self._protocol.shape[0] - len(penalties),
        }

    def average_precision(self) -> Float[np.ndarray, " q"]:
        """The result of `average_precision`."""
        precisions = [np.mean(np.arange(1, len(r) + 1) / r) if len(r) else np.nan for r in self._ranks()]
        return np.array(precisions)

    def nearest(self, query: int) -> tuple[Integer[np.ndarray, " k"], Float[np.ndarray, " k"]]:
        """(positions in the gallery, distances) of the `keep` nearest images that the protocol ranks for a query."""
        return self._nearest[query]

    def _ranks(self) -> Iterator[np.ndarray]:
        """The 1-based ranks of each query's matches, increasing."""
        for query, found in enumerate(self._found):
            if found is None:
                raise ValueError(f"there are no distances of query {query}")
            yield found[2]


def _before(row: np.ndarray, images: np.ndarray, matches: np.ndarray, values: np.ndarray, own: int) -> np.ndarray:
    """How many images of a row of distances rank before each match, which has its value in `values`.

    `own`: how often the row holds a match itself.
    """
    if len(values) > SORT_ABOVE:
        ordered = np.sort(row)
        before = np.searchsorted(ordered, values, side="left")
        until = np.searchsorted(ordered, values, side="right")
    else:
        before = np.array([np.count_nonzero(row < value) for value in values], np.int64)
        until = np.array([np.count_nonzero(row <= value) for value in values], np.int64)
    # Break ties by gallery order.
    for value in np.unique(values[until - before > own]):
        tied = values == value
        before[tied] += np.searchsorted(images[row == value], matches[tied])
    return before


class Protocol:
    """Which gallery images each query is ranked against, and which of them match. Arguments and errors as for
    `rank_metrics`.

    Attributes:
      junk: bool [G], images of identity -1, which are ranked for no query.
    """

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
        self.junk = self.gallery_ids == -1
        self._order = np.argsort(self.gallery_ids, kind="stable")
        ordered = self.gallery_ids[self._order]
        self._first = np.searchsorted(ordered, self.query_ids, side="left")
        self._last = np.searchsorted(ordered, self.query_ids, side="right")

    def images_of(self, query: int) -> tuple[np.ndarray, np.ndarray]:
        """(the matches of a query, the images removed for it), as increasing positions in the gallery."""
        same = self._order[self._first[query] : self._last[query]]
        if self.query_ids[query] == -1:
            return same[:0], same[:0]  # all junk
        if self.cameras is None:
            return same, same[:0]
        here = self.cameras[1][same] == self.cameras[0][query]
        return same[~here], same[here]

    def require_matches(self, counted: int) -> None:
        if not counted:
            raise ValueError(
                f"none of the {self.shape[0]} queries has a match among the {self.shape[1]} gallery images, expected "
                "shared identities" + ("" if self.cameras is None else " seen by another camera")
            )
