"""Trains VPM: python -m vpm_jax.train --config configs/market.py --workdir runs/market

Runs from images to a checkpoint and a table of partial queries. Running the same command again goes on
where the workdir stopped.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import cli, parallel
from vpm_jax import config as config_lib
from vpm_jax.errors import UserError
from vpm_jax.runs import hosts
from vpm_jax.runs.interrupts import Interrupts, Stopped
from vpm_jax.runs.logs import MetricsLog, Records, Status, duration, make_folder, replacing, write_atomically
from vpm_jax.runs.workdir import WorkdirLock, continue_run, find_run
from vpm_jax.schedule import ends_epochs, schedule, stage_of


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="python -m vpm_jax.train", description=__doc__)
    cli.add_config(parser, default="configs/synthetic.py")
    parser.add_argument("--workdir", type=Path, help="checkpoints, metrics and results (default: runs/CONFIG)")
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto: go on with the run that the workdir holds; never: refuse such a workdir (default: auto)",
    )
    hosts.add_arguments(parser)
    args, overrides = parser.parse_known_args(argv)
    config = cli.load_config(args.config, overrides)
    name = args.config.removesuffix(".py").replace(".py:", "-")
    workdir = args.workdir or Path("runs") / Path(name).name
    with hosts.joined(args):
        return train(config, workdir, resume=args.resume == "auto")


def train(asked: ConfigDict, workdir: Path, resume: bool = True) -> int:
    """Trains what the config asks for in `workdir` and evaluates it; returns the command's exit code.

    Of many processes (see `hosts.joined`), all call it; process 0 alone uses the workdir.

    Raises:
      UserError: for everything that its user can mend.
    """
    parallel.prepare_backend()
    import jax

    from vpm_jax import evaluation, models, paper, plots, step
    from vpm_jax.data.pipeline import train_batches
    from vpm_jax.data.sources import load_dataset
    from vpm_jax.description import Describer
    from vpm_jax.runs.checkpoints import Checkpoints

    # ---- What the workdir holds already ----------------------------------------------------------------
    workdir = Path(workdir)
    saved, has_checkpoint = hosts.from_first(lambda: find_run(workdir, resume))

    # ---- Data, and the keys that depend on them --------------------------------------------------------
    dataset = hosts.in_turn(lambda: load_dataset(asked.data))
    print(f"{dataset.name}: {len(dataset.train)} training images of {dataset.train.num_identities} identities")
    for note in dataset.notes:
        print(f"  {note}")
    if not len(dataset.train):
        raise UserError(
            f"{dataset.name} has no training images: train on another dataset, then evaluate on this one by "
            f"python -m vpm_jax.evaluate --workdir RUN --dataset {dataset.name}."
        )
    evaluation.check(asked, dataset)
    config = resolve(asked, dataset.train)
    hosts.check_job(config, dataset)
    backbone = None
    if not has_checkpoint and config.pretrained != "none":
        from vpm_jax import pretrained

        backbone = hosts.from_first(lambda: pretrained.load(config.pretrained, config.data.root))
        config = config_lib.for_weights(config, backbone)
        print(f"weights: {backbone.source}" + (f" ({backbone.skipped})" if backbone.skipped else ""))
    if saved is not None:
        config = continue_run(saved, config, workdir)

    # ---- Devices, state, checkpoints -------------------------------------------------------------------
    stage = schedule(config)[-1]  # all have its batch
    batch_size, total, steps = stage.batch, stage.end_step, 0
    mesh = parallel.data_mesh(batch_size)
    place = parallel.placement(config.parallel, mesh)
    describer = Describer(config, mesh)  # one for all evaluations: it compiles once
    # With a checkpoint shapes are enough: it is restored below.
    state = step.state_shapes(config) if has_checkpoint else step.init_state(config)
    if backbone is not None:
        from vpm_jax import pretrained

        variables = {"params": state.params, "batch_stats": state.batch_stats}
        state = step.new_state(config, pretrained.apply_to(variables, backbone))
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    print(
        f"recipe {config.recipe}: {parameters / 1e6:.2f} M parameters, {total} steps of {batch_size} images "
        f"on {jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    if first := hosts.is_first():
        make_folder(workdir)
    with (
        WorkdirLock(workdir) if first else contextlib.nullcontext() as lock,
        Checkpoints(workdir, config.keep_checkpoints) as checkpoints,
        Interrupts(hosts.Agreement(mesh)) as interrupts,
    ):
        meta: dict[str, Any] = {"seconds": 0.0, "pending": [], "best": None}
        if has_checkpoint != (checkpoints.latest is not None):
            raise UserError(f"{workdir} has changed while this training began: run the same command again.")
        if has_checkpoint:
            state, meta = checkpoints.restore(state)
            steps = int(state.step)
            print(f"resuming {workdir} after step {steps} of {total}")
        log = records = None
        if first:
            write_atomically(workdir / "config.json", config_lib.to_json(config))
            log = MetricsLog(workdir, steps, config.tracker, config.to_dict())
            records = Records(workdir / "evaluations.jsonl", steps) if config.eval.every else None
        evaluated = hosts.from_first(lambda: records.last if records else 0)  # the last step that was

        # ---- The loop: checkpoint, then the next batch, then the step ----------------------------------
        train_step, state = place.compile(step.make_step, config), place.put_state(state)
        share = jax.process_index(), jax.process_count()
        batches = train_batches(config, dataset.train, None, steps, total, *share)
        window = Window(config, meta["pending"], steps, total)
        status, started, spent = Status(), time.monotonic(), meta["seconds"]

        def save(state: step.State) -> None:
            window.fetch()
            if lock is not None:
                lock.check()
            meta.update(seconds=spent + time.monotonic() - started, pending=window.pending)
            with jax.transfer_guard("allow"):
                checkpoints.save(steps, place.whole(state), meta)

        def evaluate_if_due(state: step.State) -> tuple[evaluation.Results, float] | None:
            nonlocal evaluated
            if evaluated >= steps or not config.eval.every or not ends_epochs(config, steps, config.eval.every):
                return None
            window.fetch()
            began, variables = time.monotonic(), step.evaluated(place.whole(state))
            try:
                with jax.transfer_guard("allow"):
                    results = evaluation.evaluate(describer, variables, dataset, interrupts.check)
            except Stopped:  # it is due again when training goes on
                return None
            evaluated, found = steps, {"step": steps} | evaluation.means(results)
            if meta["best"] is None or found["mAP"] > meta["best"]["mAP"]:
                meta["best"] = found
            gammas = {str(g): {"rank1": float(r["cmc"][0]), "mAP": r["mAP"]} for g, r in results.items()}
            if records is not None:
                records.write(found | {"gammas": gammas})
            print(
                f"step {steps}/{total} mean over gamma: rank-1 {found['rank1']:.1%}, mAP {found['mAP']:.1%} "
                f"(best mAP {meta['best']['mAP']:.1%} at step {meta['best']['step']})"
            )
            seconds = time.monotonic() - began
            window.pause(seconds)
            return results, seconds

        try:
            results = evaluate_if_due(state)  # of the last step alone; due where a stop cut it short
            # Nothing moves between host and devices but what is told to.
            with contextlib.closing(batches), jax.transfer_guard("disallow"):
                # A stop in that evaluation leaves it due: no step is made.
                for batch in () if interrupts.stop else parallel.prefetch(window.waits(batches), place.put_batch):
                    state, metrics = train_step(state, batch)
                    steps += 1
                    window.add(steps, place.whole(metrics))
                    if steps % config.log_every == 0 or steps == total:
                        record = window.close()
                        if log is not None:
                            log.write(record)
                        status.show(describe(record, total), final=steps == total)
                    results = evaluate_if_due(state)
                    if ends_epochs(config, steps, config.checkpoint_every):
                        save(state)
                    if interrupts.agreed():
                        break
            if checkpoints.latest != steps:
                save(state)
        except FloatingPointError as error:
            checkpoints.wait()
            last = checkpoints.latest
            kept = "no checkpoint was saved yet" if last is None else f"the checkpoint of step {last} is kept"
            lower = "" if models.compute_dtype(config.model.dtype) == "float32" else " or model.dtype=float32"
            raise UserError(f"{error}: {kept}; train in another --workdir with a lower learning_rate{lower}.") from None
        for file in (log, records):
            if file is not None:
                file.close()
        if interrupts.stop:
            checkpoints.wait()
            print(f"\nStopped after step {steps} of {total}, saved in {workdir}: run the same command to go on.")
            return 128 + interrupts.stop
    print(f"trained {total} steps in {duration(meta['seconds'])}")
    if first:
        with replacing(workdir / "training.png") as path:
            title = plots.run_title(paper.title(paper.method_of(config)), config)
            plots.training_curves(path, workdir / "metrics.jsonl", title)

    # ---- Evaluation ------------------------------------------------------------------------------------
    variables = step.evaluated(place.whole(state))
    evaluation.evaluate_and_report(describer, variables, dataset, workdir, steps, evaluated=results)
    return 0


def resolve(asked: ConfigDict, split: Any) -> ConfigDict:
    """A copy of the config with what the training set decides: identities, steps per epoch and data.aspect.

    What pretrained weights presuppose is `config.for_weights`.

    Raises:
      UserError: for a schedule that the training set does not allow, or a grid finer than the feature map.
    """
    from vpm_jax import models

    resolved = asked.copy_and_resolve_references()
    resolved.model.num_identities = split.num_identities
    for stage in schedule(asked, len(split), split.num_identities):
        resolved[stage.name].steps_per_epoch = stage.steps_per_epoch
        cells = models.map_shape(asked, (stage.height, stage.width))
        if any(regions > n for regions, n in zip(asked.model.grid, cells, strict=True)):
            raise UserError(
                f"Config key model.grid is {asked.model.grid} but the feature map of {stage.name} has {cells[0]} x "
                f"{cells[1]} cells, so that some region has none: choose a coarser grid or larger images."
            )
    if asked.data.fit == "pad" and not asked.data.aspect:
        resolved.data.aspect = reference_aspect(split)
    return resolved


def reference_aspect(split: Any, count: int = 500) -> float:
    """The median height / width of the training images, of `count` evenly spaced ones: a whole person's proportions."""
    from vpm_jax.data.decode import decode

    chosen = np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).round().astype(int))
    shapes = [decode(split.read(i), split.names[i], split.upright).shape for i in chosen.tolist()]
    return round(float(np.median([height / width for height, width, _ in shapes])), 4)


