"""Generated images in memory, similar in size to Market-1501's: nothing to download, no real people."""

from __future__ import annotations

import argparse
import io
from dataclasses import dataclass

import numpy as np
from ml_collections import ConfigDict

from vpm_jax.data.sources import load_test_set
from vpm_jax.data.split import Dataset, Split
from vpm_jax.errors import UserError

DIFFERENT = 512  # images, which a larger split repeats


@dataclass(frozen=True)
class Memory:
    """Reads images from a list of encoded ones, repeating them as needed."""

    data: tuple[bytes, ...]

    def read(self, name: str, position: int) -> bytes:
        return self.data[position % len(self.data)]


def encoded_images(count: int) -> tuple[bytes, ...]:
    """128 x 64 JPEGs of 2.6 KB."""
    import cv2
    from PIL import Image

    random, data = np.random.default_rng(0), []
    for _ in range(count):
        # Smooth colors with some noise give the file size, and so the decoding time, of photographs.
        image = cv2.resize(random.uniform(0, 255, (16, 8, 3)).astype(np.float32), (64, 128))
        image = np.clip(image + random.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=80)
        data.append(buffer.getvalue())
    return tuple(data)


def split(name: str, images: int, identities: int = 128) -> Split:
    """Images of identities 1, 2, ..., over six cameras."""
    index = np.arange(images)
    identity, camera = (index % identities + 1).astype(np.int32), (index // identities % 6 + 1).astype(np.int32)
    names = tuple(f"generated/{i:05d}.jpg" for i in range(images))
    return Split(name, names, identity, camera, Memory(encoded_images(min(images, DIFFERENT))))


def dataset(queries: int, gallery: int) -> Dataset:
    """Queries, a gallery with two or more cameras per identity, and an unused training image.

    Raises:
      UserError: unless the gallery is at least twice as large.
    """
    if gallery < 2 * queries:
        raise UserError(f"--queries {queries} --gallery {gallery}: expected at least twice as many gallery images.")
    identities = min(queries, 128)
    train, query, ranked = (
        split(name, n, identities) for name, n in (("train", 1), ("query", queries), ("gallery", gallery))
    )
    return Dataset("generated", train, query, ranked, notes=())


def test_set(args: argparse.Namespace, config: ConfigDict) -> Dataset:
    """The dataset at --root, or a generated one of --queries and --gallery. Raises UserError."""
    if not args.root:
        return dataset(args.queries, args.gallery)
    config.data.root = args.root
    return load_test_set(config.data)
