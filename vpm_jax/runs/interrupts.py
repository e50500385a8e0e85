"""Stopping in order: a signal asks, the training ends its step and saves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType


class Stopped(Exception):
    """A request to stop came in the middle of something that can be done again."""


class Interrupts:
    """Turns the first Ctrl-C or SIGTERM into a request to stop; a second Ctrl-C ends at once.

    Args:
      agree: gives all processes one answer, see `hosts.Agreement`.

    Attributes:
      received: the signal that this process got, 0 before.
      stop: the signal that all processes stop for, 0 before.
    """

    def __init__(self, agree: Callable[[int], int] = lambda number: number) -> None:
        self.received = self.stop = 0
        self._agree = agree

    def __enter__(self) -> Interrupts:
        self._old = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nStopping after this step; press Ctrl-C again to stop without saving.\n")

    def agreed(self) -> int:
        """`stop`, looked up anew: every process asks as often."""
        self.stop = self.stop or self._agree(self.received)
        return self.stop

    def check(self) -> None:
        """Raises Stopped once all processes are to stop."""
        if self.agreed():
            raise Stopped

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
