"""Regions against exact rational arithmetic, and the properties Section 3.3 of the paper asks for."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vpm_jax.regions import CROPS, WHOLE, Crop, RegionGrid, draw_crop, pixel_box, project_regions

# Below this distance from a tie (x.5 cells), float64 and exact arithmetic may round an edge to either side.
NEAR_TIE = Fraction(1, 10**9)


def exact_edges(start, size, parts, cells):
    """Edges of the parts in cells, before rounding: exact rationals of the numbers as given."""
    start, size = Fraction(start), Fraction(size)
    return [(Fraction(k, parts) - start) / size * cells for k in range(parts + 1)]


def is_near_tie(edges):
    return any(abs(abs(edge - int(edge)) - Fraction(1, 2)) < NEAR_TIE for edge in edges)


def exact_axis(start, size, parts, cells):
    """(label of each cell, number of cells of each part) along one axis, cell by cell."""
    # Python's round() of a Fraction is exact and rounds half to even.
    edges = [min(max(round(edge), 0), cells) for edge in exact_edges(start, size, parts, cells)]
    labels = []
    for cell in range(cells):
        owners = [part for part in range(parts) if edges[part] <= cell < edges[part + 1]]
        assert len(owners) == 1, "the reference itself must give each cell one region"
        labels += owners
    return labels, [edges[part + 1] - edges[part] for part in range(parts)]


def exact_projection(crop, grid, feature_shape, min_cells):
    """What project_regions must return, as plain lists."""
    rows, cols, (h, w) = grid.rows, grid.cols, feature_shape
    row_labels, row_cells = exact_axis(crop.top, crop.height, rows, h)
    col_labels, col_cells = exact_axis(crop.left, crop.width, cols, w)
    labels = [[row * cols + col for col in col_labels] for row in row_labels]

    def shows(spanned, cells):
        return spanned > 0 and spanned >= min(min_cells, cells)

    visible = [shows(row_cells[r], h) and shows(col_cells[c], w) for r in range(rows) for c in range(cols)]
    return labels, visible


def check_exact(crop, grid, feature_shape, min_cells):
    labels, visible = project_regions(crop, grid, feature_shape, min_cells)
    expected_labels, expected_visible = exact_projection(crop, grid, feature_shape, min_cells)
    assert labels.dtype == np.int32 and labels.shape == feature_shape
    assert visible.dtype == np.bool_ and visible.shape == (grid.count,)
    assert labels.tolist() == expected_labels
    assert visible.tolist() == expected_visible


sizes = st.one_of(st.integers(1, 8), st.sampled_from([12, 16, 24, 32, 48]))
grids = st.builds(RegionGrid, st.integers(1, 8), st.integers(1, 4))


@st.composite
def crops(draw):
    """Boxes inside the image: arbitrary floats, and the decimals and binary fractions that people type."""
    length = st.one_of(
        st.floats(0.05, 1.0),
        st.integers(1, 20).map(lambda k: k / 20),
        st.integers(1, 16).map(lambda k: k / 16),
    )
    height, width = draw(length), draw(length)
    place = st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.5, 1.0]))
    return Crop(draw(place) * (1 - height), draw(place) * (1 - width), height, width)


# --- the projection ---------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(crops(), grids, st.tuples(sizes, sizes), st.integers(0, 4))
def test_projection_equals_exact_arithmetic(crop, grid, feature_shape, min_cells):
    assume(not is_near_tie(exact_edges(crop.top, crop.height, grid.rows, feature_shape[0])))
    assume(not is_near_tie(exact_edges(crop.left, crop.width, grid.cols, feature_shape[1])))
    check_exact(crop, grid, feature_shape, min_cells)


@pytest.mark.parametrize("parts", [1, 2, 4, 8])
@pytest.mark.parametrize("cells", [1, 2, 3, 5, 6, 7, 9, 12, 15, 24])
def test_ties_round_half_to_even(parts, cells):
    # Every number here is a binary fraction, so the ties are real ones and float64 is exact.
    ties = 0
    for size in (1.0, 0.5):
        for start in (0.0, 0.125, 0.25, 0.5):
            if start + size > 1:
                continue
            ties += is_near_tie(exact_edges(start, size, parts, cells))
            check_exact(Crop(start, 0.0, size, 1.0), RegionGrid(parts), (cells, 1), 1)
            check_exact(Crop(0.0, start, 1.0, size), RegionGrid(1, parts), (1, cells), 1)
    if parts == 2 and cells == 5:
        assert ties, "this case is meant to hold a tie: 5 cells in 2 parts"


def test_tie_by_hand():
    # 2.5 rounds to 2, 1.5 to 2, 0.5 to 0.
    assert project_regions(WHOLE, RegionGrid(2), (5, 1))[0][:, 0].tolist() == [0, 0, 1, 1, 1]
    assert project_regions(WHOLE, RegionGrid(2), (3, 1))[0][:, 0].tolist() == [0, 0, 1]
    labels, visible = project_regions(WHOLE, RegionGrid(2), (1, 1))
    assert labels.tolist() == [[1]] and visible.tolist() == [False, True]


@settings(max_examples=200, deadline=None)
@given(crops(), grids, st.tuples(sizes, sizes), st.integers(1, 3))
def test_projection_properties(crop, grid, feature_shape, min_cells):
    """What holds of any implementation, ties included."""
    h, w = feature_shape
    labels, visible = project_regions(crop, grid, feature_shape, min_cells)
    assert labels.min() >= 0 and labels.max() < grid.count
    rows, cols = labels // grid.cols, labels % grid.cols
    assert (rows == rows[:, :1]).all() and (cols == cols[:1]).all(), "regions are rectangles"
    assert (np.diff(rows[:, 0]) >= 0).all() and (np.diff(cols[0]) >= 0).all()
    for region in range(grid.count):
        cells = labels == region
        tall, wide = cells.any(axis=1).sum(), cells.any(axis=0).sum()
        enough = cells.any() and tall >= min(min_cells, h) and wide >= min(min_cells, w)
        assert visible[region] == enough, (region, tall, wide)


@settings(max_examples=100, deadline=None)
@given(grids, st.integers(0, 40), st.integers(0, 40))
def test_whole_image_shows_every_region(grid, more_rows, more_cols):
    _, visible = project_regions(WHOLE, grid, (grid.rows + more_rows, grid.cols + more_cols), min_cells=1)
    assert visible.all()


@pytest.mark.parametrize("width", [8, 1])
@pytest.mark.parametrize(
    ("strategy", "shown"),
    [("top", [0, 1, 2]), ("bottom", [3, 4, 5])],
)
def test_half_crop_of_six_rows(strategy, shown, width):
    # The paper's setting: 6 x 1 regions, T 24 rows; half of the image leaves three regions of 8 rows.
    labels, visible = project_regions(draw_crop(strategy, 0.5, (0, 0, 0)), RegionGrid(6), (24, width))
    assert labels[:, 0].tolist() == [region for region in shown for _ in range(8)]
    assert (labels == labels[:, :1]).all()
    assert np.flatnonzero(visible).tolist() == shown


@pytest.mark.parametrize(("strategy", "shown"), [("left", [0, 2, 4]), ("right", [1, 3, 5])])
def test_half_crop_sideways(strategy, shown):
    # Regions are row-major, left and right are the image's.
    labels, visible = project_regions(draw_crop(strategy, 0.5, (0, 0, 0)), RegionGrid(3, 2), (24, 8))
    assert (labels == np.repeat(shown, 8)[:, None]).all()
    assert np.flatnonzero(visible).tolist() == shown
    # Rows do not care about the sides.
    labels, visible = project_regions(draw_crop(strategy, 0.5, (0, 0, 0)), RegionGrid(6), (24, 8))
    assert labels[:, 0].tolist() == [region for region in range(6) for _ in range(4)] and visible.all()


def test_whole_image_in_the_papers_setting():
    labels, visible = project_regions(WHOLE, RegionGrid(6), (24, 8))
    assert labels.tolist() == [[row // 4] * 8 for row in range(24)]
    assert visible.all()


def test_min_cells_hides_a_region_on_one_edge_row():
    # 0.52 of the image on 24 rows: region 3 begins at row 0.5 / 0.52 * 24 = 23.08, so one row is left of it.
    crop = Crop(0.0, 0.0, 0.52, 1.0)
    labels, visible = project_regions(crop, RegionGrid(6), (24, 8), min_cells=1)
    assert labels[:, 0].tolist() == [0] * 8 + [1] * 7 + [2] * 8 + [3]
    assert visible.tolist() == [True] * 4 + [False] * 2
    hidden_labels, hidden = project_regions(crop, RegionGrid(6), (24, 8), min_cells=2)
    assert np.array_equal(hidden_labels, labels), "cells keep their label, whether it counts as visible or not"
    assert hidden.tolist() == [True] * 3 + [False] * 3


def test_min_cells_never_asks_for_more_than_the_map_has():
    # A row locator's map is one cell wide: two cells cannot be asked of it.
    _, visible = project_regions(Crop(0.0, 0.0, 0.52, 1.0), RegionGrid(6), (24, 1), min_cells=2)
    assert visible.tolist() == [True] * 3 + [False] * 3
    assert project_regions(WHOLE, RegionGrid(1), (1, 1), min_cells=5)[1].tolist() == [True]


def test_more_regions_than_cells_leaves_some_invisible():
    labels, visible = project_regions(WHOLE, RegionGrid(8), (4, 1), min_cells=0)
    assert sorted(set(labels[:, 0].tolist())) == np.flatnonzero(visible).tolist()
    assert visible.sum() == 4, "min_cells=0 still asks for a cell"


@pytest.mark.parametrize("thin", [1e-3, 1e-6, 1e-10])
def test_very_thin_crop_at_the_border(thin):
    # Rounding may push start + size past 1 by a little, which is most of so thin a crop.
    for start, region in ((0.0, 0), (1.0 - thin, 5), (1.0 - thin + min(thin, 5e-10), 5)):
        labels, visible = project_regions(Crop(start, 0.0, thin, 1.0), RegionGrid(6), (24, 8))
        assert (labels == region).all() and np.flatnonzero(visible).tolist() == [region]


@pytest.mark.parametrize(
    "crop",
    [
        Crop(0.0, 0.0, 0.0, 1.0),
        Crop(0.0, 0.0, 1.0, 0.0),
        Crop(0.0, 0.0, -0.5, 1.0),
        Crop(-0.1, 0.0, 0.5, 1.0),
        Crop(0.0, -0.1, 1.0, 0.5),
        Crop(0.6, 0.0, 0.5, 1.0),
        Crop(0.0, 0.6, 1.0, 0.5),
        Crop(0.0, 0.0, 2.0, 1.0),
        *(WHOLE._replace(**{field: float("nan")}) for field in Crop._fields),
    ],
)
def test_crop_outside_the_image_is_an_error(crop):
    with pytest.raises(ValueError, match=r"Crop\(.*inside"):
        project_regions(crop, RegionGrid(6), (24, 8))


def test_boxes_that_were_float32_pass():
    for top in np.linspace(0, 0.99, 100).astype(np.float32):
        crop = Crop(float(top), 0.0, float(np.float32(1) - top) * (1 + 1e-7), 1.0)
        assert project_regions(crop, RegionGrid(6), (24, 8))[1][-1]


@pytest.mark.parametrize(
    ("grid", "feature_shape"),
    [(RegionGrid(0), (24, 8)), (RegionGrid(6, 0), (24, 8)), (RegionGrid(6), (0, 8)), (RegionGrid(6), (24, 0))],
)
def test_empty_grid_or_map_is_an_error(grid, feature_shape):
    with pytest.raises(ValueError, match="at least 1"):
        project_regions(WHOLE, grid, feature_shape)


# --- crops ------------------------------------------------------------------------------------------


def three(generator: random.Random) -> tuple[float, float, float]:
    return generator.random(), generator.random(), generator.random()


gammas = st.one_of(st.floats(0.05, 1.0), st.sampled_from([0.5, 0.6, 0.7, 0.8, 0.9, 1.0]))
unit = st.floats(0.0, 1.0, exclude_max=True)


@settings(max_examples=100, deadline=None)
@given(gammas, st.tuples(unit, unit, unit))
def test_every_crop_keeps_gamma_of_the_area_inside_the_image(gamma, numbers):
    for strategy in CROPS:
        crop = draw_crop(strategy, gamma, numbers)
        area = 1.0 if strategy == "none" else gamma
        assert abs(crop.height * crop.width - area) < 1e-12
        assert abs(crop.gamma - area) < 1e-12
        assert min(crop.height, crop.width) > 0
        assert min(crop.top, crop.left) > -1e-12
        assert max(crop.top + crop.height, crop.left + crop.width) < 1 + 1e-12
        project_regions(crop, RegionGrid(6), (24, 8))  # and the projection accepts it, rounding error and all


@pytest.mark.parametrize(
    ("strategy", "box"),
    [
        ("top", (0.0, 0.0, 0.7, 1.0)),
        ("bottom", (0.3, 0.0, 0.7, 1.0)),
        ("left", (0.0, 0.0, 1.0, 0.7)),
        ("right", (0.0, 0.3, 1.0, 0.7)),
        ("none", (0.0, 0.0, 1.0, 1.0)),
    ],
)
def test_named_crops_keep_their_side(strategy, box):
    for numbers in ((0.0, 0.0, 0.0), (0.99, 0.99, 0.99)):
        assert draw_crop(strategy, 0.7, numbers) == pytest.approx(box, abs=1e-12)


@pytest.mark.parametrize(("strategy", "sides"), [("bilateral", ("top", "bottom")), ("horizontal", ("left", "right"))])
def test_two_sided_crops_take_each_side_half_the_time(strategy, sides):
    generator = random.Random(0)
    draws = [draw_crop(strategy, 0.6, three(generator)) for _ in range(2000)]
    of = [draw_crop(side, 0.6, (0, 0, 0)) for side in sides]
    assert set(draws) == set(of)
    # Four standard deviations of a fair coin over 2000 throws.
    assert abs(draws.count(of[0]) - 1000) < 4 * np.sqrt(2000 / 4)


def test_any_crop_reaches_every_side_and_shape():
    generator = random.Random(0)
    boxes = np.array([draw_crop("any", 0.5, three(generator)) for _ in range(2000)])
    top, left, height, width = boxes.T
    assert height.min() < 0.52 and height.max() > 0.98, "from half as high to the full height"
    assert width.min() < 0.52 and width.max() > 0.98
    assert (top < 0.02).any() and (top + height > 0.98).any()
    assert (left < 0.02).any() and (left + width > 0.98).any()
    assert len({round(value, 6) for value in top}) > 1000, "the place varies"


def test_unknown_strategy_and_gamma_are_errors():
    with pytest.raises(ValueError, match=r"middle.*top"):
        draw_crop("middle", 0.5, (0, 0, 0))
    for gamma in (0.0, -0.5, 1.01, float("nan")):
        for strategy in set(CROPS) - {"none"}:
            with pytest.raises(ValueError, match="gamma"):
                draw_crop(strategy, gamma, (0, 0, 0))
    assert draw_crop("none", 7.0, (0, 0, 0)) == WHOLE


# --- pixels -----------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(crops(), st.integers(1, 400), st.integers(1, 200))
def test_pixel_box_is_the_crop_to_half_a_pixel(crop, height, width):
    top, left, bottom, right = pixel_box(crop, height, width)
    assert all(isinstance(edge, int) for edge in (top, left, bottom, right))
    assert 0 <= top < bottom <= height and 0 <= left < right <= width
    # Within half a pixel, unless the crop is too thin to have a whole one.
    if crop.height * height >= 1:
        assert abs(top - crop.top * height) <= 0.5 + 1e-9
        assert abs(bottom - (crop.top + crop.height) * height) <= 0.5 + 1e-9
    if crop.width * width >= 1:
        assert abs(left - crop.left * width) <= 0.5 + 1e-9
        assert abs(right - (crop.left + crop.width) * width) <= 0.5 + 1e-9


def test_pixel_box_by_hand():
    assert pixel_box(WHOLE, 128, 64) == (0, 0, 128, 64)
    assert pixel_box(draw_crop("top", 0.5, (0, 0, 0)), 128, 64) == (0, 0, 64, 64)
    assert pixel_box(draw_crop("bottom", 0.5, (0, 0, 0)), 128, 64) == (64, 0, 128, 64)
    assert pixel_box(draw_crop("left", 0.25, (0, 0, 0)), 128, 64) == (0, 0, 128, 16)
    assert pixel_box(draw_crop("right", 0.25, (0, 0, 0)), 128, 64) == (0, 48, 128, 64)
    # Never empty, not even where the crop is thinner than a pixel or sits on the far edge.
    assert pixel_box(Crop(0.999, 0.999, 0.001, 0.001), 10, 10) == (9, 9, 10, 10)
    assert pixel_box(Crop(0.5, 0.0, 0.001, 1.0), 10, 10) == (5, 0, 6, 10)
