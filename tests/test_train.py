"""Training from a config to a table; a stopped or killed run, continued, is the run that was never stopped."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import PYTHON_PATH
from raising import raises
from tiny_runs import STEPS, assert_same_run, records, rendered, saved_state, saved_steps, tiny_run

from vpm_jax import config as config_lib
from vpm_jax import description, evaluation, parallel, training
from vpm_jax.config import flatten, set_key
from vpm_jax.data.sources import load_dataset
from vpm_jax.description import Describer
from vpm_jax.errors import UserError
from vpm_jax.progress import Status
from vpm_jax.runs import workdir as workdir_lib
from vpm_jax.schedule import ends_epochs, stage_of
from vpm_jax.step import make_feature_step

pytestmark = pytest.mark.usefixtures("undrawn")


def at_step(monkeypatch, number: int, act) -> None:
    """Calls act() while step `number` is under way."""
    add = training.Window.add

    def and_act(self, steps, metrics):
        add(self, steps, metrics)
        if steps == number:
            act()

    monkeypatch.setattr(training.Window, "add", and_act)


def test_a_run_leaves_what_its_reader_needs(whole):
    names = {path.name for path in whole.iterdir()}
    assert names == {
        *("config.json", "data.json", "checkpoints", "metrics.jsonl", "evaluations.jsonl", "training.png"),
        *("evaluation.json", "evaluation.md", "gamma.png"),
    }
    assert saved_steps(whole) == [7, STEPS]  # the two newest
    assert [(r["step"], r["stage"], r["epoch"]) for r in records(whole)] == [(4, 2, 0.25), (8, 2, 1.25), (11, 2, 2.0)]
    for record in records(whole):
        values = np.hstack([np.ravel(v) for v in record.values()])
        assert np.isfinite(values).all()
        assert len(record["accuracy_identity"]) == 2  # one for each region
        assert {"loss", "accuracy_locator", "comparable", "grad_norm", "learning_rate"} <= set(record)
    first = json.loads((whole / "metrics.jsonl").read_text().splitlines()[0])
    assert first["images_per_second"] > 0
    assert first["eta"] > 0
    assert (whole / "training.png").read_bytes().startswith(b"\x89PNG")
    assert (whole / "gamma.png").read_bytes().startswith(b"\x89PNG")
    assert int(saved_state(whole)[0].step) == STEPS
    config = config_lib.read(whole)
    assert config.model.num_identities == 8
    assert config.stage2.steps_per_epoch == 4


def test_losses_of_weight_zero_are_not_printed(whole):
    before, after = records(whole)[0], records(whole)[-1]
    assert (before["weight_triplet"], after["weight_triplet"]) == (0, 1) and before["loss_triplet"] > 0
    rates = {"images_per_second": 1.0, "input_wait": 0.0, "memory_gib": 0.0, "eta": 1.0}
    assert "triplet" not in training.status_line(before | rates, STEPS)
    assert all(
        word in training.status_line(after | rates, STEPS) for word in ("region 0", "id ", "triplet ", "locator")
    )
    line = training.status_line(after | rates | {"weight_region": 0.0}, STEPS)
    assert "region" not in line and "locator" not in line


def test_the_best_evaluation_is_remembered(whole):
    found = records(whole, "evaluations.jsonl")
    assert [r["step"] for r in found] == [3, 7, 11]
    for r in found:
        assert r["mAP"] == pytest.approx(np.mean([g["mAP"] for g in r["gammas"].values()]))
        assert r["rank1"] == pytest.approx(np.mean([g["rank1"] for g in r["gammas"].values()]))
    best = max(found, key=lambda r: r["mAP"])
    assert saved_state(whole)[1]["best"] == {k: best[k] for k in ("step", "rank1", "mAP")}
    report = json.loads((whole / "evaluation.json").read_text())
    for gamma, last in found[-1]["gammas"].items():
        assert report["gammas"][gamma]["mAP"] == last["mAP"]
        assert report["gammas"][gamma]["cmc"][0] == last["rank1"]


def test_stopped_in_an_epoch_and_continued_is_the_run_never_stopped(whole, pedestrians, tmp_path, monkeypatch, capfd):
    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        at_step(
            patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM)
        )  # neither a log record's step nor an epoch's end
        assert training.train(tiny_run(pedestrians), tmp_path / "run") == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before
    out, err = capfd.readouterr()
    assert "Stopping after this step" in err
    assert f"Stopped after step 5 of {STEPS}" in out
    assert "run the same command to continue" in out
    assert saved_steps(tmp_path / "run")[-1] == 5
    assert not (tmp_path / "run" / "evaluation.json").exists()

    assert training.train(tiny_run(pedestrians), tmp_path / "run") == 0
    assert "after step 5 of" in capfd.readouterr().out
    assert_same_run(tmp_path / "run", whole)


def test_evaluations_compile_once(pedestrians, tmp_path, monkeypatch):
    """Three during training and the report at its end trace one feature step, once."""
    traced = []

    def counted(config, region_maps):
        features = make_feature_step(config, region_maps)
        return lambda *arguments: traced.append(1) or features(*arguments)

    monkeypatch.setattr(description, "make_feature_step", counted)
    assert training.train(tiny_run(pedestrians), tmp_path / "run") == 0
    assert len(records(tmp_path / "run", "evaluations.jsonl")) == 3
    assert len(traced) == 1


def test_stopped_twice_in_an_evaluation_and_continued_is_the_run_never_stopped(
    whole, pedestrians, tmp_path, monkeypatch
):
    """The evaluation is due again as training goes on: without a step in between, or it would be lost."""
    shown = []

    def stop_at_the_first_batch(self, text, final):
        if text.startswith("features"):  # a record may arrive late
            shown.append(text)
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        at_step(patch, 7, lambda: patch.setattr(Status, "show", stop_at_the_first_batch))
        for times in (1, 2):
            assert training.train(tiny_run(pedestrians), tmp_path / "run") == 128 + signal.SIGTERM
            assert len(shown) == times  # of the batches of an evaluation
            assert saved_steps(tmp_path / "run")[-1] == 7
            assert [r["step"] for r in records(tmp_path / "run", "evaluations.jsonl")] == [3]
    assert training.train(tiny_run(pedestrians), tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", whole, but_best=7)


def test_padded_pictures_and_stages_of_other_sizes_continue_exactly(pedestrians, tmp_path, monkeypatch, stem_alone):
    """The short recipe in small: stopped on the small images, continued on the large ones."""
    changes = stem_alone | {
        "data__fit": "pad",
        "data__place": "random",
        "optim__schedule": "cosine",
        "stage1__height": 24,
        "stage1__width": 8,
        "eval__every": 0,
        "checkpoint_seconds": 3600.0,
    }
    pause, finished = training.Window.pause, []
    with monkeypatch.context() as patch:
        patch.setattr(training.Window, "pause", lambda w, seconds: finished.append(len(w.pending)) or pause(w, seconds))
        assert training.train(tiny_run(pedestrians, **changes), tmp_path / "whole") == 0
    assert finished == [0, 3]  # steps whose end was waited for before compiling: none run in time that does not count
    assert config_lib.read(tmp_path / "whole").data.aspect == 2.0  # of the synthetic training images
    with monkeypatch.context() as patch:
        at_step(patch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert training.train(tiny_run(pedestrians, **changes), tmp_path / "run") == 128 + signal.SIGTERM
    assert training.train(tiny_run(pedestrians, **changes), tmp_path / "run") == 0
    one, two = (saved_state(tmp_path / name)[0] for name in ("whole", "run"))
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    results = [json.loads((tmp_path / name / "evaluation.json").read_text())["gammas"] for name in ("whole", "run")]
    assert results[0] == results[1]
    with pytest.raises(UserError, match=r"stage2\.epochs: 2 -> 3"):  # the cosine would be another
        training.train(tiny_run(pedestrians, **changes, stage2__epochs=3), tmp_path / "run")


def test_checkpoints_are_seconds_apart(pedestrians, tmp_path, monkeypatch, capsys):
    """A step takes an hour more by this clock; epochs end after 3, 7 and 11."""
    add, clock, hours = training.Window.add, training.time.monotonic, [0]

    def and_wait(self, steps, metrics):
        add(self, steps, metrics)
        hours[0] += 1

    monkeypatch.setattr(training.time, "monotonic", lambda: clock() + 3600 * hours[0])
    monkeypatch.setattr(training.Window, "add", and_wait)
    config = tiny_run(pedestrians, checkpoint_seconds=5 * 3600.0, eval__every=0, keep_checkpoints=9)
    assert training.train(config, tmp_path / "run") == 0
    assert saved_steps(tmp_path / "run") == [7, STEPS]
    assert re.search(r"\ncompiling the training step \.\.\.\ncompiled in \d+:\d\d\nstep 4/11 ", capsys.readouterr().out)


def test_past_a_damaged_checkpoint_the_last_step_is_saved_again(whole, pedestrians, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    (workdir / "checkpoints" / str(STEPS) / "meta" / "metadata").write_text("{")
    assert training.train(tiny_run(pedestrians, checkpoint_every=100), workdir) == 0  # the end alone asks for one
    assert saved_steps(workdir) == [7, STEPS]
    assert_same_run(workdir, whole)


def test_killed_and_continued_is_the_run_never_stopped(whole, pedestrians, tmp_path):
    program = f"""
