"""How much of a person each picture shows, and training crops that show as much.

    python -m vpm_jax.extents FOLDER --workdir runs/market

A trained model's region maps tell it, from the pictures alone: no identity, no label. Crops learned from the very
pictures that are searched with are transductive: say so beside results. A model knows the kinds of crops that it was
trained with; one trained with data.crop=top judges others badly.
"""

from __future__ import annotations

import csv
import io
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import cli
from vpm_jax import config as config_lib
from vpm_jax.api import VPM
from vpm_jax.errors import UserError
from vpm_jax.regions import visible_heights
from vpm_jax.runs.logs import write_atomically
from vpm_jax.search.answers import printable
from vpm_jax.search.folder import describe, list_images


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m vpm_jax.extents",
        description=__doc__,
        epilog="Exit codes: 0 done; 1 an error, in one sentence; 3 done but for pictures that cannot be read, named.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="with pictures at any depth")
    cli.add_model(parser, required=True)
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write what each picture shows")
    args = parser.parse_args(argv)
    if args.csv:
        cli.check_output("--csv", args.csv)
    entries, _ = list_images(args.folder)
    path = args.workdir or args.model
    model = VPM.load(path)
    if model.config.model.locator == "stripes" or model.grid.rows == 1:
        raise UserError(
            f"{path} has {model.grid.rows} x {model.grid.cols} regions and the locator {model.config.model.locator}, "
            "which does not tell where regions are: give a model of several rows with a pixel or row locator."
        )
    names, found = [], []
    for some, part in describe(model, args.folder, entries):
        names += [entry.name for entry in some]
        found.append(visible_heights(part.region_maps, model.grid))
    if not names:
        raise UserError(f"None of the {len(entries)} pictures in {args.folder} can be read.")
    extents = np.concatenate(found)
    print(f"{len(names)} pictures of {printable(str(args.folder))}, by {printable(str(path))}:\n")
    print(in_words(extents))
    keys = like_these(extents) | {"recipe": f"{model.config.recipe}-transductive"}
    print("\nTraining crops that show as much (heights, and how many lack the top), learned from the pictures:\n")
    print("  " + " ".join(shlex.quote(f"--config.{key}={value}") for key, value in keys.items()))
    if doubt := doubts(model.config, extents):
        print(f"warning: {doubt}", file=sys.stderr)
    if args.csv:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "top", "bottom"])
        for name, row in zip(names, extents, strict=True):
            writer.writerow([printable(name), *(f"{edge:.3f}" for edge in row)])
        write_atomically(args.csv, text.getvalue())
    return cli.INCOMPLETE if len(names) < len(entries) else 0


def in_words(extents: np.ndarray) -> str:
    """How many pictures show what, as a table, and the quantiles of the height that they keep."""
    top, bottom = extents.T
    lines = [f"{'shows':<18}{'share':>8}  kept height: least, median, most"]
    for name, which in shown(extents).items():
        line = f"{name:<18}{which.mean():>8.1%}"
        if which.any():
            kept = np.quantile((bottom - top)[which], (0, 0.5, 1))
            line += "  " + ", ".join(f"{value:.2f}" for value in kept)
        lines.append(line)
    return "\n".join(lines)


def shown(extents: np.ndarray) -> dict[str, np.ndarray]:
    """Which pictures show what: {in words: bool [N]}."""
    top, bottom = extents.T
    return {
        "the whole person": (top == 0) & (bottom == 1),
        "the top part": (top == 0) & (bottom < 1),
        "the bottom part": (top > 0) & (bottom == 1),
        "a middle part": (top > 0) & (bottom < 1),
    }


def doubts(config: ConfigDict, extents: np.ndarray) -> str:
    """What was found but never among the model's own training crops, as a sentence; "" if nothing."""
    crops = config_lib.crops(config)
    known = {"the whole person", *(f"the {side} part" for side in config_lib.sides(config))}
    strange = {name: which for name, which in shown(extents).items() if which.any() and name not in known}
    if not strange or "any" in crops:
        return ""
    share = np.any(list(strange.values()), axis=0).mean()
    return (
        f"{share:.1%} of the pictures seem to show {' or '.join(strange)}, which this model cannot tell well: it was "
        f"trained on crops by {', '.join(sorted(crops))} alone; ask one trained with data.crop=any."
    )


def like_these(extents: np.ndarray) -> dict[str, Any]:
    """The config keys that crop training images as these pictures are: {key: value}.

    data.gamma gets the quantiles of the kept height at every tenth. Where some lack more above than below, data.mix
    says how many, whatever their heights; a middle part counts as what it lacks most.
    """
    top, bottom = extents.T
    keys: dict[str, Any] = {"data.crop": "top"}
    tenths = np.linspace(0.01, 0.99, 11)  # one misjudged picture shall not set the least
    keys["data.gamma"] = tuple(np.quantile(bottom - top, tenths).round(2).tolist())
    partial = bottom - top < 1
    share = round(float((top > 1 - bottom)[partial].mean()), 2) if partial.any() else 0.0
    return keys | {"data.whole": 0.0, "data.mix": share} | ({"data.mix_crop": "bottom"} if share else {})


if __name__ == "__main__":
    cli.run(main)
