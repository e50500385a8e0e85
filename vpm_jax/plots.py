"""Plots: rank-1 and mAP over gamma, differences and gains between methods, training curves.

Each function draws on its own `matplotlib.figure.Figure`, without pyplot state, so it is safe in threads. The file's
suffix selects the format (.png, .pdf, .svg).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter

# The Okabe-Ito palette, which is safe for color blindness; without yellow, which is too faint for lines.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
_LEGEND: Any = dict(frameon=False, fontsize=8, borderpad=0.2, handlelength=1.4, columnspacing=1.0, handletextpad=0.5)

_DASHED: Any = dict(linewidth=0.9, linestyle=(0, (4, 2)))
_PAPER = "Sun et al. (2019)"
_MIN_SEEDS = 3  # for a standard deviation; with fewer, each seed is drawn

# {method: {gamma: {"rank-1": ..., "mAP": ...}}}; each value is a number or a sequence with one number per seed
Curves = Mapping[str, Mapping[float, Mapping[str, float | Sequence[float]]]]


def gamma_curves(
    path: str | Path | IO[bytes],
    results: Curves,
    title: str,
    chance: float | None = None,
    *,
    published: Curves | None = None,
    shades: Sequence[str] = (),
) -> None:
    """Rank-1 and mAP of every method against gamma (the kept area ratio), side by side.

    Lines are means over seeds. Two seeds are also drawn as small markers; from three seeds on, a band shows the
    standard deviation.

    Args:
      path: the output file.
      results: as fractions in [0, 1].
      title: dataset and protocol.
      chance: the rank-1 of random rankings, drawn as a line.
      published: the paper's numbers in the same form, drawn as thin dashed lines in the method's color.
      shades: methods that differ in one number, in its order: drawn from light to dark instead of in distinct colors.
    """
    figure = Figure(figsize=(8.6, 3.9), layout="constrained")
    panels = figure.subplots(1, 2)
    colors = _method_colors(list(results), shades)
    legend: dict[str, Any] = {}
    notes: dict[str, Any] = {}  # legend entries that come last
    for axes, metric in zip(panels, ("rank-1", "mAP"), strict=True):
        for index, (name, by_gamma) in enumerate(results.items()):
            style: Any = dict(color=colors[name], marker=MARKERS[index % len(MARKERS)])
            legend[name] = Line2D([], [], markersize=5, linewidth=1.8, **style)
            gammas = sorted(by_gamma)
            seeds = np.array([np.atleast_1d(by_gamma[gamma][metric]) for gamma in gammas])  # [G, seeds]
            means = seeds.mean(axis=1)
            axes.plot(gammas, means, color=colors[name], linewidth=1.8, label=name)
            if 1 < seeds.shape[1] < _MIN_SEEDS:
                axes.plot(gammas, seeds, linestyle="none", markersize=3, **style)
                notes["each seed (line: mean)"] = Line2D([], [], color="0.3", marker="o", markersize=3, linewidth=0)
            else:
                axes.plot(gammas, means, linestyle="none", markersize=5, **style)
            if seeds.shape[1] >= _MIN_SEEDS:
                std = seeds.std(axis=1, ddof=1)
                axes.fill_between(gammas, means - std, means + std, color=colors[name], alpha=0.18, linewidth=0)
                notes["± standard deviation over seeds"] = Patch(color="0.3", alpha=0.18, linewidth=0)
            theirs = [(g, v[metric]) for g, v in sorted((published or {}).get(name, {}).items()) if metric in v]
            if len(theirs) > 1:
                axes.plot(*zip(*theirs, strict=True), color=colors[name], **_DASHED)
                notes[f"{_PAPER}, in the same color"] = Line2D([], [], color="0.3", **_DASHED)
        if chance is not None and metric == "rank-1":
            label = f"chance ({100 * chance:.2g}%)"
            legend[label] = axes.axhline(chance, color="0.45", linestyle=":", linewidth=1.2, label=label)
        axes.set_xlabel("gamma (kept area ratio)")
        axes.set_title(metric, fontsize=11)
        top = axes.dataLim.y1
        axes.set_ylim(-0.02 * top, 1.05 * top)  # keeps a chance line near zero off the axis
        axes.set_xticks(_apart(gamma for by_gamma in results.values() for gamma in by_gamma))
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g}%")
        _plain(axes)
    _legend_below(figure, legend | notes)
    figure.suptitle(title, fontsize=11)
    save(figure, path, dpi=160)


def _apart(gammas: Iterable[float]) -> list[float]:
    """The gammas to label: from the largest down, more than a tenth of the range apart."""
    kept: list[float] = []
    ordered = sorted(set(gammas), reverse=True)
    for gamma in ordered:
        if not kept or kept[-1] - gamma > 0.0999 * (ordered[0] - ordered[-1]):
            kept.append(gamma)
    return kept[::-1]


def differences(
    path: str | Path | IO[bytes],
    results: Curves,
    title: str,
    reference: str,
    published: Mapping[str, Mapping[float, Mapping[str, float]]] | None = None,
) -> None:
    """Differences between methods and a reference: at each gamma one bar per method, rank-1 above mAP.

    Bars are means over seeds, dots the seeds, lines their range; bars of a single seed are pale.

    Args:
      path: the output file.
      results: a method's number minus the reference's, in points.
      title: dataset and protocol.
      reference: its name.
      published: the paper's differences, marked on the bars.
    """
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    gammas = sorted({gamma for by_gamma in results.values() for gamma in by_gamma})
    width = 0.84 / max(len(results), 1)
    legend: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    panels = figure.subplots(2, 1, sharex=True)
    for axes, metric in zip(panels, ("rank-1", "mAP"), strict=True):
        for index, (name, by_gamma) in enumerate(results.items()):
            color = COLORS[1 + index % (len(COLORS) - 1)]  # the first color is the reference's
            for gamma, values in by_gamma.items():
                x, seeds = gammas.index(gamma) + (index - (len(results) - 1) / 2) * width, np.atleast_1d(values[metric])
                legend[name] = Patch(color=color)
                face = to_rgba(color, 0.3 if len(seeds) == 1 else 1.0)
                axes.bar(x, seeds.mean(), 0.86 * width, color=face, edgecolor=color, label=name)
                if len(seeds) > 1:
                    [dots] = axes.plot([x] * len(seeds), seeds, ".-", color="0.2", markersize=4, linewidth=0.9)
                    notes["each seed (bar: mean)"] = dots
                else:
                    notes["pale: one seed"] = Patch(facecolor="0.9", edgecolor="0.4")
                theirs = (published or {}).get(name, {}).get(gamma, {}).get(metric)
                if theirs is not None:
                    [mark] = axes.plot(x, theirs, "D", color="white", markeredgecolor="0.1", markersize=4)
                    notes[_PAPER] = mark
        line = axes.axhline(0.0, color=COLORS[0], linewidth=1.0)
        axes.set_ylabel(f"{metric}, points")
        _plain(axes)
        axes.grid(visible=False, axis="x")
    panels[-1].set_xticks(range(len(gammas)), [str(gamma) for gamma in gammas])
    panels[-1].set_xlabel("gamma (kept area ratio)")
    _legend_below(figure, {f"{reference} (zero)": line} | legend | notes)
    figure.suptitle(title, fontsize=11)
    save(figure, path, dpi=160)


def gains(path: str | Path | IO[bytes], gained: Mapping[str, Mapping[str, Sequence[float]]], title: str) -> None:
    """The gain of each ingredient of a recipe: one row per ingredient, one dot per seed.

    A bar shows the range of several seeds and a line their mean; the dot of a single seed is hollow.

    Args:
      path: the output file.
      gained: {ingredient: {"rank-1": [gain of each seed, in points], "mAP": [...]}}.
      title: of the figure.
    """
    figure = Figure(figsize=(7.2, 1.7 + 0.24 * len(gained)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    rows = np.arange(len(gained))
    for axes, metric, color in zip(panels, ("rank-1", "mAP"), COLORS, strict=False):
        axes.axvline(0.0, color="0.3", linewidth=0.9)
        for row, gain in zip(rows, gained.values(), strict=True):
            seeds = gain[metric]
            several = len(seeds) > 1
            if several:
                axes.barh(row, np.ptp(seeds), left=min(seeds), height=0.42, color=color, alpha=0.3)
                axes.vlines(np.mean(seeds), row - 0.32, row + 0.32, color=color, linewidth=1.8)
            fill = color if several else "white"
            axes.plot(seeds, [row] * len(seeds), "o", color=color, markerfacecolor=fill, markersize=3.8)
        axes.use_sticky_edges = False  # or the outermost bar ends at the frame
        axes.margins(x=0.05)
        axes.set_title(f"gain in {metric}, points", fontsize=9)
        _plain(axes)
        axes.grid(visible=False, axis="y")
    panels[0].set_yticks(rows, list(gained), fontsize=8)
    panels[0].set_ylim(len(gained) - 0.4, -0.6)
    dot: Any = dict(color="0.3", marker="o", markersize=3.8, linewidth=0)
    counts = {len(gain["rank-1"]) for gain in gained.values()}
    span = Patch(color="0.3", alpha=0.3, linewidth=0)
    mean = Line2D([], [], color="0.3", marker="|", markersize=9, markeredgewidth=1.8, linewidth=0)
    entries: dict[str, Any] = {"a seed": Line2D([], [], **dot)} if max(counts) > 1 else {}
    entries |= {"one seed only": Line2D([], [], markerfacecolor="white", **dot)} if 1 in counts else {}
    entries |= {"range of the seeds": span, "their mean": mean} if max(counts) > 1 else {}
    _legend_below(figure, entries)
    figure.suptitle(title, fontsize=10)
    save(figure, path, dpi=160)


def error_rates(path: str | Path | IO[bytes], gammas: Mapping[str, Mapping[str, Any]], title: str) -> None:
    """ROC and DET curves, error rates over the threshold, and a histogram of the distances of pairs, from
    `thresholds.measure`: one color per gamma."""
    figure = Figure(figsize=(15, 4.2), layout="constrained")
    roc, det, rates, distances = figure.subplots(1, 4)
    for number, (gamma, measured) in enumerate(gammas.items()):
        color = colormaps["viridis"](number / max(1, len(gammas)))
        curve = {name: np.array(values) for name, values in measured["curve"].items()}
        true, false = curve["true_match_rate"], curve["false_match_rate"]
        seen = false > 0
        label = f"gamma {float(gamma):g}"
        roc.plot(false[seen], true[seen], color=color, label=label)
        det.plot(false[seen], np.maximum(1 - true[seen], 1e-4), color=color, label=label)
        rates.plot(curve["distance"], 1 - true, color=color, label=label)
        rates.plot(curve["distance"], false, color=color, linestyle=_DASHED["linestyle"])
        for share, style in (true, "-"), (false, _DASHED["linestyle"]):
            density = np.diff(share, prepend=0) / np.diff(curve["distance"], prepend=0)
            distances.stairs(density, [0, *curve["distance"]], color=color, linestyle=style)
    roc.set(xscale="log", xlim=(1e-4, 1), ylim=(0, 1), xlabel="false match rate", ylabel="true match rate", title="ROC")
    det.set(xscale="log", yscale="log", xlim=(1e-4, 1), xlabel="false match rate", ylabel="false non-match rate")
    det.set(title="DET")
    rates.set(xlabel="threshold (distance)", ylim=(0, 1), title="rates over the threshold")
    rates.set_ylabel("false non-match (solid),\nfalse match (dashed)")
    distances.set(xlabel="distance", ylabel="density: same (solid),\ndifferent person (dashed)", title="pairs")
    for axes in (roc, det, rates, distances):
        axes.grid(alpha=0.3)
    roc.legend(**_LEGEND)
    figure.suptitle(title, fontsize=9)
    save(figure, path, 120)


def _legend_below(figure: Figure, entries: Mapping[str, Any]) -> None:
    columns = min(len(entries), 4)
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False, fontsize=9
    )


def save(figure: Figure, path: str | Path | IO[bytes], dpi: int) -> None:
    """Writes the figure; PDFs without a date, for reproducible files, and with TrueType fonts, as publishers ask."""
    metadata = {"CreationDate": None} if str(path).endswith(".pdf") else None
    with rc_context({"pdf.fonttype": 42}):
        figure.savefig(path, dpi=dpi, metadata=metadata)


def _method_colors(names: Sequence[str], shades: Sequence[str]) -> dict[str, Any]:
    """A color for each method: distinct ones, and light to dark for `shades`."""
    distinct = cycle(("0.45", *COLORS[1:]) if shades else COLORS)
    scale = iter(colormaps["viridis_r"](np.linspace(0.15, 0.95, len(shades))))
    return {name: next(scale if name in shades else distinct) for name in names}


def training_curves(path: str | Path | IO[bytes], metrics_jsonl_path: str | Path, title: str = "") -> None:
    """Losses, accuracies, learning rate and gradient norm over the steps of a run.

    Reads the JSON lines that training writes. Curves of missing keys are left out. If `accuracy_identity` lists one
    number per head, the mean and the range over heads are drawn.

    Raises:
      ValueError: if the file holds no line with a step.
    """
    lines = read_steps(Path(metrics_jsonl_path))
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    (losses, accuracies), (rate, gradient) = figure.subplots(2, 2, sharex=True)

    names = {
        "loss": "total (weighted)",
        "loss_region": "region",
        "loss_identity": "identity",
        "loss_triplet": "triplet",
    }
    # Losses of weight 0 do not count.
    weights = {key: key.replace("loss", "weight", 1) for key in names}
    counted = {key: {s: line for s, line in lines.items() if line.get(weights[key], 1)} for key in names}
    trained = {key for key in names if any(np.mean(value) > 0 for _, value in _values(counted[key], key))}
    for color, (key, label) in zip((COLORS[-1], *COLORS), names.items(), strict=False):
        if key in trained:
            _curve(losses, counted[key], key, label, color)
    losses.set_title("loss", fontsize=11, loc="left", pad=20)

    heads = [(step, np.ravel(value)) for step, value in _values(lines, "accuracy_identity")]
    if any(len(head) > 1 for _, head in heads):
        steps = [step for step, _ in heads]
        low, high = [head.min() for _, head in heads], [head.max() for _, head in heads]
        accuracies.fill_between(steps, low, high, color=COLORS[0], alpha=0.2, linewidth=0)
    _curve(accuracies, lines, "accuracy_identity", "identity (band: heads)", COLORS[0])
    if "loss_region" in trained:
        _curve(accuracies, lines, "accuracy_locator", "locator (cells)", COLORS[1])
    _curve(accuracies, lines, "comparable", "comparable", COLORS[2])
    accuracies.set_title("accuracy and shares", fontsize=11, loc="left", pad=20)
    accuracies.set_ylim(0, 1.02)
    accuracies.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

    _curve(rate, lines, "learning_rate", None, COLORS[0], smooth=False)
    rate.set_title("learning rate", fontsize=11, loc="left")
    _curve(gradient, lines, "grad_norm", None, COLORS[0])
    gradient.set_title("gradient norm", fontsize=11, loc="left")
    for axes in (losses, gradient):
        _log_scale(axes)
    for axes in (rate, gradient):
        axes.set_xlabel("step")
        axes.set_xlim(0, max(lines))
        axes.set_xticks(_round_steps(max(lines)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))

    stages = _values(lines, "stage")
    changes = [step for (_, before), (step, after) in pairwise(stages) if before != after]
    for axes in (losses, accuracies, rate, gradient):
        for step in changes:
            axes.axvline(step, color="0.6", linestyle=":", linewidth=1.2)
        _plain(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 0.99), ncols=4, **_LEGEND)
    notes = [f"{max(lines):,} steps"]
    notes += [f"{speed:,.0f} images/s (median)"] if (speed := median_speed(lines)) else []
    notes += ["dotted: next stage"] if changes else []
    figure.suptitle(f"{title}\n{', '.join(notes)}".strip(), fontsize=10)
    save(figure, path, dpi=140)


def _round_steps(last: int) -> list[float]:
    """Ticks at round numbers from 0, and at the last step."""
    ticks = MaxNLocator(6, steps=[1, 2, 5, 10], integer=True).tick_values(0, last)
    return [*(tick for tick in ticks if tick <= last - (ticks[1] - ticks[0]) / 2), last]


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _log_scale(axes: Axes) -> None:
    """A logarithmic y axis with ticks at 0.1, 0.2, 0.5, 1, ... (denser on a short axis), if any value is positive."""
    if not any(np.any(np.asarray(line.get_ydata(), float) > 0) for line in axes.lines):
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high > 5 * low else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def read_steps(path: Path) -> dict[int, dict[str, Any]]:
    """{step: line} of a JSONL file of training, in increasing order; the last line of a repeated step counts.

    Raises:
      ValueError: if the file holds no line with a step.
    """
    lines = {}
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:  # cut short by a kill
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int) and abs(line["step"]) < 2**53:
            lines[line["step"]] = line
    if not lines:
        raise ValueError(f"{path} holds no line with a step: expected the metrics that training writes")
    return dict(sorted(lines.items()))


def median_speed(lines: Mapping[int, Mapping[str, Any]]) -> float | None:
    """The median images per second over a run's records; None if they do not record it."""
    speeds = [np.mean(value) for _, value in _values(lines, "images_per_second")]
    return float(np.median(speeds)) if speeds else None


def _values(lines: Mapping[int, Mapping[str, Any]], key: str) -> list[tuple[int, Any]]:
    return [(step, line[key]) for step, line in lines.items() if np.asarray(line.get(key)).dtype.kind in "if"]


def _curve(
    axes: Axes,
    lines: Mapping[int, Mapping[str, Any]],
    key: str,
    label: str | None,
    color: str,
    smooth: bool = True,
) -> None:
    """One metric over the steps; many points are drawn faintly under their running mean."""
    points = _values(lines, key)
    if not points:
        return
    steps, values = zip(*[(step, np.mean(value)) for step, value in points], strict=True)
    window = len(steps) // 40 if smooth else 0
    if window > 1:
        axes.plot(steps, values, color=color, linewidth=0.6, alpha=0.3)
    line = _running_mean(values, window) if window > 1 else values
    axes.plot(steps, line, color=color, linewidth=1.6, label=label, marker="o" if len(steps) == 1 else None)


def _running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """The centered running mean, over fewer values at both ends."""
    ones = np.ones(2 * (window // 2) + 1)
    return np.convolve(values, ones, "same") / np.convolve(np.ones(len(values)), ones, "same")
