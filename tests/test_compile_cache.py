"""Programs compiled by one run are there for the next."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from vpm_jax import parallel

PROGRAM = """
import jax
from vpm_jax import parallel

parallel.prepare_backend()
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("cache_hits") else None)
print(jax.jit(lambda x: (x @ x.T).sum())(jax.numpy.ones((8, 8))), bool(hits))
"""


def start(**variables: str) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"} | variables
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(parallel.__file__).parents[1]), os.getenv("PYTHONPATH", "")])
    environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"  # JAX leaves out what compiles in a second
    process = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_the_second_run_finds_the_programs_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert start() == "512.0 False"
    assert parallel.compilation_cache().parent.parent == tmp_path and any(parallel.compilation_cache().iterdir())
    assert start() == "512.0 True"
    assert start(JAX_COMPILATION_CACHE_DIR="") == "512.0 False"  # the user's choice stays


def test_a_home_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").touch()
    assert start(XDG_CACHE_HOME=str(tmp_path / "file")) == "512.0 False"
