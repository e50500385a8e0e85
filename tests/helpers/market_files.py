"""A tiny dataset in the layout of Market-1501, as folder and zip, with the quirks of real copies."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest
from images import encode
from PIL import Image

from vpm_jax.config import default
from vpm_jax.data.sources import load_dataset
from vpm_jax.data.split import Dataset
from vpm_jax.errors import UserError

FILES = {
    "bounding_box_train": [
        "0007_c1s1_000001_01.jpg",
        "0007_c2s1_000001_01.jpg",
        "0007_c2s1_000002_01.jpg",
        "0002_c3s2_000001_00.jpg.jpg",
        "0002_c1s1_000001_00.jpg",
        "0011_c1s1_000001_00.jpg",
        "0011_c1s1_000002_00.jpg",
        "0030_c6s1_000001_00.jpg",
        "0030_c6s1_000002_00.jpg",
        "Thumbs.db",
    ],
    "query": ["0001_c1s1_000001_00.jpg", "0003_c2s1_000001_00.jpg"],
    "bounding_box_test": [
        "0001_c2s1_000001_00.jpg",
        "0000_c1s1_000001_00.jpg",
        "-1_c5s1_000001_00.jpg",
        "0003_c4s1_000001_00.jpg",
        "readme.txt",
        "someone.jpg",
    ],
}


TRAIN = sorted(FILES["bounding_box_train"][:-1])


def jpeg(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 4, 3), dtype=np.uint8)
    return encode(Image.fromarray(pixels), "JPEG")


def make_folder(root: Path) -> Path:
    """A tiny dataset in the official layout, with the quirks of real copies; every image differs."""
    seed = 0
    for folder, names in FILES.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            seed += 1
            (root / folder / name).write_bytes(jpeg(seed))
    return root


def make_zip(folder: Path, path: Path, inside: str = "Market-1501-v15.09.15/") -> Path:
    """The folder as an official zip that went through a Mac; entries in no order."""
    files = sorted(folder.rglob("*"), reverse=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in files:
            name = inside + file.relative_to(folder).as_posix()
            archive.write(file, name)
            if file.is_file():
                archive.writestr(f"__MACOSX/{name.rpartition('/')[0]}/._{file.name}", b"junk")
        archive.writestr(f"{inside}bounding_box_train/.DS_Store", b"junk")
        archive.writestr(f"{inside}gt_bbox/0001_c1s1_000001_00.jpg", b"another folder")
    return path


def config(root: Path | str, name: str = "market1501", holdout: int = 0):
    data = default().data
    data.name, data.root, data.holdout_identities = name, str(root), holdout
    return data


def content(dataset: Dataset) -> dict:
    """All that two forms of one dataset must share."""
    return {
        split.name: [
            (n, int(i), int(c), split.read(k))
            for k, (n, i, c) in enumerate(zip(split.names, split.identity, split.camera, strict=True))
        ]
        for split in (dataset.train, dataset.query, dataset.gallery)
    }


def fails(data, *parts: str) -> None:
    """Loading ends in one sentence that holds all the parts."""
    with pytest.raises(UserError) as error:
        load_dataset(data)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value) and str(error.value).endswith(".")
