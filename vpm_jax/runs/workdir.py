"""A training's folder: what it holds already, and a lock that keeps a second training out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from vpm_jax import cli
from vpm_jax import config as config_lib
from vpm_jax.errors import UserError
from vpm_jax.keys import EVALUATE, LISTED, WEIGHTS, in_words, keys_with
from vpm_jax.runs import hosts
from vpm_jax.runs.locks import Lock

_FREE = in_words(keys_with(EVALUATE))
OVERRIDES = f"--config.KEY=VALUE sets a key of {_FREE}: {LISTED}."  # a command's help where it reads a run


def find_run(workdir: Path, resume: bool) -> tuple[ConfigDict | None, bool]:
    """(config of the run that the workdir holds, None if it is new; whether it has a checkpoint).

    What failed before its first checkpoint is no run: the next one starts in its place.

    Raises:
      UserError: for a run that must not be resumed, or that has lost its config; where nothing can be written.
    """
    cli.check_folder("--workdir", workdir)
    if not any(path.name.isdigit() for path in workdir.glob("checkpoints/*")):
        return None, False
    saved = config_lib.read(workdir)
    if saved is None:
        raise UserError(
            f"{workdir} holds checkpoints without their run's config.json: put it back or choose another --workdir."
        )
    if not resume:
        raise UserError(f"{workdir} holds a run and --resume=never was given: choose another --workdir or delete it.")
    return saved, True


def read_run(workdir: Path, overrides: Sequence[str]) -> tuple[ConfigDict, ConfigDict]:
    """(resolved config of the run that the workdir holds, the same with --config.KEY=VALUE to evaluate it by).

    Raises:
      UserError: without a run, and for keys that belong to its training.
    """
    saved = hosts.from_first(lambda: config_lib.read(workdir))
    if saved is None:
        raise UserError(
            f"{workdir} holds no run (no config.json): give --workdir the folder that training wrote.", code="no-run"
        )
    config = saved.copy_and_resolve_references()
    cli.override(config, overrides)
    config_lib.check(config)
    before, free = config_lib.flatten(saved), keys_with(EVALUATE)
    for key, value in config_lib.flatten(config).items():
        if before[key] != value and key not in free:
            raise UserError(
                f"The run in {workdir} was trained with another config ({key}: {before[key]} -> {value}): what may "
                f"change now is {_FREE}."
            )
    return saved, config


def continue_run(saved: ConfigDict, resolved: ConfigDict, workdir: Path) -> ConfigDict:
    """The config that the run of `saved` goes on with: a resolved one, with what the run's pretrained weights set.

    Raises:
      UserError: that names the keys that differ.
    """
    resolved = resolved.copy_and_resolve_references()
    if resolved.pretrained == saved.pretrained != "none":
        before = config_lib.flatten(saved)
        for key in keys_with(WEIGHTS):
            config_lib.set_key(resolved, key, before[key])
    changed = config_lib.changed_keys(saved, resolved)
    if changed:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(changed[:5])}): choose another --workdir, or set "
            f"these keys back; what may change is {in_words(config_lib.RESUMABLE)} and, where its schedule "
            "is step-wise, more epochs of the last stage."
        )
    return resolved


class WorkdirLock(Lock):
    """Makes a workdir one training's own; a context manager.

    Raises:
      UserError: on entering, while another training holds it.
    """

    def __init__(self, workdir: Path):
        super().__init__(workdir / ".lock")
        self._workdir = workdir

    def __enter__(self) -> WorkdirLock:
        if holder := self.acquire():
            raise UserError(
                f"{self._workdir} is in use by another training ({holder}): wait for its end, stop it, or choose "
                "another --workdir.",
                code="workdir-in-use",
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def check(self) -> None:
        """Raises UserError if the lock is another's by now."""
        if self.is_lost():
            raise UserError(f"Another training has taken over {self._workdir}: this one stops and saves no more.")
