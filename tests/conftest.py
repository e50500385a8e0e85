"""What every test shares: two virtual CPU devices, the XLA:CPU workaround, checked array shapes, and the real data.

This file is imported before any test module, hence before JAX starts a backend and reads the environment.
"""

from __future__ import annotations

import os
from pathlib import Path

import jaxtyping
import pytest
from paths import REAL_DATA

from vpm_jax.parallel import prepare_backend


def _append_xla_flag(name: str, value: str) -> None:
    """Adds a flag to XLA_FLAGS, unless whoever started the tests already chose its value."""
    flags = os.environ.get("XLA_FLAGS", "")
    if not any(flag.partition("=")[0] == name for flag in flags.split()):
        os.environ["XLA_FLAGS"] = f"{flags} {name}={value}".strip()


# The same tests everywhere; JAX_PLATFORMS=cuda runs them on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # nothing in the home of whoever runs the tests
_append_xla_flag("--xla_force_host_platform_device_count", "2")
prepare_backend()
jaxtyping.install_import_hook(
    [f"vpm_jax.{name}" for name in ("regions", "losses", "models.vpm", "step", "matching", "metrics", "reranking")],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


@pytest.fixture
def unchecked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets wrong shapes reach the functions' own error messages."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="session")
def pedestrians(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root for data.name=synthetic: runs that ask for the same few pedestrians render them once."""
    return tmp_path_factory.mktemp("pedestrians")


@pytest.fixture(scope="session")
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `tiny_runs.quick_compiler` keeps programs, so that every run of the tiny config compiles them once."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def whole(pedestrians: Path, compile_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of a finished run of `tiny_runs.tiny_run`, which nothing interrupted. Never write into it."""
    from tiny_runs import quick_compiler, tiny_run

    from vpm_jax.training import train

    workdir = tmp_path_factory.mktemp("runs") / "whole"
    with quick_compiler(compile_cache):
        assert train(tiny_run(pedestrians), workdir) == 0
    return workdir


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every figure that a test saves, to look inside."""
    from matplotlib.figure import Figure

    saved, save = [], Figure.savefig

    def record(self, *arguments, **options):
        saved.append(self)
        return save(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved


@pytest.fixture(scope="session")
def market() -> Path:
    """The real Market-1501: its folder (or zip), in $VPM_DATA or ./data. Skips where it is absent."""
    root = REAL_DATA
    candidates = [root] if root.name.startswith("Market-1501") else sorted(root.glob("Market-1501*"))
    found = sorted((path for path in candidates if path.exists()), key=lambda path: not path.is_dir())
    if not found:
        pytest.skip(f"needs the real Market-1501; there is no Market-1501* in {root} ($VPM_DATA, else ./data)")
    return found[0]
