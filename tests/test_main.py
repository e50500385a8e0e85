"""`vpm` lists and runs the commands; the version is the same everywhere."""

from __future__ import annotations

import importlib
import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from paths import CONFIGS, ROOT

import vpm_jax
from vpm_jax.__main__ import COMMANDS, main
from vpm_jax.errors import UserError

PACKAGE = Path(vpm_jax.__file__).parent


def test_every_command_is_listed():
    modules = {path.stem for path in PACKAGE.glob("[!_]*.py") if "cli.run(main)" in path.read_text()}
    packages = {path.parent.name for path in PACKAGE.glob("*/__main__.py")}
    assert set(COMMANDS) == modules | packages


def test_it_prints_them_without_jax():
    program = "import runpy, sys; runpy.run_module('vpm_jax', run_name='__main__', alter_sys=True)"
    check = f"import atexit, sys; atexit.register(lambda: print('jax' in sys.modules)); {program}"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert done.returncode == 0, done.stderr
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    assert done.stdout.endswith("False\n")


def test_it_runs_them(capsys):
    assert main(["config", "seed"]) == 0
    assert "seed = 0" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{vpm_jax.__version__}\n"
    with pytest.raises(UserError, match=r"^There is no command 'trian': choose train\.$"):
        main(["trian"])
    for name in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0 and "usage: " in capsys.readouterr().out


def test_an_installation_has_the_command_and_the_recipes(monkeypatch):
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, _, function = settings["project"]["scripts"]["vpm"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))
    setuptools = pytest.importorskip("setuptools")
    given: dict = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    monkeypatch.chdir(ROOT)
    runpy.run_path("setup.py")
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("__init__.py")}
    assert {name.replace(".", "/") for name in given["packages"]} == {*map(str, folders), "vpm_jax/recipes"}
    assert given["package_dir"] == {"vpm_jax.recipes": CONFIGS.name}


def test_the_version_is_the_same_everywhere():
    root = PACKAGE.parent
    assert f"\nversion: {vpm_jax.__version__}\n" in (root / "CITATION.cff").read_text()
    released = re.search(r"^## (\d\S+) - ", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released and released[1] == vpm_jax.__version__
