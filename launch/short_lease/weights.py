"""Pretrained weights at half their size: convolutions in float16, the rest in float32.

python weights.py SHRUNK.npz RESTORED.npz
"""

import sys
from pathlib import Path

import numpy as np

LOW, HIGH = "|low", "|high"


def shrink(source: Path, target: Path) -> None:
    """An .npz of `vpm_jax.convert`, without the ImageNet classifier, kernels rounded to float16.

    Their low and high bytes are stored apart: the high ones compress.
    """
    arrays = {}
    with np.load(source) as given:
        for name in given.files:
            x = given[name]
            if name.startswith("fc."):
                continue
            if x.ndim < 4:
                arrays[name] = x
                continue
            with np.errstate(over="ignore"):
                halves = x.astype(np.float16)
            if not np.isfinite(halves).all():
                raise ValueError(f"{name} in {source} does not fit into float16")
            planes = halves[..., None].view(np.uint8)
            arrays[name + LOW], arrays[name + HIGH] = planes[..., 0], planes[..., 1]
    np.savez_compressed(target, **arrays)


def restore(source: Path, target: Path) -> None:
    """The inverse of `shrink`, for config.pretrained."""
    arrays = {}
    with np.load(source) as given:
        for name in given.files:
            if name.endswith(LOW):
                name = name.removesuffix(LOW)
                planes = np.stack([given[name + LOW], given[name + HIGH]], axis=-1)
                arrays[name] = planes.view(np.float16)[..., 0].astype(np.float32)
            elif not name.endswith(HIGH):
                arrays[name] = given[name]
    np.savez(target, **arrays)


if __name__ == "__main__":
    restore(Path(sys.argv[1]), Path(sys.argv[2]))
