"""Configs: how they are made, checked, saved and compared. `keys` lists every key.

A file under `configs/` starts from `default()` and sets what differs. Recipes are values: no code asks which recipe it
runs.

A config is *asked*: a file and overrides. Training makes it *resolved*: `train.resolve` sets what the training set
decides, `for_weights` what pretrained weights presuppose. config.json holds the resolved config, and models, steps and
evaluations take it.

    python -m vpm_jax.config [WORD ...]

prints the keys, with their defaults and meanings.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vpm_jax.errors import UserError
from vpm_jax.keys import ANY, EVALUATE, KEYS, LISTED, RESUME, RETIRED, STAGE, WEIGHTS, Key, keys_with
from vpm_jax.regions import HEIGHTS

# What may differ from the run that a workdir holds; epochs may be added too, see `changed_keys`.
RESUMABLE = keys_with(RESUME)

_KEY = {key.name: key for key in KEYS}


# ---- Making a config ----


def default() -> ConfigDict:
    """The paper's recipe; where the paper is silent, the authors' released code."""
    values: dict[str, Any] = {}
    for key in KEYS:
        *groups, last = key.name.split(".")
        group = values
        for name in groups:
            group = group.setdefault(name, {})
        group[last] = key.default
    return ConfigDict(values).lock()


def stage(**changes: Any) -> ConfigDict:
    """One training stage. Raises UserError for a key that stages do not have."""
    values = {key.name: key.default for key in STAGE}
    if unknown := set(changes) - set(values):
        raise UserError(f"A stage has no key {', '.join(sorted(unknown))}: it has {', '.join(values)}.")
    return ConfigDict(values | changes)


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
    for key in keys_with(WEIGHTS):
        group, last = key.split(".")
        resolved[group][last] = getattr(weights, last)
    return resolved


# ---- Checking one ----


def check(config: ConfigDict) -> None:
    """Refuses values that no part can use, and those that contradict each other.

    Raises:
      UserError: that names the key, the value and what was expected.
    """
    leaves = flatten(config)
    for name in sorted(set(leaves) ^ set(_KEY)):
        raise UserError(f"Config key {name!r} is {'unknown' if name in leaves else 'missing'}: {LISTED}.")
    for key in KEYS:
        _check_value(key, leaves[key.name])
    for wrong, sentence in _contradictions(config):
        if wrong:
            raise UserError(sentence)
    check_gallery_gammas(config)


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
    """(whether values contradict each other, the sentence that says so), by values that are fine alone."""
    data, model = config.data, config.model
    channels = model.width * 2 ** (model.locator_stage - 1) * (4 if model.depth >= 50 else 1)
    return [
        (
            data.whole + data.mix > 1,
            f"Config keys data.whole and data.mix are {data.whole} and {data.mix}, expected shares that leave none "
            "below 0 for data.crop: lower one.",
        ),
        (
            model.locator_stage == 3 and model.last_stride != 1,
            "Config key model.locator_stage is 3, whose map is larger than T: set model.last_stride to 1.",
        ),
        (
            model.locator_hidden and model.locator != "pixel",
            f"Config key model.locator_hidden is {model.locator_hidden} but model.locator is {model.locator!r}: only "
            "the pixel locator has hidden channels.",
        ),
        (
            model.locator == "row" and channels % model.locator_groups,
            f"Config key model.locator_groups is {model.locator_groups}, no divisor of the {channels} channels that "
            "the row locator reads: choose one that does.",
        ),
        (
            config.match.feature == "after" and model.neck == "none",
            'Config key match.feature is "after" but model.neck is "none": set model.neck to "bn".',
        ),
        (
            not config.stage1.epochs + config.stage2.epochs,
            "Config keys stage1.epochs and stage2.epochs are both 0: there is nothing to train.",
        ),
    ]


def check_gallery_gammas(config: ConfigDict) -> None:
    """Refuses a match.gallery_gammas that the model cannot be evaluated with, or together with re-ranking."""
    gammas, model, known = config.match.gallery_gammas, config.model, sides(config)
    _check_value(_KEY["match.gallery_gammas"], gammas)
    reasons = [
        (
            not known,
            f"data.crop is {config.data.crop!r}: expected training crops of the top, bottom or bilateral",
        ),
        (
            model.grid[0] < 2 or model.locator == "stripes",
            "the model does not tell how much a query shows: expected two rows of regions or more, and no stripes",
        ),
        (config.match.rerank, "match.rerank is on: leave one of them out"),
        (
            set(HEIGHTS.get(config.eval.crop, ())) - set(known),
            f"eval.crop is {config.eval.crop!r}: expected queries cropped on the sides of training crops "
            f"({' and '.join(known)}), as the gallery is",
        ),
    ]
    for wrong, reason in reasons:
        if gammas and wrong:
            raise UserError(f"Config key match.gallery_gammas is {gammas}, but {reason}.")


def sides(config: ConfigDict) -> list[str]:
    """Which parts of a height training crops keep, of "top" and "bottom": what a gallery may be cropped to."""
    return sorted({side for strategy in crops(config) for side in HEIGHTS.get(strategy, ())}, reverse=True)


def crops(config: ConfigDict) -> set[str]:
    """The strategies, of `regions.CROPS`, that crop training images."""
    data = config.data
    return set([data.crop] * (data.whole + data.mix < 1) + [data.mix_crop] * (data.mix > 0))


# ---- Saving and comparing ----


def to_json(config: ConfigDict) -> str:
    """The config as JSON text, one key a line."""
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
    stepwise = saved[last].schedule == "step" and saved.optim.schedule == "stages"
    changed = []
    for key, value in new.items():
        if old[key] == value or key in RESUMABLE:
            continue
        if key == f"{last}.epochs" and value > old[key] and stepwise:
            continue
        changed.append(f"{key}: {old[key]} -> {value}")
    return changed


# ---- The list of keys ----


def listing(keys: Iterable[Key], width: int) -> str:
    """NAME = DEFAULT, the meaning and the values of each key, in lines of `width` characters; a paragraph a group."""
    column = 38  # where meanings begin
    paragraphs = []
    for _, group in itertools.groupby(keys, lambda key: key.name.rpartition(".")[0]):
        lines = []
        for key in group:
            values = key.values.expected.removeprefix("one of ").removeprefix("a number from ")
            text = key.meaning + f" [{values}]" * (key.values is not ANY)
            text += " (evaluate)" if EVALUATE in key.flags else " (resume)" if RESUME in key.flags else ""
            told = textwrap.wrap(text, max(width - column, 40))
            start = f"{key.name} = {key.default}".rstrip()
            if len(start) >= column:
                lines.append(start)
                start = ""
            lines += [f"{left:{column}}{line}" for left, line in itertools.zip_longest([start], told, fillvalue="")]
        paragraphs.append("\n".join(lines))
    return "\n\n".join(paragraphs)


def main(argv: Sequence[str] | None = None) -> int:
    from vpm_jax import cli

    parser = cli.Parser(
        prog="python -m vpm_jax.config",
        description="Lists the keys of a config with their defaults, meanings and values.",
        epilog="(resume): may change when a run is resumed; (evaluate): and when it is evaluated or reported.",
    )
    parser.add_argument("word", nargs="*", metavar="WORD", help="only keys whose name has one of these in it")
    words = parser.parse_args(argv).word
    chosen = [key for key in KEYS if not words or any(word in key.name for word in words)]
    if not chosen:
        raise UserError(f"No config key has {' or '.join(words)} in its name: leave it out to see all.")
    print(listing(chosen, shutil.get_terminal_size((120, 0)).columns))
    print(f"\n{parser.epilog}")
    return 0


if __name__ == "__main__":
    from vpm_jax import cli

    cli.run(main)
