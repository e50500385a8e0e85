"""Appearance vectors for a tracker: crops/s from video frames by `vpm_jax.tracking.Encoder`, compared with the network
alone on crops of the input's size."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import captions, cli, parallel
from vpm_jax.benchmark.report import Report, Row
from vpm_jax.benchmark.step import fixed
from vpm_jax.benchmark.timing import in_turn, timed

HELP = "appearance vectors for a tracker, compared with the network alone"
FRAME = (1080, 1920)
PERSON = (300, 120)  # height and width in pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--people", type=cli.positive, nargs="+", default=[8, 64], help="in a frame (default: 8 64)")
    parser.add_argument("--rounds", type=cli.positive, default=10, help="frames of each (default: %(default)s)")


def boxes(count: int, random: np.random.Generator) -> np.ndarray:
    """Boxes [count, 4] of people whose centers are in the frame, so that its edges cut some of them."""
    center = random.uniform(0, FRAME[::-1], (count, 2))
    half = np.array(PERSON[::-1]) / 2
    return np.concatenate([center - half, center + half], axis=1)


def run(args: argparse.Namespace, config: ConfigDict) -> Report:
    import jax

    from vpm_jax import step
    from vpm_jax.api import VPM
    from vpm_jax.benchmark.limits import accelerator
    from vpm_jax.description import Describer
    from vpm_jax.tracking import Encoder

    config, random = fixed(config), np.random.default_rng(0)
    mesh, state = parallel.data_mesh(devices=jax.local_devices()), step.init_state(config)
    variables = parallel.replicate(mesh, step.evaluated(state))
    model = VPM(config, partial(Describer(config, mesh, region_maps=True).step, variables), "", "random weights")

    def network(inputs: tuple[np.ndarray, ...]) -> list[np.ndarray]:
        return [np.asarray(x) for x in model.step(*inputs).values()]

    encoder, frame = Encoder(model, "bgr", max(args.people)), random.integers(0, 256, (*FRAME, 3), np.uint8)
    rows = []
    for people in args.people:
        inputs = model.inputs(random.integers(0, 256, (people, *model.image_size, 3), np.uint8))
        work: dict[str, Callable[[], object]] = {
            "encoder": partial(encoder.encode, frame, boxes(people, random)),
            "network": partial(network, inputs),
        }
        for contestant in work.values():
            contestant()  # compiles
        times = in_turn({name: timed(contestant, args.clock) for name, contestant in work.items()}, args.rounds)
        encoder_rate, alone = (people / median(times[name]) for name in ("encoder", "network"))
        rows += [
            Row(f"tracking: network alone, {people} crops", alone, "crops/s"),
            Row(f"tracking: {people} people in a frame", encoder_rate, "crops/s", alone, "the network alone"),
        ]
    line = (
        f"Recipe {config.recipe}: {captions.network(config)}, {config.model.dtype} compute, crops of about "
        f"{PERSON[0]} x {PERSON[1]} pixels."
    )
    return Report(rows, [line], device=accelerator(), config=config.to_dict())
