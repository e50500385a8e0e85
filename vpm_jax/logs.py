"""What a run says as it goes: JSON lines always, TensorBoard on request, a status line for people."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from vpm_jax.errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """The file is either the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


class MetricsLog:
    """Appends records to metrics.jsonl; on resuming, drops what was written after the checkpoint.

    Args:
      workdir: the run's folder.
      step: the step training goes on from; records of later steps are removed.
      tensorboard: also write scalars for TensorBoard (needs the extra `tensorboard`).
    """

    def __init__(self, workdir: Path, step: int = 0, tensorboard: bool = False):
        self.path = Path(workdir) / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if _step_of(line) <= step]
            write_atomically(self.path, "".join(line + "\n" for line in kept))
        self._file = self.path.open("a", buffering=1)
        self._board = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise UserError(
                    "tensorboard=True needs tensorboardX: pip install 'vpm_jax[tensorboard]', or leave it off."
                ) from None
            self._board = SummaryWriter(str(Path(workdir) / "tensorboard"), purge_step=step + 1)

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        if self._board:
            for key, value in record.items():
                if isinstance(value, list):
                    for i, v in enumerate(value):
                        self._board.add_scalar(f"{key}/{i}", v, record["step"])
                elif isinstance(value, int | float) and key != "step":
                    self._board.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._board:
            self._board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill


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


def duration(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
