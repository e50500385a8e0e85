"""Checkpoints through Orbax: the whole training state and what goes with it, written atomically."""

from __future__ import annotations

import contextlib
import functools
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from vpm_jax.errors import UserError, disk_trouble, writing


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


class Checkpoints:
    """The checkpoints of a workdir, newest last; a context manager that waits for writes before it leaves.

    Args:
      workdir: checkpoints go to its folder `checkpoints`.
      keep: how many of the newest stay; 0 only reads, and touches nothing.

    Raises:
      UserError: if the folder cannot be made.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        _hush_libraries()
        self.folder = Path(workdir).absolute() / "checkpoints"
        self._writes = keep > 0
        if self._writes:
            with writing(self.folder):
                self.folder.mkdir(exist_ok=True)
            self._remove_unfinished()  # what a killed run left half-written
            options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        else:
            options = ocp.CheckpointManagerOptions(read_only=True)
        # Named handlers, so that the shapes of a checkpoint are known before anything was saved or restored.
        handlers = {"state": ocp.StandardCheckpointHandler(), "meta": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.wait()
        except Exception:
            if error is None:  # else the error under way says more
                raise
        finally:
            with contextlib.suppress(Exception):  # it waits again, for what `wait` has told
                self._manager.close()
            if error is not None and self._writes:
                self._remove_unfinished()

    @property
    def latest(self) -> int | None:
        """The newest step saved, None without any."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Starts writing; `meta` is JSON. The last save is waited for first, and its failure raised.

        Raises:
          FloatingPointError: if the state is not finite, so that every checkpoint can be gone on from.
          UserError: when a disk is full or read-only; earlier checkpoints are whole.
        """
        if not _finite(jax.tree.leaves(state)):
            raise FloatingPointError(f"The state after step {step} is not finite")
        self.wait()
        try:
            args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
            self._manager.save(step, args=args, force=True)
        except Exception as error:
            raise self._explain(error) from error

    def wait(self) -> None:
        """Returns when nothing is being written. Raises as `save`."""
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
        steps = self._manager.all_steps(read=True)
        kept = f"the checkpoint of step {max(steps)} is whole" if steps else "there is no earlier checkpoint"
        return UserError(f"A checkpoint could not be written to {self.folder}: {trouble} ({kept}).")

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, dict]:
        """(state, meta) of `step` (default: the newest), placed like the arrays or shapes of `like`.

        Raises:
          UserError: if there is no checkpoint, or it is of another model.
        """
        step = self.latest if step is None else step
        if step is None:
            raise UserError(f"There is no checkpoint in {self.folder}: train first (python -m vpm_jax.train).")
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        self._compare(step, abstract)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=args)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0][:200]
            raise UserError(
                f"The checkpoint {self.folder / str(step)} cannot be read ({reason}): "
                "delete that folder to go on from the one before, if there is one."
            ) from error
        return restored.state, restored.meta

    def meta(self) -> dict:
        """The meta of the newest checkpoint, without its state; {} without any."""
        step = self.latest
        if step is None:
            return {}
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore())).meta

    def _compare(self, step: int, abstract: Any) -> None:
        def shapes(tree) -> dict[str, tuple]:
            def name(path):
                return "/".join(str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path)

            return {name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

        try:
            metadata = self._manager.item_metadata(step)["state"]
            found, expected = shapes(metadata), shapes(abstract)
        except Exception:  # unreadable: restoring says why
            return
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
