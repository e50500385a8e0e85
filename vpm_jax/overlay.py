"""Region maps as figures: each cell in the color of its most probable region, over the image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import cv2
import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle
from PIL import Image

from vpm_jax.plots import save

LOW_WEIGHT = 0.05  # regions with a smaller share of a pair's weight are shown faint


def region_colors(regions: int, columns: int = 1) -> np.ndarray:
    """Distinct colors [P, 3]; with several columns, one hue per row that gets paler to the right."""
    if columns > 1:
        hues, column = region_colors(-(-regions // columns)), np.arange(regions) % columns
        return 1 - (1 - hues[np.arange(regions) // columns]) * (1 - 0.8 * column / columns)[:, None]
    if regions <= 10:
        return colormaps["tab10"](np.arange(regions))[:, :3]
    colors = colormaps["turbo"](np.linspace(0.05, 0.95, regions))[:, :3]
    colors[1::2] *= 0.7  # neighbors also differ in lightness
    return colors


def covered(region_map: np.ndarray) -> np.ndarray:
    """The part of a region map [h, w, P] that the image covers: in cells of padding all probabilities are 0."""
    cells = region_map.sum(axis=-1) > 0.5
    return region_map[cells.any(axis=1)][:, cells.any(axis=0)]


def scaled(pixels: np.ndarray, height: int) -> tuple[int, int]:
    """(width, height) of an image scaled to a height; a very wide one to 4 times that as its width."""
    rows, columns = pixels.shape[:2]
    scale = min(height / rows, 4 * height / columns)
    return max(round(scale * columns), 1), max(round(scale * rows), 1)


def with_palette(path: Path) -> None:
    """Makes a PNG file of photographs half as large, with a palette of 256 colors."""
    full = Image.open(path).convert("RGB")
    palette = full.quantize(256, Image.Quantize.MAXCOVERAGE)
    full.quantize(palette=palette).save(path, format="PNG", optimize=True)


def overlay(pixels: np.ndarray, region_map: np.ndarray, columns: int = 1, height: int | None = None) -> np.ndarray:
    """An image under its region map; color strength shows the probability, white lines separate regions.

    Args:
      pixels: uint8 [H, W, 3], without padding.
      region_map: probabilities [h, w, P] (Eq. 1); w is 1 for a row locator.
      columns: of the region grid.
      height: of the result in pixels, as `scaled` takes it; None: as the image.

    Returns:
      uint8 [height, width, 3].
    """
    size = scaled(pixels, height) if height else (pixels.shape[1], len(pixels))
    image = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA if size[1] < len(pixels) else cv2.INTER_LINEAR)
    region_map = covered(region_map)
    if not region_map.size:
        return image
    best, probability = region_map.argmax(axis=-1), region_map.max(axis=-1)
    cells = np.stack([best, 0.25 + 0.4 * probability], axis=-1).astype(np.float32)
    layer = cv2.resize(cells, size, interpolation=cv2.INTER_NEAREST)
    labels, strength = layer[..., 0].astype(int), layer[..., 1:]
    colors = (255 * region_colors(region_map.shape[-1], columns)).astype(np.float32)
    blended = image * (1 - strength) + colors[labels] * strength
    borders = np.zeros(labels.shape, np.uint8)
    borders[1:] |= labels[1:] != labels[:-1]
    borders[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    width = max(size[1] // 128, 1)
    blended[cv2.dilate(borders, np.ones((width, width), np.uint8)) > 0] = 255
    return blended.round().astype(np.uint8)


def region_maps(
    path: str | Path | IO[bytes],
    images: Sequence[np.ndarray],
    maps: np.ndarray,
    visibility: np.ndarray,
    grid: tuple[int, int],
    captions: Sequence[str],
    across: int = 4,
) -> None:
    """A contact sheet: each image, its region map, and its visibility scores in cells as bars, region 0 on top.

    A legend shows the regions of a whole person in the same colors.

    Args:
      path: the output file.
      images: N uint8 arrays [H, W, 3], RGB, of any sizes; all are drawn to the same scale.
      maps: region probabilities [N, h, w, P] (Eq. 1); w is 1 for a row locator.
      visibility: visibility scores [N, P] (Eq. 2).
      grid: (rows, columns) of the region grid.
      captions: N, above the images, such as "gamma 0.5".
      across: images per row.
    """
    height, width, _ = np.max([image.shape for image in images], axis=0)
    colors = region_colors(grid[0] * grid[1], grid[1])
    across = min(len(images), across)
    rows = -(-len(images) // across)
    key_width = 0.8
    size = (1.85 * across + key_width, (0.43 * height / width + 0.3) * rows + 0.1)
    figure = Figure(figsize=size, layout="constrained")
    subfigures: Any = figure.subfigures(1, 2, width_ratios=[size[0] - key_width, key_width])
    sheet, key = subfigures
    # Three panels per image and an empty one as a gap.
    panels = sheet.subplots(rows, 4 * across, squeeze=False, width_ratios=[1, 1, 1, 0.2] * across)
    for axes in panels.flat:
        axes.set_axis_off()
    longest = max(float(visibility.max()), 1e-6)
    for index, (image, caption) in enumerate(zip(images, captions, strict=True)):
        plain, mapped, bars, _ = panels.flat[4 * index : 4 * index + 4]
        for axes, pixels in (plain, image), (mapped, overlay(image, maps[index], grid[1], max(len(image), 512))):
            axes.imshow(pixels, extent=(0, image.shape[1], len(image), 0))
            axes.set_xlim(0, width)
            axes.set_ylim(height, 0)
        plain.set_title(caption, fontsize=8, loc="left", pad=3)
        _score_bars(bars, visibility[index], colors, longest, height / width)
    _region_key(key, grid, colors)
    save(figure, path, dpi=240)


class Neighbor(NamedTuple):
    """A gallery image of a ranking."""

    pixels: np.ndarray  # uint8 [H, W, 3]
    correct: bool  # a correct match
    distance: float
    region_distance: np.ndarray  # [P]
    weight: np.ndarray  # [P], of each region in the distance (Eq. 4)


def ranking(
    path: str | Path | IO[bytes],
    query: np.ndarray,
    frame: tuple[int, int, int, int],
    region_map: np.ndarray,
    visibility: np.ndarray,
    neighbors: Sequence[Neighbor],
    columns: int,
    titles: tuple[str, str],
    about: str,
) -> None:
    """One ranked list as a figure: the query, its region map, and its nearest images with per-region distances.

    Args:
      path: the output file.
      query: uint8 [H, W, 3].
      frame: (top, left, height, width) in pixels: the query's position in the whole image, and the size of that image.
      region_map: [h, w, P], Eq. 1.
      visibility: [P], Eq. 2.
      neighbors: nearest first; regions of low weight are drawn faint.
      columns: of the region grid.
      titles: above the query and above its neighbors.
      about: below all, in small gray letters.
    """
    regions, (top, left, height, width) = len(visibility), frame
    colors = region_colors(regions, columns)
    # All lengths are inches. `bar` is the height of one region's bar.
    total, margin, gap, query_gap, bar = 10.0, 0.08, 0.1, 0.5, 0.2
    foot = margin + 0.25
    w = (total - 2 * margin - query_gap - gap * len(neighbors)) / (2 + len(neighbors))
    h, below, above = w * height / width, 0.36 + bar * regions, 0.72
    figure = Figure(figsize=(total, foot + below + h + above))
    lefts = [margin, margin + w + gap]
    lefts += [margin + 2 * w + gap + query_gap + i * (w + gap) for i in range(len(neighbors))]
    inches = np.array([*figure.get_size_inches(), *figure.get_size_inches()])
    small: dict[str, Any] = dict(fontsize=9.5)

    def panel(x: float, y: float, width: float, height: float) -> Axes:
        return figure.add_axes(tuple(np.array([x, y, width, height]) / inches))

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / inches[0], y / inches[1], text, **{"fontsize": 10.5, "va": "bottom", **style})

    def draw(index: int, pixels: np.ndarray, color: str, style: str = "-", in_frame: bool = False) -> None:
        rows, cols = query.shape[:2] if in_frame else pixels.shape[:2]
        axes = panel(lefts[index], foot + below, w, h)
        axes.set_axis_off()
        axes.set_anchor("N")
        edge: dict[str, Any] = dict(fill=False, clip_on=False)
        if in_frame:
            axes.add_patch(Rectangle((0, 0), width, height, edgecolor="0.6", linestyle=(0, (3, 3)), **edge))
        y, x = (top, left) if in_frame else (0, 0)
        axes.imshow(pixels, extent=(x, x + cols, y + rows, y), interpolation="bicubic")
        axes.add_patch(Rectangle((x, y), cols, rows, edgecolor=color, linestyle=style, linewidth=2.5, **edge))
        axes.set_xlim(0, width if in_frame else cols)
        axes.set_ylim(height if in_frame else rows, 0)

    def bars(index: int, values: np.ndarray, longest: float, form: str, counted: np.ndarray) -> None:
        axes = panel(lefts[index], foot, w, bar * regions)
        axes.set_axis_off()
        axes.set_xlim(0, 1.6 * longest)
        axes.set_ylim(regions - 0.5, -0.5)
        for region, (value, counts) in enumerate(zip(values, counted, strict=True)):
            axes.barh(region, value, color=colors[region], height=0.66, alpha=1.0 if counts else 0.25)
            ink = "0.15" if counts else "0.65"
            axes.text(value + 0.05 * longest, region, form.format(value), va="center", color=ink, **small)

    heading, line, label = foot + below + h + 0.4, foot + below + h + 0.1, foot + bar * regions + 0.06
    write(margin, margin, about, color="0.35", **small)
    write(lefts[0], heading, titles[0], weight="bold")
    write(lefts[2], heading, titles[1], weight="bold")
    draw(0, query, "#0a5cad", in_frame=True)
    draw(1, overlay(query, region_map, columns, 512 * len(query) // height), "#0a5cad", in_frame=True)
    write(lefts[1], line, "its region map")
    write(lefts[0], label, "visible cells of each region", color="0.35", **small)
    bars(1, visibility, float(max(visibility.max(), 1e-6)), "{:.0f}", np.ones(regions, bool))
    for region in range(regions):
        write(lefts[1] - 0.14, foot + (regions - region - 0.5) * bar, str(region), va="center", **small)
    write(lefts[2], label, "distance in each region (faint: low weight)", color="0.35", **small)
    longest = max((float(neighbor.region_distance.max()) for neighbor in neighbors), default=1.0)
    for index, neighbor in enumerate(neighbors, 2):
        color, style, mark = ("#1a7f37", "-", "\u2713") if neighbor.correct else ("#b3261e", "--", "\u2717")
        draw(index, neighbor.pixels, color, style)
        write(lefts[index], line, f"{index - 1}. {neighbor.distance:.2f} {mark}", color=color, weight="bold")
        bars(index, neighbor.region_distance, longest, "{:.2f}", neighbor.weight >= LOW_WEIGHT)
    save(figure, path, dpi=140)


def _score_bars(axes: Axes, scores: np.ndarray, colors: np.ndarray, longest: float, aspect: float) -> None:
    """Visibility scores as labeled bars, region 0 on top."""
    axes.set_axis_on()
    axes.barh(range(len(scores)), scores, color=colors, height=0.72)
    for region, score in enumerate(scores):
        axes.text(score + 0.03 * longest, region, f"{score:.0f}", va="center", fontsize=7, color="0.25")
    axes.set_ylim(len(scores) - 0.5, -0.5)
    axes.set_xlim(0, 1.35 * longest)
    axes.set_xticks([])
    axes.set_yticks(range(len(scores)))
    axes.tick_params(labelsize=7, length=0, pad=2)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color("0.6")
    axes.set_box_aspect(aspect)


def _region_key(figure: SubFigure, grid: tuple[int, int], colors: np.ndarray) -> None:
    """The regions of a whole person, numbered and in their colors."""
    axes = figure.subplots()
    axes.imshow(colors.reshape(*grid, 3), extent=(0, 1, 2, 0), alpha=0.75)
    rows, columns = grid
    for region in range(rows * columns):
        row, column = divmod(region, columns)
        axes.text((column + 0.5) / columns, 2 * (row + 0.5) / rows, str(region), ha="center", va="center", fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.set_title("regions", fontsize=8)
    axes.set_xlabel("bars: visibility\nin cells", fontsize=7)
