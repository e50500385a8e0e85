"""Encoded images, and splits of images in memory."""

from __future__ import annotations

import io
import struct
import zlib
from dataclasses import dataclass

import numpy as np
from PIL import Image

from vpm_jax.config import default
from vpm_jax.data.split import Split

ROWS, COLUMNS = np.mgrid[:128, :64]
PICTURE = np.stack([ROWS * 2, COLUMNS * 4, (ROWS + COLUMNS) % 256], -1).astype(np.uint8)


def encode(image: Image.Image, form: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def blobs(random, height=80, width=30):
    """An image of blobs of color: as different from others as photographs are."""
    small = Image.fromarray(random.integers(0, 256, (6, 3, 3), dtype=np.uint8))
    return small.resize((width, height), Image.Resampling.BICUBIC)


def oriented(form, value, **options):
    exif = Image.Exif()
    exif[0x0112] = value
    return encode(Image.fromarray(PICTURE), form, exif=exif, **options)


def with_size(data, height, width):
    """The JPEG or PNG with another size in its header, as a decompression bomb has it."""
    if data.startswith(b"\xff\xd8"):
        at = data.index(b"\xff\xc0") + 5
        return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]
    head = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


@dataclass(frozen=True)
class Memory:
    data: tuple[bytes, ...]

    def read(self, name, position):
        return self.data[position]


def png(image):
    return encode(Image.fromarray(image))


def split_of(images):
    """Four images of an identity; lossless, so that pixels can be compared."""
    n = len(images)
    data = tuple(image if isinstance(image, bytes) else png(image) for image in images)
    identity = (np.arange(n) // 4 * 3 + 2).astype(np.int32)
    return Split(
        "train", tuple(f"{i:04d}.png" for i in range(n)), identity, np.arange(n, dtype=np.int32) % 6, Memory(data)
    )


def small_config(**data):
    """24 x 12 pixels, a feature map of 6 x 3, batches of 2 x 4."""
    config = default()
    for stage in (config.stage1, config.stage2):
        stage.update(identities=2, images_per_identity=4, epochs=2, steps_per_epoch=5)
    config.data.update(height=24, width=12, **data)
    config.model.update(grid=(3, 1), stem="4x4", strides=(1, 1, 1))
    config.eval.batch = 128
    return config
