"""Your own images, listed in a CSV of path, identity, camera and split:

    path,identity,camera,split
    images/anna_1.jpg,anna,1,train
    images/anna_2.jpg,anna,2,train
    images/bob_1.jpg,bob,1,query
    images/bob_2.jpg,bob,2,gallery

    python -m vpm_jax.train --config configs/own.py --config.data.root=own.csv

Paths are relative to the CSV, identities any text or number (-1: nobody, left out), cameras numbers; without the
column camera nothing is dropped by it. Training needs 8 identities or more (32 with `:small`), else lower
`--config.stage2.identities`. With rows of `train` alone, `--config.data.holdout_identities=20` makes 20 of those
identities query and gallery.

`:small` is a small network at 128x64, from scratch, for CPU cores:

    python -m vpm_jax.train --config configs/own.py:small --config.data.root=own.csv

Crops are those of the paper, which keep the top: `--config.data.crop` and `--config.eval.crop` choose others.
"""

from vpm_jax.config import default, small


def get_config(variant: str = ""):
    if variant not in ("", "small"):
        raise ValueError(f"configs/own.py has no variant {variant!r}, only 'small'")
    config = small() if variant else default()
    config.data.name = "csv"
    config.stage1.steps_per_epoch = 0  # a whole pass over the images
    return config
