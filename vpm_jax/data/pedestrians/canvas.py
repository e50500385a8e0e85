"""Drawing shaded, anti-aliased solids: limbs are tapered capsules, everything else is a stack of ellipses.

Pixel coverage is computed from distances, so edges are smooth without supersampling. Patterns depend on the angle
around the body, so a print on the chest turns out of sight with the person.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import cv2
import numpy as np

from vpm_jax.data.pedestrians.people import Color


@dataclass(frozen=True)
class Paint:
    """A surface: its color, and a pattern in a second color. `turn` is the angle of the body's front."""

    color: Color
    second: Color = (0.0, 0.0, 0.0)
    pattern: str = "plain"
    turn: float = 0.0
    folds: float = 0.0

    def mix(self, angle: np.ndarray, along: np.ndarray) -> np.ndarray | None:
        """The fraction of the second color at an angle around the body and a length `along` from the top."""
        front = np.abs((angle + np.pi) % (2 * np.pi) - np.pi)
        match self.pattern:
            case "stripes":
                mix = 3 * np.sin(along * (2 * np.pi / 0.062))
            case "pinstripes":
                mix = 2 * np.cos(11 * angle) + 0 * along
            case "checks":
                return 0.5 * (np.sin(along * (2 * np.pi / 0.055)) > 0) + 0.5 * (np.cos(8 * angle) > 0)
            case "dots":
                mix = 4 * (np.cos(8 * angle) * np.sin(along * (2 * np.pi / 0.05)) - 0.35)
            case "block":
                mix = 90 * (0.13 - along) + 0 * angle
            case "print":
                mix = 5 * (1 - (front / 0.65) ** 2 - ((along - 0.13) / 0.055) ** 2)
            case "open":
                mix = 9 * (0.16 + 0.9 * along - front)
            case "seam":
                mix = 6 * (0.3 - np.abs(front - np.pi / 2)) + 0 * along
            case _:
                return None
        return np.clip(mix + 0.5, 0, 1)


@functools.lru_cache(maxsize=1)
def _cloth() -> np.ndarray:
    """Smooth noise in [-1, 1], the shading of folds in cloth."""
    noise = np.random.default_rng(7).normal(0, 1, (2, 640, 640)).astype(np.float32)
    folds = np.zeros((640, 640), np.float32)
    for layer, degrees in zip(noise, (15, -55), strict=True):
        smooth = cv2.GaussianBlur(layer, (0, 0), sigmaX=2.2, sigmaY=9)
        folds += cv2.warpAffine(smooth / smooth.std(), cv2.getRotationMatrix2D((320, 320), degrees, 1.3), (640, 640))
    return np.clip(folds[60:580, 60:580] / 2.5, -1, 1)


