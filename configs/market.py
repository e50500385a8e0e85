"""Market-1501, the paper's recipe (where the paper is silent, the authors' later released code).

    python -m vpm_jax.train --config configs/market.py --config.data.root=DATA

Not yet run in full.

`:small` is a small network at 128x64, from scratch, for two CPU cores in under an hour:

    python -m vpm_jax.train --config configs/market.py:small --config.data.root=DATA

40 epochs of 93 steps of 64 images: 49 minutes at the 77 to 87 images/s of two cores, 68 at the 59 of one; rank-1 / mAP
27.9 / 17.5 at gamma 0.5, 65.9 / 43.1 at 0.7, 75.5 / 51.7 whole (seed 0, commit d1b4c3a; docs/results).
"""

from vpm_jax.config import default, small


def get_config(variant: str = ""):
    if variant not in ("", "small"):
        raise ValueError(f"configs/market.py has no variant {variant!r}, only 'small'")
    return small() if variant else default()
