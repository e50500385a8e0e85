"""Fitting images to the network's input, by the keys fit, place, aspect, resize and mean of `config.data`."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from vpm_jax.data.decode import resize
from vpm_jax.errors import UserError
from vpm_jax.geometry import KNOWN_PLACES, PLACES, Box, fit_box

# The position of a padded image: one of KNOWN_PLACES, or the fractions of the free height above it and of the free
# width to its left.
Place = str | tuple[float, float]


class Fit:
    """Resizes images to the input: stretched, or padded to keep their proportions (see `vpm_jax.geometry`).

    Args:
      data: config.data of a resolved config.

    Raises:
      UserError: for padding without data.aspect.
    """

    def __init__(self, data: ConfigDict):
        self.pads, self.place = data.fit == "pad", PLACES[data.place]
        self.fill = np.rint(255 * np.array(data.mean)).astype(np.uint8)
        self._aspect, self._filter = float(data.aspect), data.resize
        if self.pads and not self._aspect:
            raise UserError("config.data.fit is 'pad' but data.aspect is 0: set it to a whole person's height / width.")

    def __call__(self, pixels: np.ndarray, out: np.ndarray, place: Place | None = None, stretch: float = 0.0) -> Box:
        """Writes an image, uint8 [h, w, 3], into `out`, uint8 [H, W, 3], padded with the mean color.

        Returns the box of `out` that the image covers. The default of `place` is config.data.place; `stretch` is that
        of `geometry.fit_box`. Raises UserError for an unknown place.
        """
        position = self.place if place is None else _position(place)
        canvas = out.shape[0], out.shape[1]
        if not self.pads:
            resize(pixels, canvas, self._filter, out)
            return 0, 0, *canvas
        top, left, bottom, right = box = fit_box(pixels.shape[:2], canvas, self._aspect, position, stretch)
        out[:] = self.fill
        out[top:bottom, left:right] = resize(pixels, (bottom - top, right - left), self._filter)
        return box


def _position(place: Place) -> tuple[float, float]:
    if isinstance(place, str):
        numbers: tuple[float, ...] = PLACES[place] if place in KNOWN_PLACES else ()
    else:
        try:
            numbers = tuple(map(float, place))
        except (TypeError, ValueError):
            numbers = ()
    if len(numbers) != 2 or not all(0 <= number <= 1 for number in numbers):
        raise UserError(
            f"The place of an image is {place!r}, expected {', '.join(KNOWN_PLACES)}, or the fractions of the free "
            "height above it and of the free width to its left, such as (1, 0.5).",
            code="bad-place",
        )
    return numbers[0], numbers[1]
