"""Loading of training batches on the CPU, compared with decoding alone."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator

import cv2
import numpy as np
from ml_collections import ConfigDict

from vpm_jax import cli
from vpm_jax.benchmark import generated
from vpm_jax.benchmark.report import Report, Row, align
from vpm_jax.benchmark.timing import Rate, measure
from vpm_jax.data.decode import decode, resize
from vpm_jax.data.sampling import Sampler
from vpm_jax.data.sources import load_dataset
from vpm_jax.data.split import Split
from vpm_jax.machine import threads

HELP = "loading of training batches on the CPU"
TARGET = 8000  # images per second and core


def measure_data(config: ConfigDict, split: Split, seconds: float, most_threads: int) -> list[tuple[str, Rate]]:
    """Rates of reading, decoding and resizing alone, then of `train_batches` with one and with all threads."""
    from vpm_jax.data.pipeline import train_batches  # grain takes a second to import

    cv2.setNumThreads(0)
    size = (config.data.height, config.data.width)
    order = np.random.default_rng(0).permutation(len(split))[:2048].tolist()
    encoded = [split.read(i) for i in order]  # also warms the page cache

    def loop(work: Callable[[int], object]) -> Iterator[int]:
        while True:
            for first in range(0, len(order), 64):
                chosen = range(first, min(first + 64, len(order)))
                for i in chosen:
                    work(i)
                yield len(chosen)

    out = np.empty((*size, 3), np.uint8)
    rates = [
        ("read", measure(loop(lambda i: split.read(order[i])), seconds / 4)),
        ("decode", measure(loop(lambda i: decode(encoded[i], "")), seconds)),
        (
            "decode, resize: the limit",
            measure(loop(lambda i: resize(decode(encoded[i], ""), size, config.data.resize, out)), seconds),
        ),
    ]
    total = Sampler(config, split.labels()).stages[-1].end_step
    for count in sorted({1, most_threads}):
        config.data.threads, config.data.workers = count, 0
        batches = train_batches(config, split, 0, total)
        try:
            rate = measure((len(batch["image"]) for batch in batches), seconds, warm_up=4)
        finally:
            batches.close()
        rates.append((f"train_batches, {count} thread{'s' * (count > 1)}", rate))
    return rates


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", help="same as --config.data.root (without it and $VPM_DATA: generated images)")
    parser.add_argument("--threads", type=cli.positive, default=0, help="for the last row (default: all cores)")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each row (default: %(default)s)")


def run(args: argparse.Namespace, config: ConfigDict) -> Report:
    if args.root:
        config.data.root = args.root
    for stage in (config.stage1, config.stage2):  # enough steps for the time
        stage.epochs *= 10_000
    if config.data.root or os.environ.get("VPM_DATA"):
        dataset = load_dataset(config.data)
        split, source = dataset.train, f"{len(dataset.train):,} training images of {dataset.name}"
    else:
        split = generated.split("train", 1024)
        source = f"{len(split):,} generated JPEGs in memory (--root or $VPM_DATA for a dataset)"
    rates = measure_data(config, split, args.seconds, args.threads or threads())
    limit = rates[2][1].per_core
    rows = [("", "images/s", "images/s per core", "of the limit")]
    rows += [(n, f"{r.per_second:,.0f}", f"{r.per_core:,.0f}", f"{r.per_core / limit:.0%}") for n, r in rates]
    size = f"{config.data.height} x {config.data.width}"
    name, batches = rates[-1]
    return Report(
        rows=[Row(f"data: {name}", batches.per_core, "images/s per core", limit, "decode, resize", f"{TARGET:,}")],
        lines=[
            f"{source}, to {size} uint8, {config.data.resize} resizing; crop {config.data.crop}.",
            "images/s is wall-clock time, including other load; per core is this process's CPU time.",
        ],
        figures=align(rows) + f"\nThe target is {TARGET:,} images/s per core.",
        config=config.to_dict(),
    )
