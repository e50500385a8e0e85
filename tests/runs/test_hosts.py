"""Several real processes, started by launch/local.sh, train and evaluate as one does, and end together.

The network is its stem, a convolution and a batch norm, and its heads: tests/test_step.py is about the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from partial_files import make
from paths import LOCAL, PYTHON_PATH
from tiny import NO_BLOCKS, STEM_ALONE
from tiny_runs import STEPS, records, saved_state, saved_steps, tiny_run

from vpm_jax import cli, parallel
from vpm_jax.errors import UserError
from vpm_jax.models.resnet import STAGE_BLOCKS
from vpm_jax.runs import hosts
from vpm_jax.training import train

CHANGES = STEM_ALONE | {"model__dtype": "float64", "eval__batch": 12}  # 8 queries and 17 gallery images fill no batch
DROP_BLOCKS = "from tiny import drop_blocks; drop_blocks()"
EVALUATE = ["-c", f"{DROP_BLOCKS}\nfrom vpm_jax import cli, evaluate\ncli.run(evaluate.main)"]


@pytest.fixture(scope="module", autouse=True)
def no_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STAGE_BLOCKS, 10, NO_BLOCKS)
        yield


@pytest.fixture(scope="module")
def environment():
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]  # one device each
    alone = {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1", "CUDA_VISIBLE_DEVICES": ""}
    return os.environ | alone | {"PYTHONPATH": PYTHON_PATH}


@pytest.fixture(scope="module")
def alone(pedestrians, tmp_path_factory, no_blocks) -> Path:
    """The workdir of one process in float64."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    with jax.enable_x64(True):
        assert train(tiny_run(pedestrians, **CHANGES), workdir) == 0
    return workdir


def start(count: int, environment: dict, *command: str) -> subprocess.Popen[str]:
    line = [str(LOCAL), str(count), sys.executable, *command]
    return subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(count: int, environment: dict, *command: str) -> subprocess.CompletedProcess[str]:
    process = start(count, environment, *command)
    out, err = process.communicate(timeout=1200)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


def training(pedestrians: Path, folder: Path, act: str = "", victim: int = -1, **changes) -> list[str]:
    """Arguments of python that train in folder/run; process `victim` runs the code `act` in step 5."""
    (folder / "config.py").write_text(
        "from tiny_runs import tiny_run\n"
        f"def get_config():\n    return tiny_run({str(pedestrians)!r}, **{CHANGES | changes!r})\n"
    )
    program = f"""
import os, signal, sys
{DROP_BLOCKS}
from vpm_jax import cli, train, training
add = training.Window.add
def and_act(self, steps, metrics):
    add(self, steps, metrics)
    if steps == 5 and sys.argv[sys.argv.index("--process") + 1] == "{victim}":
        {act or "pass"}
training.Window.add = and_act
cli.run(train.main)
"""
    return ["-c", program, "--config", str(folder / "config.py"), "--workdir", str(folder / "run"), "--timeout", "10"]


def assert_close_runs(one: Path, two: Path) -> None:
    """As `assert_same_run`, to rounding in float64."""
    assert saved_steps(one) == saved_steps(two)
    for number in saved_steps(one):
        with jax.enable_x64(True):
            states = [jax.tree.leaves(saved_state(workdir, number)[0]) for workdir in (one, two)]
        for mine, other in zip(*states, strict=True):
            assert mine.dtype == other.dtype and mine.dtype in (np.float64, np.int32)
            np.testing.assert_allclose(mine, other, rtol=1e-10, atol=1e-10)
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        for mine, other in zip(records(one, name), records(two, name), strict=True):
            assert mine.keys() == other.keys()
            for key in mine.keys() - {"gammas"}:
                np.testing.assert_allclose(mine[key], other[key], rtol=1e-10, atol=1e-12, err_msg=key)
            assert mine.get("gammas") == other.get("gammas")


def gammas(folder: Path) -> dict:
    return json.loads((folder / "evaluation.json").read_text())["gammas"]


