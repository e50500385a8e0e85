"""The distances of query sets to a gallery by config.match, from images, in bounded memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from vpm_jax import config as config_lib
from vpm_jax.data.split import Split
from vpm_jax.description import CroppedSplit, Description, FeatureSource, Variables, route
from vpm_jax.errors import UserError
from vpm_jax.matching import pairwise_distance
from vpm_jax.progress import Progress
from vpm_jax.regions import RegionGrid, gallery_crops
from vpm_jax.reranking import rerank

PIECE_BYTES = 2**28  # of distractor features in memory at a time
BLOCK_BYTES = 2**28  # of distances in memory at a time


class Block(NamedTuple):
    """Distances float32 [q, g] of some queries to some gallery images."""

    number: int  # index of the query set
    rows: slice | np.ndarray  # indices of the queries
    columns: slice  # indices of the gallery images
    distance: np.ndarray


def blocks(
    source: FeatureSource,
    variables: Variables,
    queries: Sequence[CroppedSplit],
    gallery: Split,
    check: Callable[[], None] | None = None,
) -> Iterator[Block]:
    """The distances of query sets to the gallery by config.match, block by block, in the order of `metrics.Ranking`.

    A query's first block extends to the last gallery image that has the identity of any query. The images after it,
    such as added distractors, are described and compared PIECE_BYTES of features at a time, so that memory does not
    depend on their number. With match.gallery_gammas, each query is compared with the gallery crop closest to it
    (`description.route`). `check` is called between batches and may raise to stop.

    Raises:
      UserError: if re-ranking needs more memory than there is.
    """
    config = source.config
    if config.match.rerank:
        yield from _reranked(source, variables, queries, gallery, check)
        return
    title = "features of queries" + f" at {len(queries)} gammas" * (len(queries) > 1)
    described = source.splits(variables, queries, check, title)
    crops = gallery_crops(config_lib.sides(config), config.match.gallery_gammas)
    routes = [route(query, crops, RegionGrid(*config.model.grid)) for query in described]
    stops = _stops(queries[0].split, gallery, described[0], max(1, config.eval.batch))
    for number, crop in enumerate(crops, 1):
        if not any(crop in rows for rows in routes):
            continue
        title = "features of the gallery" + f" ({crop}, {number} of {len(crops)})" * (len(crops) > 1)
        images, start, progress = CroppedSplit(gallery, crop.gamma, crop.side), 0, Progress(title, len(gallery), check)
        for piece in source.stream(variables, images, stops, progress):
            columns = slice(start, start + len(piece))
            size = max(1, BLOCK_BYTES // (4 * len(piece)))
            for parts in spans([chosen.get(crop, np.empty(0, int)) for chosen in routes], len(described[0]), size):
                distance = pairwise_distance(config.match, _joined(described, parts), piece)
                ends = np.cumsum([len(rows) for _, rows in parts])
                for (index, rows), own in zip(parts, np.split(distance, ends[:-1]), strict=True):
                    yield Block(index, rows, columns, own)
            start += len(piece)


def spans(chosen: Sequence[np.ndarray], queries: int, size: int) -> Iterator[list[tuple[int, np.ndarray]]]:
    """Spans of at most `size` of the queries chosen from sets of `queries` each: [(index of the set, queries), ...].

    Every number of queries is compiled for itself. So queries of incomplete sets share spans; complete ones are alike.
    """
    rest: list[tuple[int, int]] = []
    for index, rows in enumerate(chosen):
        if len(rows) < queries:
            rest += [(index, row) for row in rows.tolist()]
        else:
            yield from ([(index, rows[first : first + size])] for first in range(0, queries, size))
    for first in range(0, len(rest), size):
        span = np.array(rest[first : first + size])
        yield [(int(index), span[span[:, 0] == index, 1]) for index in np.unique(span[:, 0])]


def _joined(described: Sequence[Description], parts: Sequence[tuple[int, np.ndarray]]) -> Description:
    """The queries of a span, copied only where they are not a whole set."""
    subsets = [described[i] if len(rows) == len(described[i]) else described[i][rows] for i, rows in parts]
    return subsets[0] if len(subsets) == 1 else Description.concatenate(subsets)


def _stops(query: Split, gallery: Split, described: Description, batch: int) -> list[int]:
    """Where `blocks` divides the gallery: multiples of `batch`."""
    last = int(np.flatnonzero(np.isin(gallery.identity, query.identity)).max(initial=-1)) + 1
    size = min(PIECE_BYTES // described.features[0].nbytes, BLOCK_BYTES // (4 * len(query)))
    size = max(1, size // batch) * batch
    return list(range(-(-last // batch) * batch or size, len(gallery), size))


def distances(
    source: FeatureSource,
    variables: Variables,
    queries: Sequence[CroppedSplit],
    gallery: Split,
) -> list[np.ndarray]:
    """The distances float32 [Q, G] of each query set to the gallery: `blocks`, as whole matrices."""
    matrices = [np.empty((len(query.split), len(gallery)), np.float32) for query in queries]
    for number, rows, columns, distance in blocks(source, variables, queries, gallery):
        matrices[number][rows, columns] = distance
    return matrices


def _reranked(
    source: FeatureSource,
    variables: Variables,
    queries: Sequence[CroppedSplit],
    gallery: Split,
    check: Callable[[], None] | None,
) -> Iterator[Block]:
    """Distances after k-reciprocal re-ranking: one block for each query set."""
    match = source.config.match
    needed, available = 4 * len(gallery) ** 2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise UserError(
            f"Re-ranking needs the distances between all {len(gallery):,} gallery images, {needed / 2**30:,.0f} GiB, "
            f"and this machine has {available / 2**30:,.0f} GiB: leave out match.rerank, or data.distractors."
        )
    whole, *described = source.splits(variables, [CroppedSplit(gallery), *queries], check)
    gallery_distance = pairwise_distance(match, whole, whole)
    parameters = match.rerank_k1, match.rerank_k2, match.rerank_lambda, match.squared
    for number, query in enumerate(described):
        inputs = pairwise_distance(match, query, whole), pairwise_distance(match, query, query), gallery_distance
        yield Block(number, slice(None), slice(None), rerank(*inputs, *parameters))
