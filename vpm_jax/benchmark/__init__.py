"""Measures the parts of the project on this machine: `python -m vpm_jax.benchmark PART`.

    python -m vpm_jax.benchmark data --root FOLDER
    python -m vpm_jax.benchmark step --against torch --config configs/market.py

Each figure stands beside its limit, measured on the same machine in the same run, and beside the project's aim.
PART --help lists what a part takes; --json FILE keeps the figures with hardware, versions and configuration.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from vpm_jax import cli
from vpm_jax import config as config_lib
from vpm_jax.benchmark import data, step
from vpm_jax.benchmark.report import Report, text, to_json
from vpm_jax.benchmark.timing import Rate, measure
from vpm_jax.logs import write_atomically

__all__ = ["Rate", "main", "measure"]

# Each has HELP, add_arguments(parser) and run(args, config) -> Report. They import what they need when they run:
# `data` is for machines and processes without an accelerator.
PARTS = {"data": data, "step": step}


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m vpm_jax.benchmark", description="Measures parts of the project.")
    parts = top.add_subparsers(dest="part", required=True, metavar="PART")
    for name, part in PARTS.items():
        one = parts.add_parser(name, help=part.HELP, description=part.__doc__)
        one.set_defaults(run=part.run)
        cli.add_config(one)
        one.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
        part.add_arguments(one)
    return top


def main(argv: list[str] | None = None) -> None:
    args, overrides = parser().parse_known_args(argv)
    if args.config:
        config = cli.load_config(args.config, overrides)
    else:
        config = config_lib.default()
        cli.override(config, overrides)
        config_lib.check(config)
    report: Report = args.run(args, config)
    print(text(report))
    if args.json:
        write_atomically(args.json, to_json(report))
