"""Markdown tables of our results beside published ones, in percent."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vpm_jax import paper
from vpm_jax.metrics import rank_k
from vpm_jax.paper import Scores

Result = Mapping[str, Any]  # {"cmc": [ranks], entry k - 1 the rank-k accuracy, "mAP": float, ...} in [0, 1]
Measured = tuple[float | None, float | None]  # mean and standard deviation over seeds, in percent


def measured(result: Result, metric: str) -> float | None:
    """A metric in percent: "R-k" or a key of the result; None if it was not measured."""
    if not metric.startswith("R-"):
        return 100 * float(result[metric]) if metric in result else None
    return 100 * rank_k(result["cmc"], int(metric.removeprefix("R-")))


def number(mean: float | None, std: float | None = None) -> str:
    if mean is None:
        return "–"
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"


def difference(ours: float | None, theirs: float | None) -> str:
    """Ours minus theirs, from the rounded number so that it agrees with the printed columns."""
    return "–" if ours is None or theirs is None else f"{round(ours, 1) - theirs:+.1f}"


def table(cells: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table and a blank line; the first row is the header, the first column is text."""
    header, *body = ["| " + " | ".join(row) + " |" for row in cells]
    return [header, "|---|" + "---:|" * (len(cells[0]) - 1), *body, ""]


def gamma_table(results: Mapping[float, Result]) -> str:
    """The results of `metrics.rank_metrics` for every gamma (kept area ratio)."""
    names = ("R-1", "R-5", "R-10", "mAP", "mINP")
    rows = [[f"{gamma:g}", *(number(measured(results[gamma], name)) for name in names)] for gamma in sorted(results)]
    return "\n".join(table([("gamma", *names), *rows]))


def by_gamma(
    ours: Mapping[float, Mapping[str, Measured]],
    theirs: Mapping[float, Scores],
    metrics: Sequence[str],
    misprints: Sequence[tuple[float, str]] = (),
    reproduction: Mapping[float, Scores] | None = None,
) -> list[str]:
    """A table with one row per gamma; per metric our number, the paper's, the difference, and the reproduction's.

    Args:
      ours: {gamma: {metric: (mean, standard deviation)}}.
      theirs: {gamma: {metric: percentage}}, as far as published.
      metrics: the columns.
      misprints: (gamma, metric) of published numbers that are marked and not subtracted.
      reproduction: as `theirs`; None for no such column.
    """
    header = ["gamma"]
    for metric in metrics:
        header += [f"{metric} ours", "paper", "difference"] + ["reproduction"] * (reproduction is not None)
    rows = [header]
    for gamma in sorted(ours):
        row = [f"{gamma:g}"]
        for metric in metrics:
            mean, std = ours[gamma][metric]
            published = theirs.get(gamma, {}).get(metric)
            row += [number(mean, std), number(published), difference(mean, published)]
            if (gamma, metric) in misprints:
                row[-2:] = [f"{published}*", "–"]
            if reproduction is not None:
                row.append(number(reproduction.get(gamma, {}).get(metric)))
        rows.append(row)
    return table(rows)


def sweep(results: Mapping[float, Result], dataset: str, method: str) -> str:
    """One model over gamma beside the paper's and the reproduction's numbers, with a heading and notes.

    The caller makes sure that ours follow the paper's protocol.

    Args:
      results: {gamma: `vpm_jax.metrics.rank_metrics`}.
      dataset: "market1501" or "dukemtmc".
      method: a row of a table: "VPM", "baseline", "PCB", "MVPM-1", ...

    Returns:
      Markdown that ends in a newline; "" if the paper reports nothing for this method, dataset, and these gammas.
    """
    theirs = paper.published(dataset, method)
    if theirs is None or not any(gamma in theirs.scores for gamma in results):
        return ""
    metrics, reproduction = ("R-1", "mAP"), paper.published(dataset, method, paper.REPRODUCTION)
    ours = {gamma: {m: (measured(result, m), None) for m in metrics} for gamma, result in results.items()}
    misprints = [(gamma, m) for gamma in ours for m in metrics if theirs.misprinted(gamma, m)]
    source = theirs.source
    lines = [
        f"{paper.title(method)} on {dataset} beside the paper's {source.name}, in percent. Protocol: "
        f"{source.protocol}.",
        "",
        *by_gamma(ours, theirs.scores, metrics, misprints, reproduction.scores if reproduction else None),
    ]
    for gamma, metric in misprints:
        lines += [f"\\* {theirs.scores[gamma][metric]} is a misprint in the paper (it repeats the R-10 beside it).", ""]
    if reproduction:
        lines += [f"Reproduction: {reproduction.source.reference}.", ""]
    return "\n".join(lines)


def partial(ours: Mapping[str, Result], dataset: str, published: bool = True) -> str:
    """Our results on a partial dataset above all `published` ones, as a Markdown table.

    Args:
      ours: {protocol: result, with or without "mAP"}; differences are those of the first.
      dataset: "partial_reid" or "partial_ilids".
    """
    metrics, compared = ("R-1", "R-3", "R-5", "mAP"), ("R-1", "R-3") if published else ()
    rows = [["", *metrics, *(f"difference in {metric}" for metric in compared)]]
    for protocol, result in ours.items():
        rows.append([f"**ours, {protocol}**", *(number(measured(result, metric)) for metric in metrics)])
        rows[-1] += [""] * len(compared)
    first = next(iter(ours.values()))
    for row in paper.PUBLISHED if published else ():
        if row.dataset == dataset:
            theirs = row.scores[1.0]
            differences = [difference(measured(first, m), theirs.get(m)) for m in compared]
            rows.append([f"{row.method}, {row.source.name}", *(number(theirs.get(m)) for m in metrics), *differences])
    return "\n".join(table(rows))
