"""How much of a recipe fits into the time that is left, as config overrides.

python plan.py PLAN.json packed.json --config FILE --rate IMAGES/S --compile S --seconds S [--config.KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vpm_jax import cli
from vpm_jax.schedule import schedule

STARTUP = 30  # seconds until training compiles: imports, weights, the list of images
FINISH = 25  # seconds for the last checkpoint, tables and plots
EXTRACTION = 600  # images/s of evaluation, a cautious estimate


def plan(
    config: ConfigDict, counts: Mapping[str, int], rate: float, compiling: float, measured: bool, seconds: float
) -> dict[str, Any]:
    """Shortens all stages by the same factor, with their decays, warm-up and start of the triplet loss.

    Args:
      config: the recipe's.
      counts: images of the splits, and training identities.
      rate: images per second of training.
      compiling: seconds that one training step takes to compile.
      measured: whether this recipe's last stage was compiled before.
      seconds: the time left.

    Returns:
      "overrides" of the config, [] if all of it fits; "images" of training, "of" those of the whole recipe; "reserve",
      the seconds that the evaluation needs.
    """
    stages = schedule(config, counts["train"], counts["identities"])
    total = sum(stage.steps * stage.batch for stage in stages)
    crops = len(config.match.gallery_gammas)
    evaluated = len(config.eval.gammas) * counts["query"] + (1 + crops) * counts["gallery"]
    reserve = FINISH + evaluated * (1 + config.eval.flip) / EXTRACTION
    programs = len({(stage.height, stage.width) for stage in stages})
    startup = STARTUP + compiling * (programs - measured)  # a shorter schedule is the same program
    share = min(1.0, (seconds - startup - reserve) * rate / total)
    overrides, images = [], 0
    for stage in stages:
        values = config[stage.name]
        epochs = max(1, int(stage.epochs * share))
        images += epochs * stage.steps_per_epoch * stage.batch
        if epochs < stage.epochs:
            part = epochs / stage.epochs
            decays = tuple(max(1, round(epoch * part)) for epoch in values.decay_epochs)
            overrides += [
                f"--config.{stage.name}.epochs={epochs}",
                f"--config.{stage.name}.decay_epochs={decays}",
                f"--config.{stage.name}.triplet_start={values.triplet_start * part}",
                f"--config.{stage.name}.warmup_epochs={values.warmup_epochs * part}",
            ]
    return {
        "overrides": overrides,
        "images": images,
        "of": total,
        "reserve": round(reserve, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--config", required=True)
    parser.add_argument("--rate", type=float, required=True)
    parser.add_argument("--compile", type=float, required=True)
    parser.add_argument("--measured", action="store_true")
    parser.add_argument("--seconds", type=float, required=True)
    args, overrides = parser.parse_known_args()
    config = cli.load_config(args.config, overrides)
    counts = json.loads(args.packed.read_text())["counts"]
    found = plan(config, counts, args.rate, args.compile, args.measured, args.seconds)
    args.output.write_text(json.dumps({"config": args.config, "rate": args.rate} | found, indent=1))


if __name__ == "__main__":
    main()
