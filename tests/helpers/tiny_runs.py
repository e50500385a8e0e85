"""The smallest training runs, which the tests of training, checkpoints and evaluation share."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tiny import fill, recipe, shrunk

from vpm_jax import parallel, step
from vpm_jax.config import check, read, set_key, to_json
from vpm_jax.data import synthetic
from vpm_jax.description import Describer
from vpm_jax.runs.checkpoints import Checkpoints

# Stage 1 is 3 plain steps of 8 images, stage 2 is 2 epochs of 4 steps of 4 x 2: checkpoints after 3, 7 and 11,
# log records at 4, 8 and 11.
STEPS = 11
KEYS = {
    "data.synthetic.train_identities": 8,
    "data.synthetic.test_identities": 4,
    "data.synthetic.cameras": 2,
    "pretrained": "none",
    "data.height": 32,
    "data.width": 16,
    "model.depth": 10,
    "model.width": 4,
    "model.stem": "3x3",
    "model.strides": (1, 2, 2),
    "model.grid": (2, 1),
    "model.head_dim": 8,
    "model.head_dropout": 0.5,
    "stage1.epochs": 1,
    "stage1.steps_per_epoch": 3,
    "stage1.sampling": "plain",
    "stage1.identities": 4,
    "stage1.images_per_identity": 2,
    "stage2.epochs": 2,
    "stage2.steps_per_epoch": 4,
    "stage2.identities": 4,
    "stage2.images_per_identity": 2,
    "stage2.schedule": "step",
    "stage2.decay_epochs": (1,),
    "stage2.warmup_epochs": 0.0,
    "stage2.triplet_start": 1.0,
    "eval.batch": 16,
    "eval.gammas": (0.5, 1.0),
    "eval.every": 1,
    "log_every": 4,
    "checkpoint_seconds": 0.0,
}


def tiny_run(root: Path, **changes) -> ConfigDict:
    """A config on the few synthetic pedestrians under `root`; changes are keys with __ for the dots."""
    config = recipe("synthetic", data__root=str(root))
    for key, value in (KEYS | {key.replace("__", "."): value for key, value in changes.items()}).items():
        set_key(config, key, value)
    check(config)
    return config


def rendered(root: Path) -> Path:
    """The folder of the pedestrians that `tiny_run(root)` trains on; other runs may have rendered theirs beside it."""
    return synthetic.ensure(root, **tiny_run(root).data.synthetic)


def saved_state(workdir: Path, number: int | None = None):
    """(state as NumPy arrays, meta) of a checkpoint, by default the newest."""
    config = read(workdir)
    assert config is not None
    with Checkpoints(workdir, keep=0) as checkpoints:
        return checkpoints.read(checkpoints.latest if number is None else number, step.state_shapes(config))


def load_run(workdir: Path, **changes) -> tuple[Describer, dict]:
    """(describer, variables) of a run's newest checkpoint; changes to its config are keys with __ for the dots."""
    config, (state, _) = read(workdir), saved_state(workdir)
    for key, value in changes.items():
        set_key(config, key.replace("__", "."), value)
    return Describer(config, parallel.data_mesh(config.eval.batch)), step.evaluated(state)


def saved_steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def records(workdir: Path, name: str = "metrics.jsonl") -> list[dict]:
    """The lines of a run's log, without what differs from one run to the next."""
    lines = [json.loads(line) for line in (workdir / name).read_text().splitlines()]
    other = ("images_per_second", "input_wait", "eta", "memory_gib")
    return [{k: v for k, v in line.items() if k not in other} for line in lines]


def assert_same_run(one: Path, two: Path, but_best: int | None = None) -> None:
    """The checkpoints, the metrics and the evaluations of two runs agree bit for bit.

    `but_best`: a checkpoint that was saved in the middle of an evaluation knows the best of those before.
    """
    assert saved_steps(one) == saved_steps(two)
    for number in saved_steps(one):
        (state, meta), (other, other_meta) = saved_state(one, number), saved_state(two, number)
        leaves, tree = jax.tree_util.tree_flatten_with_path(state)
        other_leaves, other_tree = jax.tree_util.tree_flatten(other)
        assert tree == other_tree
        for (path, leaf), other_leaf in zip(leaves, other_leaves, strict=True):
            np.testing.assert_array_equal(leaf, other_leaf, err_msg=jax.tree_util.keystr(path), strict=True)
        if number == but_best:
            meta["best"] = other_meta["best"]
        assert meta.pop("seconds") > 0 < other_meta.pop("seconds")
        assert meta == other_meta
    assert records(one) == records(two)
    assert records(one, "evaluations.jsonl") == records(two, "evaluations.jsonl")


def make_run(folder: Path, file: str = "market", **changes):
    """A workdir of a shrunk recipe with random weights; its config, and the state."""
    settings = dict(stage1__steps_per_epoch=2, stage2__steps_per_epoch=2) | changes
    config = shrunk(file, **settings)
    return config, save_run(folder, config)


def save_run(folder: Path, config: ConfigDict) -> step.State:
    """A workdir with random weights, as training of a resolved config leaves it; the state."""
    state = fill(step.state_shapes(config))
    folder.mkdir()
    (folder / "config.json").write_text(to_json(config))
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(7, state, {"seconds": 1.0, "pending": [], "best": None})
    return state
