"""Measures the parts of the project on this machine: `python -m vpm_jax.benchmark PART`.

`data` measures the loading of training batches on the CPU, beside what decoding alone would allow:

    python -m vpm_jax.benchmark data --root FOLDER
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vpm_jax.config import default

# The parts import what they need: `data` is for machines and processes without an accelerator.


class Rate(NamedTuple):
    """What was measured: images, seconds on the clock, seconds of CPU over all threads."""

    images: int
    wall: float
    cpu: float

    @property
    def per_second(self) -> float:
        return self.images / self.wall

    @property
    def per_core(self) -> float:
        """Images per second of CPU time: what a core gives, however busy the machine is with other things."""
        return self.images / self.cpu


def measure(counts: Iterable[int], seconds: float, warm_up: int = 1) -> Rate:
    """Takes image counts from an iterator, each when the images are done, for about `seconds`.

    The first `warm_up` are not counted: they pay for imports, caches and the filling of buffers.
    """
    iterator = iter(counts)
    for _ in range(warm_up):
        next(iterator)
    wall, cpu, images = time.perf_counter(), time.process_time(), 0
    for count in iterator:
        images += count
        if time.perf_counter() - wall >= seconds:
            break
    return Rate(images, time.perf_counter() - wall, time.process_time() - cpu)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of text as an aligned table; the first row is the header, the first column is left-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


@dataclass(frozen=True)
class _Memory:
    """The images of a split as bytes in memory."""

    data: tuple[bytes, ...]

    def read(self, name: str, position: int) -> bytes:
        return self.data[position]


def generated_split(images: int = 1024, identities: int = 128):
    """A Split of made-up 128 x 64 JPEGs in memory, about as large (2.6 KB) as those of Market-1501."""
    import cv2
    from PIL import Image

    from vpm_jax.data.sources import Split

    random, data = np.random.default_rng(0), []
    for _ in range(images):
        # Smooth colours and some noise: the size, and so the time to decode, is that of photographs.
        picture = cv2.resize(random.uniform(0, 255, (16, 8, 3)).astype(np.float32), (64, 128))
        picture = np.clip(picture + random.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=80)
        data.append(buffer.getvalue())
    identity = (np.arange(images) % identities + 1).astype(np.int32)
    names = tuple(f"generated/{i:05d}.jpg" for i in range(images))
    return Split("train", names, identity, np.ones(images, np.int32), _Memory(tuple(data)))


def measure_data(config: ConfigDict, split, seconds: float, threads: int) -> list[tuple[str, Rate]]:
    """Rates of reading, decoding and resizing alone, then of `train_batches` with one thread and with `threads`."""
    import cv2

    from vpm_jax.data.decode import decode, resize
    from vpm_jax.data.pipeline import train_batches
    from vpm_jax.data.sampling import Sampler

    cv2.setNumThreads(0)
    size = (config.data.height, config.data.width)
    order = np.random.default_rng(0).permutation(len(split))[:2048].tolist()
    encoded = [split.read(i) for i in order]  # also brings the files into the page cache

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
    shape = (config.data.height // 16, config.data.width // 16)
    for count in sorted({1, threads}):
        with config.unlocked():
            config.data.threads, config.data.workers = count, 0
        batches = train_batches(config, split, shape, 0, total)
        try:
            rate = measure((len(batch["image"]) for batch in batches), seconds, warm_up=4)
        finally:
            batches.close()
        rates.append((f"train_batches, {count} thread{'s' * (count > 1)}", rate))
    return rates


def data_main(args: argparse.Namespace, overrides: list[str]) -> None:
    from vpm_jax.cli import load_config, override
    from vpm_jax.data.sources import load_dataset

    if args.config:
        config = load_config(args.config, overrides)
    else:
        config = default()
        override(config, overrides)
    if args.root:
        config.data.root = args.root
    for stage in (config.stage1, config.stage2):  # as many steps as the time allows
        stage.epochs *= 10_000
    if config.data.root or os.environ.get("VPM_DATA"):
        dataset = load_dataset(config.data)
        split, source = dataset.train, f"{len(dataset.train):,} training images of {dataset.name}"
    else:
        split = generated_split()
        source = f"{len(split):,} generated JPEGs in memory (--root or $VPM_DATA for a dataset)"
    rates = measure_data(config, split, args.seconds, args.threads or os.cpu_count() or 1)
    limit = rates[2][1].per_core
    rows = [("", "images/s", "images/s per core", "of the limit")]
    rows += [(n, f"{r.per_second:,.0f}", f"{r.per_core:,.0f}", f"{r.per_core / limit:.0%}") for n, r in rates]
    size = f"{config.data.height} x {config.data.width}"
    print(f"{source}, to {size} uint8, {config.data.resize} resizing; crop {config.data.crop}.")
    print(table(rows))
    print("images/s is by the clock, with whatever else the machine does; per core is by this process's CPU time.")


def parser() -> argparse.ArgumentParser:
    from vpm_jax.cli import add_config

    top = argparse.ArgumentParser(prog="python -m vpm_jax.benchmark", description="Measures parts of the project.")
    parts = top.add_subparsers(dest="part", required=True, metavar="PART")

    data = parts.add_parser("data", help="loading of training batches on the CPU")
    data.set_defaults(run=data_main)
    add_config(data)
    data.add_argument("--root", help="the same as --config.data.root (without it or $VPM_DATA: generated images)")
    data.add_argument("--threads", type=int, default=0, help="of the last row (default: this machine's cores)")
    data.add_argument("--seconds", type=float, default=3.0, help="spent on each row (default: %(default)s)")
    return top


def main(argv: list[str] | None = None) -> None:
    args, overrides = parser().parse_known_args(argv)
    args.run(args, overrides)


if __name__ == "__main__":
    from vpm_jax.cli import run

    run(main)
