"""What finished runs leave: one JSON file each, shared by everybody who works on the same tables.

A folder of these files says what is done. Processes and machines that share it divide the work by claims: a file
made with O_EXCL, renewed while the run goes on, and taken over from an owner that has fallen silent.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vpm_jax import __version__
from vpm_jax import config as config_lib
from vpm_jax.benchmark import report
from vpm_jax.errors import UserError, writing
from vpm_jax.experiments import Run, fingerprint
from vpm_jax.logs import duration, write_atomically

RANKS = 10  # of the CMC that is kept
HEARTBEAT = 30.0  # seconds between renewals of a claim
STALE = 900.0  # seconds without one after which a claim is taken over


def read(folder: Path, run: Run) -> dict[str, Any] | None:
    """The result of a run, None if it has not finished.

    Raises:
      UserError: if the file is broken, or of another config: it names the keys.
    """
    path = folder / f"{run.name}.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text())
        saved = result["config"]
        needed = {"protocols" if run.test else "gammas", "images", "seconds", "hardware", "protocol"}
        if absent := needed - set(result):
            raise KeyError(min(absent))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not the result of a run ({type(error).__name__}: {error}): delete it and run again."
        ) from error
    asked, known = plain(fingerprint(run.config)), plain(fingerprint(config_lib.default()))
    differ = [
        f"{key}: {saved.get(key, known.get(key))} there, {asked.get(key, 'unknown')} asked"
        for key in sorted(set(saved) | set(asked))
        if saved.get(key, known.get(key)) != asked.get(key)
    ]
    if differ:
        raise UserError(
            f"{path} holds a run of another config ({'; '.join(differ[:5])}{', ...' * (len(differ) > 5)}): name yours "
            "by --variant, choose another --results folder, or delete the file to run it again."
        )
    return result


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    return json.loads(json.dumps(values))


def record(
    run: Run, evaluation: Mapping[str, Any], resolved: Mapping[str, Any], images: int, seconds: float, rate: float
) -> dict[str, Any]:
    """What a finished run leaves.

    Args:
      run: the run.
      evaluation: what `evaluate` wrote as evaluation.json.
      resolved: the fingerprint of the config as trained, with what the data and the weights set.
      images: how many training saw, 0 of an evaluation alone.
      seconds: of training.
      rate: images per second of training.
    """
    asked = fingerprint(run.config)
    found = evaluation["results" if run.test else "gammas"]
    numbers = {row: dict(values, cmc=values["cmc"][:RANKS]) for row, values in found.items()}
    return plain(
        {
            "dataset": run.dataset,
            "scale": run.scale,
            "method": run.method,
            "variant": run.variant,
            "seed": run.seed,
            "test": run.test or run.dataset,
            "recipe": run.config.recipe,
            "command": run.command(),
            "changes": run.changes,
            "evaluates": run.of.name if run.of else None,
            "protocol": evaluation["protocol"] | {"held out identities": run.config.data.holdout_identities},
            "match": evaluation["match"],
            "chance_rank1": evaluation["chance_rank1"],
            "protocols" if run.test else "gammas": numbers,
            "steps": evaluation["steps"],
            "images": images,
            "seconds": round(seconds, 1),
            "images_per_second": round(rate, 2),
            "evaluation_seconds": evaluation["seconds"],
            "hardware": hardware(),
            "versions": f"vpm_jax {__version__}, {report.versions()}",
            "commit": commit(),
            "finished": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "resolved": {key: value for key, value in resolved.items() if asked.get(key) != value},
            "config": asked,
        }
    )


def write(folder: Path, run: Run, result: Mapping[str, Any]) -> None:
    """Writes a run's result, all of it or nothing."""
    write_atomically(folder / f"{run.name}.json", json.dumps(result, indent=1) + "\n")


def finished(folder: Path) -> list[dict[str, Any]]:
    """Every result in the folder that can be read."""
    results = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(ValueError, OSError):
            results.append(json.loads(path.read_text()))
    return [result for result in results if isinstance(result, dict) and "images_per_second" in result]


# ---- Where it ran ----------------------------------------------------------------------------------------


@functools.cache
def hardware() -> str:
    """The class of this machine: the devices that JAX uses, and the cores that this process may use."""
    import jax

    devices = jax.devices()
    return report.hardware("" if devices[0].platform == "cpu" else f"{len(devices)} x {devices[0].device_kind}")


def commit() -> str | None:
    """The commit of the code, "+" behind it if files differ from it; None outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "--", "*.py"))
    except (OSError, subprocess.SubprocessError):
        return None


# ---- Who works on what -----------------------------------------------------------------------------------


def owner(folder: Path, run: Run) -> str | None:
    """Who works on a run ("host, process 17, last heard of 0:20 ago"), None if nobody that is alive does."""
    found = _read_claim(_claim_path(folder, run))
    if found is None or not _alive(found):
        return None
    return f"{found['host']}, process {found['pid']}, last heard of {duration(time.time() - found['heartbeat'])} ago"


@contextlib.contextmanager
def claim(folder: Path, run: Run) -> Iterator[bool]:
    """Claims a run for this process while the block lasts; yields False if somebody else works on it.

    A claim is renewed every HEARTBEAT seconds. One not renewed for STALE seconds, or of a process of this host that
    is gone, is taken over.
    """
    path = _claim_path(folder, run)
    mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time(), "heartbeat": time.time()}
    if not _create(path, mine) and not (_remove_stale(path) and _create(path, mine)):
        yield False
        return
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError, UserError):
                write_atomically(path, json.dumps(mine | {"heartbeat": time.time()}))

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield True
    finally:
        ended.set()
        thread.join()
        with contextlib.suppress(OSError):
            path.unlink()


def _claim_path(folder: Path, run: Run) -> Path:
    return folder / f"{run.name}.claim"


def _create(path: Path, content: Mapping[str, Any]) -> bool:
    """Makes the file; False if it is there already. Whole from the start: linked, not written, to its name."""
    with writing(path):
        try:
            descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        with os.fdopen(descriptor, "w") as file:
            json.dump(content, file)
    return True


def _read_claim(path: Path) -> dict[str, Any] | None:
    """What a claim says; of one that is being written, or was cut short, the time of the file."""
    try:
        text, changed = path.read_text(), path.stat().st_mtime
    except OSError:
        return None
    try:
        found = json.loads(text)
        return {"host": str(found["host"]), "pid": int(found["pid"]), "heartbeat": float(found["heartbeat"])}
    except (ValueError, KeyError, TypeError):
        return {"host": "unknown", "pid": 0, "heartbeat": changed}


def _alive(found: Mapping[str, Any]) -> bool:
    if time.time() - found["heartbeat"] > STALE:
        return False
    if found["host"] != socket.gethostname():
        return True
    try:
        os.kill(found["pid"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _remove_stale(path: Path) -> bool:
    """Removes a claim whose owner is gone; False if it is alive. Of several that try, one moves the file away."""
    found = _read_claim(path)
    if found is None:
        return True
    if _alive(found):
        return False
    moved = path.with_name(f".{socket.gethostname()}-{os.getpid()}-{path.name}")
    try:
        os.rename(path, moved)
    except FileNotFoundError:
        return True
    again = _read_claim(moved)
    if again is not None and again != found and _alive(again):  # another was quicker and this is its new claim
        with contextlib.suppress(FileExistsError):
            os.link(moved, path)
    moved.unlink()
    return True
