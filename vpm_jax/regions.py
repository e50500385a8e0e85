"""Region grids, crops, and the self-supervision of the paper's Section 3.3 (NumPy only).

A region grid divides the *holistic* image into rows x cols rectangles. A crop of that image is
resized to the network's input, and the regions are projected onto the feature map: every cell gets
the label of its region, and the regions that still have cells form the visible set.

All boxes are fractions of the holistic image, origin top-left; regions are numbered row-major from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Int32

CROPS = ("top", "bottom", "bilateral", "left", "right", "horizontal", "any", "none")
# The sides kept by the crops that reduce only the height.
HEIGHTS = {"top": ("top",), "bottom": ("bottom",), "bilateral": ("top", "bottom")}


@dataclass(frozen=True)
class RegionGrid:
    """rows x cols equal rectangles (the paper's p = m x n; its main setting is 6 x 1)."""

    rows: int
    cols: int = 1

    @property
    def count(self) -> int:
        return self.rows * self.cols


class Crop(NamedTuple):
    """The box cut from the holistic image, in fractions in [0, 1]."""

    top: float
    left: float
    height: float
    width: float

    @property
    def gamma(self) -> float:
        """The fraction of the image's area that is kept."""
        return self.height * self.width


WHOLE = Crop(0.0, 0.0, 1.0, 1.0)


def pixel_box(crop: Crop, height: int, width: int) -> tuple[int, int, int, int]:
    """The crop in whole pixels of a height x width image: (top, left, bottom, right), never empty."""
    top = min(int(np.rint(crop.top * height)), height - 1)
    left = min(int(np.rint(crop.left * width)), width - 1)
    bottom = max(int(np.rint((crop.top + crop.height) * height)), top + 1)
    right = max(int(np.rint((crop.left + crop.width) * width)), left + 1)
    return top, left, min(bottom, height), min(right, width)


def draw_crop(strategy: str, gamma: float, random: Sequence[float]) -> Crop:
    """Draws a crop of area ratio gamma from three uniform random numbers in [0, 1).

    `top`, `bottom`, `left` and `right` keep that side of the image. `bilateral` is top or bottom and
    `horizontal` is left or right, with equal probability. `any` is a box at a random position, its height
    log-uniform in [gamma, 1]. `none` keeps the whole image and ignores gamma.

    Raises:
      ValueError: for an unknown strategy, or gamma outside (0, 1].
    """
    if strategy not in CROPS:
        raise ValueError(f"crop strategy {strategy!r} is not one of {', '.join(CROPS)}")
    if strategy == "none":
        return WHOLE
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma is {gamma}, expected a kept area ratio in (0, 1]")
    if strategy == "bilateral":
        strategy = "top" if random[0] < 0.5 else "bottom"
    elif strategy == "horizontal":
        strategy = "left" if random[0] < 0.5 else "right"
    if strategy == "any":
        height = gamma ** random[0]
        width = gamma / height
        return Crop(random[1] * (1 - height), random[2] * (1 - width), height, width)
    return {
        "top": Crop(0.0, 0.0, gamma, 1.0),
        "bottom": Crop(1 - gamma, 0.0, gamma, 1.0),
        "left": Crop(0.0, 0.0, 1.0, gamma),
        "right": Crop(0.0, 1 - gamma, 1.0, gamma),
    }[strategy]


class GalleryCrop(NamedTuple):
    """A crop applied to every gallery image: the side that it keeps (as in `draw_crop`) and its area ratio."""

    side: str = "none"
    gamma: float = 1.0

    def __str__(self) -> str:
        return "whole" if self.gamma == 1 else f"{self.side} {self.gamma:g}"

    @property
    def crop(self) -> Crop:
        return draw_crop(self.side, self.gamma, (0.0, 0.0, 0.0))


UNCUT = GalleryCrop()


def gallery_crops(sides: Sequence[str], gammas: Sequence[float]) -> list[GalleryCrop]:
    """The whole image, then a crop for each gamma and side ("top", "bottom")."""
    return [UNCUT] + [GalleryCrop(side, gamma) for gamma in sorted(gammas) for side in sides]


def nearest_crop(heights: Float[np.ndarray, "n 2"], crops: Sequence[GalleryCrop]) -> Int[np.ndarray, " n"]:
    """The index of the gallery crop closest to each image's `visible_heights`; the first one on ties."""
    edges = np.array([(crop.crop.top, crop.crop.top + crop.crop.height) for crop in crops])
    return np.abs(heights[:, None] - edges).sum(-1).argmin(1)


def axis_labels(
    start: float, size: float, bins: int, cells: int, min_cells: int = 1, within: tuple[int, int] | None = None
) -> tuple[Int32[np.ndarray, " cells"], Bool[np.ndarray, " bins"]]:
    """Projects `bins` equal divisions of one image axis onto feature map cells.

    Args:
      start, size: the interval of the axis that the map shows, in fractions of the image. It may extend beyond [0, 1];
        cells outside the image get the nearest bin.
      bins: the number of divisions.
      cells: the number of cells.
      min_cells: as in `project_regions`.
      within: the cells [first, last) that the image covers (default: all). The other cells get the nearest bin.

    Returns:
      (labels, visible): the bin of each cell, and whether each bin is visible.
    """
    first, last = within or (0, cells)
    edges = np.rint((np.arange(bins + 1) / bins - start) / size * cells)  # np.rint rounds half to even
    edges = np.clip(edges, first, last).astype(np.int32)
    edges[0], edges[-1] = first, last  # guards against rounding errors in a very thin crop at the border
    labels = np.searchsorted(edges[1:], np.arange(cells).clip(first, last - 1), side="right").astype(np.int32)
    spans = np.diff(edges)
    return labels, (spans > 0) & (spans >= min(min_cells, last - first))


def project_regions(
    crop: Crop, grid: RegionGrid, feature_shape: tuple[int, int], min_cells: int = 1
) -> tuple[Int32[np.ndarray, "h w"], Bool[np.ndarray, " p"]]:
    """ROI projection of the regions onto the feature map of a cropped, resized image (Section 3.3).

    Args:
      crop: the box that was cut, in fractions of the holistic image.
      grid: the regions of the holistic image.
      feature_shape: (h, w) of the feature map; (h, 1) for a row locator.
      min_cells: a region is visible if it spans at least this many cells along each axis (or the whole
        axis, if the map is smaller), and at least one.

    Returns:
      (labels, visible): the region of every cell, and the visible set.

    Raises:
      ValueError: if the crop is empty or extends outside the image, or the map is empty.
    """
    crop, rows, cols, (h, w) = Crop(*crop), grid.rows, grid.cols, feature_shape
    if not (
        crop.height > 0
        and crop.width > 0
        and crop.top >= -1e-6  # boxes may have been float32
        and crop.left >= -1e-6
        and crop.top + crop.height <= 1 + 1e-6
        and crop.left + crop.width <= 1 + 1e-6
    ):
        raise ValueError(f"{crop} is not a box inside the image, expected fractions in [0, 1]")
    if min(rows, cols, h, w) < 1:
        raise ValueError(f"grid {rows} x {cols} on a {h} x {w} feature map, expected at least 1 of each")
    row_labels, row_visible = axis_labels(crop.top, crop.height, rows, h, min_cells)
    col_labels, col_visible = axis_labels(crop.left, crop.width, cols, w, min_cells)
    labels = row_labels[:, None] * cols + col_labels[None, :]
    return labels, (row_visible[:, None] & col_visible[None, :]).reshape(-1)


def visible_heights(region_maps: Float[np.ndarray, "n h w p"], grid: RegionGrid) -> Float[np.ndarray, "n 2"]:
    """Estimates the vertical extent of the person that each image shows, from its region map.

    The estimate is the crop whose projected labels (`axis_labels`, as in training) have the highest mean
    log-probability. If several crops give the same labels, the largest one wins. Widths are not estimated.

    Args:
      region_maps: Eq. 1; w is 1 for a row locator. 0 in the cells that a padded image does not cover.
      grid: the regions, grid.count = P.

    Returns:
      float64 top and bottom in fractions of the whole person's height: (0, 1) for a whole person.
    """
    count, height, width, _ = region_maps.shape
    maps = np.asarray(region_maps, np.float64)
    valid = maps.sum(-1) > 0.5  # probabilities sum to 1 in covered cells, to 0 in padding
    rows = np.log(np.maximum(maps.reshape(count, height, width, grid.rows, grid.cols).sum(-1), 1e-6))
    # The mean log probability over a row's cells: one confidently wrong cell must not dominate.
    log = (rows * valid[..., None]).sum(2) / np.maximum(valid.sum(2), 1)[..., None]
    covered = valid.any(2)
    heights = np.empty((count, 2))
    spans = np.stack([covered.argmax(1), covered.sum(1)], 1)
    for first, cells in np.unique(spans, axis=0):  # a single span unless images are padded
        chosen = (spans == (first, cells)).all(1)
        if not cells:
            heights[chosen] = (0.0, 1.0)
            continue
        edges, labels = _candidates(int(cells), grid.rows)
        votes = np.zeros((int(chosen.sum()), len(labels)))
        for row in range(cells):
            votes += log[chosen, first + row][:, labels[:, row]]
        heights[chosen] = edges[votes.argmax(1)]
    return heights


@lru_cache(maxsize=64)  # padded images of every height
def _candidates(cells: int, bins: int) -> tuple[Float[np.ndarray, "k 2"], Int32[np.ndarray, "k cells"]]:
    """Every distinct labeling of a column of cells, with the largest crop (top, bottom) that produces it."""
    marks = np.arange(61) / 60  # includes halves to sixths, and tenths, of a person
    crops = [(top, bottom) for top in marks for bottom in marks if bottom - top > 0.099]
    crops.sort(key=lambda crop: (round(crop[1] - crop[0], 6), -crop[0]))
    kept = {axis_labels(top, bottom - top, bins, cells)[0].tobytes(): (top, bottom) for top, bottom in crops}
    return np.array(list(kept.values())), np.stack([np.frombuffer(key, np.int32) for key in kept])
