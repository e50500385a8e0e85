"""The logs of a run: JSON lines and optional trackers."""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpm_jax.disk import write_atomically, writing
from vpm_jax.errors import UserError, first_line, optional


class Records:
    """A file of JSON lines, each with a "step".

    Args:
      path: the file, created if missing.
      step: the step that training continues from. Records of later steps and truncated lines are removed.

    Attributes:
      last: the step of the last record, 0 without records.
    """

    def __init__(self, path: Path, step: int = 0):
        self.path, self.last = path, 0
        if path.exists():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            self.last = int(max(map(_step_of, kept), default=0))
            write_atomically(path, "".join(line + "\n" for line in kept))
        with writing(path):
            self._file = path.open("ab", buffering=0)  # buffers could not be flushed to a full disk

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line, or nothing if it does not fit. Raises UserError when the disk is full."""
        line, start = json.dumps(record).encode() + b"\n", self._file.seek(0, os.SEEK_END)
        try:
            with writing(self.path):
                while line:
                    line = line[self._file.write(line) :]
        except UserError:
            self._file.truncate(start)
            raise
        self.last = record["step"]

    def close(self) -> None:
        self._file.close()


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoard:
    """Logs scalars for TensorBoard into the workdir's folder `tensorboard`. Needs the extra `tensorboard`."""

    def __init__(self, workdir: Path, step: int = 0):
        with optional("tracker=tensorboard", "'vpm_jax[tensorboard]'"):
            from tensorboardX import SummaryWriter
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        for key, value in _scalars(record).items():
            self._board.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._board.close()


class Wandb:
    """Logs scalars and the config to Weights & Biases, whose environment variables apply.

    The run is named after the workdir, in the project $WANDB_PROJECT or "vpm_jax". The file wandb_id in the workdir
    keeps its id, so that resumed training continues the same run.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any]):
        with optional("tracker=wandb", "wandb"):
            import wandb
        file = workdir / "wandb_id"
        if not file.is_file():
            write_atomically(file, secrets.token_hex(4))
        project = os.environ.get("WANDB_PROJECT", "vpm_jax")
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.resolve().name,
                id=file.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(workdir),
                config=dict(config),
            )
        except Exception as error:  # many types: no login, no network, no such project
            raise UserError(
                f"Weights & Biases did not start ({first_line(error)}): log in (wandb login), work offline "
                '(WANDB_MODE=offline), or set tracker="none".'
            ) from error

    def write(self, record: dict[str, Any]) -> None:
        self._run.log(_scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record without its step; a list gives one scalar per position."""
    scalars: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, list):
            scalars |= {f"{key}/{i}": v for i, v in enumerate(value)}
        elif isinstance(value, int | float) and key != "step":
            scalars[key] = value
    return scalars


class MetricsLog:
    """Writes training metrics to metrics.jsonl and to the trackers.

    Args:
      workdir: the run's folder.
      step: the step that training continues from (see `Records`).
      tracker: "none", "tensorboard", "wandb" or "tensorboard,wandb".
      config: the run's config, for trackers that show it.
    """

    def __init__(self, workdir: Path, step: int = 0, tracker: str = "none", config: Mapping[str, Any] | None = None):
        self._writers: list[Records | TensorBoard | Wandb] = []
        if "tensorboard" in tracker.split(","):
            self._writers.append(TensorBoard(workdir, step))
        if "wandb" in tracker.split(","):
            self._writers.append(Wandb(workdir, config or {}))
        self._writers.append(Records(workdir / "metrics.jsonl", step))

    def write(self, record: dict[str, Any]) -> None:
        for writer in self._writers:
            writer.write(record)

    def close(self) -> None:
        for writer in self._writers:
            writer.close()
