"""The appearance of synthetic pedestrians: builds, outfits, and families that differ in only a few attributes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

Color = tuple[float, float, float]

FAMILY = 4  # people per family

PALETTE: dict[str, Color] = {
    "black": (0.09, 0.09, 0.10),
    "charcoal": (0.25, 0.25, 0.27),
    "gray": (0.50, 0.50, 0.51),
    "silver": (0.72, 0.72, 0.73),
    "white": (0.93, 0.93, 0.91),
    "navy": (0.11, 0.14, 0.31),
    "blue": (0.17, 0.32, 0.66),
    "sky": (0.53, 0.69, 0.86),
    "denim": (0.30, 0.39, 0.53),
    "teal": (0.12, 0.45, 0.46),
    "green": (0.17, 0.44, 0.22),
    "olive": (0.37, 0.37, 0.21),
    "beige": (0.77, 0.67, 0.51),
    "brown": (0.37, 0.24, 0.15),
    "yellow": (0.89, 0.74, 0.20),
    "orange": (0.86, 0.43, 0.13),
    "red": (0.72, 0.11, 0.13),
    "burgundy": (0.39, 0.09, 0.15),
    "pink": (0.88, 0.55, 0.63),
    "purple": (0.41, 0.23, 0.51),
}
SKIN = ((0.95, 0.78, 0.67), (0.88, 0.69, 0.56), (0.79, 0.59, 0.45), (0.64, 0.45, 0.33), (0.47, 0.31, 0.22))
HAIR = (
    (0.07, 0.06, 0.06),
    (0.17, 0.11, 0.08),
    (0.33, 0.21, 0.12),
    (0.66, 0.51, 0.29),
    (0.58, 0.57, 0.56),
    (0.43, 0.17, 0.09),
)
HAIR_STYLES = ("short", "short", "crop", "bald", "medium", "long", "long", "ponytail", "bun", "cap", "hat")
UPPERS = ("tshirt", "tshirt", "shirt", "jacket", "coat", "tank", "hoodie")
_PATTERNS = ("stripes", "pinstripes", "checks", "block", "print", "print", "raglan", "dots")
UPPER_PATTERNS = ("plain", "plain", "plain", "plain", *_PATTERNS)
LOWERS = ("trousers", "trousers", "slim", "wide", "shorts", "shorts", "skirt", "long skirt")
LOWER_PATTERNS = ("plain", "plain", "plain", "plain", "plain", "seam", "checks", "pinstripes")
SHOES = ("sneakers", "sneakers", "plain", "boots", "sandals")
BAGS = ("none", "none", "backpack", "backpack", "handbag", "shoulder")


@dataclass(frozen=True)
class Person:
    """The appearance of a person in all images. Lengths are multiples of the average."""

    stature: float
    weight: float
    shoulders: float
    legs: float
    skin: Color
    hair: str
    hair_color: Color
    hat_color: Color
    upper: str
    upper_pattern: str
    upper_color: Color
    upper_second: Color
    lower: str
    lower_pattern: str
    lower_color: Color
    lower_second: Color
    shoes: str
    shoe_color: Color
    bag: str
    bag_color: Color
    bag_side: int

    @property
    def trunk_pattern(self) -> str:
        """The pattern of the trunk: jackets and coats are open over the second color unless striped or checked."""
        is_open = self.upper in ("jacket", "coat") and self.upper_pattern not in ("stripes", "checks")
        return "open" if is_open else self.upper_pattern


def dimmed(color: Color, by: float) -> Color:
    """The color, darkened by a factor."""
    return color[0] * by, color[1] * by, color[2] * by


def _color(rng: np.random.Generator, names: tuple[str, ...] = ()) -> Color:
    """A color of the palette with a small random change."""
    name = rng.choice(names or tuple(PALETTE))
    r, g, b = np.clip(np.array(PALETTE[str(name)]) * rng.uniform(0.9, 1.1) + rng.normal(0, 0.015, 3), 0.03, 0.97)
    return float(r), float(g), float(b)


_SOBER = (
    "black",
    "black",
    "charcoal",
    "gray",
    "navy",
    "denim",
    "denim",
    "beige",
    "olive",
    "brown",
    "white",
    "blue",
    "silver",
)


def _outfit(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Draws each group of attributes, from head to feet."""

    def pick(options: tuple[str, ...]) -> str:
        return str(rng.choice(options))

    return [
        dict(
            hair=pick(HAIR_STYLES),
            hair_color=HAIR[int(rng.choice(len(HAIR), p=(0.4, 0.2, 0.15, 0.1, 0.1, 0.05)))],
            hat_color=_color(rng),
        ),
        dict(upper=pick(UPPERS), upper_pattern=pick(UPPER_PATTERNS)),
        dict(upper_color=_color(rng, _SOBER if rng.random() < 0.5 else ()), upper_second=_color(rng)),
        dict(lower=pick(LOWERS), lower_pattern=pick(LOWER_PATTERNS)),
        dict(lower_color=_color(rng, _SOBER), lower_second=_color(rng)),
        dict(shoes=pick(SHOES), shoe_color=_color(rng, (*_SOBER, "red", "pink", "sky", "orange"))),
        dict(
            bag=pick(BAGS),
            bag_color=_color(rng, _SOBER if rng.random() < 0.5 else ()),
            bag_side=int(rng.choice((-1, 1))),
        ),
    ]


