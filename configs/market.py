"""Market-1501, the paper's recipe (where the paper is silent, the authors' later released code).

    python -m vpm_jax.train --config configs/market.py --config.data.root=DATA

Not yet run in full.

`:small` is a small network at 128x64, from scratch, for two CPU cores in under an hour:

    python -m vpm_jax.train --config configs/market.py:small --config.data.root=DATA

59 minutes on one core; rank-1 / mAP 21.7 / 13.6 at gamma 0.5, 72.0 / 46.8 whole (seed 0; docs/results).
"""

from vpm_jax.config import default, small


def get_config(variant: str = ""):
    if variant not in ("", "small"):
        raise ValueError(f"configs/market.py has no variant {variant!r}, only 'small'")
    return small() if variant else default()
