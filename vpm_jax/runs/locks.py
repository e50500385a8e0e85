"""A lock that is a file: one process's own thing, also among machines that share a disk, whatever died before."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from vpm_jax.errors import UserError, writing
from vpm_jax.runs.logs import duration


class Lock:
    """The file at `path` says who holds it, and the holder touches it every BEAT seconds.

    The lock of a process that is gone is taken over: at once if it ran on this machine, else after watching for
    PATIENCE seconds that nobody touches it (no clocks are compared).
    """

    BEAT, PATIENCE = 5.0, 20.0

    def __init__(self, path: Path):
        self._path = path
        who = {"host": socket.gethostname(), "pid": os.getpid(), "place": _place(), "started": _started(os.getpid())}
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._text = json.dumps(who | {"since": since, "token": uuid.uuid4().hex}).encode()
        self._ended = threading.Event()

    def acquire(self) -> str | None:
        """None once the lock is this object's; else who holds it.

        Raises:
          UserError: if the file could not be written.
        """
        while not self._create():
            text = self._read()
            if text is None:  # released in between
                continue
            holder = _Holder(text)
            if holder.lives_here if holder.is_here else self._is_touched(holder):
                return str(holder)
            if self._take_over(text):
                break
        threading.Thread(target=self._beat, daemon=True).start()
        return None

    def release(self) -> None:
        """Removes the file, unless it is another's by now."""
        self._ended.set()
        with contextlib.suppress(OSError), self._alone() as file:
            if file.read() == self._text:
                self._path.unlink()

    def is_lost(self) -> bool:
        """Whether another holds it by now, since this process slept for long, or was thought dead."""
        return self._read() != self._text and not self._create()

    def _create(self) -> bool:
        try:
            with writing(self._path):
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except UserError as error:
            if isinstance(error.__cause__, FileExistsError):
                return False
            raise
        try:
            return self._take_over(b"")
        except UserError:
            self._path.unlink(missing_ok=True)
            raise

    def _read(self) -> bytes | None:
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return None

    def _beat(self) -> None:
        while not self._ended.wait(self.BEAT):
            with contextlib.suppress(OSError):
                if self._read() == self._text:  # not the name of another, who took it over
                    os.utime(self._path)

    def _take_over(self, text: bytes) -> bool:
        """Writes this holder's name over that of a dead one, or into an empty file; False if another was quicker."""
        with writing(self._path):
            try:
                with self._alone() as file:
                    if file.read() != text:
                        return False
                    file.seek(0)
                    file.write(self._text)
                    file.truncate()
            except FileNotFoundError:  # released in between
                return False
        return True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[IO[bytes]]:
        """The open file, which those that change or remove it take turns at, by the system's own lock of it.

        Raises:
          FileNotFoundError: if there is none, or it was removed while another had its turn.
        """
        with open(self._path, "r+b") as file:
            with contextlib.suppress(OSError):  # a file system without such locks
                fcntl.flock(file, fcntl.LOCK_EX)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(self._path)):
                raise FileNotFoundError(self._path)
            yield file

    def _is_touched(self, holder: _Holder) -> bool:
        """Whether a holder elsewhere, or about to write its name, gives a sign of life."""
        print(f"{self._path} is held by {holder}: watching for {self.PATIENCE:.0f} s whether it still is", flush=True)
        try:
            before, end = _modified(self._path), time.monotonic() + self.PATIENCE
            while time.monotonic() < end:
                time.sleep(self.BEAT / 5)
                if _modified(self._path) != before:
                    return True
        except FileNotFoundError:  # released meanwhile
            pass
        return False


def holder(path: Path, silence: float = 900.0) -> str | None:
    """Who holds the lock at `path`, as far as a look tells: None if nobody does, or nobody that lives.

    A holder on another machine passes for dead after `silence` seconds, by this machine's clock.
    """
    try:
        found, age = _Holder(path.read_bytes()), time.time() - _modified(path) / 1e9
    except FileNotFoundError:
        return None
    if found.is_here:
        return str(found) if found.lives_here else None
    return f"{found}, last heard of {duration(max(age, 0))} ago" if age < silence else None


class _Holder:
    """What a lock's file says of its holder."""

    def __init__(self, text: bytes):
        self._found: dict[str, Any] = {"place": None}
        self._who = "a process that left no name"  # it died between making and filling the file, or does so now
        with contextlib.suppress(ValueError, KeyError, TypeError):
            found = json.loads(text)
            self._who = f"process {int(found['pid'])} on {found['host']}, since {found['since']}"
            self._found = {key: found[key] for key in ("place", "pid", "started")}

    def __str__(self) -> str:
        return self._who

    @property
    def is_here(self) -> bool:
        """Whether it runs, or ran, where this process can see it."""
        return self._found["place"] == _place()

    @property
    def lives_here(self) -> bool:
        return _started(self._found["pid"]) == self._found["started"]


def _modified(path: Path) -> int:
    """When a file was last touched, in ns; opened, so that a network file system asks its server."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _place() -> str:
    """What processes have in common that can see each other: a host since its start, and not another container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(pid: int) -> str | None:
    """When a process of this machine started, in its own words; None if there is none. Process numbers are reused."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # somebody else's
        pass
    with contextlib.suppress(OSError, ValueError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]  # a zombie is dead; else clock ticks since boot
    return "unknown"  # no /proc: it lives, that is all
