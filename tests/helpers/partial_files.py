"""Partial-REID and Partial-iLIDS in the layouts of real copies."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
from images import encode
from PIL import Image

FORMATS = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".tif": "TIFF", ".bmp": "BMP"}


# dataset, folder, folders of query and gallery, name of image n of an identity, images of each identity
LAYOUTS = {
    "original": (
        "partial_reid",
        "Partial-REID_Dataset",
        "partial_body_images",
        "whole_body_images",
        "{:03d}_{:03d}.jpg",
    ),
    "short": ("partial_reid", "PartialREID", "partial_body_images", "whole_body_images", "{:03d}_{:03d}.JPG"),
    "market style": (
        "partial_reid",
        "Partial_REID",
        "partial_body_images",
        "whole_body_images",
        "{:04d}_c1_{:04d}.png",
    ),
    "renamed": ("partial_reid", "partial_reid", "query", "gallery", "{:03d}_{:03d}.tif"),
    "nested": ("partial_reid", "Partial REID/Partial-REID", "partial_body_images", "whole_body_images", "{}_{}.jpeg"),
    "by identity": (
        "partial_reid",
        "PartialREID",
        "partial_body_images",
        "whole_body_images",
        "{0:03d}/{0:03d}_{1}.bmp",
    ),
    "probe": ("partial_ilids", "Partial_iLIDS", "Probe", "Gallery", "{:03d}.jpg"),
    "dashed": ("partial_ilids", "Partial-iLIDS", "query", "gallery", "{:03d}.tif"),
    "together": ("partial_ilids", "PartialiLIDS", "Probe", "Gallery", "{}.TIF"),
    "numbered": ("partial_ilids", "PartialILIDS/PartialiLIDS", "query", "gallery", "{:04d}_c1_0000.JPG"),
}


def picture(seed: int, suffix: str = ".jpg") -> bytes:
    """An image unlike any other, of its own size."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (8 + seed % 7, 4 + seed % 3, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), FORMATS[suffix.lower()])


def make(root: Path, layout: str, identities: int = 3, images: int = 2) -> dict[str, list[tuple[int, bytes]]]:
    """Writes a dataset below `root`; the (identity, bytes) of its query and gallery, in the order of the names."""
    name, folder, *splits, pattern = LAYOUTS[layout]
    images = images if name == "partial_reid" else 1
    content: dict[str, list[tuple[int, bytes]]] = {}
    for seed, split in enumerate(splits):
        rows = []
        for identity in range(1, identities + 1):
            for image in range(1, images + 1):
                path = root / folder / split / pattern.format(identity, image)
                data = picture(10_000 * seed + 10 * identity + image, path.suffix)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                rows.append((path.relative_to(root / folder / split).as_posix(), identity, data))
        content["query" if not seed else "gallery"] = [(identity, data) for _, identity, data in sorted(rows)]
    return content


def pack(folder: Path, path: Path) -> Path:
    """The folder's content as a zip that went through a Mac and a Windows."""
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*"), reverse=True):
            name = file.relative_to(folder).as_posix()
            archive.write(file, name)
            if file.is_file():
                archive.writestr(f"__MACOSX/{name.rpartition('/')[0]}/._{file.name}", b"junk")
            else:
                archive.writestr(f"{name}/Thumbs.db", b"junk")
    return path
