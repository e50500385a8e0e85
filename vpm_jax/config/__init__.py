"""Configs: building, checking, saving and comparing them. `keys` defines every key.

A file under `configs/` starts from `default()` and changes some keys. Recipes are values: no code branches on the
recipe's name.

The *requested* config comes from a file and overrides. Training turns it into the *resolved* config: `training.resolve`
sets the keys that depend on the training set, `for_weights` those that depend on the pretrained weights. config.json
holds the resolved config; models, steps and evaluations use it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from vpm_jax.errors import UserError
from vpm_jax.keys import ANY, KEYS, LISTED, RESUME, RETIRED, STAGE, WEIGHTS, Key, keys_with
from vpm_jax.regions import HEIGHTS

# Keys that may change when a run is resumed. `changed_keys` also allows more epochs.
RESUMABLE = keys_with(RESUME)

_KEY = {key.name: key for key in KEYS}


# ---- Building ----


def default() -> ConfigDict:
    """The paper's recipe. Where the paper is silent, values are those of the authors' released code."""
    return ConfigDict(_nested({key.name: key.default for key in KEYS})).lock()


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`, as dictionaries."""
    nested: dict[str, Any] = {}
    for key, value in values.items():
        *groups, last = key.split(".")
        group = nested
        for name in groups:
            group = group.setdefault(name, {})
        group[last] = value
    return nested


def stage(**changes: Any) -> ConfigDict:
    """One training stage. Raises UserError for a key that stages do not have."""
    values = {key.name: key.default for key in STAGE}
    if unknown := set(changes) - set(values):
        raise UserError(f"A stage has no key {', '.join(sorted(unknown))}: its keys are {', '.join(values)}.")
    return ConfigDict(values | changes)


def small() -> ConfigDict:
    """A width-24 ResNet-18 on 128x64 images (T is 16 x 8 x 192) with settings that converge in a short run.

    Batches of many identities with few images each matter most: after 600 steps on Market-1501 (100 identities held
    out), 32 x 2 reaches 70.0 / 52.5 on whole queries and 16 x 4 reaches 64.4 / 46.5 (docs/results).
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


def flatten(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """The value of every key by its dotted name: {"data.height": 384, ...}."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves


def set_key(config: ConfigDict, key: str, value: Any) -> None:
    """Sets the value of a dotted key."""
    *groups, last = key.split(".")
    for group in groups:
        config = config[group]
    with config.ignore_type():  # an int may replace a float
        config[last] = value


def keep(config: ConfigDict, keeps: Callable[[Key], bool]) -> FrozenConfigDict:
    """The config with the default of every key that `keeps` rejects: equal, and equally hashed, if the others are."""
    values = flatten(config)
    return FrozenConfigDict(_nested({key.name: values[key.name] if keeps(key) else key.default for key in KEYS}))


def follow_epochs(config: ConfigDict, before: Mapping[str, Any], given: Collection[str]) -> list[str]:
    """Scales warm-up and the start of the triplet loss with a shortened stage that would end before them.

    Args:
      config: the config, which is changed.
      before: its values before the epochs were changed, from `flatten`.
      given: the keys that keep their values.

    Returns:
      The changes as "key: old -> new".
    """
    changes = []
    for stage in ("stage1", "stage2"):
        old, new = before[f"{stage}.epochs"], config[stage].epochs
        keys = [f"{stage}.{key}" for key in ("triplet_start", "warmup_epochs")]
        keys = [key for key in keys if before[key] and key not in given]
        if 0 < new < old and any(before[key] >= new for key in keys):
            for key in keys:
                value = round(before[key] * new / old, 4)
                set_key(config, key, value)
                changes.append(f"{key}: {before[key]:g} -> {value:g}")
    return changes


def for_weights(resolved: ConfigDict, weights: Any) -> ConfigDict:
    """A copy of the config with the keys that a `pretrained.Pretrained` determines: input normalization and every
    difference from torchvision's backbone."""
    resolved = resolved.copy_and_resolve_references()
    for key in keys_with(WEIGHTS):
        set_key(resolved, key, getattr(weights, key.rpartition(".")[2]))
    return resolved


# ---- Checking ----


def check(config: ConfigDict) -> None:
    """Checks that every key is present, in range and consistent with the others.

    Raises:
      UserError: naming the key, its value and what was expected.
    """
    leaves = flatten(config)
    for name in sorted(set(leaves) ^ set(_KEY)):
        raise UserError(f"Config key {name!r} is {'unknown' if name in leaves else 'missing'}: {LISTED}.")
    for key in KEYS:
        _check_value(key, leaves[key.name])
    for wrong, sentence in _contradictions(config) + _gallery_contradictions(config):
        if wrong:
            raise UserError(sentence)


def _check_value(key: Key, value: Any) -> None:
    kind = type(key.default)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise UserError(f"Config key {key.name} is {value!r} ({type(value).__name__}), expected {kind.__name__}.")
    numbers = value if isinstance(value, tuple) else () if isinstance(value, str) else (value,)
    if not all(isinstance(n, int | float) and math.isfinite(n) and n >= 0 for n in numbers):
        raise UserError(f"Config key {key.name} is {value!r}, expected {ANY.expected}.")
    if not key.values.holds(value):
        raise UserError(f"Config key {key.name} is {value!r}, expected {key.values.expected}.")


