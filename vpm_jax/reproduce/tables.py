"""The tables of `reproduce`: finished runs beside the paper's numbers, in Markdown and as data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

from vpm_jax import comparison, paper
from vpm_jax.comparison import measured
from vpm_jax.data.datasets import TITLES
from vpm_jax.reproduce.experiments import EXHIBITS, METHODS, Cell, Run, differences
from vpm_jax.runs.logs import duration

METRICS = ("R-1", "R-5", "R-10", "mAP", "mINP")
PARTIAL_METRICS = ("R-1", "R-3", "R-5", "mAP")
GAINED = ("R-1", "mAP")
SPREAD = "± is the sample standard deviation over the seeds"

Results = Mapping[str, Mapping[str, Any]]  # {name of a run: its result}
Row = dict[str, Any]


def numbers(result: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """{gamma, or protocol of a dataset of partial images: {"cmc", "mAP", ...}} of a result."""
    return result.get("gammas") or result["protocols"]


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


def rows(exhibit: str, cells: Mapping[Cell, Run], results: Results, test: str = "") -> list[Row]:
    """For each method of an exhibit with a finished run: its seeds and the `summary` of every number.

    Args:
      exhibit: a key of EXHIBITS.
      cells: of `experiments.plan`.
      results: {name of a run: its result}.
      test: a dataset of partial images; "": the sweep over gamma on the test set of the training's dataset.
    """
    found = []
    for method in EXHIBITS[exhibit].methods:
        runs = {
            cell.seed: run
            for cell, run in cells.items()
            if (cell.method, cell.test) == (method, test) and run.name in results
        }
        if not runs:
            continue
        one = next(iter(runs.values()))
        compared = _published(one, METHODS[method].published)
        scores: dict[str, dict[str, Any]] = {}
        for key in numbers(results[one.name]):
            gamma = 1.0 if test else float(key)
            scores[key] = {}
            for metric in PARTIAL_METRICS if test else METRICS:
                values = [measured(numbers(results[run.name])[key], metric) for run in runs.values()]
                theirs = compared.scores.get(gamma, {}).get(metric) if compared else None
                if compared and compared.misprinted(gamma, metric):
                    theirs = None
                known = [value for value in values if value is not None]
                if known:
                    scores[key][metric] = summary(known, theirs)
        found.append(
            {
                "method": method,
                "title": METHODS[method].title,
                "seeds": list(runs),
                "runs": [run.name for run in runs.values()],
                "compared with": compared.source.name if compared else None,
                "numbers": scores,
            }
        )
    return found


def _published(run: Run, method: str) -> paper.Published | None:
    """What the paper reports of a method by the protocol of a run, if it does."""
    if run.test:
        return paper.published(run.test, method) if run.dataset == "market1501" else None
    if run.config.eval.crop != "top" or run.config.data.holdout_identities:
        return None
    return paper.published(run.dataset, method)


def sweep(found: Sequence[Row]) -> list[str]:
    """The table over gamma of every method, the first one's lead, and each beside the paper's numbers."""
    gammas = list(dict.fromkeys(gamma for row in found for gamma in row["numbers"]))
    lines = [f"Rank-1 / mAP in percent at each gamma{_of_seeds(found)}.", ""]
    table = [["method", "seeds", *gammas]]
    for row in found:
        cells = [row["title"], str(len(row["seeds"]))]
        for gamma in gammas:
            values = row["numbers"].get(gamma)
            cells.append(" / ".join(_number(values[m]) for m in ("R-1", "mAP")) if values else "–")
        table.append(cells)
    lines += comparison.table(table)
    if len(found) > 1:
        first = found[0]
        lines += [f"Rank-1 / mAP of {first['title']} less those of the others:", ""]
        table = [["method", *gammas]]
        for row in found[1:]:
            cells = [row["title"]]
            for gamma in gammas:
                one, two = first["numbers"].get(gamma), row["numbers"].get(gamma)
                differences = [one[m]["mean"] - two[m]["mean"] for m in ("R-1", "mAP")] if one and two else []
                cells.append(" / ".join(f"{d:+.1f}" for d in differences) or "–")
            table.append(cells)
        lines += comparison.table(table)
    for row in found:
        lines += _beside_the_paper(row)
    return lines


def gains(cells: Mapping[Cell, Run], results: Results) -> list[Row]:
    """For each part that was tried: what it changes, its numbers, and what it gains over the base's run of the same
    seed, in the mean over the gammas. The base, the first of the plan, comes first, then the most gained in mAP.

    A row is of the seeds that the base has finished too; without any, of all, and has no gain.

    Args:
      cells: of `experiments.plan_parts`.
      results: {name of a run: its result}.
    """
    first = next(iter(cells)).method
    base = {cell.seed: run for cell, run in cells.items() if cell.method == first}
    found = []
    for method in dict.fromkeys(cell.method for cell in cells):
        runs = {c.seed: run for c, run in cells.items() if c.method == method and run.name in results}
        paired = {seed: run for seed, run in runs.items() if base[seed].name in results}
        runs = paired or runs
        if not runs:
            continue
        seed, one = next(iter(runs.items()))
        each = [numbers(results[run.name]) for run in runs.values()]
        row: Row = {
            "method": method,
            "title": method,
            "changes": differences(base[seed].config, one.config),
            "seeds": list(runs),
            "runs": [run.name for run in runs.values()],
            "numbers": {
                gamma: {metric: summary([_score(values[gamma], metric) for values in each]) for metric in GAINED}
                for gamma in each[0]
            },
        }
        if paired and method != first:
            theirs = [numbers(results[base[seed].name]) for seed in runs]
            row["gain"] = {
                metric: summary([_level(a, metric) - _level(b, metric) for a, b in zip(each, theirs, strict=True)])
                for metric in GAINED
            }
        found.append(row)

    def rank(row: Row) -> float:
        return -math.inf if row["method"] == first else -row["gain"]["mAP"]["mean"] if "gain" in row else math.inf

    return sorted(found, key=rank)


def _score(values: Mapping[str, Any], metric: str) -> float:
    found = measured(values, metric)
    assert found is not None  # every evaluation measures what GAINED names
    return found


def _level(table: Mapping[str, Mapping[str, Any]], metric: str) -> float:
    """A number in percent, the mean over the gammas."""
    return mean(_score(values, metric) for values in table.values())


def parts(found: Sequence[Row], base: str) -> list[str]:
    """The table of `gains` over the part `base`."""
    if not found:
        return ["None has finished.", ""]
    gammas = list(found[0]["numbers"])
    brackets = "; in brackets the least and the most of any seed" if max(len(row["seeds"]) for row in found) > 1 else ""
    lines = [
        f"Rank-1 / mAP in percent at each gamma{_of_seeds(found)}. A gain is that over {base} with the same seed, the "
        f"mean over the gammas{brackets}.",
        "",
    ]
    table = [["part", "keys", "seeds", *gammas, "gain in R-1", "gain in mAP"]]
    for row in found:
        keys = ", ".join(f"`{key}={value}`" for key, value in row["changes"].items())
        cells = [row["title"], keys or "–", str(len(row["seeds"]))]
        for gamma in gammas:
            cells.append(" / ".join(_number(row["numbers"][gamma][metric]) for metric in GAINED))
        for metric in GAINED:
            gain = row.get("gain", {}).get(metric)
            several = f" ({gain['min']:+.1f} to {gain['max']:+.1f})" if gain and len(gain["values"]) > 1 else ""
            cells.append(f"{gain['mean']:+.1f}{several}" if gain else "–")
        table.append(cells)
    return [*lines, *comparison.table(table)]


def partial(found: Sequence[Row], test: str) -> list[str]:
    """The table of a dataset of partial images: for each protocol the methods beside the paper's numbers."""
    protocols = list(dict.fromkeys(key for row in found for key in row["numbers"]))
    lines = [f"### {TITLES[test]}", "", f"In percent{_of_seeds(found)}.", ""]
    header = ["method", "protocol", "seeds"]
    metrics = [m for m in PARTIAL_METRICS if any(m in v for row in found for v in row["numbers"].values())]
    theirs = [m for m in metrics if any("paper" in v.get(m, {}) for row in found for v in row["numbers"].values())]
    for metric in metrics:
        header += [metric, *(["paper", "difference"] if metric in theirs else [])]
    table = [header]
    for row in found:
        for protocol in protocols:
            values = row["numbers"].get(protocol)
            if values is None:
                continue
            cells = [row["title"], protocol, str(len(row["seeds"]))]
            for metric in metrics:
                value = values.get(metric, {"mean": None, "std": None})
                cells.append(_number(value))
                if metric in theirs:
                    published = value.get("paper")
                    cells += [comparison.number(published), comparison.difference(value["mean"], published)]
            table.append(cells)
    return [*lines, *comparison.table(table)]


