"""Checkpoints of the whole training state: Orbax, with checksums.

Only process 0 reads and writes; it sends the others what it read.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import shutil
import sys
import warnings
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from vpm_jax.disk import check_utf8, disk_trouble, writing
from vpm_jax.errors import UserError, first_line
from vpm_jax.runs import hosts

_DAMAGED = ": it is damaged."


@functools.cache
def _hush_libraries() -> None:
    """Silences threads of Orbax and tensorstore after a failed read or write, which also raises an exception."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def quiet(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    sys.unraisablehook = quiet


@jax.jit
def _snapshot(state: Any) -> tuple[Any, jax.Array]:
    """(a copy of the state on the devices, whether all of it is finite)."""
    finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(state)]
    return jax.tree.map(jnp.copy, state), jnp.all(jnp.stack(finite))


def _checksum(state: Any, meta: dict) -> int:
    """CRC-32 of all arrays and the JSON, which detects damage by a disk or a copy."""
    total = zlib.crc32(json.dumps(meta, sort_keys=True).encode())
    for leaf in jax.tree.leaves(state):
        total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, total)
    return total


def _unwrap(saved: dict) -> tuple[dict, int | None]:
    """(meta, checksum) from the JSON of a checkpoint; early versions had no checksums."""
    if saved.keys() == {"meta", "crc32"}:
        return saved["meta"], saved["crc32"]
    if "seconds" in saved:
        return saved, None
    raise ValueError("its meta has an unknown format")


