"""Distances between images over the regions they share (Section 3.1, Eq. 4), for galleries of any size."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import isqrt
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Float32, Int64, Real
from ml_collections import ConfigDict

from vpm_jax.chunks import (
    CHUNK_BYTES,
    CPU_CHUNK_BYTES,
    Described,
    GalleryFeatures,
    GalleryVisibility,
    QueryFeatures,
    QueryVisibility,
    block_distance,
    check_shapes,
    checked_visibility,
    prepared_chunks,
)
from vpm_jax.topk import top_k


def pairwise_distance(match: ConfigDict, query: Described, gallery: Described) -> Float32[np.ndarray, "q g"]:
    """Eq. 4 with the settings of config.match; without re-ranking and gallery crops. See `region_distance`."""
    return region_distance(*_weighted(match, query), *_weighted(match, gallery, True), match.squared)


def pairwise_shares(
    match: ConfigDict, query: Described, gallery: Described
) -> tuple[Float32[np.ndarray, "q g p"], Float32[np.ndarray, "q g p"]]:
    """The per-region terms of `pairwise_distance` without match.vector: see `local_distances`."""
    weights = _weight(match, query), _weight(match, gallery, True)
    return local_distances(query.features, weights[0], gallery.features, weights[1], match.squared)


def nearest(
    match: ConfigDict, query: Described, gallery: Described, k: int
) -> tuple[Float32[np.ndarray, "q k"], Int64[np.ndarray, "q k"]]:
    """The k gallery images nearest to each query by `pairwise_distance`: see `top_k`."""
    return top_k(*_weighted(match, query), *_weighted(match, gallery, True), k, match.squared)


def _weight(match: ConfigDict, images: Described, gallery: bool = False) -> np.ndarray:
    """The visibility weights that config.match asks for."""
    return match_visibility(images.visibility, "uniform" if gallery and match.gallery_whole else match.visibility)


def _weighted(match: ConfigDict, images: Described, gallery: bool = False) -> tuple[Any, np.ndarray]:
    """(features, `_weight`); with match.vector, of a single region."""
    weight = _weight(match, images, gallery)
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
    weights, the cosine is the same for all, and the ranking is that of squared Eq. 4. Otherwise, images whose
    visibility differs from the query's rank lower. So give a gallery of whole images equal weights: their predicted
    scores differ by chance, which costs partial queries (docs/results/vectors.md).

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


def match_visibility(visibility: Real[Any, "*n p"] | Sequence[Any], mode: str) -> Float32[np.ndarray, "*n p"]:
    """The visibility weights of Eq. 4, from the predicted scores C of Eq. 2.

    Args:
      visibility: for each region, the sum of its probability over the cells of the feature map.
      mode: "soft" uses the scores as predicted (the paper). "saturated" divides them by the number of cells that a
        region has in a whole image and clips at 1, so that an overestimated region gets no extra weight. "uniform" is
        1 for every region (MVPM-1). "binary" is 1 for regions with a score of at least one cell, which a visible
        region spans (`project_regions`), else 0.

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
        return (scores >= 1).astype(np.float32)
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
    check_shapes(query_features, query_visibility, gallery_features, gallery_visibility)
    query_weight = checked_visibility(query_visibility, "query")
    gallery_weight = checked_visibility(gallery_visibility, "gallery")
    queries, galleries = len(query_weight), len(gallery_weight)
    distance = np.empty((queries, galleries), np.float32)
    if not distance.size:
        return distance

    # Distances do not depend on the origin; the mean of a sample of the queries is close enough.
    center = np.asarray(query_features[:: max(1, queries // 512)]).astype(np.float32).mean(axis=0)
    center[~np.isfinite(center)] = 0  # keeps one image's NaN from spreading through the mean
    chunk_bytes = min(CHUNK_BYTES, CPU_CHUNK_BYTES) if jax.default_backend() == "cpu" else CHUNK_BYTES
    max_rows = max(1, min(chunk_bytes // (4 * center.size), isqrt(chunk_bytes // 4)))
    query_chunks = partial(prepared_chunks, query_features, query_weight, center, max_rows, "query")
    if 4 * queries * center.size <= 2 * CHUNK_BYTES:  # small enough to prepare once
        query_chunks = partial(iter, list(query_chunks()))
    for gallery_rows, gallery, on_device in prepared_chunks(
        gallery_features, gallery_weight, center, max_rows, "gallery"
    ):
        for query_rows, query, block in query_chunks():
            target = distance[query_rows, gallery_rows]
            values, near = (
                np.asarray(x)[: len(target), : target.shape[1]] for x in block_distance(block, on_device, squared)
            )
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
    check_shapes(query_features, query_visibility, gallery_features, gallery_visibility)
    query_weight = checked_visibility(query_visibility, "query").astype(np.float64)
    gallery_weight = checked_visibility(gallery_visibility, "gallery").astype(np.float64)
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
