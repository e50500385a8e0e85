"""Checkpoints: bit for bit what was saved, whole or not there, and one sentence for what is wrong with them."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from disk import flip, largest_file
from raising import raises
from tiny import fill, shrunk

from vpm_jax.errors import UserError
from vpm_jax.runs.checkpoints import Checkpoints
from vpm_jax.step import state_shapes


def tree(seed: int = 0, width: int = 7):
    """A state with every kind of array that training saves."""
    random = np.random.default_rng(seed)
    return {
        "step": jnp.int32(seed),
        "params": {
            "kernel": jnp.asarray(random.normal(size=(3, 3, width, 5)), jnp.float32),
            "half": jnp.asarray(random.normal(size=width), jnp.bfloat16),
        },
        "opt_state": [(jnp.asarray(random.normal(size=width), jnp.float32), jnp.int32(9))],
    }


def assert_equal(one, two):
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b), strict=True), one, two)


def test_what_was_saved_comes_back(tmp_path):
    meta = {"seconds": 1.1, "pending": [{"loss": 0.1, "accuracy": [1 / 3]}], "best": None}
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest is None
        checkpoints.save(3, tree(3), meta)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 3
        state, again = checkpoints.restore(tree(0))
    assert_equal(state, tree(3))
    assert again == meta


def test_averaged_weights_come_back_and_a_state_without_them_is_as_before(tmp_path):
    config = shrunk("market")
    config.stage1.steps_per_epoch = config.stage2.steps_per_epoch = 2
    for decay in (0.0, 0.9):
        config.optim.ema = decay
        state, folder = fill(state_shapes(config), seed=1), tmp_path / str(decay)
        folder.mkdir()
        with Checkpoints(folder) as checkpoints:
            checkpoints.save(1, state, {})
        with Checkpoints(folder, keep=0) as checkpoints:
            found, _ = checkpoints.restore(fill(state_shapes(config)))
        assert type(found) is type(state)
        assert_equal(found, state)
        metadata = json.loads((folder / "checkpoints" / "1" / "state" / "_METADATA").read_text())
        groups = {leaf["key_metadata"][0]["key"] for leaf in metadata["tree_metadata"].values()}
        assert groups == {"step", "params", "batch_stats", "opt_state"} | ({"ema"} if decay else set())


def test_a_state_is_saved_as_it_was_though_the_next_steps_reuse_its_memory(tmp_path):
    @partial(jax.jit, donate_argnums=0)
    def following(state):
        return jax.tree.map(lambda x: x + 1, state)

    big = {"params": {str(i): jnp.full((512, 512), i, jnp.float32) for i in range(8)}}
    with Checkpoints(tmp_path) as checkpoints:
        for step in range(1, 4):
            expected = jax.tree.map(lambda x: np.array(x, copy=True), big)
            checkpoints.save(step, big, {})
            for _ in range(20):
                big = following(big)
            checkpoints.wait()
            assert_equal(checkpoints.read(step, big)[0], expected)


def test_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (1, 2, 3, 4):
            checkpoints.save(step, tree(step), {"step": step})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.read(3, tree())[1] == {"step": 3}
        assert checkpoints.restore(tree())[1] == {"step": 4}
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]


def test_what_a_kill_left_half_written_is_no_checkpoint_and_goes(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree(1), {})
    half = tmp_path / "checkpoints" / "2.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / "checkpoints" / "1", half)
    with Checkpoints(tmp_path, keep=0) as checkpoints:
        assert checkpoints.latest == 1
    assert half.exists()  # a reader, perhaps beside a run that is writing it, touches nothing
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest == 1
    assert not half.exists()


def test_a_reader_makes_no_folder(tmp_path):
    with Checkpoints(tmp_path, keep=0) as checkpoints, pytest.raises(UserError, match="There is no checkpoint in"):
        checkpoints.restore(tree())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("keep", [0, 2])
def test_another_model_is_refused_with_an_array_that_differs(tmp_path, keep):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree(width=7), {})
    with Checkpoints(tmp_path, keep) as checkpoints:
        sentence = r"another model \(2 arrays differ: params/half is \(7,\) there and \(8,\) here\)"
        with pytest.raises(UserError, match=sentence):
            checkpoints.restore(tree(width=8))
        with pytest.raises(UserError, match=r"params/more is absent there and \(2,\) here"):
            checkpoints.restore(tree() | {"params": tree()["params"] | {"more": jnp.ones(2)}})


def two(folder: Path) -> None:
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(1, tree(1), {"step": 1})
        checkpoints.save(2, tree(2), {"step": 2})


def damage(file: Path, kind: str) -> None:
    data = file.read_bytes()
    if kind == "gone":
        file.unlink()
    elif kind == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        flip(file)


@pytest.mark.parametrize("kind", ["cut", "gone", "flipped"])
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path, kind, capsys):
    two(tmp_path)
    folder = tmp_path / "checkpoints"
    largest = max((folder / "2" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    damage(largest, kind)
    # A reader leaves everything as it is, and does not take an older state for the newest.
    with Checkpoints(tmp_path, keep=0) as checkpoints:
        sentence = r"checkpoints/2 cannot be read \(.*\): it is damaged\. Run .* again, which continues from step 1\.$"
        with pytest.raises(UserError, match=sentence) as error:
            checkpoints.restore(tree())
        assert "\n" not in str(error.value)
    assert (folder / "2").exists()
    capsys.readouterr()
    with Checkpoints(tmp_path) as checkpoints:
        state, meta = checkpoints.restore(tree())
        assert_equal(state, tree(1))
        assert meta == {"step": 1} and checkpoints.latest == 1
        assert "checkpoints/2 cannot be read" in (said := capsys.readouterr().err)
        assert "Continuing from step 1." in said
        checkpoints.save(2, tree(2), {"step": 2})
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(tree())[0], tree(2))
    assert capsys.readouterr().err == ""
    assert {path.name for path in folder.iterdir()} == {"1", "2", "2.damaged"}


def test_when_no_checkpoint_is_whole_nothing_is_touched(tmp_path):
    two(tmp_path)
    for step in (1, 2):
        (tmp_path / "checkpoints" / str(step) / "meta" / "metadata").write_text("{")
    sentence = r"checkpoints/2 cannot be read .* damaged\. No other checkpoint is intact: restore a copy"
    for keep in (0, 2):
        with Checkpoints(tmp_path, keep) as checkpoints, pytest.raises(UserError, match=sentence):
            checkpoints.restore(tree())
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "2"}


@pytest.mark.parametrize("fraction", [1 / 80, pytest.param(1, marks=pytest.mark.slow)])
def test_whatever_bytes_change_no_other_values_come_back(tmp_path, fraction):
    """Any file of the newest cut, removed, or with a bit flipped: its own values or a refusal, never others."""
    two(tmp_path)
    folder = tmp_path / "checkpoints"
    random, refused, same = np.random.default_rng(0), 0, 0
    for file in sorted(path for path in (folder / "2").rglob("*") if path.is_file()):
        data = file.read_bytes()
        flips = random.choice(8 * len(data), max(1, round(fraction * len(data))), replace=False)
        for change in ("gone", "cut", *flips.tolist()):
            if change == "gone":
                file.unlink()
            elif change == "cut":
                file.write_bytes(data[: random.integers(len(data))])
            else:
                changed = bytearray(data)
                changed[change // 8] ^= 1 << change % 8
                file.write_bytes(changed)
            with Checkpoints(tmp_path, keep=0) as checkpoints:
                try:
                    state, meta = checkpoints.restore(tree())
                except UserError as error:
                    assert "which continues from step 1" in str(error)
                    refused += 1
                else:
                    assert meta == {"step": 2}
                    assert_equal(state, tree(2))
                    same += 1
            file.write_bytes(data)
    assert refused > 10 and same > 0  # some bytes, such as times, mean nothing


def test_a_checkpoint_from_before_there_were_checksums(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    meta = {"seconds": 1.0, "pending": [], "best": None}
    with ocp.CheckpointManager(folder) as manager:
        items = {"state": ocp.args.StandardSave(tree(3)), "meta": ocp.args.JsonSave(meta)}
        manager.save(3, args=ocp.args.Composite(**items))
    with Checkpoints(tmp_path) as checkpoints:
        state, found = checkpoints.restore(tree())
    assert_equal(state, tree(3))
    assert found == meta


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_state_that_is_not_finite_is_never_saved(tmp_path, value):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree(1), {})
        with pytest.raises(FloatingPointError, match="after step 2 is not finite"):
            checkpoints.save(2, tree(2) | {"params": {"kernel": jnp.array([1.0, value])}}, {})
        assert checkpoints.latest == 1


def large() -> dict:
    return {"params": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=200_000), jnp.float32)}}


def unwritable(folder: Path, step: int, sentence: str) -> None:
    with largest_file(100_000), Checkpoints(folder) as checkpoints:
        with pytest.raises(UserError, match=sentence) as error:
            checkpoints.save(step, large(), {})
            checkpoints.wait()
        assert "\n" not in str(error.value)
    assert not list((folder / "checkpoints").glob("*tmp*"))


def test_a_checkpoint_that_finds_no_room_leaves_the_one_before_whole(tmp_path, capfd):
    unwritable(tmp_path, 1, r"size limit .*\(there is no earlier checkpoint\)\.$")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, tree(1), {})
    unwritable(tmp_path, 2, r"size limit .*\(the checkpoint of step 1 is intact\)\.$")
    with Checkpoints(tmp_path) as checkpoints:
        assert_equal(checkpoints.restore(tree())[0], tree(1))
    assert capfd.readouterr().err == ""


def test_a_failed_write_is_not_lost_when_nobody_waits_for_it(tmp_path):
    with raises("not-written"), largest_file(100_000), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, large(), {})


def test_an_error_on_the_way_is_not_hidden_by_a_failed_write(tmp_path):
    with pytest.raises(ZeroDivisionError), largest_file(100_000), Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, large(), {})
        raise ZeroDivisionError
