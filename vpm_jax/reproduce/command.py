"""Reproduces the paper's tables and figures: python -m vpm_jax.reproduce --table 1 3 --scale small --seeds 2

Trains what is missing, evaluates it, and writes one report: ours, the paper's, the difference, mean and spread over
seeds. Every finished run leaves a JSON file in --results and is never repeated; processes and machines that share
that folder divide the runs among them. --plan shows what is missing and what it will cost, --report reports what has
finished and trains nothing.

--parts tries what a config file lists, one part at a time, on training identities held out, and reports what each
gains: python -m vpm_jax.reproduce --parts configs/market_plus.py --seeds 3
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

from vpm_jax import cli, evaluation, paper, parallel, plots
from vpm_jax import config as config_lib
from vpm_jax.data.datasets import TITLES
from vpm_jax.errors import UserError
from vpm_jax.keys import LISTED
from vpm_jax.reproduce import estimate, experiments, figures, results, tables
from vpm_jax.reproduce.experiments import EXHIBITS, METHODS, SCALES, Cell, Run
from vpm_jax.runs.logs import make_folder, write_atomically


def main(argv: Sequence[str] | None = None) -> int:
    args, overrides = parser().parse_known_args(argv)
    scale, dataset, exhibits = choose(args)
    parallel.prepare_backend()
    if args.parts:
        tried = parts_of(args)
        cells = experiments.plan_parts(tried, dataset, scale, args.seeds, args.models, args.variant, overrides)
        exhibits = [f"the parts of {args.parts}"]
    else:
        cells = experiments.plan(exhibits, dataset, scale, args.seeds, args.models, args.variant, overrides)
    if not cells:
        raise UserError(f"--models {' '.join(args.models)}: {' and '.join(exhibits)} need none of these.")
    runs = experiments.distinct(cells.values())
    done = {run.name: result for run in runs if (result := results.read(args.results, run))}
    missing = [run for run in runs if run.name not in done]
    left = without_data(missing, training=not (args.plan or args.report))  # {run: why it has no result}
    missing = [run for run in missing if run.name not in left]

    # ---- What is to be done, and its cost ----------------------------------------------------------------
    count = f"{len(runs)} run{'s' * (len(runs) > 1)}"
    print(f"{count} for {', '.join(exhibits)} on {dataset}, scale {scale}: {len(done)} finished before")
    if missing and not args.report:
        print(estimate.describe(missing, args.results, args.workdirs))
    for reason in dict.fromkeys(left.values()):
        print(f"{sum(r == reason for r in left.values())} of them {reason.removeprefix('is ')}")
    if args.plan:
        return 0
    if args.report:
        left |= {run.name: "has not finished" for run in missing}
        missing = []
        if not done:
            raise UserError(f"Nothing of this has finished in {args.results}: leave out --report to train.")

    # ---- The runs ----------------------------------------------------------------------------------------
    name = experiments.family(dataset, scale) + f"-{args.variant}" * bool(args.variant) + "-parts" * bool(args.parts)
    output = args.output or Path("docs/results") / name
    for folder in (args.results, args.workdirs, output):  # hours before the last is needed
        make_folder(folder)
    stopped, skipped = 0, set(left)
    for number, run in enumerate(missing, 1):
        print(f"\n[{number}/{len(missing)}] {run.name}", flush=True)
        stopped, reason = perform(run, args.results, args.workdirs)
        result = results.read(args.results, run)
        if result is not None:
            done[run.name] = result
        else:
            left[run.name] = reason
            print(f"{run.name} {reason}", file=sys.stderr, flush=True)
        if stopped:
            break
    for run in runs:  # what others have finished meanwhile
        if run.name not in done and (result := results.read(args.results, run)):
            done[run.name] = result
            left.pop(run.name, None)

    # ---- The report --------------------------------------------------------------------------------------
    if done:
        report(output, exhibits, cells, done, left, command_line(argv), args.workdirs)
        print(f"\nreport of {len(done)} of {count}: {output / 'report.md'}")
    if stopped:
        print("Stopped: run the same command to go on.")
        return stopped
    if set(left) - skipped or not done:
        reasons = "; ".join(f"{name} {reason.rstrip('.')}" for name, reason in left.items())
        raise UserError(f"{len(left)} of {count} have no result ({reasons}): run the same command again for them.")
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
        "--parts", type=Path, metavar="FILE", help="what a config file lists as SCREEN, one part at a time"
    )
    top.add_argument("--dataset", choices=("market1501", "dukemtmc", "synthetic"), help="default: the scale's")
    top.add_argument(
        "--scale",
        choices=[s for s in SCALES if s != "released"],
        help="paper: the full recipe; small: two CPU cores, an hour a run; screen: ten minutes a run, on held-out "
        "training identities, for choosing; synthetic: the synthetic pedestrians (default: small, or synthetic with "
        "--dataset synthetic, or screen with --parts)",
    )
    top.add_argument("--recipe", choices=("paper", "released"), default="paper", help="of --scale paper")
    top.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1 (default: 1)")
    top.add_argument(
        "--models",
        nargs="+",
        metavar="MODEL",
        default=[],
        help=f"only these of {', '.join(METHODS)}, or of --parts",
    )
    top.add_argument("--variant", default="", metavar="NAME", help="names what --config overrides make")
    only = top.add_mutually_exclusive_group()
    only.add_argument("--plan", action="store_true", help="only show what is missing and what it will cost")
    only.add_argument("--report", action="store_true", help="only report what has finished, train nothing")
    top.add_argument(
        "--results", type=Path, default=Path("docs/results/runs"), help="of finished runs (default: %(default)s)"
    )
    top.add_argument(
        "--workdirs", type=Path, default=Path("runs/reproduce"), help="of trainings (default: %(default)s)"
    )
    top.add_argument("--output", type=Path, help="where the report goes (default: docs/results/DATASET-SCALE[-parts])")
    return top


def choose(args: argparse.Namespace) -> tuple[str, str, list[str]]:
    """(scale, dataset, exhibits) that the arguments mean.

    Raises:
      UserError: where they do not go together.
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
            raise UserError(f"--recipe released is of --scale paper, not of {scale}.")
        scale = "released"
    exhibits = [f"table {n}" for n in dict.fromkeys(args.table)] + [f"figure {n}" for n in dict.fromkeys(args.figure)]
    if args.parts and exhibits:
        raise UserError("--parts makes a report of its own: leave out --table and --figure.")
    if not (exhibits or args.parts):
        raise UserError("Nothing was asked for: name a --table (1 to 3) or a --figure (4 or 5), or --parts FILE.")
    if not args.parts and (unknown := [model for model in args.models if model not in METHODS]):
        raise UserError(f"--models {unknown[0]}: there are {', '.join(METHODS)}.")
    if args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}, expected how many, at least 1.")
    if args.variant and not experiments.is_name(args.variant):
        raise UserError(f"--variant {args.variant}: expected letters, digits, dots and underscores, for a file's name.")
    return scale, dataset, exhibits


