"""Matching two images by the regions they share (Section 3.1, Eq. 4), for galleries of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from math import isqrt
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

# Features of either side on the device at a time, and distances: large enough for matrix products at full speed
# (Market-1501 with 6 x 2048 floats: 2,700 by 2,700 images), small beside the features themselves.
CHUNK_BYTES = 128 * 2**20
# On a CPU less: the C library gives larger arrays back to the system, which clears them each time they come again.
# 1.5 times as fast for 1,000 by 8,000 images of 6 x 2,048 on two cores.
CPU_CHUNK_BYTES = 20 * 2**20
# The few queries of `top_k` leave arrays of this size in the caches: four times as fast as those of CHUNK_BYTES (3.3 s
# instead of 13 for a million images of 6 x 256, on one core).
CPU_SCAN_BYTES = 6 * 2**20

# Where |q - g|^2 falls below this share of |q|^2 + |g|^2 the float32 expansion has lost too many digits.
NEAR = 1e-3

# Candidates that `top_k` keeps beyond k, so that one reading of the gallery nearly always proves its answer.
SPARE = 16
FARTHEST = np.finfo(np.float32).max

Features = np.ndarray | jax.Array  # or anything that has a shape and gives such rows for a slice


class Described(Protocol):
    """N images, as a `Description` or a `search.store.Store`: features [N, P, C] that give rows for slices and indices,
    and visibility [N, P]."""

    @property
    def features(self) -> Any: ...

    @property
    def visibility(self) -> np.ndarray: ...


def pairwise_distance(match: ConfigDict, query: Described, gallery: Described) -> np.ndarray:
    """Eq. 4 as config.match says: float32 [Q, G], see `region_distance`; neither re-ranked nor of a cropped gallery."""
    return region_distance(*_side(match, query), *_side(match, gallery), match.squared)


def pairwise_shares(match: ConfigDict, query: Described, gallery: Described) -> tuple[np.ndarray, np.ndarray]:
    """What `pairwise_distance` is made of: see `local_distances`."""
    return local_distances(*_side(match, query), *_side(match, gallery), match.squared)


def nearest(match: ConfigDict, query: Described, gallery: Described, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k smallest of `pairwise_distance` for each query, and their gallery images: see `top_k`."""
    return top_k(*_side(match, query), _side(match, gallery), k, match.squared)


def _side(match: ConfigDict, images: Described) -> tuple[Any, np.ndarray]:
    return images.features, match_visibility(images.visibility, match.visibility)


def match_visibility(visibility: np.ndarray, mode: str, cells: float = 1.0) -> np.ndarray:
    """The visibility that Eq. 4 weighs with, from the predicted scores C of Eq. 2.

    Args:
      visibility: float [..., P], the sum over the feature map's cells of the probability of each region.
      mode: "soft" takes the scores as predicted (the paper); "saturated" the share of the cells that a region has in a
        whole picture, at most 1, so that what the locator finds too large counts no more; "uniform" 1 for every region
        (MVPM-1); "binary" 1 for a region whose score is at least `cells` and 0 for the others.
      cells: a score is the expected number of cells that show the region. A region spans one cell at least
        when it is visible (`project_regions`), so less than one expected cell means an invisible one.

    Returns:
      float32 [..., P].

    Raises:
      ValueError: for an unknown mode.
    """
    scores = np.asarray(visibility, np.float32)
    if mode == "soft":
        return scores
    if mode == "saturated":
        mean = scores.mean(axis=-1, keepdims=True)  # the probabilities of a cell sum to 1
        return np.minimum(scores / np.maximum(mean, np.finfo(np.float32).tiny), 1)
    if mode == "uniform":
        return np.ones_like(scores)
    if mode == "binary":
        return (scores >= cells).astype(np.float32)
    raise ValueError(f"visibility mode {mode!r} is not one of soft, saturated, uniform, binary")


