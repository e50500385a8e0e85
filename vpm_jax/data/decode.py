"""Encoded images to RGB arrays, and resizing: simplejpeg and OpenCV where they apply, Pillow for the rest."""

from __future__ import annotations

import io
import struct
import warnings

import cv2
import numpy as np
import simplejpeg
from PIL import Image, UnidentifiedImageError

from vpm_jax.errors import UserError

_OPENCV = {"linear": cv2.INTER_LINEAR, "area": cv2.INTER_AREA, "cubic": cv2.INTER_CUBIC}
_PILLOW = {"pil_bilinear": Image.Resampling.BILINEAR, "pil_bicubic": Image.Resampling.BICUBIC}
FILTERS = (*_OPENCV, *_PILLOW)

# What files of images are called.
SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")

_WHAT_TO_DO = "replace it by an intact copy or remove it."
_DEEP_MODES = ("I", "F")  # Pillow's modes of 32 bits a channel, whose range nobody knows
_DAMAGED = (OSError, ValueError, SyntaxError, LookupError, ArithmeticError, TypeError, EOFError, struct.error)
_SEGMENT = struct.Struct(">BBHBHH").unpack_from  # a JPEG segment's marker and length; a frame's depth, height, width
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # the markers of JPEG segments that start a frame
_JPEG_END, _SCAN, _PROGRESSIVE = b"\xff\xd9", b"\xff\xda", b"\xff\xc2"  # markers
_HEADER = 2**17  # a JPEG's EXIF data lie in its first bytes
_ORIENTATION = 0x0112  # EXIF's tag, and what undoes its values
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# A tiny file can ask for all memory. `_check_size` refuses, in one sentence, from where Pillow would only warn.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(data: bytes, name: str, upright: bool = False) -> np.ndarray:
    """The encoded image as uint8 [H, W, 3], RGB; the first one of an animation.

    JPEG (grey and CMYK too) goes through libjpeg-turbo, anything else through Pillow. A JPEG may lack its end marker,
    and of 16 bits a channel the upper 8 are kept. By default transparency is dropped and an EXIF orientation ignored:
    datasets store their images upright, and their published numbers come from readers that ignore both.

    Args:
      data: the bytes of the file.
      name: how messages call the image.
      upright: as a viewer shows people's own pictures: turned by the EXIF orientation, transparency on white.

    Raises:
      UserError: if the data are no image, are cut short or damaged, have more than 16 bits a channel, or more pixels
        than Pillow's Image.MAX_IMAGE_PIXELS (89 million unless changed).
    """
    if data[:2] == b"\xff\xd8":  # the start of every JPEG
        try:
            _check_size(_jpeg_size(data), name)
            pixels = _decode_jpeg(data)
        except ValueError as error:
            raise UserError(
                f"{name} is a damaged JPEG ({error}, {len(data)} bytes): {_WHAT_TO_DO}", code="damaged-image"
            ) from None
        if upright and b"Exif" in data[:_HEADER]:
            turn = _turn(Image.open(io.BytesIO(data)))
            return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))
        return pixels
    try:
        picture = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        found = "an empty file" if not data else f"{len(data)} bytes that start with {data[:8]!r}"
        expected = f"expected one of {', '.join(SUFFIXES)}"
        raise UserError(f"{name} is not an image: found {found}, {expected}; {_WHAT_TO_DO}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(_too_large("far too many", name)) from None
    except _DAMAGED as error:
        raise UserError(f"{name} is a damaged image ({error}): {_WHAT_TO_DO}", code="damaged-image") from None
    return from_pillow(picture, name, upright)


def _decode_jpeg(data: bytes) -> np.ndarray:
    # Strict: otherwise the missing part of a truncated file is silently grey.
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError:
        # All may be there but the end. With several scans, as a progressive one has, whole ones may be missing.
        if data.endswith(_JPEG_END) or _PROGRESSIVE in data or data.count(_SCAN) != 1:
            raise
        return simplejpeg.decode_jpeg(data + _JPEG_END, colorspace="RGB", strict=True)


def from_pillow(picture: Image.Image, name: str, upright: bool = True) -> np.ndarray:
    """A Pillow image of any mode as uint8 [H, W, 3], RGB. Arguments and errors as those of `decode`."""
    _check_size(picture.size[::-1], name)
    if 0 in picture.size:
        raise UserError(f"{name} has {picture.height} x {picture.width} pixels, expected at least one: {_WHAT_TO_DO}")
    try:
        picture.load()
        turn = _turn(picture) if upright else None
        if picture.mode in _DEEP_MODES:  # Pillow would clip them to white
            raise UserError(f"{name} has more than 16 bits a channel (mode {picture.mode}): convert it to 8 bits.")
        if picture.mode.startswith("I;16"):  # as Pillow itself does with 16 bits a color
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            if upright:
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return np.array((picture if turn is None else picture.transpose(turn)).convert("RGB"))
    except _DAMAGED as error:
        raise UserError(f"{name} is a damaged image ({error}): {_WHAT_TO_DO}", code="damaged-image") from None


def _check_size(size: tuple[int, int], name: str) -> None:
    """Raises UserError where Pillow would warn of a bomb; size is (height, width)."""
    if Image.MAX_IMAGE_PIXELS is not None and size[0] * size[1] > Image.MAX_IMAGE_PIXELS:
        raise UserError(_too_large(f"{size[0]} x {size[1]}", name))


def _too_large(found: str, name: str) -> str:
    most = f"{Image.MAX_IMAGE_PIXELS or 0:,}"
    return f"{name} has {found} pixels, expected at most {most} (Pillow's limit, against bombs): make it smaller."


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """(height, width) that the header claims, in a third of the time that simplejpeg takes; libjpeg believes it."""
    at = 2
    while at + 9 <= len(data):
        start, marker, length, _, height, width = _SEGMENT(data, at)
        if start != 0xFF:
            break
        if marker in _FRAMES:
            return height, width
        # A marker may be preceded by any number of bytes 0xff.
        at += 1 if marker == 0xFF else 2 + length
    return simplejpeg.decode_jpeg_header(data)[:2]


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """What turns the picture as its EXIF orientation says that it is to be seen."""
    try:
        return _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except _DAMAGED:  # the pixels are whole; a tag that cannot be read turns nothing
        return None


def resize(
    image: np.ndarray, size: tuple[int, int], filter: str = "linear", out: np.ndarray | None = None
) -> np.ndarray:
    """The image, uint8 [H, W, 3], at `size` (height, width) in pixels.

    Args:
      image: may be a slice of a larger one.
      size: the height and width of the result.
      filter: one of FILTERS. OpenCV's do not smooth before they shrink (except "area"); Pillow's do. Enlarging Market
        images to 384 x 128, "linear" is within 1 grey level of Pillow's bilinear (mean 0.3), "cubic" within 15 of its
        bicubic (mean 0.8), and the "pil_" ones are Pillow's own: see tests/data/test_preprocessing.py.
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
