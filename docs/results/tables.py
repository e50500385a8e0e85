"""Rewrites the tables of README.md and of docs from the results committed beside this file.

    python docs/results/tables.py

In these pages, the lines between <!-- table: NAME --> and <!-- end --> are the table NAME of TABLES. To add a row, add
one entry: the name of its runs in `runs/` without their seed, or a folder here with the evaluation.json of a run.
An entry without results is left out, so it may be listed before its run has finished. `elsewhere/`, `distractors/` and
`search/` have the figures of these sections of `python -m vpm_jax.benchmark`, each by `--json FILE`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from vpm_jax import paper
from vpm_jax.benchmark.report import number as benchmark_number
from vpm_jax.comparison import measured, number, table

RESULTS = Path(__file__).parent
PAGES = (
    RESULTS.parent.parent / "README.md",
    RESULTS / "README.md",
    RESULTS / "benchmark.md",
    RESULTS / "search.md",
    RESULTS / "vectors.md",
    RESULTS / "onnx.md",
    RESULTS / "tracking.md",
    RESULTS / "gpu" / "README.md",
    RESULTS.parent / "scaling.md",
)
# Datasets of partial images: columns where a run of the table was evaluated on them. All-shot, R-1 / R-3 as published.
PARTIAL = {"partial_reid": "Partial-REID", "partial_ilids": "Partial-iLIDS"}
PAPER = "the paper"


class Row(NamedTuple):
    title: str
    source: str  # the name of runs without their seed, a folder here, or PAPER
    seed: str = "*"


class Gains(NamedTuple):
    """Changes to a recipe by name, each trained with the seeds of the recipe's own run `base`."""

    base: str
    changes: str


class Benchmarks(NamedTuple):
    """Figures of `python -m vpm_jax.benchmark ... --json FILE` by title: files here, without their suffix. What
    follows a # begins the names of the figures."""

    files: Mapping[str, str]
    figures: Mapping[str, str]  # {title: name in the file}


class Vectors(NamedTuple):
    """What `python docs/results/vectors.py` measured, by title: (file in the folder vectors, gamma)."""

    files: Mapping[str, tuple[str, str]]
    recall: bool = False  # of candidates, instead of accuracy


class Figures(NamedTuple):
    """All figures of a benchmark's file here, without its suffix."""

    file: str


class Steps(NamedTuple):
    """The training step as launch/short_lease timed it, by title: files here, without their suffix."""

    files: Mapping[str, str]


class Written(NamedTuple):
    """The table in a JSON file that a script beside this one wrote; files that a * stands for are one table."""

    file: str  # without its suffix


_COUNTED = {
    "memory, GiB": "memory of a device",
    "GB moved": "bytes of a device",
    "kernels": "kernels",
    "collectives": "collectives",
    "MB in them": "bytes of collectives",
}
_MODELLED = {
    "moving bytes, ms": "  moving bytes",
    "computing, ms": "  computing",
    "launching, ms": "  launching kernels",
    "collectives, ms": "  collectives",
    "images/s": "rate, modelled",
    "cores to load": "cores that load as fast",
}
_PIECES = (
    "max pooling, windows",
    "max pooling, XLA's own",
    "stem, 7x7",
    "stem, space to depth",
    "dropout of T, threefry",
    "dropout of T, rbg",
    "Eq. 3, highest precision",
    "Eq. 3, default precision",
    "top 10 of 256 x 65,536",
)
_SMALL, _FAST, _SCREEN = "market1501-small", "market1501-fast", "market1501-fast_screen"
_ABLATIONS = (
    ("VPM", "vpm"),
    ("VPM (no triplet)", "vpm-notriplet"),
    ("MVPM-1: every region counts in matching", "mvpm-1"),
    ("MVPM-2: no visible set in the triplet loss", "mvpm-2"),
    ("MVPM-3: none in the identity loss", "mvpm-3"),
    ("MVPM-4: in neither", "mvpm-4"),
)

