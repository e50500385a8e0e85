"""Writes a folder of distinct JPEGs of synthetic pedestrians, for data.distractors.

    python tests/helpers/distractors.py FOLDER --count 500000

Each is one of 300 rendered images, shifted, brightened or darkened, and with noise of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from vpm_jax.data.synthetic import STRANGERS, Shot, render

RENDERED = 300


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=500_000)
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True)
    shots = [Shot("", STRANGERS, i, 1 + i % 4, i, "distractor") for i in range(min(RENDERED, args.count))]
    images, random = [render(0, shot) for shot in shots], np.random.default_rng(0)
    noise = random.integers(-8, 9, images[0].size + 100_000, np.int16)
    for number in range(args.count):
        image = np.roll(images[number % len(images)], random.integers(-6, 7, 2), (0, 1))
        start, light = random.integers(100_000), random.integers(-30, 31)
        changed = image + noise[start : start + image.size].reshape(image.shape) + np.int16(light)
        pixels = np.clip(changed, 0, 255).astype(np.uint8)
        cv2.imwrite(str(args.folder / f"{number:06d}.jpg"), pixels, [cv2.IMWRITE_JPEG_QUALITY, 75])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
