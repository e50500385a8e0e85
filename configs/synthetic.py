"""Synthetic pedestrians: renders, trains and evaluates anywhere, without a download.

python -m vpm_jax.train --config configs/synthetic.py
"""

from vpm_jax.config import small


def get_config():
    config = small()
    config.recipe = "synthetic"
    config.data.name = "synthetic"
    config.stage2.epochs = 8
    config.stage2.triplet_start = 2.0
    config.stage2.warmup_epochs = 1.0
    return config