@pytest.mark.parametrize("count", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_processes_train_and_evaluate_as_one(count, alone, pedestrians, tmp_path, environment):
    done = run(count, environment, *training(pedestrians, tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"trained {STEPS} steps") == 1  # process 0 speaks
    assert f"on {count} x cpu" in done.stdout
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in alone.iterdir()}
    assert_close_runs(tmp_path / "run", alone)
    assert gammas(tmp_path / "run") == gammas(alone)

    command = [*EVALUATE, "--workdir", str(alone), "--output", str(tmp_path / "again")]
    done = run(count, environment, *command, f"--config.data.root={pedestrians}")
    assert done.returncode == 0, done.stderr
    assert gammas(tmp_path / "again") == gammas(alone)


@pytest.mark.slow
def test_the_first_process_alone_writes(alone, tmp_path, environment):
    """Partial-REID by its own protocol; every process has an --output of its own."""
    make(tmp_path, "original", 5, 3)
    program = f"""
import sys
{DROP_BLOCKS}
from vpm_jax import cli, evaluate
at = sys.argv.index("--output") + 1
sys.argv[at] += "/" + sys.argv[-1]
cli.run(evaluate.main)
"""
    command = ["-c", program, "--workdir", str(alone), "--dataset", "partial_reid", "--config.eval.batch=4"]
    command += ["--root", str(tmp_path / "Partial-REID_Dataset"), "--output"]
    before = {path: path.stat().st_mtime_ns for path in alone.rglob("*")}
    found = {}
    for count in (1, 2):
        done = run(count, environment, *command, str(tmp_path / str(count)))
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("all-shot (15 x 15)") == 1
        assert [path.name for path in (tmp_path / str(count)).iterdir()] == ["0"]
        assert sorted(path.suffix for path in (tmp_path / str(count) / "0").iterdir()) == [".json", ".md"]
        found[count] = json.loads((tmp_path / str(count) / "0" / "evaluation-partial_reid.json").read_text())
    assert found[1]["hardware"] == "1 x cpu" and found[2]["hardware"] == "2 x cpu"
    assert found[2]["results"] == found[1]["results"]
    assert {path: path.stat().st_mtime_ns for path in alone.rglob("*")} == before


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_after_the_same_step(alone, pedestrians, tmp_path, environment):
    act = "os.kill(os.getpid(), signal.SIGTERM)"
    done = run(2, environment, *training(pedestrians, tmp_path, act, 1))
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    (last,) = [s for s in saved_steps(tmp_path / "run") if s >= 5]
    assert last <= 5 + hosts.Agreement.LAG
    assert f"Stopped after step {last} of {STEPS}" in done.stdout
    # One process goes on where two stopped, and two where one did.
    done = run(1, environment, *training(pedestrians, tmp_path))
    assert done.returncode == 0, done.stderr
    assert_close_runs(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_is_killed_the_others_say_so_and_end(victim, alone, pedestrians, tmp_path, environment):
    act = "os.kill(os.getpid(), signal.SIGKILL)"
    began = time.monotonic()
    done = run(2, environment, *training(pedestrians, tmp_path, act, victim))
    assert done.returncode != 0
    assert time.monotonic() - began < 300
    if victim == 1:
        assert "error: process 0 of 2" in done.stderr and "process 1 on" in done.stderr
        assert "for 10 s" in done.stderr
        assert "Traceback" not in done.stderr
    else:  # it holds what the others share; JAX may be the first to say so
        assert "process 0 has died" in done.stderr or "Terminating process" in done.stderr
    done = run(2, environment, *training(pedestrians, tmp_path))
    assert done.returncode == 0, done.stderr
    assert_close_runs(tmp_path / "run", alone)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_a_process_fails_the_others_say_why(victim, pedestrians, tmp_path, environment):
    act = "from vpm_jax.errors import UserError; raise UserError('the sky fell: look up.')"
    done = run(2, environment, *training(pedestrians, tmp_path, act, victim))
    assert done.returncode == 1
    assert sorted(done.stderr.splitlines())[-2:] == sorted(
        [
            "error: the sky fell: look up.",
            f"error: {me(1 - victim)} stops: {me(victim)} stopped: the sky fell: look up.",
        ]
    )


def me(process: int) -> str:
    return f"process {process} of 2 on {os.uname().nodename}"


@pytest.mark.slow
def test_other_data_or_another_config_is_refused(pedestrians, tmp_path, environment):
    arguments = training(pedestrians, tmp_path, log_every=3)
    command = f"""
import os, sys
if sys.argv[-1] == "1":
    sys.argv.append("--config.log_every=4")
exec({arguments[1]!r})
"""
    done = run(2, environment, "-c", command, *arguments[2:])
    assert done.returncode == 1
    assert "The config of process 1 of 2" in done.stderr


@pytest.mark.slow
def test_slurm_says_who_is_who(alone, pedestrians, tmp_path, environment):
    """--distributed, in an environment as srun makes it."""
    command = [sys.executable, *EVALUATE, "--workdir", str(alone), "--distributed"]
    command += ["--output", str(tmp_path), f"--config.data.root={pedestrians}"]
    slurm = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2"}
    processes = []
    for i in range(2):
        mine = slurm | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)}
        processes.append(subprocess.Popen(command, env=environment | mine, stderr=subprocess.PIPE, text=True))
    for process in processes:
        _, err = process.communicate(timeout=1200)
        assert process.returncode == 0, err
    assert gammas(tmp_path) == gammas(alone)
    assert json.loads((tmp_path / "evaluation.json").read_text())["hardware"] == "2 x cpu"


# ---- One process alone -----------------------------------------------------------------------------------


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    cli.add_hosts(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--processes", "2"], "--processes is not enough"),
        (["--coordinator", "a:1", "--processes", "2"], "--coordinator is not enough"),
        (["--coordinator", "a", "--processes", "2", "--process", "0"], "'a', expected HOST:PORT"),
        (["--coordinator", "a:1", "--processes", "2", "--process", "2"], "--process is 2 with --processes 2"),
        (["--distributed", "--process", "1"], "--distributed and --process exclude each other"),
        (["--distributed", "--timeout", "0"], "--timeout is 0, expected at least 5"),
    ],
)
def test_arguments_that_do_not_fit_together(arguments, sentence):
    with pytest.raises(UserError, match=sentence), hosts.joined(parse(*arguments)):
        pass


def test_one_process_alone_needs_nobody():
    with hosts.joined(parse()):
        assert not hosts.are_many() and hosts.is_first()
        assert hosts.from_first(lambda: {"a": 1}) == {"a": 1}
        assert hosts.in_turn(lambda: 5) == 5
        hosts.check_same("number", 7)
        agree = hosts.Agreement(parallel.data_mesh())
        assert [agree(0), agree(15), agree(0)] == [0, 15, 0]
