"""Which module may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import vpm_jax

PACKAGE = Path(vpm_jax.__file__).parent

# Modules and packages with imports inside functions, and why.
LAZY = {
    "vpm_jax.api": "jax.export needs flatbuffers; the Hub is optional",
    "vpm_jax.benchmark": "each section imports only what it measures",
    "vpm_jax.convert": "--help starts without JAX",
    "vpm_jax.data.sources": "TFDS takes a second to import",
    "vpm_jax.evaluate": "loader processes import the main module again",
    "vpm_jax.export": "jax.export needs flatbuffers",
    "vpm_jax.hub": "huggingface_hub is optional",
    "vpm_jax.onnx_export": "onnx is optional",
    "vpm_jax.parallel": "used before JAX starts",
    "vpm_jax.prepare": "TFDS takes a second to import",
    "vpm_jax.pretrained": "safetensors is read only on request; weights load without Orbax",
    "vpm_jax.report": "loader processes import the main module again",
    "vpm_jax.reproduce": "loader processes import the main module again",
    "vpm_jax.runs.logs": "trackers are optional",
    "vpm_jax.search": "the store is used without the command; Starlette is optional",
    "vpm_jax.threshold": "loader processes import the main module again",
    "vpm_jax.train": "loader processes import the main module again",
}
WITHOUT_JAX = ("data", "regions", "geometry", "schedule", "keys")
WITHOUT_DISK = ("models", "losses", "matching", "topk", "chunks", "reranking", "metrics")
COMMANDS = [
    f"vpm_jax.{name}"
    for name in [
        "train",
        "evaluate",
        "threshold",
        "report",
        "export",
        "convert",
        "prepare",
        "extents",
        "search.command",
        "reproduce.command",
        "benchmark",
    ]
]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """(imported module, whether the import is inside a function) for each import of a module."""

    def visit(node: ast.AST, inside: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            yield from ((alias.name, inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{module} has a relative import"
            names = (f"{node.module}.{alias.name}" for alias in node.names)
            yield from ((name if name in MODULES else node.module, inside) for name in names)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))

    return visit(MODULES[module], False)


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def rooms(names: tuple[str, ...]) -> list[str]:
    return [module for module in MODULES if any(is_in(module, f"vpm_jax.{name}") for name in names)]


def test_there_is_no_circle_of_imports():
    graph = {module: {name for name, _ in imports(module) if name in MODULES} for module in MODULES}
    TopologicalSorter(graph).prepare()  # raises CycleError with the circle


@pytest.mark.parametrize("module", rooms(WITHOUT_JAX))
def test_loading_data_needs_no_jax(module):
    reached, queue = {module}, [module]
    while queue:
        for name, inside in imports(queue.pop()):
            assert not is_in(name, "jax"), f"{module} reaches jax"
            if name in MODULES and not inside and name not in reached:
                reached.add(name)
                queue.append(name)


@pytest.mark.parametrize("module", rooms(WITHOUT_DISK))
def test_the_method_never_touches_the_disk(module):
    assert not {name.partition(".")[0] for name, _ in imports(module)} & {"os", "io", "pathlib", "shutil", "tempfile"}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_imports_a_command(module):
    if module.endswith("__main__") or module in ("vpm_jax.reproduce", "vpm_jax.search"):
        return  # they start the command
    others = [command for command in COMMANDS if not is_in(module, command)]
    commands = {name for name, _ in imports(module) if name in others}
    assert not commands


def test_imports_inside_functions_have_a_reason():
    lazy = {module for module in MODULES if any(inside for _, inside in imports(module))}
    assert not {module for module in lazy if not any(is_in(module, name) for name in LAZY)}
