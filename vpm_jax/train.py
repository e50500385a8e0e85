"""Trains VPM: python -m vpm_jax.train --config configs/market.py --workdir runs/market

Runs from images to a checkpoint and a table of partial queries. Running the same command again goes on
where the workdir stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from types import FrameType
from typing import Any

from ml_collections import ConfigDict

from vpm_jax import cli, parallel
from vpm_jax import config as config_lib
from vpm_jax.errors import UserError
from vpm_jax.logs import MetricsLog, Status, duration, write_atomically


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m vpm_jax.train", description=__doc__)
    cli.add_config(parser, default="configs/synthetic.py")
    parser.add_argument("--workdir", type=Path, help="checkpoints, metrics and results (default: runs/CONFIG)")
    parser.add_argument(
        "--resume",
        choices=("auto", "never"),
        default="auto",
        help="auto: go on with the run that the workdir holds; never: refuse such a workdir (default: auto)",
    )
    args, overrides = parser.parse_known_args(argv)
    config = cli.load_config(args.config, overrides)
    name = args.config.removesuffix(".py").replace(".py:", "-")
    workdir = args.workdir or Path("runs") / Path(name).name
    return train(config, workdir, resume=args.resume == "auto")


def train(config: ConfigDict, workdir: Path, resume: bool = True) -> int:
    """Trains what `config` says in `workdir` and evaluates it; returns the command's exit code.

    Raises:
      UserError: for everything that its user can mend.
    """
    parallel.prepare_backend()
    import jax

    from vpm_jax import evaluate, models, optim, plots, step
    from vpm_jax.checkpoints import Checkpoints
    from vpm_jax.data.pipeline import train_batches
    from vpm_jax.data.sources import load_dataset

    # ---- The workdir, and what it holds already --------------------------------------------------------
    workdir = Path(workdir)
    saved = open_workdir(workdir, resume)

    # ---- Data, and the keys that depend on them --------------------------------------------------------
    dataset = load_dataset(config.data)
    print(f"{dataset.name}: {len(dataset.train)} training images of {dataset.train.num_identities} identities")
    for note in dataset.notes:
        print(f"  {note}")
    config = resolve(config, dataset.train)
    backbone = None
    if saved is None and config.pretrained != "none":
        from vpm_jax import pretrained

        backbone = pretrained.load(config.pretrained, config.data.root)
        config.model.stride_on, config.model.bn_epsilon = backbone.stride_on, backbone.bn_epsilon
        config.data.mean, config.data.std = backbone.mean, backbone.std
    if saved is not None:
        continue_run(saved, config, workdir)

    # ---- Devices, state, checkpoints -------------------------------------------------------------------
    batch_size = config.stage2.identities * config.stage2.images_per_identity
    mesh = parallel.data_mesh(batch_size)
    state = step.init_state(config)
    if backbone is not None:
        from vpm_jax import pretrained

        variables = {"params": state.params, "batch_stats": state.batch_stats}
        state = step.new_state(config, pretrained.apply_to(variables, backbone))
    state = parallel.replicate(mesh, state)
    total, steps = optim.total_steps(config), 0
    parameters = sum(x.size for x in jax.tree.leaves(state.params))
    print(
        f"recipe {config.recipe}: {parameters / 1e6:.2f} M parameters, {total} steps of {batch_size} images "
        f"on {jax.device_count()} x {jax.devices()[0].device_kind}"
    )
    with Checkpoints(workdir, config.keep_checkpoints) as checkpoints, Interrupts() as interrupts:
        meta: dict[str, Any] = {"seconds": 0.0, "pending": [], "best": None}
        if checkpoints.latest is not None:
            state, meta = checkpoints.restore(state)
            steps = int(state.step)
            print(f"resuming {workdir} after step {steps} of {total}")
        write_atomically(workdir / "config.json", config_lib.to_json(config))
        log = MetricsLog(workdir, steps, config.tensorboard)

        # ---- The loop: checkpoint, then the next batch, then the step ----------------------------------
        train_step = jax.jit(step.make_step(config), donate_argnums=0)
        batches = train_batches(config, dataset.train, models.map_shape(config), steps, total)
        window = Window(config, meta["pending"], steps, total)
        status, started, spent = Status(), time.monotonic(), meta["seconds"]

        def save(state) -> None:
            window.fetch(jax.device_get)
            meta.update(seconds=spent + time.monotonic() - started, pending=window.pending)
            checkpoints.save(steps, state, meta)

        def stop_on_non_finite(error: UserError) -> UserError:
            checkpoints.wait()
            last = checkpoints.latest
            kept = f"the checkpoint of step {last} is kept" if last else "no checkpoint was saved yet"
            return UserError(f"{error} {kept}; lower the learning rate or use --config.model.dtype=float32.")

        try:
            with contextlib.closing(batches):
                for batch in parallel.prefetch(batches, lambda b: parallel.shard(mesh, b)):
                    state, metrics = train_step(state, batch)
                    steps += 1
                    window.add(steps, metrics)
                    if steps % config.log_every == 0 or steps == total:
                        record = window.close(jax.device_get)
                        log.write(record)
                        status.show(describe(record, total), final=steps == total)
                    within, stage = stage_of(config, steps)
                    if within % (stage.steps_per_epoch * config.checkpoint_every) == 0 and steps < total:
                        save(state)
                    if interrupts.received:
                        break
        except FloatingPointError as error:
            raise stop_on_non_finite(UserError(str(error))) from None
        if checkpoints.latest != steps:
            save(state)
        log.close()
        if interrupts.received:
            checkpoints.wait()
            print(f"\nStopped after step {steps} of {total}, saved in {workdir}: run the same command to go on.")
            return 128 + interrupts.received
    print(f"trained {total} steps in {duration(meta['seconds'])}")
    plots.training_curves(workdir / "training.png", workdir / "metrics.jsonl")

    # ---- Evaluation ------------------------------------------------------------------------------------
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    evaluate.evaluate_and_report(config, variables, dataset, mesh, workdir, steps)
    return 0


def open_workdir(workdir: Path, resume: bool) -> ConfigDict | None:
    """Makes the folder; the config of the run it holds, None if it is new.

    Raises:
      UserError: for a folder that cannot be written, or holds a run that must not be resumed.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(workdir / ".writable", "")
        (workdir / ".writable").unlink()
    except OSError as error:
        trouble = cli.disk_trouble(error) or f"{error.strerror}: choose another --workdir"
        raise UserError(f"--workdir {workdir} cannot be written: {trouble}.") from error
    saved = workdir / "config.json"
    if not saved.exists():
        return None
    if not resume:
        raise UserError(f"{workdir} holds a run and --resume=never was given: choose another --workdir or delete it.")
    return config_lib.from_json(saved.read_text(), str(saved))


