"""The training step: images/s, compared with the machine's limits and with PyTorch.

The compiled step runs as in training, with donated state, on a random batch on one device. Each side runs in its own
process, so that they share neither threads nor memory, and they take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import captions, cli, parallel
from vpm_jax import config as config_lib
from vpm_jax.benchmark.report import Report, Row
from vpm_jax.benchmark.timing import clocked, in_turn
from vpm_jax.data.sampling import kept_ratios
from vpm_jax.errors import UserError, first_line
from vpm_jax.geometry import covered, feature_map_shape, fit_box, map_shape
from vpm_jax.regions import RegionGrid, draw_crop, project_regions

HELP = "the training step, compared with the matmul limit and PyTorch"
DTYPES = ("float32", "bfloat16")
CLASSES = 751  # Market-1501's, used if the config leaves them to the training set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", choices=("torch",), help="compare with the same step in PyTorch")
    parser.add_argument("--batch", type=cli.positive, help="images (default: the batch of the config's stage 2)")
    parser.add_argument("--dtype", help="float32, bfloat16 or float32,bfloat16 (default: float32 on CPU, else both)")
    parser.add_argument("--rounds", type=cli.positive, default=5, help="turns per side (default: %(default)s)")
    timed = parser.add_mutually_exclusive_group()
    timed.add_argument("--seconds", type=float, default=20.0, help="per side, over all turns (default: 20)")
    timed.add_argument("--steps", type=cli.positive, help="steps per turn, instead of --seconds")
    parser.add_argument("--no-torch-compile", action="store_true", help="run PyTorch only without torch.compile")


# The config keys that the PyTorch side implements in these groups. The others, and data.fit, must have their default.
FOLLOWED = {
    "model": "depth width stem strides last_stride stride_on bn_epsilon grid locator locator_dropout locator_groups "
    "locator_init_std pool_gradient head_dim head_dropout head_bn_visible_only global_head dummy_classes "
    "num_identities dtype",
    "loss": "region_weight identity_weight identity_reduction identity_regions triplet_pairs margin min_cells "
    "label_smoothing",
    "optim": "momentum nesterov weight_decay backbone_multiplier",
}


def check_rival(config: ConfigDict) -> None:
    """Raises UserError for a config that the PyTorch side does not implement."""
    default = config_lib.default()
    keys = [("data", "fit"), *((group, key) for group in FOLLOWED for key in config[group])]
    for group, key in keys:
        value, usual = config[group][key], default[group][key]
        followed = FOLLOWED.get(group, "").split()
        # The PyTorch side has no head without a reducer (head_dim 0).
        if value != usual and (key not in followed or (key == "head_dim" and not value)):
            raise UserError(
                f"Config key {group}.{key} is {value!r}, which the PyTorch side of this benchmark does not "
                f"implement: leave it at {usual!r}, or measure without --against."
            )


def run(args: argparse.Namespace, config: ConfigDict) -> Report:
    if args.against:
        check_rival(config)
    config = fixed(config)
    batch = random_batch(config, batch_size(args, config))
    device = probe()
    dtypes = args.dtype.split(",") if args.dtype else (DTYPES[::-1] if device else DTYPES[:1])
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise UserError(f"--dtype {args.dtype}: expected float32, bfloat16 or float32,bfloat16.")
    report = Report(rows=[], device=device, config=config.to_dict())
    report.lines.append(
        f"Recipe {config.recipe}: {captions.network(config)}, {len(batch['image'])} images per batch; one process per "
        f"side, {args.rounds} turns each."
    )
    for dtype in dtypes:
        config.model.dtype = dtype
        measure_dtype(report, config, batch, args)
    return report


def fixed(config: ConfigDict) -> ConfigDict:
    """A copy of the config with stage 2 alone and the values that normally come from the training set."""
    config = config.copy_and_resolve_references()
    config.model.num_identities = config.model.num_identities or CLASSES
    config.data.aspect = config.data.aspect or config.data.height / config.data.width
    config.pretrained = "none"
    config.stage1.epochs, config.stage2.epochs, config.stage2.steps_per_epoch = 0, 10_000, 100
    stage = config.stage2
    # A tiny, constant learning rate keeps training on noise finite, at the same cost.
    stage.learning_rate, stage.schedule, stage.decay_epochs, stage.warmup_epochs = 1e-6, "step", (), 0.0
    stage.triplet_start = 0.0
    return config


def batch_size(args: argparse.Namespace, config: ConfigDict) -> int:
    """--batch, by default the batch of the config's stage 2."""
    return args.batch or config.stage2.identities * config.stage2.images_per_identity