class Window:
    """The metrics since the last record: kept on the device until asked for, averaged into one record.

    `pending` survives in checkpoints, so that a resumed run writes the records an uninterrupted one does.
    """

    def __init__(self, config: ConfigDict, pending: list[dict], steps: int, total: int) -> None:
        self.pending = pending
        self._config, self._total, self._steps = config, total, steps
        self._device: list[tuple[int, dict]] = []
        self._since, self._timed, self._waited = 0.0, 0, 0.0

    def waits(self, batches: Iterable[dict]) -> Iterator[dict]:
        """The batches; the time until each of them comes is training's wait for its input."""
        batches = iter(batches)
        while True:
            began = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - began
            if batch is None:
                return
            yield batch

    def add(self, steps: int, metrics: dict) -> None:
        """The metrics of the step that was just started, the `steps`-th."""
        if self._since:
            self._timed += 1
        else:  # this process's first step is compiled by now, and its compiling out of the rate
            self._since, self._waited = time.monotonic(), 0.0
        self._device.append((steps, metrics))
        self._steps = steps

    def pause(self, seconds: float) -> None:
        """Takes time that was not training's out of the rate."""
        if self._since:  # else no time counts yet
            self._since += seconds

    def fetch(self) -> None:
        """Moves the metrics to the host.

        Raises:
          FloatingPointError: if the loss or the gradient is not finite.
        """
        import jax

        fetched, self._device = jax.device_get(self._device), []
        for step, metrics in fetched:
            values = {k: v.tolist() for k, v in metrics.items()}
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                raise FloatingPointError(
                    f"The loss of step {step} is {values['loss']} with gradient norm {values['grad_norm']}"
                )
            self.pending.append(values)

    def close(self) -> dict[str, Any]:
        """The record of the window, which starts anew. Raises as `fetch`."""
        self.fetch()
        now = time.monotonic()
        seconds = max(now - self._since, 1e-9)
        rate = max(self._timed, 1) / seconds
        within, stage = stage_of(self._config, self._steps)
        record: dict[str, Any] = {
            "step": self._steps,
            "stage": 1 if stage is self._config.stage1 else 2,
            "epoch": round(within / stage.steps_per_epoch, 3),
        }
        for key in self.pending[0]:
            values = [p[key] for p in self.pending]
            record[key] = [mean(v) for v in zip(*values, strict=True)] if isinstance(values[0], list) else mean(values)
        record["learning_rate"] = self.pending[-1]["learning_rate"]
        record["images_per_second"] = rate * stage.identities * stage.images_per_identity
        record["input_wait"] = round(min(self._waited / seconds, 1.0), 4)  # the share of the time
        record["memory_gib"] = round(parallel.peak_memory(), 3)
        record["eta"] = (self._total - self._steps) / rate
        self.pending, self._since, self._timed, self._waited = [], now, 0, 0.0
        return record


def describe(record: dict[str, Any], total: int) -> str:
    """One line for a person."""
    heads = record["accuracy_identity"]
    return (
        f"step {record['step']}/{total} stage {record['stage']} epoch {record['epoch']:.1f}  "
        f"loss {record['loss']:.3f} (region {record['loss_region']:.3f} id {record['loss_identity']:.3f} "
        f"triplet {record['loss_triplet']:.3f})  id acc {mean(heads):.1%} ({min(heads):.0%}-{max(heads):.0%})  "
        f"locator {record['accuracy_locator']:.1%}  comparable {record['comparable']:.0%}  "
        f"grad {record['grad_norm']:.2f}  {record['images_per_second']:.1f} images/s "
        f"(input {record['input_wait']:.0%})  {record['memory_gib']:.1f} GiB  ETA {duration(record['eta'])}"
    )


if __name__ == "__main__":
    cli.run(main)
