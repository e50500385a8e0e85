"""The tables of `reproduce`: results of runs beside the paper's numbers, in Markdown and as data."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean, median, stdev
from typing import Any

from vpm_jax import captions, comparison, paper
from vpm_jax.data.datasets import TITLES
from vpm_jax.progress import duration
from vpm_jax.reproduce.experiments import EXHIBITS, METHODS, Cell, Run, differences

METRICS = ("R-1", "R-5", "R-10", "mAP", "mINP")
PARTIAL_METRICS = ("R-1", "R-3", "R-5", "mAP")
GAINED = ("R-1", "mAP")
SPREAD = "± is the sample standard deviation over the seeds"

Results = Mapping[str, Mapping[str, Any]]  # {run name: result}
Row = dict[str, Any]  # of report.json: the numbers of one method


def numbers(result: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """{gamma, or protocol of a partial dataset: {"cmc", "mAP", ...}} of a result."""
    return result.get("gammas") or result["protocols"]


def summary(values: Sequence[float], published: float | None = None) -> dict[str, Any]:
    """Statistics of a metric over seeds, in percent; "std" is the sample standard deviation, None for one seed."""
    statistics: dict[str, Any] = {
        "mean": mean(values),
        "std": stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
        "values": list(values),
    }
    if published is not None:
        statistics |= {"paper": published, "difference": mean(values) - published}
    return statistics


def _finished(cells: Mapping[Cell, Run], results: Results, method: str, test: str = "") -> dict[int, Run]:
    """{seed: run} of a method's finished runs."""
    return {c.seed: run for c, run in cells.items() if (c.method, c.test) == (method, test) and run.name in results}


def _row(
    method: str,
    title: str,
    runs: Mapping[int, Run],
    results: Results,
    metrics: Sequence[str],
    published: paper.Published | None = None,
) -> Row:
    """The `summary` of every metric that was measured, at every gamma or for every protocol."""
    tables, is_partial = [numbers(results[run.name]) for run in runs.values()], any(run.test for run in runs.values())
    scores: dict[str, dict[str, Any]] = {}
    for key in tables[0]:
        gamma = 1.0 if is_partial else float(key)
        scores[key] = {}
        for metric in metrics:
            values = [v for table in tables if (v := comparison.measured(table[key], metric)) is not None]
            if values:
                scores[key][metric] = summary(values, published.score(gamma, metric) if published else None)
    return {
        "method": method,
        "title": title,
        "seeds": list(runs),
        "runs": [run.name for run in runs.values()],
        "numbers": scores,
    }


def rows(exhibit: str, cells: Mapping[Cell, Run], results: Results, test: str = "") -> list[Row]:
    """One row for each method of an exhibit that has a finished run.

    Args:
      exhibit: a key of EXHIBITS.
      cells: from `experiments.plan`.
      results: {run name: result}.
      test: a partial dataset; "": the sweep over gamma on the dataset's own test set.
    """
    table = []
    for method in EXHIBITS[exhibit].methods:
        if runs := _finished(cells, results, method, test):
            run = next(iter(runs.values()))
            published = _published(run, results[run.name], METHODS[method].published)
            metrics = PARTIAL_METRICS if test else METRICS
            row = _row(method, METHODS[method].title, runs, results, metrics, published)
            table.append(row | {"compared with": published.source.name if published else None})
    return table


