"""Training a run: from a config to checkpoints, metrics and an evaluation in its workdir."""

from __future__ import annotations

import contextlib
import math
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vpm_jax import captions, evaluation, models, paper, parallel, plots, pretrained, step
from vpm_jax import config as config_lib
from vpm_jax.data.decode import decode
from vpm_jax.data.inventory import Inventory
from vpm_jax.data.pipeline import Batch, train_batches
from vpm_jax.data.sources import load_dataset
from vpm_jax.data.split import Split
from vpm_jax.description import Describer
from vpm_jax.disk import make_folder, replacing, write_atomically
from vpm_jax.errors import UserError
from vpm_jax.geometry import map_shape
from vpm_jax.progress import Status, duration
from vpm_jax.runs import hosts
from vpm_jax.runs.checkpoints import Checkpoints
from vpm_jax.runs.interrupts import Interrupts, Stopped
from vpm_jax.runs.logs import MetricsLog, Records
from vpm_jax.runs.workdir import (
    WorkdirLock,
    check_data,
    continue_run,
    data_at_hand,
    find_run,
    with_absolute_paths,
    write_data,
)
from vpm_jax.schedule import ends_epochs, notes, schedule, stage_of, triplet_weight


def train(requested: ConfigDict, workdir: Path, resume: bool = True) -> int:
    """Trains and evaluates a config in `workdir`, continuing the run there if there is one.

    With several processes (see `hosts.joined`) all of them call it; only process 0 uses the workdir.

    Args:
      requested: the config, not yet resolved.
      workdir: the run's folder.
      resume: whether a run in the workdir may be continued.

    Returns:
      The exit code of the command: 0, or 128 plus the signal that stopped it.

    Raises:
      UserError: for any problem the user can fix.
    """
    parallel.prepare_backend()

    # ---- The run in the workdir ------------------------------------------------------------------------
    workdir = Path(workdir)
    saved = hosts.from_first(lambda: find_run(workdir, resume))
    given = requested
    if saved is not None:
        saved = with_absolute_paths(data_at_hand(saved, workdir))
        if not given.data.root and Path(saved.data.root).exists():
            requested = given.copy_and_resolve_references()
            requested.data.root = saved.data.root

    # ---- Data, and the config resolved with it ---------------------------------------------------------
    dataset = hosts.in_turn(lambda: load_dataset(requested.data))
    print(f"{dataset.name}: {len(dataset.train)} training images of {dataset.train.num_identities} identities")
    for note in dataset.notes:
        print(f"  {note}")
    if not len(dataset.train):
        raise UserError(
            f"{dataset.name} has no training images: train on another dataset, then evaluate on this one with "
            f"python -m vpm_jax.evaluate --workdir RUN --dataset {dataset.name}."
        )
    evaluation.check(requested, dataset)
    config = resolve(requested, dataset.train)
    hosts.check_job(config, dataset)
    config = with_absolute_paths(config)
    backbone = None
    if saved is None and config.pretrained != "none":
        backbone = hosts.from_first(lambda: pretrained.load(config.pretrained, config.data.root))
        config = config_lib.for_weights(config, backbone)
        print(f"weights: {backbone.source}" + (f" ({backbone.skipped})" if backbone.skipped else ""))
    data = Inventory.of(dataset.train)
    if saved is not None:
        check_data(saved, config, workdir, data)
        config = continue_run(saved, config, workdir)

    # ---- Devices, state, checkpoints -------------------------------------------------------------------
    stage = schedule(config)[-1]  # the batch size is the same in all stages
    batch_size, total, steps = stage.batch, stage.end_step, 0
    mesh = parallel.data_mesh(batch_size)
    place = parallel.placement(config.parallel, mesh)
    describer = Describer(config, mesh)  # shared by all evaluations, so that it compiles once
    # Shapes are enough to restore a checkpoint.
    state = step.init_state(config) if saved is None else step.state_shapes(config)
    if backbone is not None:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        state = step.new_state(config, pretrained.apply_to(variables, backbone))
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    print(
        f"recipe {config.recipe}: {parameters / 1e6:.2f} M parameters, {total} steps of {batch_size} images "
        f"on {jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    for note in notes(config):
        print(f"  {note}")
    if first := hosts.is_first():
        make_folder(workdir)
    with (
        WorkdirLock(workdir) if first else contextlib.nullcontext() as lock,
        Checkpoints(workdir, config.keep_checkpoints) as checkpoints,
        Interrupts(hosts.Agreement(mesh)) as interrupts,
    ):
        meta: dict[str, Any] = {"seconds": 0.0, "pending": [], "best": None}
        if (saved is None) != (checkpoints.latest is None):
            raise UserError(f"{workdir} changed while this run was starting: run the same command again.")
        if saved is not None:
            state, meta = checkpoints.restore(state)
            steps = int(state.step)
            print(f"resuming {workdir} after step {steps} of {total}")
        log = records = None
        if first:
            write_data(workdir, data, given, config)
            write_atomically(workdir / "config.json", config_lib.to_json(config))
            log = MetricsLog(workdir, steps, config.tracker, config.to_dict())
            records = Records(workdir / "evaluations.jsonl", steps) if config.eval.every else None
        last_evaluated = hosts.from_first(lambda: records.last if records else 0)

        # ---- The loop ----------------------------------------------------------------------------------
        train_step, state = place.compile(step.make_step, step.program(config)), place.put_state(state)
        numbers = place.put_state(step.numbers(config))
        share = jax.process_index(), jax.process_count()
        batches = train_batches(config, dataset.train, steps, total, *share)
        window = Window(config, meta["pending"], total)
        status, started, spent = Status(), time.monotonic(), meta["seconds"]
        saved_at = started
        compiled: set[tuple[int, ...]] = set()

        def save_is_due() -> bool:
            elapsed = time.monotonic() - saved_at
            with jax.transfer_guard("allow"):
                return hosts.from_first(lambda: elapsed >= config.checkpoint_seconds)

        def write_records(wait: bool = False) -> None:
            for record in window.records(wait):
                if log is not None:
                    log.write(record)
                status.show(status_line(record, total), final=record["step"] == total)

        def save(state: step.State) -> None:
            nonlocal saved_at
            write_records(wait=True)
            window.fetch()
            if lock is not None:
                lock.check()
            saved_at = time.monotonic()
            meta.update(seconds=spent + time.monotonic() - started, pending=window.pending)
            with jax.transfer_guard("allow"):
                checkpoints.save(steps, place.whole(state), meta)

        def evaluate_if_due(state: step.State) -> tuple[evaluation.Results, float] | None:
            nonlocal last_evaluated
            if last_evaluated >= steps or not config.eval.every or not ends_epochs(config, steps, config.eval.every):
                return None
            write_records(wait=True)
            window.fetch()
            began, variables = time.monotonic(), step.evaluated(place.whole(state))
            try:
                with jax.transfer_guard("allow"):
                    results = evaluation.evaluate(describer, variables, dataset, interrupts.check)
            except Stopped:  # still due when the run resumes
                return None
            last_evaluated, means = steps, {"step": steps} | evaluation.means(results)
            if meta["best"] is None or means["mAP"] > meta["best"]["mAP"]:
                meta["best"] = means
            gammas = {str(g): {"rank1": float(r["cmc"][0]), "mAP": r["mAP"]} for g, r in results.items()}
            if records is not None:
                records.write(means | {"gammas": gammas})
            print(
                f"step {steps}/{total} mean over gamma: rank-1 {means['rank1']:.1%}, mAP {means['mAP']:.1%} "
                f"(best mAP {meta['best']['mAP']:.1%} at step {meta['best']['step']})"
            )
            seconds = time.monotonic() - began
            window.pause(seconds)
            return results, seconds

        try:
            results = evaluate_if_due(state)  # an evaluation that an interrupt left unfinished
            with contextlib.closing(batches), jax.transfer_guard("disallow"):  # no implicit host-device transfers
                # If that evaluation was interrupted again, take no step: afterwards it would no longer be due.
                for batch in () if interrupts.stop else parallel.prefetch(window.waits(batches), place.put_batch):
                    if is_new := batch["image"].shape not in compiled:  # a stage may have its own input size
                        compiled.add(batch["image"].shape)
                        write_records(wait=True)  # or steps that run meanwhile would seem to take no time
                        window.fetch()
                        began = time.monotonic()
                        print("compiling the training step ...")
                    state, metrics = train_step(state, batch, numbers)
                    if is_new:
                        seconds = time.monotonic() - began
                        window.pause(seconds)
                        print(f"compiled in {duration(seconds)}")
                    steps += 1
                    window.add(steps, place.whole(metrics))
                    if steps % config.log_every == 0 or steps == total:
                        window.close()
                    write_records()
                    results = evaluate_if_due(state)
                    if results or (ends_epochs(config, steps, config.checkpoint_every) and save_is_due()):
                        save(state)
                    if interrupts.agreed():
                        break
            if checkpoints.latest != steps:
                save(state)
        except FloatingPointError as error:
            checkpoints.wait()
            last = checkpoints.latest
            kept = "no checkpoint was saved yet" if last is None else f"the checkpoint of step {last} is kept"
            precise = "" if models.compute_dtype(config.model.dtype) == "float32" else " or model.dtype=float32"
            raise UserError(
                f"{error}: {kept}; train in another --workdir with a lower learning_rate{precise}."
            ) from None
        finally:
            for file in (log, records):
                if file is not None:
                    file.close()
        if interrupts.stop:
            checkpoints.wait()
            print(f"\nStopped after step {steps} of {total} and saved in {workdir}: run the same command to continue.")
            return 128 + interrupts.stop
    print(f"trained {total} steps in {duration(meta['seconds'])}")
    if first:
        with replacing(workdir / "training.png") as path:
            title = captions.run_title(paper.title(paper.method_of(config)), config)
            plots.training_curves(path, workdir / "metrics.jsonl", title)

    # ---- Evaluation ------------------------------------------------------------------------------------
    variables = step.evaluated(place.whole(state))
    evaluation.evaluate_and_report(describer, variables, dataset, workdir, steps, evaluated=results)
    return 0


def resolve(requested: ConfigDict, split: Split) -> ConfigDict:
    """A copy of the config with the keys that depend on the training set: identities, steps per epoch, data.aspect.

    `config.for_weights` sets those that depend on pretrained weights.

    Raises:
      UserError: for a schedule that does not fit the training set, or a grid finer than the feature map.
    """
    resolved = requested.copy_and_resolve_references()
    resolved.model.num_identities = split.num_identities
    for stage in schedule(requested, len(split), split.num_identities):
        resolved[stage.name].steps_per_epoch = stage.steps_per_epoch
        cells = map_shape(requested, (stage.height, stage.width))
        if any(regions > n for regions, n in zip(requested.model.grid, cells, strict=True)):
            raise UserError(
                f"Config key model.grid is {requested.model.grid} but the feature map of {stage.name} has {cells[0]} "
                f"x {cells[1]} cells: choose a coarser grid or larger images."
            )
    if requested.data.fit == "pad" and not requested.data.aspect:
        resolved.data.aspect = reference_aspect(split)
    return resolved


def reference_aspect(split: Split, count: int = 500) -> float:
    """A whole person's height / width: the median over `count` evenly spaced training images."""
    chosen = np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int))
    shapes = [decode(split.read(i), split.names[i], split.upright).shape for i in chosen.tolist()]
    return round(float(np.median([height / width for height, width, _ in shapes])), 4)