def region_distance(
    query_features: Features,
    query_visibility: Features,
    gallery_features: Features,
    gallery_visibility: Features,
    squared: bool = False,
) -> np.ndarray:
    """The distance of every query to every gallery image (Eq. 4).

    D[k, l] = sum_i C[k, i] C[l, i] |f[k, i] - f[l, i]|  /  sum_i C[k, i] C[l, i]

    Features are used as given: L2-normalise them first where the recipe asks for it. `squared` takes the squared
    local distances instead (the released code). Features may be NumPy arrays, `np.memmap`s, jax arrays, or anything
    that has a shape and gives rows for a slice, of any float type. The gallery is read once, in chunks, the queries
    once (for each of these if they are many); nothing of size [Q, G, P] ever exists, and beyond inputs and result
    about 7 * CHUNK_BYTES are needed. This is a function for the host: it cannot be traced by `jax.jit`.

    Accuracy: local distances come from |q|^2 + |g|^2 - 2 q.g in float32, taken about the queries' mean so that what
    all features share cancels beforehand. The error of a squared local distance is then about 1e-6 times the
    features' squared spread. Pairs with a region so near that this would show (NEAR) are computed again from the
    differences themselves. Distances are right to about 1e-5 of the spread, and identical features give exactly 0.

    Args:
      query_features: [Q, P, C].
      query_visibility: [Q, P], not negative; see `match_visibility`.
      gallery_features: [G, P, C].
      gallery_visibility: [G, P].
      squared: weigh squared local distances.

    Returns:
      float32 [Q, G]. A pair whose weights sum to 0 shares no region: +inf, never NaN.

    Raises:
      ValueError: for shapes that do not fit, features that are not finite, or a visibility that is negative or
        not finite.
    """
    _check_shapes(query_features, query_visibility, gallery_features, gallery_visibility)
    query_weight = _checked_visibility(query_visibility, "query")
    gallery_weight = _checked_visibility(gallery_visibility, "gallery")
    queries, galleries = len(query_weight), len(gallery_weight)
    distance = np.empty((queries, galleries), np.float32)
    if not distance.size:
        return distance

    # Any common origin leaves distances as they are; a sample of the queries is enough to find a good one.
    centre = np.asarray(query_features[:: max(1, queries // 512)]).astype(np.float32).mean(axis=0)
    centre[~np.isfinite(centre)] = 0  # so that only the image that is to blame is not finite below
    chunk_bytes = min(CHUNK_BYTES, CPU_CHUNK_BYTES) if jax.default_backend() == "cpu" else CHUNK_BYTES
    most = max(1, min(chunk_bytes // (4 * centre.size), isqrt(chunk_bytes // 4)))
    query_chunks = partial(_chunks, query_features, query_weight, centre, most, "query")
    if 4 * queries * centre.size <= 2 * CHUNK_BYTES:  # prepared once, not for each chunk of the gallery
        query_chunks = partial(iter, list(query_chunks()))
    for gallery_rows, gallery, on_device in _chunks(gallery_features, gallery_weight, centre, most, "gallery"):
        for query_rows, query, block in query_chunks():
            values, near = _block(block, on_device, squared)
            part = distance[query_rows, gallery_rows]
            part[...] = values
            pairs = np.nonzero(np.asarray(near))
            if len(pairs[0]):
                _recompute(
                    part, pairs, (query, query_weight[query_rows]), (gallery, gallery_weight[gallery_rows]), squared
                )
    return distance


def local_distances(
    query_features: np.ndarray,
    query_visibility: np.ndarray,
    gallery_features: np.ndarray,
    gallery_visibility: np.ndarray,
    squared: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """What Eq. 4 is made of, for explaining a few pairs: unlike `region_distance`, this needs [Q, G, P] numbers.

    Args:
      as those of `region_distance`.

    Returns:
      (distance, weight), float32 [Q, G, P] each: |f[k, i] - f[l, i]| (squared on request), and C[k, i] C[l, i] / sum_i
      C[k, i] C[l, i], so that sum(weight * distance) is the distance of `region_distance`. The weights of a pair that
      shares no region are 0.

    Raises:
      ValueError: as `region_distance`.
    """
    _check_shapes(query_features, query_visibility, gallery_features, gallery_visibility)
    query_weight = _checked_visibility(query_visibility, "query").astype(np.float64)
    gallery_weight = _checked_visibility(gallery_visibility, "gallery").astype(np.float64)
    distance = np.empty((len(query_weight), *gallery_weight.shape), np.float32)
    gallery = np.asarray(gallery_features, np.float32)
    for row, query in zip(distance, np.asarray(query_features, np.float32), strict=True):
        for start in range(0, len(row), 256):  # a few MiB of differences at a time
            difference = gallery[start : start + 256] - query
            row[start : start + 256] = np.einsum("gpc,gpc->gp", difference, difference)
    weight = query_weight[:, None] * gallery_weight[None]
    total = weight.sum(axis=-1, keepdims=True)
    share = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    return (distance if squared else np.sqrt(distance)), share.astype(np.float32)


def _check_shapes(query: Features, query_weight: Features, gallery: Features, gallery_weight: Features) -> None:
    shapes = [np.shape(x) for x in (query, query_weight, gallery, gallery_weight)]
    q, qv, g, gv = shapes
    if not (len(q) == len(g) == 3 and q[1:] == g[1:] and qv == q[:2] and gv == g[:2] and min(q[1:]) > 0):
        raise ValueError(
            f"query features {q} with visibility {qv} and gallery features {g} with visibility {gv}, "
            "expected [Q, P, C] with [Q, P] and [G, P, C] with [G, P]"
        )


def _checked_visibility(visibility: Features, name: str) -> np.ndarray:
    weight = np.asarray(visibility).astype(np.float32)
    bad = np.flatnonzero(~((weight >= 0) & np.isfinite(weight)).all(axis=1))
    if len(bad):
        raise ValueError(f"the visibility of {name} image {bad[0]} is {weight[bad[0]]}, expected finite scores >= 0")
    # The scale of an image's scores cancels in Eq. 4; products of very small or large ones would not be floats.
    largest = weight.max(axis=1, keepdims=True)
    return weight / np.where(largest > 0, largest, 1)


def _chunks(
    features: Features, weight: np.ndarray, centre: np.ndarray, most: int, name: str
) -> Iterator[tuple[slice, Features, tuple[jax.Array, jax.Array, jax.Array]]]:
    """(rows, their features, the same prepared on the device), `most` rows at most.

    All chunks have one size, so that one compiled program serves them: the last one begins among the rows before it.
    """
    count = -(-len(weight) // most)
    size = -(-len(weight) // count)
    for start in range(0, len(weight), size):
        start = min(start, len(weight) - size)
        rows = slice(start, start + size)
        chunk = features[rows]
        prepared = _prepare(chunk, weight[rows], centre)
        bad = np.flatnonzero(~np.isfinite(np.asarray(prepared[1])).all(axis=0))
        if len(bad):
            raise ValueError(f"the features of {name} image {start + bad[0]} are not finite, or overflow when squared")
        yield rows, chunk, prepared


@jax.jit
def _prepare(features: jax.Array, weight: jax.Array, centre: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Centred features [P, n, C], their squared norms [P, n] and weights [P, n]: regions first."""
    # Region by region: XLA:CPU would write the squares of all of them to memory before it sums them.
    x = [features[:, i].astype(jnp.float32) - centre[i] for i in range(len(centre))]
    return jnp.stack(x), jnp.stack([jnp.sum(region * region, axis=-1) for region in x]), weight.T


@partial(jax.jit, static_argnames=("squared", "slack"))
def _block(query: tuple, gallery: tuple, squared: bool, slack: float = 0.0) -> tuple[jax.Array, jax.Array]:
    """Distances [q, g] of two chunks, and the pairs bool [q, g] that want more digits; one region at a time.

    `slack` is taken off the squared local distances, as a share of |q|^2 + |g|^2.
    """
    (q, q_norm, q_weight), (g, g_norm, g_weight) = query, gallery

    def add_region(i, sums):
        total, weights, near = sums
        weight = q_weight[i][:, None] * g_weight[i][None, :]
        norms = q_norm[i][:, None] + g_norm[i][None, :]
        # HIGHEST: the default is bfloat16 products on TPU and TF32 on GPU, far too coarse for this difference.
        local = norms * (1 - slack) - 2 * jnp.matmul(q[i], g[i].T, precision=jax.lax.Precision.HIGHEST)
        near |= (weight > 0) & (local < NEAR * norms)
        local = jnp.maximum(local, 0)
        return total + weight * (local if squared else jnp.sqrt(local)), weights + weight, near

    shape = (q.shape[1], g.shape[1])
    # The denominator is summed beside the numerator, from the same products: where one underflows so does the other.
    start = (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))
    total, weights, near = jax.lax.fori_loop(0, q.shape[0], add_region, start)
    return jnp.where(weights > 0, total / jnp.where(weights > 0, weights, 1), jnp.inf), near


def _recompute(
    distance: np.ndarray,
    pairs: tuple[np.ndarray, ...],
    query: tuple[Features, np.ndarray],
    gallery: tuple[Features, np.ndarray],
    squared: bool,
) -> None:
    """Writes the distances of a few pairs (rows, columns) from the differences of their features, digits kept."""
    (q, q_weight), (g, g_weight) = (np.asarray(query[0]), query[1]), (np.asarray(gallery[0]), gallery[1])
    step = max(1, 2**20 // q[0].size)  # pairs at a time: a few MiB
    for start in range(0, len(pairs[0]), step):
        i, j = (index[start : start + step] for index in pairs)
        difference = q[i].astype(np.float32) - g[j].astype(np.float32)
        local = np.einsum("npc,npc->np", difference, difference)
        weight = q_weight[i] * g_weight[j]
        total = (weight * (local if squared else np.sqrt(local))).sum(axis=1)
        distance[i, j] = total / weight.sum(axis=1)


def top_k(
    query_features: Features,
    query_visibility: Features,
    gallery: Described | tuple[Any, np.ndarray],
    k: int,
    squared: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest gallery images of every query by Eq. 4, exactly, for galleries far larger than memory.

    The gallery is read once, in chunks shared out over the devices, which keep the candidates: the k + SPARE images
    with the smallest lower bounds of the distance. The bound is the float32 distance less what rounding can add to it
    (Higham and Mary's probabilistic bound, SIAM J. Sci. Comput. 2019). Candidates are then compared by their distances
    in float64. Where the k-th of these is below every bound that was left out, nothing nearer was missed; for the
    queries where that cannot be said (more images than SPARE as far away as the k-th, to the last digits), the gallery
    is read again with four times the candidates. Beyond the inputs, about 4 * CHUNK_BYTES are needed.

    Args:
      query_features: [Q, P, C], of any float type, used as given.
      query_visibility: [Q, P], not negative; see `match_visibility`.
      gallery: a `search.store.Store`, or (features [G, P, C], visibility [G, P]), where features may be anything that
        has a shape and gives rows for a slice and for an array of indices.
      k: how many.
      squared: weigh squared local distances.
      devices: where to compute (default: all of this process). Any number gives the same answers.

    Returns:
      (distance float32 [Q, k], index int64 [Q, k]), nearest first, equal distances in gallery order; a pair that shares
      no region is +inf far. k is that of the arguments, or G if the gallery is smaller.

    Raises:
      ValueError: for k below 1, and as `region_distance`.
    """
    features, visibility = gallery if isinstance(gallery, tuple) else (gallery.features, gallery.visibility)
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    _check_shapes(query_features, query_visibility, features, visibility)
    query_weight = _checked_visibility(query_visibility, "query")
    gallery_weight = _checked_visibility(visibility, "gallery")
    queries, k = len(query_weight), min(k, len(gallery_weight))
    distance, index = np.empty((queries, k), np.float32), np.empty((queries, k), np.int64)
    if not distance.size:
        return distance, index

    width = int(np.prod(np.shape(features)[1:]))
    mesh = Mesh(np.array(devices or jax.local_devices()), ("gallery",))
    todo = [(np.arange(queries), k + SPARE)]
    while todo:
        rows, kept = todo.pop()
        kept = min(kept, len(gallery_weight))
        # Queries at a time: by the memory of their features, and of the pairs with a chunk or with the candidates.
        size = max(1, CHUNK_BYTES // 4 // max(4 * width, 4 * _chunk_size(width, mesh), 32 * kept))
        if len(rows) > size:
            todo += [(rows[start : start + size], kept) for start in range(0, len(rows), size)]
            continue
        query = np.asarray(query_features[rows], np.float32), query_weight[rows]
        bad = np.flatnonzero(~np.isfinite(4 * np.einsum("qpc,qpc->q", query[0], query[0])))
        if len(bad):
            raise ValueError(f"the features of query image {rows[bad[0]]} are not finite, or overflow when squared")
        bound, candidates = _scan(query, (features, gallery_weight), kept, squared, mesh)
        exact = _exact(query, (features, gallery_weight), candidates, squared)
        order = np.lexsort((candidates, exact))[:, :k]
        distance[rows], index[rows] = (np.take_along_axis(x, order, axis=1) for x in (exact, candidates))
        last = distance[rows, -1]
        # Nothing is nearer than +inf that is not a candidate, and those +inf far came first in the gallery.
        unsure = ~((last < bound[:, -1]) | np.isinf(last))
        if kept < len(gallery_weight) and unsure.any():
            todo.append((rows[unsure], 4 * kept))
    return distance, index


def _chunk_size(width: int, mesh: Mesh) -> int:
    """Gallery images at a time, of `width` numbers each."""
    cpu = mesh.devices.flat[0].platform == "cpu"
    return max(1, min(CHUNK_BYTES // 2, CPU_SCAN_BYTES if cpu else CHUNK_BYTES) // (4 * width))


def _scan(
    query: tuple[np.ndarray, np.ndarray],
    gallery: tuple[Any, np.ndarray],
    kept: int,
    squared: bool,
    mesh: Mesh,
) -> tuple[np.ndarray, np.ndarray]:
    """The `kept` smallest lower bounds of each query, increasing, and their gallery images: [q, kept] each."""
    everywhere, split = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("gallery",)))
    features, weight = gallery
    centre = query[0].mean(axis=0)  # any common origin leaves distances as they are
    prepared, centre = jax.device_put((_prepare(*query, centre), centre), everywhere)
    count = -(-len(weight) // _chunk_size(centre.size, mesh))
    size = -(-len(weight) // count)
    size += -size % mesh.size
    shape = (mesh.size, len(query[0]), kept)
    none = np.iinfo(np.int32).max
    state = (np.full(shape, np.inf, np.float32), np.full(shape, none, np.int32), np.full(mesh.size, none, np.int32))
    state = jax.device_put(state, split)
    scan_chunk = _scanner(mesh, squared)
    for start in range(0, len(weight), size):
        chunk, chunk_weight = np.asarray(features[start : start + size]), weight[start : start + size]
        if padding := size - len(chunk):
            chunk = np.pad(chunk, ((0, padding), (0, 0), (0, 0)))
            chunk_weight = np.pad(chunk_weight, ((0, padding), (0, 0)))
        before = state
        state = scan_chunk(state, prepared, *jax.device_put((chunk, chunk_weight), split), centre, np.int32(start))
        jax.block_until_ready(before)  # read one chunk ahead of the devices, no more
    bound, index, broken = (np.asarray(x) for x in state)
    if broken.min() < none:
        raise ValueError(f"the features of gallery image {broken.min()} are not finite, or overflow when squared")
    bound, index = (np.moveaxis(x, 0, 1).reshape(len(query[0]), -1) for x in (bound, index))
    order = np.lexsort((index, bound))[:, :kept]
    bound = np.where(bound == FARTHEST, np.inf, bound)
    return np.take_along_axis(bound, order, axis=1), np.take_along_axis(index, order, axis=1).astype(np.int64)


@lru_cache
def _scanner(mesh: Mesh, squared: bool) -> Any:
    """A compiled step of `_scan`: each device adds its part of a chunk to the candidates that it keeps."""

    def scan(state, query, features, weight, centre, start):
        bound, index, broken = (x[0] for x in state)
        gallery = _prepare(features, weight, centre)
        length, kept = len(features), bound.shape[1]
        # Errors of a sum of C products, in units of the rounding error: 4 sqrt(C) is four times what they add up to.
        slack = (16 + 4 * features.shape[-1] ** 0.5) * 2.0**-24
        lowest = _block(query, gallery, squared, slack)[0] * (1 - 1e-5)  # as do those of the P terms of Eq. 4
        # Pairs without a shared region come before what is no pair at all, and after all others.
        lowest, at = jax.lax.top_k(-jnp.minimum(lowest, FARTHEST), min(kept, length))
        first = start + jax.lax.axis_index("gallery") * length
        # Of equals, top_k takes the first: candidates so far, then this chunk's in their order.
        lowest, which = jax.lax.top_k(jnp.concatenate([-bound, lowest], axis=1), kept)
        index = jnp.concatenate([index, first + at.astype(jnp.int32)], axis=1)
        finite = jnp.isfinite(gallery[1]).all(axis=0)
        wrong = jnp.where(finite, broken, first + jnp.arange(length, dtype=jnp.int32))
        return -lowest[None], jnp.take_along_axis(index, which, axis=1)[None], jnp.minimum(broken, wrong.min())[None]

    on_each, same = PartitionSpec("gallery"), PartitionSpec()
    in_specs = (on_each, same, on_each, on_each, same, same)
    return jax.jit(jax.shard_map(scan, mesh=mesh, in_specs=in_specs, out_specs=on_each, check_vma=False))


def _exact(
    query: tuple[np.ndarray, np.ndarray], gallery: tuple[Any, np.ndarray], index: np.ndarray, squared: bool
) -> np.ndarray:
    """Eq. 4 of every query and each of its candidates, index [q, n], in float64: float32 [q, n]."""
    (q, q_weight), (features, g_weight) = query, gallery
    distance = np.empty(index.shape, np.float32)
    step = max(1, 2**20 // q[0].size)  # pairs at a time: some MiB
    for row, candidates in enumerate(index):
        for start in range(0, len(candidates), step):
            part = candidates[start : start + step]
            difference = np.asarray(features[part]).astype(np.float64) - q[row].astype(np.float64)
            local = np.einsum("npc,npc->np", difference, difference)
            weight = (q_weight[row] * g_weight[part]).astype(np.float64)
            weights = weight.sum(axis=1)
            total = (weight * (local if squared else np.sqrt(local))).sum(axis=1)
            near = np.divide(total, weights, out=np.full(len(part), np.inf), where=weights > 0)
            distance[row, start : start + step] = near
    return distance
