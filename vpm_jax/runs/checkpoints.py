"""Checkpoints through Orbax: the whole training state and what goes with it, written atomically, checked when read.

Of many processes the first alone reads and writes, and sends the others what it read.
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
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from vpm_jax.errors import UserError, disk_trouble, writing
from vpm_jax.runs import hosts

_DAMAGED = ": it is damaged."


@functools.cache
def _hush_libraries() -> None:
    """Keeps quiet what the threads of Orbax and tensorstore say of a failed read or write: exceptions say it too."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    hook = sys.unraisablehook

    def quiet(unraisable: Any) -> None:
        if "Event loop is closed" not in str(unraisable.exc_value):
            hook(unraisable)

    sys.unraisablehook = quiet


@jax.jit
def _finite(arrays: list[jax.Array]) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in arrays]))


def _checksum(state: Any, meta: dict) -> int:
    """Of every array's bytes and of the JSON: what a disk or a copy has changed does not pass for a checkpoint."""
    total = zlib.crc32(json.dumps(meta, sort_keys=True).encode())
    for leaf in jax.tree.leaves(state):
        total = zlib.crc32(np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data, total)
    return total


def _unwrap(saved: dict) -> tuple[dict, int | None]:
    """(meta, checksum) of the JSON that a checkpoint holds; those from before there were checksums have none."""
    if saved.keys() == {"meta", "crc32"}:
        return saved["meta"], saved["crc32"]
    if "seconds" in saved:
        return saved, None
    raise ValueError("its meta is not what was saved")


