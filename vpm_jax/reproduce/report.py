"""The report of `reproduce`: report.md and report.json with their figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpm_jax import captions, cli, paper
from vpm_jax.data.datasets import TITLES
from vpm_jax.disk import make_folder, write_atomically
from vpm_jax.errors import UserError
from vpm_jax.reproduce import experiments, figures, tables
from vpm_jax.reproduce.experiments import EXHIBITS, METHODS, SCALES, Cell, Run
from vpm_jax.reproduce.tables import Results, Row


def write_report(
    output: Path,
    names: Sequence[str],
    cells: Mapping[Cell, Run],
    results: Results,
    unfinished: Mapping[str, str],
    command: str,
    workdirs: Path,
) -> None:
    """Writes report.md, report.json and their figures into `output`.

    `names` are keys of EXHIBITS, or the title of a report on ingredients; `unfinished` is {run name: reason}.
    """
    make_folder(output)
    runs = experiments.distinct(cells.values())
    first = runs[0]
    variant = f", variant {first.variant}" * bool(first.variant)
    heading = ", ".join(name[0].upper() + name[1:] for name in names)
    conditions = tables.conditions(runs, results)
    data: dict[str, Any] = {
        "command": command,
        "conditions": [line.removeprefix("- ") for line in conditions],
        "spread": tables.SPREAD,
    }
    if EXHIBITS.keys() >= set(names):
        data["exhibits"], body = {}, []
        for name in names:
            data["exhibits"][name], lines = exhibit(output, name, cells, results, workdirs)
            body += lines
    else:
        data["parts"], body = ingredients(output, cells, results)
    lines = [
        f"# {heading}: {TITLES[first.dataset]}, scale {first.scale}{variant}",
        "",
        f"    {command}",
        "",
        f"- Recipe {first.config.recipe}: `{experiments.config_file(first.scale, first.dataset)}`{changes(first)}.",
        *conditions,
        *absent(unfinished),
        "",
        *body,
        *tables.listing(runs, results),
    ]
    write_atomically(output / "report.md", "\n".join(lines).rstrip() + "\n")
    write_atomically(output / "report.json", json.dumps(data, indent=1) + "\n")


def absent(unfinished: Mapping[str, str]) -> list[str]:
    """One line for each reason why runs are not in the report."""
    lines = []
    for reason in dict.fromkeys(unfinished.values()):
        names = [name for name, other in unfinished.items() if other == reason]
        lines.append(f"- Not in this report: {', '.join(names)}{': each' * (len(names) > 1)} {reason.rstrip('.')}.")
    return lines


def exhibit(
    output: Path, name: str, cells: Mapping[Cell, Run], results: Results, workdirs: Path
) -> tuple[dict[str, Any], list[str]]:
    """The data and the report's lines of a table or figure of the paper; writes its figures."""
    title, methods, tests, shaded, shows_maps, differing = EXHIBITS[name]
    stem, run = name.replace(" ", "-"), next(iter(cells.values()))
    rows = tables.rows(name, cells, results)
    data, lines = {"sweep": rows}, [f"## {title}", ""]
    if rows:
        lines += tables.sweep(rows)
        seeds = captions.count_seeds([len(row["seeds"]) for row in rows])
        done = tables.about(run, results[rows[0]["runs"][0]])
        figure_title = captions.title(done, seeds)
        if differing and len(rows) > 1:
            figures.differences(output / f"{stem}.png", rows, figure_title)
        else:
            figures.gamma_curves(output / f"{stem}.png", rows, figure_title, done["chance_rank1"], shaded)
        lines += [f"![{title}]({stem}.png)", ""]
    for test in tests:
        if rows := tables.rows(name, cells, results, test):
            data[test] = rows
            lines += tables.partial(rows, test)
    if shows_maps:
        lines += region_maps(output, stem, [run for cell, run in cells.items() if cell.method in methods], workdirs)
    return data, lines


def ingredients(output: Path, cells: Mapping[Cell, Run], results: Results) -> tuple[list[Row], list[str]]:
    """The data and the report's lines about the gain of each ingredient; writes the figure."""
    rows, (base, run) = tables.gains(cells, results), next(iter(cells.items()))
    lines = ["## Gain of each ingredient", "", *tables.ingredients(rows, base.method)]
    gained = [row for row in rows if "gain" in row]
    if len(gained) > 1:
        seeds = captions.count_seeds([len(row["seeds"]) for row in gained])
        done = tables.about(run, results[rows[0]["runs"][0]])
        title = f"Gains over {paper.title(paper.method_of(run.config))}, mean over gammas"
        figures.gains(output / "parts.png", rows, f"{title}\n{captions.title(done, seeds)}")
        lines += ["![Gain of each ingredient](parts.png)", ""]
    return rows, lines


def region_maps(output: Path, stem: str, runs: Sequence[Run], workdirs: Path) -> list[str]:
    """Draws the region maps of each trained run of seed 0; returns the report's lines."""
    lines = []
    for run in (run for run in experiments.distinct(runs) if run.seed == 0 and run.of is None):
        file = f"{stem}-{run.method}.png"
        try:
            figures.region_maps(output / file, workdirs / run.name)
            text = "synthetic pedestrians, each cell in the color of its most probable region"
            lines += [f"Region maps of `{run.name}`: {text}.", "", f"![{run.name}]({file})", ""]
        except UserError as error:
            lines += [f"Region maps of `{run.name}` are not shown: {error}", ""]
    return lines


def changes(run: Run) -> str:
    """The keys of all runs that differ from the scale's config file, as text."""
    plain = cli.load_config(experiments.config_file(run.scale, run.dataset))
    keys = {"data.name": run.dataset} if plain.data.name != run.dataset else {}
    keys |= SCALES[run.scale].changes
    keys |= {key: value for key, value in run.changes.items() if key not in METHODS[run.method].changes}
    listed = ", ".join(f"{key} = {value}" for key, value in keys.items())
    return f" with {listed}" if listed else ""