class Checkpoints:
    """The checkpoints of a workdir; a context manager that waits for writes on exit.

    Args:
      workdir: the run's folder; checkpoints are in its folder `checkpoints`.
      keep: the number of checkpoints to keep, newest first; 0 opens them read-only.

    Attributes:
      latest: the newest step, None without checkpoints. `restore` sets it to the restored one.

    Raises:
      UserError: if the folder cannot be created, or its path is not UTF-8.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        _hush_libraries()
        check_utf8(workdir, "checkpoints")
        self.folder = Path(workdir).absolute() / "checkpoints"
        self._first, self._writes = hosts.is_first(), keep > 0
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        self._written: Future[None] | None = None
        if self._first:
            self._open(keep)
        self.latest: int | None = hosts.from_first(lambda: max(self._steps(), default=None))

    def _open(self, keep: int) -> None:
        if self._writes:
            with writing(self.folder):
                self.folder.mkdir(exist_ok=True)
            self._remove_unfinished()
        # Only this process takes part; otherwise Orbax waits for the others.
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or None,
            read_only=not self._writes,
            create=False,
            multiprocessing_options=alone,
            enable_async_checkpointing=False,  # `_write` has its own thread
        )
        # With named handlers, item_metadata works before anything was saved or restored.
        handlers = {
            "state": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
            "meta": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        }
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def _steps(self) -> list[int]:
        # Orbax's own list leaves out some damaged checkpoints.
        return sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdigit())

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.wait()
        except Exception:
            if error is None:  # otherwise the current error is more informative
                raise
        finally:
            self._writer.shutdown()
            if self._first:
                with contextlib.suppress(Exception):  # close raises what `wait` already raised
                    self._manager.close()
                if error is not None and self._writes:
                    self._remove_unfinished()

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Waits for the previous save, then starts to write the state and `meta`, which must be JSON.

        The devices copy the state and continue; another thread fetches and writes the copy.

        Raises:
          FloatingPointError: if the state is not finite; training could not continue from it.
          UserError: when the disk is full or read-only, for this save or the previous one.
        """
        self.wait()
        copy, finite = _snapshot(state)
        if not finite:
            raise FloatingPointError(f"The state after step {step} is not finite")
        if self._first:
            self._written = self._writer.submit(self._write, step, copy, json.loads(json.dumps(meta)))
        self.latest = step

    def _write(self, step: int, copy: Any, meta: dict) -> None:
        state = jax.tree.map(np.asarray, jax.device_get(copy))
        saved = {"meta": meta, "crc32": _checksum(state, meta)}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(saved))
        self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Waits for the save in progress. Raises as `save` does."""
        written, self._written = self._written, None
        try:
            if written is not None:
                written.result()
        except Exception as error:
            raise self._explain(error) from error

    def _remove_unfinished(self) -> None:
        for unfinished in self.folder.glob("*orbax-checkpoint-tmp*"):
            shutil.rmtree(unfinished, ignore_errors=True)

    def _explain(self, error: Exception) -> Exception:
        trouble = disk_trouble(error)
        if trouble is None:
            return error
        self._remove_unfinished()
        steps = self._steps()
        kept = f"the checkpoint of step {steps[-1]} is intact" if steps else "there is no earlier checkpoint"
        return UserError(f"A checkpoint could not be written to {self.folder}: {trouble} ({kept}).", code="not-written")

    def restore(self, like: Any) -> tuple[Any, dict]:
        """Reads the newest checkpoint.

        Training falls back to the newest intact checkpoint and sets damaged ones aside. Readers (keep=0) never fall
        back to an older checkpoint.

        Args:
          like: arrays or shapes of a state.

        Returns:
          The state as NumPy arrays, and the meta.

        Raises:
          UserError: if there is no intact checkpoint (for readers: the newest is damaged), or it is of another model.
        """
        self.wait()
        self.latest, state, meta = hosts.from_first(lambda: self._restore(like))
        return state, meta

    def _restore(self, like: Any) -> tuple[int, Any, dict]:
        steps = self._steps()
        if not steps:
            raise UserError(
                f"There is no checkpoint in {self.folder}: train first (python -m vpm_jax.train), or make a saved "
                "model a workdir (python -m vpm_jax.convert FOLDER --output RUN)."
            )
        errors: dict[int, UserError] = {}
        for number in reversed(steps):
            try:
                state, meta = self.read(number, like)
            except UserError as error:
                errors[number] = error
                continue
            if errors and not self._writes:
                newest = next(iter(errors.values()))
                raise UserError(f"{newest} Run its training command again, which continues from step {number}.")
            for other, reason in errors.items():
                print(f"{reason} Continuing from step {number}.", file=sys.stderr)
                self._set_aside(other)
            return number, state, meta
        newest = next(iter(errors.values()))
        if str(newest).endswith(_DAMAGED):
            raise UserError(f"{newest} No other checkpoint is intact: restore a copy, or use another --workdir.")
        raise newest

    def _set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, so that its step can be saved again."""
        aside = self.folder / f"{step}.damaged"
        shutil.rmtree(aside, ignore_errors=True)
        (self.folder / str(step)).rename(aside)
        self._manager.reload()

    def read(self, step: int, like: Any) -> tuple[Any, dict]:
        """What `restore` returns, of this step, on process 0. Raises UserError if it is damaged or of another model."""
        self._compare(step, like)
        empty = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(empty), meta=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
            state, (meta, checksum) = restored.state, _unwrap(restored.meta)
            if checksum is not None and _checksum(state, meta) != checksum:
                raise ValueError("its checksum does not match")
        except Exception as error:
            name = f"The checkpoint {self.folder / str(step)}"
            raise UserError(f"{name} cannot be read ({first_line(error)}){_DAMAGED}") from error
        return state, meta

    def meta(self) -> dict:
        """The meta of the newest checkpoint; {} without checkpoints."""
        if self.latest is None:
            return {}
        step = self.latest
        return hosts.from_first(
            lambda: _unwrap(self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta)[0]
        )

    def _compare(self, step: int, like: Any) -> None:
        """Raises UserError if the parameters of a checkpoint have other shapes than `like`."""

        def shapes(tree: Any) -> dict[str, tuple]:
            leaves = jax.tree_util.tree_leaves_with_path(tree)
            return {jax.tree_util.keystr(p, simple=True, separator="/"): tuple(leaf.shape) for p, leaf in leaves}

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # Orbax abandons coroutines when a file is damaged
            try:
                metadata = self._manager.item_metadata(step)["state"]
                actual, expected = shapes(metadata), shapes(like)
            except Exception:  # unreadable: restoring it reports why
                return
        differ = [
            f"{key} is {actual.get(key, 'absent')} there and {expected.get(key, 'absent')} here"
            for key in sorted(set(actual) | set(expected))
            if actual.get(key) != expected.get(key) and key.startswith("params")
        ]
        if differ:
            raise UserError(
                f"The checkpoint of step {step} in {self.folder} is of another model ({len(differ)} arrays differ: "
                f"{differ[0]}): use the config that it was trained with, or another workdir."
            )
