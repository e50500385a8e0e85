"""k-reciprocal re-ranking (Zhong, Zheng, Cao and Li, CVPR 2017) over any distance, on device, a chunk at a time.

An image is described by its k-reciprocal neighbours, those near it that it is near to; two images are alike when their
neighbours are the same (the Jaccard distance). Queries and gallery are ranked among each other: below, N = Q + G.

Where the paper is silent, or the numbers that people compare come from elsewhere, this follows the authors' published
code: an image is the first of its own neighbours and k1 others follow, distances are squared and divided by the
largest of their row, an image's weights sum to 1, and a neighbour's set joins when *more* than two thirds of it are
shared (the paper's Eq. 5 has "at least").
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vpm_jax.matching import CHUNK_BYTES


def rerank(
    query_gallery: np.ndarray,
    query_query: np.ndarray,
    gallery_gallery: np.ndarray,
    k1: int = 20,
    k2: int = 6,
    lambda_: float = 0.3,
    squared: bool = False,
) -> np.ndarray:
    """The re-ranked distance of every query to every gallery image.

    d* = (1 - lambda) d_J + lambda d (the paper's Eq. 12), where d_J is the Jaccard distance between the weighted,
    expanded sets of k-reciprocal neighbours (Eqs. 5, 7 and 10, local query expansion Eq. 11).

    Memory beyond arguments and result: about 4 * CHUNK_BYTES, and at most 2 N (k1 + 1) (k1 / 2 + 2) (k2 + 1) numbers,
    in practice a tenth of it: Market-1501 (N = 19,281) at the defaults takes some hundred MiB. Nothing of size [N, N]
    is made; rows are read twice.

    Args:
      query_gallery: [Q, G], `matching.region_distance`; +inf between images that share no region.
      query_query: [Q, Q].
      gallery_gallery: [G, G].
      k1: how many neighbours may be reciprocal.
      k2: over how many neighbours, the image itself included, sets are averaged; 1 leaves them.
      lambda_: the original distance's share, in [0, 1].
      squared: the distances are squared ones already.

    Returns:
      float32 [Q, G], from 0 to 1. A pair that shares no region stays +inf.

    Raises:
      ValueError: for shapes that do not fit, or k1, k2, lambda_ out of range.
    """
    queries, galleries = query_gallery.shape
    shapes = query_query.shape, gallery_gallery.shape
    if shapes != ((queries, queries), (galleries, galleries)):
        raise ValueError(
            f"query_query {shapes[0]} and gallery_gallery {shapes[1]} beside query_gallery "
            f"{(queries, galleries)}, expected [Q, Q] and [G, G] beside [Q, G]"
        )
    if k1 < 1 or k2 < 1 or not 0 <= lambda_ <= 1:
        raise ValueError(f"k1 {k1}, k2 {k2} and lambda_ {lambda_}, expected at least 1, 1 and a share in [0, 1]")
    if not queries * galleries:
        return np.empty((queries, galleries), np.float32)
    count = queries + galleries
    columns = np.ascontiguousarray(np.asarray(query_gallery[:]).T)
    size = max(1, min(count, CHUNK_BYTES // 4 // (4 * count)))

    def rows() -> Iterator[tuple[int, int, np.ndarray]]:
        """(first, number, distances [size, N]): the combined matrix, a chunk at a time, the last padded by +inf."""
        for first in range(0, count, size):
            last = min(first + size, count)
            chunk = np.full((size, count), np.inf, np.float32)
            at = max(0, min(last, queries) - first)  # rows of queries
            if at:
                part = slice(first, first + at)
                chunk[:at, :queries], chunk[:at, queries:] = query_query[part], query_gallery[part]
            if at < last - first:
                part = slice(first + at - queries, last - queries)
                chunk[at : last - first, :queries], chunk[at : last - first, queries:] = (
                    columns[part],
                    gallery_gallery[part],
                )
            yield first, last - first, chunk

    # The nearest of every image, itself first; `count` stands for nobody.
    nearest = np.full((count + 1, min(max(k1 + 1, k2), count)), count, np.int32)
    largest = np.empty(count, np.float32)
    for first, number, chunk in rows():
        index, most = _nearest(chunk, first, nearest.shape[1], squared)
        nearest[first : first + number], largest[first : first + number] = index[:number], most[:number]

    half = int(np.around(k1 / 2)) + 1
    forward = jnp.asarray(nearest[:, : k1 + 1])
    reciprocal = _reciprocal(forward, forward)
    reciprocal_half = _reciprocal(forward[:, :half], forward[:, :half])
    sets: list[tuple[np.ndarray, np.ndarray]] = []
    for first, number, chunk in rows():
        most = np.pad(largest[first : first + number], (0, size - number), constant_values=1)
        index, weight = _expand(chunk, first, most, forward, reciprocal, reciprocal_half, squared)
        sets.append((np.asarray(index)[:number], np.asarray(weight)[:number]))
    members, weights = _trim(sets, count)

    if k2 > 1:
        # A row for nobody, who has no neighbours either.
        members = np.concatenate([members, np.full((1, members.shape[1]), count, np.int32)])
        weights = np.concatenate([weights, np.zeros((1, weights.shape[1]), np.float32)])
        step = max(1, min(count, CHUNK_BYTES // 4 // (8 * k2 * members.shape[1])))
        sets = []
        for first in range(0, count, step):
            near = np.full((step, min(k2, nearest.shape[1])), count, np.int32)
            part = nearest[first : min(first + step, count), :k2]
            near[: len(part)] = part
            index, weight = _average(members, weights, near)
            sets.append((np.asarray(index)[: len(part)], np.asarray(weight)[: len(part)]))
        members, weights = _trim(sets, count)

    result = np.empty((queries, galleries), np.float32)
    step = max(1, min(queries, CHUNK_BYTES // 4 // (4 * count)))
    gallery = jax.device_put((members[queries:], weights[queries:]))
    for first in range(0, queries, step):
        last = min(first + step, queries)
        padding = ((0, step - last + first), (0, 0))
        padded = np.pad(members[first:last], padding, constant_values=count), np.pad(weights[first:last], padding)
        shared = np.asarray(_shared(padded, gallery, count))[: last - first]
        original = np.asarray(query_gallery[first:last], np.float32)
        original = original if squared else np.square(original)
        jaccard = 1 - shared / (2 - shared)  # min sums to `shared`, max to what is left of both sums of 1
        share = lambda_ * original / largest[first:last, None] if lambda_ else np.where(np.isinf(original), np.inf, 0)
        result[first:last] = (1 - lambda_) * jaccard + share
    return result


@partial(jax.jit, static_argnames=("kept", "squared"))
def _nearest(rows: jax.Array, first: int, kept: int, squared: bool) -> tuple[jax.Array, jax.Array]:
    """Of distances [n, N], whose first row is that of image `first`: the nearest [n, kept], and the largest [n]."""
    rows = rows if squared else rows * rows
    largest = jnp.max(jnp.where(jnp.isfinite(rows), rows, 0), axis=1)
    own = jnp.arange(rows.shape[1]) == first + jnp.arange(len(rows))[:, None]
    values, index = jax.lax.top_k(-jnp.where(own, -1, rows), kept)
    return jnp.where(jnp.isinf(values), rows.shape[1], index), jnp.where(largest > 0, largest, 1)


def _reciprocal(index: jax.Array, among: jax.Array) -> jax.Array:
    """Of neighbours [N + 1, k]: whether the image is one of theirs too, bool [N + 1, k]; nobody's never are."""

    def one(image, neighbours):
        return jnp.any(among[neighbours] == image, axis=1) & (neighbours < len(index) - 1)

    return jax.lax.map(lambda pair: one(*pair), (jnp.arange(len(index)), index), batch_size=1024)


@partial(jax.jit, static_argnames="squared")
def _expand(
    rows: jax.Array,
    first: int,
    largest: jax.Array,
    forward: jax.Array,
    reciprocal: jax.Array,
    half: jax.Array,
    squared: bool,
) -> tuple[jax.Array, jax.Array]:
    """The expanded sets of k-reciprocal neighbours (Eq. 5) and their weights (Eq. 7), [n, most] each.

    Members increase; N, of weight 0, fills up. Args: distances [n, N] of images from `first`, the largest of each [n],
    all neighbours [N + 1, k1 + 1], whether they are reciprocal, and whether the nearest half of them are among theirs.
    """
    nobody = rows.shape[1]

    def one(image, row, most):
        near = jnp.where(reciprocal[image], forward[image], nobody)
        # The neighbours' own, smaller sets: [k1 + 1, k1 / 2 + 1].
        theirs = jnp.where(half[near], forward[near, : half.shape[1]], nobody)
        common = jnp.sum(jnp.any(theirs[..., None] == near, axis=-1) & (theirs < nobody), axis=1)
        joins = 3 * common > 2 * jnp.sum(theirs < nobody, axis=1)
        members = jnp.sort(jnp.concatenate([near, jnp.where(joins[:, None], theirs, nobody).reshape(-1)]))
        again = jnp.concatenate([jnp.zeros(1, bool), members[1:] == members[:-1]])
        members = jnp.sort(jnp.where(again, nobody, members))
        distance = row[jnp.minimum(members, nobody - 1)]
        distance = jnp.where(members == image, 0, distance if squared else distance * distance)
        weight = jnp.where(members < nobody, jnp.exp(-distance / most), 0)
        return members, weight / jnp.maximum(jnp.sum(weight), jnp.finfo(jnp.float32).tiny)

    images = jnp.minimum(first + jnp.arange(len(rows)), nobody)
    return jax.lax.map(lambda each: one(*each), (images, rows, largest), batch_size=256)


def _trim(sets: list[tuple[np.ndarray, np.ndarray]], nobody: int) -> tuple[np.ndarray, np.ndarray]:
    """Sets [n, most] as two arrays [N, width], no wider than the largest set (in steps, to compile little)."""
    width = max(int((index < nobody).sum(axis=1).max()) for index, _ in sets)
    width = min(-(-width // 32) * 32, sets[0][0].shape[1])
    index, weight = zip(*((index[:, :width], weight[:, :width]) for index, weight in sets), strict=True)
    return np.concatenate(index), np.concatenate(weight)


@jax.jit
def _average(members: jax.Array, weights: jax.Array, near: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Local query expansion (Eq. 11): the mean of the sets of neighbours [n, k2], as sets [n, k2 * width]."""
    nobody = len(members) - 1

    def one(neighbours):
        index, weight = members[neighbours].reshape(-1), weights[neighbours].reshape(-1)
        order = jnp.argsort(index)
        index, weight = index[order], weight[order] / jnp.maximum(jnp.sum(neighbours < nobody), 1)
        # Add up what is of the same member.
        place = jnp.cumsum(jnp.concatenate([jnp.zeros(1, bool), index[1:] != index[:-1]]))
        fresh = jnp.full_like(index, nobody).at[place].set(index)
        return fresh, jnp.zeros_like(weight).at[place].add(weight)

    return jax.lax.map(one, near, batch_size=256)


@partial(jax.jit, static_argnames="count")
def _shared(query: tuple, gallery: tuple, count: int) -> jax.Array:
    """The sum over images of the smaller of two sets' weights (the numerator of Eq. 10), [q, G]."""
    (index, weight), (members, weights) = query, gallery
    rows = jnp.arange(len(index))[:, None]
    table = jnp.zeros((count + 1, len(index)), jnp.float32).at[index, rows].add(weight)

    def part(chunk):
        def add(i, total):
            return total + jnp.minimum(table[chunk[0][:, i]], chunk[1][:, i, None])

        return jax.lax.fori_loop(0, members.shape[1], add, jnp.zeros((len(chunk[0]), len(index)), jnp.float32))

    size = min(len(members), 1024)  # of the table's rows that are read, and of sums: small enough for caches
    missing = -len(members) % size
    chunks = (
        jnp.pad(members, ((0, missing), (0, 0)), constant_values=count).reshape(-1, size, members.shape[1]),
        jnp.pad(weights, ((0, missing), (0, 0))).reshape(-1, size, members.shape[1]),
    )
    return jax.lax.map(part, chunks).reshape(-1, len(index))[: len(members)].T
