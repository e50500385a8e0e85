"""The masked losses of Section 3.3. Each returns a total and a count: across devices sum both, then divide.

Everything is computed in float32 (float64 if given float64). Visible sets come as arrays from the host.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax


def _wide(x):
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _cross_entropy(logits, labels, smoothing=0.0):
    log_probability = jax.nn.log_softmax(_wide(logits))
    # Labels that are no class give NaN: those beyond the last do so by themselves, negative ones would count backwards.
    labels = jnp.where(labels < 0, log_probability.shape[-1], labels)
    picked = jnp.take_along_axis(log_probability, labels[..., None], axis=-1)[..., 0]
    if smoothing:
        picked = (1 - smoothing) * picked + smoothing * jnp.mean(log_probability, axis=-1)
    return -picked


def region_loss(
    logits: Array, labels: Array, smoothing: float = 0.0, valid: Array | None = None
) -> tuple[Array, Array]:
    """Eq. 5: cross entropy of the region locator, summed over every cell of every image.

    Args:
      logits: [B, h, w, P] of the locator.
      labels: int [B, h, w] from `regions.project_regions`.
      smoothing: label smoothing, 0 in the paper.
      valid: bool [B, h, w], the cells that count; default: all.

    Returns:
      (total, count): scalars; count is the number of cells that count, B * h * w by default.

    Raises:
      ValueError: for shapes that do not fit together.
    """
    if logits.shape[:-1] != labels.shape or (valid is not None and valid.shape != labels.shape):
        given = "" if valid is None else f" and valid {valid.shape}"
        raise ValueError(f"logits {logits.shape} and labels {labels.shape}{given}, expected [B, h, w, P] and [B, h, w]")
    if valid is None:
        losses = _cross_entropy(logits, labels, smoothing)
        return jnp.sum(losses), jnp.asarray(labels.size, losses.dtype)
    losses = _cross_entropy(jnp.where(valid[..., None], logits, 0), labels, smoothing)
    return jnp.sum(jnp.where(valid, losses, 0)), jnp.sum(valid).astype(losses.dtype)


def identity_loss(logits: Array, identity: Array, visible: Array, smoothing: float = 0.0) -> tuple[Array, Array]:
    """Eq. 6: cross entropy of each region's identity head over the images that show the region.

    The paper's loss is sum(total) / B, the released code's sum(total / max(count, 1)).

    Args:
      logits: [B, P, K].
      identity: int [B], in 0 .. K-1.
      visible: bool [B, P], the visible set.
      smoothing: label smoothing, 0 in the paper.

    Returns:
      (total [P], count [P]).

    Raises:
      ValueError: for shapes that do not fit together.
    """
    if logits.shape[:-1] != visible.shape or identity.shape != visible.shape[:1]:
        raise ValueError(
            f"logits {logits.shape}, identity {identity.shape}, visible {visible.shape}, "
            "expected [B, P, K], [B] and [B, P]"
        )
    logits = jnp.where(visible[..., None], logits, 0)  # so that what is not finite there has no gradient either
    losses = _cross_entropy(logits, jnp.broadcast_to(identity[:, None], visible.shape), smoothing)
    total = jnp.sum(jnp.where(visible, losses, 0), axis=0)
    return total, jnp.sum(visible, axis=0).astype(total.dtype)


def pair_weights(
    visible: Array,
    other_visible: Array,
    pairs: str = "visible",
    visibility: Array | None = None,
    other_visibility: Array | None = None,
    dtype=jnp.float32,
) -> Array:
    """How much each region counts in each pair: [B, M, P], summing to 1 over P, or all 0 without a shared region.

    "visible": the shared regions alike (Eq. 7); "all": every region alike (MVPM-2); "soft": by the product
    of the predicted visibility scores, without gradient (the released code).

    Raises:
      ValueError: for another value of pairs, or "soft" without visibility scores.
    """
    if pairs == "visible":
        weights = (visible[:, None] & other_visible[None]).astype(dtype)
    elif pairs == "all":
        weights = jnp.ones((len(visible), *other_visible.shape), dtype)
    elif pairs == "soft":
        if visibility is None or other_visibility is None:
            raise ValueError('pairs="soft" weighs regions by predicted visibility: pass visibility [B, P]')
        weights = lax.stop_gradient(visibility.astype(dtype)[:, None] * other_visibility.astype(dtype)[None])
    else:
        raise ValueError(f'pairs is {pairs!r}, expected "visible", "all" or "soft"')
    total = jnp.sum(weights, axis=-1, keepdims=True)
    return weights / jnp.where(total > 0, total, 1)


def triplet_loss(
    features: Array,
    identity: Array,
    visible: Array,
    margin: float = 1.0,
    *,
    pairs: str = "visible",
    hinge: str = "hard",
    visibility: Array | None = None,
    axis_name: str | None = None,
) -> tuple[Array, Array]:
    """Eq. 7: region-selective triplet loss with batch-hard mining (Hermans et al., 2017).

    D_ab is the mean euclidean distance over the regions that a and b share. Pairs that share none are not
    comparable and never mined. Features are used as given (the step L2-normalises them). Gradients are
    finite for identical features and exactly zero for invisible regions.

    Args:
      features: [B, P, C].
      identity: int [B].
      visible: bool [B, P].
      margin: alpha.
      pairs: "visible", "all" or "soft": see `pair_weights`.
      hinge: "hard", the max(0, x) of Eq. 7, or "soft", log(1 + exp(x)).
      visibility: [B, P] predicted scores, for "soft".
      axis_name: mine over the batch of every device on this mapped axis.

    Returns:
      (total, count): scalars; count = anchors with a comparable positive other than themselves and a
      comparable negative.

    Raises:
      ValueError: for shapes that do not fit together, another hinge, and as `pair_weights`.
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
    index = jnp.arange(batch)
    others = (features, identity, visible, index, visibility)
    if axis_name is not None:
        index = index + lax.axis_index(axis_name) * batch
        others = (features, identity, visible, index, visibility)
        others = jax.tree.map(lambda x: lax.all_gather(x, axis_name, tiled=True), others)
    other_features, other_identity, other_visible, other_index, other_visibility = others

    weights = pair_weights(visible, other_visible, pairs, visibility, other_visibility, features.dtype)

    # Mining compares every pair: |a - b|^2 expanded, one matrix product in full precision (matrix units would
    # lose the small distances), about the mean, so that what all features share cancels beforehand.
    a, b = lax.stop_gradient((features, other_features))
    shown = jnp.sum(other_visible, axis=0)[:, None]
    centre = jnp.sum(jnp.where(other_visible[..., None], b, 0), axis=0) / jnp.maximum(shown, 1)
    a, b = a - centre, b - centre
    product = jnp.einsum("apc,bpc->abp", a, b, precision=lax.Precision.HIGHEST)
    norms, other_norms = (jnp.sum(jnp.square(f), axis=-1) for f in (a, b))
    local = jnp.sqrt(jnp.maximum(norms[:, None] + other_norms[None] - 2 * product, 0))
    distance = jnp.sum(jnp.where(weights > 0, weights * local, 0), axis=-1)
    comparable = jnp.sum(weights, axis=-1) > 0
    same = identity[:, None] == other_identity[None]
    positive = same & comparable & (index[:, None] != other_index[None])
    negative = ~same & comparable
    mined = jnp.any(positive, axis=1) & jnp.any(negative, axis=1)

    def distance_to(mate):  # [B] -> [B]
        # From the differences themselves: the expansion cancels badly for repeated and nearly equal images.
        weight = jnp.take_along_axis(weights, mate[:, None, None], axis=1)[:, 0]
        difference = jnp.where(weight[..., None] > 0, features - other_features[mate], 0)
        squared = jnp.sum(jnp.square(difference), axis=-1)
        apart = squared != 0  # NaN too, which shows in the total
        local = jnp.where(apart, jnp.sqrt(jnp.where(apart, squared, 1)), 0)  # sqrt has no gradient at 0
        return jnp.sum(weight * local, axis=-1)

    hardest_positive = distance_to(jnp.argmax(jnp.where(positive, distance, -jnp.inf), axis=1))
    hardest_negative = distance_to(jnp.argmin(jnp.where(negative, distance, jnp.inf), axis=1))
    gap = jnp.where(mined, hardest_positive - hardest_negative + margin, 0)
    losses = jax.nn.relu(gap) if hinge == "hard" else jnp.where(mined, jax.nn.softplus(gap), 0)
    return jnp.sum(losses), jnp.sum(mined).astype(gap.dtype)
