"""Market-1501, the paper's recipe (where the paper is silent, the authors' later released code).

    python -m vpm_jax.train --config configs/market.py --config.data.root=DATA

Not yet run in full.

`:small` is a small network at 128x64, from scratch. It takes under an hour on two CPU cores:

    python -m vpm_jax.train --config configs/market.py:small --config.data.root=DATA

40 epochs of 93 steps of 64 images take 49 minutes on two cores (77 to 87 images/s) and 68 on one (59 images/s).
Rank-1 / mAP: 27.9 / 17.5 at gamma 0.5, 65.9 / 43.1 at 0.7, 75.5 / 51.7 on whole images (seed 0, commit d1b4c3a;
docs/results).

`:pretrained` is the paper's ResNet-50 from ImageNet weights, at 128x64, for only 800 steps of 64 images:

    python -m vpm_jax.train --config configs/market.py:pretrained --config.data.root=DATA

It takes 61 minutes on two shared CPU cores. Rank-1 / mAP: 43.4 / 27.1 at gamma 0.5, 73.0 / 50.4 at 0.7, 81.3 / 59.9 on
whole images (seed 0; docs/results).
"""

from vpm_jax.config import default, small


def pretrained():
    config = small()
    config.recipe = "pretrained"
    config.pretrained = "keras"
    config.model.depth, config.model.width, config.model.stem, config.model.strides = 50, 64, "7x7", (1, 2, 2)
    config.optim.backbone_multiplier = 0.5
    stage = config.stage2
    stage.epochs, stage.steps_per_epoch, stage.triplet_start, stage.warmup_epochs = 10, 80, 1.0, 1.0
    return config


def get_config(variant: str = ""):
    if variant not in ("", "small", "pretrained"):
        raise ValueError("there is no such variant, only small and pretrained")
    return {"": default, "small": small, "pretrained": pretrained}[variant]()
