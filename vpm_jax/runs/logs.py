"""Files written atomically, and the logs of a run: JSON lines, optional trackers, a status line."""

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

from vpm_jax.errors import UserError, no_writing, printable, writing


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path` and renames it to `path` when the block succeeds.

    Raises:
      UserError: when the disk is full or read-only.
    """
    # Not named by the process id, which may be the same in several containers that share a disk.
    temporary = path.with_name(f".{secrets.token_hex(8)}-{path.name}")
    try:
        with writing(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Creates the folder and its parents. Raises UserError if it cannot be written."""
    if trouble := no_writing(folder):
        raise UserError(f"{folder} could not be written: {trouble}.", code="not-written")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file, as UTF-8, that is never seen half-written. Raises as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(printable(text), encoding="utf-8")


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
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf


class TensorBoard:
    """Logs scalars for TensorBoard into the workdir's folder `tensorboard`. Needs the extra `tensorboard`."""

    def __init__(self, workdir: Path, step: int = 0):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UserError(
                "tracker=tensorboard needs tensorboardX: pip install 'vpm_jax[tensorboard]', or set tracker=\"none\"."
            ) from None
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
                id=file.read_text(encoding="utf-8").strip(),
                resume="allow",
                dir=str(workdir),
                config=dict(config),
            )
        except Exception as error:  # many types: no login, no network, no such project
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"Weights & Biases did not start ({reason}): log in (wandb login), work offline (WANDB_MODE=offline), "
                'or set tracker="none".'
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
    """A status line: rewritten in place on a terminal, otherwise printed at most once in `every` seconds."""

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
    """A status line with the number of finished images, their rate and the remaining time.

    Args:
      title: the start of the line.
      total: the number of images; may be changed later.
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
