"""The losses against plain float64 NumPy loops, under jit as well as not (XLA:CPU has miscompiled reductions)."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import optimized

from vpm_jax.losses import identity_loss, region_loss, triplet_loss
from vpm_jax.regions import RegionGrid, draw_crop, project_regions

# float32 keeps 24 bits: 6e-8 for one operation. Totals add terms of a like size, each the outcome of some ten
# operations on numbers near 1, so a relative 1e-5 leaves room for the order of summation and nothing else.
FLOAT32: dict[str, Any] = dict(rtol=1e-5, atol=1e-5)
FLOAT64: dict[str, Any] = dict(rtol=1e-12, atol=1e-12)

TRIPLET_AND_GRADIENT = jax.value_and_grad(triplet_loss, has_aux=True)


@pytest.fixture(params=["eager", "jit"])
def run(request):
    """Calls a loss as it is, or compiled: run(loss, *arrays)."""

    def call(loss, *arrays):
        return (optimized(loss) if request.param == "jit" else loss)(*map(jnp.asarray, arrays))

    return call


# For properties that other tests already tie to the reference both ways: eager JAX compiles each operation again
# for every shape, which is most of what these tests cost.
jit_only = pytest.mark.parametrize("run", ["jit"], indirect=True)


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    """(dtype of the inputs, tolerance), with float64 switched on in JAX where it is asked for."""
    if request.param == "float32":
        yield np.float32, FLOAT32
    else:
        with jax.enable_x64(True):
            yield np.float64, FLOAT64


# --- the references: what the paper's equations say, one number at a time -----------------------------


def cross_entropy(logits, label):
    logits = np.asarray(logits, np.float64)
    return logits.max() + np.log(np.exp(logits - logits.max()).sum()) - logits[label]


def reference_region_loss(logits, labels):
    """Eq. 5: over every cell of every feature map."""
    terms = [cross_entropy(logits[cell], labels[cell]) for cell in np.ndindex(labels.shape)]
    return sum(terms), len(terms)


def reference_identity_loss(logits, identity, visible):
    """Eq. 6, per region: over the images that show it."""
    totals, counts = [], []
    for region in range(visible.shape[1]):
        shown = [image for image in range(len(identity)) if visible[image, region]]
        totals.append(sum(cross_entropy(logits[image, region], identity[image]) for image in shown))
        counts.append(len(shown))
    return np.array(totals), np.array(counts)


def reference_triplet_loss(features, identity, weights, margin, soft=False):
    """Eq. 7, batch-hard, and its gradient. weights(a, b) are those of the regions; (1, 0, 1) selects two.

    The soft hinge is log(1 + exp(x)), whose slope is the logistic function.

    Where two features coincide the distance has no gradient; zero is taken.
    """
    features = np.asarray(features, np.float64)
    images = range(len(identity))

    def distance(a, b):
        """The pair's distance, or None where it has no weight on any region."""
        w = np.asarray(weights(a, b), np.float64)
        if w.sum() == 0:
            return None
        lengths = np.linalg.norm(features[a] - features[b], axis=-1)  # of every region
        return (w * lengths).sum() / w.sum()

    total, count, gradient = 0.0, 0, np.zeros_like(features)

    def add_gradient(a, b, sign):
        w = np.asarray(weights(a, b), np.float64)
        for i in range(len(w)):
            difference = features[a, i] - features[b, i]
            length = np.linalg.norm(difference)
            if length > 0:
                gradient[a, i] += sign * w[i] / w.sum() * difference / length
                gradient[b, i] -= sign * w[i] / w.sum() * difference / length

    for anchor in images:
        distances = {other: distance(anchor, other) for other in images if other != anchor}
        distances = {other: value for other, value in distances.items() if value is not None}
        positives = [other for other in distances if identity[other] == identity[anchor]]
        negatives = [other for other in distances if identity[other] != identity[anchor]]
        if not positives or not negatives:
            continue
        count += 1
        farthest = max(positives, key=lambda other: distances[other])
        nearest = min(negatives, key=lambda other: distances[other])
        hinge = distances[farthest] - distances[nearest] + margin
        if soft:
            total += np.log1p(np.exp(hinge))
            add_gradient(anchor, farthest, 1 / (1 + np.exp(-hinge)))
            add_gradient(anchor, nearest, -1 / (1 + np.exp(-hinge)))
        elif hinge > 0:
            total += hinge
            add_gradient(anchor, farthest, 1)
            add_gradient(anchor, nearest, -1)
    return total, count, gradient