def _of_seeds(found: Sequence[Row]) -> str:
    return f"; mean over seeds, {SPREAD}" if max(len(row["seeds"]) for row in found) > 1 else ""


def _beside_the_paper(row: Row) -> list[str]:
    theirs = {
        float(gamma): {metric: value["paper"] for metric, value in values.items() if "paper" in value}
        for gamma, values in row["numbers"].items()
    }
    shown = [metric for metric in METRICS if any(metric in scores for scores in theirs.values())]
    if not shown:
        return []
    ours = {
        float(gamma): {metric: (values[metric]["mean"], values[metric]["std"]) for metric in shown}
        for gamma, values in row["numbers"].items()
        if theirs[float(gamma)]
    }
    return [f"Beside the paper's {row['compared with']}: {row['title']}", "", *comparison.by_gamma(ours, theirs, shown)]


def _number(value: Mapping[str, Any]) -> str:
    return comparison.number(value["mean"], value["std"])


def conditions(runs: Sequence[Run], results: Results) -> list[str]:
    """How the numbers came about: protocol, chance, size of training, hardware, time, versions."""
    done = [results[run.name] for run in runs if run.name in results]
    lines = []
    for one in {result["test"]: result for result in reversed(done)}.values():
        protocol, chance = one["protocol"], f"Chance: rank-1 {one['chance_rank1']:.2%}."
        if "protocols" in one:
            lines.append(
                f"- {TITLES[one['test']]}: {protocol['queries']} partial images as queries, as they are, against "
                f"{protocol['gallery']} whole ones; no cameras, nothing is dropped. {chance}"
            )
        else:
            held = protocol["held out identities"]
            cropped = sorted(
                {r["method"] for r in done if r["test"] == one["test"] and r["match"].get("gallery_gammas")}
            )
            also = f" (of {', '.join(cropped)} also cropped)" if cropped else ""
            whose = f"{held} training identities held out (the test set is not used)" if held else "the test set"
            lines.append(
                f"- Protocol: {TITLES[one['dataset']]}, {whose}; single query, {protocol['queries']} queries keeping "
                f"their {protocol['crop']} gamma, {protocol['gallery']} gallery images whole{also}; same identity and "
                f"camera dropped, {protocol['skipped']} queries without a match skipped. {chance}"
            )
        lines += [f"- {TITLES[one['test']]}: {note}" for note in one.get("notes", [])]
    trained = [result for result in done if result["images"]]
    for hardware in dict.fromkeys(result["hardware"] for result in trained):
        here = [result for result in trained if result["hardware"] == hardware]
        seconds, images = [result["seconds"] for result in here], [result["images"] for result in here]
        rate = median(result["images_per_second"] for result in here)
        times = " to ".join(dict.fromkeys(duration(f(seconds)) for f in (min, max)))
        lines.append(
            f"- {len(here)} training{'s' * (len(here) > 1)} on {hardware}, {_range(images)} images each in {times} "
            f"({rate:,.0f} images/s, the median), {duration(sum(seconds))} in all."
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
    """Every finished run with its time and its command."""
    lines = ["## Runs", ""]
    for run in runs:
        if (result := results.get(run.name)) is not None:
            training = f"{duration(result['seconds'])} of training, " if result["images"] else ""
            evaluation = f"{duration(result['evaluation_seconds'])} of evaluation"
            lines += [
                f"- `{run.name}` ({training}{evaluation}; {result['finished']}):",
                f"  `{result['command']}`",
            ]
    return [*lines, ""]