def random_batch(config: ConfigDict, count: int) -> dict[str, np.ndarray]:
    """A training batch of noise, with crops, labels and visible sets drawn as in training."""
    if count < 4:
        raise UserError(f"--batch {count}: expected at least 4 images, two of each of two identities.")
    random = np.random.default_rng(0)
    shape, grid = map_shape(config), RegionGrid(*config.model.grid)
    gammas = kept_ratios(np.array(config.data.gamma), random.uniform(size=count))
    crops = [draw_crop(config.data.crop, gamma, tuple(random.uniform(size=3))) for gamma in gammas]
    labels, visible = zip(*(project_regions(crop, grid, shape, config.loss.min_cells) for crop in crops), strict=True)
    identities = min(config.stage2.identities, count // 2, config.model.num_identities)
    canvas = config.data.height, config.data.width
    batch = {
        "image": random.integers(0, 256, (count, *canvas, 3), np.uint8),
        "identity": (np.arange(count) * identities // count).astype(np.int32),
        "labels": np.stack(labels),
        "visible": np.stack(visible),
    }
    if config.data.fit == "pad":
        boxes = [fit_box((crop.height, crop.width), canvas, 1.0) for crop in crops]  # in heights and widths of a person
        batch["valid"] = np.stack([covered(box, canvas, feature_map_shape(config)) for box in boxes])
    return batch


def measure_dtype(report: Report, config: ConfigDict, batch: dict[str, np.ndarray], args: argparse.Namespace) -> None:
    """Appends the results of one dtype to the report."""
    dtype, text = config.model.dtype, config_lib.to_json(config)
    with contextlib.ExitStack() as stack:
        sides = {"JAX": stack.enter_context(start_side("jax_step", text, batch))}
        if args.against:
            sides["PyTorch, eager"] = stack.enter_context(start_side("torch_step", text, batch, False))
            if not args.no_torch_compile:
                try:
                    sides["PyTorch, compiled"] = stack.enter_context(start_side("torch_step", text, batch, True))
                except UserError as error:
                    report.lines.append(f"{dtype}: PyTorch ran without torch.compile: {error}")
        repetitions = {
            (name, work): args.steps if args.steps and work == "step" else side.repetitions(work, args)
            for name, side in sides.items()
            for work in side.offers
        }

        def turn(key: tuple[str, str]) -> Callable[[], float]:
            return lambda: sides[key[0]].time(key[1], repetitions[key])[args.clock] / repetitions[key]

        times = in_turn({key: turn(key) for key in repetitions}, args.rounds)

    for name, side in sides.items():
        seconds = times[name, "step"]
        line = f"{dtype}, {name}: {median(seconds):.4g} s per step ({min(seconds):.4g} to {max(seconds):.4g}, "
        line += f"{repetitions[name, 'step']} per turn)"
        if "compiled" in side.facts:
            line += f"; compiled in {side.facts['compiled'][args.clock]:.1f} s"
        report.lines.append(line + ".")
    add_rates(report, dtype, len(batch["image"]), times, {name: side.facts for name, side in sides.items()})
    if rivals := [name for name in sides if name != "JAX"]:
        rival = min(rivals, key=lambda name: median(times[name, "step"]))
        # The ratio of each turn: other load slows both of its sides.
        ratio = median(b / a for a, b in zip(times["JAX", "step"], times[rival, "step"], strict=True))
        aim = "1.5" if report.device else "1"
        report.rows.append(Row(f"step {dtype}: JAX / {rival}", ratio, "times", aim=aim))


def add_rates(
    report: Report,
    dtype: str,
    images: int,
    times: dict[tuple[str, str], list[float]],
    facts: dict[str, dict[str, Any]],
) -> None:
    """Appends images/s with the limits from the program's FLOPs and, once compiled, its bytes."""
    ours = facts["JAX"]
    peak, library = max((known["limits"]["matmul"] / min(times[name, "matmul"]), name) for name, known in facts.items())
    bandwidth = ours["limits"]["copy"] / min(times["JAX", "copy"])
    flops, accessed = ours["flops"], ours["bytes"]
    limit = images * peak / flops if flops else None
    limit_is = f"matmul at {peak / 1e9:,.0f} GFLOP/s ({library.partition(',')[0]}'s)"
    for name in facts:
        rate = images / median(times[name, "step"])
        report.rows.append(Row(f"step {dtype}: {name}", rate, "images/s", limit, limit_is))
    if limit and accessed:
        report.lines.append(
            f"{dtype}: the step computes {flops / 1e9:,.4g} GFLOP, and compiled accesses {accessed / 1e9:,.4g} GB "
            f"(ignoring caches); a copy moves {bandwidth / 1e9:,.4g} GB/s. The roofline is the lower of the two limits."
        )
        by_bytes, rate = images * bandwidth / accessed, images / median(times["JAX", "step"])
        which = "roofline, bytes" if by_bytes < limit else "roofline, FLOPs"
        report.rows.append(Row(f"step {dtype}: JAX", rate, "images/s", min(limit, by_bytes), which))


# ---- Processes -------------------------------------------------------------------------------------------


class Side:
    """A process that runs timed functions: its facts, and the names of the functions it offers."""

    def __init__(self, connection: Any, name: str) -> None:
        self._connection, self._name = connection, name
        self.facts: Any
        self.offers: list[str]
        self.facts, self.offers = self._receive()

    def _receive(self) -> Any:
        try:
            value = self._connection.recv()
        except EOFError:
            raise UserError(
                f"The process of {self._name} died, perhaps out of memory: try a smaller --batch."
            ) from None
        if isinstance(value, BaseException):
            raise value
        return value

    def time(self, work: str, repetitions: int) -> dict[str, float]:
        """The seconds of the repetitions on each clock: {"wall", "cpu"}."""
        self._connection.send((work, repetitions))
        return self._receive()

    def repetitions(self, work: str, args: argparse.Namespace) -> int:
        """The number of repetitions that fill a turn, after warming up. The limits get a tenth of the time."""
        self.time(work, 1)
        turn = args.seconds / args.rounds * (1 if work == "step" else 0.1)
        return max(1, math.ceil(turn / self.time(work, 1)["wall"]))


@contextlib.contextmanager
def start_side(kind: str, *arguments: Any) -> Iterator[Side]:
    """Runs `build(*arguments)` of the module vpm_jax.benchmark.{kind} in a process."""
    context = multiprocessing.get_context("spawn")  # JAX and PyTorch do not support forking
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, kind, arguments), daemon=True)
    # Otherwise each JAX process would reserve most of the GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    process.start()
    theirs.close()
    try:
        yield Side(ours, "PyTorch" if kind == "torch_step" else "JAX")
    finally:
        ours.close()
        process.join(10)
        process.kill()


def probe() -> str:
    """`limits.accelerator`, in another process: this one must not hold a device."""
    with start_side("limits") as side:
        return side.facts


def _serve(connection: Any, kind: str, arguments: tuple[Any, ...]) -> None:
    try:
        parallel.prepare_backend()
        facts, functions = import_module(f"vpm_jax.benchmark.{kind}").build(*arguments)
        connection.send((facts, list(functions)))
        while True:
            work, repetitions = connection.recv()
            connection.send(clocked(partial(functions[work], repetitions))[0])
    except EOFError:
        pass  # the other process is done
    except UserError as error:
        connection.send(error)
    except Exception as error:
        traceback.print_exc()
        connection.send(UserError(f"{type(error).__name__}: {first_line(error)}"))
