"""Every key of an experiment, its default (the paper's recipe) and its meaning; loading and checking.

A file under `configs/` starts from `default()` and sets what differs. Recipes are values: no code asks
which recipe it runs.

A config is *asked*: a file and overrides. Training makes it *resolved*: `train.resolve` sets what the training set
decides, `for_weights` what pretrained weights presuppose. config.json holds the resolved config, and models, steps and
evaluations take it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vpm_jax.errors import UserError
from vpm_jax.geometry import PLACES
from vpm_jax.regions import CROPS, HEIGHTS


def stage(**changes) -> ConfigDict:
    """One training stage. Momentum starts from zero in each, so a stage is a fine-tuning of the last."""
    values = dict(
        epochs=0,
        steps_per_epoch=0,  # 0: images // batch (plain), identities // stage.identities (pk)
        sampling="pk",  # "pk": `identities` x `images_per_identity`; "plain": a shuffled epoch
        identities=8,
        images_per_identity=8,
        triplet_weight=0.0,
        triplet_start=0.0,  # epochs of this stage before the triplet loss joins
        learning_rate=0.1,
        schedule="step",  # "step": times `decay` after each of decay_epochs; "cosine": to zero
        decay=0.1,
        decay_epochs=(30,),
        warmup_epochs=0.0,  # linear from zero
        height=0,  # of the network's input in this stage, in pixels; 0: data.height
        width=0,
    )
    if unknown := set(changes) - set(values):
        raise UserError(f"A stage has no key {', '.join(sorted(unknown))}: it has {', '.join(values)}.")
    return ConfigDict(values | changes)


def default() -> ConfigDict:
    """The paper's recipe; where the paper is silent, the authors' released code."""
    c = ConfigDict()
    c.recipe = "paper"  # the name that reports carry; nothing branches on it
    c.seed = 0
    # "none"; KIND:PATH with keras, torchvision, timm, released or vpm ("keras" alone looks under the data root); or a
    # path whose content tells the kind. "partial:" in front loads what fits.
    c.pretrained = "keras"

    c.data = ConfigDict()
    c.data.name = "market1501"  # market1501 | dukemtmc | synthetic | csv (own images); for testing alone partial_reid,
    #                             partial_ilids
    c.data.root = (
        ""  # the dataset's folder or zip (csv: the file), or a folder that holds it; "" is $VPM_DATA, else ./data
    )
    c.data.height = 384
    c.data.width = 128
    c.data.crop = "top"  # what a training crop keeps: see vpm_jax.regions.CROPS
    # Kept area ratio ~ min(1, U(low, high)). More numbers are quantiles at equal steps from the least to the most, as
    # python -m vpm_jax.extents finds them in pictures.
    c.data.gamma = (0.5, 1.0)
    c.data.whole = 0.0  # share of the images that stay whole whatever crop says
    c.data.mix = 0.0  # share of the images that are cropped by mix_crop
    c.data.mix_crop = "any"
    c.data.flip = 0.5
    c.data.pad = 0.0  # the crop moves by up to this share of its height and width; past the image is the mean colour
    c.data.jitter = 0.0  # brightness and contrast are multiplied by U(1 - jitter, 1 + jitter)
    # Random erasing (Zhong et al., AAAI 2020): with this probability a rectangle becomes the mean colour. Its cells
    # keep their labels; a region that loses more than erasing_hides of them leaves the visible set (1: none does).
    c.data.erasing = 0.0
    c.data.erasing_area = (0.02, 0.4)  # of the picture's area; log-uniform aspect from 0.3 to 1 / 0.3
    c.data.erasing_hides = 1.0
    # "linear" | "area" | "cubic" (OpenCV), "pil_bilinear" | "pil_bicubic" (Pillow's own, to the last grey level).
    # Enlarging 128x64 to 384x128, linear is within 1 grey level of Pillow's bilinear (mean 0.3).
    c.data.resize = "linear"
    # How a picture fills the input (vpm_jax.geometry): "stretch" over all of it | "pad": in its proportions, rest empty
    c.data.fit = "stretch"
    c.data.place = "top"  # where a padded picture lies: "top" | "center" | "random" (in training; else the center)
    c.data.aspect = 0.0  # height / width of a whole person; 0: the median of the training images, set by training
    c.data.holdout_identities = 0  # training identities kept aside, for choosing things without a test set
    c.data.workers = 0  # loader processes; 0 loads in threads of this one
    c.data.threads = 2
    # A training image that cannot be read: "error" stops; "skip" takes the next of its identity that can, and says so.
    # An evaluation always stops: its numbers would be of another protocol.
    c.data.corrupt = "error"
    c.data.mean = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
    c.data.std = (0.229, 0.224, 0.225)
    # The synthetic pedestrians (rendered on first use).
    c.data.synthetic = ConfigDict(
        dict(seed=0, train_identities=200, test_identities=200, images_per_camera=2, cameras=4)
    )

    c.model = ConfigDict()
    c.model.depth = 50  # 18 | 34 | 50 | 101
    c.model.width = 64  # channels of the first stage's 3x3 convolutions
    c.model.stem = "7x7"  # "7x7": stride 2 and max pooling; "3x3": stride 2, no pooling; "4x4": patches, stride 4
    c.model.strides = (1, 2, 2)  # of stages 1 to 3
    c.model.last_stride = 1
    c.model.stride_on = "3x3"  # "3x3" (torchvision) or "1x1" (Caffe, Keras); pretrained weights set it
    c.model.bn_epsilon = 1e-5  # pretrained weights set it
    c.model.grid = (6, 1)
    c.model.locator = "pixel"  # "pixel" (Eq. 1) | "row" | "stripes" (PCB's fixed partition)
    c.model.locator_hidden = 0  # channels of a 3x3 convolution and ReLU in front of the pixel locator; 0: none
    c.model.locator_stage = 4  # whose feature map the locator reads: 4 is T | 3, where it is of T's size
    c.model.locator_dropout = 0.0
    c.model.locator_groups = 1  # channels averaged in groups of this many before the row locator
    c.model.locator_init_std = 0.01  # 0: Kaiming fan-out, which saturates Eq. 1 on T's 2048 channels (L_R starts at 50)
    c.model.pool_gradient = True  # identity and triplet gradients flow through the probability maps
    # "bn": batch norm of the region features, scaled but not shifted, between the triplet loss and the identity heads
    # (BNNeck: Luo et al., CVPRW 2019, whose heads have dim 0, no dropout and no bias); see match.feature.
    c.model.neck = "none"
    c.model.head_dim = 256  # 0: the classifier is on the region feature itself
    c.model.head_dropout = 0.5
    c.model.head_bias = True
    c.model.head_bn_visible_only = True  # the neck's too
    c.model.global_head = False  # one more identity head, on the global average
    c.model.dummy_classes = 0  # identity classes that no image has
    c.model.num_identities = 0  # set from the training set
    c.model.dtype = "auto"  # "float32" | "bfloat16"; auto: bfloat16 on GPU and TPU

    c.loss = ConfigDict()
    c.loss.region_weight = 1.0
    c.loss.identity_weight = 1.0
    c.loss.identity_reduction = "image"  # "image": sum over visible regions, mean over images;
    #                                      "region": mean over the images that show a region, sum over regions
    c.loss.identity_regions = "visible"  # "visible" | "all" (MVPM-3)
    c.loss.triplet_pairs = "visible"  # "visible" (Eq. 7) | "all" (MVPM-2) | "soft" (released)
    c.loss.triplet_normalize = True  # on features of unit length
    c.loss.hinge = "hard"  # "hard": max(0, x) of x = D_positive - D_negative + margin | "soft": log(1 + exp(x)), which
    #                        never lets go of a pair (Hermans et al., 2017, with margin 0)
    c.loss.margin = 1.0
    c.loss.min_cells = 1  # a region spanning fewer cells is invisible
    c.loss.label_smoothing = 0.0
    c.loss.region_smoothing = 0.0  # the same of the region labels

    c.optim = ConfigDict()
    c.optim.name = "sgd"  # | "adamw": weight_decay times the learning rate, momentum is its first beta
    c.optim.momentum = 0.9
    c.optim.nesterov = True
    c.optim.weight_decay = 5e-4  # coupled, on every parameter
    # "stages": each stage has its own schedule and starts without momentum | "cosine": one over the whole run
    c.optim.schedule = "stages"
    c.optim.clip = 0.0  # a larger norm of the whole gradient is scaled down to this; 0: never
    c.optim.backbone_multiplier = 0.1
    c.optim.ema = (
        0.0  # decay of the running average of weights and statistics that is evaluated; 0: none, the last ones
    )

    c.stage1 = stage(epochs=50, steps_per_epoch=202, sampling="plain")
    c.stage2 = stage(epochs=80, triplet_weight=1.0)

    c.match = ConfigDict()
    c.match.feature = "before"  # the neck | "after" it
    c.match.squared = False
    c.match.visibility = "soft"  # "soft" (Eq. 4) | "saturated" | "uniform" (MVPM-1) | "binary"
    # Kept area ratios that the gallery is described at too, of the part that data.crop keeps: each query is compared
    # with the crop that shows what it shows itself, as its region map tells. As many times the work; () is the paper's.
    c.match.gallery_gammas = ()
    c.match.rerank = False  # k-reciprocal re-ranking: see vpm_jax.reranking, also for the next three
    c.match.rerank_k1 = 20
    c.match.rerank_k2 = 6
    c.match.rerank_lambda = 0.3

    c.eval = ConfigDict()
    c.eval.gammas = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    c.eval.crop = "top"
    c.eval.flip = False  # features and visibility are the means over an image and its mirror image
    c.eval.batch = 128
    c.eval.every = 0  # epochs; 0: only after training. Otherwise evaluations.jsonl grows as training goes on and the
    #                   best is remembered: sensible with data.holdout_identities alone, for choosing by the test set
    #                   makes its numbers worthless. The checkpoint that is reported stays the last one.

    c.log_every = 10  # steps
    c.checkpoint_every = 1  # epochs
    c.keep_checkpoints = 2
    c.tracker = "none"  # | "tensorboard" | "wandb" (Weights & Biases) | "tensorboard,wandb"
    c.parallel = "jit"  # "jit" over a data mesh | "pmap"
    return c.lock()


def small() -> ConfigDict:
    """A width-24 ResNet-18 on 128x64 images, T 16 x 8 x 192, and what makes so short a training converge.

    Many identities of few images in a batch, above all: after 600 steps on Market-1501 (100 identities held out), 32 x
    2 ranks 70.0 / 52.5 on whole queries where 16 x 4 ranks 64.4 / 46.5 (docs/results).
    """
    config = default()
    config.recipe = "small"
    config.pretrained = "none"
    config.data.height, config.data.width = 128, 64
    config.data.gamma = (0.5, 13 / 12)
    config.model.depth, config.model.width, config.model.stem, config.model.strides = 18, 24, "4x4", (1, 2, 1)
    config.model.grid = (4, 1)
    config.model.head_dropout = 0.0
    config.loss.margin = 0.3
    config.loss.identity_reduction = "region"
    config.loss.identity_weight = 0.25
    config.optim.backbone_multiplier = 1.0
    config.stage1 = stage()
    config.stage2 = stage(
        epochs=40,
        steps_per_epoch=93,
        identities=32,
        images_per_identity=2,
        triplet_weight=1.0,
        triplet_start=10.0,
        schedule="cosine",
        warmup_epochs=3.0,
    )
    return config


_CHOICES: dict[str, tuple] = {
    "data.name": ("market1501", "dukemtmc", "synthetic", "csv", "partial_reid", "partial_ilids"),
    "data.crop": CROPS,
    "data.mix_crop": CROPS,
    "data.corrupt": ("error", "skip"),
    "data.fit": ("stretch", "pad"),
    "data.place": tuple(PLACES),
    "data.resize": ("linear", "area", "cubic", "pil_bilinear", "pil_bicubic"),
    "eval.crop": CROPS,
    "model.depth": (18, 34, 50, 101),
    "model.stem": ("7x7", "3x3", "4x4"),
    "model.last_stride": (1, 2),
    "model.stride_on": ("3x3", "1x1"),
    "model.locator": ("pixel", "row", "stripes"),
    "model.locator_stage": (3, 4),
    "model.neck": ("none", "bn"),
    "model.dtype": ("auto", "float32", "bfloat16", "float64"),
    "loss.identity_reduction": ("image", "region"),
    "loss.identity_regions": ("visible", "all"),
    "loss.hinge": ("hard", "soft"),
    "optim.name": ("sgd", "adamw"),
    "optim.schedule": ("stages", "cosine"),
    "loss.triplet_pairs": ("visible", "all", "soft"),
    "match.feature": ("before", "after"),
    "match.visibility": ("soft", "saturated", "uniform", "binary"),
    "parallel": ("jit", "pmap"),
    "tracker": ("none", "tensorboard", "wandb", "tensorboard,wandb"),
} | {
    f"stage{n}.{k}": v for n in (1, 2) for k, v in {"sampling": ("pk", "plain"), "schedule": ("step", "cosine")}.items()
}

_POSITIVE: tuple[str, ...] = (
    "data.height",
    "data.width",
    "data.threads",
    "model.width",
    "model.locator_groups",
)
_POSITIVE += ("match.rerank_k1", "match.rerank_k2")
_POSITIVE += ("eval.batch", "log_every", "checkpoint_every", "keep_checkpoints", "loss.min_cells")
_POSITIVE += tuple(f"stage{n}.{k}" for n in (1, 2) for k in ("identities", "images_per_identity"))

# Keys that configs and results of earlier versions have, and what to do instead; see `from_json`.
RETIRED = {
    "model.name": "leave it out, for there is one model",
    "tensorboard": "set tracker to tensorboard",
}

BY_WEIGHTS = ("data.mean", "data.std", "model.stride_on", "model.bn_epsilon")  # what pretrained weights set

# What may differ from the run that a workdir holds ("eval." is the whole group); epochs may be added too, see
# `changed_keys`.
RESUMABLE = (
    "recipe",
    "data.root",
    "data.workers",
    "data.threads",
    "data.corrupt",
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "tracker",
    "parallel",
    "eval.",
    "match.",
)


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"data.height": 384, ...}: every leaf by its dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def set_key(config: ConfigDict, key: str, value: Any) -> None:
    """config.a.b = value for the key "a.b"."""
    *path, last = key.split(".")
    for part in path:
        config = config[part]
    with config.ignore_type():  # an int where a float stood
        config[last] = value


def for_weights(resolved: ConfigDict, weights: Any) -> ConfigDict:
    """A copy of the config with what pretrained weights presuppose: the normalization of their input, and what their
    network does otherwise than torchvision's.

    Args:
      resolved: the config.
      weights: a `pretrained.Pretrained`, or anything else with its stride_on, bn_epsilon, mean and std.
    """
    resolved = resolved.copy_and_resolve_references()
    for key in BY_WEIGHTS:
        group, last = key.split(".")
        resolved[group][last] = getattr(weights, last)
    return resolved


def check(config: ConfigDict) -> None:
    """Refuses values that no part can use.

    Raises:
      UserError: that names the key, the value and what was expected.
    """
    leaves = flatten(config)
    expected = flatten(default())
    for key in sorted(set(leaves) ^ set(expected)):
        raise UserError(
            f"Config key {key!r} is {'unknown' if key in leaves else 'missing'}: vpm_jax/config.py lists all."
        )
    for key, value in leaves.items():
        kind = type(expected[key])
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise UserError(f"Config key {key} is {value!r} ({type(value).__name__}), expected {kind.__name__}.")
    for key, choices in _CHOICES.items():
        if leaves[key] not in choices:
            raise UserError(f"Config key {key} is {leaves[key]!r}, expected one of {', '.join(map(str, choices))}.")
    for key in _POSITIVE:
        if leaves[key] < 1:
            raise UserError(f"Config key {key} is {leaves[key]}, expected at least 1.")
    for key, value in leaves.items():
        numbers = value if isinstance(value, tuple) else (value,) if isinstance(value, int | float) else ()
        if not all(isinstance(v, int | float) and math.isfinite(v) and v >= 0 for v in numbers):
            raise UserError(f"Config key {key} is {value}, expected finite numbers from 0.")
    ranges = {
        "data.flip": (0, 1),
        "match.rerank_lambda": (0, 1),
        "data.whole": (0, 1),
        "data.mix": (0, 1),
        "data.pad": (0, 0.49),
        "data.jitter": (0, 0.99),
        "data.erasing": (0, 1),
        "data.erasing_hides": (0, 1),
        "model.head_dropout": (0, 0.99),
        "model.locator_dropout": (0, 0.99),
        "loss.label_smoothing": (0, 0.99),
        "loss.region_smoothing": (0, 0.99),
        "optim.momentum": (0, 0.9999),
        "optim.ema": (0, 0.999999),
    }
    for key, (low, high) in ranges.items():
        if not low <= leaves[key] <= high:
            raise UserError(f"Config key {key} is {leaves[key]}, expected a number from {low} to {high}.")
    gamma = config.data.gamma
    if len(gamma) < 2 or not gamma[0] > 0 or list(gamma) != sorted(gamma):
        raise UserError(
            f"Config key data.gamma is {gamma}, expected (low, high) with 0 < low <= high, or quantiles that ascend so."
        )
    if config.match.feature == "after" and config.model.neck == "none":
        raise UserError('Config key match.feature is "after" but model.neck is "none": set model.neck to "bn".')
    if config.model.locator_stage == 3 and config.model.last_stride != 1:
        raise UserError("Config key model.locator_stage is 3, whose map is larger than T: set model.last_stride to 1.")
    if config.model.locator_hidden and config.model.locator != "pixel":
        raise UserError(
            f"Config key model.locator_hidden is {config.model.locator_hidden} but model.locator is "
            f"{config.model.locator!r}: only the pixel locator has hidden channels."
        )
    area = config.data.erasing_area
    if len(area) != 2 or not 0 < area[0] <= area[1] <= 1:
        raise UserError(f"Config key data.erasing_area is {area}, expected (low, high) with 0 < low <= high <= 1.")
    if config.data.whole + config.data.mix > 1:
        raise UserError(
            f"Config keys data.whole and data.mix are {config.data.whole} and {config.data.mix}, expected shares that "
            "leave none below 0 for data.crop: lower one."
        )
    if not config.eval.gammas or not all(0 < g <= 1 for g in config.eval.gammas):
        raise UserError(f"Config key eval.gammas is {config.eval.gammas}, expected kept area ratios in (0, 1].")
    m, d = config.model, config.data
    if len(d.mean) != 3:
        raise UserError(f"Config key data.mean is {d.mean}, expected three numbers: red, green and blue.")
    if len(d.std) != 3 or not all(d.std):
        raise UserError(f"Config key data.std is {d.std}, expected three numbers above 0: red, green and blue.")
    if len(m.strides) != 3 or not all(type(n) is int and n in (1, 2) for n in m.strides):
        raise UserError(f"Config key model.strides is {m.strides}, expected 1 or 2 for stages 1 to 3.")
    channels = m.width * 2 ** (m.locator_stage - 1) * (4 if m.depth >= 50 else 1)
    if m.locator == "row" and channels % m.locator_groups:
        raise UserError(
            f"Config key model.locator_groups is {m.locator_groups}, no divisor of the {channels} channels that "
            "the row locator reads: choose one that does."
        )
    if len(config.model.grid) != 2 or not all(type(n) is int and n > 0 for n in config.model.grid):
        raise UserError(f"Config key model.grid is {config.model.grid}, expected (rows, cols), at least 1 each.")
    if not config.stage1.epochs + config.stage2.epochs:
        raise UserError("Config keys stage1.epochs and stage2.epochs are both 0: there is nothing to train.")
    check_gallery_gammas(config)


def check_gallery_gammas(config: ConfigDict) -> None:
    """Refuses a match.gallery_gammas that the model cannot be evaluated with, or together with re-ranking."""
    gammas, m = config.match.gallery_gammas, config.model
    if not all(0 < gamma < 1 for gamma in gammas):
        raise UserError(f"Config key match.gallery_gammas is {gammas}, expected kept area ratios between 0 and 1.")
    reasons = {
        f"data.crop is {config.data.crop!r}: expected training crops of the top, bottom or bilateral": not sides(
            config
        ),
        "the model does not tell how much a query shows: expected two rows of regions or more, and no stripes": (
            m.grid[0] < 2 or m.locator == "stripes"
        ),
        "match.rerank is on: leave one of them out": config.match.rerank,
        f"eval.crop is {config.eval.crop!r}: expected queries cropped on the sides of training crops "
        f"({' and '.join(sides(config))}), as the gallery is": bool(
            set(HEIGHTS.get(config.eval.crop, ())) - set(sides(config))
        ),
    }
    if gammas and (wrong := [reason for reason, found in reasons.items() if found]):
        raise UserError(f"Config key match.gallery_gammas is {gammas}, but {wrong[0]}.")


def sides(config: ConfigDict) -> list[str]:
    """Which parts of a height training crops keep, of "top" and "bottom": what a gallery may be cropped to."""
    return sorted({side for strategy in crops(config) for side in HEIGHTS.get(strategy, ())}, reverse=True)


def crops(config: ConfigDict) -> set[str]:
    """The strategies, of `regions.CROPS`, that crop training images."""
    data = config.data
    return set([data.crop] * (data.whole + data.mix < 1) + [data.mix_crop] * (data.mix > 0))


def to_json(config: ConfigDict) -> str:
    """The config as JSON text, one key a line in the order of `default`."""
    return json.dumps(config.to_dict(), indent=2)


def from_json(text: str, source: str) -> ConfigDict:
    """The config that `to_json` wrote; keys added since take their defaults, and what has become of others is set.

    Raises:
      UserError: if `source` (a file's name) does not hold a config of this program.
    """
    try:
        saved = json.loads(text)
        config = default()
        if saved.get("tensorboard"):  # earlier versions had this key beside the tracker
            saved["tracker"] = "tensorboard" + ",wandb" * (saved.get("tracker") == "wandb")

        def fill(target, values, prefix=""):
            for key, value in values.items():
                if prefix + key in RETIRED:
                    continue
                if key not in target:
                    raise KeyError(f"unknown key {key!r}")
                if isinstance(value, dict):
                    fill(target[key], value, f"{prefix}{key}.")
                else:
                    with target.ignore_type():
                        target[key] = tuple(value) if isinstance(value, list) else value

        fill(config, saved)
        check(config)
    except (UserError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error.args[0] if error.args else error).splitlines()[0].removesuffix(".")
        raise UserError(
            f"{source} is not a config that this version reads ({reason}): mend it, or choose another workdir."
        ) from error
    return config


def read(workdir: Path) -> ConfigDict | None:
    """The resolved config of the run in a workdir, None without one. Raises UserError as `from_json`."""
    file = workdir / "config.json"
    return from_json(file.read_text(errors="replace"), str(file)) if file.is_file() else None


def changed_keys(saved: ConfigDict, now: ConfigDict) -> list[str]:
    """Keys by which `now` may not continue the run of `saved`, as "key: old -> new".

    The last stage may get more epochs where its schedule does not depend on their number.
    """
    old, new = flatten(saved), flatten(now)
    last = "stage2" if saved.stage2.epochs else "stage1"
    changed = []
    for key, value in new.items():
        if old[key] == value or key.startswith(RESUMABLE):
            continue
        stepwise = saved[last].schedule == "step" and saved.optim.schedule == "stages"
        if key == f"{last}.epochs" and value > old[key] and stepwise:
            continue
        changed.append(f"{key}: {old[key]} -> {value}")
    return changed
