"""The cost of runs, from the rates of finished runs or, without any, from a few timed steps."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
from ml_collections import ConfigDict

from vpm_jax import parallel, plots, step
from vpm_jax.benchmark.report import align
from vpm_jax.benchmark.step import random_batch
from vpm_jax.benchmark.timing import clocked
from vpm_jax.data.datasets import DATASETS
from vpm_jax.progress import duration
from vpm_jax.reproduce import results
from vpm_jax.reproduce.experiments import Run
from vpm_jax.schedule import Stage, schedule

EVALUATION = 0.05  # assumed evaluation time, as a fraction of the training time
STEPS = 3  # timed, where no run has finished
PARTIAL = 0.05  # assumed evaluation time of a partial dataset (hundreds of images), as a fraction of a full one


def size(config: ConfigDict) -> tuple[int, int]:
    """(images, identities) of the training set by the official counts, without the data."""
    if config.data.name == "synthetic":
        own = config.data.synthetic
        images, identities = own.train_identities * own.images_per_camera * own.cameras, own.train_identities
    else:
        images, identities = DATASETS[config.data.name].official("train")[0]
    kept = identities - config.data.holdout_identities
    return images * kept // identities, kept


def stages(config: ConfigDict) -> tuple[Stage, ...]:
    """The schedule by the official counts."""
    return schedule(config, *size(config))


def images(run: Run) -> int:
    """The number of images a run trains on, with repeats; 0 for an evaluation."""
    return 0 if run.of else sum(stage.steps * stage.batch for stage in stages(run.config))


def records(workdir: Path) -> list[dict[str, Any]]:
    """The training records in a workdir; [] if there are none."""
    with contextlib.suppress(OSError, ValueError):
        return list(plots.read_steps(workdir / "metrics.jsonl").values())
    return []


def rates(run: Run, finished: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """(training images per second, seconds of evaluation) from finished runs on the same hardware, or None.

    Uses runs of the same dataset, scale and variant, and of the same method if there is one.
    """
    like = {"dataset": run.dataset, "scale": run.scale, "variant": run.variant, "hardware": results.hardware()}
    similar = [r for r in finished if like.items() <= r.items()]
    trained = [r for r in similar if r["images"]]
    if not trained:
        return None
    tested = [r for r in similar if r["test"] == (run.test or run.dataset)]
    same = [r for r in tested if r["method"] == run.method] or tested * bool(run.test)
    evaluation = median(r["evaluation_seconds"] for r in same or trained)
    if run.test and not same:
        evaluation *= PARTIAL
    trained = [r for r in trained if r["method"] == run.method] or trained
    return median(r["images"] / r["seconds"] for r in trained), evaluation


def timed_rate(config: ConfigDict) -> float:
    """Training images per second, from a few steps on noise after compilation.

    Raises:
      UserError: for a config that cannot be trained here.
    """
    config = config.copy_and_resolve_references()
    for stage in stages(config):
        config[stage.name].steps_per_epoch = stage.steps_per_epoch
    _, config.model.num_identities = size(config)
    place = parallel.placement(config.parallel, parallel.data_mesh(stage.batch))
    batch = place.put_batch(random_batch(config, stage.batch))
    state, numbers = (place.put_state(tree) for tree in (step.init_state(config), step.numbers(config)))
    train_step = place.compile(step.make_step, step.program(config))

    def train(steps: int) -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = train_step(state, batch, numbers)
        jax.block_until_ready(metrics)

    train(1)  # compiles
    seconds, _ = clocked(lambda: train(STEPS))
    return STEPS * stage.batch / seconds["wall"]


def describe(missing: Sequence[Run], folder: Path, workdirs: Path) -> str:
    """A table of the missing runs with images and time, and the total."""
    finished = results.finished(folder)
    timed: float | None = None
    rows, total, total_images, sources = [("", "images", "time", "")], 0.0, 0, set()
    trained = next(filter(images, missing), None)
    for run in missing:
        count, known = images(run), rates(run, finished)
        if known is not None:
            rate, evaluation = known
            sources.add("the rates of finished runs")
        elif trained is None:  # timing steps would take longer than some evaluations
            rate, evaluation = 1.0, 0.0
        else:
            if timed is None:
                print("no run of this scale has finished on this hardware: timing a few steps", flush=True)
                timed = timed_rate(trained.config)
            evaluation = EVALUATION * max(count, images(trained)) / timed * (PARTIAL if run.test else 1)
            rate = timed
            sources.add(f"a few timed steps ({timed:,.1f} images/s; evaluation assumed to take {EVALUATION:.0%} of it)")
        history = records(workdirs / run.name)
        left = count - min(count, int(history[-1]["step"]) * stages(run.config)[-1].batch) if history else count
        seconds = left / rate + evaluation
        notes = []
        if left < count:
            notes.append(f"{1 - left / count:.0%} trained before")
        if run.of is not None:
            notes.append(f"evaluates {run.of.name}")
        if owner := results.owner(folder, run):
            notes.append(f"claimed by {owner}")
        time = duration(seconds) if known or trained else "–"
        rows.append((run.name, f"{count:,}" if count else "–", time, "; ".join(notes)))
        total, total_images = total + seconds, total_images + left
    if not sources:
        return f"{align(rows)}\nevaluations alone; none has finished on this hardware, so their time is not known"
    cost = f"in total {total_images:,} images, about {duration(total)} on {results.hardware()}"
    return f"{align(rows)}\n{cost}, estimated from {' and '.join(sorted(sources))}"
