"""The masked losses of Section 3.3. Each returns a total and a count: sum both over devices, then divide.

All arithmetic is in float32, or float64 if the inputs are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Integer

from vpm_jax.arrays import AnyArray


def _wide(x: AnyArray) -> Array:
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _cross_entropy(
    logits: Float[AnyArray, "*n k"], labels: Integer[AnyArray, "*n"], smoothing: float
) -> Float[Array, "*n"]:
    log_probability = jax.nn.log_softmax(_wide(logits))
    # Out-of-range labels give NaN; negative ones would wrap around.
    labels = jnp.where(labels < 0, log_probability.shape[-1], labels)
    picked = jnp.take_along_axis(log_probability, labels[..., None], axis=-1)[..., 0]
    if smoothing:
        picked = (1 - smoothing) * picked + smoothing * jnp.mean(log_probability, axis=-1)
    return -picked


def region_loss(
    logits: Float[AnyArray, "b h w p"],
    labels: Integer[AnyArray, "b h w"],
    smoothing: float = 0.0,
    valid: Bool[AnyArray, "b h w"] | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Eq. 5: cross entropy of the region locator, summed over the cells of all images.

    Args:
      logits: the locator's, before the softmax.
      labels: from `regions.project_regions`.
      smoothing: label smoothing, 0 in the paper.
      valid: the cells to include (default: all).

    Returns:
      (total, count), where count is the number of cells included.

    Raises:
      ValueError: if the shapes do not match.
    """
    if logits.shape[:-1] != labels.shape or (valid is not None and valid.shape != labels.shape):
        given = "" if valid is None else f" and valid {valid.shape}"
        raise ValueError(f"logits {logits.shape} and labels {labels.shape}{given}, expected [B, h, w, P] and [B, h, w]")
    if valid is None:
        losses = _cross_entropy(logits, labels, smoothing)
        return jnp.sum(losses), jnp.asarray(labels.size, losses.dtype)
    losses = _cross_entropy(jnp.where(valid[..., None], logits, 0), labels, smoothing)
    return jnp.sum(jnp.where(valid, losses, 0)), jnp.sum(valid).astype(losses.dtype)


def identity_loss(
    logits: Float[AnyArray, "b p k"],
    identity: Integer[AnyArray, " b"],
    visible: Bool[AnyArray, "b p"],
    smoothing: float = 0.0,
) -> tuple[Float[Array, " p"], Float[Array, " p"]]:
    """Eq. 6: cross entropy of each region's identity head, summed over the images in which the region is visible.

    The paper's loss is sum(total) / B, the released code's is sum(total / max(count, 1)).

    Args:
      logits: from each region's identity head.
      identity: the class of each image, in 0 .. K-1.
      visible: the visible set.
      smoothing: label smoothing, 0 in the paper.

    Returns:
      (total, count) of each region, where count is the number of images in which it is visible.

    Raises:
      ValueError: if the shapes do not match.
    """
    if logits.shape[:-1] != visible.shape or identity.shape != visible.shape[:1]:
        raise ValueError(
            f"logits {logits.shape}, identity {identity.shape}, visible {visible.shape}, "
            "expected [B, P, K], [B] and [B, P]"
        )
    logits = jnp.where(visible[..., None], logits, 0)  # keeps NaN in invisible regions out of the gradient
    losses = _cross_entropy(logits, jnp.broadcast_to(identity[:, None], visible.shape), smoothing)
    total = jnp.sum(jnp.where(visible, losses, 0), axis=0)
    return total, jnp.sum(visible, axis=0).astype(total.dtype)


