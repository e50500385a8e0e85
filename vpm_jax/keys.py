"""Every key of a config: its default (the paper's recipe), its meaning, its values, and what depends on it.

`python -m vpm_jax.config` prints this table, and all that `config` does follows from it. Where the paper is silent,
defaults are those of the authors' released code.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vpm_jax.data.datasets import NAMES
from vpm_jax.geometry import PLACES
from vpm_jax.regions import CROPS


class Flag(enum.Flag):
    """What is special about a key. Without a flag, the weights depend on it and a run keeps it to its end."""

    NONE = 0
    RESUME = enum.auto()  # may change when a run is resumed
    EVALUATE = enum.auto()  # may change when a run is evaluated or reported
    PROCESS = enum.auto()  # may differ between the processes of a job
    NO_RESULT = enum.auto()  # no result of `reproduce` depends on it
    PROTOCOL = enum.auto()  # the same in all runs that `reproduce --parts` compares
    # Features depend on it: a part of VPM.fingerprint. One more such key, or another order, changes the fingerprint of
    # every model, and searches refuse every store of features.
    FEATURES = enum.auto()
    WEIGHTS = enum.auto()  # pretrained weights set it


RESUME, EVALUATE, PROCESS, NO_RESULT = Flag.RESUME, Flag.EVALUATE, Flag.PROCESS, Flag.NO_RESULT
PROTOCOL, FEATURES, WEIGHTS = Flag.PROTOCOL, Flag.FEATURES, Flag.WEIGHTS
MACHINE = RESUME | EVALUATE | PROCESS | NO_RESULT  # where and how a process works
RECORD = RESUME | NO_RESULT  # how a run is recorded and carried out
EVALUATION = RESUME | EVALUATE


class Values(NamedTuple):
    """The values that a key takes, among those of its default's type; numbers are finite and not negative anyway."""

    expected: str  # the words for them
    holds: Callable[[Any], bool]


ANY = Values("finite numbers from 0", lambda value: True)


def one_of(*choices: Any) -> Values:
    return Values(f"one of {', '.join(map(str, choices))}", lambda value: value in choices)


def at_least(low: int) -> Values:
    return Values(f"at least {low}", lambda value: value >= low)


def between(low: float, high: float) -> Values:
    return Values(f"a number from {low} to {high}", lambda value: low <= value <= high)


def _whole(values: tuple, *allowed: int) -> bool:
    return all(type(n) is int and (n in allowed if allowed else n > 0) for n in values)


GAMMA = Values(
    "(low, high) with 0 < low <= high, or quantiles that ascend so",
    lambda gamma: len(gamma) > 1 and gamma[0] > 0 and list(gamma) == sorted(gamma),
)
AREA = Values("(low, high) with 0 < low <= high <= 1", lambda area: len(area) == 2 and 0 < area[0] <= area[1] <= 1)
RATIOS = Values("kept area ratios in (0, 1]", lambda gammas: bool(gammas) and all(0 < g <= 1 for g in gammas))
INNER_RATIOS = Values("kept area ratios between 0 and 1", lambda gammas: all(0 < g < 1 for g in gammas))
GRID = Values("(rows, cols), at least 1 each", lambda grid: len(grid) == 2 and _whole(grid))
STRIDES = Values("1 or 2 for stages 1 to 3", lambda strides: len(strides) == 3 and _whole(strides, 1, 2))
MEAN = Values("three numbers: red, green and blue", lambda mean: len(mean) == 3)
STD = Values("three numbers above 0: red, green and blue", lambda std: len(std) == 3 and all(std))


class Key(NamedTuple):
    """A key of the config."""

    name: str  # with the dots
    default: Any
    meaning: str
    values: Values = ANY
    flags: Flag = Flag.NONE