import os, signal, time
from pathlib import Path
from tiny_runs import tiny_run
from vpm_jax import training
add = training.Window.add
def and_die(self, steps, metrics):
    add(self, steps, metrics)
    if steps == 9:
        while not Path("run/checkpoints/7").exists(): time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)
training.Window.add = and_die
training.train(tiny_run({str(pedestrians)!r}), Path("run"))
"""
    variables = os.environ | {"PYTHONPATH": PYTHON_PATH}
    process = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300
    )
    assert process.returncode == -signal.SIGKILL, process.stderr
    workdir = tmp_path / "run"
    assert saved_steps(workdir)[-1] == 7
    assert records(workdir)[-1]["step"] in (4, 8)  # the second after the checkpoint: to be written again
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "loss": 1.')  # a line that the kill cut short
    shutil.copytree(workdir / "checkpoints" / "7", workdir / "checkpoints" / "9.orbax-checkpoint-tmp")

    assert training.train(tiny_run(pedestrians), workdir) == 0
    assert_same_run(workdir, whole)
    assert saved_steps(workdir) == [7, STEPS]
    assert not list((workdir / "checkpoints").glob("*tmp*"))


def test_a_finished_run_is_only_evaluated_again(whole, pedestrians, tmp_path):
    """On data that moved; runs made before data.json existed get one."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    for name in ("evaluation.json", "data.json"):
        (workdir / name).unlink()
    moved = shutil.copytree(rendered(pedestrians), tmp_path / "deep" / "moved")
    assert training.train(tiny_run(moved), workdir) == 0
    assert_same_run(workdir, whole)
    assert workdir_lib.read_data(workdir) == workdir_lib.read_data(whole)
    again, first = (json.loads((w / "evaluation.json").read_text()) for w in (workdir, whole))
    assert again["gammas"] == first["gammas"]


