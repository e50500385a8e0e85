"""Distances between images over the regions they share (Section 3.1, Eq. 4), for galleries of any size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from math import isqrt
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Float32, Int64, Integer, Real
from ml_collections import ConfigDict

# The size of a chunk of features, and of a block of distances, on the device: large enough for matrix products at full
# speed (2,700 by 2,700 images of 6 x 2048 floats), small compared with a large gallery.
CHUNK_BYTES = 128 * 2**20
# Smaller on CPU: malloc returns larger arrays to the system, which zeroes their pages on every allocation. 1.5 times as
# fast for 1,000 by 8,000 images of 6 x 2,048 on two cores.
CPU_CHUNK_BYTES = 20 * 2**20
# With the few queries of `top_k`, chunks of this size stay in cache: 3.3 s instead of 13 s for a million images of
# 6 x 256 on one core.
CPU_SCAN_BYTES = 6 * 2**20

# Below this fraction of |q|^2 + |g|^2, the float32 expansion of |q - g|^2 has lost too many digits.
NEAR = 1e-3

# Candidates that `top_k` keeps beyond k, so that a single pass over the gallery almost always suffices.
SPARE = 16
FARTHEST = np.finfo(np.float32).max

# NumPy or JAX arrays, memory maps, or any object with a shape and rows to slice; visibility may be a list.
QueryFeatures = Float[Any, "q p c"]
QueryVisibility = Real[Any, "q p"] | Sequence[Any]
GalleryFeatures = Float[Any, "g p c"]
GalleryVisibility = Real[Any, "g p"] | Sequence[Any]

Prepared = tuple[Float32[Array, "p n c"], Float32[Array, "p n"], Float32[Array, "p n"]]  # see `_prepare`


@runtime_checkable
class Described(Protocol):
    """N described images, such as a `Description` or a `search.store.Store`."""

    @property
    def features(self) -> Any: ...  # [N, P, C], indexed by slices and integer arrays

    @property
    def visibility(self) -> np.ndarray: ...  # [N, P]


def pairwise_distance(match: ConfigDict, query: Described, gallery: Described) -> Float32[np.ndarray, "q g"]:
    """Eq. 4 with the settings of config.match; without re-ranking and gallery crops. See `region_distance`."""
    return region_distance(*_weighted(match, query), *_weighted(match, gallery), match.squared)


def pairwise_shares(
    match: ConfigDict, query: Described, gallery: Described
) -> tuple[Float32[np.ndarray, "q g p"], Float32[np.ndarray, "q g p"]]:
    """The per-region terms of `pairwise_distance` without match.vector: see `local_distances`."""
    weights = (match_visibility(images.visibility, match.visibility) for images in (query, gallery))
    return local_distances(query.features, next(weights), gallery.features, next(weights), match.squared)


def nearest(
    match: ConfigDict, query: Described, gallery: Described, k: int
) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
    """The k gallery images nearest to each query by `pairwise_distance`: see `top_k`."""
    return top_k(*_weighted(match, query), _weighted(match, gallery), k, match.squared)


def _weighted(match: ConfigDict, images: Described) -> tuple[Any, np.ndarray]:
    """(features, the visibility weights that config.match asks for); with match.vector, of a single region."""
    weight = match_visibility(images.visibility, match.visibility)
    if not match.vector:
        return images.features, weight
    return _Vectors(images.features, weight), np.asarray(weight.any(axis=1, keepdims=True), np.float32)


def embedding(features: Float[Any, "n p c"], weight: Real[Any, "n p"]) -> Float32[np.ndarray, "n d"]:
    """One unit vector per image, for tools that compare images by an inner product: (C[1] f[1], ..., C[P] f[P]) / |C|.

    For unit features and the squared local distances of Eq. 4, D = 2 - 2 S with

      S[k, l] = sum_i C[k, i] C[l, i] f[k, i].f[l, i]  /  sum_i C[k, i] C[l, i].

    The numerator is the inner product of the vectors before they are divided by |C|. The denominator is C[k].C[l] =
    |C[k]| |C[l]| cos(C[k], C[l]), of which only the lengths belong to one image each. Hence e[k].e[l] =
    S[k, l] cos(C[k], C[l]): exact for images that show the same regions equally. Among gallery images with equal
    visibility, such as whole ones, the cosine is the same for all, and the ranking is that of squared Eq. 4. Otherwise,
    images that show other regions than the query rank lower.

    Args:
      features: region features of unit length.
      weight: of each region, at least 0; see `match_visibility`.

    Returns:
      The vectors, d = P C; zero for an image that shows no region.
    """
    weight = np.asarray(weight, np.float32)
    length = np.linalg.norm(weight, axis=1, keepdims=True)
    share = np.divide(weight, length, out=np.zeros_like(weight), where=length > 0)
    vectors = np.asarray(features, np.float32) * share[..., None]
    return vectors.reshape(len(vectors), vectors.shape[1] * vectors.shape[2])  # -1 fails without images


class _Vectors:
    """The embeddings of images as the features of one region, float32 [N, 1, D], computed a slice at a time."""

    dtype = np.dtype(np.float32)

    def __init__(self, features: Any, weight: np.ndarray):
        self._features, self._weight = features, weight
        self.shape = len(weight), 1, int(np.prod(np.shape(features)[1:]))

    def __len__(self) -> int:
        return len(self._weight)

    def __getitem__(self, rows: Any) -> np.ndarray:
        return embedding(self._features[rows], self._weight[rows])[:, None]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self[:], dtype)


def match_visibility(
    visibility: Real[Any, "*n p"] | Sequence[Any], mode: str, cells: float = 1.0
) -> Float32[np.ndarray, "*n p"]:
    """The visibility weights of Eq. 4, from the predicted scores C of Eq. 2.

    Args:
      visibility: for each region, the sum of its probability over the cells of the feature map.
      mode: "soft" uses the scores as predicted (the paper). "saturated" divides them by the number of cells that a
        region has in a whole image and clips at 1, so that an overestimated region gets no extra weight. "uniform" is
        1 for every region (MVPM-1). "binary" is 1 for regions with a score of at least `cells`, else 0.
      cells: the threshold of "binary", in expected cells. A visible region spans at least one (`project_regions`).

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
    query_features: QueryFeatures,
    query_visibility: QueryVisibility,
    gallery_features: GalleryFeatures,
    gallery_visibility: GalleryVisibility,
    squared: bool = False,
) -> Float32[np.ndarray, "q g"]:
    """The distance of every query to every gallery image (Eq. 4).

    D[k, l] = sum_i C[k, i] C[l, i] |f[k, i] - f[l, i]|  /  sum_i C[k, i] C[l, i]

    Features are used as given: L2-normalize them first if the recipe does. They may be of any float type, in NumPy or
    JAX arrays, `np.memmap`s, or any object with a shape and rows to slice. The gallery is read once, in chunks; the
    queries are read once, or once per gallery chunk if they are many. Beyond inputs and result, memory is about
    7 * CHUNK_BYTES; nothing of size [Q, G, P] is allocated. This function runs on the host: `jax.jit` cannot trace it.

    Accuracy: squared local distances are |q|^2 + |g|^2 - 2 q.g in float32, computed relative to the queries' mean to
    reduce cancellation. Their error is about 1e-6 times the features' variance. Pairs with a region so near that this
    matters (NEAR) are recomputed from differences. Distances are accurate to about 1e-5 of the features' standard
    deviation, and identical features give exactly 0.

    Args:
      query_features, gallery_features: region features.
      query_visibility, gallery_visibility: weights, at least 0; see `match_visibility`.
      squared: use squared local distances (the released code).

    Returns:
      The distances. A pair whose weights sum to 0 shares no region: +inf, never NaN.

    Raises:
      ValueError: if the shapes do not match, features are not finite, or a visibility is negative or not finite.
    """
    _check_shapes(query_features, query_visibility, gallery_features, gallery_visibility)
    query_weight = _checked_visibility(query_visibility, "query")
    gallery_weight = _checked_visibility(gallery_visibility, "gallery")
    queries, galleries = len(query_weight), len(gallery_weight)
    distance = np.empty((queries, galleries), np.float32)
    if not distance.size:
        return distance

    # Distances do not depend on the origin; the mean of a sample of the queries is close enough.
    center = np.asarray(query_features[:: max(1, queries // 512)]).astype(np.float32).mean(axis=0)
    center[~np.isfinite(center)] = 0  # keeps one image's NaN from spreading through the mean
    chunk_bytes = min(CHUNK_BYTES, CPU_CHUNK_BYTES) if jax.default_backend() == "cpu" else CHUNK_BYTES
    max_rows = max(1, min(chunk_bytes // (4 * center.size), isqrt(chunk_bytes // 4)))
    query_chunks = partial(_chunks, query_features, query_weight, center, max_rows, "query")
    if 4 * queries * center.size <= 2 * CHUNK_BYTES:  # small enough to prepare once
        query_chunks = partial(iter, list(query_chunks()))
    for gallery_rows, gallery, on_device in _chunks(gallery_features, gallery_weight, center, max_rows, "gallery"):
        for query_rows, query, block in query_chunks():
            target = distance[query_rows, gallery_rows]
            values, near = (np.asarray(x)[: len(target), : target.shape[1]] for x in _block(block, on_device, squared))
            target[...] = values
            pairs = np.nonzero(near)
            if len(pairs[0]):
                _recompute(
                    target, pairs, (query, query_weight[query_rows]), (gallery, gallery_weight[gallery_rows]), squared
                )
    return distance


def local_distances(
    query_features: QueryFeatures,
    query_visibility: QueryVisibility,
    gallery_features: GalleryFeatures,
    gallery_visibility: GalleryVisibility,
    squared: bool = False,
) -> tuple[Float32[np.ndarray, "q g p"], Float32[np.ndarray, "q g p"]]:
    """The terms of Eq. 4, to explain a few pairs: unlike `region_distance`, this allocates [Q, G, P] numbers.

    Arguments and errors are those of `region_distance`.

    Returns:
      (distance, weight): |f[k, i] - f[l, i]| (or its square), and C[k, i] C[l, i] / sum_i C[k, i] C[l, i], so that
      sum(weight * distance) over P is the result of `region_distance`. Weights are 0 for pairs without a shared region.
    """
    _check_shapes(query_features, query_visibility, gallery_features, gallery_visibility)
    query_weight = _checked_visibility(query_visibility, "query").astype(np.float64)
    gallery_weight = _checked_visibility(gallery_visibility, "gallery").astype(np.float64)
    distance = np.empty((len(query_weight), *gallery_weight.shape), np.float32)
    gallery = np.asarray(gallery_features, np.float32)
    for row, query in zip(distance, np.asarray(query_features, np.float32), strict=True):
        for start in range(0, len(row), 256):  # a few MiB of differences
            difference = gallery[start : start + 256] - query
            row[start : start + 256] = np.einsum("gpc,gpc->gp", difference, difference)
    weight = query_weight[:, None] * gallery_weight[None]
    total = weight.sum(axis=-1, keepdims=True)
    share = np.divide(weight, total, out=np.zeros_like(weight), where=total > 0)
    return (distance if squared else np.sqrt(distance)), share.astype(np.float32)


def _check_shapes(*arrays: Any) -> None:
    q, qv, g, gv = map(np.shape, arrays)
    if not (len(q) == len(g) == 3 and q[1:] == g[1:] and qv == q[:2] and gv == g[:2] and min(q[1:]) > 0):
        raise ValueError(
            f"query features {q} with visibility {qv} and gallery features {g} with visibility {gv}, "
            "expected [Q, P, C] with [Q, P] and [G, P, C] with [G, P]"
        )


def _checked_visibility(visibility: Any, name: str) -> Float32[np.ndarray, "n p"]:
    weight = np.asarray(visibility).astype(np.float32)
    bad = np.flatnonzero(~((weight >= 0) & np.isfinite(weight)).all(axis=1))
    if len(bad):
        raise ValueError(f"the visibility of {name} image {bad[0]} is {weight[bad[0]]}, expected finite scores >= 0")
    # An image's scale cancels in Eq. 4; dividing by it keeps products from overflowing or underflowing.
    largest = weight.max(axis=1, keepdims=True)
    return weight / np.where(largest > 0, largest, 1)


def _chunks(
    features: Any, weight: np.ndarray, center: np.ndarray, max_rows: int, name: str
) -> Iterator[tuple[slice, Any, Prepared]]:
    """Yields (rows, their features, the result of `_prepare`) for chunks of at most `max_rows` rows.

    All are prepared in the same size, to compile once: the last one overlaps the one before it, a single one is padded.
    """
    count = -(-len(weight) // max_rows)
    size = min(_padded(-(-len(weight) // count)), max_rows)
    for start in range(0, len(weight), size):
        start = max(0, min(start, len(weight) - size))
        rows = slice(start, start + size)
        chunk = features[rows]
        prepared = _prepare(*(_pad(x, size) for x in (chunk, weight[rows])), center)
        bad = np.flatnonzero(~np.isfinite(np.asarray(prepared[1])).all(axis=0))
        if len(bad):
            raise ValueError(f"the features of {name} image {start + bad[0]} are not finite, or overflow when squared")
        yield rows, chunk, prepared


def _padded(count: int) -> int:
    """A size of at least `count`, of few, since each is compiled: powers of two, and from 64 on steps of an eighth."""
    power = 1 << (count - 1).bit_length()
    step = power if power <= 64 else power // 16
    return -(-count // step) * step


def _pad(rows: Any, size: int) -> Any:
    """The rows and zeros after them; with weight 0 they are at +inf from everything."""
    missing = size - len(rows)
    return np.pad(np.asarray(rows), [(0, missing)] + [(0, 0)] * (np.ndim(rows) - 1)) if missing else rows


@jax.jit
def _prepare(features: Real[Array, "n p c"], weight: Float32[Array, "n p"], center: Float32[Array, "p c"]) -> Prepared:
    """(centered features, their squared norms, weights), regions first."""
    # One region at a time: XLA:CPU would write the squares of all regions to memory before the sum.
    x = [features[:, i].astype(jnp.float32) - center[i] for i in range(len(center))]
    return jnp.stack(x), jnp.stack([jnp.sum(region * region, axis=-1) for region in x]), weight.T


@partial(jax.jit, static_argnames=("squared", "slack"))
def _block(
    query: tuple[Array, Array, Array], gallery: tuple[Array, Array, Array], squared: bool, slack: float = 0.0
) -> tuple[Float32[Array, "q g"], Bool[Array, "q g"]]:
    """The distances between two prepared chunks, and the pairs whose distance is inaccurate.

    `slack` is subtracted from the squared local distances, as a fraction of |q|^2 + |g|^2.
    """
    (q, q_norm, q_weight), (g, g_norm, g_weight) = query, gallery

    def add_region(i: Array, sums: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        total, weights, near = sums
        weight = q_weight[i][:, None] * g_weight[i][None, :]
        norms = q_norm[i][:, None] + g_norm[i][None, :]
        # The default precision, bfloat16 on TPU and TF32 on GPU, is too low for this difference.
        local = norms * (1 - slack) - 2 * jnp.matmul(q[i], g[i].T, precision=jax.lax.Precision.HIGHEST)
        near |= (weight > 0) & (local < NEAR * norms)
        local = jnp.maximum(local, 0)
        return total + weight * (local if squared else jnp.sqrt(local)), weights + weight, near

    shape = (q.shape[1], g.shape[1])
    # Numerator and denominator sum the same products, so that they underflow together.
    start = (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32), jnp.zeros(shape, bool))
    total, weights, near = jax.lax.fori_loop(0, q.shape[0], add_region, start)
    return jnp.where(weights > 0, total / jnp.where(weights > 0, weights, 1), jnp.inf), near


def _recompute(
    distance: np.ndarray,
    pairs: tuple[np.ndarray, ...],
    query: tuple[Any, np.ndarray],
    gallery: tuple[Any, np.ndarray],
    squared: bool,
) -> None:
    """Overwrites the distances of a few pairs (rows, columns), computed accurately from feature differences."""
    (q, q_weight), (g, g_weight) = (np.asarray(query[0]), query[1]), (np.asarray(gallery[0]), gallery[1])
    step = max(1, 2**20 // q[0].size)  # a few MiB of pairs
    for start in range(0, len(pairs[0]), step):
        i, j = (index[start : start + step] for index in pairs)
        difference = q[i].astype(np.float32) - g[j].astype(np.float32)
        local = np.einsum("npc,npc->np", difference, difference)
        weight = q_weight[i] * g_weight[j]
        total = (weight * (local if squared else np.sqrt(local))).sum(axis=1)
        distance[i, j] = total / weight.sum(axis=1)


def top_k(
    query_features: QueryFeatures,
    query_visibility: QueryVisibility,
    gallery: Described | tuple[Any, Any],
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
      query_features: of any float type, used as given.
      query_visibility: at least 0; see `match_visibility`.
      gallery: a `search.store.Store`, or (features [G, P, C], visibility [G, P]), where features may be any object with
        a shape whose rows are indexed by slices and integer arrays.
      k: the number of images.
      squared: use squared local distances.
      devices: where to compute (default: all local devices). The result does not depend on it.

    Returns:
      (distance, index), nearest first, equal distances in gallery order. Pairs without a shared region are at +inf.
      k is min(k, G).

    Raises:
      ValueError: if k is less than 1, and as `region_distance`.
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
        # Bounds the memory of the queries' features, and of their pairs with a chunk and with the candidates.
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
    queries = _padded(len(query[0]))
    padded = [_pad(x, queries) for x in query]
    prepared, center = jax.device_put((_prepare(*padded, center), center), replicated)
    most = _chunk_size(center.size, mesh)
    count = -(-len(weight) // most)
    size = min(_padded(-(-len(weight) // count)), most)
    size += -size % mesh.size
    shape = (mesh.size, queries, _padded(kept))
    none = np.iinfo(np.int32).max
    state = (np.full(shape, np.inf, np.float32), np.full(shape, none, np.int32), np.full(mesh.size, none, np.int32))
    state = jax.device_put(state, sharded)
    scan_chunk = _scanner(mesh, squared)
    for start in range(0, len(weight), size):
        rows = slice(start, start + size)
        chunk = [_pad(np.asarray(x[rows]), size) for x in (features, weight)]
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
        gallery = _prepare(features, weight, center)
        length, kept = len(features), bound.shape[1]
        # The error of a sum of C products grows as sqrt(C) rounding errors; 4 sqrt(C) is a bound with margin.
        slack = (16 + 4 * features.shape[-1] ** 0.5) * 2.0**-24
        lowest = _block(query, gallery, squared, slack)[0] * (1 - 1e-5)  # covers the sum over the P regions
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
