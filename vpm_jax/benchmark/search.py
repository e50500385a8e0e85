"""Search in a large gallery on disk: seconds of `vpm_jax.topk.top_k` for a batch of queries, compared with reading
the gallery and with the matrix products alone."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import cli, parallel
from vpm_jax.benchmark.matching import exact_distance, images
from vpm_jax.benchmark.report import Report, Row
from vpm_jax.benchmark.timing import in_turn, timed
from vpm_jax.config import default
from vpm_jax.errors import UserError
from vpm_jax.search.store import DTYPES, About, Entry, Store, Writer

HELP = "the nearest images of a gallery on disk, compared with memory bandwidth and the matmul limit"
SLICE_BYTES = 2**26  # of features generated or read at a time
CHECKED_BYTES = 2**25  # of float64 features used to check the results


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", type=cli.positive, default=16, help="(default: %(default)s)")
    parser.add_argument("--gallery", type=cli.positive, default=50_000, help="images (default: %(default)s)")
    parser.add_argument("--regions", type=cli.positive, default=6, help="per image (default: %(default)s)")
    parser.add_argument("--channels", type=cli.positive, default=256, help="per region (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="on disk (default: %(default)s)")
    parser.add_argument("--k", type=cli.positive, default=10, help="number of nearest images (default: %(default)s)")
    parser.add_argument(
        "--reduce", type=cli.positive, default=252, help="numbers per image of the first stage (default: %(default)s)"
    )
    parser.add_argument(
        "--candidates", type=cli.positive, default=1000, help="of the second stage (default: %(default)s)"
    )
    parser.add_argument("--folder", type=Path, help="for the temporary gallery (default: the system's)")
    parser.add_argument("--rounds", type=cli.positive, default=3, help="(default: %(default)s)")


def make_gallery(folder: Path, args: argparse.Namespace) -> Store:
    """A store of random features, written in slices."""
    random, size = np.random.default_rng(1), max(1, SLICE_BYTES // (4 * args.regions * args.channels))
    with Writer(folder, About("benchmark", "none", args.regions, args.channels, args.dtype)) as writer:
        for first in range(0, args.gallery, size):
            count = min(size, args.gallery - first)
            names = [Entry(f"{i}.jpg") for i in range(first, first + count)]
            writer.append(names, *images(count, args.regions, args.channels, random))
    return Store(folder)


def check(query: tuple[np.ndarray, np.ndarray], gallery: tuple[np.ndarray, np.ndarray], k: int) -> None:
    """Raises RuntimeError unless `top_k` agrees with sorting all distances of Eq. 4 in float64."""
    from vpm_jax.topk import top_k

    distances, index = top_k(*query, *gallery, k)
    for exact, distance, chosen in zip(exact_distance(*query, *gallery), distances, index, strict=True):
        nearest = np.sort(exact)[: len(chosen)]
        if not (np.allclose(exact[chosen], nearest, rtol=1e-6) and np.allclose(distance, nearest, rtol=1e-6)):
            raise RuntimeError("the nearest images are not those of the whole distance matrix")


def read(store: Store) -> int:
    """Reads every byte of the features, in slices; returns the largest."""
    step = max(1, SLICE_BYTES // (store.about.bytes_of("features") // len(store)))
    return max(int(store.features[i : i + step].view(np.uint8).max()) for i in range(0, len(store), step))


def run(args: argparse.Namespace, config: ConfigDict) -> Report:
    if args.folder is not None and not args.folder.is_dir():
        raise UserError(f"--folder {args.folder} is not a folder: create it, or leave out --folder.")
    from vpm_jax.benchmark.limits import accelerator, limits
    from vpm_jax.description import Description
    from vpm_jax.reduction import Reduction
    from vpm_jax.search import reduced
    from vpm_jax.topk import top_k

    query = images(args.queries, args.regions, args.channels, np.random.default_rng(0))
    amounts, work = limits("float32", "highest")  # the precision of `top_k`
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="gallery-") as folder:
        store = make_gallery(Path(folder), args)
        checked = slice(0, max(1, CHECKED_BYTES // (8 * args.regions * args.channels)))
        check(query, (store.features[checked], store.visibility[checked]), args.k)
        search = partial(top_k, *query, store.features, store.visibility, args.k)
        reduction = Reduction.fit(Description(store.features[checked], store.visibility[checked]), args.reduce)
        reduced.write(store, reduction)
        small = reduced.Reduced(reduction, Store(store.folder / "reduced"))
        two_stage = partial(small.nearest, default().match, Description(*query), store, args.k, args.candidates)
        before = parallel.peak_memory()
        search()  # compiles
        after = parallel.peak_memory()
        contestants: dict[str, Callable[[], object]] = {
            "search": search,
            "two stages": two_stage,
            "read": partial(read, store),
            "copy": partial(work["copy"], 1),
            "matmul": partial(work["matmul"], 1),
        }
        for contestant in contestants.values():
            contestant()
        times = in_turn({name: timed(contestant, args.clock) for name, contestant in contestants.items()}, args.rounds)
        size = store.about.bytes_of("features")
    bandwidth, peak = (amounts[name] / min(times[name]) for name in ("copy", "matmul"))
    flops = 2.0 * args.queries * args.gallery * args.regions * args.channels
    limits_of = {
        f"its {size / 1e9:.3g} GB at {bandwidth / 1e9:.3g} GB/s (a copy's)": size / bandwidth,
        "reading the mapped file": min(times["read"]),
        f"matmul at {peak / 1e9:,.0f} GFLOP/s": flops / peak,
    }
    exact, numbers = median(times["search"]), small.store.about.channels * args.regions
    rows = [Row(f"search: {args.queries} queries", exact, "s", limit, name) for name, limit in limits_of.items()]
    two = f"search in two stages: {args.candidates:,} candidates by {numbers} numbers per image"
    rows.append(Row(two, median(times["two stages"]), "s", exact, "the exact search"))
    lines = [
        f"The {args.k} nearest of {args.gallery:,} images of {args.regions} x {args.channels} {args.dtype} in a store "
        f"on disk, just written; {args.rounds} rounds. Checked against the full float64 distance matrix of the first "
        f"{min(args.gallery, checked.stop):,} images. docs/results/vectors.md has how many of the nearest two stages "
        "find.",
        f"Peak memory: {before:.2f} GiB before the first search, {after:.2f} GiB after it.",
    ]
    return Report(rows, lines, device=accelerator())
