"""An evaluation with many distractors: seconds and peak memory of matching and ranking generated features, compared
with the matrix products alone."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import cli, parallel
from vpm_jax.benchmark import generated
from vpm_jax.benchmark.matching import exact_distance
from vpm_jax.benchmark.metrics import plain
from vpm_jax.benchmark.report import Report, Row
from vpm_jax.benchmark.step import fixed
from vpm_jax.benchmark.timing import clocked
from vpm_jax.data.split import Dataset, join
from vpm_jax.errors import UserError
from vpm_jax.progress import Progress

if TYPE_CHECKING:
    from vpm_jax.description import FeatureSource
    from vpm_jax.evaluation import Results

HELP = "an evaluation with many distractors in bounded memory, compared with the matmul limit"
CHECKED = 4  # queries whose metrics are compared with those of a plain evaluator
CHUNK = 4096  # gallery images at a time, in that comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", help="a dataset, for its labels (default: generated ones)")
    parser.add_argument("--queries", type=cli.positive, default=200, help="generated queries (default: %(default)s)")
    parser.add_argument(
        "--gallery", type=cli.positive, default=1000, help="generated gallery images (default: %(default)s)"
    )
    parser.add_argument("--distractors", type=int, default=20_000, help="(default: %(default)s)")
    parser.add_argument("--channels", type=cli.positive, default=256, help="per region (default: %(default)s)")


def check(source: FeatureSource, dataset: Dataset, results: Results) -> float:
    """The largest difference from the metrics of all distances by Eq. 4 in float64, ranked by sorting."""
    from vpm_jax.description import CroppedSplit

    query, gallery = dataset.query, dataset.gallery
    stops = range(CHUNK, len(gallery), CHUNK)
    [here] = source.splits({}, [CroppedSplit(query)])
    distances = []
    for there in source.stream({}, CroppedSplit(gallery), stops, Progress("checking", len(gallery))):
        distances.append(exact_distance(here.features, here.visibility, there.features, there.visibility))
    assert query.camera is not None and gallery.camera is not None
    labels = query.identity, gallery.identity, query.camera, gallery.camera
    cmc, precision = plain(np.concatenate(distances, axis=1), *labels)
    return max(max(abs(r["mAP"] - precision), *np.abs(r["cmc"] - cmc)) for r in results.values())


def run(args: argparse.Namespace, config: ConfigDict) -> Report:
    if args.distractors < 0:
        raise UserError(f"--distractors {args.distractors}: expected a number of images, 0 for none.")
    from vpm_jax import evaluation
    from vpm_jax.benchmark.generated_features import GeneratedFeatures
    from vpm_jax.benchmark.limits import accelerator, matmul_limit

    config = fixed(config)
    dataset = generated.test_set(args, config)
    distractors = generated.split("gallery", args.distractors)
    distractors = replace(distractors, identity=np.zeros_like(distractors.identity))
    gallery = join(evaluation.ranked(dataset.gallery), distractors)
    dataset = replace(dataset, gallery=gallery)
    source = GeneratedFeatures(config, args.channels)
    peak, limit_is = matmul_limit("float32", args.clock, "highest")  # the precision of `region_distance`
    before = parallel.peak_memory()
    timed, results = clocked(lambda: evaluation.evaluate(source, {}, dataset))
    after, seconds = parallel.peak_memory(), timed[args.clock]

    few = replace(dataset, query=dataset.query.take(np.arange(min(CHECKED, len(dataset.query)))))
    difference = check(source, few, evaluation.evaluate(source, {}, few))
    regions, gammas = config.model.grid[0] * config.model.grid[1], len(config.eval.gammas)
    pairs = gammas * len(dataset.query) * len(gallery)
    bytes_of = {"features": 4 * len(gallery) * regions * args.channels, "distances": 4 * pairs}
    lines = [
        f"{len(dataset.query):,} queries of {dataset.name} at {gammas} gammas, {len(gallery):,} gallery images, "
        f"{args.distractors:,} of them distractors; generated features of {regions} x {args.channels} float32.",
        f"The metrics of {len(few.query)} queries differ by {difference:.1e} from those of a plain evaluator.",
        f"Peak memory before: {before:.2f} GiB.",
        "Rank-1 / mAP, of generated features: "
        + ", ".join(f"{100 * r['cmc'][0]:.1f} / {100 * r['mAP']:.1f}" for r in results.values())
        + ".",
    ]
    limit = pairs * 2 * regions * args.channels / peak
    rows = [
        Row("distractors: whole evaluation", seconds, "s", limit, limit_is),
        Row("distractors: pairs", pairs / seconds, "pairs/s", pairs / limit, limit_is),
        Row("distractors: peak memory", after, "GiB"),
        *(Row(f"distractors: all {name}, never in memory", n / 2**30, "GiB") for name, n in bytes_of.items()),
    ]
    return Report(rows, lines, device=accelerator(), config=config.to_dict())
