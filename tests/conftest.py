"""What every test shares: two virtual CPU devices, compiled programs, tiny runs, checked array shapes, real data.

This file is imported before any test module, hence before JAX starts a backend and reads the environment.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
from paths import FUSION_EMITTERS, REAL_DATA
from session import made_once

from vpm_jax.machine import threads
from vpm_jax.parallel import prepare_backend


def _append_xla_flag(name: str, value: str) -> None:
    """Adds a flag to XLA_FLAGS, unless whoever started the tests already chose its value."""
    flags = os.environ.get("XLA_FLAGS", "")
    if not any(flag.partition("=")[0] == name for flag in flags.split()):
        os.environ["XLA_FLAGS"] = f"{flags} {name}={value}".strip()


# The same tests everywhere; JAX_PLATFORMS=cuda runs them on a GPU.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # nothing in the home of whoever runs the tests
# What matters is that programs compute the right thing: they compile in a sixth of the time without optimizations
# (tiny.optimized is for the others).
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "True")
if FUSION_EMITTERS:  # an unknown flag would end the process
    _append_xla_flag(f"--{FUSION_EMITTERS}", "false")
_append_xla_flag("--xla_force_host_platform_device_count", "2")
if "PYTEST_XDIST_WORKER" in os.environ:  # every core has a worker
    for variable in ("NPROC", "OMP_NUM_THREADS"):  # of XLA, of PyTorch
        os.environ.setdefault(variable, "1")
prepare_backend()
gc.set_threshold(100_000, 20, 100)  # a collection reads every object of JAX's: they took a twentieth of the time
jaxtyping.install_import_hook(
    [f"vpm_jax.{name}" for name in ("regions", "losses", "models.vpm", "step", "matching", "metrics", "reranking")],
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


@pytest.fixture
def unchecked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets wrong shapes reach the functions' own error messages."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def float64() -> Iterator[None]:
    import jax

    with jax.enable_x64(True):
        yield


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """For -n auto: a worker for each core, each of up to 2 GB of memory; a GPU has room for one process."""
    return min(threads(), 8) if os.environ["JAX_PLATFORMS"] == "cpu" and threads() > 1 else 0


# Files that take long go first, the longest before all, so that no worker is left with one of them at the end.
LONG = ("train", "step", "parity", "losses", "short_lease", "hosts", "export", "reproduce", "models", "onnx_export")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of this session, the same for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def pedestrians(shared: Path) -> Path:
    """A data root for data.name=synthetic: runs that ask for the same few pedestrians render them once."""
    return shared / "pedestrians"


@pytest.fixture(scope="session", autouse=True)
def _compile_cache(shared: Path) -> None:
    """Every program is compiled once, for all files, workers and processes of the session."""
    import jax

    settings = {
        "jax_compilation_cache_dir": str(shared / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    for key, value in settings.items():
        jax.config.update(key, value)
        os.environ[key.upper()] = str(value)


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """The programs of a file stay on disk alone: in memory those of all would take gigabytes."""
    import jax

    from vpm_jax import description, parallel, step

    yield
    jax.clear_caches()
    for programs in (parallel._compiled_step, step._compiled_init, description._compiled_step):
        programs.cache_clear()


@pytest.fixture(scope="session")
def whole(pedestrians: Path, shared: Path) -> Path:
    """The workdir of a finished run of `tiny_runs.tiny_run`, which nothing interrupted. Never write into it."""
    from tiny_runs import tiny_run

    from vpm_jax.training import train

    def make(workdir: Path) -> None:
        assert train(tiny_run(pedestrians), workdir) == 0

    return made_once(shared / "whole", make)


@pytest.fixture
def stem_alone(monkeypatch: pytest.MonkeyPatch) -> dict:
    """Leaves the stem alone of every ResNet-10; the changes to a config that fit."""
    from tiny import NO_BLOCKS, STEM_ALONE

    from vpm_jax.models.resnet import STAGE_BLOCKS

    monkeypatch.setitem(STAGE_BLOCKS, 10, NO_BLOCKS)
    return STEM_ALONE


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every picture of matplotlib is one pixel: drawing them takes half the time of a tiny run."""
    from matplotlib.figure import Figure
    from PIL import Image

    pixel = Image.new("L", (1, 1))
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **options: pixel.save(path, "PNG"))


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
