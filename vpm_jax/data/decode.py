"""Decoding images to RGB arrays, and resizing them."""

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

SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
UNSUPPORTED = (".heic", ".heif", ".jxl", ".jp2", ".dng", ".raw")

# Pillow's names of these formats. It reads many more, for some of which it starts other programs (EPS).
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")

_WHAT_TO_DO = "replace it with an intact copy or remove it."
_DEEP_MODES = ("I", "F")  # Pillow's modes with 32 bits per channel, whose value range is undefined
_DAMAGED = (OSError, ValueError, SyntaxError, LookupError, ArithmeticError, TypeError, EOFError, struct.error)
_JPEG_END, _SCAN, _PROGRESSIVE = b"\xff\xd9", b"\xff\xda", b"\xff\xc2"  # JPEG markers
_HEADER = 2**17  # bytes; contain a JPEG's EXIF data
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {  # what makes an image with this orientation upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# A tiny file can decode to an array that fills the memory. `_check_size` raises where Pillow only warns.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def decode(data: bytes, name: str, upright: bool = False, most: int | None = None) -> np.ndarray:
    """Decodes an image, the first frame of an animation, to uint8 [H, W, 3] RGB.

    libjpeg-turbo decodes JPEG (also gray and CMYK), Pillow all other formats. A JPEG may lack its end marker. Of 16
    bits per channel the upper 8 are kept. By default transparency is dropped and the EXIF orientation ignored, as in
    the readers behind published results; datasets store their images upright.

    Args:
      data: the bytes of the file.
      name: the image's name in error messages.
      upright: decode as an image viewer does: rotated by the EXIF orientation, transparency on white.
      most: the number of pixels allowed; None: Pillow's Image.MAX_IMAGE_PIXELS (89 million unless changed).

    Raises:
      UserError: if the data are not an image, truncated or damaged, or have more than 16 bits per channel or `most`
        pixels.
    """
    if data[:2] == b"\xff\xd8":  # JPEG
        try:
            _check_size(simplejpeg.decode_jpeg_header(data)[:2], name, most)
            pixels = _decode_jpeg(data)
        except ValueError as error:
            raise UserError(
                f"{name} is a damaged JPEG ({error}, {len(data)} bytes): {_WHAT_TO_DO}", code="damaged-image"
            ) from None
        if upright and b"Exif" in data[:_HEADER]:
            turn = _turn(data)
            return pixels if turn is None else np.array(Image.fromarray(pixels).transpose(turn))
        return pixels
    try:
        Image.open(io.BytesIO(data), formats=_FORMATS).verify()  # a PNG's checksums, which loading does not check
        picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:11] in (b"hei", b"hev", b"mif", b"msf"):
            raise UserError(f"{name} is a HEIC image, which cannot be read: convert it to JPEG or PNG.") from None
        content = "an empty file" if not data else f"{len(data)} bytes that start with {data[:8]!r}"
        expected = f"expected one of {', '.join(SUFFIXES)}"
        raise UserError(f"{name} is not an image: found {content}, {expected}; {_WHAT_TO_DO}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(_too_large("too many", name, most), code="too-many-pixels") from None
    except _DAMAGED as error:
        raise UserError(f"{name} is a damaged image ({error}): {_WHAT_TO_DO}", code="damaged-image") from None
    return from_pillow(picture, name, upright, most)


def _decode_jpeg(data: bytes) -> np.ndarray:
    # Without strict, the missing rest of a truncated file silently becomes gray.
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB", strict=True)
    except ValueError:
        # Accept a file that lacks only its end marker, unless it may also lack some of several scans.
        if data.endswith(_JPEG_END) or _PROGRESSIVE in data or data.count(_SCAN) != 1:
            raise
        return simplejpeg.decode_jpeg(data + _JPEG_END, colorspace="RGB", strict=True)


def from_pillow(picture: Image.Image, name: str, upright: bool = True, most: int | None = None) -> np.ndarray:
    """A Pillow image of any mode as uint8 [H, W, 3] RGB. Arguments and errors are those of `decode`."""
    _check_size(picture.size[::-1], name, most)
    if 0 in picture.size:
        raise UserError(f"{name} has {picture.height} x {picture.width} pixels, expected at least one: {_WHAT_TO_DO}")
    try:
        picture.load()
        turn = _turn(picture) if upright else None
        if picture.mode in _DEEP_MODES:  # Pillow would clip them to white
            raise UserError(f"{name} has more than 16 bits per channel (mode {picture.mode}): convert it to 8 bits.")
        if picture.mode.startswith("I;16"):  # keep the upper 8 bits, as Pillow does for 16-bit colors
            picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            if upright:
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return np.array((picture if turn is None else picture.transpose(turn)).convert("RGB"))
    except _DAMAGED as error:
        raise UserError(f"{name} is a damaged image ({error}): {_WHAT_TO_DO}", code="damaged-image") from None


def _check_size(size: tuple[int, int], name: str, most: int | None) -> None:
    """Raises UserError for more than `most` pixels (see `decode`); size is (height, width)."""
    limit = most or Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > limit:
        raise UserError(_too_large(f"{size[0]} x {size[1]}", name, most), code="too-many-pixels")


def _too_large(pixels: str, name: str, most: int | None) -> str:
    limit, whose = most or Image.MAX_IMAGE_PIXELS or 0, "" if most else " (Pillow's limit for safety)"
    return f"{name} has {pixels} pixels, expected at most {limit:,}{whose}: make it smaller."


def _turn(image: Image.Image | bytes) -> Image.Transpose | None:
    """The rotation or reflection that makes a Pillow image or a JPEG upright; None if none is needed or known."""
    try:
        picture = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
        return _TURNS.get(picture.getexif().get(_ORIENTATION, 1))
    except _DAMAGED:  # only the EXIF data are unreadable
        return None


def resize(
    image: np.ndarray, size: tuple[int, int], filter: str = "linear", out: np.ndarray | None = None
) -> np.ndarray:
    """Resizes an image, uint8 [H, W, 3].

    Args:
      image: may be a slice of a larger array.
      size: (height, width) of the result.
      filter: one of FILTERS. Those named pil_* are Pillow's, which smooth before shrinking; the others are OpenCV's,
        which do not (except "area"). When enlarging Market-1501 images to 384 x 128, "linear" is within 1 gray level of
        Pillow's bilinear (mean 0.3) and "cubic" within 15 of its bicubic (mean 0.8).
      out: a contiguous array to write the result into.
    """
    if out is None:
        out = np.empty((*size, 3), np.uint8)
    if filter in _OPENCV:
        cv2.resize(image, (size[1], size[0]), dst=out, interpolation=_OPENCV[filter])
    else:
        out[:] = Image.fromarray(image).resize((size[1], size[0]), _PILLOW[filter])
    return out
