"""The figures of `reproduce`: gamma curves, differences and gains of finished runs, and region maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vpm_jax import overlay, plots
from vpm_jax.api import VPM
from vpm_jax.data import synthetic
from vpm_jax.data.pipeline import cut
from vpm_jax.disk import replacing
from vpm_jax.regions import draw_crop, pixel_box
from vpm_jax.reproduce.tables import Row

_METRICS = {"rank-1": "R-1", "mAP": "mAP"}
PEOPLE = 2  # rows of the figure
VIEWS = (("none", 1.0), ("left", 0.6), ("top", 0.7), ("top", 0.5))  # (crop, gamma) of each person, as in Figure 5


def gamma_curves(path: Path, rows: Sequence[Row], title: str, chance: float, shaded: bool = False) -> None:
    """Rank-1 and mAP of every method over gamma, and the paper's.

    Args:
      path: the output file.
      rows: from `tables.rows`.
      title: of the figure.
      chance: rank-1 of random rankings, a fraction.
      shaded: whether methods other than the global feature differ in one number: drawn from light to dark.
    """

    def curves(key: str) -> dict[str, Any]:
        """{method: {gamma: {metric: fractions}}} of one key of `tables.summary`."""
        return {
            row["title"]: {
                float(gamma): {
                    name: np.divide(scores[metric][key], 100)
                    for name, metric in _METRICS.items()
                    if key in scores[metric]
                }
                for gamma, scores in row["numbers"].items()
            }
            for row in rows
        }

    shades = [row["title"] for row in rows if shaded and row["method"] != "baseline"]
    ours, theirs = curves("values"), curves("paper")
    _draw(path, lambda file: plots.gamma_curves(file, ours, title, chance, published=theirs, shades=shades))


def differences(path: Path, rows: Sequence[Row], title: str) -> None:
    """The difference of every method to the first one over gamma, for each seed, and the paper's.

    Args:
      path: the output file.
      rows: from `tables.rows`.
      title: of the figure.
    """
    first, *others = rows
    ours: dict[str, Any] = {}
    theirs: dict[str, Any] = {}
    for row in others:
        shared = [seed for seed in row["seeds"] if seed in first["seeds"]]
        if not shared:
            continue
        ours[row["title"]], theirs[row["title"]] = {}, {}
        for gamma in row["numbers"]:
            pairs = {name: (row["numbers"][gamma][m], first["numbers"][gamma][m]) for name, m in _METRICS.items()}
            ours[row["title"]][float(gamma)] = {
                name: [a["values"][row["seeds"].index(s)] - b["values"][first["seeds"].index(s)] for s in shared]
                for name, (a, b) in pairs.items()
            }
            theirs[row["title"]][float(gamma)] = {
                name: a["paper"] - b["paper"] for name, (a, b) in pairs.items() if "paper" in a and "paper" in b
            }
    heading, *details = title.split("\n")
    title = "\n".join([f"{heading}: differences to {first['title']}", *details])
    _draw(path, lambda file: plots.differences(file, ours, title, first["title"], theirs))


def gains(path: Path, rows: Sequence[Row], title: str) -> None:
    """The gain of each ingredient; `rows` are from `tables.gains`."""
    gained = {
        row["title"].replace("_", " "): {name: row["gain"][m]["values"] for name, m in _METRICS.items()}
        for row in rows
        if "gain" in row
    }
    _draw(path, lambda file: plots.gains(file, gained, title))


def region_maps(path: Path, workdir: Path) -> None:
    """Region maps of a trained run on synthetic pedestrians, whole and cropped (Figure 5).

    Args:
      path: the output file.
      workdir: of the run.

    Raises:
      UserError: if the workdir holds no trained model.
    """
    model = VPM.load(workdir)
    images, captions = views()
    description = model(images)
    grid = (model.grid.rows, model.grid.cols)
    maps, scores = description.region_maps, description.visibility
    _draw(path, lambda file: overlay.region_maps(file, images, maps, scores, grid, captions, across=len(VIEWS)))


def views() -> tuple[list[np.ndarray], list[str]]:
    """(images uint8 [h, w, 3], captions) of PEOPLE synthetic test pedestrians, each cropped to VIEWS."""
    images, captions = [], []
    for person in range(PEOPLE):
        shot = synthetic.Shot("", synthetic.TEST, 5 * person + 2, 1 + person % 4, 0)
        image = synthetic.render(0, shot)
        for crop, gamma in VIEWS:
            box = pixel_box(draw_crop(crop, gamma, (0.0, 0.0, 0.0)), *image.shape[:2])
            images.append(np.ascontiguousarray(cut(image, box, flip=False)))
            captions.append("whole" if crop == "none" else f"{crop}, gamma {gamma:g}")
    return images, captions


def _draw(path: Path, draw: Callable[[Path], None]) -> None:
    """Writes a figure as `path`, and beside it as .pdf for papers."""
    for file in (path, path.with_suffix(".pdf")):
        with replacing(file) as temporary:
            draw(temporary)