def about(run: Run, result: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a result for `captions`, with what earlier versions did not store."""
    test, held_out = run.test or run.dataset, 0 if run.test else run.config.data.holdout_identities
    known = {
        "held_out_identities": held_out,
        "not_comparable": captions.departures(run.config, test, held_out),
        "network": captions.network(run.config),
    }
    return known | dict(result) | {"dataset": test}


def _published(run: Run, result: Mapping[str, Any], method: str) -> paper.Published | None:
    """The paper's numbers of a method, if the result follows the paper's protocol."""
    record = about(run, result)
    return None if record["not_comparable"] else paper.published(record["dataset"], method)


def gains(cells: Mapping[Cell, Run], results: Results) -> list[Row]:
    """One row for each ingredient: its keys, its numbers, and its gain over the base at equal seeds, mean over gamma.

    The base, the first method of the plan, comes first, the others by decreasing gain in mAP. A row covers the seeds
    that the base has finished too; if there are none, it covers all its seeds and has no gain.

    Args:
      cells: from `experiments.plan_ingredients`.
      results: {run name: result}.
    """
    base = next(iter(cells)).method
    base_runs = _finished(cells, results, base)
    base_row = _row(base, base, base_runs, results, GAINED) if base_runs else None
    table = []
    for method in dict.fromkeys(cell.method for cell in cells):
        runs = _finished(cells, results, method)
        if not runs:
            continue
        paired = {seed: run for seed, run in runs.items() if seed in base_runs}
        row = _row(method, method, paired or runs, results, GAINED)
        seed, run = next(iter(runs.items()))
        row["changes"] = differences(cells[Cell(base, "", seed)].config, run.config)
        if base_row and paired and method != base:
            row["gain"] = {
                metric: summary([_mean(row, seed, metric) - _mean(base_row, seed, metric) for seed in paired])
                for metric in GAINED
            }
        table.append(row)

    def rank(row: Row) -> float:
        return -math.inf if row["method"] == base else -row["gain"]["mAP"]["mean"] if "gain" in row else math.inf

    return sorted(table, key=rank)


def _mean(row: Row, seed: int, metric: str) -> float:
    """A metric of one seed in percent, averaged over gamma."""
    return mean(values[metric]["values"][row["seeds"].index(seed)] for values in row["numbers"].values())


# ---- Markdown ----


def sweep(rows: Sequence[Row]) -> list[str]:
    """All methods over gamma, the lead of the first one, and each method beside the paper."""
    gammas = list(dict.fromkeys(gamma for row in rows for gamma in row["numbers"]))
    lines = [f"Rank-1 / mAP in percent at each gamma{_over_seeds(rows)}.", ""]
    table = [["method", "seeds", *gammas]]
    for row in rows:
        table.append([row["title"], str(len(row["seeds"])), *(_pair(row["numbers"].get(gamma)) for gamma in gammas)])
    lines += comparison.table(table)
    if len(rows) > 1:
        first = rows[0]
        lines += [f"Rank-1 / mAP of {first['title']} minus those of the others:", ""]
        table = [["method", *gammas]]
        for row in rows[1:]:
            cells = [row["title"]]
            for gamma in gammas:
                ours, others = first["numbers"].get(gamma), row["numbers"].get(gamma)
                leads = [ours[m]["mean"] - others[m]["mean"] for m in GAINED] if ours and others else []
                cells.append(" / ".join(f"{lead:+.1f}" for lead in leads) or "–")
            table.append(cells)
        lines += comparison.table(table)
    for row in rows:
        lines += _beside_the_paper(row)
    return lines


def _beside_the_paper(row: Row) -> list[str]:
    theirs = {
        float(gamma): {metric: value["paper"] for metric, value in values.items() if "paper" in value}
        for gamma, values in row["numbers"].items()
    }
    metrics = [metric for metric in METRICS if any(metric in scores for scores in theirs.values())]
    if not metrics:
        return []
    ours = {
        float(gamma): {metric: (values[metric]["mean"], values[metric]["std"]) for metric in metrics}
        for gamma, values in row["numbers"].items()
        if theirs[float(gamma)]
    }
    title = f"Beside the paper's {row['compared with']}: {row['title']}"
    return [title, "", *comparison.by_gamma(ours, theirs, metrics)]


def ingredients(rows: Sequence[Row], base: str) -> list[str]:
    """The table of `gains` over the ingredient `base`."""
    if not rows:
        return ["None has finished.", ""]
    gammas = list(rows[0]["numbers"])
    brackets = "; in brackets the range over seeds" if max(len(row["seeds"]) for row in rows) > 1 else ""
    lines = [
        f"Rank-1 / mAP in percent at each gamma{_over_seeds(rows)}. The gain is over {base} at equal seeds, averaged "
        f"over gamma{brackets}.",
        "",
    ]
    table = [["ingredient", "keys", "seeds", *gammas, "gain in R-1", "gain in mAP"]]
    for row in rows:
        keys = ", ".join(f"`{key}={value}`" for key, value in row["changes"].items())
        cells = [row["title"], keys or "–", str(len(row["seeds"])), *(_pair(row["numbers"][g]) for g in gammas)]
        for metric in GAINED:
            gain = row.get("gain", {}).get(metric)
            extremes = f" ({gain['min']:+.1f} to {gain['max']:+.1f})" if gain and len(gain["values"]) > 1 else ""
            cells.append(f"{gain['mean']:+.1f}{extremes}" if gain else "–")
        table.append(cells)
    return [*lines, *comparison.table(table)]


def partial(rows: Sequence[Row], test: str) -> list[str]:
    """The table of a partial dataset: for each protocol the methods beside the paper's numbers."""
    lines = [f"### {TITLES[test]}", "", f"In percent{_over_seeds(rows)}.", ""]
    all_scores = [scores for row in rows for scores in row["numbers"].values()]
    metrics = [m for m in PARTIAL_METRICS if any(m in scores for scores in all_scores)]
    published = [m for m in metrics if any("paper" in scores.get(m, {}) for scores in all_scores)]
    header = ["method", "protocol", "seeds"]
    for metric in metrics:
        header += [metric, *(["paper", "difference"] if metric in published else [])]
    table = [header]
    for row in rows:
        for protocol, scores in row["numbers"].items():
            cells = [row["title"], protocol, str(len(row["seeds"]))]
            for metric in metrics:
                score = scores.get(metric, {"mean": None, "std": None})
                cells.append(comparison.number(score["mean"], score["std"]))
                if metric in published:
                    theirs = score.get("paper")
                    cells += [comparison.number(theirs), comparison.difference(score["mean"], theirs)]
            table.append(cells)
    return [*lines, *comparison.table(table)]


def _over_seeds(rows: Sequence[Row]) -> str:
    return f"; mean over seeds, {SPREAD}" if max(len(row["seeds"]) for row in rows) > 1 else ""


def _pair(scores: Mapping[str, Any] | None) -> str:
    """Rank-1 / mAP."""
    return " / ".join(comparison.number(scores[m]["mean"], scores[m]["std"]) for m in GAINED) if scores else "–"


# ---- How the numbers were measured ----


def conditions(runs: Sequence[Run], results: Results) -> list[str]:
    """Protocol, chance, training size, hardware, time, and versions."""
    done = [about(run, results[run.name]) for run in runs if run.name in results]
    lines = []
    for result in {result["dataset"]: result for result in reversed(done)}.values():
        test = result["dataset"]
        alike = [other for other in done if other["dataset"] == test]
        sentences = [
            *captions.protocol(result | {"match": {}}),
            *_by_method(alike, lambda r: [f"Matching: {captions.matching(r['match'])}."]),
            f"Chance: rank-1 {result['chance_rank1']:.2%}.",
            *_by_method(alike, lambda r: captions.comparability(r["not_comparable"])),
        ]
        lines.append(f"- On {captions.test_set(test, result['held_out_identities'])}. {' '.join(sentences)}")
        lines += [f"- {TITLES[test]}: {note}" for note in result.get("notes", [])]
    trained = [result for result in done if result["images"]]
    for hardware in dict.fromkeys(result["hardware"] for result in trained):
        group = [result for result in trained if result["hardware"] == hardware]
        seconds, images = [result["seconds"] for result in group], [result["images"] for result in group]
        rate = median(result["images_per_second"] for result in group)
        times = " to ".join(dict.fromkeys(duration(f(seconds)) for f in (min, max)))
        counts = " to ".join(dict.fromkeys(f"{f(images):,.0f}" for f in (min, max)))
        lines.append(
            f"- {len(group)} training run{'s' * (len(group) > 1)} on {hardware}, {counts} images each in {times} "
            f"(median {rate:,.0f} images/s), {duration(sum(seconds))} in total."
        )
    lines += [f"- Versions: {versions}." for versions in dict.fromkeys(result["versions"] for result in done)]
    commits = sorted({str(result["commit"]) for result in done} - {"None"})
    if commits:
        lines.append(f"- Commit{'s' * (len(commits) > 1)} {', '.join(commits)}.")
    return lines


def _by_method(results: Sequence[Mapping[str, Any]], words: Callable[[Mapping[str, Any]], list[str]]) -> list[str]:
    """The sentences about results; where they differ between methods, each after its methods."""
    methods: dict[str, dict[str, None]] = {}
    for result in results:
        for sentence in words(result):
            methods.setdefault(sentence, {})[result["method"]] = None
    everyone = {result["method"] for result in results}
    return [
        sentence if names.keys() == everyone else f"{', '.join(names)}: {sentence}"
        for sentence, names in methods.items()
    ]


def listing(runs: Sequence[Run], results: Results) -> list[str]:
    """The finished runs with their times and commands."""
    lines = ["## Runs", ""]
    for run in runs:
        if (result := results.get(run.name)) is not None:
            training = f"{duration(result['seconds'])} of training, " if result["images"] else ""
            evaluation = f"{duration(result['evaluation_seconds'])} of evaluation"
            lines += [f"- `{run.name}` ({training}{evaluation}; {result['finished']}):", f"  `{result['command']}`"]
    return [*lines, ""]
