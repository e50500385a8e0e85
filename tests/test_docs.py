"""The documentation is true: marked examples run, commands, options, keys, names and links exist."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import runpy
import shlex
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from paths import ROOT
from PIL import Image

from vpm_jax.config import default, flatten

PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "vpm_jax/README.md",
]
LINKING = sorted({*PAGES, *(ROOT / "launch").rglob("*.md"), *(ROOT / "docs").rglob("*.md")})
BLOCK = re.compile(r"^```(\w+)( test)?\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def title(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str, marked: bool = False) -> list[str]:
    return [text for kind, test, text in BLOCK.findall(page.read_text()) if kind == language and (test or not marked)]


def commands(text: str) -> list[list[str]]:
    """[module, argument, ...] of each line `python -m vpm_jax.MODULE ...`."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith("python -m vpm_jax.")]
    return [shlex.split(line, comments=True)[2:] for line in lines]


@cache
def usage(module: str, *subcommand: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as end:
        importlib.import_module(module).main([*subcommand, "--help"])
    assert end.value.code == 0
    return out.getvalue()


def test_the_pages_are_there():
    assert {page.stem for page in PAGES} >= {"data", "paper", "recipes", "scaling", "search"}


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_commands_have_their_options_and_keys(page):
    keys = flatten(default())
    for module, *arguments in (c for text in blocks(page, "bash") for c in commands(text)):
        known = usage(module)
        if re.search(rf"[{{|\s]{re.escape(arguments[0])}\b", known) and arguments[0].isalpha():
            with contextlib.suppress(AssertionError):  # a subcommand's options, or a plain argument
                known = usage(module, arguments[0])
        for argument in arguments:
            if argument.startswith("--config."):
                assert argument.removeprefix("--config.").partition("=")[0] in keys, argument
            elif argument.startswith("--"):
                assert re.search(rf"{re.escape(argument)}\b", known), f"{module} has no {argument}"
            elif argument.startswith("configs/"):
                get_config = runpy.run_path(str(ROOT / argument.partition(":")[0]))["get_config"]
                get_config(*filter(None, [argument.partition(":")[2]]))
    for key in re.findall(r"--config\.([\w.]+)=", page.read_text()):
        assert key in (*keys, "KEY"), key


@pytest.mark.parametrize("page", LINKING, ids=title)
def test_links_lead_somewhere(page):
    for file, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        if file.startswith("https://"):
            continue
        target = page.parent / file if file else page
        assert target.exists(), file
        if anchor:  # as GitHub makes them of headings
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            known = {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}
            assert anchor in known


@pytest.mark.parametrize("page", PAGES, ids=title)
def test_files_and_names_exist(page):
    text = page.read_text()
    for file in re.findall(r"`((?:vpm_jax|configs|launch)/[\w/.]+\.\w+)", text):
        assert (ROOT / file).exists(), file
    modules = "|".join(path.stem for path in (ROOT / "vpm_jax").iterdir() if not path.stem.startswith("_"))
    for name in re.findall(rf"`((?:{modules})\.[\w.]+)`", text):
        key = name.removeprefix("config.")
        if any(key == k or k.startswith(f"{key}.") for k in flatten(default())):
            continue
        if re.search(r"\.(py|jsonl?|jpg|md|png|html)$|^model\.(fingerprint|stablehlo)|^model\.stablehlo\.json", name):
            continue  # a file, or an object of an example
        parts = name.split(".")
        for n in range(len(parts), 0, -1):  # a module, then attributes of it
            try:
                found = importlib.import_module(".".join(["vpm_jax", *parts[:n]]))
            except ModuleNotFoundError:
                continue
            for attribute in parts[n:]:
                found = getattr(found, attribute)
            break
        else:
            pytest.fail(f"there is no {name}")


def test_the_map_of_the_code_is_complete():
    package = ROOT / "vpm_jax"
    named = set(re.findall(r"`(?:\w+/)*(\w+(?:\.py|/))`", (package / "README.md").read_text()))
    modules = {path.name for path in package.glob("[!_]*.py")}
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert named >= modules | rooms, "missing from vpm_jax/README.md"
    for name in named:
        assert any(package.rglob(name.rstrip("/"))), name


def test_tables_of_results_are_current():
    tables = runpy.run_path(str(ROOT / "docs" / "results" / "tables.py"))
    for page in tables["PAGES"]:
        assert tables["rewrite"](page.read_text()) == page.read_text(), "run python docs/results/tables.py"


# Examples leave it to Python to close their files.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("page", PAGES, ids=title)
def test_marked_examples_run(page, whole, tmp_path, monkeypatch):
    """In order, on a tiny trained model and four made-up pictures, the last of which is the query."""
    marked = [(kind, text) for kind, test, text in BLOCK.findall(page.read_text()) if test]
    if not marked:
        pytest.skip("no examples to run")
    if "export" in page.read_text():
        pytest.importorskip("flatbuffers", reason="jax.export writes with it")
    if "import onnxruntime" in page.read_text():
        pytest.importorskip("onnx", reason="the extra onnx")
        pytest.importorskip("onnxruntime", reason="the extra onnx")
    shutil.copytree(whole, tmp_path / "runs" / "synthetic")
    (tmp_path / "pictures").mkdir()
    random = np.random.default_rng(0)
    for name in "abcd":
        image = Image.fromarray(random.integers(0, 256, (50, 30, 3), np.uint8))
        image.save(tmp_path / "pictures" / f"{name}.jpg")
    image.save(tmp_path / "partial.jpg")  # near enough to be found by any threshold
    monkeypatch.chdir(tmp_path)
    for kind, text in marked:
        if "import torch" in text and not find_spec("torch"):
            continue
        if kind == "python":
            exec(compile(text, str(page), "exec"), {"__name__": "example"})
            continue
        lines = commands(text)
        assert len(lines) == len(text.strip().splitlines()), "an example to run is python -m vpm_jax... alone"
        for module, *arguments in lines:
            assert not importlib.import_module(module).main(arguments)
