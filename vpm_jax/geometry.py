"""Where an image lies on the network's input, and which feature map cells it covers (NumPy only).

`data.fit` selects how an image of any aspect ratio becomes an input of fixed size. "stretch" fills the input. "pad"
keeps the aspect ratio: the scale is the one at which a whole person (height / width = `aspect`) fills the input. The
rest of the input is padding, and its cells are excluded from Eqs. 1, 2, 3 and 5.

Boxes are (top, left, bottom, right) in pixels of the input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from ml_collections import ConfigDict

Box = tuple[int, int, int, int]

STEMS = {"7x7": (7, 2), "3x3": (3, 2), "4x4": (4, 4)}  # kernel and stride; "7x7" is followed by max pooling

# The position of a padded image: the fractions of the free height above it and of the free width to its left. "random"
# draws them in training and uses the center in evaluation.
PLACES = {"top": (0.0, 0.5), "center": (0.5, 0.5), "bottom": (1.0, 0.5), "random": (0.5, 0.5)}
KNOWN_PLACES = ("top", "center", "bottom")  # of an image whose visible part the user knows


def feature_map_shape(config: ConfigDict, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """The shape (h, w) of T for H x W images (default: config.data's)."""
    m, (height, width) = config.model, size or (config.data.height, config.data.width)
    stem_stride = STEMS[m.stem][1] * (2 if m.stem == "7x7" else 1)
    for stride in (stem_stride, *m.strides, m.last_stride):
        height, width = -(-height // stride), -(-width // stride)
    return height, width


def map_shape(config: ConfigDict, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """The shape of the region labels: that of T, or (h, 1) for a row locator."""
    h, w = feature_map_shape(config, size)
    return (h, 1) if config.model.locator == "row" else (h, w)


def fit_box(
    size: tuple[float, float],
    canvas: tuple[int, int],
    aspect: float,
    place: tuple[float, float] = PLACES["top"],
    stretch: float = 0.0,
) -> Box:
    """The box of an image on the input, its aspect ratio kept unless `stretch` is above 0.

    Args:
      size: the image's height and width, in any unit.
      canvas: (H, W) of the input.
      aspect: height / width of a whole person, who fills the canvas. A relatively wider image fills the width,
        a taller one the height.
      place: the fractions of the free height above the image and of the free width to its left.
      stretch: the share of the free height and width that the image is stretched by; 1 fills the canvas.

    Returns:
      A box of at least one pixel.
    """
    relative = size[0] / size[1] / aspect
    kept = canvas[0] * min(relative, 1.0), canvas[1] / max(relative, 1.0)
    height, width = (
        min(max(round(side + stretch * (whole - side)), 1), whole) for side, whole in zip(kept, canvas, strict=True)
    )
    top, left = round(place[0] * (canvas[0] - height)), round(place[1] * (canvas[1] - width))
    return top, left, top + height, left + width


def place_between(
    before: np.ndarray | Sequence[float], after: np.ndarray | Sequence[float], otherwise: tuple[float, float]
) -> np.ndarray:
    """The place [..., 2] of an image that shows only a part of a person: see `PLACES`.

    Args:
      before, after: how much is missing above and to the left, and below and to the right, in any unit, [..., 2].
      otherwise: the place along an axis on which nothing is missing.
    """
    before = np.asarray(before, float)
    missing = before + after
    return np.divide(before, missing, out=np.broadcast_to(otherwise, missing.shape).astype(float), where=missing > 0)


def covered_cells(start: int, stop: int, length: int, cells: int) -> tuple[int, int]:
    """Along one axis, the cells [first, last) half covered by pixels [start, stop) of `length`; at least 1."""
    first, last = (int(np.rint(edge / length * cells)) for edge in (start, stop))
    if first < last:
        return first, last
    middle = min(math.floor((start + stop) / 2 / length * cells), cells - 1)
    return middle, middle + 1


def covered(box: Box, canvas: tuple[int, int], shape: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """The cells of a feature map of `shape` (h, w) that a box on the canvas covers."""
    top, left, bottom, right = box
    valid = np.zeros(shape, bool)
    rows = slice(*covered_cells(top, bottom, canvas[0], shape[0]))
    valid[rows, slice(*covered_cells(left, right, canvas[1], shape[1]))] = True
    return valid
