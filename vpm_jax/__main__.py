"""The command `vpm`, also python -m vpm_jax: lists the commands, or runs one."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence
from importlib import import_module

from vpm_jax import __version__, cli
from vpm_jax.errors import UserError

COMMANDS = {
    "train": "train a model or resume a run, then evaluate it",
    "evaluate": "evaluate a run again, also on another dataset",
    "threshold": "measure which distance means the same person, by gamma",
    "report": "write one HTML page about a run, or one ranked list as a figure",
    "search": "index a folder of images and rank it for a partial query",
    "reproduce": "train the models of the paper's tables and figures, and compare the numbers",
    "export": "write StableHLO that runs without this package, or safetensors for PyTorch",
    "convert": "convert weights between Keras, torchvision, timm, the authors' code and our runs",
    "prepare": "write a dataset as ArrayRecord files",
    "extents": "estimate how much of a person each image shows, and matching training crops",
    "benchmark": "time each stage beside the machine's limits",
    "config": "list every config key with its default and meaning",
}


def main(argv: Sequence[str] | None = None) -> int:
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name == "--version":
        print(__version__)
        return 0
    if name in ("--help", "-h"):
        print(f"vpm_jax {__version__}. Commands (vpm NAME --help, or python -m vpm_jax.NAME --help):\n")
        for command, purpose in COMMANDS.items():
            print(f"  {command:10} {purpose}")
        print(f"\nRecipes (vpm train --config NAME): {', '.join(cli.recipes())}")
        return 0
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        raise UserError(
            f"There is no command {name!r}: choose {close[0] if close else 'one of ' + ', '.join(COMMANDS)}."
        )
    module = import_module("vpm_jax.config.__main__" if name == "config" else f"vpm_jax.{name}")
    return module.main(rest)


def command() -> None:
    """The entry point of `vpm`."""
    cli.run(main)


if __name__ == "__main__":
    command()
