"""Encoded images to RGB arrays, and resizing: simplejpeg and OpenCV where they apply, Pillow for the rest."""

from __future__ import annotations

import io

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from vpm_jax.errors import UserError

_OPENCV = {"linear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA, "cubic": cv2.INTER_CUBIC}
_PILLOW = {"pil_bilinear": Image.Resampling.BILINEAR, "pil_bicubic": Image.Resampling.BICUBIC}
FILTERS = (*_OPENCV, *_PILLOW)

_WHAT_TO_DO = "replace it by an intact copy or remove it."
_DEEP_MODES = ("I", "F")  # Pillow's modes (and their prefixes) of more than 8 bits a channel


def decode(data: bytes, name: str) -> np.ndarray:
    """The encoded image as uint8 [H, W, 3], RGB.

    JPEG (grey and CMYK too) goes through libjpeg-turbo, anything else through Pillow. Transparency is
    dropped. An EXIF orientation is ignored: datasets store their images upright, and their published
    numbers come from readers that ignore it.

    Args:
      data: the bytes of the file.
      name: how messages call the image.

    Raises:
      UserError: if the data are no image, are cut short or damaged, or have more than 8 bits a channel.
    """
    if data[:2] == b"\xff\xd8":  # the start of every JPEG
        try:
            # Strict: otherwise the missing part of a truncated file is silently grey.
            return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
        except ValueError as error:
            raise UserError(f"{name} is a damaged JPEG ({error}, {len(data)} bytes): {_WHAT_TO_DO}") from None
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
    except UnidentifiedImageError:
        found = "an empty file" if not data else f"{len(data)} bytes that start with {data[:8]!r}"
        raise UserError(f"{name} is not an image: found {found}, expected a JPEG or PNG; {_WHAT_TO_DO}") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # what Pillow raises
        raise UserError(f"{name} is a damaged image ({error}): {_WHAT_TO_DO}") from None
    if image.mode.startswith(_DEEP_MODES):  # Pillow would clip them to white
        raise UserError(f"{name} has more than 8 bits a channel (mode {image.mode}): convert it to 8 bits.")
    return np.array(image.convert("RGB"))


def resize(
    image: np.ndarray, size: tuple[int, int], filter: str = "linear", out: np.ndarray | None = None
) -> np.ndarray:
    """The image, uint8 [H, W, 3], at `size` (height, width) in pixels.

    Args:
      image: may be a slice of a larger one.
      size: the height and width of the result.
      filter: one of FILTERS. OpenCV's do not smooth before they shrink (except "area"); Pillow's do. Enlarging Market
        images to 384 x 128, "linear" is within 1 grey level of Pillow's bilinear (mean 0.3), "cubic" within 15 of its
        bicubic (mean 0.8), and the "pil_" ones are Pillow's own: see tests/test_preprocessing.py.
      out: an array of the result's shape to write into; it must be contiguous.

    Raises:
      UserError: for an unknown filter.
    """
    if out is None:
        out = np.empty((*size, 3), np.uint8)
    if filter in _OPENCV:
        cv2.resize(image, (size[1], size[0]), dst=out, interpolation=_OPENCV[filter])
    elif filter in _PILLOW:
        out[:] = Image.fromarray(image).resize((size[1], size[0]), _PILLOW[filter])
    else:
        raise UserError(f"config.data.resize is {filter!r}, expected one of {', '.join(FILTERS)}.")
    return out
