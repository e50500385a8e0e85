"""What a run says as it goes: JSON lines always, trackers on request, a status line for people."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vpm_jax.errors import UserError, no_writing, writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well: never a part of a file.

    Raises:
      UserError: when a disk is full or read-only.
    """
    # Not by the process's number: containers that share a disk often run as the same.
    temporary = path.with_name(f".{secrets.token_hex(8)}-{path.name}")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Makes the folder with its parents. Raises UserError if it is not one that can be written."""
    if trouble := no_writing(folder):
        raise UserError(f"{folder} could not be written: {trouble}.", code="not-written")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def write_atomically(path: Path, text: str) -> None:
    """The file is either the old one or the new one. Raises as `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text)


class Records:
    """A file of JSON lines, each with a "step"; on resuming, what was written after the checkpoint is dropped.

    Args:
      path: the file, made if need be.
      step: the step training goes on from; records of later steps, and a line cut short by a kill, are removed.

    Attributes:
      last: the step of the last record, 0 without any.
    """

    def __init__(self, path: Path, step: int = 0):
        self.path, self.last = path, 0
        if path.exists():
            lines = path.read_text(errors="replace").splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            self.last = int(max(map(_step_of, kept), default=0))
            write_atomically(path, "".join(line + "\n" for line in kept))
        with writing(path):
            self._file = path.open("ab", buffering=0)  # nothing is left to flush when a disk is full

    def write(self, record: dict[str, Any]) -> None:
        """Appends a line, all of it or nothing. Raises UserError when a disk is full."""
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
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoard:
    """Scalars for TensorBoard, in the folder `tensorboard` of the workdir (needs the extra `tensorboard`)."""

    def __init__(self, workdir: Path, step: int = 0):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "tracker=tensorboard needs tensorboardX: pip install 'vpm_jax[tensorboard]', or set tracker=\"none\"."
            ) from None
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        """Every number of a record; a list becomes one scalar for each position."""
        for key, value in _scalars(record).items():
            self._board.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._board.close()


class Wandb:
    """The same scalars, and the config, for Weights & Biases, which its own environment variables steer.

    The run is called as the workdir and belongs to $WANDB_PROJECT, else "vpm_jax". Its id is kept in the workdir's file
    wandb_id, so that a resumed training goes on with it.
    """

    def __init__(self, workdir: Path, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError('tracker="wandb" needs wandb: pip install wandb, or set tracker="none".') from None
        file = workdir / "wandb_id"
        if not file.is_file():
            write_atomically(file, secrets.token_hex(4))
        project = os.environ.get("WANDB_PROJECT", "vpm_jax")
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.resolve().name,
                id=file.read_text().strip(),
                resume="allow",
                dir=str(workdir),
                config=dict(config),
            )
        except Exception as error:  # of many kinds: no login, no network, no such project
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"Weights & Biases did not start ({reason}): log in (wandb login), work without a network "
                '(WANDB_MODE=offline), or set tracker="none".'
            ) from error

    def write(self, record: dict[str, Any]) -> None:
        self._run.log(_scalars(record), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def _scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record but its step; a list gives one for each position."""
    scalars: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, list):
            scalars |= {f"{key}/{i}": v for i, v in enumerate(value)}
        elif isinstance(value, int | float) and key != "step":
            scalars[key] = value
    return scalars


class MetricsLog:
    """Training's records: metrics.jsonl always, trackers on request.

    Args:
      workdir: the run's folder.
      step: the step training goes on from (see `Records`).
      tracker: where the numbers go too: "none", "tensorboard", "wandb" or "tensorboard,wandb".
      config: what the tracker is told of the run.
    """

    def __init__(
        self,
        workdir: Path,
        step: int = 0,
        tracker: str = "none",
        config: Mapping[str, Any] | None = None,
    ):
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


class Status:
    """A line that is rewritten on a terminal; plain lines, at most one in `every` seconds, in a log."""

    def __init__(self, every: float = 15.0):
        self._terminal = sys.stdout.isatty()
        self._every, self._last = every, -float("inf")

    def show(self, text: str, final: bool = False) -> None:
        now = time.monotonic()
        if self._terminal:
            print(f"\r\x1b[K{text}", end="\n" if final else "", flush=True)
        elif final or now - self._last >= self._every:
            print(text, flush=True)
            self._last = now


class Progress:
    """A status line of images that are done, their rate and the time that is left.

    Args:
      title: how the line begins.
      total: how many images there are; may be corrected on the way.
    """

    def __init__(self, title: str, total: int):
        self.title, self.total, self.done = title, total, 0
        self._status, self._started = Status(), time.monotonic()

    def add(self, images: int) -> None:
        self.done += images
        rate = self.done / (time.monotonic() - self._started)
        left = self.total - self.done
        text = f"{self.title} {self.done}/{self.total}  {rate:.0f} images/s  ETA {duration(left / rate)}"
        self._status.show(text, final=not left)


def duration(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
