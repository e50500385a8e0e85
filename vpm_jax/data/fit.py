"""Fitting images to the network's input, by the keys fit, place, aspect, resize and mean of `config.data`."""

from __future__ import annotations

import numpy as np
from ml_collections import ConfigDict

from vpm_jax.data.decode import FILTERS, resize
from vpm_jax.errors import UserError
from vpm_jax.geometry import PLACES, Box, fit_box


class Fit:
    """Resizes images to the input: stretched, or padded to keep their proportions (see `vpm_jax.geometry`).

    Args:
      data: config.data of a resolved config.

    Raises:
      UserError: for an unknown resize filter, or padding without data.aspect.
    """

    def __init__(self, data: ConfigDict):
        self.pads, self.place = data.fit == "pad", PLACES[data.place]
        self.fill = np.rint(255 * np.array(data.mean)).astype(np.uint8)
        self._aspect, self._filter = float(data.aspect), data.resize
        if self._filter not in FILTERS:
            raise UserError(f"config.data.resize is {self._filter!r}, expected one of {', '.join(FILTERS)}.")
        if self.pads and not self._aspect:
            raise UserError("config.data.fit is 'pad' but data.aspect is 0: set it to a whole person's height / width.")

    def __call__(self, pixels: np.ndarray, out: np.ndarray, place: tuple[float, float] | None = None) -> Box:
        """Writes an image, uint8 [h, w, 3], into `out`, uint8 [H, W, 3], padded with the mean color.

        Returns the box of `out` that the image covers. `place` is that of `geometry.fit_box`, by default
        config.data.place.
        """
        canvas = out.shape[0], out.shape[1]
        if not self.pads:
            resize(pixels, canvas, self._filter, out)
            return 0, 0, *canvas
        top, left, bottom, right = box = fit_box(pixels.shape[:2], canvas, self._aspect, place or self.place)
        out[:] = self.fill
        out[top:bottom, left:right] = resize(pixels, (bottom - top, right - left), self._filter)
        return box