def _contradictions(config: ConfigDict) -> list[tuple[bool, str]]:
    """Rules about several keys: (whether the config breaks the rule, the error message)."""
    data, model = config.data, config.model
    channels = model.width * 2 ** (model.locator_stage - 1) * (4 if model.depth >= 50 else 1)
    return [
        (
            data.whole + data.mix > 1,
            f"Config keys data.whole and data.mix are {data.whole} and {data.mix}, expected shares that add up to at "
            "most 1: lower one.",
        ),
        (
            data.stretch and data.fit != "pad",
            f"Config key data.stretch is {data.stretch} but data.fit is {data.fit!r}: it augments padded images, so "
            "set data.fit to pad, or data.stretch to 0.",
        ),
        (
            model.locator_stage == 3 and model.last_stride != 1,
            "Config key model.locator_stage is 3 but that stage's map is larger than T: set model.last_stride to 1.",
        ),
        (
            model.locator_hidden and model.locator != "pixel",
            f"Config key model.locator_hidden is {model.locator_hidden} but model.locator is {model.locator!r}: only "
            "the pixel locator has hidden channels.",
        ),
        (
            model.locator == "row" and channels % model.locator_groups,
            f"Config key model.locator_groups is {model.locator_groups}, expected a divisor of the {channels} channels "
            "that the row locator reads: choose another.",
        ),
        (
            config.match.feature == "after" and model.neck == "none",
            'Config key match.feature is "after" but model.neck is "none": set model.neck to "bn".',
        ),
        (
            config.match.gallery_whole and config.match.rerank,
            "Config keys match.gallery_whole and match.rerank are both on: re-ranking needs the same weights for "
            "queries and gallery; turn off one of them.",
        ),
        (
            not config.stage1.epochs + config.stage2.epochs,
            "Config keys stage1.epochs and stage2.epochs are both 0: there is nothing to train.",
        ),
    ]


def _gallery_contradictions(config: ConfigDict) -> list[tuple[bool, str]]:
    """Rules about match.gallery_gammas and other keys, as those of `_contradictions`."""
    gammas, known = config.match.gallery_gammas, sides(config)
    reasons = [
        (not known, f"data.crop is {config.data.crop!r}: expected top, bottom or bilateral training crops"),
        (
            not estimates_extent(config),
            "the model cannot estimate how much a query shows: expected at least two rows of regions and no stripes",
        ),
        (config.match.rerank, "match.rerank is on: turn off one of them"),
        (config.match.gallery_whole, "match.gallery_whole is on: turn off one of them"),
        (config.eval.multi_query, "eval.multi_query is on: turn off one of them"),
        (
            set(HEIGHTS.get(config.eval.crop, ())) - set(known),
            f"eval.crop is {config.eval.crop!r}: expected query crops on the same sides as training crops "
            f"({' and '.join(known)})",
        ),
    ]
    start = f"Config key match.gallery_gammas is {gammas}, but "
    return [(bool(gammas and wrong), f"{start}{reason}.") for wrong, reason in reasons]


def estimates_extent(config: ConfigDict) -> bool:
    """Whether region maps of the model show which part of a person's height an image shows."""
    return config.model.grid[0] > 1 and config.model.locator != "stripes"


def sides(config: ConfigDict) -> list[str]:
    """The sides that training crops keep, "top" and "bottom". The gallery may be cropped to the same sides."""
    return sorted({side for strategy in crops(config) for side in HEIGHTS.get(strategy, ())}, reverse=True)


def crops(config: ConfigDict) -> set[str]:
    """The strategies of `regions.CROPS` that crop training images."""
    data = config.data
    return set([data.crop] * (data.whole + data.mix < 1) + [data.mix_crop] * (data.mix > 0))


# ---- Saving and comparing ----


def to_json(config: ConfigDict) -> str:
    """The config as JSON text with one key per line."""
    return json.dumps(config.to_dict(), indent=2)


def from_json(text: str, source: str) -> ConfigDict:
    """A config written by `to_json` of this or an earlier version. Missing keys take their defaults.

    Raises:
      UserError: if `source` (the file's name) does not hold such a config.
    """
    try:
        saved = json.loads(text)
        config = default()
        if saved.get("tensorboard"):  # a separate key in earlier versions
            saved["tracker"] = "tensorboard" + ",wandb" * (saved.get("tracker") == "wandb")

        for key, value in flatten(ConfigDict(saved)).items():
            if key in RETIRED:
                continue
            if key not in _KEY:
                raise KeyError(f"unknown key {key!r}")
            set_key(config, key, tuple(value) if isinstance(value, list) else value)
        check(config)
    except (UserError, ValueError, KeyError, AttributeError, TypeError) as error:
        reason = str(error.args[0] if error.args else error).splitlines()[0].removesuffix(".")
        raise UserError(
            f"{source} is not a config that this version can read ({reason}): fix it, or use another."
        ) from error
    return config


def read(workdir: Path) -> ConfigDict | None:
    """The resolved config of the run in a workdir, None without a run. Same errors as `from_json`."""
    file = workdir / "config.json"
    return from_json(file.read_text(encoding="utf-8", errors="replace"), str(file)) if file.is_file() else None


def changed_keys(saved: ConfigDict, now: ConfigDict) -> list[str]:
    """Changes that prevent `now` from continuing the run of `saved`, as "key: old -> new".

    The last stage may get more epochs if its schedule does not depend on their number.
    """
    old, new = flatten(saved), flatten(now)
    last = "stage2" if saved.stage2.epochs else "stage1"
    stepwise = saved[last].schedule == "step" and saved.optim.schedule == "stages"
    changed = []
    for key, value in new.items():
        if old[key] == value or key in RESUMABLE:
            continue
        if key == f"{last}.epochs" and value > old[key] and stepwise:
            continue
        changed.append(f"{key}: {old[key]} -> {value}")
    return changed
