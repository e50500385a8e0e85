"""Benchmarks of this machine, in sections: `python -m vpm_jax.benchmark SECTION`.

    python -m vpm_jax.benchmark all --json benchmark.json
    python -m vpm_jax.benchmark data --root FOLDER
    python -m vpm_jax.benchmark step --against torch --config configs/market.py

Each figure is reported with its limit, measured on the same machine in the same run, and with the project's target.
See SECTION --help for options; --json FILE writes the figures with hardware, versions and config.
"""

from __future__ import annotations

import argparse
import traceback
from importlib.util import find_spec

from ml_collections import ConfigDict

from vpm_jax import cli, parallel
from vpm_jax import config as config_lib
from vpm_jax.benchmark import (
    convolutions,
    data,
    distractors,
    elsewhere,
    evaluation,
    extraction,
    matching,
    metrics,
    search,
    serve,
    step,
    tracking,
)
from vpm_jax.benchmark.report import Report, text, to_json
from vpm_jax.disk import write_atomically
from vpm_jax.errors import UserError
from vpm_jax.machine import threads

# Each has HELP, add_arguments(parser) and run(args, config) -> Report. They import JAX only when they run: `data` also
# serves machines without an accelerator.
SECTIONS = {
    "data": data,
    "step": step,
    "convolutions": convolutions,
    "extraction": extraction,
    "matching": matching,
    "search": search,
    "metrics": metrics,
    "evaluation": evaluation,
    "distractors": distractors,
    "tracking": tracking,
    "elsewhere": elsewhere,
    "serve": serve,
}
NOT_IN_ALL = ("elsewhere", "serve")  # measures another machine; needs a gallery
NETWORKS = ("step", "convolutions", "extraction", "evaluation", "tracking")  # default to the small recipe on CPU


def parser() -> argparse.ArgumentParser:
    top = cli.Parser(prog="python -m vpm_jax.benchmark", description="Benchmarks of this machine.")
    commands = top.add_subparsers(dest="section", required=True, metavar="SECTION")
    for name, section in SECTIONS.items():
        command = commands.add_parser(name, help=section.HELP, description=section.__doc__)
        add_common(command)
        section.add_arguments(command)
    add_common(commands.add_parser("all", help="all sections, at default size", description=run_all.__doc__))
    return top


def add_common(command: argparse.ArgumentParser) -> None:
    cli.add_config(command)
    command.add_argument("--json", type=cli.path, metavar="FILE", help="also write the figures to FILE")
    command.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: measure CPU time, for a single thread on a busy machine (default: wall)",
    )


def main(argv: list[str] | None = None) -> int:
    args, overrides = parser().parse_known_args(argv)
    if args.clock == "cpu" and threads() > 1:
        raise UserError(
            f"--clock cpu would count the waiting of {threads()} threads: give this process one core, with "
            "`taskset -c 1 python -m vpm_jax.benchmark ...`, or leave out --clock."
        )
    if args.json:
        cli.check_output("--json", args.json)
    parallel.prepare_backend()
    if args.section == "all":
        report = run_all(args, overrides)
    else:
        report = SECTIONS[args.section].run(args, read_config(args, overrides))
    if args.clock == "cpu":
        report.lines.append("Times are CPU time.")
    print(text(report))
    if args.json:
        write_atomically(args.json, to_json(report))
    return 1 if report.failed else 0


def read_config(args: argparse.Namespace, overrides: list[str]) -> ConfigDict:
    """The config of --config; by default the paper's recipe, or the small one for networks on CPU."""
    if args.config:
        return cli.load_config(args.config, overrides)
    small = args.section in NETWORKS and not step.probe()
    config = config_lib.small() if small else config_lib.default()
    cli.override(config, overrides)
    config_lib.check(config)
    return config


def run_all(args: argparse.Namespace, overrides: list[str]) -> Report:
    """All sections but elsewhere and serve, at default size, on generated data, in one table: about five minutes on
    two CPU cores.

    Without --config, networks use the small recipe on CPU and the paper's on other platforms.
    """
    report = Report(rows=[])
    for name, section in SECTIONS.items():
        if name in NOT_IN_ALL:
            continue
        arguments = [name, f"--clock={args.clock}", *([f"--config={args.config}"] if args.config else [])]
        if name == "step" and find_spec("torch"):
            arguments.append("--against=torch")
            if not step.probe():  # on CPU, compiling takes longer than everything else
                arguments.append("--no-torch-compile")
        print(f"{name} ...", flush=True)
        section_args = parser().parse_args(arguments)
        try:
            result = section.run(section_args, read_config(section_args, overrides))
        except Exception as error:  # keep the results of the other sections
            if not isinstance(error, UserError):
                traceback.print_exc()
            result = Report(rows=[], lines=[f"failed: {str(error) or type(error).__name__}"])
            report.failed.append(name)
        report.rows += result.rows
        report.lines += [f"{name}: {line}" for line in result.lines]
        report.device = report.device or result.device
        report.config = result.config or report.config
    return report