_MARKET = {f"gamma {gamma}": ("market1501", str(gamma)) for gamma in (0.5, 0.6, 0.7, 0.8, 0.9)}
_MARKET["whole"] = ("market1501", "1.0")
TABLES: Mapping[str, tuple[Row, ...] | Gains | Benchmarks | Vectors | Written] = {
    "vectors": Vectors(_MARKET | {"Partial-REID": ("partial_reid", "1.0"), "Partial-iLIDS": ("partial_ilids", "1.0")}),
    "recall": Vectors({title: _MARKET[title] for title in ("gamma 0.5", "whole")}, recall=True),
    "million": Written("search/recall"),
    "stages": Benchmarks(
        {
            "1,000,000 x 6 x 256": "search/million",
            "100,000 x 6 x 2,048": "search/wide",
            "1,000,000 x 6 x 2,048": "search/largest",
        },
        {
            "exact, s": "search: 16 queries",
            "two stages, s": "search in two stages: 1,000 candidates by 252 numbers per image",
        },
    ),
    "counted": Benchmarks(
        {
            "H200, 64 images, before": "elsewhere/before-h200-64",
            "H200, 64 images": "elsewhere/h200-64",
            "H200, 256 images, before": "elsewhere/before-h200-256",
            "H200, 256 images": "elsewhere/h200-256",
            "8 x H200, 512 images, before": "elsewhere/before-h200x8-512",
            "8 x H200, 512 images": "elsewhere/h200x8-512",
            "4 x v5e, 256 images, before": "elsewhere/before-v5ex4-256",
            "4 x v5e, 256 images": "elsewhere/v5ex4-256",
            "16 x v5e, 1,024 images": "elsewhere/v5ex16-1024",
        },
        _COUNTED,
    ),
    "distractors": Benchmarks(
        {
            "3,368 queries at 2 gammas, 4 x 192": "distractors/small",
            "500 queries, 6 x 2,048": "distractors/large",
            "3,368 queries at 6 gammas, 6 x 2,048, 2,000 distractors": "distractors/all-queries",
        },
        {
            "seconds of CPU": "distractors: whole evaluation",
            "pairs/s": "distractors: pairs",
            "peak memory, GiB": "distractors: peak memory",
            "all features, GiB": "distractors: all features, never in memory",
            "all distances, GiB": "distractors: all distances, never in memory",
        },
    ),
    "distractor-files": Benchmarks(
        {"no distractors": "distractors/no-files", "500,000 distractors": "distractors/files"},
        {
            "seconds of CPU": "evaluation: CPU",
            "images/s": "evaluation: images",
            "peak memory, GiB": "evaluation: peak memory",
            "all features, GiB": "evaluation: all features, never in memory",
            "all distances, GiB": "evaluation: all distances, never in memory",
        },
    ),
    "modelled": Benchmarks(
        {
            "H200, 64 images": "elsewhere/h200-64",
            "H200, 256 images": "elsewhere/h200-256",
            "8 x H200, 512 images": "elsewhere/h200x8-512",
            "4 x v5e, 256 images": "elsewhere/v5ex4-256",
            "16 x v5e, 1,024 images": "elsewhere/v5ex16-1024",
        },
        _MODELLED,
    ),
    "pieces": Benchmarks(
        {piece: f"elsewhere/v5e-pieces#{piece}: " for piece in _PIECES},
        {"GB moved": "bytes", "million cycles": "cycles"},
    ),
    "tpu-step": Benchmarks(
        {"the step, before": "elsewhere/before-v5ex4-256", "the step": "elsewhere/v5ex4-256"},
        {"GB moved": "bytes of a device", "million cycles": "cycles, by the compiler"},
    ),
    "market": (
        Row("VPM, small network from scratch", f"{_SMALL}-vpm-again"),
        Row("global feature, small network, same training crops", f"{_SMALL}-baseline"),
        Row("PCB, small network, trained on whole images", f"{_SMALL}-pcb"),
        Row("VPM, ResNet-50, `configs/market_fast.py`, on two CPU cores", "market1501-fast"),
        Row("same model, gallery cropped too, saturated visibility", "market1501-fast-crops5"),
        Row("same model, re-ranked (k-reciprocal)", "market1501-fast-rerank"),
        Row("VPM, ResNet-50, `configs/market_fast.py:large`, 12 + 5 epochs, two CPU cores", f"{_FAST}-vpm-large_short"),
        Row("VPM, ResNet-50, `configs/market_fast.py:large`, on a GPU", f"{_FAST}-vpm-large"),
        Row("VPM, ResNet-50, `configs/market_released.py`, on a GPU", "market1501-released-vpm"),
        Row("VPM in the paper (ResNet-50, 384x128)", PAPER),
    ),
    "serve": Figures("serve"),
    "crops": Benchmarks(
        {
            f"{network}, {cores}": f"tracking/{file}-{count}"
            for network, file in (("ResNet-18 of width 24, 128x64", "small"), ("ResNet-50, 256x128", "resnet50"))
            for count, cores in ((1, "one core"), (2, "two cores"))
        },
        {
            f"{title}, {people} people": figure.format(people)
            for people in (8, 64)
            for title, figure in (
                ("encoder", "tracking: {} people in a frame"),
                ("network alone", "tracking: network alone, {} crops"),
            )
        },
    ),
    "synthetic": (
        Row("VPM", "synthetic-vpm"),
        Row("global feature, same training crops", "synthetic-baseline"),
        Row("PCB, trained on whole images", "synthetic-pcb"),
    ),
    "small": (
        Row("VPM", f"{_SMALL}-vpm"),
        Row("global feature", f"{_SMALL}-baseline"),
        Row("PCB", f"{_SMALL}-pcb"),
    ),
    "pretrained": (
        Row("ResNet-50 from ImageNet weights, 800 steps", "market1501-pretrained"),
        Row("small network from scratch, 3,720 steps", f"{_SMALL}-vpm", "0"),
    ),
    "fast": (
        Row("`configs/market.py:pretrained`, 51,200 images", "market1501-pretrained"),
        Row("`configs/market_fast.py`, 92,160 images", "market1501-fast"),
        Row("the same model, gallery cropped too (0.5, 0.6, 0.7, 0.8, 0.9), saturated", "market1501-fast-crops5"),
        Row("the same model, gallery cropped too (0.5, 0.75), saturated", "market1501-fast-crops"),
        Row("the same model, re-ranked (k-reciprocal)", "market1501-fast-rerank"),
        Row("the recipe, after 61,440 images, evaluated at 128x64", "market1501-fast-960"),
        Row("`configs/market_fast.py:padded`, 92,160 images", "market1501-fast-padded"),
        Row("the same model, gallery cropped too (0.5, 0.75), saturated", "market1501-fast-padded-crops"),
        Row("padded, after 61,440 images, evaluated at 128x64", "market1501-fast-padded-960"),
        Row("`configs/market_fast.py:large`, 12 + 5 epochs, 87,040 images", f"{_FAST}-vpm-large_short"),
        Row("VPM in the paper (ResNet-50, 384x128)", PAPER),
    ),
    "fast-screen": (
        Row("the recipe", f"{_SCREEN}-vpm"),
        Row("saturated visibility", f"{_SCREEN}-saturated"),
        Row("flip test", f"{_SCREEN}-flip"),
        Row("gallery cropped too, saturated", f"{_SCREEN}-gallery_crops"),
        Row("re-ranked (k-reciprocal)", f"{_SCREEN}-reranked"),
        Row("padded, in training stretched at random", f"{_SCREEN}-padded_stretch"),
        Row("the same, gallery cropped too, saturated", f"{_SCREEN}-padded_stretch_gallery_crops"),
        Row("the recipe, seed 0 alone, as all below", f"{_SCREEN}-vpm", "0"),
        Row("BNNeck after the reduction to 256", f"{_SCREEN}-neck_reduced"),
        Row("the same, features after the neck", f"{_SCREEN}-neck_reduced_after"),
        Row("BNNeck without it", f"{_SCREEN}-neck"),
        Row("the same, features after the neck", f"{_SCREEN}-neck_after"),
        Row("random erasing", f"{_SCREEN}-erasing"),
        Row("label smoothing", f"{_SCREEN}-smoothing"),
        Row("averaged weights", f"{_SCREEN}-ema"),
        Row("locator from stage 3", f"{_SCREEN}-locator_stage3"),
        Row("padded, at the top", f"{_SCREEN}-padded"),
        Row("padded, averaged weights", f"{_SCREEN}-padded_ema"),
        Row("padded, saturated visibility", f"{_SCREEN}-padded_saturated"),
        Row("padded, flip test", f"{_SCREEN}-padded_flip"),
        Row("padded, gallery cropped too, saturated", f"{_SCREEN}-padded_gallery_crops"),
        Row("padded, at random places", f"{_SCREEN}-padded_random"),
    ),
    "tricks": Gains(
        "market1501-screen-vpm",
        "soft_hinge whole region_smoothing any neck_reduced pad smoothing deeper_crops locator_hidden soft_pairs "
        "erasing_small ema unnormalised bilateral jitter neck erasing",
    ),
    "proportions-small": (
        Row("stretched", f"{_SMALL}-vpm"),
        Row("stretched, trained again", f"{_SMALL}-vpm-again"),
        Row("stretched, gallery cropped too, saturated", f"{_SMALL}-gallery_crops_saturated"),
        Row("padded, at the top", f"{_SMALL}-fit_top"),
        Row("padded, at the top, gallery cropped too, saturated", f"{_SMALL}-fit_top_gallery_crops"),
        Row("padded, at random places", f"{_SMALL}-fit_random"),
        Row("padded, at the top, in training stretched at random", f"{_SMALL}-fit_top_stretch"),
        Row("the same, gallery cropped too, saturated", f"{_SMALL}-fit_top_stretch_gallery_crops"),
    ),
    "proportions": (
        Row("stretched", "market1501-screen-vpm"),
        Row("stretched, gallery cropped too, saturated", "market1501-screen-gallery_crops_saturated"),
        Row("padded, at the top", "market1501-screen-fit_top"),
        Row("padded, at the top, saturated", "market1501-screen-fit_top_saturated"),
        Row("padded, at the top, gallery cropped too, saturated", "market1501-screen-fit_top_gallery_crops"),
        Row("padded, at random places", "market1501-screen-fit_random"),
        Row("padded, at random places, saturated", "market1501-screen-fit_random_saturated"),
        Row("padded, at random places, gallery cropped too, saturated", "market1501-screen-fit_random_gallery_crops"),
        Row("padded, at the top, in training stretched at random", "market1501-screen-fit_top_stretch"),
        Row("the same, gallery cropped too, saturated", "market1501-screen-fit_top_stretch_gallery_crops"),
    ),
    "gallery-crops": (
        Row("Eq. 4", f"{_SMALL}-vpm"),
        Row("gallery cropped too, saturated visibility", f"{_SMALL}-gallery_crops_saturated"),
    ),
    "onnx-small": Written("onnx/synthetic"),
    "onnx-large": Written("onnx/market_fast"),
    "tracking": Written("tracking/figures"),
    "places": Written("places/*"),
    "global-feature": Written("global_feature"),
    "gpu-step": Steps(
        {
            "vpm_jax": "gpu/step",
            "PyTorch, compiled": "gpu/torch-compiled",
            "PyTorch": "gpu/torch-eager",
        }
    ),
    "longer": (
        Row("`configs/market_fast.py`, 92,160 images", f"{_FAST}-vpm-half"),
        Row("18 + 11 epochs, 148,480 images", f"{_FAST}-vpm-long"),
        Row("`configs/market_fast.py:large`, 148,480 images", f"{_FAST}-vpm-large"),
        Row("`configs/market_released.py`, 773,760 images", "market1501-released-vpm"),
        Row("VPM in the paper (ResNet-50, 384x128)", PAPER),
    ),
    "training-crops": (
        Row("ResNet-50, `configs/market_fast.py`, top", f"{_FAST}-vpm-half"),
        Row("ResNet-50, bottom", f"{_FAST}-vpm-bottom-half"),
        Row("ResNet-50, bilateral", f"{_FAST}-vpm-bilateral-half"),
        Row("ResNet-50, one global feature, top", f"{_FAST}-baseline-half"),
        Row("small network, top", f"{_SMALL}-vpm-again"),
        Row("small network, bottom", f"{_SMALL}-vpm-bottom"),
        Row("small network, bilateral", f"{_SMALL}-vpm-bilateral"),
    ),
    "multi-query": (
        Row("single query", "market1501-multi-query/single"),
        Row("multi-query", "market1501-multi-query/multi"),
    ),
    "ablations": tuple(Row(title, f"{_SMALL}-{method}", "0") for title, method in _ABLATIONS),
    "synthetic-ablations": tuple(Row(title, f"synthetic-{method}", "0") for title, method in _ABLATIONS),
}


