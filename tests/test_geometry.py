"""Padded images: where they lie on the input, which cells they cover, and that only these cells count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from images import small_config, split_of
from tiny import Given

from vpm_jax import losses, models
from vpm_jax.data.pipeline import eval_batches, train_batches
from vpm_jax.data.sampling import Sampler
from vpm_jax.errors import UserError
from vpm_jax.geometry import PLACES, covered, covered_cells, fit_box
from vpm_jax.regions import RegionGrid, draw_crop, project_regions, visible_heights

PIXELS, SHARES = st.integers(1, 600), st.floats(0, 1)


@given(PIXELS, PIXELS, st.integers(1, 400), st.integers(1, 400), st.floats(0.2, 5), SHARES, SHARES)
def test_an_image_keeps_its_aspect_ratio(height, width, rows, columns, aspect, down, right):
    top, left, bottom, right_edge = fit_box((height, width), (rows, columns), aspect, (down, right))
    assert 0 <= top < bottom <= rows and 0 <= left < right_edge <= columns
    assert bottom - top == rows or right_edge - left == columns  # it fills one side
    # On a canvas that a person of `aspect` fills, each side is at most half a pixel off, or a single pixel.
    tall, wide = (bottom - top) / rows, (right_edge - left) / columns
    exact = height / width / aspect
    assert abs(tall - min(exact, 1)) <= max(0.5, 1 - exact * rows) / rows + 1e-9
    assert abs(wide - min(1 / exact, 1)) <= max(0.5, 1 - columns / exact) / columns + 1e-9


@given(PIXELS, st.data(), st.integers(1, 40))
def test_an_image_covers_at_least_one_cell(length, data, cells):
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start + 1, length))
    first, last = covered_cells(start, stop, length, cells)
    assert 0 <= first < last <= cells
    # A cell that lies inside the picture is covered; one that has less than half a cell of it is not.
    inside = [k for k in range(cells) if start * cells <= k * length and (k + 1) * length <= stop * cells]
    assert set(inside) <= set(range(first, last))
    if last - first > 1:
        for k in (first, last - 1):
            overlap = min(stop * cells, (k + 1) * length) - max(start * cells, k * length)
            assert 2 * overlap >= length * (1 - 1e-9)


def striped(grid, height=120, width=60):
    """Images [H, W, 3] whose red value is the number of the region, times ten."""
    rows, columns = np.arange(height) * grid.rows // height, np.arange(width) * grid.cols // width
    red = 10 * (rows[:, None] * grid.cols + columns)
    return np.stack([red, np.full_like(red, 200), np.zeros_like(red)], -1).astype(np.uint8)


@pytest.mark.parametrize("stretch", [0.0, 1.0])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("crop", ["top", "bottom", "left", "any", "none"])
def test_labels_match_the_pixels_of_covered_cells(place, crop, stretch):
    grid = RegionGrid(3, 2)
    config = small_config(
        threads=0, fit="pad", place=place, aspect=2.0, crop=crop, gamma=(0.3, 1.0), flip=0.0, resize="area"
    )
    config.data.update(height=120, width=60, stretch=stretch)
    config.model.update(grid=(3, 2), stem="4x4", strides=(1, 2, 1))
    config.loss.min_cells = 1
    split = split_of([striped(grid)] * 20)
    for batch in train_batches(config, split, 0, 3):
        b, h, w = batch["labels"].shape
        assert batch["valid"].shape == (b, h, w) == (8, 15, 8)
        for image, labels, valid, visible in zip(
            batch["image"], batch["labels"], batch["valid"], batch["visible"], strict=True
        ):
            assert valid.any()
            shown = image[..., 1] == 200  # the rest is the mean color
            assert shown.any()
            agree = total = 0
            for row, column in np.argwhere(valid):
                y = slice(row * 120 // h, (row + 1) * 120 // h)
                x = slice(column * 60 // w, (column + 1) * 60 // w)
                red = image[y, x, 0][shown[y, x]]
                values, counts = np.unique(np.rint(red / 10), return_counts=True)
                agree += labels[row, column] == (values[counts.argmax()] if len(values) else -1)
                total += 1
            assert agree >= 0.8 * total  # edges between regions and of the picture are rounded to cells
            assert set(np.flatnonzero(visible)) == set(np.unique(labels[valid]).tolist())


def test_a_padded_crop_is_as_large_as_in_the_whole_image():
    config = small_config(threads=0, fit="pad", aspect=2.0)
    config.data.update(height=96, width=48)
    picture = np.random.default_rng(0).integers(0, 256, (96, 48, 3), np.uint8)
    [batch] = eval_batches(config, split_of([picture] * 4), "top", 0.5)
    [whole] = eval_batches(config, split_of([picture] * 4))
    np.testing.assert_array_equal(whole["image"][0], picture)
    np.testing.assert_array_equal(batch["image"][0][:48], picture[:48])
    np.testing.assert_array_equal(batch["image"][0][48:], np.broadcast_to([124, 116, 104], (48, 48, 3)))
    assert batch["valid"][0].mean() == 0.5 and whole["valid"][0].all()
    assert not batch["valid"][batch["real"].sum() :].any()


def test_random_places_are_drawn_for_training_alone_and_change_nothing_else():
    config = small_config(threads=0, fit="pad", aspect=2.0)
    labels = split_of([np.zeros((4, 2, 3), np.uint8)] * 20).labels()
    top = Sampler(config, labels).plan(3)
    config.data.place = "random"
    drawn = Sampler(config, labels).plan(3)
    assert (top.places == (0, 0.5)).all() and len(np.unique(drawn.places)) == 16
    for field in ("indices", "flips", "shifts", "jitters", "erased"):
        np.testing.assert_array_equal(getattr(top, field), getattr(drawn, field))
    assert top.crops == drawn.crops


def test_stretching_of_padded_images_is_drawn_for_training_alone_and_changes_nothing_else():
    config = small_config(threads=0, fit="pad", aspect=2.0)
    labels = split_of([np.zeros((4, 2, 3), np.uint8)] * 20).labels()
    kept = Sampler(config, labels).plan(3)
    config.data.stretch = 0.5
    drawn = Sampler(config, labels).plan(3)
    assert not kept.stretches.any() and len(np.unique(drawn.stretches)) == 8 and drawn.stretches.max() < 0.5
    for field in ("indices", "flips", "shifts", "jitters", "places", "erased"):
        np.testing.assert_array_equal(getattr(kept, field), getattr(drawn, field))
    assert kept.crops == drawn.crops
    [batch] = eval_batches(config, split_of([np.zeros((48, 24, 3), np.uint8)] * 8), "top", 0.5)
    assert batch["valid"][batch["real"]].mean() == 0.5


@pytest.mark.parametrize("size", [(50, 50), (80, 20), (1, 400), (400, 1)])
def test_a_stretched_box_lies_between_the_padded_one_and_the_canvas(size):
    boxes = [fit_box(size, (128, 64), 2.0, (0.3, 0.6), stretch) for stretch in (0, 0.25, 0.5, 1)]
    heights, widths = np.array([(bottom - top, right - left) for top, left, bottom, right in boxes]).T
    assert boxes[0] == fit_box(size, (128, 64), 2.0, (0.3, 0.6)) and boxes[-1] == (0, 0, 128, 64)
    for sides, whole in ((heights, 128), (widths, 64)):
        np.testing.assert_allclose(sides[1:3], sides[0] + np.array([0.25, 0.5]) * (whole - sides[0]), atol=1)


def test_stages_have_their_own_input_size():
    config = small_config(threads=0)
    config.stage1.update(height=48, width=16)
    split = split_of(np.random.default_rng(0).integers(0, 256, (20, 40, 20, 3), np.uint8))
    sizes = [batch["image"].shape[1:3] for batch in train_batches(config, split, 8, 12)]
    assert sizes == [(48, 16), (48, 16), (24, 12), (24, 12)]
    [first] = train_batches(config, split, 9, 10)
    assert first["labels"].shape[1:] == models.map_shape(config, (48, 16))


def test_an_unknown_aspect_is_an_error():
    with pytest.raises(UserError, match=r"data\.aspect is 0"):
        next(train_batches(small_config(fit="pad"), split_of([np.zeros((4, 2, 3), np.uint8)] * 20), 0, 1))


# --- the network and the losses ------------------------------------------------------------------------


def network(locator="pixel", **fields):
    return models.VPM(
        Given(), (3, 1), 5, (0.0,) * 3, (1.0,) * 3, locator=locator, head_dim=0, head_dropout=0.0, **fields
    )


@pytest.mark.parametrize("locator", ["pixel", "row"])
def test_only_covered_cells_count(locator):
    random = np.random.default_rng(0)
    image = random.normal(size=(4, 6, 4, 8)).astype(np.float32)
    valid = np.stack(
        [covered(box, (60, 40), (6, 4)) for box in [(0, 0, 30, 40), (20, 0, 60, 40), (0, 10, 60, 30), (0, 0, 60, 40)]]
    )
    net = network(locator, global_head=True)
    variables = jax.jit(net.init)(jax.random.key(0), image)
    _, out = net.apply(variables, image, valid=valid)
    other = np.where(valid[..., None], image, random.normal(size=image.shape)).astype(np.float32)
    _, changed = net.apply(variables, other, valid=valid)
    for key in ("visibility", "region_features", "global_logits", "logits", "probability"):
        np.testing.assert_allclose(out[key], changed[key], rtol=1e-5, atol=1e-6)
    # Eqs. 1 to 3 of the cells alone, in NumPy.
    kernel = np.asarray(variables["params"]["locator_kernel"], np.float64)
    for i in range(4):
        cells = image[i].astype(np.float64)
        rows = valid[i].any(1)
        if locator == "row":
            logits = np.stack([cells[r][valid[i][r]].mean(0) for r in np.flatnonzero(rows)]) @ kernel
            logits += np.asarray(variables["params"]["locator_bias"])
            share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
            sums = np.stack([cells[r][valid[i][r]].sum(0) for r in np.flatnonzero(rows)])
            features = share.T @ sums / share.sum(0)[:, None]
        else:
            chosen = cells[valid[i]]
            share = np.exp(chosen @ kernel) / np.exp(chosen @ kernel).sum(-1, keepdims=True)
            features = share.T @ chosen / share.sum(0)[:, None]
        np.testing.assert_allclose(out["visibility"][i], share.sum(0), rtol=1e-4)
        np.testing.assert_allclose(out["region_features"][i], features, rtol=1e-4, atol=1e-5)
    # All cells covered is the network as it was.
    _, plain = net.apply(variables, image)
    _, whole = net.apply(variables, image, valid=np.ones_like(valid))
    np.testing.assert_allclose(plain["region_features"], whole["region_features"], rtol=1e-5, atol=1e-6)


def test_an_image_that_covers_no_cell_has_zero_features():
    image = np.random.default_rng(0).normal(size=(2, 4, 2, 8)).astype(np.float32)
    valid = np.stack([np.zeros((4, 2), bool), np.ones((4, 2), bool)])
    net = network(global_head=True)
    variables = jax.jit(net.init)(jax.random.key(0), image)
    _, out = net.apply(variables, image, valid=valid)
    assert not out["visibility"][0].any() and not out["region_features"][0].any()

    def loss(x):
        _, out = net.apply(variables, x, valid=valid)
        return sum(jnp.sum(out[key]) for key in ("visibility", "region_features", "logits", "global_logits"))

    gradient = jax.jit(jax.grad(loss))(image)
    assert np.isfinite(gradient).all() and not gradient[0].any() and gradient[1].any()


@pytest.mark.usefixtures("unchecked_shapes")
def test_region_loss_counts_covered_cells_only():
    random = np.random.default_rng(0)
    logits = random.normal(size=(3, 4, 2, 5)).astype(np.float32)
    labels, valid = random.integers(0, 5, (3, 4, 2)), random.random((3, 4, 2)) < 0.5
    total, count = losses.region_loss(logits, labels, valid=valid)
    chosen = logits[valid][:, None, None]
    expected, number = losses.region_loss(chosen, labels[valid][:, None, None])
    np.testing.assert_allclose([total, count], [expected, number], rtol=1e-6)
    spoiled = np.where(valid[..., None], logits, np.nan)
    gradient = jax.grad(lambda x: losses.region_loss(x, labels, valid=valid)[0])(spoiled)
    assert np.isfinite(gradient).all() and not gradient[~valid].any()
    with pytest.raises(ValueError, match=r"valid \(3, 4\)"):
        losses.region_loss(logits, labels, valid=valid[..., 0])


@pytest.mark.parametrize("crop, gamma", [("top", 0.5), ("bottom", 0.6), ("none", 1.0), ("top", 0.8)])
def test_visible_heights_of_padded_images(crop, gamma):
    kept = draw_crop(crop, gamma, (0.0, 0.0, 0.0))
    cells = round(12 * gamma)
    labels, _ = project_regions(kept, RegionGrid(4), (cells, 3))
    for first in (0, (12 - cells) // 2, 12 - cells):
        maps = np.zeros((1, 12, 3, 4), np.float32)
        maps[0, first : first + cells] = np.eye(4)[labels] * 0.94 + 0.015
        alone = visible_heights(maps[:, first : first + cells], RegionGrid(4))
        np.testing.assert_array_equal(visible_heights(maps, RegionGrid(4)), alone)
        assert np.abs(alone - (kept.top, kept.top + kept.height)).max() < 0.1


@pytest.mark.parametrize("size", [(1, 400), (400, 1), (3, 3)])
def test_extreme_aspect_ratios_cover_a_cell_and_show_a_region(size):
    config = small_config(threads=0, fit="pad", aspect=2.0)
    picture = np.full((*size, 3), 255, np.uint8)
    [batch] = eval_batches(config, split_of([picture] * 4))
    assert batch["valid"][0].any() and (batch["image"][0] == 255).any()
    for batch in train_batches(config, split_of([picture] * 20), 0, 3):
        assert batch["valid"].any((1, 2)).all() and batch["visible"].any(1).all()