def shared(visible):
    return lambda a, b: visible[a] & visible[b]


def triplet_batch(seed, dtype=np.float32):
    """14 images of 4 regions with random features; unequal identities, the last of one image; random visible sets."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(14, 4, 8)).astype(dtype)
    identity = np.append(random.integers(0, 3, 13), 3).astype(np.int32)
    visible = random.random((14, 4)) < 0.6
    return features, identity, visible


# --- region loss (Eq. 5) ------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 6, 4, 6), (3, 24, 1, 6), (1, 1, 1, 2), (2, 5, 3, 1)])
def test_region_loss(run, precision, shape):
    dtype, tolerance = precision
    random = np.random.default_rng(0)
    logits = (3 * random.normal(size=shape)).astype(dtype)
    labels = random.integers(0, shape[-1], shape[:-1]).astype(np.int32)
    total, count = run(region_loss, logits, labels)
    expected_total, expected_count = reference_region_loss(logits, labels)
    assert jnp.shape(total) == jnp.shape(count) == ()
    np.testing.assert_allclose(total, expected_total, **tolerance)
    assert float(count) == expected_count == np.prod(shape[:-1])


def test_region_loss_at_the_papers_size(run):
    random = np.random.default_rng(1)
    logits = random.normal(size=(64, 24, 8, 6)).astype(np.float32)
    labels = np.stack(
        [project_regions(draw_crop("top", g, (0, 0, 0)), RegionGrid(6), (24, 8))[0] for g in np.linspace(0.5, 1, 64)]
    )
    total, count = run(region_loss, logits, labels)
    assert total.dtype == jnp.asarray(count).dtype == jnp.float32
    np.testing.assert_allclose(total, reference_region_loss(logits, labels)[0], **FLOAT32)
    assert float(count) == 64 * 24 * 8


def test_region_loss_gradient_is_probability_minus_label(run, precision):
    dtype, tolerance = precision
    random = np.random.default_rng(2)
    logits = random.normal(size=(2, 3, 2, 4)).astype(dtype)
    labels = random.integers(0, 4, (2, 3, 2)).astype(np.int32)
    gradient = run(jax.grad(lambda x, y: region_loss(x, y)[0]), logits, labels)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(gradient, p - np.eye(4)[labels], **tolerance)


@jit_only
def test_label_smoothing_gives_every_class_a_share(run, precision):
    dtype, tolerance = precision
    logits, identity, visible = identity_batch(4, dtype=dtype)
    images, regions, classes = logits.shape
    log_probability = -np.array([[[cross_entropy(x, k) for k in range(classes)] for x in row] for row in logits])
    target = 0.8 * np.eye(classes)[identity] + 0.2 / classes
    losses = -(target[:, None] * log_probability).sum(-1)
    total, count = run(partial(identity_loss, smoothing=0.2), logits, identity, visible)
    np.testing.assert_allclose(total, (losses * visible).sum(0), **tolerance)
    np.testing.assert_array_equal(count, visible.sum(0))
    # A map of images x regions cells, the classes for regions: the same logits.
    labels = np.repeat(identity[:, None], regions, axis=1)[None]
    total, count = run(partial(region_loss, smoothing=0.2), logits[None], labels)
    np.testing.assert_allclose(total, losses.sum(), **tolerance)
    assert float(count) == images * regions


def test_region_loss_of_confident_logits_stays_finite(run):
    logits = np.array([[[[1e4, -1e4, 0.0]], [[1e4, -1e4, 0.0]]]], np.float32)
    labels = np.array([[[0], [1]]], np.int32)
    total, gradient = run(jax.value_and_grad(lambda x, y: region_loss(x, y)[0]), logits, labels)
    assert float(total) == 2e4
    np.testing.assert_allclose(gradient[0, :, 0], [[0, 0, 0], [1, -1, 0]], atol=1e-6)


# --- identity loss (Eq. 6) ----------------------------------------------------------------------------


def identity_batch(seed, images=9, dtype=np.float32):
    """Logits of 4 regions and 7 classes, identities, visible sets."""
    random = np.random.default_rng(seed)
    logits = (3 * random.normal(size=(images, 4, 7))).astype(dtype)
    identity = random.integers(0, 7, images).astype(np.int32)
    visible = random.random((images, 4)) < 0.6
    visible[0] = False  # an image that shows nothing
    visible[:, -1] = False  # a region that nobody shows
    visible[:, 0] = True
    return logits, identity, visible


@pytest.mark.parametrize("seed", range(3))
def test_identity_loss(run, precision, seed):
    dtype, tolerance = precision
    logits, identity, visible = identity_batch(seed, dtype=dtype)
    total, count = run(identity_loss, logits, identity, visible)
    expected_total, expected_count = reference_identity_loss(logits, identity, visible)
    assert total.shape == count.shape == (4,)
    np.testing.assert_allclose(total, expected_total, **tolerance)
    np.testing.assert_array_equal(count, expected_count)
    assert count[-1] == total[-1] == 0


def test_identity_loss_at_the_papers_size(run):
    random = np.random.default_rng(3)
    logits = random.normal(size=(64, 6, 751)).astype(np.float32)
    identity = np.repeat(random.choice(751, 8, replace=False), 8).astype(np.int32)
    visible = np.stack(
        [project_regions(draw_crop("top", g, (0, 0, 0)), RegionGrid(6), (24, 8))[1] for g in np.linspace(0.5, 1, 64)]
    )
    total, count = run(identity_loss, logits, identity, visible)
    expected_total, expected_count = reference_identity_loss(logits, identity, visible)
    assert total.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(total, expected_total, **FLOAT32)
    np.testing.assert_array_equal(count, expected_count)


def test_identity_loss_gradients(run, precision):
    dtype, tolerance = precision
    logits, identity, visible = identity_batch(5, dtype=dtype)
    gradient = run(jax.grad(lambda x, y, v: identity_loss(x, y, v)[0].sum()), logits, identity, visible)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=-1, keepdims=True)
    expected = (p - np.eye(7)[identity][:, None]) * visible[..., None]
    np.testing.assert_allclose(gradient, expected, **tolerance)
    assert (np.asarray(gradient)[~visible] == 0).all(), "exactly zero, not nearly"


def test_identity_loss_ignores_invisible_regions(run):
    logits, identity, visible = identity_batch(6)
    wild = np.where(visible[..., None], logits, np.float32(1e30) * np.sign(logits))
    pairs = zip(run(identity_loss, logits, identity, visible), run(identity_loss, wild, identity, visible), strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)
    for unseen in (wild, np.where(visible[..., None], logits, np.float32(np.nan))):
        gradient = run(jax.grad(lambda x, y, v: identity_loss(x, y, v)[0].sum()), unseen, identity, visible)
        assert np.isfinite(gradient).all() and (np.asarray(gradient)[~visible] == 0).all()


@pytest.mark.parametrize("label", [-1, 7, 1000])
def test_labels_out_of_range_give_nan(run, label):
    logits, identity, visible = identity_batch(6)
    assert logits.shape[-1] == 7
    visible[:, 0], identity[2] = True, label
    total, _ = run(identity_loss, logits, identity, visible)
    assert np.isnan(total[0])
    cells = np.zeros((2, 3, 1), np.int32)
    cells[1, 2] = label
    assert np.isnan(run(region_loss, np.zeros((2, 3, 1, 7), np.float32), cells)[0])


# --- triplet loss (Eq. 7) -----------------------------------------------------------------------------


@pytest.mark.parametrize("margin", [0.0, 0.3, 1.0, 5.0])
def test_triplet_loss(run, precision, margin):
    dtype, tolerance = precision
    for seed in range(4):
        features, identity, visible = triplet_batch(seed, dtype=dtype)
        expected_total, expected_count, _ = reference_triplet_loss(features, identity, shared(visible), margin)
        assert 0 < expected_count < len(identity), "the batch should hold anchors of both kinds"
        total, count = run(triplet_loss, features, identity, visible, margin)
        assert total.shape == count.shape == ()
        np.testing.assert_allclose(total, expected_total, **tolerance)
        assert float(count) == expected_count


def test_triplet_gradient(run, precision):
    dtype, tolerance = precision
    gradient_of = jax.grad(lambda x, y, v: triplet_loss(x, y, v, margin=0.5)[0])
    for seed in range(4):  # between them, some hinges are open and some closed
        features, identity, visible = triplet_batch(seed, dtype=dtype)
        _, _, expected = reference_triplet_loss(features, identity, shared(visible), 0.5)
        gradient = run(gradient_of, features, identity, visible)
        np.testing.assert_allclose(gradient, expected, **tolerance)
        assert (np.asarray(gradient)[~visible] == 0).all(), "exactly zero, not nearly"
        assert np.abs(expected[visible]).max() > 0.1


def test_the_reference_gradient_itself():
    # Central differences of the reference total, so that the two halves of the reference vouch for each other.
    features, identity, visible = triplet_batch(0, dtype=np.float64)
    _, _, gradient = reference_triplet_loss(features, identity, shared(visible), 0.5)
    step = 1e-6
    random = np.random.default_rng(0)
    for _ in range(20):
        place = tuple(random.integers(0, size) for size in features.shape)
        moved = [features.copy(), features.copy()]
        moved[0][place] += step
        moved[1][place] -= step
        up, down = (reference_triplet_loss(x, identity, shared(visible), 0.5)[0] for x in moved)
        np.testing.assert_allclose(gradient[place], (up - down) / (2 * step), atol=1e-7)


@jit_only
def test_triplet_loss_in_the_papers_setting(run):
    # 8 x 8 images, 6 regions of 256 channels, L2-normalised as the step does, keep-top crops.
    random = np.random.default_rng(8)
    identity = np.repeat(np.arange(8), 8).astype(np.int32)
    # A common part, as real features have: distances are then small against the norms.
    features = 0.5 + random.normal(size=(1, 6, 256)) + 0.2 * random.normal(size=(64, 6, 256))
    features = (features / np.linalg.norm(features, axis=-1, keepdims=True)).astype(np.float32)
    gammas = random.uniform(0.5, 1, 64)
    visible = np.stack([project_regions(draw_crop("top", g, (0, 0, 0)), RegionGrid(6), (24, 8))[1] for g in gammas])
    expected_total, expected_count, expected = reference_triplet_loss(features, identity, shared(visible), 1.0)
    (total, count), gradient = run(
        TRIPLET_AND_GRADIENT, features, identity, visible
    )  # the default margin is the paper's 1
    assert total.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(total, expected_total, **FLOAT32)
    assert float(count) == expected_count == 64
    # Directions are differences of neighbours over their short distance, hence a digit less.
    np.testing.assert_allclose(gradient, expected, atol=1e-4)


@jit_only
def test_triplet_by_hand(run):
    # One channel, one region: positions on a line. Anchor 0: positive at 3, negative at 1: 3 - 1 + 1 = 3.
    # Anchor 1 (at 3): positive at 0, negative at 1: 3 - 2 + 1 = 2. The negative has no positive but itself.
    features = np.array([0.0, 3.0, 1.0], np.float32)[:, None, None]
    identity = np.array([5, 5, 7], np.int32)
    total, count = run(triplet_loss, features, identity, np.ones((3, 1), bool))
    assert (float(total), float(count)) == (5.0, 2.0)
    # A second region that only 0 and 2 show: their distance becomes the mean over two regions, (1 + 4) / 2.
    features = np.concatenate([features, np.array([0.0, 100.0, 4.0], np.float32)[:, None, None]], axis=1)
    visible = np.array([[True, True], [True, False], [True, True]])
    total, count = run(triplet_loss, features, identity, visible)
    assert (float(total), float(count)) == ((3 - 2.5 + 1) + (3 - 2 + 1), 2.0)


@jit_only
def test_triplet_with_a_soft_hinge(run, precision):
    dtype, tolerance = precision
    loss = partial(triplet_loss, margin=0.5, hinge="soft")
    for seed in range(3):
        features, identity, visible = triplet_batch(seed, dtype=dtype)
        expected = reference_triplet_loss(features, identity, shared(visible), 0.5, soft=True)
        assert 0 < expected[1] < len(identity), "an anchor that is left out adds nothing, not log 2"
        (total, count), gradient = run(jax.value_and_grad(loss, has_aux=True), features, identity, visible)
        for found, right in zip((total, count, gradient), expected, strict=True):
            np.testing.assert_allclose(found, right, **tolerance)
        assert (np.asarray(gradient)[~visible] == 0).all()


@jit_only
@pytest.mark.parametrize("offset", [0, 1e1, 1e3])
def test_triplet_mines_the_same_pairs_at_a_large_common_offset(run, offset):
    random = np.random.default_rng(0)
    identity = np.repeat(np.arange(6), 4).astype(np.int32)
    visible = random.random((24, 3)) < 0.7
    # In 64ths, which float32 adds to the offset without rounding.
    features = np.rint(64 * random.normal(0, 0.5, (24, 3, 64))) / 64 + offset
    expected, count, _ = reference_triplet_loss(features, identity, shared(visible), 1.0)
    total, mined = run(triplet_loss, features.astype(np.float32), identity, visible)
    np.testing.assert_allclose(total, expected, **FLOAT32)
    assert float(mined) == count


def test_triplet_of_nan_is_nan(run):
    features, identity, visible = triplet_batch(10)
    image, region = np.argwhere(visible)[0]
    features[image, region, 0] = np.nan
    assert np.isnan(run(triplet_loss, features, identity, visible)[0])


@jit_only
def test_triplet_ignores_invisible_regions(run):
    features, identity, visible = triplet_batch(10)
    wild = np.where(visible[..., None], features, 1e15 * np.sign(features)).astype(np.float32)
    (total, count), gradient = run(TRIPLET_AND_GRADIENT, features, identity, visible)
    (wild_total, wild_count), wild_gradient = run(TRIPLET_AND_GRADIENT, wild, identity, visible)
    assert float(total) == float(wild_total) and float(count) == float(wild_count)
    np.testing.assert_array_equal(gradient, wild_gradient)
    assert (np.asarray(wild_gradient)[~visible] == 0).all()


def half(strategy):
    return project_regions(draw_crop(strategy, 0.5, (0, 0, 0)), RegionGrid(6), (24, 8))[1]


@jit_only
@pytest.mark.parametrize(
    ("identity", "crops", "anchors"),
    [
        # Bottom and top crops at gamma 0.5 share no region.
        ([0, 0, 1, 1], ["top", "bottom", "top", "bottom"], 0),  # negatives, no positives
        ([0, 0, 1, 1], ["top", "top", "bottom", "bottom"], 0),  # positives, no negatives
        ([0, 0, 0, 1, 1], ["top", "bottom", "none", "top", "bottom"], 3),  # the whole image joins identity 0
        ([0, 0, 1], ["top", "top", "none"], 2),
        ([0, 0, 0], ["top", "bottom", "none"], 0),  # a single identity
        ([0, 1, 2], ["none", "none", "none"], 0),  # nobody twice: an anchor is not its own positive
        ([0], ["none"], 0),
    ],
)
def test_triplet_anchors_without_a_comparable_pair(run, identity, crops, anchors):
    random = np.random.default_rng(12)
    visible = np.stack([half(crop) for crop in crops])
    # Images that show nothing fill up to five: they change nothing, and one shape compiles once.
    identity = identity + [0] * (5 - len(crops))
    visible = np.concatenate([visible, np.zeros((5 - len(crops), 6), bool)])
    features = random.normal(size=(len(identity), 6, 5)).astype(np.float32)
    identity = np.array(identity, np.int32)
    expected_total, expected_count, expected = reference_triplet_loss(features, identity, shared(visible), 1.0)
    (total, count), gradient = run(TRIPLET_AND_GRADIENT, features, identity, visible)
    assert float(count) == expected_count == anchors
    np.testing.assert_allclose(total, expected_total, **FLOAT32)
    np.testing.assert_allclose(gradient, expected, **FLOAT32)
    assert (np.asarray(gradient)[~visible] == 0).all()
    if not anchors:
        assert float(total) == 0 and not np.asarray(gradient).any()


def test_triplet_of_a_batch_that_shows_nothing(run):
    features, identity, _ = triplet_batch(13)
    nothing = np.zeros(features.shape[:2], bool)
    (total, count), gradient = run(TRIPLET_AND_GRADIENT, features, identity, nothing)
    assert float(total) == float(count) == 0 and not np.asarray(gradient).any()


@jit_only
@pytest.mark.parametrize("apart", [0.0, 1e-30, 1e-20, 1e-8, 1e-4])
@pytest.mark.parametrize("base", [0.0, 1.0])
def test_triplet_gradients_of_identical_features_are_finite(run, apart, base):
    random = np.random.default_rng(14)
    features = (base + apart * random.normal(size=(8, 3, 16))).astype(np.float32)
    identity = np.repeat(np.arange(4), 2).astype(np.int32)
    visible = np.ones((8, 3), bool)
    (total, count), gradient = run(TRIPLET_AND_GRADIENT, features, identity, visible)
    assert float(count) == 8
    np.testing.assert_allclose(total, 8.0, atol=1e-2)  # every distance is next to nothing, the margin is left
    # A distance never changes faster than its images move: an anchor pulls with 2 / P at most, and every
    # image may be the positive or negative of all eight.
    assert np.isfinite(gradient).all()
    assert np.linalg.norm(gradient, axis=-1).max() <= (2 + 8) / 3 + 1e-3


def test_triplet_gradient_beside_identical_features(run, precision):
    """An identity drawn twice as the same image, and one region that coincides: the rest is as it should be."""
    dtype, tolerance = precision
    features, identity, visible = triplet_batch(15, dtype=dtype)
    visible[:] = True
    features[1], identity[1] = features[0], identity[0]
    features[:, 2] = 1.0
    expected_total, _, expected = reference_triplet_loss(features, identity, shared(visible), 1.0)
    (total, _), gradient = run(TRIPLET_AND_GRADIENT, features, identity, visible)
    np.testing.assert_allclose(total, expected_total, **tolerance)

    def merged(x):  # whoever mines 0 may as well mine 1: only the sum of the two is determined
        return np.concatenate([x[0:1] + x[1:2], x[2:]])

    np.testing.assert_allclose(merged(np.asarray(gradient)), merged(expected), **tolerance)


@jit_only
def test_triplet_loss_of_repeated_images(run):
    """An identity with too few images repeats some, bit for bit: their distance is 0, not the root of a rounding."""
    random = np.random.default_rng(21)
    features = np.abs(random.normal(size=(4, 6, 512)))
    features = (features / np.linalg.norm(features, axis=-1, keepdims=True)).astype(np.float32).repeat(3, axis=0)
    identity, visible = np.repeat(np.arange(4), 3).astype(np.int32), np.ones((12, 6), bool)
    expected_total, _, _ = reference_triplet_loss(features, identity, shared(visible), 1.0)
    total, count = run(triplet_loss, features, identity, visible)
    np.testing.assert_allclose(total, expected_total, **FLOAT32)
    assert float(count) == 12
    # And a network that maps every image to one point is told so: the margin, exactly.
    total, count = run(triplet_loss, features[:1].repeat(12, axis=0), identity, visible)
    assert (float(total), float(count)) == (12.0, 12.0)


@jit_only
def test_triplet_loss_of_nearly_equal_features_keeps_pulling(run):
    """Collapse, a known failure of the triplet loss: the way out of it must not drown in cancellation."""
    random = np.random.default_rng(22)
    features = random.normal(size=(1, 3, 256)) + 1e-5 * random.normal(size=(2, 3, 256))
    features = (features / np.linalg.norm(features, axis=-1, keepdims=True)).astype(np.float32)
    features = np.concatenate([features, -features[:1]])  # one pair that all but coincides, one clear negative
    identity, visible = np.array([0, 0, 1], np.int32), np.ones((3, 3), bool)
    expected_total, _, expected = reference_triplet_loss(features, identity, shared(visible), 5.0)
    (total, _), gradient = run(TRIPLET_AND_GRADIENT, features, identity, visible, 5.0)
    np.testing.assert_allclose(total, expected_total, **FLOAT32)
    np.testing.assert_allclose(gradient, expected, atol=1e-4)


# --- the ablations' and the released recipe's pairs -----------------------------------------------------


@pytest.mark.parametrize("seed", range(2))
def test_triplet_over_all_regions(run, precision, seed):
    dtype, tolerance = precision
    features, identity, visible = triplet_batch(seed, dtype=dtype)
    everything = np.ones_like(visible)
    expected_total, expected_count, expected = reference_triplet_loss(features, identity, shared(everything), 1.0)
    loss = jax.value_and_grad(partial(triplet_loss, pairs="all"), has_aux=True)
    (total, count), gradient = run(loss, features, identity, visible)
    np.testing.assert_allclose(total, expected_total, **tolerance)
    np.testing.assert_allclose(gradient, expected, **tolerance)
    assert float(count) == expected_count == len(identity) - 1, "all but the identity of a single image"


@pytest.mark.parametrize("seed", range(2))
def test_triplet_with_soft_visibility(run, precision, seed):
    dtype, tolerance = precision
    features, identity, visible = triplet_batch(seed, dtype=dtype)  # the visible set plays no role
    random = np.random.default_rng(seed)
    scores = (random.uniform(0.01, 40, visible.shape) * (random.random(visible.shape) < 0.6)).astype(dtype)
    scores[0] = 0

    def weights(a, b):
        return scores[a].astype(np.float64) * scores[b]

    def loss(x, y, v, c):
        return triplet_loss(x, y, v, pairs="soft", visibility=c)

    expected_total, expected_count, expected = reference_triplet_loss(features, identity, weights, 1.0)
    (total, count), gradient = run(jax.value_and_grad(loss, has_aux=True), features, identity, visible, scores)
    np.testing.assert_allclose(total, expected_total, **tolerance)
    np.testing.assert_allclose(gradient, expected, **tolerance)
    assert float(count) == expected_count < len(identity) - 1, "some pairs have no weight at all"
    # The weights are normalised for each pair, so an image's scores matter up to a factor.
    scaled = scores * np.linspace(0.5, 2, len(scores), dtype=dtype)[:, None]
    np.testing.assert_allclose(run(loss, features, identity, visible, scaled)[0], expected_total, **tolerance)


@jit_only
def test_soft_visibility_is_not_trained_by_the_triplet_loss(run):
    # The released recipe: images do not come closer by hiding the regions in which they differ.
    features, identity, visible = triplet_batch(23)
    scores = np.random.default_rng(23).uniform(0.01, 40, visible.shape).astype(np.float32)
    gradient = run(jax.grad(lambda c: triplet_loss(features, identity, visible, pairs="soft", visibility=c)[0]), scores)
    assert (np.asarray(gradient) == 0).all()


def test_unknown_triplet_options_are_errors():
    features, identity, visible = triplet_batch(17)
    with pytest.raises(ValueError, match="hard"):
        triplet_loss(features, identity, visible, pairs="hard")
    with pytest.raises(ValueError, match="visibility"):
        triplet_loss(features, identity, visible, pairs="soft")
    with pytest.raises(ValueError, match="steep"):
        triplet_loss(features, identity, visible, hinge="steep")


# --- all of them --------------------------------------------------------------------------------------


def test_bfloat16_inputs_are_summed_in_float32(run):
    def rounded(x):
        return np.asarray(jnp.asarray(x, jnp.bfloat16))

    random = np.random.default_rng(18)
    cells, labels = rounded(random.normal(size=(8, 12, 4, 6))), random.integers(0, 6, (8, 12, 4)).astype(np.int32)
    total, count = run(region_loss, cells, labels)
    assert total.dtype == jnp.asarray(count).dtype == jnp.float32
    np.testing.assert_allclose(total, reference_region_loss(cells, labels)[0], **FLOAT32)

    logits, identity, visible = identity_batch(18, images=20)
    total, count = run(identity_loss, rounded(logits), identity, visible)
    assert total.dtype == count.dtype == jnp.float32
    np.testing.assert_allclose(total, reference_identity_loss(rounded(logits), identity, visible)[0], **FLOAT32)

    features, identity, visible = triplet_batch(18)
    total, count = run(triplet_loss, rounded(features), identity, visible)
    assert total.dtype == count.dtype == jnp.float32
    expected_total, expected_count, _ = reference_triplet_loss(rounded(features), identity, shared(visible), 1.0)
    np.testing.assert_allclose(total, expected_total, **FLOAT32)
    assert float(count) == expected_count
    _, gradient = run(TRIPLET_AND_GRADIENT, rounded(features), identity, visible)
    assert gradient.dtype == jnp.bfloat16 and np.isfinite(np.asarray(gradient, np.float32)).all()


def test_losses_over_two_devices_see_the_whole_batch():
    """Sharded over a mesh, the triplet loss still mines the global batch, and every total is the global one."""
    devices = jax.devices()[:2]
    if len(devices) < 2:
        pytest.skip("needs two devices; on CPU conftest.py makes two")
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,), devices=devices)

    def shard(*arrays):
        return [jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))) for x in arrays]

    logits, names, shown = identity_batch(20, images=8)
    total, count = optimized(identity_loss)(*shard(logits, names, shown))
    expected_total, expected_count = reference_identity_loss(logits, names, shown)
    np.testing.assert_allclose(total, expected_total, **FLOAT32)
    np.testing.assert_array_equal(count, expected_count)

    features, identity, visible = triplet_batch(20)
    identity = np.tile(np.arange(7), 2).astype(np.int32)  # every positive lies on the other device
    expected_total, expected_count, expected = reference_triplet_loss(features, identity, shared(visible), 1.0)
    (total, count), gradient = optimized(TRIPLET_AND_GRADIENT)(*shard(features, identity, visible))
    assert expected_count > 0
    np.testing.assert_allclose(total, expected_total, **FLOAT32)
    np.testing.assert_allclose(gradient, expected, **FLOAT32)
    assert float(count) == expected_count

    # The same under pmap: each device holds half, mines among all, and has its share of the totals.
    def share(x, y, v):
        # Differentiating the local total is enough: gathering sends each device the gradients of its images.
        (total, count), gradient = jax.value_and_grad(partial(triplet_loss, axis_name="data"), has_aux=True)(x, y, v)
        return jax.lax.psum(total, "data"), jax.lax.psum(count, "data"), gradient

    halves = [x.reshape(2, 7, *x.shape[1:]) for x in (features, identity, visible)]
    total, count, gradient = jax.pmap(share, axis_name="data", devices=devices)(*halves)
    np.testing.assert_allclose(total, [expected_total] * 2, **FLOAT32)
    np.testing.assert_array_equal(count, [expected_count] * 2)
    np.testing.assert_allclose(gradient.reshape(features.shape), expected, **FLOAT32)