def pair_weights(
    visible: Bool[AnyArray, "b p"],
    other_visible: Bool[AnyArray, "m p"],
    pairs: str = "visible",
    visibility: Float[AnyArray, "b p"] | None = None,
    other_visibility: Float[AnyArray, "m p"] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Float[Array, "b m p"]:
    """The weight of each region in the distance of each pair: sums to 1 over P, all 0 if no region is shared.

    "visible" weights the shared regions equally (Eq. 7), "all" weights every region equally (MVPM-2), and "soft"
    weights by the product of the predicted visibility scores, without gradient (the released code).

    Raises:
      ValueError: for an unknown `pairs`, or "soft" without visibility scores.
    """
    if pairs == "visible":
        weights = jnp.asarray(visible[:, None] & other_visible[None], dtype)
    elif pairs == "all":
        weights = jnp.ones((len(visible), *other_visible.shape), dtype)
    elif pairs == "soft":
        if visibility is None or other_visibility is None:
            raise ValueError('pairs="soft" weights regions by predicted visibility: pass visibility [B, P]')
        weights = lax.stop_gradient(jnp.asarray(visibility, dtype)[:, None] * jnp.asarray(other_visibility, dtype))
    else:
        raise ValueError(f'pairs is {pairs!r}, expected "visible", "all" or "soft"')
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def triplet_loss(
    features: Float[AnyArray, "b p c"],
    identity: Integer[AnyArray, " b"],
    visible: Bool[AnyArray, "b p"],
    margin: float | Float[AnyArray, ""] = 1.0,
    *,
    pairs: str = "visible",
    hinge: str = "hard",
    visibility: Float[AnyArray, "b p"] | None = None,
    axis_name: str | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Eq. 7: region-selective triplet loss with batch-hard mining (Hermans et al., 2017).

    D_ab is the mean Euclidean distance over the regions that a and b share. Pairs without a shared region are not
    comparable and never mined. Features are used as given (the step L2-normalizes them). Gradients are finite for
    identical features and exactly zero for invisible regions.

    Args:
      features: one for each region.
      identity: the label of each image.
      visible: the visible set.
      margin: alpha.
      pairs: "visible", "all" or "soft": see `pair_weights`.
      hinge: "hard", the max(0, x) of Eq. 7, or "soft", log(1 + exp(x)).
      visibility: predicted scores, needed for pairs="soft".
      axis_name: mine over the batches of all devices on this mapped axis.

    Returns:
      (total, count), where count is the number of anchors with a comparable positive other than themselves
      and a comparable negative.

    Raises:
      ValueError: if the shapes do not match, for an unknown hinge, and as `pair_weights`.
    """
    if hinge not in ("hard", "soft"):
        raise ValueError(f'hinge is {hinge!r}, expected "hard" or "soft"')
    if features.shape[:-1] != visible.shape or identity.shape != visible.shape[:1]:
        raise ValueError(
            f"features {features.shape}, identity {identity.shape}, visible {visible.shape}, "
            "expected [B, P, C], [B] and [B, P]"
        )
    features = _wide(features)
    batch = len(features)
    index = jnp.arange(batch) + (lax.axis_index(axis_name) * batch if axis_name else 0)
    others = (features, identity, visible, index, visibility)
    if axis_name:
        others = jax.tree.map(lambda x: lax.all_gather(x, axis_name, tiled=True), others)
    other_features, other_identity, other_visible, other_index, other_visibility = others

    weights = pair_weights(visible, other_visible, pairs, visibility, other_visibility, features.dtype)

    # Mining compares all pairs through |a|^2 + |b|^2 - 2 a.b: one matrix product, in full precision (bfloat16 or TF32
    # would lose small distances). Subtracting the mean first reduces cancellation.
    a, b = lax.stop_gradient((features, other_features))
    shown = jnp.sum(other_visible, axis=0)[:, None]
    center = jnp.sum(jnp.where(other_visible[..., None], b, 0), axis=0) / jnp.maximum(shown, 1)
    a, b = a - center, b - center
    product = jnp.einsum("apc,bpc->abp", a, b, precision=lax.Precision.HIGHEST)
    norms, other_norms = (jnp.sum(jnp.square(f), axis=-1) for f in (a, b))
    local = jnp.sqrt(jnp.maximum(norms[:, None] + other_norms[None] - 2 * product, 0))
    distance = jnp.sum(jnp.where(weights > 0, weights * local, 0), axis=-1)
    comparable = jnp.sum(weights, axis=-1) > 0
    same = identity[:, None] == other_identity[None]
    positive = same & comparable & (index[:, None] != other_index[None])
    negative = ~same & comparable
    mined = jnp.any(positive, axis=1) & jnp.any(negative, axis=1)

    def distance_to(mate: Integer[Array, " b"]) -> Float[Array, " b"]:
        # From the differences: the expansion above loses its digits for duplicate and nearly equal images.
        weight = jnp.take_along_axis(weights, mate[:, None, None], axis=1)[:, 0]
        difference = jnp.where(weight[..., None] > 0, features - other_features[mate], 0)
        squared = jnp.sum(jnp.square(difference), axis=-1)
        apart = squared != 0  # true for NaN, which must reach the total
        local = jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1)), 0)  # the gradient of sqrt is infinite at 0
        return jnp.sum(weight * local, axis=-1)

    hardest_positive = distance_to(jnp.argmax(jnp.where(positive, distance, -jnp.inf), axis=1))
    hardest_negative = distance_to(jnp.argmin(jnp.where(negative, distance, jnp.inf), axis=1))
    gap = jnp.where(mined, hardest_positive - hardest_negative + margin, 0)
    losses = jax.nn.relu(gap) if hinge == "hard" else jnp.where(mined, jax.nn.softplus(gap), 0)
    return jnp.sum(losses), jnp.sum(mined).astype(gap.dtype)
