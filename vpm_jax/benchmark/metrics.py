"""Ranking: seconds of `vpm_jax.metrics.rank_metrics`, compared with a plain evaluator and one pass over the matrix."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import cli
from vpm_jax.benchmark.report import Report, Row
from vpm_jax.benchmark.timing import in_turn, timed
from vpm_jax.errors import UserError
from vpm_jax.metrics import RANKS, rank_metrics

HELP = "CMC and mAP of a distance matrix, compared with a plain Python evaluator"
IDENTITIES, CAMERAS = 750, 6  # Market-1501's; the fraction DISTRACTORS of its gallery has identity 0
DISTRACTORS = 2798 / 15913


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", type=cli.positive, default=3368, help="(default: %(default)s, Market-1501's)")
    parser.add_argument("--gallery", type=cli.positive, default=15913, help="(default: %(default)s, Market-1501's)")
    parser.add_argument("--rounds", type=cli.positive, default=3, help="(default: %(default)s)")


def plain(
    distance: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray, query_cameras: np.ndarray, cameras: np.ndarray
) -> tuple[np.ndarray, float]:
    """(CMC, mAP) as re-ID code usually computes them: sorts the gallery for each query and walks it."""
    cmc, precisions = np.zeros(min(len(gallery_ids), RANKS)), []
    for q in range(len(distance)):
        order = np.argsort(distance[q], kind="stable")
        dropped = (gallery_ids[order] == query_ids[q]) & (cameras[order] == query_cameras[q])
        correct = (gallery_ids[order] == query_ids[q])[~dropped]
        if not correct.any():
            continue
        cmc[np.argmax(correct) :] += 1
        precisions.append(float((np.cumsum(correct) / np.arange(1, len(correct) + 1))[correct].mean()))
    return cmc / max(len(precisions), 1), float(np.mean(precisions))


def generate(queries: int, gallery: int) -> tuple[np.ndarray, ...]:
    """A distance matrix, identities and cameras in Market-1501's proportions; correct matches tend to be nearer."""
    random = np.random.default_rng(0)
    identities = max(1, min(IDENTITIES, queries, gallery // 2))
    query_ids = np.arange(queries) % identities + 1
    gallery_ids = np.where(np.arange(gallery) < DISTRACTORS * gallery, 0, np.arange(gallery) % identities + 1)
    distance = random.random((queries, gallery), np.float32)
    distance[query_ids[:, None] == gallery_ids] *= 0.5
    return (
        distance,
        query_ids,
        gallery_ids,
        random.integers(CAMERAS, size=queries),
        random.integers(CAMERAS, size=gallery),
    )


def run(args: argparse.Namespace, config: ConfigDict) -> Report:
    if args.gallery < RANKS:
        raise UserError(f"--gallery {args.gallery}: expected at least {RANKS} images.")
    case = generate(args.queries, args.gallery)
    ours, theirs = rank_metrics(*case), plain(*case)
    difference = max(np.abs(ours["cmc"] - theirs[0]).max(), abs(ours["mAP"] - theirs[1]))
    contestants: dict[str, Callable[[], object]] = {
        "ours": partial(rank_metrics, *case),
        "plain": partial(plain, *case),
        "read": lambda: [np.count_nonzero(row < 0.5) for row in case[0]],
    }

    times = in_turn({name: timed(contestant, args.clock) for name, contestant in contestants.items()}, args.rounds)
    limit = min(times["read"])
    lines = [
        f"{args.queries:,} queries, {args.gallery:,} gallery images, {CAMERAS} cameras; {args.rounds} rounds; the "
        f"evaluators agree to {difference:.1e}."
    ]
    market = (args.queries, args.gallery) == (3368, 15913)
    limit_is = "one comparison with the whole matrix"
    rows = [
        Row("metrics: rank_metrics", median(times["ours"]), "s", limit, limit_is, "2 s on two cores" * market),
        Row("metrics: plain evaluator", median(times["plain"]), "s", limit, limit_is),
    ]
    return Report(rows, lines)