STAGE = (
    Key("epochs", 0, "epochs; 0: the stage is left out"),
    Key("steps_per_epoch", 0, "0: images // batch (plain), training identities // identities (pk)"),
    Key("sampling", "pk", "pk: identities x images_per_identity; plain: shuffled images", one_of("pk", "plain")),
    Key("identities", 8, "identities in a batch", at_least(1)),
    Key("images_per_identity", 8, "images of each identity in a batch", at_least(1)),
    Key("triplet_weight", 0.0, "weight of the triplet loss"),
    Key("triplet_start", 0.0, "epochs of this stage before the triplet loss joins"),
    Key("learning_rate", 0.1, "learning rate of new layers; see optim.backbone_multiplier"),
    Key("schedule", "step", "step: times decay after each of decay_epochs; cosine: to zero", one_of("step", "cosine")),
    Key("decay", 0.1, "factor of the learning rate at each of decay_epochs"),
    Key("decay_epochs", (30,), "epochs of this stage after which the learning rate decays"),
    Key("warmup_epochs", 0.0, "epochs in which the learning rate rises linearly from zero"),
    Key("height", 0, "pixels that the network sees in this stage; 0: data.height"),
    Key("width", 0, "pixels that the network sees in this stage; 0: data.width"),
)


def _stage(name: str, **defaults: Any) -> tuple[Key, ...]:
    return tuple(key._replace(name=f"{name}.{key.name}", default=defaults.get(key.name, key.default)) for key in STAGE)


