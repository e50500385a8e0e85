"""Market-1501, the recipe of the authors' released code (PyTorch 1.0, 2020), which differs from the paper.

    python -m vpm_jax.train --config configs/market_released.py --config.data.root=DATA

130 epochs, 773,760 images at 384x128, take four and a half minutes on a shared H200. Rank-1 / mAP: 67.5 / 44.3 at gamma
0.5, 91.8 / 75.6 on whole images (seed 0; docs/results/gpu).
"""

from vpm_jax.config import default, stage


def get_config():
    config = default()
    config.recipe = "released"
    config.data.gamma = (0.5, 13 / 12)  # 1 crop in 7 stays whole
    config.model.locator = "row"
    config.model.locator_dropout = 0.5
    config.model.locator_groups = 8
    config.model.locator_init_std = 0.0
    config.model.pool_gradient = False
    config.model.head_bn_visible_only = False
    config.model.global_head = True
    config.model.dummy_classes = 1
    config.loss.min_cells = 2
    config.loss.region_weight = 0.5
    config.loss.identity_reduction = "region"
    config.loss.triplet_pairs = "soft"
    config.stage1 = stage()
    config.stage2 = stage(epochs=130, triplet_weight=3.0, decay=0.2, decay_epochs=(80,))
    config.match.squared = True
    return config
