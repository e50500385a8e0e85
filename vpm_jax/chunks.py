"""Chunks of features on the device, and the distances between the images of two chunks (Eq. 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Float32, Real

# The size of a chunk of features, and of a block of distances, on the device: large enough for matrix products at full
# speed (2,700 by 2,700 images of 6 x 2048 floats), small compared with a large gallery.
CHUNK_BYTES = 128 * 2**20
# Smaller on CPU: malloc returns larger arrays to the system, which zeroes their pages on every allocation. 1.5 times as
# fast for 1,000 by 8,000 images of 6 x 2,048 on two cores.
CPU_CHUNK_BYTES = 20 * 2**20

# Below this fraction of |q|^2 + |g|^2, the float32 expansion of |q - g|^2 has lost too many digits.
NEAR = 1e-3

# NumPy or JAX arrays, memory maps, or any object with a shape and rows to slice; visibility may be a list.
QueryFeatures = Float[Any, "q p c"]
QueryVisibility = Real[Any, "q p"] | Sequence[Any]
GalleryFeatures = Float[Any, "g p c"]
GalleryVisibility = Real[Any, "g p"] | Sequence[Any]

Prepared = tuple[Float32[Array, "p n c"], Float32[Array, "p n"], Float32[Array, "p n"]]  # see `prepare`


@runtime_checkable
class Described(Protocol):
    """N described images, such as a `Description` or a `search.store.Store`."""

    @property
    def features(self) -> Any: ...  # [N, P, C], indexed by slices and integer arrays

    @property
    def visibility(self) -> np.ndarray: ...  # [N, P]


def check_shapes(*arrays: Any) -> None:
    """Raises ValueError unless the arrays are [Q, P, C], [Q, P], [G, P, C], and [G, P]."""
    q, qv, g, gv = map(np.shape, arrays)
    if not (len(q) == len(g) == 3 and q[1:] == g[1:] and qv == q[:2] and gv == g[:2] and min(q[1:]) > 0):
        raise ValueError(
            f"query features {q} with visibility {qv} and gallery features {g} with visibility {gv}, "
            "expected [Q, P, C] with [Q, P] and [G, P, C] with [G, P]"
        )


def checked_visibility(visibility: Any, name: str) -> Float32[np.ndarray, "n p"]:
    """The weights, each image's divided by its largest; ValueError if one is negative or not finite."""
    weight = np.asarray(visibility).astype(np.float32)
    bad = np.flatnonzero(~((weight >= 0) & np.isfinite(weight)).all(axis=1))
    if len(bad):
        raise ValueError(f"the visibility of {name} image {bad[0]} is {weight[bad[0]]}, expected finite scores >= 0")
    # An image's scale cancels in Eq. 4; dividing by it keeps products from overflowing or underflowing.
    largest = weight.max(axis=1, keepdims=True)
    return weight / np.where(largest > 0, largest, 1)


def prepared_chunks(
    features: Any, weight: np.ndarray, center: np.ndarray, max_rows: int, name: str
) -> Iterator[tuple[slice, Any, Prepared]]:
    """Yields (rows, their features, the result of `prepare`) for chunks of at most `max_rows` rows.

    All are prepared in the same size, to compile once: the last one overlaps the one before it, a single one is padded.
    """
    count = -(-len(weight) // max_rows)
    size = min(padded_size(-(-len(weight) // count)), max_rows)
    for start in range(0, len(weight), size):
        start = max(0, min(start, len(weight) - size))
        rows = slice(start, start + size)
        chunk = features[rows]
        prepared = prepare(*(pad(x, size) for x in (chunk, weight[rows])), center)
        bad = np.flatnonzero(~np.isfinite(np.asarray(prepared[1])).all(axis=0))
        if len(bad):
            raise ValueError(f"the features of {name} image {start + bad[0]} are not finite, or overflow when squared")
        yield rows, chunk, prepared


def padded_size(count: int) -> int:
    """A size of at least `count`, of few, since each is compiled: powers of two, and from 64 on steps of an eighth."""
    power = 1 << (count - 1).bit_length()
    step = power if power <= 64 else power // 16
    return -(-count // step) * step


def pad(rows: Any, size: int) -> Any:
    """The rows and zeros after them; with weight 0 they are at +inf from everything."""
    missing = size - len(rows)
    return np.pad(np.asarray(rows), [(0, missing)] + [(0, 0)] * (np.ndim(rows) - 1)) if missing else rows


@jax.jit
def prepare(features: Real[Array, "n p c"], weight: Float32[Array, "n p"], center: Float32[Array, "p c"]) -> Prepared:
    """(centered features, their squared norms, weights), regions first."""
    # One region at a time: XLA:CPU would write the squares of all regions to memory before the sum.
    x = [features[:, i].astype(jnp.float32) - center[i] for i in range(len(center))]
    return jnp.stack(x), jnp.stack([jnp.sum(region * region, axis=-1) for region in x]), weight.T


@partial(jax.jit, static_argnames=("squared", "slack"))
def block_distance(
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
