"""Estimates how much of a person each image shows, and prints config keys for training crops of the same extents.

    python -m vpm_jax.extents FOLDER --workdir runs/market

The visible extent comes from a trained model's region maps and needs no labels. Training crops estimated from the
queries of a test set are transductive: report them as such. A model judges only the kinds of crops it was trained on;
with data.crop=top, its estimates for other crops are poor.
"""

from __future__ import annotations

import csv
import io
import shlex
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import cli
from vpm_jax import config as config_lib
from vpm_jax.api import VPM
from vpm_jax.description import unfamiliar_parts, visible_parts
from vpm_jax.disk import write_atomically
from vpm_jax.errors import UserError, printable
from vpm_jax.progress import Progress
from vpm_jax.regions import visible_heights
from vpm_jax.search.folder import describe, list_images


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m vpm_jax.extents",
        description=__doc__,
        epilog="Exit codes: 0 success; 1 an error; 3 success, except for images that cannot be read (on stderr).",
    )
    parser.add_argument("folder", type=cli.path, metavar="FOLDER", help="with images at any depth")
    cli.add_model(parser, required=True)
    parser.add_argument("--csv", type=cli.path, metavar="FILE", help="write the visible extent of each image")
    args = parser.parse_args(argv)
    if args.csv:
        cli.check_output("--csv", args.csv)
    entries, _ = list_images(args.folder)
    path = args.workdir or args.model
    model = VPM.load(path)
    if not config_lib.estimates_extent(model.config):
        raise UserError(
            f"{path} has {model.grid.rows} x {model.grid.cols} regions and the locator {model.config.model.locator}, "
            "which cannot locate regions: use a model with several rows and a pixel or row locator."
        )
    names, batches = [], []
    progress = Progress("images", len(entries))
    for batch_entries, description in describe(model, entries, args.folder.joinpath, progress=progress):
        names += [entry.name for entry in batch_entries]
        batches.append(visible_heights(description.region_maps, model.grid))
    if not names:
        raise UserError(f"None of the {len(entries)} images in {args.folder} can be read.")
    extents = np.concatenate(batches)
    print(f"{len(names)} images in {printable(args.folder)}, estimated by {printable(path)}:\n")
    print(in_words(extents))
    keys = crop_keys(extents) | {"recipe": f"{model.config.recipe}-transductive"}
    print("\nConfig keys for training crops with these visible extents:\n")
    print("  " + " ".join(shlex.quote(f"--config.{key}={value}") for key, value in keys.items()))
    if unfamiliar := unfamiliar_crops(model.config, extents):
        print(f"warning: {unfamiliar}", file=sys.stderr)
    if args.csv:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["path", "top", "bottom"])
        for name, row in zip(names, extents, strict=True):
            writer.writerow([printable(name), *(f"{edge:.3f}" for edge in row)])
        write_atomically(args.csv, text.getvalue())
    return cli.INCOMPLETE if len(names) < len(entries) else 0


def in_words(extents: np.ndarray) -> str:
    """A table of the visible parts, with the share of images and their visible height."""
    top, bottom = extents.T
    lines = [f"{'shows':<18}{'share':>8}  visible height: min, median, max"]
    for name, mask in visible_parts(extents).items():
        line = f"{name:<18}{mask.mean():>8.1%}"
        if mask.any():
            kept = np.quantile((bottom - top)[mask], (0, 0.5, 1))
            line += "  " + ", ".join(f"{value:.2f}" for value in kept)
        lines.append(line)
    return "\n".join(lines)


def unfamiliar_crops(config: ConfigDict, extents: np.ndarray) -> str:
    """A warning about visible parts that the model's training crops did not cover; "" if there are none."""
    if not (unknown := unfamiliar_parts(config, extents)):
        return ""
    share = np.any(list(unknown.values()), axis=0).mean()
    crops = ", ".join(sorted(config_lib.crops(config)))
    return (
        f"{share:.1%} of the images seem to show {' or '.join(unknown)}. These estimates are poor, because this model "
        f"was trained with the crops {crops} only: use one trained with data.crop=any."
    )


def crop_keys(extents: np.ndarray) -> dict[str, Any]:
    """The config keys of training crops with these visible extents [N, 2].

    data.gamma is set to quantiles of the visible height. data.mix is the share of partial images that lack more at the
    top than at the bottom.
    """
    top, bottom = extents.T
    keys: dict[str, Any] = {"data.crop": "top"}
    levels = np.linspace(0.01, 0.99, 11)  # not the minimum and maximum, which are outliers
    keys["data.gamma"] = tuple(np.quantile(bottom - top, levels).round(2).tolist())
    partial = bottom - top < 1
    share = round(float((top > 1 - bottom)[partial].mean()), 2) if partial.any() else 0.0
    return keys | {"data.whole": 0.0, "data.mix": share} | ({"data.mix_crop": "bottom"} if share else {})


if __name__ == "__main__":
    cli.run(main)
