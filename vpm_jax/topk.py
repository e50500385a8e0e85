"""The exact nearest images of a gallery far larger than memory, by Eq. 4."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float32, Int64, Integer, Real

from vpm_jax.chunks import (
    CHUNK_BYTES,
    GalleryFeatures,
    GalleryVisibility,
    QueryFeatures,
    QueryVisibility,
    block_distance,
    check_shapes,
    checked_visibility,
    pad,
    padded_size,
    prepare,
)

# With the few queries of `top_k`, chunks of this size stay in cache: 3.3 s instead of 13 s for a million images of
# 6 x 256 on one core.
CPU_SCAN_BYTES = 6 * 2**20

# Candidates that `top_k` keeps beyond k, so that a single pass over the gallery almost always suffices.
SPARE = 16
FARTHEST = np.finfo(np.float32).max


def top_k(
    query_features: QueryFeatures,
    query_visibility: QueryVisibility,
    gallery_features: GalleryFeatures,
    gallery_visibility: GalleryVisibility,
    k: int,
    squared: bool = False,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
    """The exact k nearest gallery images of every query by Eq. 4, for galleries far larger than memory.

    The gallery is read once, in chunks distributed over the devices. Each device keeps k + SPARE candidates: the images
    with the smallest lower bounds on the distance. The bound is the float32 distance minus its possible rounding error
    (Higham and Mary's probabilistic bound, SIAM J. Sci. Comput. 2019). Candidates are then ranked by their float64
    distances. If the k-th of these is below the bound of every other image, the result is exact. For the remaining
    queries (more than SPARE images tied with the k-th, to within rounding), the gallery is read again with four times
    the candidates. Beyond the inputs, memory is about 4 * CHUNK_BYTES.

    Args:
      query_features, gallery_features: of any float type, used as given. Those of the gallery may be any object with a
        shape whose rows are indexed by slices and integer arrays.
      query_visibility, gallery_visibility: at least 0; see `match_visibility`.
      k: the number of images.
      squared: use squared local distances.
      devices: where to compute (default: all local devices). The result does not depend on it.

    Returns:
      (distance, index), nearest first, equal distances in gallery order. Pairs without a shared region are at +inf.
      k is min(k, G).

    Raises:
      ValueError: if k is less than 1, and as `region_distance`.
    """
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    check_shapes(query_features, query_visibility, gallery_features, gallery_visibility)
    query_weight = checked_visibility(query_visibility, "query")
    gallery_weight = checked_visibility(gallery_visibility, "gallery")
    queries, k = len(query_weight), min(k, len(gallery_weight))
    distance, index = np.empty((queries, k), np.float32), np.empty((queries, k), np.int64)
    if not distance.size:
        return distance, index

    width = int(np.prod(np.shape(gallery_features)[1:]))
    mesh = Mesh(np.array(devices or jax.local_devices()), ("gallery",))
    gallery, todo = (gallery_features, gallery_weight), [(np.arange(queries), k + SPARE)]
    while todo:
        rows, kept = todo.pop()
        kept = min(kept, len(gallery_weight))
        # Bounds the memory of the queries' features, and of their pairs with a chunk and with the candidates.
        size = max(1, CHUNK_BYTES // 4 // max(4 * width, 4 * _chunk_size(width, mesh), 32 * kept))
        if len(rows) > size:
            todo += [(rows[start : start + size], kept) for start in range(0, len(rows), size)]
            continue
        query = np.asarray(query_features[rows], np.float32), query_weight[rows]
        bad = np.flatnonzero(~np.isfinite(4 * np.einsum("qpc,qpc->q", query[0], query[0])))
        if len(bad):
            raise ValueError(f"the features of query image {rows[bad[0]]} are not finite, or overflow when squared")
        bound, candidates = _scan(query, gallery, kept, squared, mesh)
        exact = _exact(query, gallery, candidates, squared)
        order = np.lexsort((candidates, exact))[:, :k]
        distance[rows], index[rows] = (np.take_along_axis(x, order, axis=1) for x in (exact, candidates))
        last = distance[rows, -1]
        # With a k-th distance of +inf, all nearer images are candidates, and ties at +inf are in gallery order.
        unsure = ~((last < bound[:, -1]) | np.isinf(last))
        if kept < len(gallery_weight) and unsure.any():
            todo.append((rows[unsure], 4 * kept))
    return distance, index


def _chunk_size(width: int, mesh: Mesh) -> int:
    """The number of gallery images in a chunk, of `width` numbers each."""
    cpu = mesh.devices.flat[0].platform == "cpu"
    return max(1, min(CHUNK_BYTES // 2, CPU_SCAN_BYTES if cpu else CHUNK_BYTES) // (4 * width))


def _scan(
    query: tuple[np.ndarray, np.ndarray],
    gallery: tuple[Any, np.ndarray],
    kept: int,
    squared: bool,
    mesh: Mesh,
) -> tuple[Float32[np.ndarray, "q kept"], Int64[np.ndarray, "q kept"]]:
    """The `kept` smallest lower bounds of each query, increasing, and their gallery images."""
    replicated, sharded = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ("gallery",)))
    features, weight = gallery
    center = query[0].mean(axis=0)  # distances do not depend on the origin
    queries = padded_size(len(query[0]))
    padded = [pad(x, queries) for x in query]
    prepared, center = jax.device_put((prepare(*padded, center), center), replicated)
    most = _chunk_size(center.size, mesh)
    count = -(-len(weight) // most)
    size = min(padded_size(-(-len(weight) // count)), most)
    size += -size % mesh.size
    shape = (mesh.size, queries, padded_size(kept))
    none = np.iinfo(np.int32).max
    state = (np.full(shape, np.inf, np.float32), np.full(shape, none, np.int32), np.full(mesh.size, none, np.int32))
    state = jax.device_put(state, sharded)
    scan_chunk = _scanner(mesh, squared)
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        chunk = [pad(np.asarray(x[rows]), size) for x in (features, weight)]
        before = state
        state = scan_chunk(state, prepared, *jax.device_put(chunk, sharded), center, np.int32(start))
        jax.block_until_ready(before)  # read at most one chunk ahead of the devices
    bound, index, nonfinite = (np.asarray(x) for x in state)
    if nonfinite.min() < none:
        raise ValueError(f"the features of gallery image {nonfinite.min()} are not finite, or overflow when squared")
    bound, index = (np.moveaxis(x, 0, 1)[: len(query[0])].reshape(len(query[0]), -1) for x in (bound, index))
    order = np.lexsort((index, bound))[:, :kept]
    bound = np.where(bound == FARTHEST, np.inf, bound)
    return np.take_along_axis(bound, order, axis=1), np.take_along_axis(index, order, axis=1).astype(np.int64)


@lru_cache
def _scanner(mesh: Mesh, squared: bool) -> Any:
    """The compiled step of `_scan`: each device merges its share of a chunk into its candidates."""

    def scan(
        state: tuple[Array, Array, Array],
        query: tuple[Array, Array, Array],
        features: Real[Array, "n p c"],
        weight: Float32[Array, "n p"],
        center: Float32[Array, "p c"],
        start: Integer[Array, ""],
    ) -> tuple[Array, Array, Array]:
        bound, index, nonfinite = (x[0] for x in state)
        gallery = prepare(features, weight, center)
        length, kept = len(features), bound.shape[1]
        # The error of a sum of C products grows as sqrt(C) rounding errors; 4 sqrt(C) is a bound with margin.
        slack = (16 + 4 * features.shape[-1] ** 0.5) * 2.0**-24
        lowest = block_distance(query, gallery, squared, slack)[0] * (1 - 1e-5)  # covers the sum over the P regions
        # Pairs without a shared region rank before padding and after all other pairs.
        lowest, at = jax.lax.top_k(-jnp.minimum(lowest, FARTHEST), min(kept, length))
        first = start + jax.lax.axis_index("gallery") * length
        # jax.lax.top_k keeps the first of equal values, here the earlier gallery image.
        lowest, which = jax.lax.top_k(jnp.concatenate([-bound, lowest], axis=1), kept)
        index = jnp.concatenate([index, first + at.astype(jnp.int32)], axis=1)
        finite = jnp.isfinite(gallery[1]).all(axis=0)
        wrong = jnp.where(finite, nonfinite, first + jnp.arange(length, dtype=jnp.int32))
        nonfinite = jnp.minimum(nonfinite, wrong.min())
        return -lowest[None], jnp.take_along_axis(index, which, axis=1)[None], nonfinite[None]

    sharded, replicated = PartitionSpec("gallery"), PartitionSpec()
    in_specs = (sharded, replicated, sharded, sharded, replicated, replicated)
    return jax.jit(jax.shard_map(scan, mesh=mesh, in_specs=in_specs, out_specs=sharded, check_vma=False))


def _exact(
    query: tuple[np.ndarray, np.ndarray], gallery: tuple[Any, np.ndarray], index: np.ndarray, squared: bool
) -> Float32[np.ndarray, "q n"]:
    """Eq. 4 of every query and its candidates, index [q, n], computed in float64."""
    (q, q_weight), (features, g_weight) = query, gallery
    distance = np.empty(index.shape, np.float32)
    step = max(1, 2**20 // q[0].size)  # a few MiB of pairs
    for row, candidates in enumerate(index):
        for start in range(0, len(candidates), step):
            chunk = candidates[start : start + step]
            difference = np.asarray(features[chunk]).astype(np.float64) - q[row].astype(np.float64)
            local = np.einsum("npc,npc->np", difference, difference)
            weight = (q_weight[row] * g_weight[chunk]).astype(np.float64)
            weights = weight.sum(axis=1)
            total = (weight * (local if squared else np.sqrt(local))).sum(axis=1)
            near = np.divide(total, weights, out=np.full(len(chunk), np.inf), where=weights > 0)
            distance[row, start : start + step] = near
    return distance
