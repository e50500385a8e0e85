"""The training step: images/s beside what the machine's matrix products and memory allow, and PyTorch's.

Compiled, with donated state and a random batch on one device, as training runs it. Each side runs in a process of its
own, so that neither's threads nor memory are the other's, and they take turns.
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
from statistics import median
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import config as config_lib
from vpm_jax.benchmark.report import Report, Row
from vpm_jax.benchmark.timing import clocked, in_turn
from vpm_jax.errors import UserError

HELP = "the training step, beside the matmul limit and PyTorch"
DTYPES = ("float32", "bfloat16")
CLASSES = 751  # Market-1501's, where the config leaves them to the training set


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--against", choices=("torch",), help="the same step in PyTorch, in turn")
    parser.add_argument("--batch", type=int, help="images (default: those of the config's stage 2)")
    parser.add_argument("--dtype", help="float32, bfloat16 or both with a comma (default: float32 on CPU, else both)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: %(default)s)")
    timed = parser.add_mutually_exclusive_group()
    timed.add_argument("--seconds", type=float, default=20.0, help="for each side, over its turns (default: 20)")
    timed.add_argument("--steps", type=int, help="steps in a turn, instead of --seconds")
    parser.add_argument("--no-torch-compile", action="store_true", help="PyTorch without torch.compile only")


# The keys that PyTorch's side follows in these groups; it knows every other at its default alone.
FOLLOWED = {
    "model": "depth width stem strides last_stride stride_on bn_epsilon grid locator locator_dropout locator_groups "
    "locator_init_std pool_gradient head_dim head_dropout head_bn_visible_only global_head dummy_classes "
    "num_identities dtype",
    "loss": "region_weight identity_weight identity_reduction identity_regions triplet_pairs margin min_cells "
    "label_smoothing",
    "optim": "momentum nesterov weight_decay backbone_multiplier",
}


def check_rival(config: ConfigDict) -> None:
    """Raises UserError for a config of which PyTorch's side would do other work."""
    usual = config_lib.default()
    for group, followed in FOLLOWED.items():
        for key, value in config[group].items():
            # Without a reducer (head_dim 0) there is another head.
            if value != usual[group][key] and (key not in followed.split() or (key == "head_dim" and not value)):
                raise UserError(
                    f"Config key {group}.{key} is {value!r}, which the PyTorch side of this benchmark does not have: "
                    f"leave it at {usual[group][key]!r}, or measure without --against."
                )


def run(args: argparse.Namespace, config: ConfigDict) -> Report:
    if args.against:
        check_rival(config)
    config = fixed(config)
    batch = random_batch(config, args.batch or config.stage2.identities * config.stage2.images_per_identity)
    here = probe()
    dtypes = args.dtype.split(",") if args.dtype else (DTYPES[:1] if here["platform"] == "cpu" else DTYPES[::-1])
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise UserError(f"--dtype {args.dtype}: expected float32, bfloat16 or float32,bfloat16.")
    report = Report(rows=[], device=here["accelerator"], config=config.to_dict())
    m, (images, height, width, _) = config.model, batch["image"].shape
    report.lines.append(
        f"Recipe {config.recipe}: ResNet-{m.depth} of width {m.width}, {images} images of {height} x {width} a batch; "
        f"on {here['device']}, a process for each side, {args.rounds} turns each."
    )
    for dtype in dtypes:
        config.model.dtype = dtype
        measure_dtype(report, config, batch, args, here["platform"])
    return report


def fixed(config: ConfigDict) -> ConfigDict:
    """The config with one stage, that of the triplets, and what a training set would decide."""
    config = config.copy_and_resolve_references()
    config.model.num_identities = config.model.num_identities or CLASSES
    config.pretrained = "none"
    config.stage1.epochs, config.stage2.epochs, config.stage2.steps_per_epoch = 0, 10_000, 100
    stage = config.stage2
    # Random images teach nothing: a tiny, constant rate keeps numbers finite and does the same work.
    stage.learning_rate, stage.schedule, stage.decay_epochs, stage.warmup_epochs = 1e-6, "step", (), 0.0
    stage.triplet_start = 0.0
    return config


def random_batch(config: ConfigDict, count: int) -> dict[str, np.ndarray]:
    """A training batch of noise; crops, labels and visible sets are drawn as training draws them."""
    from vpm_jax import models
    from vpm_jax.data.sampling import kept_ratios
    from vpm_jax.geometry import covered, fit_box
    from vpm_jax.regions import RegionGrid, draw_crop, project_regions

    if count < 4:
        raise UserError(f"--batch {count}: expected at least 4 images, two of each of two identities.")
    random = np.random.default_rng(0)
    shape, grid = models.map_shape(config), RegionGrid(*config.model.grid)
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
        batch["valid"] = np.stack([covered(box, canvas, models.feature_map_shape(config)) for box in boxes])
    return batch


