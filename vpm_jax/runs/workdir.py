"""The folder of a training run: finding, reading and continuing the run, and locking the folder."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from vpm_jax import cli
from vpm_jax import config as config_lib
from vpm_jax.data.datasets import further_sets
from vpm_jax.data.inventory import Inventory
from vpm_jax.data.sources import data_root, root_of_further
from vpm_jax.disk import check_utf8, write_atomically
from vpm_jax.errors import UserError, first_line
from vpm_jax.keys import EVALUATE, WEIGHTS, in_words, keys_with
from vpm_jax.runs import hosts
from vpm_jax.runs.locks import Lock

_DERIVED = ("data.aspect",)  # follows from the training images


def find_run(workdir: Path, resume: bool) -> ConfigDict | None:
    """The config of the run in the workdir. None without a run or before its first checkpoint.

    Raises:
      UserError: for a run that must not be resumed or has lost its config, or a workdir that cannot be written.
    """
    cli.check_folder("--workdir", workdir)
    check_utf8(workdir, "checkpoints")
    if not any(path.name.isdigit() for path in workdir.glob("checkpoints/*")):
        return None
    saved = config_lib.read(workdir)
    if saved is None:
        raise UserError(
            f"{workdir} has checkpoints but no config.json: restore that file, or choose another --workdir."
        )
    if not resume:
        raise UserError(f"{workdir} already has a run (--resume=never): choose another --workdir, or delete this one.")
    return saved


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
    saved = data_at_hand(saved, workdir)
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


# ---- data.json: the training set, and where it was ----


def _paths(config: ConfigDict) -> dict[str, str]:
    """The paths to data by their keys; "data.also_train.N" for that of each further training set."""
    further = further_sets(config.data.also_train)
    paths = {"data.root": config.data.root, "data.distractors": config.data.distractors}
    return paths | {f"data.also_train.{i}": path for i, (_, path) in enumerate(further)}


def _with_paths(config: ConfigDict, paths: dict[str, str]) -> ConfigDict:
    """A copy of a config with other `_paths`."""
    config = config.copy_and_resolve_references()
    config.data.root, config.data.distractors, *further = paths.values()
    names = [name for name, _ in further_sets(config.data.also_train)]
    items = (name + f":{path}" * bool(path) for name, path in zip(names, further, strict=True))
    config.data.also_train = ",".join(items)
    return config


def _read_data(workdir: Path) -> dict[str, Any]:
    """The content of data.json; {} for runs made before it existed. Raises UserError if it is damaged."""
    file = workdir / "data.json"
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        paths = {
            key: {name: str(path[name]) for name in ("given", "there")} for key, path in record.get("paths", {}).items()
        }
        return {"inventory": Inventory.from_json(record), "paths": paths}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {first_line(error)}): restore it, or delete it to "
            "continue without checking that the training set is the same."
        ) from error


def read_data(workdir: Path) -> Inventory | None:
    """The training set of the run in the workdir; None for runs made before data.json existed.

    Raises:
      UserError: if data.json is damaged.
    """
    return _read_data(workdir).get("inventory")


def write_data(workdir: Path, data: Inventory, requested: ConfigDict, config: ConfigDict) -> None:
    """Writes data.json: the training set, and for `data_at_hand` each path as given and relative to the workdir.

    Raises:
      UserError: when the disk is full or read-only.
    """
    given = _paths(requested)
    paths = {
        key: {"given": given[key], "there": os.path.relpath(path, workdir.absolute())}
        for key, path in _paths(config).items()
        if os.path.isabs(path)
    }
    write_atomically(workdir / "data.json", json.dumps(data.to_json() | {"paths": paths}) + "\n")


def with_absolute_paths(config: ConfigDict) -> ConfigDict:
    """A copy in which the paths to data are absolute, so that they hold in any folder."""
    paths = _paths(config)
    paths["data.root"] = root = os.path.abspath(data_root(config.data.root))
    if paths["data.distractors"] and Path(paths["data.distractors"]).expanduser().exists():  # else inside the dataset
        paths["data.distractors"] = os.path.abspath(Path(paths["data.distractors"]).expanduser())
    for i, (name, path) in enumerate(further_sets(config.data.also_train)):
        if path or not root_of_further(root, name):
            paths[f"data.also_train.{i}"] = os.path.abspath(data_root(path))
    return _with_paths(config, paths)


def data_at_hand(saved: ConfigDict, workdir: Path) -> ConfigDict:
    """A copy of a run's config whose paths to data hold here and now.

    A path that no longer exists is replaced by the one that has the same position relative to the workdir: a run and
    its data may move together. If neither exists, and the run found its data in $VPM_DATA or ./data, it does so again.
    """
    paths, recorded = _paths(saved), hosts.from_first(lambda: _read_data(workdir)).get("paths", {})
    for key in paths.keys() & recorded.keys():
        moved = Path(os.path.normpath(workdir.absolute() / recorded[key]["there"]))
        if not os.path.exists(paths[key]):
            paths[key] = str(moved) if moved.exists() else recorded[key]["given"]
    return _with_paths(saved, paths)


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
