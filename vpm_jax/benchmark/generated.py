"""Made-up data in memory, about as large as Market-1501's: nothing to download, nobody's pictures."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np

from vpm_jax.data.split import Dataset, Split


@dataclass(frozen=True)
class Memory:
    """The images of a split as bytes in memory, repeated as often as asked for."""

    data: tuple[bytes, ...]

    def read(self, name: str, position: int) -> bytes:
        return self.data[position % len(self.data)]


def pictures(count: int) -> tuple[bytes, ...]:
    """128 x 64 JPEGs of 2.6 KB."""
    import cv2
    from PIL import Image

    random, data = np.random.default_rng(0), []
    for _ in range(count):
        # Smooth colours and some noise: the size, and so the time to decode, is that of photographs.
        picture = cv2.resize(random.uniform(0, 255, (16, 8, 3)).astype(np.float32), (64, 128))
        picture = np.clip(picture + random.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=80)
        data.append(buffer.getvalue())
    return tuple(data)


def split(name: str, images: int, identities: int = 128, different: int = 512) -> Split:
    """Images of identities 1, 2, ..., each seen by six cameras in turn; `different` pictures, then again."""
    index = np.arange(images)
    identity, camera = (index % identities + 1).astype(np.int32), (index // identities % 6 + 1).astype(np.int32)
    names = tuple(f"generated/{i:05d}.jpg" for i in range(images))
    return Split(name, names, identity, camera, Memory(pictures(min(images, different))))


def dataset(queries: int, gallery: int) -> Dataset:
    """Queries, a gallery at least twice as large that shows each of their identities to two cameras or more, and a
    training image that nothing reads."""
    identities = min(queries, 128)
    train, query, ranked = (
        split(name, n, identities) for name, n in (("train", 1), ("query", queries), ("gallery", gallery))
    )
    return Dataset("generated", train, query, ranked, notes=())
