"""Synthetic pedestrians: renders, trains and evaluates anywhere, without a download.

    python -m vpm_jax.train --config configs/synthetic.py

About 8 minutes on two CPU cores, set-up included. Rank-1 / mAP of seed 0, in the runs so far: 27.9 to 32.5 / 32.9 to
35.6 at gamma 0.5 and 76.5 to 79.8 / 71.7 to 73.9 on whole images. Processors, versions and thread counts round
differently, so yours may be a few points outside. Chance is 0.34 (docs/results).
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
