"""Orderly interrupts: after a signal, training finishes its step and saves."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType


class Stopped(Exception):
    """Raised to abandon work that can be done again, because a stop was requested."""


class Interrupts:
    """Turns the first Ctrl-C or SIGTERM into a request to stop. A second Ctrl-C ends the process at once,
    even while XLA compiles.

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
        # Python runs handlers between its own instructions, hence not while XLA compiles; this thread reacts at once.
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._old_wakeup = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or number

    def _answer(self) -> None:
        received = 0
        while number := os.read(self._read_end, 1)[0]:  # __exit__ writes 0
            if received and number == signal.SIGINT:
                # Not print, whose lock the main thread may hold; not sys.exit, which would wait for the compiler.
                os.write(2, b"\nerror: Interrupted.\n")
                os._exit(128 + number)
            if number in self._old and not received:
                received = number
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
        signal.set_wakeup_fd(self._old_wakeup)
        for number, handler in self._old.items():
            signal.signal(number, handler)
        os.write(self._write_end, b"\0")
        self._thread.join()
        os.close(self._read_end)
        os.close(self._write_end)
