"""Search in a large gallery on disk: seconds of `vpm_jax.matching.top_k` for a batch of queries, beside what reading
the gallery's bytes and the matrix products alone would take."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import parallel
from vpm_jax.benchmark.matching import images
from vpm_jax.benchmark.report import Report, Row
from vpm_jax.benchmark.timing import in_turn, timed
from vpm_jax.errors import UserError
from vpm_jax.search.store import DTYPES, About, Entry, Store, Writer

HELP = "the nearest images of a gallery on disk, beside memory bandwidth and the matmul limit"
SLICE_BYTES = 2**26  # of features, made or read at a time
CHECKED_BYTES = 2**25  # of float64 features that the answers are checked on


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", type=int, default=16, help="in the batch (default: %(default)s)")
    parser.add_argument("--gallery", type=int, default=50_000, help="images on disk (default: %(default)s)")
    parser.add_argument("--regions", type=int, default=6, help="of each image (default: %(default)s)")
    parser.add_argument("--channels", type=int, default=256, help="of each region (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="on disk (default: %(default)s)")
    parser.add_argument("--k", type=int, default=10, help="how many of the nearest (default: %(default)s)")
    parser.add_argument("--folder", type=Path, help="where the gallery lies for a while (default: a temporary folder)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each (default: %(default)s)")


def make_gallery(folder: Path, args: argparse.Namespace) -> Store:
    """A store of made-up images, written a slice at a time."""
    random, size = np.random.default_rng(1), max(1, SLICE_BYTES // (4 * args.regions * args.channels))
    with Writer(folder, About("benchmark", "none", args.regions, args.channels, args.dtype)) as writer:
        for first in range(0, args.gallery, size):
            count = min(size, args.gallery - first)
            names = [Entry(f"{i}.jpg") for i in range(first, first + count)]
            writer.append(names, *images(count, args.regions, args.channels, random))
    return Store(folder)


def check(query: tuple[np.ndarray, np.ndarray], gallery: tuple[np.ndarray, np.ndarray], k: int) -> None:
    """Raises RuntimeError unless `top_k` finds what sorting every distance of Eq. 4 in float64 finds."""
    from vpm_jax.matching import top_k

    found, index = top_k(*query, gallery, k)
    features, visibility = (x.astype(np.float64) for x in gallery)
    for one, scores, distance, at in zip(*query, found, index, strict=True):
        weight = scores * visibility
        every = (np.linalg.norm(features - one, axis=-1) * weight).sum(axis=1) / weight.sum(axis=1)
        nearest = np.sort(every)[: len(at)]
        if not (np.allclose(every[at], nearest, rtol=1e-6) and np.allclose(distance, nearest, rtol=1e-6)):
            raise RuntimeError("the nearest images are not those of the whole distance matrix")


def read(store: Store) -> int:
    """Goes over every byte of the features, a slice at a time: the largest."""
    step = max(1, SLICE_BYTES // (store.about.bytes_of("features") // len(store)))
    return max(int(store.features[i : i + step].view(np.uint8).max()) for i in range(0, len(store), step))


def run(args: argparse.Namespace, config: ConfigDict) -> Report:
    if min(args.queries, args.gallery, args.regions, args.channels, args.k, args.rounds) < 1:
        raise UserError("--queries, --gallery, --regions, --channels, --k and --rounds: expected at least 1 of each.")
    if args.folder is not None and not args.folder.is_dir():
        raise UserError(f"--folder {args.folder} is no folder: make it, or leave it out for a temporary one.")
    parallel.prepare_backend()
    from vpm_jax.benchmark.limits import describe, limits
    from vpm_jax.matching import top_k

    here = describe()
    query = images(args.queries, args.regions, args.channels, np.random.default_rng(0))
    # HIGHEST, as matching's own products: no TF32, whose digits are too few.
    amounts, work = limits("float32", "highest")
    with tempfile.TemporaryDirectory(dir=args.folder, prefix="gallery-") as folder:
        store = make_gallery(Path(folder), args)
        some = slice(0, max(1, CHECKED_BYTES // (8 * args.regions * args.channels)))
        check(query, (store.features[some], store.visibility[some]), args.k)
        search = partial(top_k, *query, store, args.k)
        before = parallel.peak_memory()
        search()  # compiles
        after = parallel.peak_memory()
        contestants: dict[str, Callable[[], object]] = {
            "search": search,
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
    return Report(
        rows=[
            Row(f"search: {args.queries} queries", median(times["search"]), "s", limit, limit_is)
            for limit, limit_is in (
                (size / bandwidth, f"its {size / 1e9:.3g} GB at {bandwidth / 1e9:.3g} GB/s (a copy's)"),
                (min(times["read"]), "reading the mapped file"),
                (flops / peak, f"matmul at {peak / 1e9:,.0f} GFLOP/s"),
            )
        ],
        lines=[
            f"The {args.k} nearest of {args.gallery:,} images of {args.regions} x {args.channels} {args.dtype} in a "
            f"store on disk, just written; on {here['device']}, {args.rounds} turns each. Among the first "
            f"{min(args.gallery, some.stop):,} they are those of the whole distance matrix in float64.",
            f"Memory: {before:.2f} GiB at most before the first search, {after:.2f} GiB after it.",
        ],
        device=here["accelerator"],
    )
