"""Progress on a terminal, or as plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable


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
      check: called by every `add`; may raise to stop.
    """

    def __init__(self, title: str, total: int, check: Callable[[], None] | None = None):
        self.title, self.total, self.done, self._check = title, total, 0, check
        self._status, self._started = Status(), time.monotonic()

    def add(self, images: int) -> None:
        self.done += images
        rate = self.done / (time.monotonic() - self._started)
        left = self.total - self.done
        text = f"{self.title} {self.done}/{self.total}  {rate:.0f} images/s  ETA {duration(left / rate)}"
        self._status.show(text, final=not left)
        if self._check is not None:
            self._check()


def duration(seconds: float) -> str:
    """3725 -> "1:02:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
