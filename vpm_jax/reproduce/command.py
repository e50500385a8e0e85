"""Reproduces the paper's tables and figures: python -m vpm_jax.reproduce --table 1 3 --scale small --seeds 2

Trains and evaluates the missing runs, and writes a report of our numbers beside the paper's, with mean and standard
deviation over seeds. Every finished run leaves a JSON file in --results and is not repeated. Processes and machines
that share this folder divide the runs. --plan shows the missing runs and their cost; --report reports the finished runs
and trains nothing.

--parts tries the ingredients of a recipe that a config file lists, one at a time, on held-out training identities, and
reports the gain of each: python -m vpm_jax.reproduce --parts configs/market_plus.py --seeds 3
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
from ml_collections import ConfigDict

from vpm_jax import cli, evaluation, parallel, training
from vpm_jax import config as config_lib
from vpm_jax.data.inventory import Inventory, digest_of_test_set
from vpm_jax.data.sources import load_dataset
from vpm_jax.disk import make_folder
from vpm_jax.errors import UserError, first_line
from vpm_jax.keys import LISTED
from vpm_jax.reproduce import estimate, experiments, results
from vpm_jax.reproduce.experiments import EXHIBITS, METHODS, SCALES, Method, Run
from vpm_jax.reproduce.report import write_report
from vpm_jax.runs.checkpoints import Checkpoints
from vpm_jax.runs.workdir import read_data
from vpm_jax.schedule import schedule


def main(argv: Sequence[str] | None = None) -> int:
    args, overrides = parser().parse_known_args(argv)
    scale, dataset, exhibits, methods = choose(args)
    parallel.prepare_backend()
    arguments = dataset, scale, args.seeds, args.models, args.variant, overrides
    if args.parts:
        cells = experiments.plan_ingredients(methods, *arguments)
        exhibits = [f"the ingredients of {args.parts}"]
    else:
        cells = experiments.plan(exhibits, *arguments)
    if not cells:
        raise UserError(f"--models {' '.join(args.models)}: {' and '.join(exhibits)} need none of these.")
    runs = experiments.distinct(cells.values())
    done = {run.name: result for run in runs if (result := results.read(args.results, run))}
    missing = [run for run in runs if run.name not in done]
    unfinished = without_data(missing, training=not (args.plan or args.report))  # {run name: reason}
    missing = [run for run in missing if run.name not in unfinished]

    if not (args.plan or args.report):
        check_data([run for run in runs if run.name in done], done, args.results)

    # ---- Plan --------------------------------------------------------------------------------------------
    count = f"{len(runs)} run{'s' * (len(runs) > 1)}"
    print(f"{count} for {', '.join(exhibits)} on {dataset}, scale {scale}: {len(done)} already finished")
    if args.plan and missing and dataset != "synthetic":  # synthetic pedestrians would be rendered
        try:
            without_data(missing[:1], training=True)
        except UserError as error:
            print(f"They cannot start yet: {error}")
    if missing and not args.report:
        print(estimate.describe(missing, args.results, args.workdirs))
    for reason in dict.fromkeys(unfinished.values()):
        print(f"{sum(r == reason for r in unfinished.values())} of them {reason.removeprefix('is ')}")
    if args.plan:
        return 0
    if args.report:
        unfinished |= {run.name: "has not finished" for run in missing}
        missing = []
        if not done:
            raise UserError(f"None of these runs has finished in {args.results}: leave out --report to train.")

    # ---- Runs --------------------------------------------------------------------------------------------
    name = experiments.family(dataset, scale) + f"-{args.variant}" * bool(args.variant) + "-parts" * bool(args.parts)
    output = args.output or Path("docs/results") / name
    for folder in (args.results, args.workdirs, output):  # fail now rather than after hours of training
        make_folder(folder)
    exit_code, skipped = 0, set(unfinished)
    for number, run in enumerate(missing, 1):
        print(f"\n[{number}/{len(missing)}] {run.name}", flush=True)
        exit_code, reason = perform(run, args.results, args.workdirs)
        if reason:
            unfinished[run.name] = reason
            print(f"{run.name} {reason}", file=sys.stderr, flush=True)
        if exit_code:
            break
    for run in runs:  # ours, and those that other processes have finished
        if run.name not in done and (result := results.read(args.results, run)):
            done[run.name] = result
            unfinished.pop(run.name, None)

    # ---- Report ------------------------------------------------------------------------------------------
    if done:
        write_report(output, exhibits, cells, done, unfinished, command_line(argv), args.workdirs)
        print(f"\nreport of {len(done)} of {count}: {output / 'report.md'}")
    if exit_code:
        print("Stopped: run the same command to continue.")
        return exit_code
    if set(unfinished) - skipped or not done:
        reasons = "; ".join(f"{name} {reason.rstrip('.')}" for name, reason in unfinished.items())
        raise UserError(
            f"{len(unfinished)} of {count} have no result ({reasons}): run the same command again for them."
        )
    return 0


def parser() -> argparse.ArgumentParser:
    top = cli.Parser(
        prog="python -m vpm_jax.reproduce",
        description=__doc__,
        epilog=f"--config.KEY=VALUE sets any key for all runs: {LISTED}.",
    )
    for kind in ("table", "figure"):
        numbers = [e.split()[1] for e in EXHIBITS if e.startswith(kind)]
        top.add_argument(
            f"--{kind}", nargs="+", action="extend", choices=numbers, default=[], help=f"the paper's {kind}s"
        )
    top.add_argument(
        "--parts", type=cli.path, metavar="FILE", help="a recipe or config file whose SCREEN lists ingredients"
    )
    top.add_argument("--dataset", choices=("market1501", "dukemtmc", "synthetic"), help="default: the scale's")
    top.add_argument(
        "--scale",
        choices=[s for s in SCALES if s != "released"],
        help="paper: the full recipe; small: an hour per run on two CPU cores; screen: ten minutes per run, for "
        "choosing on held-out training identities; fast: configs/market_fast.py, four hours per run; fast_screen: an "
        "hour of it, for choosing; synthetic: the synthetic pedestrians (default: small, or synthetic with --dataset "
        "synthetic, or screen with --parts)",
    )
    top.add_argument("--recipe", choices=("paper", "released"), default="paper", help="of --scale paper")
    top.add_argument("--seeds", type=cli.positive, default=1, metavar="N", help="seeds 0 to N - 1 (default: 1)")
    top.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        default=[],
        help=f"only these: {', '.join(METHODS)}; or names in the file of --parts",
    )
    top.add_argument("--variant", default="", metavar="NAME", help="a name for the --config overrides")
    only = top.add_mutually_exclusive_group()
    only.add_argument("--plan", action="store_true", help="only show the missing runs and their cost")
    only.add_argument("--report", action="store_true", help="only report the finished runs")
    top.add_argument(
        "--results", type=cli.path, default=Path("docs/results/runs"), help="results of runs (default: %(default)s)"
    )
    top.add_argument(
        "--workdirs", type=cli.path, default=Path("runs/reproduce"), help="workdirs of runs (default: %(default)s)"
    )
    top.add_argument(
        "--output", type=cli.path, help="folder of the report (default: docs/results/DATASET-SCALE[-parts])"
    )
    return top


def choose(args: argparse.Namespace) -> tuple[str, str, list[str], Mapping[str, Method]]:
    """(scale, dataset, exhibits, methods to choose from) of the arguments.

    Raises:
      UserError: if they contradict each other.
    """
    small = "screen" if args.parts else "small"
    scale = args.scale or ("synthetic" if args.dataset == "synthetic" else small)
    dataset = args.dataset or ("synthetic" if scale == "synthetic" else "market1501")
    if scale == "synthetic" and dataset != "synthetic":
        raise UserError(
            f"--scale synthetic trains on the synthetic pedestrians, not on {dataset}: choose another scale."
        )
    if args.recipe == "released":
        if scale != "paper":
            raise UserError(f"--recipe released belongs to --scale paper, not to {scale}.")
        scale = "released"
    exhibits = [f"table {n}" for n in dict.fromkeys(args.table)] + [f"figure {n}" for n in dict.fromkeys(args.figure)]
    if args.parts and exhibits:
        raise UserError("--parts writes a report of its own: leave out --table and --figure.")
    if not (exhibits or args.parts):
        raise UserError("Nothing to do: name a --table (1 to 3) or a --figure (4 or 5), or --parts FILE.")
    methods = experiments.ingredients(cli.find_config(str(args.parts), "--parts")[0]) if args.parts else METHODS
    if unknown := [model for model in args.models if model not in methods]:
        raise UserError(f"--models {unknown[0]}: expected some of {', '.join(methods)}.")
    if args.variant and not experiments.is_name(args.variant):
        raise UserError(f"--variant {args.variant}: expected letters, digits, dots and underscores, for a file's name.")
    return scale, dataset, exhibits, methods


def without_data(missing: Sequence[Run], training: bool = True) -> dict[str, str]:
    """{run name: reason} of the runs whose partial dataset is missing; the others go ahead.

    `training` also loads the training set, which renders synthetic pedestrians.

    Raises:
      UserError: if the training set is missing.
    """
    if missing and training:
        load_dataset(missing[0].config.data)  # shared by all runs
    reasons = {}
    for test in dict.fromkeys(run.test for run in missing if run.test):
        try:
            root_of(test, missing[0].config.data)
        except UserError as error:
            reasons[test] = f"is left out: {error}"
    return {run.name: reasons[run.test] for run in missing if run.test in reasons}


def root_of(test: str, config_data: ConfigDict) -> str:
    """The data.root of a partial dataset: the run's, or "" for $VPM_DATA and ./data.

    Raises:
      UserError: if it is in neither.
    """
    data = config_data.copy_and_resolve_references()
    data.name = test
    if data.root:
        with contextlib.suppress(UserError):
            load_dataset(data)
            return data.root
    data.root = ""
    load_dataset(data)
    return ""


def check_data(finished: Sequence[Run], results: Mapping[str, Any], folder: Path) -> None:
    """Compares the data of finished runs with the data at hand, where both are known.

    Raises:
      UserError: naming the result of a run on other data.
    """
    at_hand: dict[str, dict[str, str]] = {}
    for run in finished:
        recorded = results[run.name].get("data", {})
        if not any(recorded.values()):
            continue
        data = run.config.data.copy_and_resolve_references()
        key = f"{run.test} {data.to_json_best_effort()}"
        if key not in at_hand:
            at_hand[key] = {}
            with contextlib.suppress(UserError):  # without the data there is nothing to compare
                if run.test:
                    data.name, data.root, data.holdout_identities = run.test, root_of(run.test, data), 0
                dataset = load_dataset(data)
                at_hand[key]["test"] = digest_of_test_set(dataset.query, dataset.gallery)
                at_hand[key]["train"] = Inventory.of(dataset.train).digest
        for split, digest in at_hand[key].items():
            if recorded.get(split) not in (None, digest):
                raise UserError(
                    f"{folder / run.name}.json is the result of a run on other data than those at hand (the {split} "
                    "set differs): restore its data, choose another --results folder, or delete the file to run again."
                )


# ---- One run ---------------------------------------------------------------------------------------------


def perform(run: Run, folder: Path, workdirs: Path) -> tuple[int, str]:
    """Trains or evaluates a run, unless another process has claimed it, and writes its result.

    Returns:
      (exit code if the user stopped it, else 0; why there is no result, "" if there is one).
    """
    with results.claim(folder, run) as claimed:
        if not claimed:
            print(f"left to {results.owner(folder, run) or 'another process'}")
            return 0, "is claimed by another process"
        try:
            if results.read(folder, run) is not None:  # another process has just finished it
                return 0, ""
            if run.of is not None:
                evaluate(run, folder, workdirs)
            elif code := train(run, workdirs):
                return code, f"was stopped and will continue from its checkpoint in {workdirs / run.name}"
            results.write(folder, run, gather(run, workdirs))
            return 0, ""
        except UserError as error:
            return 0, f"failed: {error}"
        except Exception as error:  # continue with the other runs
            traceback.print_exc()
            return 0, f"failed: {type(error).__name__}: {first_line(error)}"
        finally:
            jax.clear_caches()


def train(run: Run, workdirs: Path) -> int:
    return training.train(run.config, workdirs / run.name)


def evaluate(run: Run, folder: Path, workdirs: Path) -> None:
    """Evaluates the checkpoint of `run.of` by the config of `run`."""
    assert run.of is not None
    parent, workdir = results.read(folder, run.of), workdirs / run.of.name
    if parent is None:
        raise UserError(f"it evaluates {run.of.name}, which has not finished")
    saved = config_lib.read(workdir)
    if saved is None:
        raise UserError(
            f"it evaluates the checkpoint of {run.of.name}, which is not in {workdir}: copy it from the machine that "
            f"trained it, or delete {folder / run.of.name}.json to train it again"
        )
    trained = parent["config"] | parent["resolved"]
    differ = [
        key
        for key, value in results.plain(experiments.fingerprint(saved)).items()
        if trained.get(key, value) != value and key not in config_lib.RESUMABLE
    ]
    if differ:
        raise UserError(
            f"{workdir} is not the run of {folder / run.of.name}.json, because {differ[0]} differs: delete the workdir"
        )
    changes = experiments.differences(run.of.config, run.config)
    changes |= {f"data.{key}": run.config.data[key] for key in ("workers", "threads")}
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    root = root_of(run.test, run.config.data) if run.test else run.config.data.root
    evaluation.evaluate_run(workdir, workdirs / run.name, overrides, run.test or None, root or None)


def gather(run: Run, workdirs: Path) -> dict[str, Any]:
    """The result of a run that has finished in its workdir."""
    workdir = workdirs / run.name
    evaluation = json.loads((workdir / f"evaluation{f'-{run.test}' * bool(run.test)}.json").read_text(encoding="utf-8"))
    if run.of is not None:
        return results.record(run, evaluation, {}, images=0, seconds=0.0, rate=0.0)
    config = config_lib.read(workdir)
    assert config is not None
    with Checkpoints(workdir, keep=0) as checkpoints:
        seconds = checkpoints.meta()["seconds"]
    images = sum(stage.steps * stage.batch for stage in schedule(config))
    rates = [record["images_per_second"] for record in estimate.records(workdir)]
    data = read_data(workdir)
    resolved, digest = experiments.fingerprint(config), None if data is None else data.digest
    return results.record(run, evaluation, resolved, images, seconds, median(rates), digest)


def command_line(argv: Sequence[str] | None) -> str:
    """The command for the report, without paths of this machine and without --report, which changes no number."""
    left_out = ("--config.data.root", "--workdirs", "--results", "--output", "--report")
    words, kept = iter(sys.argv[1:] if argv is None else argv), []
    for word in words:
        option, equals, _ = word.partition("=")  # argparse takes the beginning of an option for all of it
        meant = [name for name in left_out if option.startswith("--") and name.startswith(option)]
        if not meant:
            kept.append(word)
        elif not equals and meant != ["--report"]:
            next(words, None)
    return shlex.join(["python", "-m", "vpm_jax.reproduce", *kept])
