"""Results of finished runs: one JSON file each, in a folder that processes and machines can share.

They divide the runs by claims: one lock per run, taken over from an owner that has died.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from vpm_jax import __version__
from vpm_jax import config as config_lib
from vpm_jax.benchmark import report
from vpm_jax.disk import write_atomically
from vpm_jax.errors import UserError
from vpm_jax.keys import RETIRED
from vpm_jax.reproduce.experiments import Run, fingerprint
from vpm_jax.runs import locks

RANKS = 10  # of the stored CMC
_ABOUT = ("training_set", "not_comparable", "junk", "same_camera", "network")  # of evaluation.json, for captions


def read(folder: Path, run: Run) -> dict[str, Any] | None:
    """The result of a run, or None if it has not finished.

    Raises:
      UserError: if the file is damaged, or of another config (the message names the keys).
    """
    path = folder / f"{run.name}.json"
    if not path.exists():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        saved = {key: value for key, value in result["config"].items() if key not in RETIRED}
        needed = {"protocols" if run.test else "gammas", "images", "seconds", "hardware", "protocol"}
        if absent := needed - set(result):
            raise KeyError(min(absent))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not the result of a run ({type(error).__name__}: {error}): delete it and run again."
        ) from error
    requested, default = plain(fingerprint(run.config)), plain(fingerprint(config_lib.default()))
    differ = [
        f"{key}: {saved.get(key, default.get(key))} in the file, {requested.get(key, 'unknown')} requested"
        for key in sorted(set(saved) | set(requested))
        if saved.get(key, default.get(key)) != requested.get(key)
    ]
    if differ:
        raise UserError(
            f"{path} holds a run of another config ({'; '.join(differ[:5])}{', ...' * (len(differ) > 5)}): name yours "
            "with --variant, choose another --results folder, or delete the file to run it again."
        )
    return result


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values after a round trip through JSON: tuples become lists."""
    return json.loads(json.dumps(values))


def record(
    run: Run,
    evaluation: Mapping[str, Any],
    resolved: Mapping[str, Any],
    images: int,
    seconds: float,
    rate: float,
    training_set: str | None = None,
) -> dict[str, Any]:
    """The result of a finished run.

    Args:
      run: the run.
      evaluation: evaluation.json.
      resolved: the fingerprint of the resolved config.
      images: the number of images trained on; 0 for an evaluation.
      seconds: of training.
      rate: training images per second.
      training_set: the digest of the training set; None for an evaluation.
    """
    requested = fingerprint(run.config)
    scores = evaluation["results" if run.test else "gammas"]
    numbers = {row: dict(values, cmc=values["cmc"][:RANKS]) for row, values in scores.items()}
    return plain(
        {
            "dataset": run.dataset,
            "scale": run.scale,
            "method": run.method,
            "variant": run.variant,
            "seed": run.seed,
            "test": run.test or run.dataset,
            "data": {"train": training_set, "test": evaluation.get("test_set")},
            "recipe": run.config.recipe,
            "command": run.command(),
            "changes": run.changes,
            "evaluates": run.of.name if run.of else None,
            "protocol": evaluation["protocol"] | {"held out identities": run.config.data.holdout_identities},
            "match": evaluation["match"],
            **{key: evaluation[key] for key in _ABOUT if key in evaluation},
            "chance_rank1": evaluation["chance_rank1"],
            "notes": evaluation.get("notes", []),
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
            "resolved": {key: value for key, value in resolved.items() if requested.get(key) != value},
            "config": requested,
        }
    )


def write(folder: Path, run: Run, result: Mapping[str, Any]) -> None:
    """Writes a run's result atomically."""
    write_atomically(folder / f"{run.name}.json", json.dumps(result, indent=1) + "\n")


def finished(folder: Path) -> list[dict[str, Any]]:
    """All readable results in the folder."""
    results = []
    for path in sorted(folder.glob("*.json")):
        with contextlib.suppress(ValueError, OSError):
            results.append(json.loads(path.read_text(encoding="utf-8")))
    return [result for result in results if isinstance(result, dict) and "images_per_second" in result]


# ---- Where it ran ----------------------------------------------------------------------------------------


@functools.cache
def hardware() -> str:
    """JAX's devices and the CPU cores available to this process."""
    devices = jax.devices()
    return report.hardware("" if devices[0].platform == "cpu" else f"{len(devices)} x {devices[0].device_kind}")


def commit() -> str | None:
    """$VPM_COMMIT, or the checkout's commit, followed by "+" if files were changed; None outside a git checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    if given := os.environ.get("VPM_COMMIT"):
        return given
    try:
        return git("rev-parse", "--short=12", "HEAD") + "+" * bool(git("status", "--porcelain", "--", "*.py"))
    except (OSError, subprocess.SubprocessError):
        return None


# ---- Claims ----------------------------------------------------------------------------------------------


def owner(folder: Path, run: Run) -> str | None:
    """The live process that has claimed a run ("process 17 on host, since ..."), or None."""
    return locks.holder(_claim_path(folder, run))


@contextlib.contextmanager
def claim(folder: Path, run: Run) -> Iterator[bool]:
    """Claims a run for this process inside the context; yields False if another process holds it."""
    lock = locks.Lock(_claim_path(folder, run))
    if lock.acquire():
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _claim_path(folder: Path, run: Run) -> Path:
    return folder / f"{run.name}.claim"
