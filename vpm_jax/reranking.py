"""k-reciprocal re-ranking (Zhong, Zheng, Cao and Li, CVPR 2017) of any distance, on device, in chunks.

An image is described by its k-reciprocal neighbors: the images that are among its nearest and have it among theirs. Two
images are similar if they share these neighbors (the Jaccard distance). Queries and gallery form one set, N = Q + G.

Where the paper leaves details open, or reported numbers come from the authors' code instead, this follows the code:
every image is its own first neighbor, followed by k1 others; distances are squared and divided by the largest of their
row; an image's weights sum to 1; and a neighbor's set joins if *more* than two thirds of it are shared (the paper's
Eq. 5 has "at least").
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float32, Int32, Real

from vpm_jax.arrays import AnyArray
from vpm_jax.chunks import CHUNK_BYTES


def rerank(
    query_gallery: Real[AnyArray, "q g"],
    query_query: Real[AnyArray, "q q"],
    gallery_gallery: Real[AnyArray, "g g"],
    k1: int = 20,
    k2: int = 6,
    lambda_: float = 0.3,
    squared: bool = False,
) -> Float32[np.ndarray, "q g"]:
    """The re-ranked distance of every query to every gallery image.

    d* = (1 - lambda) d_J + lambda d (the paper's Eq. 12), where d_J is the Jaccard distance between the weighted,
    expanded sets of k-reciprocal neighbors (Eqs. 5, 7 and 10, local query expansion Eq. 11).

    Beyond arguments and result, memory is about 4 * CHUNK_BYTES plus at most 2 N (k1 + 1) (k1 / 2 + 2) (k2 + 1)
    numbers, in practice a tenth of that: a few hundred MiB for Market-1501 (N = 19,281) at the defaults. Nothing of
    size [N, N] is allocated; rows are read twice.

    Args:
      query_gallery: from `matching.region_distance`; +inf between images that share no region.
      query_query: distances among the queries.
      gallery_gallery: distances among the gallery images.
      k1: the number of neighbors that may be reciprocal.
      k2: the number of neighbors, including the image itself, whose sets are averaged; 1 disables averaging.
      lambda_: the weight of the original distance, in [0, 1].
      squared: the distances are already squared.

    Returns:
      Distances in [0, 1]. A pair without a shared region stays at +inf.

    Raises:
      ValueError: if the shapes do not match, or k1, k2 or lambda_ is out of range.
    """
    queries, galleries = query_gallery.shape
    shapes = query_query.shape, gallery_gallery.shape
    if shapes != ((queries, queries), (galleries, galleries)):
        raise ValueError(
            f"query_query {shapes[0]} and gallery_gallery {shapes[1]} beside query_gallery "
            f"{(queries, galleries)}, expected [Q, Q] and [G, G] beside [Q, G]"
        )
    if k1 < 1 or k2 < 1 or not 0 <= lambda_ <= 1:
        raise ValueError(
            f"k1 {k1}, k2 {k2} and lambda_ {lambda_}, expected at least 1, at least 1 and a weight in [0, 1]"
        )
    if not queries * galleries:
        return np.empty((queries, galleries), np.float32)
    count = queries + galleries
    columns = np.ascontiguousarray(np.asarray(query_gallery[:]).T)
    size = max(1, min(count, CHUNK_BYTES // 4 // (4 * count)))

    def rows() -> Iterator[tuple[int, int, np.ndarray]]:
        """Yields (first, number, distances [size, N]), chunks of the combined matrix, the last padded with +inf."""
        for first in range(0, count, size):
            last = min(first + size, count)
            chunk = np.full((size, count), np.inf, np.float32)
            split = max(0, min(last, queries) - first)  # the chunk's first row of the gallery
            if split:
                source = slice(first, first + split)
                chunk[:split, :queries], chunk[:split, queries:] = query_query[source], query_gallery[source]
            if split < last - first:
                source, target = slice(first + split - queries, last - queries), slice(split, last - first)
                chunk[target, :queries], chunk[target, queries:] = columns[source], gallery_gallery[source]
            yield first, last - first, chunk

    # The nearest neighbors of every image, itself first; index `count` marks an empty slot.
    nearest = np.full((count + 1, min(max(k1 + 1, k2), count)), count, np.int32)
    largest = np.empty(count, np.float32)
    for first, number, chunk in rows():
        index, most = _nearest(chunk, first, nearest.shape[1], squared)
        nearest[first : first + number], largest[first : first + number] = index[:number], most[:number]

    half = int(np.around(k1 / 2)) + 1
    neighbors = jnp.asarray(nearest[:, : k1 + 1])
    reciprocal, reciprocal_half = _reciprocal(neighbors), _reciprocal(neighbors[:, :half])
    sets: list[tuple[np.ndarray, np.ndarray]] = []
    for first, number, chunk in rows():
        most = np.pad(largest[first : first + number], (0, size - number), constant_values=1)
        index, weight = _expand(chunk, first, most, neighbors, reciprocal, reciprocal_half, squared)
        sets.append((np.asarray(index)[:number], np.asarray(weight)[:number]))
    members, weights = _trim(sets, count)

    if k2 > 1:
        # An empty row, for the index that marks empty slots.
        members = np.concatenate([members, np.full((1, members.shape[1]), count, np.int32)])
        weights = np.concatenate([weights, np.zeros((1, weights.shape[1]), np.float32)])
        step = max(1, min(count, CHUNK_BYTES // 4 // (8 * k2 * members.shape[1])))
        sets = []
        for first in range(0, count, step):
            near = np.full((step, min(k2, nearest.shape[1])), count, np.int32)
            number = min(step, count - first)
            near[:number] = nearest[first : first + number, :k2]
            index, weight = _average(members, weights, near)
            sets.append((np.asarray(index)[:number], np.asarray(weight)[:number]))
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
        jaccard = 1 - shared / (2 - shared)  # both sets sum to 1: the minima sum to `shared`
        term = lambda_ * original / largest[first:last, None] if lambda_ else np.where(np.isinf(original), np.inf, 0)
        result[first:last] = (1 - lambda_) * jaccard + term
    return result


@partial(jax.jit, static_argnames=("kept", "squared"))
def _nearest(
    rows: Float32[Array, "n N"], first: int | Array, kept: int, squared: bool
) -> tuple[Int32[Array, "n kept"], Float32[Array, " n"]]:
    """The nearest neighbors and the largest distance of each row, the first of which belongs to image `first`."""
    rows = rows if squared else rows * rows
    largest = jnp.max(jnp.where(jnp.isfinite(rows), rows, 0), axis=1)
    own = jnp.arange(rows.shape[1]) == first + jnp.arange(len(rows))[:, None]
    values, index = jax.lax.top_k(-jnp.where(own, -1, rows), kept)
    return jnp.where(jnp.isinf(values), rows.shape[1], index), jnp.where(largest > 0, largest, 1)


def _reciprocal(neighbors: Int32[Array, "N1 k"]) -> Bool[Array, "N1 k"]:
    """Whether each neighbor has the image among its own neighbors; false for empty slots."""

    def of_image(image: Array, near: Array) -> Array:
        return jnp.any(neighbors[near] == image, axis=1) & (near < len(neighbors) - 1)

    return jax.lax.map(lambda pair: of_image(*pair), (jnp.arange(len(neighbors)), neighbors), batch_size=1024)


@partial(jax.jit, static_argnames="squared")
def _expand(
    rows: Float32[Array, "n N"],
    first: int | Array,
    largest: Float32[Array, " n"],
    neighbors: Int32[Array, "N1 k"],
    reciprocal: Bool[Array, "N1 k"],
    reciprocal_half: Bool[Array, "N1 half"],
    squared: bool,
) -> tuple[Int32[Array, "n most"], Float32[Array, "n most"]]:
    """The members, increasing, of the expanded sets of k-reciprocal neighbors (Eq. 5), and their weights (Eq. 7).

    Empty slots hold index N with weight 0. The first row of distances belongs to image `first`; `reciprocal_half` is
    `reciprocal` for the nearest half of the neighbors alone.
    """
    empty = rows.shape[1]

    def of_image(image: Array, row: Array, most: Array) -> tuple[Array, Array]:
        near = jnp.where(reciprocal[image], neighbors[image], empty)
        # The smaller sets of the neighbors: [k1 + 1, k1 / 2 + 1].
        theirs = jnp.where(reciprocal_half[near], neighbors[near, : reciprocal_half.shape[1]], empty)
        common = jnp.sum(jnp.any(theirs[..., None] == near, axis=-1) & (theirs < empty), axis=1)
        joins = 3 * common > 2 * jnp.sum(theirs < empty, axis=1)
        members = jnp.sort(jnp.concatenate([near, jnp.where(joins[:, None], theirs, empty).reshape(-1)]))
        duplicate = jnp.concatenate([jnp.zeros(1, bool), members[1:] == members[:-1]])
        members = jnp.sort(jnp.where(duplicate, empty, members))
        distance = row[jnp.minimum(members, empty - 1)]
        distance = jnp.where(members == image, 0, distance if squared else distance * distance)
        weight = jnp.where(members < empty, jnp.exp(-distance / most), 0)
        return members, weight / jnp.maximum(jnp.sum(weight), jnp.finfo(jnp.float32).tiny)

    images = jnp.minimum(first + jnp.arange(len(rows)), empty)
    return jax.lax.map(lambda each: of_image(*each), (images, rows, largest), batch_size=256)


def _trim(sets: list[tuple[np.ndarray, np.ndarray]], empty: int) -> tuple[np.ndarray, np.ndarray]:
    """Concatenates sets [n, most] to [N, width], with the width of the largest set rounded up, to compile rarely."""
    width = max(int((index < empty).sum(axis=1).max()) for index, _ in sets)
    width = min(-(-width // 32) * 32, sets[0][0].shape[1])
    index, weight = zip(*((index[:, :width], weight[:, :width]) for index, weight in sets), strict=True)
    return np.concatenate(index), np.concatenate(weight)


@jax.jit
def _average(
    members: Int32[Array, "N1 width"], weights: Float32[Array, "N1 width"], near: Int32[Array, "n k2"]
) -> tuple[Int32[Array, "n wide"], Float32[Array, "n wide"]]:
    """Local query expansion (Eq. 11): the mean of the neighbors' sets, wide = k2 * width."""
    empty = len(members) - 1

    def of_image(neighbors: Array) -> tuple[Array, Array]:
        index, weight = members[neighbors].reshape(-1), weights[neighbors].reshape(-1)
        order = jnp.argsort(index)
        index, weight = index[order], weight[order] / jnp.maximum(jnp.sum(neighbors < empty), 1)
        # Sum the weights of duplicate members.
        slot = jnp.cumsum(jnp.concatenate([jnp.zeros(1, bool), index[1:] != index[:-1]]))
        return jnp.full_like(index, empty).at[slot].set(index), jnp.zeros_like(weight).at[slot].add(weight)

    return jax.lax.map(of_image, near, batch_size=256)


@partial(jax.jit, static_argnames="count")
def _shared(
    query: tuple[Int32[Array, "q width"], Float32[Array, "q width"]],
    gallery: tuple[Int32[Array, "G width"], Float32[Array, "G width"]],
    count: int,
) -> Float32[Array, "q G"]:
    """The sum over all images of the smaller of two sets' weights (the numerator of Eq. 10)."""
    (index, weight), (members, weights) = query, gallery
    rows = jnp.arange(len(index))[:, None]
    table = jnp.zeros((count + 1, len(index)), jnp.float32).at[index, rows].add(weight)

    def of_chunk(chunk: tuple[Array, Array]) -> Array:
        def add(i: Array, total: Array) -> Array:
            return total + jnp.minimum(table[chunk[0][:, i]], chunk[1][:, i, None])

        return jax.lax.fori_loop(0, members.shape[1], add, jnp.zeros((len(chunk[0]), len(index)), jnp.float32))

    size = min(len(members), 1024)  # keeps the sums, and the rows of the table that are read, in cache
    missing = -len(members) % size
    chunks = (
        jnp.pad(members, ((0, missing), (0, 0)), constant_values=count).reshape(-1, size, members.shape[1]),
        jnp.pad(weights, ((0, missing), (0, 0))).reshape(-1, size, members.shape[1]),
    )
    return jax.lax.map(of_chunk, chunks).reshape(-1, len(index))[: len(members)].T
