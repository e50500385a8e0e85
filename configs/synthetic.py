"""Synthetic pedestrians: renders, trains and evaluates anywhere, without a download.

    python -m vpm_jax.train --config configs/synthetic.py

Set-up included about 8 minutes on two CPU cores; rank-1 / mAP 30.5 / 34.8 at gamma 0.5, 79.8 / 73.9 whole (seed 0,
chance 0.34; docs/results; 32.0 / 35.4 and 77.9 / 73.0 on two threads, which round differently).
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