class ClosedWindow(NamedTuple):
    """The steps of a record: those with metrics on the host and on the devices (at least one), and their timing."""

    fetched: list[dict]
    device: list[tuple[int, dict]]
    timed: int
    waited: float


class Window:
    """The metrics of the steps since the last record. `close` ends the window; `records` averages its metrics.

    They are copied to the host in the background, and a record is written once its metrics have arrived, so that the
    devices never wait for it. Checkpoints keep `pending`, the fetched ones, so that a resumed run writes the same
    records as an uninterrupted one.
    """

    def __init__(self, config: ConfigDict, pending: list[dict], total: int) -> None:
        self.pending = pending
        self._config, self._total = config, total
        self._device: list[tuple[int, dict]] = []
        self._closed: deque[ClosedWindow] = deque()
        self._since, self._timed, self._waited = 0.0, 0, 0.0

    def waits(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Passes the batches on and measures the time spent waiting for them."""
        batches = iter(batches)
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def add(self, steps: int, metrics: dict[str, jax.Array]) -> None:
        """Adds the metrics of step number `steps`, which was just dispatched."""
        if self._since:
            self._timed += 1
        else:  # exclude compile time from the rate: the first step has compiled by now
            self._since, self._waited = time.monotonic(), 0.0
        with jax.transfer_guard("allow"):
            for value in metrics.values():
                value.copy_to_host_async()
        self._device.append((steps, metrics))

    def pause(self, seconds: float) -> None:
        """Excludes time spent on something else from the rate."""
        if self._since:  # otherwise the clock has not started
            self._since += seconds

    def fetch(self) -> None:
        """Moves the metrics of the open window to the host.

        Raises:
          FloatingPointError: if the loss or the gradient is not finite.
        """
        self.pending += _fetched(self._device)
        self._device = []

    def close(self) -> None:
        """Ends the window after a step and opens the next one."""
        self._closed.append(ClosedWindow(self.pending, self._device, self._timed, self._waited))
        self.pending, self._device, self._timed, self._waited = [], [], 0, 0.0

    def records(self, wait: bool = False) -> Iterator[dict[str, Any]]:
        """Yields the records of closed windows whose metrics have arrived, or of all; raises as `fetch` does."""
        while self._closed:
            _, newest = self._closed[0].device[-1]
            if not (wait or len(self._closed) > 1 or all(value.is_ready() for value in newest.values())):
                return
            yield self._record(self._closed.popleft())

    def _record(self, closed: ClosedWindow) -> dict[str, Any]:
        fetched, (steps, _) = closed.fetched + _fetched(closed.device), closed.device[-1]
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        self._since = now
        rate = max(closed.timed, 1) / seconds
        within, stage = stage_of(self._config, steps)
        record: dict[str, Any] = {
            "step": steps,
            "stage": 1 if stage is self._config.stage1 else 2,
            "epoch": round(within / stage.steps_per_epoch, 3),
        }
        for key in fetched[0]:
            values = [metrics[key] for metrics in fetched]
            record[key] = [mean(v) for v in zip(*values, strict=True)] if isinstance(values[0], list) else mean(values)
        record["learning_rate"] = fetched[-1]["learning_rate"]
        record["weight_region"] = self._config.loss.region_weight
        record["weight_identity"] = self._config.loss.identity_weight
        record["weight_triplet"] = triplet_weight(self._config, steps)
        record["images_per_second"] = rate * stage.identities * stage.images_per_identity
        record["input_wait"] = round(min(closed.waited / seconds, 1.0), 4)  # fraction of the time
        record["memory_gib"] = round(parallel.peak_memory(), 3)
        record["eta"] = (self._total - steps) / rate
        return record


def _fetched(device: list[tuple[int, dict]]) -> list[dict]:
    """The metrics of steps as Python numbers. Raises FloatingPointError if a loss or gradient is not finite."""
    fetched = []
    for number, metrics in jax.device_get(device):
        values = {k: v.tolist() for k, v in metrics.items()}
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise FloatingPointError(
                f"The loss of step {number} is {values['loss']} with gradient norm {values['grad_norm']}"
            )
        fetched.append(values)
    return fetched


def status_line(record: dict[str, Any], total: int) -> str:
    """A record as a line of text, without losses of weight 0."""
    heads, names = record["accuracy_identity"], {"region": "region", "identity": "id", "triplet": "triplet"}
    counted = {key: word for key, word in names.items() if record[f"weight_{key}"]}
    losses = " ".join(f"{word} {record[f'loss_{key}']:.3f}" for key, word in counted.items())
    locator = f"locator {record['accuracy_locator']:.1%}  " * ("region" in counted)
    return (
        f"step {record['step']}/{total} stage {record['stage']} epoch {record['epoch']:.1f}  "
        f"loss {record['loss']:.3f} ({losses})  id acc {mean(heads):.1%} ({min(heads):.0%}-{max(heads):.0%})  "
        f"{locator}comparable {record['comparable']:.0%}  "
        f"grad {record['grad_norm']:.2f}  {record['images_per_second']:.1f} images/s "
        f"(input {record['input_wait']:.0%})  {record['memory_gib']:.1f} GiB  ETA {duration(record['eta'])}"
    )