def resolve(config: ConfigDict, split: Any) -> ConfigDict:
    """A copy of the config with what the training set decides: identities and steps per epoch."""
    from vpm_jax.data.sampling import schedule

    config = config.copy_and_resolve_references()
    config.model.num_identities = split.num_identities
    for stage in schedule(config, len(split), split.num_identities):
        config[stage.name].steps_per_epoch = stage.steps_per_epoch
    return config


def continue_run(saved: ConfigDict, config: ConfigDict, workdir: Path) -> None:
    """Checks that `config` may go on with the run of `saved`; takes over what its pretrained weights set.

    Raises:
      UserError: that names the keys that differ.
    """
    if config.pretrained == saved.pretrained != "none":
        for group, key in (("model", "stride_on"), ("model", "bn_epsilon"), ("data", "mean"), ("data", "std")):
            config[group][key] = saved[group][key]
    changed = config_lib.changed_keys(saved, config)
    if changed:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(changed[:5])}): choose another --workdir, or set "
            f"these keys back; what may change is {', '.join(config_lib.RESUMABLE)} and, where the schedule is "
            "step-wise, more epochs of the last stage."
        )


def stage_of(config: ConfigDict, steps: int) -> tuple[int, ConfigDict]:
    """(number of finished steps within the stage, the stage) after `steps` finished steps."""
    from vpm_jax import optim

    starts, active = optim.stage_starts(config), optim.stages(config)
    number = max(i for i, start in enumerate(starts) if start < max(steps, 1))
    return steps - starts[number], active[number]


class Interrupts:
    """Turns the first Ctrl-C or SIGTERM into a request to stop; a second Ctrl-C ends at once."""

    def __init__(self) -> None:
        self.received = 0

    def __enter__(self) -> Interrupts:
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        print("\nStopping after this step; press Ctrl-C again to stop without saving.", flush=True)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)


class Window:
    """The metrics since the last record: kept on the device until asked for, averaged into one record.

    `pending` survives in checkpoints, so that a resumed run writes the records an uninterrupted one does.
    """

    def __init__(self, config: ConfigDict, pending: list[dict], steps: int, total: int) -> None:
        self.pending = pending
        self._config, self._total, self._steps = config, total, steps
        self._device: list[tuple[int, dict]] = []
        self._since, self._timed = time.monotonic(), 0
        self._warm = False

    def add(self, steps: int, metrics: dict) -> None:
        self._device.append((steps, metrics))
        self._steps = steps

    def fetch(self, get: Any) -> None:
        """Moves the metrics to the host.

        Raises:
          FloatingPointError: if the loss or the gradient is not finite.
        """
        fetched = get(self._device)
        self._device = []
        for step, metrics in fetched:
            values = {k: v.tolist() for k, v in metrics.items()}
            if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
                raise FloatingPointError(
                    f"The loss of step {step} is {values['loss']} with gradient norm {values['grad_norm']}:"
                )
            self.pending.append(values)
            self._timed += 1

    def close(self, get: Any) -> dict[str, Any]:
        """The record of the window, which starts anew."""
        self.fetch(get)
        now = time.monotonic()
        rate = self._timed / max(now - self._since, 1e-9)
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
        record["eta"] = (self._total - self._steps) / rate
        self.pending, self._since, self._timed = [], now, 0
        return record


def describe(record: dict[str, Any], total: int) -> str:
    """One line for a person."""
    heads = record["accuracy_identity"]
    return (
        f"step {record['step']}/{total} stage {record['stage']} epoch {record['epoch']:.1f}  "
        f"loss {record['loss']:.3f} (region {record['loss_region']:.3f} id {record['loss_identity']:.3f} "
        f"triplet {record['loss_triplet']:.3f})  id acc {mean(heads):.1%} ({min(heads):.0%}-{max(heads):.0%})  "
        f"locator {record['accuracy_locator']:.1%}  comparable {record['comparable']:.0%}  "
        f"grad {record['grad_norm']:.2f}  {record['images_per_second']:.1f} images/s  ETA {duration(record['eta'])}"
    )


if __name__ == "__main__":
    cli.run(main)
