"""Reproduces the paper's tables and figures: python -m vpm_jax.reproduce --table 1 3 --scale small --seeds 2

Trains what is missing, evaluates it, and writes one report: ours, the paper's, the difference, mean and spread over
seeds. Every finished run leaves a JSON file in --results and is never repeated; processes and machines that share
that folder divide the runs among them. --plan shows what is missing and what it will cost.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from vpm_jax import cli, estimate, experiments, parallel, plots, results, tables
from vpm_jax import config as config_lib
from vpm_jax.errors import UserError
from vpm_jax.experiments import EXHIBITS, METHODS, SCALES, Run
from vpm_jax.logs import make_folder, replacing, write_atomically


def main(argv: Sequence[str] | None = None) -> int:
    args, overrides = parser().parse_known_args(argv)
    scale, dataset, exhibits = choose(args)
    methods = list(
        dict.fromkeys(m for e in exhibits for m in EXHIBITS[e].methods if not args.models or m in args.models)
    )
    if not methods:
        raise UserError(f"--models {' '.join(args.models)}: {' and '.join(exhibits)} need none of these.")
    if args.seeds < 1:
        raise UserError(f"--seeds is {args.seeds}, expected how many, at least 1.")
    parallel.prepare_backend()
    grid = experiments.plan(methods, dataset, scale, args.seeds, args.variant, overrides)
    runs = experiments.distinct(grid.values())
    done = {run.name: result for run in runs if (result := results.read(args.results, run))}

    # ---- What is to be done, and its cost ----------------------------------------------------------------
    missing = [run for run in runs if run.name not in done]
    print(
        f"{len(runs)} run{'s' * (len(runs) > 1)} for {', '.join(exhibits)} on {dataset}, scale {scale}: {len(done)} finished before"
    )
    if missing:
        print(estimate.describe(missing, args.results, args.workdirs))
    if args.plan:
        return 0

    # ---- The runs ----------------------------------------------------------------------------------------
    for folder in (args.results, args.workdirs):
        make_folder(folder)
    if missing:
        check_data(missing)
    left: dict[str, str] = {}  # {run: why it has no result}
    stopped = 0
    for number, run in enumerate(missing, 1):
        print(f"\n[{number}/{len(missing)}] {run.name}", flush=True)
        code, reason = perform(run, args.results, args.workdirs)
        result = results.read(args.results, run)
        if result is not None:
            done[run.name] = result
        elif reason:
            left[run.name] = reason
            print(f"{run.name} {reason}", file=sys.stderr, flush=True)
        if code:
            stopped = code
            break

    # ---- The report --------------------------------------------------------------------------------------
    name = experiments.family(dataset, scale) + "-" * bool(args.variant) + args.variant
    output = args.output or Path("docs/results") / name
    if done:
        report(output, exhibits, grid, done, left, command_line(argv))
        print(f"\nreport of {len(done)} of {len(runs)} runs: {output / 'report.md'}")
    if stopped:
        print("Stopped: run the same command to go on.")
        return stopped
    if left:
        raise UserError(
            f"{len(left)} of {len(runs)} runs have no result ("
            + "; ".join(f"{name} {reason.rstrip('.')}" for name, reason in left.items())
            + "): run the same command again for them."
        )
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m vpm_jax.reproduce",
        description=__doc__,
        epilog="Any key of the configuration is overridden for all runs by --config.KEY=VALUE.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for kind in ("table", "figure"):
        numbers = [e.split()[1] for e in EXHIBITS if e.startswith(kind)]
        top.add_argument(
            f"--{kind}", nargs="+", action="extend", choices=numbers, default=[], help=f"the paper's {kind}s"
        )
    top.add_argument("--dataset", choices=("market1501", "dukemtmc", "synthetic"), help="default: the scale's")
    top.add_argument(
        "--scale",
        choices=[s for s in SCALES if s != "released"],
        help="paper: the full recipe; small: two CPU cores, an hour a run; screen: ten minutes a run, on held-out "
        "training identities, for choosing; synthetic: the synthetic pedestrians (default: small, or synthetic with "
        "--dataset synthetic)",
    )
    top.add_argument("--recipe", choices=("paper", "released"), default="paper", help="of --scale paper")
    top.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds 0 to N - 1 (default: 1)")
    top.add_argument(
        "--models",
        nargs="+",
        choices=list(METHODS),
        metavar="MODEL",
        default=[],
        help=f"only these of {', '.join(METHODS)}",
    )
    top.add_argument("--variant", default="", metavar="NAME", help="names what --config overrides make")
    top.add_argument("--plan", action="store_true", help="only show what is missing and what it will cost")
    top.add_argument(
        "--results", type=Path, default=Path("docs/results/runs"), help="of finished runs (default: %(default)s)"
    )
    top.add_argument(
        "--workdirs", type=Path, default=Path("runs/reproduce"), help="of trainings (default: %(default)s)"
    )
    top.add_argument("--output", type=Path, help="where the report goes (default: docs/results/DATASET-SCALE)")
    return top


def choose(args: argparse.Namespace) -> tuple[str, str, list[str]]:
    """(scale, dataset, exhibits) that the arguments mean.

    Raises:
      UserError: where they do not go together.
    """
    scale = args.scale or ("synthetic" if args.dataset == "synthetic" else "small")
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
    if not exhibits:
        raise UserError("Nothing was asked for: name a --table (1 to 3) or a --figure (4 or 5).")
    if args.variant and not args.variant.replace("_", "").replace(".", "").isalnum():
        raise UserError(f"--variant {args.variant}: expected letters, digits, dots and underscores, for a file's name.")
    return scale, dataset, exhibits


def check_data(missing: Sequence[Run]) -> None:
    """Refuses at once, before the first run, data that are not there."""
    from vpm_jax.data.sources import load_dataset

    load_dataset(missing[0].config.data)  # all runs have the same


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
            code = train(run, workdirs) if run.of is None else evaluate(run, folder, workdirs)
            if code:
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


def evaluate(run: Run, folder: Path, workdirs: Path) -> int:
    """Evaluates the checkpoint of the run that this one is of, with its own matching."""
    from vpm_jax import evaluate

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
        if trained.get(key, value) != value and not key.startswith(config_lib.RESUMABLE)
    ]
    if other:
        raise UserError(f"{workdir} is not the run of {folder / run.of.name}.json, for {other[0]} differs: delete it")
    changes = experiments.differences(run.of.config, run.config)
    arguments = [f"--config.{key}={value}" for key, value in changes.items()]
    arguments += [
        f"--config.{key}={run.config.data[key.partition('.')[2]]}" for key in ("data.workers", "data.threads")
    ]
    if run.config.data.root:
        arguments.append(f"--config.data.root={run.config.data.root}")
    return evaluate.main(["--workdir", str(workdir), "--output", str(workdirs / run.name), *arguments])


def gather(run: Run, workdirs: Path) -> dict[str, Any]:
    """The result of a run that has finished in its workdir."""
    from vpm_jax.checkpoints import Checkpoints
    from vpm_jax.data.sampling import schedule

    workdir = workdirs / run.name
    evaluation = json.loads((workdir / "evaluation.json").read_text())
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
    """The command as given, without what only this machine has."""
    own = ("--config.data.root", "--workdirs", "--results", "--output")
    words = list(sys.argv[1:] if argv is None else argv)
    kept = []
    while words:
        word = words.pop(0)
        if not word.startswith(own):
            kept.append(word)
        elif "=" not in word and words:
            words.pop(0)
    return shlex.join(["python", "-m", "vpm_jax.reproduce", *kept])


def report(
    output: Path,
    exhibits: Sequence[str],
    grid: dict[tuple[str, int], Run],
    done: dict[str, dict[str, Any]],
    left: dict[str, str],
    command: str,
) -> None:
    """Writes report.md, report.json and a plot for each exhibit into `output`."""
    make_folder(output)
    one = next(iter(grid.values()))
    runs = experiments.distinct(grid.values())
    lines = [
        f"# {', '.join(e.capitalize() for e in exhibits)}: {one.dataset}, scale {one.scale}"
        + (f", variant {one.variant}" if one.variant else ""),
        "",
        f"    {command}",
        "",
        f"- Recipe {one.config.recipe}: `{experiments.config_file(one.scale, one.dataset)}`"
        + (f" with {differing(one)}" if differing(one) else "")
        + ".",
        *tables.conditions(runs, done),
        *(f"- Not in this report: {name} {reason.rstrip('.')}." for name, reason in left.items()),
        "",
    ]
    data: dict[str, Any] = {"command": command, "spread": tables.SPREAD, "exhibits": {}}
    for exhibit in exhibits:
        rows = tables.rows(EXHIBITS[exhibit].methods, grid, done)
        data["exhibits"][exhibit] = rows
        lines.append(tables.markdown(exhibit, rows))
        if rows:
            picture = exhibit.replace(" ", "-") + ".png"
            draw(output / picture, rows, f"{EXHIBITS[exhibit].title}; {one.dataset}, {one.scale}")
            lines += [f"![{EXHIBITS[exhibit].title}]({picture})", ""]
    lines += tables.listing(runs, done)
    write_atomically(output / "report.md", "\n".join(lines).rstrip() + "\n")
    write_atomically(output / "report.json", json.dumps(data, indent=1) + "\n")


def differing(run: Run) -> str:
    """The keys by which every run differs from the scale's file, as text."""
    plain = cli.load_config(experiments.config_file(run.scale, run.dataset))
    changes = dict(SCALES[run.scale].changes)
    if plain.data.name != run.dataset:
        changes = {"data.name": run.dataset} | changes
    changes |= {key: value for key, value in run.changes.items() if key not in METHODS[run.method].changes}
    return ", ".join(f"{key} = {value}" for key, value in changes.items())


def draw(path: Path, rows: Sequence[dict[str, Any]], title: str) -> None:
    """The gamma curves of one exhibit."""
    curves = {
        row["title"]: {
            float(gamma): {"rank-1": values["R-1"]["mean"] / 100, "mAP": values["mAP"]["mean"] / 100}
            for gamma, values in row["gammas"].items()
        }
        for row in rows
    }
    with replacing(path) as temporary:
        plots.gamma_curves(temporary, curves, title)


if __name__ == "__main__":
    cli.run(main)
