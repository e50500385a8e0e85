"""`python -m vpm_jax` lists the commands; the version is the same everywhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import vpm_jax
from vpm_jax.__main__ import COMMANDS

PACKAGE = Path(vpm_jax.__file__).parent


def test_every_command_is_listed():
    modules = {path.stem for path in PACKAGE.glob("*.py") if "cli.run(main)" in path.read_text()}
    packages = {path.parent.name for path in PACKAGE.glob("*/__main__.py")}
    assert set(COMMANDS) == modules | packages


def test_it_prints_them_without_jax():
    program = "import runpy, sys; runpy.run_module('vpm_jax', run_name='__main__', alter_sys=True)"
    check = f"import atexit, sys; atexit.register(lambda: print('jax' in sys.modules)); {program}"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert done.stdout.endswith("False\n")


def test_the_version_is_the_same_everywhere():
    root = PACKAGE.parent
    assert f"\nversion: {vpm_jax.__version__}\n" in (root / "CITATION.cff").read_text()
    released = re.search(r"^## (\d\S+) - ", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released and released[1] == vpm_jax.__version__
