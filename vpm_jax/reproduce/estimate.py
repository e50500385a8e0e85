"""What runs will cost, from the rates of finished runs or, without any, from a few timed steps."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vpm_jax.benchmark.report import align
from vpm_jax.reproduce import results
from vpm_jax.reproduce.experiments import Run
from vpm_jax.runs.logs import duration

EVALUATION = 0.05  # of the training's time, where no finished run tells
PARTIAL = 0.05  # of an evaluation's time, of one on partial images: hundreds instead of tens of thousands


def size(config: ConfigDict) -> tuple[int, int]:
    """(images, identities) of the training set, as its authors give them: no data are needed."""
    from vpm_jax.data.datasets import DATASETS

    if config.data.name == "synthetic":
        own = config.data.synthetic
        images, identities = own.train_identities * own.images_per_camera * own.cameras, own.train_identities
    else:
        images, identities = DATASETS[config.data.name].official("train")[0]
    kept = identities - config.data.holdout_identities
    return images * kept // identities, kept


def images(run: Run) -> int:
    """How many images a run trains on, repeats counted; 0 of an evaluation."""
    from vpm_jax.schedule import schedule

    return 0 if run.of else sum(stage.steps * stage.batch for stage in schedule(run.config, *size(run.config)))


def records(workdir: Path) -> list[dict[str, Any]]:
    """The training records of a run in its workdir, [] if there are none."""
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in (workdir / "metrics.jsonl").read_text().splitlines():
            found.append(json.loads(line))
    return found


def rates(run: Run, finished: Sequence[dict[str, Any]]) -> tuple[float, float] | None:
    """(images per second of training, seconds of evaluation) of finished runs like this one on such a machine.

    Of the same dataset, scale and variant; of the same method too where there is one. None without any.
    """
    like = {"dataset": run.dataset, "scale": run.scale, "variant": run.variant, "hardware": results.hardware()}
    here = [r for r in finished if like.items() <= r.items()]
    trained = [r for r in here if r["images"]]
    if not trained:
        return None
    tested = [r for r in here if r["test"] == (run.test or run.dataset)]
    same = [r for r in tested if r["method"] == run.method] or tested * bool(run.test)
    evaluation = median(r["evaluation_seconds"] for r in same or trained)
    if run.test and not same:
        evaluation *= PARTIAL
    trained = [r for r in trained if r["method"] == run.method] or trained
    return median(r["images"] / r["seconds"] for r in trained), evaluation


def timed_rate(config: ConfigDict, steps: int = 3) -> float:
    """Images per second of training, from a few steps on noise after the one that compiles.

    Raises:
      UserError: for a config that cannot be trained here.
    """
    import jax

    from vpm_jax import models, parallel, step
    from vpm_jax.schedule import schedule

    config = config.copy_and_resolve_references()
    images, config.model.num_identities = size(config)
    for stage in schedule(config, images, config.model.num_identities):
        config[stage.name].steps_per_epoch = stage.steps_per_epoch
    batch = stage.batch  # the same in all
    place = parallel.placement(config.parallel, parallel.data_mesh(batch))
    shape, regions = models.map_shape(config), config.model.grid[0] * config.model.grid[1]
    random = np.random.default_rng(0)
    arrays = place.put_batch(
        {
            "image": random.integers(0, 256, (batch, config.data.height, config.data.width, 3), np.uint8),
            "identity": np.repeat(np.arange(stage.identities, dtype=np.int32), stage.images_per_identity),
            "labels": random.integers(0, regions, (batch, *shape), np.int32),
            "visible": np.ones((batch, regions), bool),
        }
    )
    state = place.put_state(step.init_state(config))
    train_step = place.compile(step.make_step, config)
    state, metrics = train_step(state, arrays)
    jax.block_until_ready(metrics)
    started = time.monotonic()
    for _ in range(steps):
        state, metrics = train_step(state, arrays)
    jax.block_until_ready(metrics)
    return steps * batch / (time.monotonic() - started)


def describe(missing: Sequence[Run], folder: Path, workdirs: Path) -> str:
    """A table of the runs to do with images and time, and the sum."""
    finished = results.finished(folder)
    timed: float | None = None
    rows, total, total_images, source = [("", "images", "time", "")], 0.0, 0, set()
    for run in missing:
        count, known = images(run), rates(run, finished)
        if known is not None:
            rate, evaluation = known
            source.add("the rates of finished runs")
        else:
            if timed is None:
                print("no run of this scale has finished on such a machine: timing a few steps", flush=True)
                timed = timed_rate(missing[0].config)
            evaluation = EVALUATION * max(count, images(missing[0])) / timed * (PARTIAL if run.test else 1)
            rate = timed
            source.add(f"a few timed steps ({timed:,.1f} images/s; evaluation taken as {EVALUATION:.0%} of it)")
        begun = records(workdirs / run.name)
        left = count - min(count, int(begun[-1]["step"]) * batch(run.config)) if begun else count
        seconds = left / rate + evaluation
        notes = []
        if left < count:
            notes.append(f"{1 - left / count:.0%} trained before")
        if run.of is not None:
            notes.append(f"evaluates {run.of.name}")
        if who := results.owner(folder, run):
            notes.append(f"worked on by {who}")
        rows.append((run.name, f"{count:,}" if count else "–", duration(seconds), "; ".join(notes)))
        total, total_images = total + seconds, total_images + left
    cost = f"in all {total_images:,} images, about {duration(total)} on {results.hardware()}"
    return f"{align(rows)}\n{cost}, by {' and '.join(sorted(source))}"


def batch(config: ConfigDict) -> int:
    """Images of a training step."""
    stage = config.stage2 if config.stage2.epochs else config.stage1
    return stage.identities * stage.images_per_identity
