"""The folder of a training run: finding, reading and continuing the run, and locking the folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from vpm_jax import cli
from vpm_jax import config as config_lib
from vpm_jax.data.inventory import Inventory
from vpm_jax.errors import UserError, check_utf8
from vpm_jax.keys import EVALUATE, WEIGHTS, in_words, keys_with
from vpm_jax.runs import hosts
from vpm_jax.runs.locks import Lock
from vpm_jax.runs.logs import write_atomically

_DERIVED = ("data.aspect",)  # follows from the training images


def find_run(workdir: Path, resume: bool) -> tuple[ConfigDict | None, bool]:
    """(the config of the run in the workdir, None without a run; whether there is a checkpoint).

    A run that failed before its first checkpoint does not count.

    Raises:
      UserError: for a run that must not be resumed or has lost its config, or a workdir that cannot be written.
    """
    cli.check_folder("--workdir", workdir)
    check_utf8(workdir, "checkpoints")
    if not any(path.name.isdigit() for path in workdir.glob("checkpoints/*")):
        return None, False
    saved = config_lib.read(workdir)
    if saved is None:
        raise UserError(
            f"{workdir} has checkpoints but no config.json: restore that file, or choose another --workdir."
        )
    if not resume:
        raise UserError(f"{workdir} already has a run (--resume=never): choose another --workdir, or delete this one.")
    return saved, True


def read_run(workdir: Path, overrides: Sequence[str]) -> tuple[ConfigDict, ConfigDict]:
    """(the resolved config of the run in the workdir, the same with --config.KEY=VALUE applied).

    Raises:
      UserError: if there is no run, or for keys that may not change after training.
    """
    saved = hosts.from_first(lambda: config_lib.read(workdir))
    if saved is None:
        raise UserError(
            f"{workdir} has no run (no config.json): set --workdir to the folder of a training run.", code="no-run"
        )
    config = saved.copy_and_resolve_references()
    cli.override(config, overrides)
    config_lib.check(config)
    before, changeable = config_lib.flatten(saved), keys_with(EVALUATE)
    for key, value in config_lib.flatten(config).items():
        if before[key] != value and key not in changeable:
            raise UserError(
                f"The run in {workdir} was trained with another config ({key}: {before[key]} -> {value}): change only "
                f"{in_words(changeable)}."
            )
    return saved, config


def continue_run(saved: ConfigDict, resolved: ConfigDict, workdir: Path) -> ConfigDict:
    """The config to continue the run of `saved` with: `resolved`, with the keys that its pretrained weights set.

    Raises:
      UserError: naming the keys that differ.
    """
    resolved = resolved.copy_and_resolve_references()
    if resolved.pretrained == saved.pretrained != "none":
        before = config_lib.flatten(saved)
        for key in keys_with(WEIGHTS):
            config_lib.set_key(resolved, key, before[key])
    if changed := config_lib.changed_keys(saved, resolved):
        raise UserError(
            f"{workdir} has a run with another config ({'; '.join(changed[:5])}): choose another --workdir, or restore "
            f"these keys; only {in_words(config_lib.RESUMABLE)} may change, and the last stage may get more epochs if "
            "its schedule is step-wise."
        )
    return resolved


def read_data(workdir: Path) -> Inventory | None:
    """The training set of the run in the workdir; None for runs made before data.json existed.

    Raises:
      UserError: if data.json is damaged.
    """
    file = workdir / "data.json"
    if not file.is_file():
        return None
    try:
        return Inventory.from_json(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {cli.first_line(error)}): restore it, or delete it to "
            "continue without checking that the training set is the same."
        ) from error


def write_data(workdir: Path, data: Inventory) -> None:
    """Writes data.json. Raises UserError when the disk is full or read-only."""
    write_atomically(workdir / "data.json", json.dumps(data.to_json()) + "\n")


def check_data(saved: ConfigDict, resolved: ConfigDict, workdir: Path, data: Inventory) -> None:
    """Checks that a run continues on its training set. If a key selects other data, `continue_run` names the key.

    Raises:
      UserError: naming what differs, with counts.
    """
    recorded = hosts.from_first(lambda: read_data(workdir))
    changed = {change.partition(":")[0] for change in config_lib.changed_keys(saved, resolved)}
    if recorded is None or any(key.startswith("data.") and key not in _DERIVED for key in changed):
        return
    if differences := recorded.differences(data):
        raise UserError(
            f"{workdir} has a run on other training data ({differences}): restore its data, or choose another "
            "--workdir.",
            code="other-data",
        )


class WorkdirLock(Lock):
    """A context manager that keeps other training runs out of a workdir.

    Raises:
      UserError: on entering, if another training run uses the workdir.
    """

    def __init__(self, workdir: Path):
        super().__init__(workdir / ".lock")
        self._workdir = workdir

    def __enter__(self) -> WorkdirLock:
        if holder := self.acquire():
            raise UserError(
                f"{self._workdir} is in use by another training run ({holder}): wait for it to finish, stop it, or "
                "choose another --workdir.",
                code="workdir-in-use",
            )
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()

    def check(self) -> None:
        """Raises UserError if another process has taken over the lock."""
        if self.is_lost():
            raise UserError(f"Another training run has taken over {self._workdir}: this one stops without saving.")