def test_a_run_finds_its_data_from_any_folder_and_after_both_have_moved(whole, pedestrians, tmp_path, monkeypatch):
    monkeypatch.delenv("VPM_DATA", raising=False)
    here, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copytree(whole, here / "runs" / "a")
    people = rendered(pedestrians)
    shutil.copytree(people, here / "data" / "people" / people.name)
    monkeypatch.chdir(here)
    assert training.train(tiny_run(Path("data/people")), Path("runs/a")) == 0
    assert config_lib.read(Path("runs/a")).data.root == str(here / "data" / "people")

    def root_of(workdir: Path, *overrides: str) -> str:
        monkeypatch.chdir(elsewhere)
        return workdir_lib.read_run(workdir, overrides)[1].data.root

    assert root_of(here / "runs" / "a") == str(here / "data" / "people")
    moved = here.rename(tmp_path / "moved")
    assert root_of(moved / "runs" / "a") == str(moved / "data" / "people")
    assert training.train(tiny_run(here, data__root=""), moved / "runs" / "a") == 0  # no root is given
    assert config_lib.read(moved / "runs" / "a").data.root == str(moved / "data" / "people")
    assert not list(elsewhere.iterdir())  # nothing was rendered again
    assert root_of(moved / "runs" / "a", "--config.data.root=mine") == "mine"
    (moved / "data").rename(tmp_path / "lost")
    assert root_of(moved / "runs" / "a") == ""  # $VPM_DATA or ./data, as it was given


