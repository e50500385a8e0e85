"""Pages: self-contained, well-formed, hostile text escaped; overlays and bars show the numbers they are given."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from html_reader import Reader
from PIL import Image

from vpm_jax import html
from vpm_jax.overlay import region_colors

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (40, 20, 3), dtype=np.uint8)
HOSTILE = "<script>alert('x')</script>\"&.jpg"


def whole_page() -> str:
    prob = RANDOM.dirichlet(np.ones(3), (8, 4)).astype(np.float32)
    cards = [html.card(html.picture(PIXELS, HOSTILE), f"{HOSTILE}\nsecond", "right", "✓")]
    cards.append(html.card(html.regions(PIXELS, prob, prob.sum((0, 1)), HOSTILE), kind="query"))
    body = html.section(HOSTILE, html.row(cards)) + html.table(["a", HOSTILE], [[1, HOSTILE]])
    return html.page(HOSTILE, body + html.plot(lambda file: Image.fromarray(PIXELS).save(file, "PNG"), HOSTILE))


def test_a_page_is_well_formed_and_asks_nobody_for_anything():
    text = whole_page()
    found = Reader(text)
    assert not {tag for tag, _ in found.tags} & {"script", "link", "iframe", "object", "base"}
    for _, attributes in found.tags:
        for name in ("src", "href", "srcset", "action"):
            assert attributes.get(name, "data:").startswith("data:")
    assert not re.search(r"https?:|url\(|@import", text)
    policy = next(a["content"] for t, a in found.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    assert found.words.count(HOSTILE) == 6 and "second" in found.words  # title, h1, h2, caption, the table's two


def test_every_picture_says_what_it_shows():
    images = [a for tag, a in Reader(whole_page()).tags if tag == "img"]
    assert len(images) == 4 and all(HOSTILE in a["alt"] for a in images)


def decode(img: str) -> np.ndarray:
    data = base64.b64decode(re.search(r"base64,([^\"]+)\"", img)[1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@pytest.mark.parametrize(("shape", "height", "expected"), [((40, 20), 256, (40, 20)), ((400, 200), 100, (100, 50))])
def test_a_picture_is_no_larger_than_asked(shape, height, expected):
    pixels = np.full((*shape, 3), (200, 30, 90), np.uint8)
    shown = decode(html.picture(pixels, "x", height))
    assert shown.shape[:2] == expected
    assert np.abs(shown.astype(int) - pixels[0, 0]).max() < 6
    assert html.jpeg(np.zeros((5000, 1, 3), np.uint8)).startswith(b"\xff\xd8")
    assert html.jpeg(np.zeros((1, 90_000, 3), np.uint8)).startswith(b"\xff\xd8")


def test_bars_have_the_colors_of_their_regions():
    bars = re.findall(r"rgb\((\d+),(\d+),(\d+)\)", html.bars(np.ones(6), "x", 1.0, columns=2))
    colors = (255 * region_colors(6, 2)).round().astype(int)
    assert [tuple(map(int, rgb)) for rgb in bars] == [tuple(rgb) for rgb in colors]


def test_bars_are_as_long_as_their_values():
    text = html.bars(np.array([0.0, 2.0, 4.0, 9.0, np.inf]), "distance", 4.0, counted=np.array([1, 1, 0, 1, 0], bool))
    widths = [float(w) for w in re.findall(r"width:([\d.]+)%", text)]
    assert widths == [0, 50, 100, 100, 0]
    assert text.count('class="off"') == 3 * 2  # number, bar and value of the two that do not count
    assert 'aria-label="distance: region 0: 0.0; region 1: 2.0; region 2: 4.0;' in text
    assert "width:0.0%" in html.bars(np.zeros(2), "none", 0.0)