def parts_of(args: argparse.Namespace) -> dict[str, experiments.Method]:
    """The parts of --parts, whose names --models may choose from.

    Raises:
      UserError: for a file without parts, or a name that is not among them.
    """
    found = experiments.parts(args.parts)
    if unknown := [name for name in args.models if name not in found]:
        raise UserError(f"--models {unknown[0]}: {args.parts} lists {', '.join(found)}.")
    return found


def without_data(missing: Sequence[Run], training: bool = True) -> dict[str, str]:
    """{run: why} of those whose dataset of partial images is not there: they are left out, the others go on.

    Raises:
      UserError: if what is to be trained on is not there, before the first run (`training` looks, and renders
        synthetic pedestrians).
    """
    from vpm_jax.data.sources import load_dataset

    if missing and training:
        load_dataset(missing[0].config.data)  # all runs have the same
    reasons = {}
    for test in dict.fromkeys(run.test for run in missing if run.test):
        try:
            root_of(test, missing[0].config.data)
        except UserError as error:
            reasons[test] = f"is left out: {error}"
    return {run.name: reasons[run.test] for run in missing if run.test in reasons}


def root_of(test: str, config_data: Any) -> str:
    """Where a dataset of partial images lies: under data.root, else under $VPM_DATA or ./data.

    Raises:
      UserError: if it is in neither.
    """
    from vpm_jax.data.sources import load_dataset

    data = config_data.copy_and_resolve_references()
    data.name = test
    if data.root:
        with contextlib.suppress(UserError):
            load_dataset(data)
            return data.root
    data.root = ""
    load_dataset(data)
    return ""


