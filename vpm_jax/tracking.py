"""Appearance vectors for trackers: the people in the boxes of a video frame.

    encoder = Encoder(VPM.load("runs/market"), "bgr")  # OpenCV's order of colors
    vectors = encoder.encode(frame, boxes)  # float32 [N, D], unit length

Cosine similarity compares them (`matching.embedding`). A box that reaches beyond the frame is a partial image whose
missing side is known. Regions outside the frame get no weight, and a model of padded images sees the crop where it
belongs in the box. A box that ends at the edge, as most detectors' boxes do, does not show what is missing; then the
model estimates it, as for any image.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from vpm_jax.api import VPM
from vpm_jax.errors import UserError
from vpm_jax.geometry import PLACES, feature_map_shape, place_between
from vpm_jax.images import Image, Images, each
from vpm_jax.matching import embedding, match_visibility
from vpm_jax.regions import Crop, project_regions


class Encoder:
    """A VPM as the appearance model of a tracker.

    Calls with any number of people compile for few batch sizes: powers of two up to `batch`, then `batch`.

    Args:
      model: the model.
      colors: the channel order of frames and images given as arrays; "bgr" for those of OpenCV.
      batch: people per batch; affects speed and memory only.
    """

    def __init__(self, model: VPM, colors: Literal["bgr", "rgb"], batch: int = 64):
        if not isinstance(model, VPM):
            raise UserError(f"model is {type(model).__name__}, expected a VPM: load it with VPM.load(PATH).")
        if colors not in ("bgr", "rgb"):
            raise UserError(f"colors is {colors!r}, expected 'bgr' (OpenCV) or 'rgb'.", code="bad-frame")
        self._model, self._bgr, self._batch = model, colors == "bgr", batch

    def encode(self, frame: np.ndarray, boxes: Any) -> np.ndarray:
        """One vector for each box on a frame, float32 [N, D], of unit length.

        Args:
          frame: uint8 [H, W, 3].
          boxes: [N, 4]: left, top, right, bottom in pixels. They may reach beyond the frame.

        Raises:
          UserError: for another frame, and for boxes that are not finite, have no area or lie outside the frame.
        """
        model, found = self._model, type(frame).__name__
        if hasattr(frame, "__array__"):
            frame = np.asarray(frame)
            found = f"{frame.dtype} {frame.shape}"
        if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.shape[2:] != (3,) or not frame.size:
            raise UserError(
                f"The frame is {found}, expected uint8 [H, W, 3] with values from 0 to 255.", code="bad-frame"
            )
        whole = _boxes(boxes)
        height, width = frame.shape[:2]
        shown = whole.clip(0, [width, height, width, height])
        wrong = ~(np.isfinite(whole).all(1) & (shown[:, 2:] > shown[:, :2]).all(1))
        if wrong.any():
            number = int(wrong.argmax())
            raise UserError(
                f"Box {number} is {whole[number].tolist()}, of which a {width} x {height} frame shows nothing: "
                "expected left < right and top < bottom in pixels; leave out people who are outside the frame.",
                code="bad-boxes",
            )
        # Along x and y, in fractions of the box: how much is missing before and after the shown interval, and its size.
        size = whole[:, 2:] - whole[:, :2]
        before, after = (shown - whole)[:, :2] / size, (whole - shown)[:, 2:] / size
        extent = (shown[:, 2:] - shown[:, :2]) / size
        places = place_between(before[:, ::-1], after[:, ::-1], PLACES[model.config.data.place])
        first, last = np.floor(shown[:, :2]).astype(int), np.ceil(shown[:, 2:]).astype(int)
        crops = (
            self._rgb(frame[top:bottom, left:right]) for (left, top), (right, bottom) in zip(first, last, strict=True)
        )
        described = model.features(crops, self._batch, places.tolist())
        shape = feature_map_shape(model.config)
        inside = np.zeros(described.visibility.shape, bool)
        for row, (left, top), (across, down) in zip(inside, before.tolist(), extent.tolist(), strict=True):
            row[:] = project_regions(Crop(top, left, down, across), model.grid, shape)[1]
        weight = match_visibility(described.visibility, model.config.match.visibility)
        return embedding(described.features, weight * inside)

    def extract_features(self, detections: Any, frame: np.ndarray) -> np.ndarray:
        """`encode` for `supervision.Detections`, or any object with `xyxy`; the ReIDEncoder of Roboflow's trackers."""
        return self.encode(frame, getattr(detections, "xyxy", detections))

    def __call__(self, images: Images) -> np.ndarray:
        """One vector for each image, float32 [N, D], as torchreid's FeatureExtractor gives: crops of people, as paths
        or uint8 arrays, or anything else that `VPM.features` takes.
        """
        return self._model.embedding(self._model.features(map(self._rgb, each(images)), self._batch))

    def _rgb(self, image: Any) -> Image:
        if not (self._bgr and hasattr(image, "__array__")):
            return image
        pixels = np.asarray(image)  # may be an array of JAX or PyTorch
        color = pixels.ndim == 3 and pixels.shape[2] in (3, 4)
        return pixels[:, :, [2, 1, 0, 3][: pixels.shape[2]]] if color else pixels


def _boxes(boxes: Any) -> np.ndarray:
    """Boxes as float64 [N, 4]."""
    found: object
    try:
        array = np.asarray(boxes, np.float64)
        found = list(array.shape)
    except (TypeError, ValueError):
        array, found = np.empty(()), "and not an array of numbers"
    if array.size and array.ndim == 2 and array.shape[1] == 4:
        return array
    if not array.size and array.ndim:
        return np.empty((0, 4))
    raise UserError(
        f"The boxes are {type(boxes).__name__} {found}, expected numbers [N, 4]: left, top, right and bottom of each "
        "in pixels.",
        code="bad-boxes",
    )
