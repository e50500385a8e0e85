"""Measures the parts of the project on this machine: `python -m vpm_jax.benchmark PART`.

    python -m vpm_jax.benchmark all --json benchmark.json
    python -m vpm_jax.benchmark data --root FOLDER
    python -m vpm_jax.benchmark step --against torch --config configs/market.py

Each figure stands beside its limit, measured on the same machine in the same run, and beside the project's aim.
PART --help lists what a part takes; --json FILE keeps the figures with hardware, versions and configuration.
"""

from __future__ import annotations

import argparse
import traceback
from importlib.util import find_spec
from pathlib import Path

from ml_collections import ConfigDict

from vpm_jax import cli
from vpm_jax import config as config_lib
from vpm_jax.benchmark import convolutions, data, elsewhere, evaluation, extraction, matching, metrics, search, step
from vpm_jax.benchmark.report import Report, text, to_json
from vpm_jax.benchmark.timing import Rate, measure
from vpm_jax.errors import UserError
from vpm_jax.parallel import threads
from vpm_jax.runs.logs import write_atomically

__all__ = ["Rate", "main", "measure"]

# Each has HELP, add_arguments(parser) and run(args, config) -> Report. They import what they need when they run:
# `data` is for machines and processes without an accelerator.
PARTS = {
    "data": data,
    "step": step,
    "convolutions": convolutions,
    "extraction": extraction,
    "matching": matching,
    "search": search,
    "metrics": metrics,
    "evaluation": evaluation,
    "elsewhere": elsewhere,
}
NETWORKS = ("step", "convolutions", "extraction", "evaluation")  # without --config: of the small recipe on CPU


def parser() -> argparse.ArgumentParser:
    top = cli.Parser(prog="python -m vpm_jax.benchmark", description="Measures parts of the project.")
    parts = top.add_subparsers(dest="part", required=True, metavar="PART")
    for name, part in PARTS.items():
        one = parts.add_parser(name, help=part.HELP, description=part.__doc__)
        add_common(one)
        part.add_arguments(one)
    every = parts.add_parser("all", help="every part at its default size, in one table", description=run_all.__doc__)
    add_common(every)
    return top


def add_common(one: argparse.ArgumentParser) -> None:
    cli.add_config(one)
    one.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    one.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: seconds of CPU time, for one thread of a machine that is busy with other things (default: wall)",
    )


def main(argv: list[str] | None = None) -> int:
    args, overrides = parser().parse_known_args(argv)
    if args.clock == "cpu" and threads() > 1:
        raise UserError(
            f"--clock cpu with {threads()} threads would count those that only wait: give this process one core, by "
            "`taskset -c 1 python -m vpm_jax.benchmark ...`, or leave it out."
        )
    if args.json:
        cli.check_output("--json", args.json)
    if args.part == "all":
        report = run_all(args, overrides)
    else:
        report = PARTS[args.part].run(args, read_config(args, overrides))
    if args.clock == "cpu":
        report.lines.append("Seconds are of CPU time.")
    print(text(report))
    if args.json:
        write_atomically(args.json, to_json(report))
    return 1 if report.failed else 0


def read_config(args: argparse.Namespace, overrides: list[str]) -> ConfigDict:
    """--config, or the paper's recipe; for networks on a CPU the small one."""
    if args.config:
        return cli.load_config(args.config, overrides)
    small = args.part in NETWORKS and step.probe()["platform"] == "cpu"
    config = config_lib.small() if small else config_lib.default()
    cli.override(config, overrides)
    config_lib.check(config)
    return config


def run_all(args: argparse.Namespace, overrides: list[str]) -> Report:
    """Every part at its default size, on generated data, in one table: about five minutes on two CPU cores.

    Without --config, networks are the small recipe's on CPU and the paper's elsewhere.
    """
    report = Report(rows=[])
    for name, part in PARTS.items():
        if name == "elsewhere":  # measures nothing of this machine
            continue
        arguments = [name, f"--clock={args.clock}", *([f"--config={args.config}"] if args.config else [])]
        if name == "step" and find_spec("torch"):
            arguments.append("--against=torch")
            if step.probe()["platform"] == "cpu":  # compiling there takes longer than all the rest
                arguments.append("--no-torch-compile")
        print(f"{name} ...", flush=True)
        one = parser().parse_args(arguments)
        try:
            found = part.run(one, read_config(one, overrides))
        except Exception as error:  # what the other parts measured is kept
            if not isinstance(error, UserError):
                traceback.print_exc()
            found = Report(rows=[], lines=[f"failed: {str(error) or type(error).__name__}"])
            report.failed.append(name)
        report.rows += found.rows
        report.lines += [f"{name}: {line}" for line in found.lines]
        report.device = report.device or found.device
        report.config = found.config or report.config
    return report
