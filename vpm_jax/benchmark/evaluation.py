"""A whole evaluation: extraction at every gamma, matching and metrics, compared with the time of its FLOPs."""

from __future__ import annotations

import argparse

from ml_collections import ConfigDict

from vpm_jax import captions, cli
from vpm_jax.benchmark import generated
from vpm_jax.benchmark.extraction import network
from vpm_jax.benchmark.report import Report, Row
from vpm_jax.benchmark.timing import clocked

HELP = "the gamma table from images to metrics, compared with the time of its FLOPs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", help="a dataset (default: generated images)")
    parser.add_argument("--queries", type=cli.positive, default=128, help="generated queries (default: %(default)s)")
    parser.add_argument(
        "--gallery", type=cli.positive, default=512, help="generated gallery images (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="for the network alone (default: %(default)s)")


def run(args: argparse.Namespace, config: ConfigDict) -> Report:
    from vpm_jax import evaluation
    from vpm_jax.benchmark.limits import accelerator

    dataset = generated.test_set(args, config)
    describer, variables, alone, limit, limit_is = network(args, config)
    config = describer.config
    describer.split(variables, generated.dataset(2, 256).query)  # compiles
    seconds = clocked(lambda: evaluation.evaluate(describer, variables, dataset))[0][args.clock]
    queries, gallery = len(dataset.query), len(evaluation.ranked(dataset.gallery))
    images = gallery + queries * len(config.eval.gammas)
    lines = [
        f"Recipe {config.recipe}: {captions.network(config)}, {queries:,} queries at "
        f"{len(config.eval.gammas)} gammas, {gallery:,} gallery images ({dataset.name})."
    ]
    rows = [Row("evaluation: whole", seconds, "s", images / alone, "the network alone on the same images")]
    if limit:
        rows.append(Row("evaluation: whole", seconds, "s", images / limit, limit_is))
    return Report(rows, lines, device=accelerator(), config=config.to_dict())
