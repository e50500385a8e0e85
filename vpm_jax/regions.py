"""Region grids, crops, and the self-supervision of the paper's Section 3.3 (NumPy only).

A region grid divides the *holistic* image into rows x cols rectangles. A crop of that image is
resized to the network's input, and the regions are projected onto the feature map: every cell gets
the label of the region it belongs to, and the regions that are left form the visible set.

All boxes are fractions of the holistic image, origin top-left; regions are numbered row-major from 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

CROPS = ("top", "bottom", "bilateral", "left", "right", "horizontal", "any", "none")
# The parts that those of them keep which cut heights alone.
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
    """The box cut from the holistic image, as fractions in [0, 1]."""

    top: float
    left: float
    height: float
    width: float

    @property
    def gamma(self) -> float:
        """The kept share of the image's area."""
        return self.height * self.width


WHOLE = Crop(0.0, 0.0, 1.0, 1.0)


def pixel_box(crop: Crop, height: int, width: int) -> tuple[int, int, int, int]:
    """The crop in whole pixels of a height x width image: (top, left, bottom, right), never empty."""
    top = min(int(np.rint(crop.top * height)), height - 1)
    left = min(int(np.rint(crop.left * width)), width - 1)
    bottom = max(int(np.rint((crop.top + crop.height) * height)), top + 1)
    right = max(int(np.rint((crop.left + crop.width) * width)), left + 1)
    return top, left, min(bottom, height), min(right, width)


def draw_crop(strategy: str, gamma: float, random: tuple[float, float, float]) -> Crop:
    """The crop of area ratio gamma that `strategy` cuts, from three uniform numbers in [0, 1).

    `top` keeps the top of the image, `bottom` its bottom, `left` and `right` likewise; `bilateral` is
    top or bottom and `horizontal` left or right, half each; `any` is a box anywhere, its height
    log-uniform between gamma and 1; `none` keeps everything (gamma is ignored).

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


class Part(NamedTuple):
    """What is kept of a picture that a gallery is described by: `side` as in `draw_crop`, and gamma."""

    side: str = "none"
    gamma: float = 1.0

    def __str__(self) -> str:
        return "whole" if self.gamma == 1 else f"{self.side} {self.gamma:g}"

    @property
    def crop(self) -> Crop:
        return draw_crop(self.side, self.gamma, (0.0, 0.0, 0.0))


UNCUT = Part()


def gallery_parts(sides: Sequence[str], gammas: Sequence[float]) -> list[Part]:
    """The whole picture, and its parts of every gamma on these sides ("top", "bottom")."""
    return [UNCUT] + [Part(side, gamma) for gamma in sorted(gammas) for side in sides]


def nearest_part(heights: np.ndarray, parts: Sequence[Part]) -> np.ndarray:
    """The part most like what each picture shows, of `visible_heights` [N, 2]: int [N], the first of equals."""
    edges = np.array([(part.crop.top, part.crop.top + part.crop.height) for part in parts])
    return np.abs(heights[:, None] - edges).sum(-1).argmin(1)


def axis_labels(
    start: float, size: float, parts: int, cells: int, min_cells: int = 1, within: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Along one axis: the part each cell belongs to [cells], and whether each part is visible [parts].

    The box [start, start + size] may reach beyond the image, [0, 1]: cells there belong to the nearest part. Where the
    picture covers the cells [first, last) `within` the map alone, the others belong to the nearest part too.
    """
    first, last = within or (0, cells)
    edges = np.rint((np.arange(parts + 1) / parts - start) / size * cells)  # np.rint rounds half to even
    edges = np.clip(edges, first, last).astype(np.int32)
    edges[0], edges[-1] = first, last  # so already, but for rounding errors in a very thin crop at the border
    labels = np.searchsorted(edges[1:], np.arange(cells).clip(first, last - 1), side="right").astype(np.int32)
    spans = np.diff(edges)
    return labels, (spans > 0) & (spans >= min(min_cells, last - first))


def project_regions(
    crop: Crop, grid: RegionGrid, feature_shape: tuple[int, int], min_cells: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """ROI projection of the regions onto the feature map of a cropped, resized image (Section 3.3).

    Args:
      crop: the box that was cut, as fractions of the holistic image.
      grid: the regions defined on the holistic image.
      feature_shape: (h, w) of the feature map; a row locator uses (h, 1).
      min_cells: a region is visible when it spans at least this many cells along each axis (or the
        whole axis, where the map is smaller), and never when it spans none.

    Returns:
      labels: int32 [h, w], the region of every cell.
      visible: bool [P], the visible set.

    Raises:
      ValueError: for a crop outside the image, an empty one, or an empty map.
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


def visible_heights(region_maps: np.ndarray, grid: RegionGrid) -> np.ndarray:
    """Between which heights of a whole person a picture lies: the crop whose projected labels are likeliest.

    Every cell votes with the log-probability of the label it would have (`axis_labels`: the projection that the locator
    was trained with). Of crops with the same labels the largest counts. Only heights are told, not widths.

    Args:
      region_maps: Eq. 1, [N, h, w, P]; w is 1 for a row locator. All 0 in cells that a padded picture does not cover.
      grid: the regions, grid.count = P.

    Returns:
      float64 [N, 2]: top and bottom as fractions of the whole picture's height, (0, 1) for a whole person.
    """
    count, height, width, _ = region_maps.shape
    maps = np.asarray(region_maps, np.float64)
    valid = maps.sum(-1) > 0.5  # a cell that the picture does not cover has no probabilities
    rows = np.log(np.maximum(maps.reshape(count, height, width, grid.rows, grid.cols).sum(-1), 1e-6))
    # The mean log probability over a row's cells: one confidently wrong cell must not dominate.
    log = (rows * valid[..., None]).sum(2) / np.maximum(valid.sum(2), 1)[..., None]
    covered = valid.any(2)
    heights = np.empty((count, 2))
    spans = np.stack([covered.argmax(1), covered.sum(1)], 1)
    for first, cells in np.unique(spans, axis=0):  # one span, but for padded pictures
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


@lru_cache(maxsize=8)
def _candidates(cells: int, parts: int) -> tuple[np.ndarray, np.ndarray]:
    """Every way to label a column of cells, and the largest crop that does: (float64 [K, 2], int32 [K, cells])."""
    marks = np.arange(61) / 60  # halves to sixths of a person, and tenths, are among them
    crops = [(top, bottom) for top in marks for bottom in marks if bottom - top > 0.099]
    crops.sort(key=lambda crop: (round(crop[1] - crop[0], 6), -crop[0]))
    kept = {axis_labels(top, bottom - top, parts, cells)[0].tobytes(): (top, bottom) for top, bottom in crops}
    return np.array(list(kept.values())), np.stack([np.frombuffer(key, np.int32) for key in kept])
