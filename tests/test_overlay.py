"""Region maps over pictures: the color of every cell, the cells that the picture covers, the contact sheet."""

import numpy as np
import pytest
from PIL import Image

from vpm_jax.overlay import covered, overlay, region_colors, region_maps

RANDOM = np.random.default_rng(0)
GREY = np.full((40, 20, 3), 128, np.uint8)


def sure(labels, regions):
    return np.eye(regions, dtype=np.float32)[labels]


@pytest.mark.parametrize("cells", [(4, 2), (8, 1)])
def test_a_cell_has_the_color_of_its_most_probable_region(cells):
    labels = RANDOM.integers(0, 5, cells)
    shown = overlay(GREY, sure(labels, 5), height=80)
    assert shown.shape == (80, 40, 3) and shown.dtype == np.uint8
    unsure = overlay(GREY, 0.1 + 0.5 * sure(labels, 5), height=80)
    for row, column in np.ndindex(cells):
        y, x = 80 // cells[0] * row + 2, 40 // cells[1] * column + 2
        np.testing.assert_allclose(shown[y, x], 0.35 * 128 + 0.65 * 255 * region_colors(5)[labels[row, column]], atol=1)
        assert (np.abs(unsure[y, x] - 128.0) <= np.abs(shown[y, x] - 128.0)).all()  # the surer, the stronger


@pytest.mark.parametrize(
    ("shape", "expected"), [((1, 90_000), (1, 1536)), ((50, 400), (192, 1536)), ((50, 100), (384, 768))]
)
def test_a_very_wide_image_takes_no_more_room(shape, expected):
    pixels = np.zeros((*shape, 3), np.uint8)
    assert overlay(pixels, sure(np.zeros((8, 4), int), 2), height=384).shape[:2] == expected


def test_columns_of_regions_share_a_hue():
    shown = overlay(np.full((60, 40, 3), 128, np.uint8), np.eye(6).reshape(3, 2, 6), columns=2)
    for region, color in enumerate(region_colors(6, 2)):
        pixel = shown[20 * (region // 2) + 5, 20 * (region % 2) + 5]
        np.testing.assert_allclose(pixel, 0.35 * 128 + 0.65 * 255 * color, atol=1)


def test_white_lines_are_where_regions_meet():
    shown = overlay(GREY, sure(np.array([[0, 0], [0, 1], [1, 1], [1, 1]]), 2))
    white = (shown == 255).all(axis=-1)
    assert white[20, :10].all() and white[10, 10:].all() and white[10:20, 10].all()
    assert white.sum() == 10 + 10 + 10 - 1  # two of them share a corner
    assert not (overlay(GREY, sure(np.zeros((4, 2), int), 2)) == 255).all(axis=-1).any()


def test_only_the_covered_cells_are_laid_over_the_picture():
    inner = RANDOM.dirichlet(np.ones(4), (6, 3)).astype(np.float32)
    canvas = np.zeros((8, 4, 4), np.float32)
    for top, left in ((0, 0), (2, 1), (1, 0)):
        canvas[:] = 0
        canvas[top : top + 6, left : left + 3] = inner
        np.testing.assert_array_equal(covered(canvas), inner)
        np.testing.assert_array_equal(overlay(GREY, canvas), overlay(GREY, inner))
    np.testing.assert_array_equal(covered(inner), inner)
    np.testing.assert_array_equal(overlay(GREY, np.zeros((8, 4, 4))), GREY)


@pytest.mark.parametrize(("count", "grid"), [(1, (3, 1)), (6, (4, 1)), (2, (14, 1)), (3, (3, 2))])
def test_region_maps(tmp_path, figures, count, grid):
    regions = grid[0] * grid[1]
    prob = RANDOM.dirichlet(np.ones(regions), (count, 8, 2))
    images = [np.full((32 - 4 * (i % 2), 16, 3), 128, np.uint8) for i in range(count)]  # cut from one size
    captions = [f"picture {i}" for i in range(count)]
    region_maps(tmp_path / "regions.png", images, prob, prob.sum((1, 2)), grid, captions)
    *bars, key = [axes for axes in figures[0].axes if axes.axison]
    assert len(bars) == count
    np.testing.assert_allclose([bar.get_width() for bar in bars[-1].patches], prob[-1].sum((0, 1)))
    assert [text.get_text() for text in bars[-1].texts] == [f"{score:.0f}" for score in prob[-1].sum((0, 1))]
    colors = np.array([bar.get_facecolor()[:3] for bar in bars[0].patches])
    assert len({tuple(color) for color in colors}) == regions
    np.testing.assert_allclose(key.images[0].get_array(), colors.reshape(*grid, 3))
    assert [text.get_text() for text in key.texts] == [str(i) for i in range(regions)]
    shown = [axes for axes in figures[0].axes if axes.images and axes is not key]
    assert {(axes.get_xlim(), axes.get_ylim()) for axes in shown} == {((0, 16), (32, 0))}  # to one scale
    for index, (plain, under) in enumerate(zip(shown[::2], shown[1::2], strict=True)):
        np.testing.assert_array_equal(plain.images[0].get_array(), images[index])
        expected = overlay(images[index], prob[index], grid[1], height=512)
        np.testing.assert_array_equal(under.images[0].get_array(), expected)
        assert plain.get_title(loc="left") == captions[index]
    with Image.open(tmp_path / "regions.png") as image:
        assert image.size[0] == 444 * min(count, 4) + 192
