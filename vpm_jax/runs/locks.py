"""Cross-host file lock with stale-lock takeover."""

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

from vpm_jax.disk import writing
from vpm_jax.errors import UserError
from vpm_jax.progress import duration


class Lock:
    """A lock file at `path` that names its holder, who touches it every BEAT seconds.

    The lock of a dead process is taken over: at once if the process ran on this machine, otherwise after nobody has
    touched the file for PATIENCE seconds of watching (clocks of different machines are never compared).
    """

    BEAT, PATIENCE = 5.0, 20.0

    def __init__(self, path: Path):
        self._path = path
        owner = {"host": socket.gethostname(), "pid": os.getpid(), "place": _place(), "started": _started(os.getpid())}
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self._text = json.dumps(owner | {"since": since, "token": uuid.uuid4().hex}).encode()
        self._ended = threading.Event()

    def acquire(self) -> str | None:
        """Acquires the lock and returns None, or returns who holds it.

        Raises:
          UserError: if the file cannot be written.
        """
        while not self._create():
            text = self._read()
            if text is None:  # released meanwhile
                continue
            holder = _Holder(text)
            if holder.lives_here if holder.is_here else self._is_touched(holder):
                return str(holder)
            if self._take_over(text):
                break
        threading.Thread(target=self._beat, daemon=True).start()
        return None

    def release(self) -> None:
        """Removes the file, unless another process has taken it over."""
        self._ended.set()
        with contextlib.suppress(OSError), self._alone() as file:
            if file.read() == self._text:
                self._path.unlink()

    def is_lost(self) -> bool:
        """Whether another process has taken over the lock, for example while this one was suspended."""
        return self._read() != self._text and not self._create()

    def _create(self) -> bool:
        with writing(self._path):
            try:
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
            except FileExistsError:
                return False
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
                if self._read() == self._text:  # do not keep another holder's lock alive
                    os.utime(self._path)

    def _take_over(self, text: bytes) -> bool:
        """Replaces `text`, a dead holder's or empty, by this holder's. Returns False if another process was faster."""
        with writing(self._path):
            try:
                with self._alone() as file:
                    if file.read() != text:
                        return False
                    file.seek(0)
                    file.write(self._text)
                    file.truncate()
            except FileNotFoundError:  # released meanwhile
                return False
        return True

    @contextlib.contextmanager
    def _alone(self) -> Iterator[IO[bytes]]:
        """The open file under an exclusive system lock. All changes and removals hold it.

        Raises:
          FileNotFoundError: if there is no file, or it was removed while waiting.
        """
        with open(self._path, "r+b") as file:
            with contextlib.suppress(OSError):  # some file systems do not support it
                fcntl.flock(file, fcntl.LOCK_EX)
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(self._path)):
                raise FileNotFoundError(self._path)
            yield file

    def _is_touched(self, holder: _Holder) -> bool:
        """Whether a holder on another machine, or one that has not written its name yet, touches the file."""
        print(f"{self._path} is held by {holder}: checking for {self.PATIENCE:.0f} s if it is alive", flush=True)
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
    """Who holds the lock at `path`, None if nobody alive does. Unlike `Lock.acquire` it does not watch the file.

    A holder on another machine counts as dead after `silence` seconds by this machine's clock.
    """
    try:
        owner, age = _Holder(path.read_bytes()), time.time() - _modified(path) / 1e9
    except FileNotFoundError:
        return None
    if owner.is_here:
        return str(owner) if owner.lives_here else None
    return f"{owner}, last seen {duration(max(age, 0))} ago" if age < silence else None


class _Holder:
    """The holder that a lock file names."""

    def __init__(self, text: bytes):
        self._fields: dict[str, Any] = {"place": None}
        self._description = "an unnamed process"  # one that created the file without writing its name yet
        with contextlib.suppress(ValueError, KeyError, TypeError):
            fields = json.loads(text)
            self._description = f"process {int(fields['pid'])} on {fields['host']}, since {fields['since']}"
            self._fields = {key: fields[key] for key in ("place", "pid", "started")}

    def __str__(self) -> str:
        return self._description

    @property
    def is_here(self) -> bool:
        """Whether its process is visible from here, if it still exists."""
        return self._fields["place"] == _place()

    @property
    def lives_here(self) -> bool:
        return _started(self._fields["pid"]) == self._fields["started"]


def _modified(path: Path) -> int:
    """The modification time in ns. Opening the file makes a network file system ask its server."""
    with open(path, "rb") as file:
        return os.fstat(file.fileno()).st_mtime_ns


def _place() -> str:
    """Equal for processes that can see each other: the same boot of the same host, in the same container."""
    names = [socket.gethostname()]
    with contextlib.suppress(OSError):
        names.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip())
        names.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(names)


def _started(pid: int) -> str | None:
    """The start time of a process on this machine, None if it is dead. It distinguishes processes with the same pid."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # a process of another user
        pass
    with contextlib.suppress(OSError, ValueError, IndexError):
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return None if state in "ZX" else fields[18]  # a zombie counts as dead; field 18 is in clock ticks since boot
    return "unknown"  # alive, on a system without /proc
