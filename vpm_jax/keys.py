"""The table of config keys: default (the paper's recipe), meaning, values, and what depends on each key.

`config` works from this table, and `python -m vpm_jax.config` prints it. Where the paper is silent, defaults are those
of the authors' released code.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from vpm_jax.data.datasets import DATASETS
from vpm_jax.geometry import PLACES
from vpm_jax.regions import CROPS


class Flag(enum.Flag):
    """Properties of a key. A key without flags affects the trained weights and is fixed for the whole run."""

    NONE = 0
    RESUME = enum.auto()  # may change when a run is resumed
    EVALUATE = enum.auto()  # may change when a run is evaluated or reported
    PROCESS = enum.auto()  # may differ between the processes of a job
    NO_RESULT = enum.auto()  # results of `reproduce` do not depend on it
    PROTOCOL = enum.auto()  # equal in all runs that `reproduce --parts` compares
    # Features depend on it, so it enters VPM.fingerprint. Adding such a key or reordering them changes every model's
    # fingerprint, and searches then refuse existing feature stores.
    FEATURES = enum.auto()
    WEIGHTS = enum.auto()  # set by pretrained weights


RESUME, EVALUATE, PROCESS, NO_RESULT = Flag.RESUME, Flag.EVALUATE, Flag.PROCESS, Flag.NO_RESULT
PROTOCOL, FEATURES, WEIGHTS = Flag.PROTOCOL, Flag.FEATURES, Flag.WEIGHTS
MACHINE = RESUME | EVALUATE | PROCESS | NO_RESULT  # depends on the machine
RECORD = RESUME | NO_RESULT  # how a run is recorded and executed
EVALUATION = RESUME | EVALUATE


class Values(NamedTuple):
    """The allowed values of a key. All values have the default's type; all numbers are finite and not negative."""

    expected: str  # described in words
    holds: Callable[[Any], bool]


ANY = Values("finite non-negative numbers", lambda value: True)


def one_of(*choices: Any) -> Values:
    return Values(f"one of {', '.join(map(str, choices))}", lambda value: value in choices)


def at_least(low: int) -> Values:
    return Values(f"at least {low}", lambda value: value >= low)


def between(low: float, high: float) -> Values:
    return Values(f"a number from {low} to {high}", lambda value: low <= value <= high)


def _whole(values: tuple, *allowed: int) -> bool:
    return all(type(n) is int and (n in allowed if allowed else n > 0) for n in values)


