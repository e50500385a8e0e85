"""What is set before JAX starts: the cache of compiled programs, and the flag against wrong reductions on CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

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


def test_jitted_reductions_are_right():
    """The example of jax#39103, of which jaxlib 0.10.2 returns another number without the flag."""
    rows = jnp.zeros((32_769, 3)).at[:, 0].set(jnp.arange(32_769.0))
    squares = jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2))
    assert jax.jit(squares)(rows)[-1] == 32_768.0**2


@pytest.mark.parametrize("version, known", [("0.10.2", True), ("0.11.2", True), ("0.12.0.1", True), ("0.13.0", False)])
def test_the_flag_is_set_for_versions_that_accept_it(version, known, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    monkeypatch.setattr(parallel.importlib.metadata, "version", lambda name: version)
    parallel.prepare_backend()
    flags = os.environ["XLA_FLAGS"].split()
    assert flags[0].endswith("device_count=2") and (parallel._CPU_REDUCTION_FLAG in flags) == known