def read(source: str, seed: str = "*", test: str = "") -> dict[int, dict[str, Any]]:
    """{seed: result} of a row's source, on another test set if one is named."""
    if (RESULTS / source / "evaluation.json").exists():
        files = [RESULTS / source / f"evaluation{f'-{test}' * bool(test)}.json"]
    else:
        files = sorted((RESULTS / "runs").glob(f"{source}{f'-on-{test}' * bool(test)}-seed{seed}.json"))
    results = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
    return {result["seed"]: result for result in results}


def scores(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """{gamma, or protocol on partial images: {"cmc", "mAP", ...}}."""
    return next(result[key] for key in ("gammas", "protocols", "results") if key in result)


def average(results: Iterable[Mapping[str, Any]], metric: str) -> float:
    """The mean of a metric, in percent."""
    values = [measured(result, metric) for result in results]
    return mean(value for value in values if value is not None)


def pair(results: list[Mapping[str, Any]], second: str) -> str:
    """Rank-1 / a second metric, means over the seeds."""
    return " / ".join(number(average(results, metric)) for metric in ("R-1", second))


def cells(row: Row) -> dict[str, str]:
    """{column: cell}, empty without results."""
    if row.source == PAPER:
        sweep = paper.published("market1501")
        assert sweep is not None
        found = {str(gamma): f"{s['R-1']} / {s['mAP']}" for gamma, s in sweep.scores.items()}
        for test, title in PARTIAL.items():
            on_partial = paper.published(test, "VPM (Top)")
            assert on_partial is not None
            found[title] = "{R-1} / {R-3}".format_map(on_partial.scores[1.0])
        return {"seeds": "–"} | found
    results = [scores(result) for result in read(row.source, row.seed).values()]
    if not results:
        return {}
    found = {gamma: pair([result[gamma] for result in results], "mAP") for gamma in results[0]}
    for test, title in PARTIAL.items():
        if partial := [scores(result)["all-shot"] for result in read(row.source, row.seed, test).values()]:
            found[title] = pair(partial, "R-3")
    return {"seeds": str(len(results))} | found


def sweep(rows: tuple[Row, ...]) -> list[str]:
    """Rank-1 / mAP by gamma, and rank-1 / rank-3 on partial images."""
    found = {row: kept for row in rows if (kept := cells(row))}
    columns = list(dict.fromkeys(c for row, kept in found.items() if row.source != PAPER for c in kept))
    titles = [f"{c}, R-1 / R-3" if c in PARTIAL.values() else c for c in columns]
    body = [[row.title, *(kept.get(column, "–") for column in columns)] for row, kept in found.items()]
    return table([["rank-1 / mAP at gamma", *titles], *body])


def gains(tried: Gains) -> list[str]:
    """The mean gain over the base with the same seed, of means over the gammas; most seeds first, then by mAP."""

    def level(result: Mapping[str, Any], metric: str) -> float:
        return average(scores(result).values(), metric)

    base, found = read(tried.base), []
    for name in tried.changes.split():
        runs = read(tried.base.replace("vpm", name))
        if not runs:
            continue
        keys = ", ".join(f"`{key}={value}`" for key, value in next(iter(runs.values()))["changes"].items())
        each = [[level(run, m) - level(base[seed], m) for seed, run in runs.items()] for m in ("R-1", "mAP")]
        row = [f"{name}: {keys}", str(len(runs))]
        for values in each:
            span = f" ({min(values):+.1f} to {max(values):+.1f})" if len(values) > 1 else ""
            row.append(f"{mean(values):+.1f}{span}")
        found.append((-len(runs), -mean(each[1]), row))
    header = ["change", "seeds", "gain in rank-1", "gain in mAP"]
    return table([header, *(row for _, _, row in sorted(found))])


def benchmarks(asked: Benchmarks) -> list[str]:
    """Figures of benchmarks, a row for each file."""
    body = []
    for title, name in asked.files.items():
        name, _, start = name.partition("#")
        file = RESULTS / f"{name}.json"
        if file.exists():
            figures = {row["name"]: row["value"] for row in json.loads(file.read_text(encoding="utf-8"))["rows"]}
            body.append([title, *(benchmark_number(figures[start + figure]) for figure in asked.figures.values())])
    return table([["", *asked.figures], *body])


def vectors(asked: Vectors) -> list[str]:
    """Rank-1 / mAP of each method, or the share of the nearest images among candidates, in percent."""
    columns: dict[str, dict[tuple[str, int], str]] = {}
    for title, (name, gamma) in asked.files.items():
        file = RESULTS / "vectors" / f"{name}.json"
        for row in json.loads(file.read_text(encoding="utf-8"))["gammas"][gamma] if file.exists() else ():
            found = {f"{title}, {size} candidates": 100 * share for size, share in row["recall"].items()}
            accuracy = {title: f"{100 * row['rank-1']:.1f} / {100 * row['mAP']:.1f}"}
            cells = {column: f"{share:.2f}" for column, share in found.items()} if asked.recall else accuracy
            for column, cell in cells.items():
                columns.setdefault(column, {})[row["method"], row["numbers"]] = cell
    rows = next(iter(columns.values()), {})
    body = [[method, f"{numbers:,}", *(x[method, numbers] for x in columns.values())] for method, numbers in rows]
    return table([["", "numbers per image", *columns], *body])


def figures(asked: Figures) -> list[str]:
    """All figures of a benchmark with their limits."""
    rows = json.loads((RESULTS / f"{asked.file}.json").read_text(encoding="utf-8"))["rows"]
    limits = ["" if row["limit"] is None else benchmark_number(row["limit"]) for row in rows]
    return table(
        [["", "measured", "unit", "limit", "the limit is"]]
        + [
            [row["name"], benchmark_number(row["value"]), row["unit"], limit, row["limit_is"]]
            for row, limit in zip(rows, limits, strict=True)
        ]
    )


def steps(asked: Steps) -> list[str]:
    """Milliseconds of a step (the fastest of three turns), images/s, and the time relative to the first row."""
    body: list[list[str]] = []
    first = 0.0
    for title, file in asked.files.items():
        facts = json.loads((RESULTS / f"{file}.json").read_text(encoding="utf-8"))
        first = first or min(facts["step_ms"])
        ratio = min(facts["step_ms"]) / first
        body.append([title, f"{min(facts['step_ms']):.1f}", f"{facts['images_per_second']:,.0f}", f"{ratio:.2f}"])
    return table([["", "ms", "images/s", "times as long"], *body])


def written(asked: Written) -> list[str]:
    """The table of a script's JSON; empty before it has run."""
    files = sorted(RESULTS.glob(f"{asked.file}.json"))
    tables = [json.loads(file.read_text(encoding="utf-8"))["table"] for file in files]
    return table([tables[0][0], *(row for rows in tables for row in rows[1:])]) if tables else []


def rewrite(text: str) -> str:
    """A page with its tables as the results are now."""

    def fill(match: re.Match[str]) -> str:
        asked = TABLES[match[1]]
        kinds = {
            Gains: gains,
            Benchmarks: benchmarks,
            Vectors: vectors,
            Figures: figures,
            Steps: steps,
            Written: written,
        }
        lines = kinds.get(type(asked), sweep)(asked)
        return "\n".join([f"<!-- table: {match[1]} -->", "", *lines, "<!-- end -->"])

    return re.sub(r"<!-- table: (\S+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


if __name__ == "__main__":
    for page in PAGES:
        before = page.read_text(encoding="utf-8")
        page.write_text(after := rewrite(before), encoding="utf-8")
        print(f"{page}: {'unchanged' if after == before else 'rewritten'}")
