"""Feature extraction: images/s of the network alone and from encoded images, compared with their limits."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import captions, cli, parallel
from vpm_jax.benchmark import generated
from vpm_jax.benchmark.report import Report, Row
from vpm_jax.benchmark.step import fixed
from vpm_jax.benchmark.timing import best, clocked
from vpm_jax.data.sources import load_test_set

if TYPE_CHECKING:
    from vpm_jax.description import Describer

HELP = "feature extraction, compared with the matmul limit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", help="a dataset's query and gallery images (default: generated ones)")
    parser.add_argument("--images", type=cli.positive, default=1024, help="generated images (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="for the network alone (default: %(default)s)")


def network(args: argparse.Namespace, config: ConfigDict) -> tuple[Describer, Any, float, float | None, str]:
    """(a describer, random variables, images/s of the compiled network alone, its matmul limit, the limit's name)."""
    import jax

    from vpm_jax import models, step
    from vpm_jax.benchmark.limits import matmul_limit
    from vpm_jax.description import Describer

    mesh = parallel.data_mesh(config.eval.batch)
    describer = Describer(fixed(config), mesh)
    config = describer.config
    state = step.init_state(config)
    variables = parallel.replicate(mesh, step.evaluated(state))
    shape = (config.eval.batch, config.data.height, config.data.width, 3)
    image = parallel.shard(mesh, np.random.default_rng(0).integers(0, 256, shape, np.uint8))
    compiled = jax.jit(step.make_feature_step(config)).lower(variables, image).compile()
    seconds = best(lambda: jax.block_until_ready(compiled(variables, image)), args.seconds, clock=args.clock)

    peak, limit_is = matmul_limit(models.compute_dtype(config.model.dtype).name, args.clock)
    flops = (compiled.cost_analysis() or {}).get("flops")  # of one device, like the peak
    limit = config.eval.batch * peak / flops if flops else None
    return describer, variables, config.eval.batch / seconds, limit, limit_is


def run(args: argparse.Namespace, config: ConfigDict) -> Report:
    from vpm_jax.benchmark.limits import accelerator
    from vpm_jax.description import CroppedSplit

    if args.root:
        config.data.root = args.root
        dataset = load_test_set(config.data)
        splits, source = [dataset.query, dataset.gallery], dataset.name
    else:
        splits, source = [generated.split("query", args.images)], "generated"
    describer, variables, alone, limit, limit_is = network(args, config)
    config = describer.config
    describer.split(variables, splits[0].take(np.arange(min(len(splits[0]), 8))))  # compiles
    seconds = clocked(lambda: describer.splits(variables, [CroppedSplit(split) for split in splits]))[0][args.clock]
    count = sum(map(len, splits))
    lines = [
        f"Recipe {config.recipe}: {captions.network(config)}, {config.model.dtype} compute, {count:,} {source} images, "
        f"{config.eval.batch} per batch."
    ]
    rows = [
        Row("extraction: network alone", alone, "images/s", limit, limit_is),
        Row("extraction: from JPEG to features", count / seconds, "images/s", alone, "the network alone"),
    ]
    return Report(rows, lines, device=accelerator(), config=config.to_dict())
