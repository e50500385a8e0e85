"""Synthetic pedestrians: renders, trains and evaluates anywhere, without a download.

python -m vpm_jax.train --config configs/synthetic.py
"""

from vpm_jax.config import small


def get_config():
    config = small()
    config.recipe = "synthetic"
    config.data.name = "synthetic"
    config.model.width, config.model.strides = 24, (1, 2, 1)  # T 16 x 8 x 192
    config.stage2.epochs = 16
    config.stage2.triplet_start = 4.0
    config.stage2.warmup_epochs = 1.0
    return config