def test_a_run_of_a_version_with_other_keys_resumes(whole, pedestrians, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    saved = json.loads((workdir / "config.json").read_text())
    saved["model"]["name"], saved["tensorboard"] = "vpm", True
    (workdir / "config.json").write_text(json.dumps(saved))
    assert config_lib.read(workdir).tracker == "tensorboard"
    assert training.train(tiny_run(pedestrians), workdir) == 0
    assert (workdir / "config.json").read_text() == (whole / "config.json").read_text()


def test_more_epochs_of_the_last_stage_and_other_allowed_keys(whole, pedestrians, tmp_path):
    longer = {"stage2__epochs": 3}
    straight, grown = tmp_path / "straight", shutil.copytree(whole, tmp_path / "grown")
    assert training.train(tiny_run(pedestrians, **longer), straight) == 0
    allowed = {"data__threads": 1, "keep_checkpoints": 3, "recipe": "longer", "checkpoint_every": 2}
    assert training.train(tiny_run(pedestrians, **longer, **allowed), grown) == 0
    one, two = saved_state(straight)[0], saved_state(grown)[0]
    assert int(two.step) == STEPS + 4
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert records(grown)[-1]["step"] == STEPS + 4
    assert config_lib.read(grown).stage2.epochs == 3


def refused(config, workdir: Path, sentence: str, **arguments) -> None:
    """Training raises a UserError of one line with the sentence, and leaves every file as it was."""
    files = {path: path.stat().st_mtime_ns for path in workdir.rglob("*")} if workdir.exists() else None
    with pytest.raises(UserError, match=sentence) as error:
        training.train(config, workdir, **arguments)
    assert "\n" not in str(error.value)
    assert files == ({path: path.stat().st_mtime_ns for path in workdir.rglob("*")} if workdir.exists() else None)


def test_resume_never_refuses_a_workdir_that_holds_a_run(whole, pedestrians):
    refused(tiny_run(pedestrians), whole, "already has a run .--resume=never", resume=False)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("seed", 1, r"another config \(seed: 0 -> 1\)"),
        ("stage2__learning_rate", 0.2, r"\(stage2\.learning_rate: 0\.1 -> 0\.2\)"),
        ("stage2__epochs", 1, r"\(stage2\.epochs: 2 -> 1\)"),
        ("data__synthetic__train_identities", 9, r"data\.synthetic\.train_identities: 8 -> 9"),
    ],
)
def test_another_config_is_refused_with_the_keys_name(whole, pedestrians, key, value, sentence):
    refused(tiny_run(pedestrians, **{key: value}), whole, sentence)


def other_people(source: Path, root: Path) -> Path:
    """A copy with two training images fewer, one more, and one of another identity; the pixels do not matter."""
    shutil.copytree(source, root)
    first, second, third, *_ = sorted((root / "bounding_box_train").iterdir())
    shutil.copy(first, first.with_name("0001_c1s1_999999_01.jpg"))
    first.unlink(), second.unlink()
    third.rename(third.with_name(f"0002{third.name[4:]}"))
    return root