def perform(run: Run, folder: Path, workdirs: Path) -> tuple[int, str]:
    """Does a run, unless another process does, and leaves its result.

    Returns:
      (exit code if the user stopped it, else 0; why there is no result, "" if there is one).
    """
    import jax

    with results.claim(folder, run) as claimed:
        if not claimed:
            print(f"left to {results.owner(folder, run) or 'another process'}")
            return 0, "is left to another process"
        try:
            if results.read(folder, run) is not None:  # finished while we came here
                return 0, ""
            if run.of is not None:
                evaluate(run, folder, workdirs)
            elif code := train(run, workdirs):
                return code, f"was stopped and goes on from its checkpoint in {workdirs / run.name}"
            results.write(folder, run, gather(run, workdirs))
            return 0, ""
        except UserError as error:
            return 0, f"failed: {error}"
        except Exception as error:  # the others may do well
            traceback.print_exc()
            return 0, f"failed: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        finally:
            jax.clear_caches()


def train(run: Run, workdirs: Path) -> int:
    from vpm_jax import train

    return train.train(run.config, workdirs / run.name)


def evaluate(run: Run, folder: Path, workdirs: Path) -> None:
    """Evaluates the checkpoint of the run that this one is of, with its own matching."""
    assert run.of is not None
    parent, workdir = results.read(folder, run.of), workdirs / run.of.name
    if parent is None:
        raise UserError(f"it evaluates {run.of.name}, which has not finished")
    saved = config_lib.read(workdir)
    if saved is None:
        raise UserError(
            f"it evaluates the checkpoint of {run.of.name}, which is not in {workdir}: bring it from where it was "
            f"trained, or delete {folder / run.of.name}.json to train it again"
        )
    trained = parent["config"] | parent["resolved"]
    other = [
        key
        for key, value in results.plain(experiments.fingerprint(saved)).items()
        if trained.get(key, value) != value and key not in config_lib.RESUMABLE
    ]
    if other:
        raise UserError(f"{workdir} is not the run of {folder / run.of.name}.json, for {other[0]} differs: delete it")
    changes = experiments.differences(run.of.config, run.config)
    changes |= {f"data.{key}": run.config.data[key] for key in ("workers", "threads")}
    overrides = [f"--config.{key}={value}" for key, value in changes.items()]
    root = root_of(run.test, run.config.data) if run.test else run.config.data.root
    evaluation.evaluate_run(workdir, workdirs / run.name, overrides, run.test or None, root or None)


def gather(run: Run, workdirs: Path) -> dict[str, Any]:
    """The result of a run that has finished in its workdir."""
    from vpm_jax.runs.checkpoints import Checkpoints
    from vpm_jax.schedule import schedule

    workdir = workdirs / run.name
    evaluation = json.loads((workdir / f"evaluation{f'-{run.test}' * bool(run.test)}.json").read_text())
    if run.of is not None:
        return results.record(run, evaluation, {}, images=0, seconds=0.0, rate=0.0)
    config = config_lib.read(workdir)
    assert config is not None
    with Checkpoints(workdir, keep=0) as checkpoints:
        seconds = checkpoints.meta()["seconds"]
    images = sum(stage.steps * stage.batch for stage in schedule(config))
    rates = [record["images_per_second"] for record in estimate.records(workdir)]
    return results.record(run, evaluation, experiments.fingerprint(config), images, seconds, median(rates))


def command_line(argv: Sequence[str] | None) -> str:
    """The command as given, without what only this machine has, and without --report, which changes no number."""
    own = ("--config.data.root", "--workdirs", "--results", "--output")
    words = list(sys.argv[1:] if argv is None else argv)
    kept = []
    while words:
        word = words.pop(0)
        if not word.startswith(own):
            kept += [word] * (word != "--report")
        elif "=" not in word and words:
            words.pop(0)
    return shlex.join(["python", "-m", "vpm_jax.reproduce", *kept])


def report(
    output: Path,
    what: Sequence[str],
    cells: Mapping[Cell, Run],
    done: Mapping[str, Mapping[str, Any]],
    left: Mapping[str, str],
    command: str,
    workdirs: Path,
) -> None:
    """Writes report.md, report.json and their pictures into `output`: of exhibits, or of parts that were tried."""
    make_folder(output)
    runs = experiments.distinct(cells.values())
    one = runs[0]
    variant = f", variant {one.variant}" * bool(one.variant)
    heading = ", ".join(name[0].upper() + name[1:] for name in what)
    data: dict[str, Any] = {"command": command, "spread": tables.SPREAD}
    if EXHIBITS.keys() >= set(what):
        data["exhibits"], body = {}, []
        for name in what:
            data["exhibits"][name], lines = exhibit(output, name, cells, done, workdirs)
            body += lines
    else:
        data["parts"], body = parts(output, cells, done)
    lines = [
        f"# {heading}: {TITLES[one.dataset]}, scale {one.scale}{variant}",
        "",
        f"    {command}",
        "",
        f"- Recipe {one.config.recipe}: `{experiments.config_file(one.scale, one.dataset)}`{differing(one)}.",
        *tables.conditions(runs, done),
        *absent(left),
        "",
        *body,
        *tables.listing(runs, done),
    ]
    write_atomically(output / "report.md", "\n".join(lines).rstrip() + "\n")
    write_atomically(output / "report.json", json.dumps(data, indent=1) + "\n")