class Checkpoints:
    """The checkpoints of a workdir, newest last; a context manager that waits for writes before it leaves.

    Args:
      workdir: checkpoints go to its folder `checkpoints`.
      keep: how many of the newest stay; 0 only reads, and touches nothing.

    Attributes:
      latest: the newest step, None without any; after `restore` without a step, the one that it found whole.

    Raises:
      UserError: if the folder cannot be made.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        _hush_libraries()
        self.folder = Path(workdir).absolute() / "checkpoints"
        self._first, self._writes = hosts.is_first(), keep > 0
        if self._first:
            self._open(keep)
        self.latest: int | None = hosts.from_first(lambda: max(self._steps(), default=None))

    def _open(self, keep: int) -> None:
        if self._writes:
            with writing(self.folder):
                self.folder.mkdir(exist_ok=True)
            self._remove_unfinished()  # what a killed run left half-written
        # Orbax is told that this process is alone, else it waits for the others.
        alone = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0})
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep or None, read_only=not self._writes, create=False, multiprocessing_options=alone
        )
        # Named handlers, so that the shapes of a checkpoint are known before anything was saved or restored.
        handlers = {
            "state": ocp.StandardCheckpointHandler(multiprocessing_options=alone),
            "meta": ocp.JsonCheckpointHandler(multiprocessing_options=alone),
        }
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def _steps(self) -> list[int]:
        # By their names, for Orbax passes over some that are damaged.
        return sorted(int(path.name) for path in self.folder.glob("*") if path.name.isdigit())

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.wait()
        except Exception:
            if error is None:  # else the error under way says more
                raise
        finally:
            if self._first:
                with contextlib.suppress(Exception):  # it waits again, for what `wait` has told
                    self._manager.close()
                if error is not None and self._writes:
                    self._remove_unfinished()

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Starts writing; `meta` is JSON. The last save is waited for first, and its failure raised.

        Raises:
          FloatingPointError: if the state is not finite, so that every checkpoint can be gone on from.
          UserError: when a disk is full or read-only; earlier checkpoints are whole.
        """
        if not _finite(jax.tree.leaves(state)):
            raise FloatingPointError(f"The state after step {step} is not finite")
        self.wait()
        if self._first:
            # A copy: the next steps reuse the memory of the devices.
            copy = jax.tree.map(lambda x: np.array(x, copy=True), jax.device_get(state))
            meta = {"meta": json.loads(json.dumps(meta)), "crc32": _checksum(copy, meta)}
            try:
                args = ocp.args.Composite(state=ocp.args.StandardSave(copy), meta=ocp.args.JsonSave(meta))
                self._manager.save(step, args=args, force=True)
            except Exception as error:
                raise self._explain(error) from error
        self.latest = step

    def wait(self) -> None:
        """Returns when nothing is being written. Raises as `save`."""
        if not self._first:
            return
        try:
            self._manager.wait_until_finished()
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
        kept = f"the checkpoint of step {steps[-1]} is whole" if steps else "there is no earlier checkpoint"
        return UserError(f"A checkpoint could not be written to {self.folder}: {trouble} ({kept}).", code="not-written")

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict]:
        """(state, meta) of `step`, or of the newest checkpoint.

        Training goes on from the newest that is whole, and says which it passed over. Who only reads (keep=0) gets no
        older state in its place.

        Args:
          like: arrays or shapes of a state.
          step: this checkpoint and no other.

        Returns:
          The state in NumPy arrays, and the meta.

        Raises:
          UserError: if there is no checkpoint, none is whole (for a reader: the newest is not), or it is of another
            model.
        """
        number, state, meta = hosts.from_first(lambda: self._restore(like, step))
        if step is None:
            self.latest = number
        return state, meta

    def _restore(self, like: Any, step: int | None) -> tuple[int, Any, dict]:
        steps = self._steps()
        if step is None and not steps:
            raise UserError(f"There is no checkpoint in {self.folder}: train first (python -m vpm_jax.train).")
        damaged: dict[int, UserError] = {}
        for number in reversed(steps) if step is None else (step,):
            try:
                found = self._read(number, like)
            except UserError as error:
                damaged[number] = error
                continue
            if damaged and not self._writes:
                newest = next(iter(damaged.values()))
                raise UserError(f"{newest} Run its training's command again, which goes on from step {number}.")
            for other, reason in damaged.items():
                print(f"{reason} Going on from the one of step {number}.", file=sys.stderr)
                self._set_aside(other)
            return number, *found
        newest = next(iter(damaged.values()))
        if str(newest).endswith(_DAMAGED):
            raise UserError(f"{newest} There is no other that is whole: bring back a copy, or use another --workdir.")
        raise newest

    def _set_aside(self, step: int) -> None:
        """Renames a damaged checkpoint, for its step will be saved again."""
        if self._writes:
            aside = self.folder / f"{step}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            (self.folder / str(step)).rename(aside)
            self._manager.reload()

    def _read(self, step: int, like: Any) -> tuple[Any, dict]:
        self._compare(step, like)
        empty = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(empty), meta=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
            state, (meta, checksum) = restored.state, _unwrap(restored.meta)
            if checksum is not None and _checksum(state, meta) != checksum:
                raise ValueError("its values are not those that were saved")
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"The checkpoint {self.folder / str(step)} cannot be read ({reason}){_DAMAGED}") from error
        return state, meta

    def meta(self) -> dict:
        """The meta of the newest checkpoint, without its state; {} without any."""
        if self.latest is None:
            return {}
        step = self.latest
        return hosts.from_first(
            lambda: _unwrap(self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta)[0]
        )

    def _compare(self, step: int, like: Any) -> None:
        def shapes(tree) -> dict[str, tuple]:
            def name(path):
                return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)

            return {name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # Orbax leaves coroutines behind when a file is broken
            try:
                metadata = self._manager.item_metadata(step)["state"]
                found, expected = shapes(metadata), shapes(like)
            except Exception:  # unreadable: restoring says why
                found = expected = {}
        differ = [
            f"{key} is {found.get(key, 'absent')} there and {expected.get(key, 'absent')} here"
            for key in sorted(set(found) | set(expected))
            if found.get(key) != expected.get(key) and key.startswith("params")
        ]
        if differ:
            raise UserError(
                f"The checkpoint of step {step} in {self.folder} is of another model ({len(differ)} arrays differ: "
                f"{differ[0]}): use the config it was trained with, or another workdir."
            )
