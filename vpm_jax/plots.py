"""The pictures that people look at: gamma curves, training curves, region maps.

Everything draws on a `matplotlib.figure.Figure` of its own: no window, no pyplot state, safe in threads. The file's
suffix chooses the format (.png, .pdf, .svg).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter, StrMethodFormatter

# Okabe and Ito's colours, told apart with every kind of colour vision; yellow left out, too faint for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"


def gamma_curves(
    path: str | Path | IO[bytes],
    results: Mapping[str, Mapping[float, Mapping[str, float]]],
    title: str,
    chance: float | None = None,
) -> None:
    """Rank-1 and mAP of every method against gamma, the kept area ratio, side by side.

    Args:
      path: the picture to write.
      results: {method: {gamma: {"rank-1": ..., "mAP": ...}}}, as fractions in [0, 1].
      title: recipe and protocol.
      chance: the rank-1 of random rankings, drawn as a line.
    """
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, metric in zip(panels, ("rank-1", "mAP"), strict=True):
        for index, (name, by_gamma) in enumerate(results.items()):
            gammas = sorted(by_gamma)
            axes.plot(
                gammas,
                [by_gamma[gamma][metric] for gamma in gammas],
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                markersize=5,
                linewidth=1.8,
                label=name,
            )
        if chance is not None and metric == "rank-1":
            axes.axhline(chance, color="0.45", linestyle="--", linewidth=1.2, label=f"chance ({100 * chance:.2g} %)")
        axes.set_xlabel("gamma (kept area ratio)")
        axes.set_title(metric, fontsize=11)
        axes.set_ylim(bottom=-0.02 * axes.get_ylim()[1])  # room for a chance line close to zero
        axes.set_xticks(sorted({gamma for by_gamma in results.values() for gamma in by_gamma}))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        _plain(axes)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=160)


def training_curves(path: str | Path | IO[bytes], metrics_jsonl_path: str | Path) -> None:
    """Losses, accuracies, learning rate and gradient norm over the steps of a run.

    Reads the JSON lines that training writes. A key that is missing leaves its curve out, so that runs of any recipe
    draw; a line cut short by a killed run is passed over; of a step written twice (a resumed run) the last counts.
    `accuracy_identity` may be a number or a list with one for each head: then mean, lowest and highest are drawn.

    Raises:
      ValueError: when the file holds no line with a step.
    """
    lines = _read_steps(Path(metrics_jsonl_path))
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    (losses, accuracies), (rate, gradient) = figure.subplots(2, 2, sharex=True)

    for index, (key, label) in enumerate(
        {"loss": "total", "loss_region": "region", "loss_identity": "identity", "loss_triplet": "triplet"}.items()
    ):
        _curve(losses, lines, key, label, COLOURS[-1] if key == "loss" else COLOURS[index - 1])
    losses.set_title("loss", fontsize=11)

    heads = [(step, np.ravel(value)) for step, value in _values(lines, "accuracy_identity")]
    if any(len(head) > 1 for _, head in heads):
        steps = [step for step, _ in heads]
        low, high = [head.min() for _, head in heads], [head.max() for _, head in heads]
        accuracies.fill_between(
            steps, low, high, color=COLOURS[0], alpha=0.2, linewidth=0, label="identity, lowest to highest head"
        )
    _curve(accuracies, lines, "accuracy_identity", "identity, mean", COLOURS[0])
    _curve(accuracies, lines, "accuracy_locator", "locator (cells)", COLOURS[1])
    _curve(accuracies, lines, "comparable", "comparable anchors", COLOURS[2])
    accuracies.set_title("accuracy and shares", fontsize=11)
    accuracies.set_ylim(0, 1.02)
    accuracies.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))

    _curve(rate, lines, "learning_rate", None, COLOURS[0], smooth=False)
    rate.set_title("learning rate", fontsize=11)
    _curve(gradient, lines, "grad_norm", None, COLOURS[0])
    gradient.set_title("gradient norm", fontsize=11)
    for axes in (losses, gradient):
        _log_scale(axes)
    for axes in (rate, gradient):
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    stages = _values(lines, "stage")
    changes = [step for (_, before), (step, after) in pairwise(stages) if before != after]
    for axes in (losses, accuracies, rate, gradient):
        for step in changes:
            axes.axvline(step, color="0.6", linestyle=":", linewidth=1.2)
        _plain(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    speed = [float(value) for _, value in _values(lines, "images_per_second")]
    notes = [f"{max(lines):,} steps"]
    notes += [f"{np.median(speed):,.0f} images/s"] if speed else []
    notes += ["dotted: next stage"] if changes else []
    figure.suptitle(", ".join(notes), fontsize=10)
    figure.savefig(path, dpi=140)


def region_maps(
    path: str | Path | IO[bytes], images: np.ndarray, locator_prob: np.ndarray, visibility: np.ndarray
) -> None:
    """A contact sheet of what the locator sees: each image, its region map and its visibility scores.

    Every cell of the feature map takes the colour of its most probable region, the stronger the surer; the bars, in
    the same colours and from region 0 downwards, are the visibility scores C in cells.

    Args:
      path: the picture to write.
      images: uint8 [N, H, W, 3], RGB.
      locator_prob: [N, h, w, P], the probabilities of Eq. 1 (w = 1 for a row locator).
      visibility: [N, P], the scores of Eq. 2.

    Raises:
      ValueError: for shapes that do not fit.
    """
    images, prob, scores = np.asarray(images), np.asarray(locator_prob, np.float32), np.asarray(visibility, np.float32)
    if (
        images.ndim != 4
        or images.shape[-1] != 3
        or prob.ndim != 4
        or scores.shape != (len(images), prob.shape[-1])
        or len(prob) != len(images)
        or not images.size
    ):
        raise ValueError(
            f"images {images.shape}, probabilities {prob.shape} and visibility {scores.shape}, "
            "expected [N, H, W, 3], [N, h, w, P] and [N, P]"
        )
    count, height, width = images.shape[:3]
    regions = prob.shape[-1]
    colours = region_colours(regions)
    across = min(count, 4)
    rows = -(-count // across)
    figure = Figure(figsize=(3.1 * across, (0.8 * height / width + 0.4) * rows), layout="constrained")
    # Three panels for each image and an empty one that keeps the bars from the next image.
    panels = figure.subplots(rows, 4 * across, squeeze=False, width_ratios=[1, 1, 1, 0.15] * across)
    for axes in panels.flat:
        axes.set_axis_off()
    longest = max(float(scores.max()), 1e-6) * 1.05
    for index in range(count):
        plain, overlay, bars, _ = panels.flat[4 * index : 4 * index + 4]
        best = prob[index].argmax(axis=-1)
        strength = 0.25 + 0.5 * prob[index].max(axis=-1, keepdims=True)
        for axes in (plain, overlay):
            axes.imshow(images[index])
        overlay.imshow(
            np.concatenate([colours[best], strength], axis=-1),
            extent=(-0.5, width - 0.5, height - 0.5, -0.5),
            interpolation="nearest",
        )
        bars.set_axis_on()
        bars.barh(range(regions), scores[index], color=colours, height=0.8)
        bars.set_ylim(regions - 0.5, -0.5)
        bars.set_xlim(0, longest)
        bars.set_yticks(range(regions))
        bars.xaxis.set_major_locator(MaxNLocator(2, integer=True))
        bars.tick_params(labelsize=7, length=2)
        bars.spines[["top", "right"]].set_visible(False)
        bars.set_box_aspect(height / width)
        if index >= count - across:
            bars.set_xlabel("cells", fontsize=8)
    figure.savefig(path, dpi=160)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def _log_scale(axes: Axes) -> None:
    """A logarithmic y axis labelled 0.1, 0.2, 0.5, 1, where anything positive is drawn."""
    if not any(np.any(np.asarray(line.get_ydata(), float) > 0) for line in axes.lines):
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def _read_steps(path: Path) -> dict[int, dict[str, Any]]:
    """The lines of a JSONL file that carry a step, by step in increasing order."""
    lines = {}
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines[int(line["step"])] = line
    if not lines:
        raise ValueError(f"{path} holds no line with a step, expected the metrics that training writes")
    return dict(sorted(lines.items()))


def _values(lines: Mapping[int, Mapping[str, Any]], key: str) -> list[tuple[int, Any]]:
    return [(step, line[key]) for step, line in lines.items() if line.get(key) is not None]


def _curve(
    axes: Axes,
    lines: Mapping[int, Mapping[str, Any]],
    key: str,
    label: str | None,
    colour: str,
    smooth: bool = True,
) -> None:
    """One metric over the steps: as it is where points are few, else faint under its running mean."""
    points = _values(lines, key)
    if not points:
        return
    steps, values = zip(*[(step, np.mean(value)) for step, value in points], strict=True)
    window = len(steps) // 40 if smooth else 0
    if window > 1:
        axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
    shown = _running_mean(values, window) if window > 1 else values
    axes.plot(steps, shown, color=colour, linewidth=1.6, label=label, marker="o" if len(steps) == 1 else None)


def _running_mean(values: Sequence[float], window: int) -> np.ndarray:
    """Mean of the values within half a window of each one, fewer at both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    begin = np.maximum(centre - window // 2, 0)
    end = np.minimum(centre + window // 2 + 1, len(values))
    return (total[end] - total[begin]) / (end - begin)


def region_colours(regions: int) -> np.ndarray:
    """Colours [P, 3], as different as so many can be."""
    if regions <= 10:
        return colormaps["tab10"](np.arange(regions))[:, :3]
    colours = colormaps["turbo"](np.linspace(0.05, 0.95, regions))[:, :3]
    colours[1::2] *= 0.7  # neighbours differ in lightness too
    return colours