def measure_dtype(
    report: Report, config: ConfigDict, batch: dict[str, np.ndarray], args: argparse.Namespace, platform: str
) -> None:
    """Appends what one precision gives."""
    dtype, text = config.model.dtype, config_lib.to_json(config)
    with contextlib.ExitStack() as stack:
        sides = {"JAX": stack.enter_context(side("jax", text, batch))}
        if args.against:
            sides["PyTorch, eager"] = stack.enter_context(side("torch", text, batch, False))
            if not args.no_torch_compile:
                try:
                    sides["PyTorch, compiled"] = stack.enter_context(side("torch", text, batch, True))
                except UserError as error:
                    report.lines.append(f"{dtype}: PyTorch ran without torch.compile: {error}")
        repetitions = {
            (name, what): args.steps if args.steps and what == "step" else one.repetitions(what, args)
            for name, one in sides.items()
            for what in one.offers
        }

        def turn(key: tuple[str, str]) -> Callable[[], float]:
            return lambda: sides[key[0]].time(key[1], repetitions[key])[args.clock] / repetitions[key]

        times = in_turn({key: turn(key) for key in repetitions}, args.rounds)

    for name, one in sides.items():
        seconds = times[name, "step"]
        line = f"{dtype}, {name}: {median(seconds):.4g} s a step ({min(seconds):.4g} to {max(seconds):.4g}, "
        line += f"{repetitions[name, 'step']} a turn)"
        if "compiled" in one.facts:
            line += f"; compiled in {one.facts['compiled'][args.clock]:.1f} s"
        report.lines.append(line + ".")
    step_times = {name: times[name, "step"] for name in sides}
    add_rates(report, dtype, len(batch["image"]), step_times, times, sides["JAX"].facts)
    rivals = {name: median(seconds) for name, seconds in step_times.items() if name != "JAX"}
    if rivals:
        rival = min(rivals, key=lambda name: rivals[name])
        # Turn by turn, so that what slowed one turn slowed both sides of its ratio.
        ratio = median(b / a for a, b in zip(step_times["JAX"], step_times[rival], strict=True))
        aim = "1" if platform == "cpu" else "1.5"
        report.rows.append(Row(f"step {dtype}: JAX / {rival}", ratio, "times", aim=aim))


def add_rates(
    report: Report,
    dtype: str,
    images: int,
    step_times: dict[str, list[float]],
    times: dict[tuple[str, str], list[float]],
    facts: dict[str, Any],
) -> None:
    """Rows of images/s, beside what the program's FLOPs, and its bytes once compiled, allow."""
    fastest, library = min((min(t), name) for (name, what), t in times.items() if what == "matmul")
    peak = facts["limits"]["matmul"] / fastest
    bandwidth = facts["limits"]["copy"] / min(times["JAX", "copy"])
    flops, accessed = facts["flops"], facts["bytes"]
    limit = images * peak / flops if flops else None
    limit_is = f"matmul at {peak / 1e9:,.0f} GFLOP/s ({library.partition(',')[0]}'s)"
    for name, seconds in step_times.items():
        report.rows.append(Row(f"step {dtype}: {name}", images / median(seconds), "images/s", limit, limit_is))
    if limit and accessed:
        report.lines.append(
            f"{dtype}: the step computes {flops / 1e9:,.4g} GFLOP, and compiled accesses {accessed / 1e9:,.4g} GB (no "
            f"cache counted); a copy moves {bandwidth / 1e9:,.4g} GB/s. The roofline is the lesser of the two limits."
        )
        by_bytes, rate = images * bandwidth / accessed, images / median(step_times["JAX"])
        which = "roofline, bytes" if by_bytes < limit else "roofline, FLOPs"
        report.rows.append(Row(f"step {dtype}: JAX", rate, "images/s", min(limit, by_bytes), which))


# ---- Processes -------------------------------------------------------------------------------------------


class Side:
    """A process that serves timings: its facts, and `time` of what it offers."""

    def __init__(self, connection: Any, name: str) -> None:
        self._connection, self._name = connection, name
        self.facts: dict[str, Any]
        self.offers: list[str]
        self.facts, self.offers = self._receive()

    def _receive(self) -> Any:
        try:
            value = self._connection.recv()
        except EOFError:
            raise UserError(
                f"The process of {self._name} died, for want of memory perhaps: try a smaller --batch."
            ) from None
        if isinstance(value, BaseException):
            raise value
        return value

    def time(self, what: str, repetitions: int) -> dict[str, float]:
        """The seconds of so many repetitions, by each clock: {"wall", "cpu"}."""
        self._connection.send((what, repetitions))
        return self._receive()

    def repetitions(self, what: str, args: argparse.Namespace) -> int:
        """How many fill a turn; warms up on the way. The limits get a tenth of the time."""
        self.time(what, 1)
        turn = args.seconds / args.rounds * (1 if what == "step" else 0.1)
        return max(1, math.ceil(turn / self.time(what, 1)["wall"]))


@contextlib.contextmanager
def side(kind: str, *arguments: Any) -> Iterator[Side]:
    """A `Side` of vpm_jax.benchmark.{kind}_step.build(*arguments)."""
    context = multiprocessing.get_context("spawn")  # neither library survives a fork
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, kind, arguments), daemon=True)
    # Every JAX process would take most of a GPU's memory for itself.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    process.start()
    theirs.close()
    try:
        yield Side(ours, "PyTorch" if kind == "torch" else "JAX")
    finally:
        ours.close()
        process.join(10)
        process.kill()


def probe() -> dict[str, Any]:
    """`limits.describe`, asked of a process of its own: this one must hold no device."""
    with side("limits") as one:
        return one.facts


def _serve(connection: Any, kind: str, arguments: tuple) -> None:
    work: dict[str, Callable[[int], None]]
    try:
        if kind == "limits":
            from vpm_jax import parallel
            from vpm_jax.benchmark import limits

            parallel.prepare_backend()
            facts, work = limits.describe(), {}
        elif kind == "torch":
            from vpm_jax.benchmark import torch_step

            facts, work = torch_step.build(*arguments)
        else:
            from vpm_jax.benchmark import jax_step

            facts, work = jax_step.build(*arguments)
        connection.send((facts, list(work)))
        while True:
            what, repetitions = connection.recv()
            connection.send(clocked(partial(work[what], repetitions))[0])
    except EOFError:
        pass  # nobody asks any more
    except UserError as error:
        connection.send(error)
    except Exception as error:
        traceback.print_exc()
        connection.send(UserError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))
