"""Orderly interrupts: after a signal, training finishes its step and saves."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from types import FrameType


class Stopped(Exception):
    """Raised to abandon work that can be done again, because a stop was requested."""


class Interrupts:
    """Turns the first Ctrl-C or SIGTERM into a request to stop. A second Ctrl-C ends the process at once.

    Args:
      agree: makes all processes agree on the signal, see `hosts.Agreement`.

    Attributes:
      received: the signal that this process received, 0 until then.
      stop: the signal that all processes stop for, 0 until then.
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
        # Not print, which is not reentrant: the signal may have interrupted one.
        os.write(2, b"\nStopping after this step; press Ctrl-C again to stop without saving.\n")

    def agreed(self) -> int:
        """Updates and returns `stop`. All processes must call it equally often."""
        self.stop = self.stop or self._agree(self.received)
        return self.stop

    def check(self) -> None:
        """Raises Stopped if all processes should stop. All of them must call it equally often."""
        if self.agreed():
            raise Stopped

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