@pytest.mark.parametrize("steps", [7, STEPS])
def test_other_training_data_are_refused_with_counts(whole, pedestrians, tmp_path, steps):
    workdir = shutil.copytree(whole, tmp_path / "run")
    if steps < STEPS:
        shutil.rmtree(workdir / "checkpoints" / str(STEPS))
    others = other_people(rendered(pedestrians), tmp_path / "others")
    sentence = "on other training data .images: 2 added, 3 removed.: restore its data, or choose another --workdir"
    refused(tiny_run(others), workdir, sentence)
    repainted = shutil.copytree(rendered(pedestrians), tmp_path / "repainted")
    for path in (repainted / "bounding_box_train").iterdir():
        path.write_bytes(path.read_bytes() + b" ")
    refused(tiny_run(repainted), workdir, "the same names with other images")
    # A key that selects other data is named instead.
    refused(tiny_run(others, data__holdout_identities=2), workdir, r"data\.holdout_identities: 0 -> 2")
    (workdir / "data.json").write_text("{}")
    refused(tiny_run(pedestrians), workdir, r"data\.json is damaged .*: restore it, or delete it")


def test_what_may_change_passes(whole, pedestrians):
    saved = config_lib.read(whole)
    for key in config_lib.RESUMABLE:
        now = config_lib.read(whole)
        value = config_lib.flatten(now)[key]
        set_key(now, key, (not value) if isinstance(value, bool) else value * 2)
        assert flatten(workdir_lib.continue_run(saved, now, whole)) == flatten(now)


def test_checkpoints_that_lost_their_config_are_refused(whole, pedestrians, tmp_path):
    shutil.copytree(whole / "checkpoints", tmp_path / "run" / "checkpoints")
    refused(tiny_run(pedestrians), tmp_path / "run", r"but no config\.json")


def test_a_workdir_in_use_is_refused(whole, pedestrians, tmp_path, monkeypatch):
    monkeypatch.setattr(workdir_lib.WorkdirLock, "BEAT", 1e6)  # its file stays as it is
    workdir = shutil.copytree(whole, tmp_path / "run")
    with workdir_lib.WorkdirLock(workdir):
        refused(tiny_run(pedestrians), workdir, "in use by another training")
    assert training.train(tiny_run(pedestrians), workdir) == 0


def test_what_failed_before_its_first_checkpoint_starts_anew(whole, pedestrians, tmp_path):
    for name in ("config.json", "metrics.jsonl", "evaluations.jsonl"):
        shutil.copy(whole / name, tmp_path)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text(config_lib.to_json(tiny_run(pedestrians, seed=7)))
    assert training.train(tiny_run(pedestrians), tmp_path, resume=False) == 0
    assert_same_run(tmp_path, whole)


def test_nothing_moves_to_the_devices_unasked(pedestrians, tmp_path, monkeypatch, stem_alone):
    placement = parallel.placement
    monkeypatch.setattr(parallel, "placement", lambda *args: placement(*args)._replace(put_batch=lambda batch: batch))
    with pytest.raises(RuntimeError, match="Disallowed host-to-device transfer"):
        training.train(tiny_run(pedestrians, **stem_alone), tmp_path / "run")


def test_a_workdir_that_is_a_file_is_refused(pedestrians, tmp_path):
    (tmp_path / "run").write_text("mine")
    with raises("bad-output"):
        training.train(tiny_run(pedestrians), tmp_path / "run")
    assert (tmp_path / "run").read_text() == "mine"


def test_what_cannot_be_evaluated_is_refused_before_training(whole, pedestrians, tmp_path):
    strangers = shutil.copytree(rendered(pedestrians), tmp_path / "data")
    for number, path in enumerate(sorted((strangers / "query").iterdir())):
        path.rename(path.with_name(f"{9000 + number}_{path.name.partition('_')[2]}"))
    config = tiny_run(strangers)
    refused(config, tmp_path / "run", "cannot be evaluated .*none of the 8 queries has a match")
    refused(tiny_run(pedestrians, eval__batch=15), tmp_path / "run", "15 images does not divide over 2 devices")


def test_the_batch_is_that_of_the_stage_that_is_trained(pedestrians, tmp_path):
    config = tiny_run(pedestrians, stage1__identities=3, stage1__images_per_identity=1, stage2__epochs=0)
    with raises("indivisible-batch"):
        training.train(config, tmp_path)


def test_a_grid_finer_than_the_feature_map_is_refused(pedestrians, tmp_path):
    sentence = r"model\.grid is \(5, 1\) but the feature map of stage1 has 4 x 2 cells"
    refused(tiny_run(pedestrians, model__grid=(5, 1)), tmp_path / "run", sentence)


