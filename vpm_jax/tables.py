"""The report of `reproduce`: finished runs as tables beside the paper's, in Markdown and as data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

from vpm_jax import paper
from vpm_jax.experiments import EXHIBITS, METHODS, Run
from vpm_jax.logs import duration

METRICS = ("R-1", "R-5", "R-10", "mAP", "mINP")
SPREAD = "± is the sample standard deviation over the seeds"

Results = Mapping[str, Mapping[str, Any]]  # {name of a run: its result}


def measured(result: Mapping[str, Any], gamma: str, metric: str) -> float:
    """One number of a result, in percent."""
    values = result["gammas"][gamma]
    if metric in ("mAP", "mINP"):
        return 100 * values[metric]
    cmc = values["cmc"]
    return 100 * cmc[min(int(metric.removeprefix("R-")), len(cmc)) - 1]


def summary(values: Sequence[float], published: float | None = None) -> dict[str, Any]:
    """Of one number over seeds, in percent: mean, sample standard deviation (None of one seed), range, and the
    paper's with the difference (ours less the paper's)."""
    found: dict[str, Any] = {
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }
    if published is not None:
        found |= {"paper": published, "difference": mean(values) - published}
    return found


def rows(methods: Sequence[str], runs: Mapping[tuple[str, int], Run], results: Results) -> list[dict[str, Any]]:
    """For each method with a finished run: its seeds and, of every gamma and metric, the `summary` over them."""
    found = []
    for method in methods:
        mine = {seed: run for (m, seed), run in runs.items() if m == method and run.name in results}
        if not mine:
            continue
        one = next(iter(mine.values()))
        config = one.config
        compared = None
        if config.eval.crop == "top" and not config.data.holdout_identities:  # the paper's protocol
            compared = paper.published(one.dataset, METHODS[method].published)
        gammas: dict[str, Any] = {}
        for gamma in results[one.name]["gammas"]:
            theirs = {} if compared is None else compared.scores.get(float(gamma), {})
            gammas[gamma] = {}
            for metric in METRICS:
                values = [measured(results[run.name], gamma, metric) for run in mine.values()]
                misprint = compared is not None and compared.misprinted(float(gamma), metric)
                gammas[gamma][metric] = summary(values, None if misprint else theirs.get(metric))
        found.append(
            {
                "method": method,
                "title": METHODS[method].title,
                "seeds": list(mine),
                "runs": [run.name for run in mine.values()],
                "compared with": compared.where if compared else None,
                "gammas": gammas,
            }
        )
    return found


def markdown(exhibit: str, found: Sequence[Mapping[str, Any]]) -> str:
    """The tables of one exhibit; `found` is of `rows`."""
    lines = [f"## {EXHIBITS[exhibit].title}", ""]
    if not found:
        return "\n".join([*lines, "No run has finished yet.", ""])
    gammas = list(dict.fromkeys(gamma for row in found for gamma in row["gammas"]))
    seeds = {len(row["seeds"]) for row in found}
    several = f"; mean over seeds, {SPREAD}" if max(seeds) > 1 else ""
    lines += [f"Rank-1 / mAP in percent at each gamma{several}.", ""]
    table = [["method", "seeds", *gammas]]
    for row in found:
        cells = [row["title"], str(len(row["seeds"]))]
        for gamma in gammas:
            values = row["gammas"].get(gamma)
            cells.append("–" if values is None else " / ".join(_number(values[m]) for m in ("R-1", "mAP")))
        table.append(cells)
    lines += _table(table)
    if len(found) > 1:
        first = found[0]
        lines += [f"Rank-1 / mAP of {first['title']} less those of the others:", ""]
        table = [["method", *gammas]]
        for row in found[1:]:
            cells = [row["title"]]
            for gamma in gammas:
                one, two = first["gammas"].get(gamma), row["gammas"].get(gamma)
                differences = [one[m]["mean"] - two[m]["mean"] for m in ("R-1", "mAP")] if one and two else []
                cells.append(" / ".join(f"{d:+.1f}" for d in differences) or "–")
            table.append(cells)
        lines += _table(table)
    for row in found:
        if row["compared with"]:
            lines += _beside_the_paper(row)
    return "\n".join(lines)


def _beside_the_paper(row: Mapping[str, Any]) -> list[str]:
    shown = [metric for metric in METRICS if any("paper" in values[metric] for values in row["gammas"].values())]
    table = [["gamma", *(cell for m in shown for cell in (f"{m} ours", "paper", "difference"))]]
    for gamma, values in row["gammas"].items():
        if not any("paper" in values[metric] for metric in shown):
            continue
        cells = [f"{float(gamma):g}"]
        for metric in shown:
            value = values[metric]
            cells.append(_number(value))
            # Of the rounded number, so that a reader who subtracts finds the same.
            cells += (
                [f"{value['paper']:.1f}", f"{round(value['mean'], 1) - value['paper']:+.1f}"]
                if "paper" in value
                else ["–", "–"]
            )
        table.append(cells)
    return [f"{row['title']} beside the paper's {row['compared with']}:", "", *_table(table)]


def _number(value: Mapping[str, Any]) -> str:
    spread = "" if value["std"] is None else f" ± {value['std']:.1f}"
    return f"{value['mean']:.1f}{spread}"


def _table(cells: Sequence[Sequence[str]]) -> list[str]:
    header, *body = ["| " + " | ".join(row) + " |" for row in cells]
    return [header, "|---|" + "---:|" * (len(cells[0]) - 1), *body, ""]


def conditions(runs: Sequence[Run], results: Results) -> list[str]:
    """How the numbers came about: protocol, chance, size of training, hardware, time, versions."""
    done = [results[run.name] for run in runs if run.name in results]
    if not done:
        return []
    one = done[0]
    held, protocol = one["protocol"]["held out identities"], one["protocol"]
    whose = f"{held} training identities held out (the test set is not used)" if held else "the test set"
    lines = [
        f"- Protocol: {one['dataset']}, {whose}; single query, {protocol['queries']} queries keeping their "
        f"{protocol['crop']} gamma, {protocol['gallery']} gallery images whole; same identity and camera dropped, "
        f"{protocol['skipped']} queries without a match skipped. Chance: rank-1 {one['chance_rank1']:.2%}.",
    ]
    trained = [result for result in done if result["images"]]
    for hardware in dict.fromkeys(result["hardware"] for result in trained):
        here = [result for result in trained if result["hardware"] == hardware]
        seconds, images = [result["seconds"] for result in here], [result["images"] for result in here]
        lines.append(
            f"- {len(here)} training{'s' * (len(here) > 1)} on {hardware}: {_range(images)} images "
            f"in {duration(min(seconds))} to {duration(max(seconds))} each, "
            f"{median(r['images_per_second'] for r in here):,.0f} images/s in the middle, {duration(sum(seconds))} "
            "in all."
        )
    lines += [f"- Versions: {versions}." for versions in dict.fromkeys(result["versions"] for result in done)]
    commits = sorted({str(result["commit"]) for result in done} - {"None"})
    if commits:
        lines.append(f"- Commit{'s' * (len(commits) > 1)} {', '.join(commits)}.")
    return lines


def _range(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:,.0f}" if math.isclose(low, high) else f"{low:,.0f} to {high:,.0f}"


def listing(runs: Sequence[Run], results: Results) -> list[str]:
    """Every finished run with its keys and its command."""
    lines = ["## Runs", ""]
    for run in runs:
        result = results.get(run.name)
        if result is None:
            continue
        time = f"{duration(result['seconds'])} of training, " if result["images"] else ""
        lines += [
            f"- `{run.name}` ({time}{duration(result['evaluation_seconds'])} of evaluation; {result['finished']}):",
            f"  `{result['command']}`",
        ]
    return [*lines, ""]