def absent(left: Mapping[str, str]) -> list[str]:
    """What a report leaves out, from {run: why}: a line for each reason."""
    lines = []
    for reason in dict.fromkeys(left.values()):
        names = [name for name, why in left.items() if why == reason]
        lines.append(f"- Not in this report: {', '.join(names)}{': each' * (len(names) > 1)} {reason.rstrip('.')}.")
    return lines


def exhibit(
    output: Path, name: str, cells: Mapping[Cell, Run], done: Mapping[str, Mapping[str, Any]], workdirs: Path
) -> tuple[dict[str, Any], list[str]]:
    """Draws a table or a figure of the paper; its data and its lines of the report."""
    title, methods, tests, shaded, shows_maps, differing = EXHIBITS[name]
    stem, one = name.replace(" ", "-"), next(iter(cells.values()))
    found = tables.rows(name, cells, done)
    data, lines = {"sweep": found}, [f"## {title}", ""]
    if found:
        lines += tables.sweep(found)
        seeds = [len(row["seeds"]) for row in found]
        above = plots.gamma_title(where(one), one.config.eval.crop, plots.network(one.config), seeds)
        picture = output / f"{stem}.png"
        if differing and len(found) > 1:
            figures.differences(picture, found, above)
        else:
            figures.gamma_curves(picture, found, above, done[found[0]["runs"][0]]["chance_rank1"], shaded)
        lines += [f"![{title}]({stem}.png)", ""]
    for test in tests:
        if found := tables.rows(name, cells, done, test):
            data[test] = found
            lines += tables.partial(found, test)
    if shows_maps:
        lines += maps(output, stem, [run for cell, run in cells.items() if cell.method in methods], workdirs)
    return data, lines


def parts(
    output: Path, cells: Mapping[Cell, Run], done: Mapping[str, Mapping[str, Any]]
) -> tuple[list[tables.Row], list[str]]:
    """Draws what each part gains; the data and the lines of the report."""
    found, (first, one) = tables.gains(cells, done), next(iter(cells.items()))
    lines = ["## What each part gains", "", *tables.parts(found, first.method)]
    if sum("gain" in row for row in found) > 1:
        seeds = plots.count_seeds([len(row["seeds"]) for row in found if "gain" in row])
        above = f"{where(one)}: gains over {paper.title(paper.method_of(one.config))}, mean over gammas\n"
        above += f"{plots.network(one.config)}; {seeds}"
        figures.gains(output / "parts.png", found, above)
        lines += ["![What each part gains](parts.png)", ""]
    return found, lines


def where(run: Run) -> str:
    """What a run is evaluated on, as the pictures call it."""
    held = run.config.data.holdout_identities
    return TITLES[run.dataset] + f", {held} held-out training identities" * bool(held)


def maps(output: Path, stem: str, runs: Sequence[Run], workdirs: Path) -> list[str]:
    """Draws the regions that each run finds; the lines of the report about them."""
    lines = []
    for run in (run for run in experiments.distinct(runs) if run.seed == 0 and run.of is None):
        picture = f"{stem}-{run.method}.png"
        try:
            figures.region_maps(output / picture, workdirs / run.name)
            text = "synthetic pedestrians, the cells in the color of their most probable region"
            lines += [f"Regions found by `{run.name}`: {text}.", "", f"![{run.name}]({picture})", ""]
        except UserError as error:
            lines += [f"Regions found by `{run.name}` are not shown: {error}", ""]
    return lines


def differing(run: Run) -> str:
    """The keys by which every run differs from the scale's file, as text."""
    plain = cli.load_config(experiments.config_file(run.scale, run.dataset))
    changes = {"data.name": run.dataset} if plain.data.name != run.dataset else {}
    changes |= SCALES[run.scale].changes
    changes |= {key: value for key, value in run.changes.items() if key not in METHODS[run.method].changes}
    keys = ", ".join(f"{key} = {value}" for key, value in changes.items())
    return f" with {keys}" if keys else ""