def test_a_loss_that_is_not_finite_stops_and_the_last_good_checkpoint_stays(pedestrians, tmp_path):
    config = tiny_run(pedestrians, stage2__learning_rate=1e30, eval__every=0, log_every=3)
    sentence = r"after step \d+ is not finite|of step \d+ is .* with gradient norm"
    with pytest.raises(UserError, match=rf"({sentence}).*: the checkpoint of step 3 is kept.*lower learning_rate\.$"):
        training.train(config, tmp_path / "run")
    assert saved_steps(tmp_path / "run") == [3]
    state, _ = saved_state(tmp_path / "run")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    assert [r["step"] for r in records(tmp_path / "run")] == [3]
    assert not (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.slow  # another program to compile, twice
def test_averaged_weights_are_evaluated_and_resumed(pedestrians, tmp_path, monkeypatch):
    config = tiny_run(pedestrians, optim__ema=0.7)
    assert training.train(config, tmp_path / "straight") == 0
    with monkeypatch.context() as patch:
        at_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert training.train(config, tmp_path / "run") == 128 + signal.SIGTERM
    assert training.train(config, tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", tmp_path / "straight")
    state, _ = saved_state(tmp_path / "run")
    config, mesh = config_lib.read(tmp_path / "run"), parallel.data_mesh(config.eval.batch)
    results = evaluation.evaluate(Describer(config, mesh), state.ema, load_dataset(config.data))
    report = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert [g["mAP"] for g in report["gammas"].values()] == [r["mAP"] for r in results.values()]


def test_the_wait_for_input_is_told(whole, monkeypatch):
    """A loader that takes 3 s for a batch, of which the step takes 1 s; the first steps compile and do not count."""
    now = [100.0]
    monkeypatch.setattr(training.time, "monotonic", lambda: now[0])

    def batches():
        for _ in range(4):
            now[0] += 3
            yield {}

    config = config_lib.read(whole)
    window = training.Window(config, [], STEPS)
    window.pause(5)  # the evaluation that was due before
    for number, _ in enumerate(window.waits(batches()), 1):
        now[0] += 1
        window.add(number, dict.fromkeys(("loss", "grad_norm", "learning_rate"), jnp.ones([])))
    window.close()
    (record,) = window.records(wait=True)
    told = ("loss_region", "loss_identity", "loss_triplet", "accuracy_locator", "comparable")
    assert record["input_wait"] == 0.75
    assert record["images_per_second"] == pytest.approx(8 / 4)
    assert "(input 75%)" in training.status_line(
        record | dict.fromkeys(told, 0.0) | {"accuracy_identity": [0.0]}, STEPS
    )


@pytest.mark.slow  # a worker process imports everything
def test_a_worker_process_changes_nothing(whole, pedestrians, tmp_path):
    assert training.train(tiny_run(pedestrians, data__workers=1), tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", whole)


def test_the_first_signal_requests_a_stop():
    before = signal.getsignal(signal.SIGINT)
    with training.Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.received == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_is_answered_while_a_library_computes():
    program = """
import hashlib
from vpm_jax.runs.interrupts import Interrupts
with Interrupts():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2_000_000_000)  # one call, as compiling is
"""
    environment = os.environ | {"PYTHONPATH": PYTHON_PATH}
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == "\n"
        assert "press Ctrl-C again to stop without saving" in process.stderr.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == "\nerror: Interrupted.\n"
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("steps", "expected"),
    [(0, (0, 1)), (1, (1, 1)), (3, (3, 1)), (4, (1, 2)), (7, (4, 2)), (11, (8, 2))],
)
def test_a_step_belongs_to_the_stage_that_ran_it(pedestrians, steps, expected):
    config = tiny_run(pedestrians)
    within, stage = stage_of(config, steps)
    assert (within, 1 if stage is config.stage1 else 2) == expected
    assert ends_epochs(config, steps, 1) == (steps in (0, 3, 7, 11))
    assert ends_epochs(config, steps, 2) == (steps in (0, 11))
