"""A training's folder: what it holds already, and a lock that keeps a second training out."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from pathlib import Path

from ml_collections import ConfigDict

from vpm_jax import config as config_lib
from vpm_jax.errors import UserError, writing


def find_run(workdir: Path, resume: bool) -> tuple[ConfigDict | None, bool]:
    """(config of the run that the workdir holds, None if it is new; whether it has a checkpoint).

    What failed before its first checkpoint is no run: the next one starts in its place.

    Raises:
      UserError: for a run that must not be resumed, or that has lost its config.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file, expected a folder: choose another.")
    if not any(path.name.isdigit() for path in workdir.glob("checkpoints/*")):
        return None, False
    saved = config_lib.read(workdir)
    if saved is None:
        raise UserError(
            f"{workdir} holds checkpoints without their run's config.json: put it back or choose another --workdir."
        )
    if not resume:
        raise UserError(f"{workdir} holds a run and --resume=never was given: choose another --workdir or delete it.")
    return saved, True


def continue_run(saved: ConfigDict, config: ConfigDict, workdir: Path) -> None:
    """Checks that `config` may go on with the run of `saved`; takes over what its pretrained weights set.

    Raises:
      UserError: that names the keys that differ.
    """
    if config.pretrained == saved.pretrained != "none":
        for group, key in (("model", "stride_on"), ("model", "bn_epsilon"), ("data", "mean"), ("data", "std")):
            config[group][key] = saved[group][key]
    changed = config_lib.changed_keys(saved, config)
    if changed:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(changed[:5])}): choose another --workdir, or set "
            f"these keys back; what may change is {', '.join(key.rstrip('.') for key in config_lib.RESUMABLE)} and, "
            "where its schedule is step-wise, more epochs of the last stage."
        )


class Lock:
    """Makes a workdir one training's own, also among machines that share a disk; a context manager.

    The file `.lock` says who holds it, and the holder touches it every BEAT seconds. The lock of a process that is
    gone is taken over: at once if it ran on this machine, else after watching for PATIENCE seconds that nobody
    touches it (no clocks are compared).

    Raises:
      UserError: on entering, while another training holds it.
    """

    BEAT, PATIENCE = 5.0, 20.0

    def __init__(self, workdir: Path):
        self._path = workdir / ".lock"
        self._token = uuid.uuid4().hex
        who = {"host": socket.gethostname(), "pid": os.getpid(), "place": _place(), "started": _started(os.getpid())}
        self._text = json.dumps(who | {"since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": self._token})
        self._ended = threading.Event()

    def __enter__(self) -> Lock:
        while not self._create():
            text = self._read()
            if text is None:  # released in between
                continue
            self._take_from_the_dead(text)
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self._read() == self._text:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def check(self) -> None:
        """Raises UserError if the lock is another's by now, since this process slept for long, or was thought dead."""
        if self._read() != self._text and not self._create():
            raise UserError(f"Another training has taken over {self._path.parent}: this one stops and saves no more.")

    def _create(self) -> bool:
        try:
            with writing(self._path):
                file = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except UserError as error:
            if isinstance(error.__cause__, FileExistsError):
                return False
            raise
        try:
            with writing(self._path), os.fdopen(file, "w") as stream:
                stream.write(self._text)
        except UserError:
            self._path.unlink(missing_ok=True)
            raise
        return True

    def _read(self) -> str | None:
        try:
            return self._path.read_text(errors="replace")
        except FileNotFoundError:
            return None

    def _beat(self) -> None:
        while not self._ended.wait(self.BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._path)

    def _take_from_the_dead(self, text: str) -> None:
        try:
            holder = json.loads(text)
            who = f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
        except (ValueError, KeyError, TypeError):  # its holder died between making and filling it, or does so now
            holder, who = {"place": None}, "a process that left no name"
        here = holder["place"] == _place()
        if _started(holder["pid"]) == holder["started"] if here else self._is_touched(who):
            raise UserError(
                f"{self._path.parent} is in use by another training ({who}): wait for its end, stop it, or choose "
                "another --workdir."
            )
        # Of two that come at once, one may hold the lock by now: move it aside, look, and put it back if so.
        aside = self._path.with_name(f".lock-{self._token}")
        with contextlib.suppress(FileNotFoundError):
            os.rename(self._path, aside)
            if aside.read_text(errors="replace") != text:
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self._path)
            aside.unlink()

    def _is_touched(self, who: str) -> bool:
        """Whether a holder elsewhere, or about to write its name, gives a sign of life."""
        print(f"{self._path} is held by {who}: watching for {self.PATIENCE:.0f} s whether it still is", flush=True)

        try:
            before, end = self._path.stat().st_mtime_ns, time.monotonic() + self.PATIENCE
            while time.monotonic() < end:
                time.sleep(self.BEAT / 5)
                if self._path.stat().st_mtime_ns != before:
                    return True
        except FileNotFoundError:  # released meanwhile
            pass
        return False


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
