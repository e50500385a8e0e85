"""Reads images in every form that the Python API takes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image as Pillow

from vpm_jax.data import decode
from vpm_jax.errors import UserError
from vpm_jax.regions import WHOLE, Crop, pixel_box

# A path, an encoded file or its bytes, a Pillow image, or a uint8 array, of any size; see `api.VPM.features`.
Image = str | os.PathLike[str] | bytes | BinaryIO | Pillow.Image | np.ndarray
# One image, several, or uint8 [N, H, W, 3].
Images = Image | Iterable[Image]


def read(image: Image, name: str = "the image", crop: Crop = WHOLE) -> np.ndarray:
    """Decodes a crop of an image (see `api.VPM.features`) to uint8 [H, W, 3], RGB, with its EXIF orientation applied.

    Raises:
      UserError: if it is invalid or cannot be read.
    """
    pixels = _read(image, name)
    top, left, bottom, right = pixel_box(crop, *pixels.shape[:2])
    return pixels[top:bottom, left:right]


def _read(image: Image, name: str) -> np.ndarray:
    if isinstance(image, str | os.PathLike):
        path = Path(os.path.expanduser(image))
        try:
            if path.is_dir():
                raise UserError(f"{path} is a folder, expected an image: give the images in it.")
            if path.exists() and not path.is_file():  # opening a pipe would block
                raise UserError(f"{path} is a pipe or a device, expected an image file.")
            data = path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path} cannot be read ({reason}): expected an image file.") from None
        return decode.decode(data, str(path), upright=True)
    if hasattr(image, "read"):
        image = _contents(image, name)
    if isinstance(image, bytes | bytearray | memoryview):
        return decode.decode(bytes(image), name, upright=True)
    if isinstance(image, Pillow.Image):
        return decode.from_pillow(image, name)
    if not hasattr(image, "__array__"):
        raise UserError(
            f"{name} is of type {type(image).__name__}, expected a path, a file, bytes, a Pillow "
            "image or a uint8 array."
        )
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or not pixels.size:
        raise UserError(f"{name} is {pixels.dtype} {pixels.shape}, expected uint8 [H, W, 3] with values from 0 to 255.")
    if pixels.shape[2] == 4:
        return decode.from_pillow(Pillow.fromarray(pixels), name)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _contents(file: Any, name: str) -> bytes:
    """The bytes of an open file, from its start as Pillow reads it, or of a stream."""
    try:
        if file.seekable():
            file.seek(0)
        data = file.read()
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{name} cannot be read ({error}): expected an image file, open for reading.") from None
    if not isinstance(data, bytes):
        raise UserError(f"{name} is a file open as text, expected an image file open in binary mode (rb).")
    return data


def each(images: Images) -> Iterator[Image]:
    """The images one by one."""
    single = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Pillow.Image)
    single = single or hasattr(images, "read")
    if not single and hasattr(images, "__array__"):
        ndim = np.ndim(images)  # type: ignore[arg-type]
        if ndim not in (2, 3, 4):
            raise UserError(f"images is an array of {ndim} axes, expected uint8 [H, W, 3] or [N, H, W, 3].")
        single = ndim < 4
    if single:
        return iter([images])  # type: ignore[list-item]
    try:
        return iter(images)  # type: ignore[arg-type]
    except TypeError:
        return iter([images])  # type: ignore[list-item]  # `read` reports the type
