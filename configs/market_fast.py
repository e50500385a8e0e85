"""Market-1501 from ImageNet weights in few images: small images first, one cosine.

    python -m vpm_jax.train --config configs/market_fast.py --config.data.root=DATA

ResNet-50, 6 x 1 regions, batches of 32 identities x 2 images: 960 steps at 128x64, then 480 at 256x128, 92,160 images.

`:large` has 1,600 steps at 256x128, then 720 at 384x128, 148,480 images: 91.6 / 77.3 rank-1 / mAP on whole images and
65.5 / 44.5 at gamma 0.5, where the short one has 87.0 / 68.1 and 51.7 / 33.7 (docs/results/gpu). With
`--config.stage1.epochs=12 --config.stage2.epochs=5` it takes two CPU cores two hours: 91.2 / 76.4 and 63.5 / 42.6.

`:padded` keeps the proportions of images, which on held-out identities is worse, and with data.stretch=1 about level
(docs/results).

SCREEN and EVALUATED list changes to try on held-out training identities (configs/market_plus.py explains them):

    python -m vpm_jax.reproduce --parts configs/market_fast.py --scale fast_screen
"""

from vpm_jax.config import default, stage

_RANKED = {"match.gallery_gammas": (0.5, 0.6, 0.7, 0.8, 0.9), "match.visibility": "saturated"}
_PADDED = {"data.fit": "pad"}

SCREEN: dict[str, dict[str, object]] = {
    "base": {},
    "ema": {"optim.ema": 0.99},
    "neck_reduced": {"model.neck": "bn"},
    "neck": {"model.neck": "bn", "model.head_dim": 0, "model.head_bias": False},
    "erasing": {"data.erasing": 0.5},
    "smoothing": {"loss.label_smoothing": 0.1},
    "locator_stage3": {"model.locator_stage": 3},
    "padded": _PADDED,
    "padded_ema": _PADDED | {"optim.ema": 0.99},
    "padded_stretch": _PADDED | {"data.stretch": 1.0},
    "padded_random": _PADDED | {"data.place": "random"},
}

EVALUATED: dict[str, tuple[str, dict[str, object]]] = {
    "saturated": ("base", {"match.visibility": "saturated"}),
    "flip": ("base", {"eval.flip": True}),
    "gallery_crops": ("base", _RANKED),
    "reranked": ("base", {"match.rerank": True}),
    "neck_after": ("neck", {"match.feature": "after"}),
    "neck_reduced_after": ("neck_reduced", {"match.feature": "after"}),
    "padded_stretch_gallery_crops": ("padded_stretch", _RANKED),
    "padded_saturated": ("padded", {"match.visibility": "saturated"}),
    "padded_flip": ("padded", {"eval.flip": True}),
    "padded_gallery_crops": ("padded", _RANKED),
}


def get_config(variant: str = ""):
    if variant not in ("", "large", "padded"):
        raise ValueError("there is no such variant, only large and padded")
    config = default()
    config.recipe = f"fast-{variant}" if variant else "fast"
    config.data.height, config.data.width = 256, 128
    config.data.fit = "pad" if variant == "padded" else "stretch"
    config.data.gamma = (0.5, 13 / 12)
    config.model.head_dropout = 0.0
    config.loss.margin = 0.3
    config.loss.identity_reduction = "region"
    config.loss.identity_weight = 0.25
    config.optim.backbone_multiplier = 0.5
    config.optim.schedule = "cosine"
    batches = dict(identities=32, images_per_identity=2, triplet_weight=1.0)
    config.stage1 = stage(
        epochs=12, steps_per_epoch=80, height=128, width=64, triplet_start=1.0, warmup_epochs=1.0, **batches
    )
    config.stage2 = stage(epochs=6, steps_per_epoch=80, **batches)
    if variant == "large":
        config.data.height = 384
        config.stage1.height, config.stage1.width = 256, 128
        config.stage1.epochs, config.stage2.epochs = 20, 9
    return config