def visible_differences(a: Person, b: Person) -> int:
    """The number of attribute groups in which two people visibly differ, apart from build and skin.

    Hidden attributes do not count, such as a bald person's hair color.
    """

    def looks(p: Person) -> tuple[tuple[str, Color | None, Color | None], ...]:
        hair = None if p.hair == "bald" else p.hat_color if p.hair in ("cap", "hat") else p.hair_color
        return (
            (p.hair, hair, None),
            (p.upper + p.trunk_pattern, None, None),
            ("", p.upper_color, p.upper_second if p.trunk_pattern != "plain" else None),
            (p.lower + p.lower_pattern, None, None),
            ("", p.lower_color, p.lower_second if p.lower_pattern != "plain" else None),
            (p.shoes, p.shoe_color, None),
            (p.bag, p.bag_color if p.bag != "none" else None, None),
        )

    def differ(x: tuple[str, Color | None, Color | None], y: tuple[str, Color | None, Color | None]) -> bool:
        return x[0] != y[0] or any(c and d and math.dist(c, d) > 0.25 for c, d in zip(x[1:], y[1:], strict=True))

    return sum(differ(x, y) for x, y in zip(looks(a), looks(b), strict=True))


@functools.lru_cache(maxsize=64)
def _family(seed: int, stream: int, number: int) -> tuple[Person, ...]:
    rng = np.random.default_rng((seed, 11, stream, number))
    base: dict[str, Any] = {"skin": SKIN[int(rng.integers(len(SKIN)))]}
    for group in _outfit(rng):
        base.update(group)
    build = rng.normal(0, 1, 4)
    people: list[Person] = []
    while len(people) < FAMILY:
        # Builds within a family are similar, so that silhouettes do not separate people either.
        z = 0.8 * build + 0.6 * rng.normal(0, 1, 4)
        body = dict(stature=1 + 0.03 * z[0], weight=1 + 0.11 * z[1], shoulders=1 + 0.05 * z[2], legs=1 + 0.03 * z[3])
        attributes = base | {k: float(np.clip(v, 0.78, 1.3)) for k, v in body.items()}
        groups = _outfit(rng)
        for i in rng.choice(len(groups), size=2 if people else 0, replace=False):
            attributes |= groups[i]
        candidate = Person(**attributes)
        if all(visible_differences(candidate, other) >= 1 for other in people):
            people.append(candidate)
    return tuple(people)


def person(seed: int, stream: int, index: int) -> Person:
    """Person `index` of a stream (training, test, strangers), determined by the three numbers."""
    return _family(seed, stream, index // FAMILY)[index % FAMILY]