GAMMA = Values(
    "(low, high) with 0 < low <= high, or ascending quantiles above 0",
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

    name: str  # dotted
    default: Any
    meaning: str
    values: Values = ANY
    flags: Flag = Flag.NONE


STAGE = (
    Key("epochs", 0, "epochs; 0: skip the stage"),
    Key("steps_per_epoch", 0, "steps per epoch; 0: images // batch (plain), training identities // identities (pk)"),
    Key("sampling", "pk", "pk: identities x images_per_identity; plain: shuffled images", one_of("pk", "plain")),
    Key("identities", 8, "identities in a batch", at_least(1)),
    Key("images_per_identity", 8, "images of each identity in a batch", at_least(1)),
    Key("triplet_weight", 0.0, "weight of the triplet loss"),
    Key("triplet_start", 0.0, "epochs of this stage before the triplet loss starts"),
    Key("learning_rate", 0.1, "learning rate of new layers; see optim.backbone_multiplier"),
    Key("schedule", "step", "step: times decay after each of decay_epochs; cosine: to zero", one_of("step", "cosine")),
    Key("decay", 0.1, "learning rate factor at each of decay_epochs"),
    Key("decay_epochs", (30,), "epochs of this stage after which the learning rate decays"),
    Key("warmup_epochs", 0.0, "epochs of linear learning rate warm-up from zero"),
    Key("height", 0, "input height in pixels in this stage; 0: data.height"),
    Key("width", 0, "input width in pixels in this stage; 0: data.width"),
)


def _stage(name: str, **defaults: Any) -> tuple[Key, ...]:
    return tuple(key._replace(name=f"{name}.{key.name}", default=defaults.get(key.name, key.default)) for key in STAGE)


KEYS = (
    # ---- The run ----
    Key("recipe", "paper", "recipe name for reports; nothing branches on it", flags=RECORD),
    Key("seed", 0, "seed of the initial weights, the batches and dropout", flags=PROTOCOL),
    # KIND is keras, torchvision, timm, released or vpm; without it the file's content decides.
    Key("pretrained", "keras", "initial weights: none | keras | KIND:PATH | PATH; the prefix partial: loads what fits"),
    Key("log_every", 10, "steps between records of metrics.jsonl", at_least(1), RECORD),
    Key("checkpoint_every", 1, "epochs between checkpoints", at_least(1), RECORD),
    Key("checkpoint_seconds", 120.0, "minimum between checkpoints; evaluations and stops save at once", flags=RECORD),
    Key("keep_checkpoints", 2, "number of checkpoints to keep, newest first", at_least(1), RECORD),
    Key(
        "tracker",
        "none",
        "where to log besides metrics.jsonl: TensorBoard, Weights & Biases",
        one_of("none", "tensorboard", "wandb", "tensorboard,wandb"),
        RECORD,
    ),
    Key(
        "reduce_dtype",
        "float32",
        "dtype in which devices sum the gradients of the backbone; bfloat16 halves what they exchange",
        one_of("float32", "bfloat16"),
    ),
    Key("parallel", "jit", "jit: a mesh of all devices; pmap: the same step under pmap", one_of("jit", "pmap"), RECORD),
    # ---- Data ----
    Key(
        "data.name",
        "market1501",
        "dataset, see vpm_jax.data.datasets; csv, identity_folders: your own images",
        one_of(*DATASETS),
        PROTOCOL,
    ),
    Key(
        "data.root",
        "",
        "the dataset's folder, zip or CSV, or a folder that contains it; empty: $VPM_DATA, else ./data",
        flags=MACHINE | PROTOCOL,
    ),
    Key("data.height", 384, "input height in pixels", at_least(1), EVALUATE | FEATURES),
    Key("data.width", 128, "input width in pixels", at_least(1), EVALUATE | FEATURES),
    # When enlarging 128x64 to 384x128, linear is within 1 gray level of Pillow's bilinear (mean 0.3).
    Key(
        "data.resize",
        "linear",
        "interpolation: OpenCV's, or exactly Pillow's (pil_*)",
        one_of("linear", "area", "cubic", "pil_bilinear", "pil_bicubic"),
        FEATURES,
    ),
    Key("data.fit", "stretch", "stretch: images fill the input; pad: keep proportions", one_of("stretch", "pad")),
    Key("data.place", "top", "position of a padded image; random: in training, otherwise center", one_of(*PLACES)),
    Key("data.stretch", 0.0, "stretch padded training images by up to this share of the padding", between(0, 1)),
    Key("data.aspect", 0.0, "height / width of a whole person; 0: the median of the training images"),
    Key("data.mean", (0.485, 0.456, 0.406), "subtracted from RGB in [0, 1]", MEAN, FEATURES | WEIGHTS),
    Key("data.std", (0.229, 0.224, 0.225), "divisor of RGB after data.mean is subtracted", STD, FEATURES | WEIGHTS),
    Key("data.crop", "top", "what a training crop keeps of the image", one_of(*CROPS)),
    # Quantiles are equally spaced from minimum to maximum, as python -m vpm_jax.extents estimates them from images.
    Key("data.gamma", (0.5, 1.0), "kept area ratio of training crops: min(1, U(low, high)), or quantiles", GAMMA),
    Key("data.whole", 0.0, "fraction of training images left whole, for any data.crop", between(0, 1)),
    Key("data.mix", 0.0, "fraction of training images cropped by data.mix_crop", between(0, 1)),
    Key("data.mix_crop", "any", "what the crops of data.mix keep", one_of(*CROPS)),
    Key("data.flip", 0.5, "probability of mirroring a training image", between(0, 1)),
    Key(
        "data.pad",
        0.0,
        "shift crops by up to this fraction of their height and width; outside the image is the mean color",
        between(0, 0.49),
    ),
    Key("data.jitter", 0.0, "multiply brightness and contrast by U(1 - jitter, 1 + jitter)", between(0, 0.99)),
    # Random erasing (Zhong et al., AAAI 2020). The rectangle's aspect is log-uniform from 0.3 to 1 / 0.3, and its cells
    # keep their labels.
    Key("data.erasing", 0.0, "probability of filling a rectangle with the mean color", between(0, 1)),
    Key("data.erasing_area", (0.02, 0.4), "fraction of the image that the rectangle covers", AREA),
    Key("data.erasing_hides", 1.0, "a region that loses a larger fraction becomes invisible; 1: never", between(0, 1)),
    # Identities of different sets are distinct, even with equal numbers.
    Key("data.also_train", "", "more training sets: NAME or NAME:PATH, separated by commas", flags=EVALUATE),
    Key(
        "data.distractors",
        "",
        "folder or zip of images to add to the gallery; relative to the working directory or the dataset",
        flags=EVALUATION | PROTOCOL,
    ),
    Key(
        "data.identity_zero",
        "distractor",
        "meaning of identity 0 in datasets with Market-1501's file names: distractor or person",
        one_of("distractor", "person"),
        PROTOCOL,
    ),
    Key("data.holdout_identities", 0, "training identities held out for model selection", flags=PROTOCOL),
    Key("data.workers", 0, "loader processes; 0: only threads of the main process", flags=MACHINE),
    Key("data.threads", 0, "loader threads per process; 0: one for each core, at most 8", flags=MACHINE),
    # A test image that cannot be decoded always stops the evaluation: skipping it would change the protocol. Files that
    # are unusable when listed, such as broken links, are left out of the test set too with "skip".
    Key(
        "data.corrupt",
        "error",
        "unreadable training images: error stops; skip uses another image of the identity",
        one_of("error", "skip"),
        RECORD | EVALUATE,
    ),
    Key("data.synthetic.seed", 0, "seed of the synthetic pedestrians, which are rendered on first use", flags=PROTOCOL),
    Key("data.synthetic.train_identities", 200, "synthetic identities for training", flags=PROTOCOL),
    Key("data.synthetic.test_identities", 200, "synthetic identities for evaluation", flags=PROTOCOL),
    Key("data.synthetic.images_per_camera", 2, "images of each identity per camera", flags=PROTOCOL),
    Key("data.synthetic.cameras", 4, "number of synthetic cameras", flags=PROTOCOL),
    # ---- The network ----
    Key("model.depth", 50, "layers of the ResNet", one_of(10, 18, 34, 50, 101), FEATURES),
    Key("model.width", 64, "channels of the first stage's 3x3 convolutions", at_least(1), FEATURES),
    Key(
        "model.stem",
        "7x7",
        "7x7: stride 2 with max pooling; 3x3: stride 2, no pooling; 4x4: patches, stride 4",
        one_of("7x7", "3x3", "4x4"),
        FEATURES,
    ),
    Key("model.strides", (1, 2, 2), "strides of the first three stages", STRIDES, FEATURES),
    Key("model.last_stride", 1, "stride of stage 4", one_of(1, 2), FEATURES),
    Key(
        "model.stride_on",
        "3x3",
        "the convolution of a block that has the stride: 3x3 in torchvision, 1x1 in Caffe and Keras",
        one_of("3x3", "1x1"),
        FEATURES | WEIGHTS,
    ),
    Key("model.bn_epsilon", 1e-5, "epsilon of the backbone's batch norms", flags=FEATURES | WEIGHTS),
    Key("model.grid", (6, 1), "rows and columns of regions", GRID, FEATURES),
    Key(
        "model.locator",
        "pixel",
        "pixel: Eq. 1; row: as in the released code; stripes: PCB's fixed partition",
        one_of("pixel", "row", "stripes"),
        FEATURES,
    ),
    Key("model.locator_groups", 1, "channels averaged into one before the row locator", at_least(1), FEATURES),
    Key(
        "model.locator_stage",
        4,
        "stage whose map the locator reads: 4 is T; 3 needs last_stride 1",
        one_of(3, 4),
        FEATURES,
    ),
    Key("model.locator_hidden", 0, "channels of a 3x3 convolution and ReLU before the pixel locator; 0: none"),
    Key("model.locator_dropout", 0.0, "dropout before the locator", between(0, 0.99)),
    # With Kaiming fan-out, Eq. 1 saturates on T's 2048 channels and L_R starts at 50.
    Key("model.locator_init_std", 0.01, "standard deviation of the locator's initial weights; 0: Kaiming fan-out"),
    Key("model.pool_gradient", True, "identity and triplet gradients flow through the probability maps"),
    # BNNeck (Luo et al., CVPRW 2019) uses head_dim 0, no dropout and no bias; see match.feature.
    Key(
        "model.neck",
        "none",
        "bn: scale-only batch norm between the region features and the identity heads",
        one_of("none", "bn"),
    ),
    Key("model.head_dim", 256, "channels of an identity head's reducer; 0: classify the region feature directly"),
    Key("model.head_dropout", 0.5, "dropout in the identity heads", between(0, 0.99)),
    Key("model.head_bias", True, "classifiers have a bias"),
    Key("model.head_bn_visible_only", True, "batch norms of heads and neck use statistics of visible regions only"),
    Key("model.global_head", False, "adds an identity head on the global average"),
    Key("model.dummy_classes", 0, "extra identity classes without images"),
    Key("model.num_identities", 0, "identity classes; set from the training set"),
    Key(
        "model.dtype",
        "auto",
        "compute type of the network; auto: bfloat16 on GPU and TPU, float32 on CPU",
        one_of("auto", "float32", "bfloat16", "float64"),
    ),
    # ---- Losses ----
    Key("loss.region_weight", 1.0, "weight of the region loss"),
    Key("loss.identity_weight", 1.0, "weight of the identity loss"),
    Key(
        "loss.identity_reduction",
        "image",
        "image: sum over regions, mean over images; region: mean over the images that show a region, sum over regions",
        one_of("image", "region"),
    ),
    Key("loss.identity_regions", "visible", "regions in the identity loss; all: MVPM-3", one_of("visible", "all")),
    Key(
        "loss.triplet_pairs",
        "visible",
        "regions in a pair's distance: visible (Eq. 7), all (MVPM-2), soft (released code)",
        one_of("visible", "all", "soft"),
    ),
    Key("loss.triplet_normalize", True, "L2-normalize features for the triplet loss"),
    # x = D_positive - D_negative + margin. The soft hinge always has a gradient (Hermans et al., 2017, with margin 0).
    Key("loss.hinge", "hard", "triplet loss: hard, max(0, x); soft, log(1 + exp(x))", one_of("hard", "soft")),
    Key("loss.margin", 1.0, "margin of the triplet loss"),
    Key("loss.min_cells", 1, "regions that span fewer cells are invisible", at_least(1)),
    Key("loss.label_smoothing", 0.0, "smoothing of identity labels", between(0, 0.99)),
    Key("loss.region_smoothing", 0.0, "smoothing of region labels", between(0, 0.99)),
    # ---- The optimizer ----
    Key("optim.name", "sgd", "optimizer", one_of("sgd", "adamw")),
    Key("optim.momentum", 0.9, "momentum of sgd, first beta of adamw", between(0, 0.9999)),
    Key("optim.nesterov", True, "Nesterov momentum"),
    Key("optim.weight_decay", 5e-4, "on all parameters; sgd: coupled; adamw: decoupled, times the learning rate"),
    Key(
        "optim.schedule",
        "stages",
        "stages: each stage has its own schedule and starts without momentum; cosine: one over the whole run",
        one_of("stages", "cosine"),
    ),
    Key("optim.clip", 0.0, "maximum norm of the whole gradient; 0: no clipping"),
    Key("optim.backbone_multiplier", 0.1, "factor of the backbone's learning rate"),
    Key("optim.ema", 0.0, "decay of the weights averaged for evaluation; 0: the last weights", between(0, 0.999999)),
    # ---- The stages of training ----
    *_stage("stage1", epochs=50, steps_per_epoch=202, sampling="plain"),
    *_stage("stage2", epochs=80, triplet_weight=1.0),
    # ---- Matching ----
    Key(
        "match.feature", "before", "features before or after the neck", one_of("before", "after"), EVALUATION | FEATURES
    ),
    Key("match.squared", False, "square the distance in each region", flags=EVALUATION),
    Key(
        "match.visibility",
        "soft",
        "weights of regions: soft (Eq. 4), saturated, uniform (MVPM-1), binary",
        one_of("soft", "saturated", "uniform", "binary"),
        EVALUATION,
    ),
    Key("match.vector", False, "compare one vector per image (matching.embedding), not regions", flags=EVALUATION),
    Key(
        "match.gallery_whole",
        False,
        "weigh the regions of gallery images equally, as those of whole people",
        flags=EVALUATION,
    ),
    # Gallery crops keep the same side as data.crop. Each query is compared with the crop that shows the same extent,
    # estimated from its region map. Each ratio costs another pass over the gallery; () is the paper's protocol.
    Key("match.gallery_gammas", (), "kept area ratios of gallery crops besides whole images", INNER_RATIOS, EVALUATION),
    Key("match.rerank", False, "k-reciprocal re-ranking", flags=EVALUATION),
    Key("match.rerank_k1", 20, "neighbors in k-reciprocal sets", at_least(1), EVALUATION),
    Key("match.rerank_k2", 6, "neighbors in local query expansion", at_least(1), EVALUATION),
    Key("match.rerank_lambda", 0.3, "weight of the original distance", between(0, 1), EVALUATION),
    # ---- Evaluation ----
    Key("eval.gammas", (0.5, 0.6, 0.7, 0.8, 0.9, 1.0), "kept area ratios of queries", RATIOS, EVALUATION | PROTOCOL),
    Key("eval.crop", "top", "what query crops keep", one_of(*CROPS), EVALUATION | PROTOCOL),
    Key(
        "eval.same_camera",
        "drop",
        "gallery images of the query's identity and camera: drop or keep them in its ranking",
        one_of("drop", "keep"),
        EVALUATION | PROTOCOL,
    ),
    Key(
        "eval.multi_query",
        False,
        "pool the features of all boxes (gt_bbox) of a query's identity and camera",
        flags=EVALUATION | PROTOCOL,
    ),
    Key("eval.flip", False, "average features and visibility with the mirror image's", flags=EVALUATION | FEATURES),
    Key("eval.batch", 0, "images in a batch; 0: 256 per GPU or TPU, 128 on a CPU", flags=EVALUATION | NO_RESULT),
    # Meant for data.holdout_identities: selecting on the test set invalidates its numbers. The best step is recorded,
    # but the reported checkpoint is always the last.
    Key("eval.every", 0, "epochs between records of evaluations.jsonl; 0: none", flags=EVALUATION | NO_RESULT),
)

LISTED = "python -m vpm_jax.config lists the keys"  # for error messages and --help

# Keys of earlier versions and what to do instead; see `config.from_json`.
RETIRED = {"model.name": "leave it out, there is only one model", "tensorboard": "set tracker to tensorboard"}


def keys_with(flag: Flag) -> tuple[str, ...]:
    """The names of the keys that have a flag, in the order of the table."""
    return tuple(key.name for key in KEYS if flag in key.flags)


def in_words(names: Sequence[str]) -> str:
    """The names separated by commas, with complete groups abbreviated: "seed, data.root, match.*"."""
    words = []
    for name in names:
        group, dot, _ = name.partition(".")
        whole = dot and all(key.name in names for key in KEYS if key.name.startswith(f"{group}."))
        words.append(f"{group}.*" if whole else name)
    return ", ".join(dict.fromkeys(words))
