"""Checkpoints through Orbax: the whole training state and what goes with it, written atomically."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from vpm_jax.cli import disk_trouble
from vpm_jax.errors import UserError


class Checkpoints:
    """The checkpoints of a workdir, newest last; a context manager that waits for writes before it leaves.

    Args:
      workdir: checkpoints go to its folder `checkpoints`.
      keep: how many of the newest stay.
    """

    def __init__(self, workdir: Path, keep: int = 2):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports failed writes by exceptions as well
        self.folder = Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep)
        self._manager = ocp.CheckpointManager(self.folder, options=options, item_names=("state", "meta"))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind, error, traceback) -> None:
        try:
            self.wait()
        except UserError:
            if error is None:
                raise
        finally:
            self._manager.close()

    @property
    def latest(self) -> int | None:
        """The newest step saved, None without any."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, meta: dict) -> None:
        """Starts writing; `meta` is JSON. The last save is waited for first, and its failure raised.

        Raises:
          UserError: when a disk is full or read-only; earlier checkpoints are whole.
        """
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

    def _explain(self, error: Exception) -> Exception:
        trouble = disk_trouble(error)
        if trouble is None:
            return error
        steps = [s for s in self._manager.all_steps(read=True)]
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
                f"The checkpoint of step {step} in {self.folder} cannot be read ({reason}): "
                "delete that folder to go on from the one before."
            ) from error
        return restored.state, restored.meta

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