@dataclass
class Canvas:
    """An image to draw on, and the light."""

    pixels: np.ndarray  # float32 [3, h, w] RGB in [0, 1]; planes are twice as fast here
    light: np.ndarray  # direction to the light: right, down, towards the viewer
    ambient: float = 0.5
    seed: int = 0  # of the folds
    drawn: int = 0

    def limb(
        self, points: list[tuple[float, float]], radii: list[float], paint: Paint, scale: float, cut: bool
    ) -> None:
        """Draws a chain of tapered capsules through `points` (x, y) in pixels. `cut` gives it a flat end."""
        reach = max(radii) + 1.0
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        x, y = self._grid(min(xs) - reach, min(ys) - reach, max(xs) + reach, max(ys) + reach)
        if x.size == 0 or y.size == 0:
            return
        best: tuple[np.ndarray, ...] | None = None
        start = 0.0
        for a, b, ra, rb in zip(points[:-1], points[1:], radii[:-1], radii[1:], strict=True):
            length = max(math.dist(a, b), 1e-3)
            dx, dy = (b[0] - a[0]) / length, (b[1] - a[1]) / length
            px, py = x - a[0], y - a[1]
            s = px * dx + py * dy
            side = py * dx - px * dy
            inner = np.minimum(np.maximum(s, 0), length)
            radius = ra + (rb - ra) / length * inner
            over = s - inner
            depth = radius - np.sqrt(side * side + over * over)
            if cut and b is points[-1]:
                depth = np.minimum(depth, length - s)
            side, over = side / radius, over / radius
            here = (depth, over * dx - side * dy, over * dy + side * dx, side, inner + start)
            if best is None:
                best = here
            else:
                nearer = depth > best[0]
                best = tuple(np.where(nearer, new, old) for new, old in zip(here, best, strict=True))
            start += length
        assert best is not None
        depth, nx, ny, across, along = best
        self._lay(x, y, depth + 0.5, nx, ny, across, along / scale, paint)

    def solid(self, rows: np.ndarray, centers: np.ndarray, halves: np.ndarray, paint: Paint, scale: float) -> None:
        """Draws a stack of ellipses, given their centers and half widths at increasing `rows`, all in pixels."""
        wide = float(halves.max()) + 1
        x, y = self._grid(centers.min() - wide, rows[0], centers.max() + wide, rows[-1])
        if x.size == 0 or y.size == 0:
            return
        center = np.interp(y[:, 0], rows, centers)[:, None].astype(np.float32)
        half = np.interp(y[:, 0], rows, halves)[:, None].astype(np.float32) + 0.01
        slope = np.gradient(half[:, 0])[:, None] if len(half) > 1 else np.zeros_like(half)
        steep = np.sqrt(1 + slope * slope)
        off = x - center
        across = np.minimum(np.maximum(off / half, -1), 1)
        cover = (half - np.abs(off)) / steep + 0.5
        self._lay(x, y, cover, across / steep, -slope / steep, across, (y - float(rows[0])) / scale, paint)

    def _grid(self, left: float, top: float, right: float, bottom: float) -> tuple[np.ndarray, np.ndarray]:
        height, width = self.pixels.shape[1:]
        x = np.arange(max(int(left), 0), min(int(np.ceil(right)), width), dtype=np.float32)[None, :] + 0.5
        y = np.arange(max(int(top), 0), min(int(np.ceil(bottom)), height), dtype=np.float32)[:, None] + 0.5
        return x, y

    def _lay(
        self,
        x: np.ndarray,
        y: np.ndarray,
        cover: np.ndarray,
        nx: np.ndarray,
        ny: np.ndarray,
        across: np.ndarray,
        along: np.ndarray,
        paint: Paint,
    ) -> None:
        """Draws a surface on the pixels (x, y), given its coverage, normal and surface coordinates.

        `across` runs over the surface from -1 to 1, `along` from the top in body heights.
        """
        cover = np.minimum(np.maximum(cover, 0), 1)
        nz = np.sqrt(np.maximum(1 - nx * nx - ny * ny, 0))
        lx, ly, lz = (0.8 * float(v) for v in self.light)
        # Wrapped diffuse light keeps some shading on the dark side.
        lit = np.maximum(nx * lx + ny * ly + nz * lz + 0.2, 0)
        shade = self.ambient + (1 - self.ambient) * lit
        if paint.folds:
            self.drawn += 1
            top, left = (self.seed * 31 + self.drawn * 97) % 200, (self.seed * 57 + self.drawn * 61) % 300
            shade *= 1 + paint.folds * _cloth()[top : top + y.shape[0], left : left + x.shape[1]]
        mix = None
        if paint.pattern != "plain":
            mix = paint.mix(np.arcsin(np.minimum(np.maximum(across, -1), 1)) - paint.turn, along)
        x0, y0 = int(x[0, 0]), int(y[0, 0])
        region = self.pixels[:, y0 : y0 + y.shape[0], x0 : x0 + x.shape[1]]
        for plane, first, second in zip(region, paint.color, paint.second, strict=True):
            color = first * shade if mix is None else (first + (second - first) * mix) * shade
            plane += cover * (color - plane)
