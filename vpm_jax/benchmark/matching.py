"""Matching by Eq. 4: pairs/s of `matching.region_distance`, compared with NumPy, PyTorch and the matmul limit."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from statistics import median

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import cli
from vpm_jax.benchmark.report import Report, Row
from vpm_jax.benchmark.timing import in_turn, matmul_size, timed
from vpm_jax.machine import threads

HELP = "pairs/s of matching, compared with NumPy, PyTorch and the matmul limit"
BLOCK = 2048  # gallery images in a block of NumPy and PyTorch: bounded memory, products at full speed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--queries", type=cli.positive, default=1000, help="(default: %(default)s; Market-1501: 3368)")
    parser.add_argument("--gallery", type=cli.positive, default=8000, help="(default: %(default)s; Market-1501: 15913)")
    parser.add_argument("--channels", type=cli.positive, default=2048, help="per region (default: %(default)s)")
    parser.add_argument("--rounds", type=cli.positive, default=3, help="(default: %(default)s)")


def images(count: int, regions: int, channels: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Features [count, P, C] of unit length, nonnegative as after a ReLU, and visibility [count, P]."""
    features = np.maximum(random.standard_normal((count, regions, channels), np.float32), 0)
    features /= np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
    return features, random.uniform(0, 32, (count, regions)).astype(np.float32)


def exact_distance(q: np.ndarray, q_weight: np.ndarray, g: np.ndarray, g_weight: np.ndarray) -> np.ndarray:
    """Eq. 4 in float64 [Q, G], straight from its definition: slow, to check with."""
    distance = np.empty((len(q), len(g)))
    g, g_weight = g.astype(np.float64), g_weight.astype(np.float64)
    for row, features, scores in zip(distance, q, q_weight, strict=True):
        weight = scores * g_weight
        row[:] = (weight * np.linalg.norm(g - features, axis=-1)).sum(axis=1) / weight.sum(axis=1)
    return distance


def numpy_distance(q: np.ndarray, q_weight: np.ndarray, g: np.ndarray, g_weight: np.ndarray) -> np.ndarray:
    """Eq. 4 in plain NumPy: |q|^2 + |g|^2 - 2 q.g, one region at a time, the gallery in blocks."""
    distance = np.empty((len(q), len(g)), np.float32)
    for start in range(0, len(g), BLOCK):
        rows = slice(start, start + BLOCK)
        total = np.zeros((len(q), len(g[rows])), np.float32)
        weights = np.zeros_like(total)
        for i in range(q.shape[1]):
            a, b = q[:, i], g[rows, i]
            squared = np.square(a).sum(1)[:, None] + np.square(b).sum(1)[None] - 2 * (a @ b.T)
            weight = np.outer(q_weight[:, i], g_weight[rows, i])
            total += weight * np.sqrt(np.maximum(squared, 0))
            weights += weight
        distance[:, rows] = total / weights
    return distance


def torch_distance() -> tuple[Callable[..., np.ndarray], float, Callable[[], None]]:
    """(Eq. 4 in PyTorch, on a GPU if available, from and to NumPy; the FLOPs of a large product; this product)."""
    import torch

    torch.set_num_threads(threads())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    size = matmul_size(device)
    a = torch.randn(size, size, device=device)

    def distance(*arrays: np.ndarray) -> np.ndarray:
        q, q_weight, g, g_weight = (torch.from_numpy(x).to(device) for x in arrays)
        out = torch.empty((len(q), len(g)), device=device)
        for start in range(0, len(g), BLOCK):
            rows = slice(start, start + BLOCK)
            total = torch.zeros((len(q), len(g[rows])), device=device)
            weights = torch.zeros_like(total)
            for i in range(q.shape[1]):
                a, b = q[:, i], g[rows, i]
                squared = torch.addmm(a.square().sum(1)[:, None] + b.square().sum(1)[None], a, b.T, alpha=-2)
                weight = torch.outer(q_weight[:, i], g_weight[rows, i])
                total.addcmul_(weight, squared.clamp_(min=0).sqrt_())
                weights += weight
            torch.div(total, weights, out=out[:, rows])
        return out.cpu().numpy()

    def matmul() -> None:
        a @ a
        if device == "cuda":
            torch.cuda.synchronize()

    return distance, 2.0 * size**3, matmul


def run(args: argparse.Namespace, config: ConfigDict) -> Report:
    from vpm_jax.benchmark.limits import accelerator, limits
    from vpm_jax.matching import region_distance

    regions, random = config.model.grid[0] * config.model.grid[1], np.random.default_rng(0)
    query = images(args.queries, regions, args.channels, random)
    gallery = images(args.gallery, regions, args.channels, random)
    amounts, work = limits("float32", "highest")  # the precision of `region_distance`
    size = matmul_size("cpu")
    square = random.standard_normal((size, size), np.float32)
    flops = {"JAX": amounts["matmul"], "NumPy": 2.0 * size**3}  # of the products
    contestants: dict[str, Callable[[], object]] = {
        "JAX": partial(region_distance, *query, *gallery),
        "NumPy": partial(numpy_distance, *query, *gallery),
    }
    products: dict[str, Callable[[], object]] = {"JAX": partial(work["matmul"], 1), "NumPy": lambda: square @ square}
    lines = []
    if find_spec("torch"):
        distance, flops["PyTorch"], products["PyTorch"] = torch_distance()
        contestants["PyTorch"] = partial(distance, *query, *gallery)
    else:
        lines.append("PyTorch is not installed, to compare with: pip install -e '.[parity]'.")
    results = {name: np.asarray(contestant()) for name, contestant in contestants.items()}  # also warms up
    difference = max(float(np.abs(results["JAX"] - other).max()) for other in results.values())
    for product in products.values():
        product()

    turns = {("distance", name): contestant for name, contestant in contestants.items()}
    turns |= {("matmul", name): product for name, product in products.items()}

    times = in_turn({key: timed(contestant, args.clock) for key, contestant in turns.items()}, args.rounds)
    peak, library = max((flops[name] / min(times["matmul", name]), name) for name in products)
    pairs = args.queries * args.gallery
    limit = pairs / (2.0 * pairs * regions * args.channels / peak)
    lines.append(
        f"{args.queries:,} queries to {args.gallery:,} gallery images of {regions} x {args.channels} float32, host to "
        f"host; {args.rounds} rounds; the results differ by at most {difference:.1e}."
    )
    limit_is = f"matmul at {peak / 1e9:,.0f} GFLOP/s ({library}'s)"
    rows = []
    for name in contestants:
        rate = pairs / median(times["distance", name])
        rows.append(Row(f"matching: {name}", rate, "pairs/s", limit, limit_is, "50% of the limit" * (name == "JAX")))
    return Report(rows, lines, device=accelerator())