KEYS = (
    # ---- The run ----
    Key("recipe", "paper", "name of the recipe in reports; nothing branches on it", flags=RECORD),
    Key("seed", 0, "seed of the initial weights, the batches and dropout", flags=PROTOCOL),
    # KIND is keras, torchvision, timm, released or vpm; the content of a path without KIND tells it.
    Key("pretrained", "keras", "weights to start from: none | KIND:PATH | PATH; partial: in front loads what fits"),
    Key("log_every", 10, "steps between records of metrics.jsonl", at_least(1), RECORD),
    Key("checkpoint_every", 1, "epochs between checkpoints", at_least(1), RECORD),
    Key("keep_checkpoints", 2, "how many of the newest checkpoints are kept", at_least(1), RECORD),
    Key(
        "tracker",
        "none",
        "where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases",
        one_of("none", "tensorboard", "wandb", "tensorboard,wandb"),
        RECORD,
    ),
    Key("parallel", "jit", "jit: a mesh of all devices; pmap: the same step, mapped", one_of("jit", "pmap"), RECORD),
    # ---- Data ----
    Key(
        "data.name",
        "market1501",
        "the dataset, of vpm_jax.data.datasets; csv, identity_folders: your own images",
        one_of(*NAMES),
        PROTOCOL,
    ),
    Key(
        "data.root",
        "",
        "the dataset's folder, zip or CSV, or a folder that holds it; empty: $VPM_DATA, else ./data",
        flags=MACHINE | PROTOCOL,
    ),
    Key("data.height", 384, "pixels that the network sees", at_least(1), EVALUATE | FEATURES),
    Key("data.width", 128, "pixels that the network sees", at_least(1), EVALUATE | FEATURES),
    # Enlarging 128x64 to 384x128, linear is within 1 gray level of Pillow's bilinear (mean 0.3).
    Key(
        "data.resize",
        "linear",
        "interpolation: OpenCV's, or Pillow's to the last gray level",
        one_of("linear", "area", "cubic", "pil_bilinear", "pil_bicubic"),
        FEATURES,
    ),
    Key("data.fit", "stretch", "stretch: images fill the input; pad: with their proportions", one_of("stretch", "pad")),
    Key("data.place", "top", "where a padded image lies; random: in training, else center", one_of(*PLACES)),
    Key("data.aspect", 0.0, "height / width of a whole person; 0: the median of the training images, set by training"),
    Key("data.mean", (0.485, 0.456, 0.406), "subtracted from RGB in [0, 1]", MEAN, FEATURES | WEIGHTS),
    Key("data.std", (0.229, 0.224, 0.225), "by which RGB minus data.mean is divided", STD, FEATURES | WEIGHTS),
    Key("data.crop", "top", "what a training crop keeps of an image", one_of(*CROPS)),
    # Quantiles are at equal steps from the least to the most, as python -m vpm_jax.extents finds them in images.
    Key("data.gamma", (0.5, 1.0), "area ratios that crops keep: min(1, U(low, high)), or their quantiles", GAMMA),
    Key("data.whole", 0.0, "share of the training images that stay whole, whatever data.crop says", between(0, 1)),
    Key("data.mix", 0.0, "share of the training images that data.mix_crop crops", between(0, 1)),
    Key("data.mix_crop", "any", "what the crops of data.mix keep", one_of(*CROPS)),
    Key("data.flip", 0.5, "probability that a training image is mirrored", between(0, 1)),
    Key(
        "data.pad",
        0.0,
        "a crop moves by up to this share of its height and width; past the image is the mean color",
        between(0, 0.49),
    ),
    Key("data.jitter", 0.0, "brightness and contrast are multiplied by U(1 - jitter, 1 + jitter)", between(0, 0.99)),
    # Random erasing (Zhong et al., AAAI 2020). The rectangle's aspect is log-uniform from 0.3 to 1 / 0.3, and its cells
    # keep their labels.
    Key("data.erasing", 0.0, "probability that a rectangle becomes the mean color", between(0, 1)),
    Key("data.erasing_area", (0.02, 0.4), "share of the image that the rectangle covers", AREA),
    Key("data.erasing_hides", 1.0, "a region that loses a larger share is invisible; 1: never", between(0, 1)),
    # Identities of a further set are others than the dataset's, whatever their numbers.
    Key("data.also_train", "", "further training sets, NAME or NAME:PATH, separated by commas", flags=EVALUATE),
    Key(
        "data.distractors",
        "",
        "folder or zip of images of nobody that join the gallery; it may lie beside the splits",
        flags=EVALUATION | PROTOCOL,
    ),
    Key(
        "data.identity_zero",
        "distractor",
        "identity 0 where images are named as Market-1501's: distractor (nobody) or person",
        one_of("distractor", "person"),
        PROTOCOL,
    ),
    Key("data.holdout_identities", 0, "training identities held out, to choose by", flags=PROTOCOL),
    Key("data.workers", 0, "loader processes; 0: threads of the run's own", flags=MACHINE),
    Key("data.threads", 2, "loader threads of each process", at_least(1), MACHINE),
    # Images that cannot be decoded always stop an evaluation: its numbers would be of another protocol. Links that lead
    # nowhere and other files that cannot be used are left out of the test set too by "skip".
    Key(
        "data.corrupt",
        "error",
        "a training image that cannot be read: error stops; skip takes another of its identity",
        one_of("error", "skip"),
        RECORD | EVALUATE,
    ),
    Key("data.synthetic.seed", 0, "seed of the synthetic pedestrians, which are rendered on first use", flags=PROTOCOL),
    Key("data.synthetic.train_identities", 200, "synthetic identities to train on", flags=PROTOCOL),
    Key("data.synthetic.test_identities", 200, "synthetic identities to evaluate on", flags=PROTOCOL),
    Key("data.synthetic.images_per_camera", 2, "images of each identity by each camera", flags=PROTOCOL),
    Key("data.synthetic.cameras", 4, "cameras that see each identity", flags=PROTOCOL),
    # ---- The network ----
    Key("model.depth", 50, "layers of the ResNet", one_of(18, 34, 50, 101), FEATURES),
    Key("model.width", 64, "channels of the first stage's 3x3 convolutions", at_least(1), FEATURES),
    Key(
        "model.stem",
        "7x7",
        "7x7: stride 2 and max pooling; 3x3: stride 2, no pooling; 4x4: patches, stride 4",
        one_of("7x7", "3x3", "4x4"),
        FEATURES,
    ),
    Key("model.strides", (1, 2, 2), "strides of the first three stages", STRIDES, FEATURES),
    Key("model.last_stride", 1, "stride of stage 4", one_of(1, 2), FEATURES),
    Key(
        "model.stride_on",
        "3x3",
        "which convolution of a block has its stride: 3x3 in torchvision, 1x1 in Caffe and Keras",
        one_of("3x3", "1x1"),
        FEATURES | WEIGHTS,
    ),
    Key("model.bn_epsilon", 1e-5, "added to the variance by the backbone's batch norms", flags=FEATURES | WEIGHTS),
    Key("model.grid", (6, 1), "rows and columns of regions", GRID, FEATURES),
    Key(
        "model.locator",
        "pixel",
        "pixel: Eq. 1; row: the released code's; stripes: PCB's fixed partition",
        one_of("pixel", "row", "stripes"),
        FEATURES,
    ),
    Key("model.locator_groups", 1, "channels averaged into one in front of the row locator", at_least(1), FEATURES),
    Key(
        "model.locator_stage",
        4,
        "stage whose map the locator reads: 4 is T; 3 needs last_stride 1",
        one_of(3, 4),
        FEATURES,
    ),
    Key("model.locator_hidden", 0, "channels of a 3x3 convolution and ReLU in front of the pixel locator; 0: none"),
    Key("model.locator_dropout", 0.0, "dropout in front of the locator", between(0, 0.99)),
    # Kaiming fan-out saturates Eq. 1 on T's 2048 channels: L_R starts at 50.
    Key("model.locator_init_std", 0.01, "standard deviation of the locator's initial weights; 0: Kaiming fan-out"),
    Key("model.pool_gradient", True, "identity and triplet gradients flow through the probability maps"),
    # BNNeck: Luo et al., CVPRW 2019, whose heads have dim 0, no dropout and no bias; see match.feature.
    Key(
        "model.neck",
        "none",
        "bn: scale-only batch norm between the region features and the identity heads",
        one_of("none", "bn"),
    ),
    Key("model.head_dim", 256, "channels of an identity head's reducer; 0: it classifies the region feature itself"),
    Key("model.head_dropout", 0.5, "dropout in the identity heads", between(0, 0.99)),
    Key("model.head_bias", True, "classifiers have a bias"),
    Key("model.head_bn_visible_only", True, "batch statistics of heads and neck are of visible regions alone"),
    Key("model.global_head", False, "one more identity head, on the global average"),
    Key("model.dummy_classes", 0, "identity classes that no image has"),
    Key("model.num_identities", 0, "identity classes; the training set decides"),
    Key(
        "model.dtype",
        "auto",
        "precision of the network; auto: bfloat16 on GPU and TPU, float32 on CPU",
        one_of("auto", "float32", "bfloat16", "float64"),
    ),
    # ---- Losses ----
    Key("loss.region_weight", 1.0, "weight of the region loss"),
    Key("loss.identity_weight", 1.0, "weight of the identity loss"),
    Key(
        "loss.identity_reduction",
        "image",
        "image: mean over images of the sum over regions; region: sum of each region's mean over images that show it",
        one_of("image", "region"),
    ),
    Key("loss.identity_regions", "visible", "regions in the identity loss; all: MVPM-3", one_of("visible", "all")),
    Key(
        "loss.triplet_pairs",
        "visible",
        "regions in a pair's distance: visible (Eq. 7), all (MVPM-2), soft (released code)",
        one_of("visible", "all", "soft"),
    ),
    Key("loss.triplet_normalize", True, "the triplet loss takes features of unit length"),
    # With x = D_positive - D_negative + margin. Soft never lets go of a pair (Hermans et al., 2017, with margin 0).
    Key("loss.hinge", "hard", "triplet loss: hard, max(0, x); soft, log(1 + exp(x))", one_of("hard", "soft")),
    Key("loss.margin", 1.0, "margin of the triplet loss"),
    Key("loss.min_cells", 1, "a region that spans fewer cells is invisible", at_least(1)),
    Key("loss.label_smoothing", 0.0, "smoothing of identity labels", between(0, 0.99)),
    Key("loss.region_smoothing", 0.0, "smoothing of region labels", between(0, 0.99)),
    # ---- The optimizer ----
    Key("optim.name", "sgd", "the optimizer", one_of("sgd", "adamw")),
    Key("optim.momentum", 0.9, "momentum of sgd, first beta of adamw", between(0, 0.9999)),
    Key("optim.nesterov", True, "Nesterov momentum"),
    # On every parameter.
    Key("optim.weight_decay", 5e-4, "sgd: coupled; adamw: decoupled, times the learning rate"),
    # With "stages" momentum starts from zero in each, so that a stage is a fine-tuning of the last.
    Key(
        "optim.schedule",
        "stages",
        "stages: each stage has its own schedule and starts without momentum; cosine: one over the whole run",
        one_of("stages", "cosine"),
    ),
    Key("optim.clip", 0.0, "a larger norm of the whole gradient is scaled down to this; 0: never"),
    Key("optim.backbone_multiplier", 0.1, "factor of the backbone's learning rate"),
    Key("optim.ema", 0.0, "decay of the averaged weights that are evaluated; 0: the last ones", between(0, 0.999999)),
    # ---- The stages of training ----
    *_stage("stage1", epochs=50, steps_per_epoch=202, sampling="plain"),
    *_stage("stage2", epochs=80, triplet_weight=1.0),
    # ---- Matching ----
    Key(
        "match.feature", "before", "features before or after the neck", one_of("before", "after"), EVALUATION | FEATURES
    ),
    Key("match.squared", False, "squared distances of regions", flags=EVALUATION),
    Key(
        "match.visibility",
        "soft",
        "weights of regions: soft (Eq. 4), saturated, uniform (MVPM-1), binary",
        one_of("soft", "saturated", "uniform", "binary"),
        EVALUATION,
    ),
    # Of the part that data.crop keeps: each query is compared with the gallery crop that shows what it shows itself, as
    # estimated from its region map. As many times the work; () is the paper's.
    Key("match.gallery_gammas", (), "area ratios of gallery crops, besides whole images", INNER_RATIOS, EVALUATION),
    Key("match.rerank", False, "k-reciprocal re-ranking", flags=EVALUATION),
    Key("match.rerank_k1", 20, "neighbors in k-reciprocal sets", at_least(1), EVALUATION),
    Key("match.rerank_k2", 6, "neighbors in local query expansion", at_least(1), EVALUATION),
    Key("match.rerank_lambda", 0.3, "weight of the original distance", between(0, 1), EVALUATION),
    # ---- Evaluation ----
    Key("eval.gammas", (0.5, 0.6, 0.7, 0.8, 0.9, 1.0), "area ratios that queries keep", RATIOS, EVALUATION | PROTOCOL),
    Key("eval.crop", "top", "what query crops keep", one_of(*CROPS), EVALUATION | PROTOCOL),
    Key(
        "eval.same_camera",
        "drop",
        "gallery images of a query's identity and camera: drop: not ranked for it; keep: ranked",
        one_of("drop", "keep"),
        EVALUATION | PROTOCOL,
    ),
    Key("eval.flip", False, "features and visibility are means over mirror images too", flags=EVALUATION | FEATURES),
    Key("eval.batch", 128, "images in a batch", at_least(1), EVALUATION | NO_RESULT),
    # The best is remembered, and the checkpoint that is reported stays the last. Only with data.holdout_identities:
    # choosing by the test set makes its numbers worthless.
    Key("eval.every", 0, "epochs between records of evaluations.jsonl; 0: none", flags=EVALUATION | NO_RESULT),
)

LISTED = "python -m vpm_jax.config lists the keys"  # of error messages and helps

# Keys that configs and results of earlier versions have, and what to do instead; see `config.from_json`.
RETIRED = {"model.name": "leave it out, for there is one model", "tensorboard": "set tracker to tensorboard"}


def keys_with(flag: Flag) -> tuple[str, ...]:
    """The names of the keys that have a flag, in the order of the table."""
    return tuple(key.name for key in KEYS if flag in key.flags)


def in_words(names: Sequence[str]) -> str:
    """The names with commas, a group of which none is missing as one: "seed, data.root, match.*"."""
    words = []
    for name in names:
        group, dot, _ = name.partition(".")
        whole = dot and all(key.name in names for key in KEYS if key.name.startswith(f"{group}."))
        words.append(f"{group}.*" if whole else name)
    return ", ".join(dict.fromkeys(words))
