"""Market-1501, the paper's recipe (where the paper is silent, the authors' later released code).

    python -m vpm_jax.train --config configs/market.py --config.data.root=DATA

`:small` is a small network at 128x64, from scratch, for two CPU cores in under an hour:

    python -m vpm_jax.train --config configs/market.py:small --config.data.root=DATA
"""

from vpm_jax.config import default, stage


def get_config(variant: str = ""):
    config = default()
    if variant == "small":
        small(config)
    elif variant:
        raise ValueError(f"configs/market.py has no variant {variant!r}, only 'small'")
    return config


def small(config):
    """A width-24 ResNet-18 with T 16 x 8 x 192, and what makes so short a training converge."""
    config.recipe = "small"
    config.pretrained = "none"
    config.data.height, config.data.width = 128, 64
    config.data.gamma = (0.5, 13 / 12)
    config.model.depth, config.model.width, config.model.stem = 18, 24, "3x3"
    config.model.grid = (4, 1)
    config.model.locator_init_std = 0.01
    config.loss.margin = 0.3
    config.loss.identity_reduction = "region"
    config.loss.identity_weight = 0.25
    config.optim.backbone_multiplier = 1.0
    config.stage1 = stage()
    config.stage2 = stage(epochs=40, triplet_weight=1.0, triplet_start=10.0, schedule="cosine", warmup_epochs=3.0)
