"""Your own images, listed in a CSV of path, identity, camera and split:

    path,identity,camera,split
    images/anna_1.jpg,anna,1,train
    images/anna_2.jpg,anna,2,train
    images/bob_1.jpg,bob,1,query
    images/bob_2.jpg,bob,2,gallery

    python -m vpm_jax.train --config configs/own.py --config.data.root=own.csv

Paths are relative to the CSV. Identities are any text or number (-1: junk, left out). Cameras are numbers or text;
without that column nothing is dropped by camera. Training needs at least 8 identities (32 with `:small`); with fewer,
lower `--config.stage2.identities`. With `train` rows alone, `--config.data.holdout_identities=20` turns 20 of those
identities into query and gallery.

`:small` is a small network at 128x64, from scratch, for a CPU. It trains for 160 passes over the identities, whatever
their number:

    python -m vpm_jax.train --config configs/own.py:small --config.data.root=own.csv

Crops keep the top, as in the paper; `--config.data.crop` and `--config.eval.crop` select others.
"""

from vpm_jax.config import default, small


def get_config(variant: str = ""):
    if variant not in ("", "small"):
        raise ValueError("there is no such variant, only small")
    config = small() if variant else default()
    config.data.name = "csv"
    config.stage1.steps_per_epoch = 0  # a whole pass over the images
    if variant:  # epochs follow the data: 3,680 steps for 751 identities, 160 for up to 63
        stage = config.stage2
        stage.epochs, stage.steps_per_epoch, stage.triplet_start, stage.warmup_epochs = 160, 0, 40.0, 12.0
    return config
