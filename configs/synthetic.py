"""Synthetic pedestrians: renders, trains and evaluates anywhere, without a download.

    python -m vpm_jax.train --config configs/synthetic.py

Set-up included 6.5 to 8 minutes on two CPU cores; rank-1 / mAP 16.5 / 21.2 at gamma 0.5, 67.1 / 61.9 whole (seed 0,
chance 0.34; another jaxlib gave 15.4 / 20.5 and 65.2 / 60.8).
"""

from vpm_jax.config import small


def get_config():
    config = small()
    config.recipe = "synthetic"
    config.data.name = "synthetic"
    config.stage2.epochs, config.stage2.steps_per_epoch = 16, 25
    config.stage2.triplet_start = 4.0
    config.stage2.warmup_epochs = 1.0
    return config
