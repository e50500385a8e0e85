"""Self-contained HTML pages for phone and desktop, in light and dark.

Images are embedded as data URIs, and the content policy forbids any request. Parameters called `body`, `cells`, `left`
and `right` are HTML; all other text is plain and escaped here.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import Any

import cv2
import numpy as np
import simplejpeg

from vpm_jax.overlay import overlay, region_colors, scaled

CSS = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --paper: #fff; --card: #f4f6f8; --line: #d5dae0;
  --right: #1a7f37; --wrong: #b3261e; --junk: #8a929b; --accent: #0a5cad; --shadow: #0003; --thumb: 4.75rem; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaed; --soft: #a3adb8; --paper: #14171a; --card: #1f2428;
  --line: #384048; --right: #4cc46c; --wrong: #ff8a80; --junk: #767f88; --accent: #7db8ff; --shadow: #fff4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem clamp(.75rem, 3vw, 2rem) 3rem; max-width: 76rem; background: var(--paper);
  color: var(--ink); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; padding-bottom: .25rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; }
p, ul { margin: .5rem 0; max-width: 46rem; }
.soft, figcaption { color: var(--soft); font-size: .85rem; }
img { max-width: 100%; height: auto; display: block; border-radius: 4px; }
.plot { background: #fff; padding: .25rem; border: 1px solid var(--line); border-radius: 8px; width: 100%;
  min-width: 36rem; max-width: 60rem; }
/* A shadow at an edge shows that there is more beyond it: covers that scroll with the content hide it at the ends. */
.scroll { overflow-x: auto; margin: .5rem 0; background: linear-gradient(to right, var(--paper) 40%, transparent) 0 0,
  linear-gradient(to left, var(--paper) 40%, transparent) 100% 0, linear-gradient(to right, var(--shadow), transparent)
  0 0, linear-gradient(to left, var(--shadow), transparent) 100% 0; background-repeat: no-repeat;
  background-size: 2.5rem 100%, 2.5rem 100%, .75rem 100%, .75rem 100%;
  background-attachment: local, local, scroll, scroll; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--accent); }
.beside { margin: 1rem 0; display: grid; grid-template-columns: minmax(0, 1fr); gap: .5rem; align-items: start; }
.row { display: flex; flex-wrap: wrap; gap: .3rem; align-items: flex-start; margin: .6rem 0; }
.beside .row { margin: 0; } .row.wide { gap: .6rem; }
@media (min-width: 48rem) { .beside { grid-template-columns: auto minmax(0, 1fr); } .row.wide { --thumb: 6rem; } }
.card { margin: 0; padding: .25rem; background: var(--card); border: 2px solid var(--line); border-radius: 8px;
  width: calc(var(--thumb) + .5rem + 4px); }
.card img { width: var(--thumb); max-height: calc(2.5 * var(--thumb)); object-fit: contain; object-position: 0 0; }
.card figcaption { font-size: .72rem; line-height: 1.35; margin-top: .25rem; }
.wide .card, .beside > .card { width: calc(2 * var(--thumb) + .75rem + 4px); }
.wide .card { display: grid; grid-template-columns: var(--thumb) minmax(0, 1fr); column-gap: .35rem; }
.wide .card > *, .wide .pair ~ figcaption { grid-column: 1 / -1; }
.wide .card > :first-child:not(.pair) { grid-column: 1; margin: 0; }
.wide .card > :first-child:not(.pair) ~ figcaption { grid-area: 1 / 2; margin: 0; }
.card.right { border-color: var(--right); } .card.wrong { border-color: var(--wrong); border-style: dashed; }
.card.junk { opacity: .55; border-style: dotted; border-color: var(--junk); } .card.junk img { filter: grayscale(1); }
.card.query { border-color: var(--accent); }
.mark { font-weight: 700; } .right .mark { color: var(--right); } .wrong .mark { color: var(--wrong); }
.pair { display: grid; grid-template-columns: repeat(2, var(--thumb)); gap: .25rem; }
.bars { display: grid; grid-template-columns: auto 1fr auto; gap: .1rem .35rem; align-items: center; margin-top: .3rem;
  font-size: .72rem; line-height: 1.2; color: var(--soft); font-variant-numeric: tabular-nums; }
.bars i { display: block; height: .6rem; border-radius: 2px; min-width: 1px; }
.bars i.off { opacity: .3; }
"""


def page(title: str, body: str) -> str:
    """The whole document."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def section(title: str, body: str) -> str:
    """A section under a heading."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], cell: Callable[[str], str] = escape) -> str:
    """A table of text that scrolls sideways; the first column is left-aligned, the others right-aligned.

    Args:
      header: one cell per column.
      rows: of as many cells.
      cell: converts a cell's text to HTML.
    """
    head = "".join(f'<th scope="col">{cell(str(x))}</th>' for x in header)
    lines = "\n".join("<tr>" + "".join(f"<td>{cell(str(x))}</td>" for x in line) + "</tr>" for line in rows)
    return _scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>\n{lines}\n</tbody></table>")


def _scrolling(body: str) -> str:
    return f'<div class="scroll" tabindex="0">{body}</div>\n'


def markdown(text: str) -> str:
    """HTML of the Markdown that evaluations write: paragraphs and pipe tables, with **bold** and `code`."""
    body = ""
    for block in text.strip().split("\n\n"):
        lines = block.strip().splitlines()
        if len(lines) > 1 and all(line.startswith("|") for line in lines):
            header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
            body += table(header, rows, _inline)
        elif lines:
            body += "<p>" + "<br>".join(_inline(line.lstrip("#").strip()) for line in lines) + "</p>\n"
    return body


def _inline(text: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text).replace("\\*", "*")


def row(cells: Iterable[str], wide: bool = False) -> str:
    """Cards side by side, wrapped to the screen; `wide` ones have room for two images or long captions."""
    return f'<div class="row{" wide" * wide}">\n' + "\n".join(cells) + "\n</div>\n"


def beside(left: str, right: str) -> str:
    """A card, such as a query's, and a row of related cards to its right (on a phone, below)."""
    return f'<div class="beside">{left}{right}</div>\n'


def card(body: str, caption: str = "", kind: str = "", mark: str = "") -> str:
    """An image with a caption below it.

    Args:
      body: the image.
      caption: may have several lines.
      kind: of frame: "right", "wrong", "junk", "query" or "". Add a mark, since some readers cannot see the color.
      mark: above the caption, such as "\\u2713 match".
    """
    lines = "<br>".join(escape(line) for line in caption.split("\n"))
    marked = f'<span class="mark">{escape(mark)}</span>{"<br>" * bool(caption)}' if mark else ""
    text = f"<figcaption>{marked}{lines}</figcaption>" if mark or caption else ""
    return f'<figure class="card {kind}">{body}{text}</figure>'


def picture(pixels: np.ndarray, alt: str, height: int = 256) -> str:
    """An <img> of uint8 [H, W, 3], at most `height` pixels high, with an alternative text."""
    data = jpeg(pixels, height)
    return f'<img src="{data_uri(data, "image/jpeg")}" alt="{escape(alt)}">'


def jpeg(pixels: np.ndarray, height: int = 256) -> bytes:
    """uint8 [H, W, 3] as a JPEG file, at most `height` pixels high and 4 times as wide."""
    size = scaled(pixels, height)
    if size[1] < len(pixels) or size[0] < pixels.shape[1]:
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=88, colorspace="RGB")


def plot(draw: Callable[[Any], None], alt: str) -> str:
    """The plot that `draw` writes into a file object, as an <img> that scrolls sideways."""
    file = io.BytesIO()
    draw(file)
    return _scrolling(f'<img class="plot" src="{data_uri(file.getvalue(), "image/png")}" alt="{escape(alt)}">')


def data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


# ---- What the model sees ----


def bars(
    values: np.ndarray,
    label: str,
    longest: float,
    form: str = "{:.1f}",
    counted: np.ndarray | None = None,
    notes: Sequence[str] | None = None,
    columns: int = 1,
) -> str:
    """One bar per region, in its color and with its number, region 0 on top.

    Args:
      values: [P]; values that are not finite get no bar.
      label: for screen readers, such as "visibility in cells".
      longest: the value of a full bar.
      form: the format of a value.
      counted: bool [P]; other regions are faint.
      notes: [P], written after each value.
      columns: of the region grid.
    """
    colors = (255 * region_colors(len(values), columns)).round().astype(int)
    texts = [form.format(float(value)) for value in values]
    if notes is not None:
        texts = [f"{text} {note}" for text, note in zip(texts, notes, strict=True)]
    summary = "; ".join(f"region {i}: {text}" for i, text in enumerate(texts))
    lines = []
    for i, (value, text, color) in enumerate(zip(values, texts, colors, strict=True)):
        share = min(max(float(value) / longest, 0), 1) if np.isfinite(value) and longest > 0 else 0
        off = ' class="off"' if counted is not None and not counted[i] else ""
        style = f"width:{100 * share:.1f}%;background:rgb({color[0]},{color[1]},{color[2]})"
        lines.append(f'<span{off}>{i}</span><i{off} style="{style}"></i><span{off}>{escape(text)}</span>')
    return f'<div class="bars" role="img" aria-label="{escape(f"{label}: {summary}")}">{"".join(lines)}</div>'


def regions(pixels: np.ndarray, region_map: np.ndarray, visibility: np.ndarray, name: str, columns: int = 1) -> str:
    """An image, its region map to the right, and the visibility of each region in cells below.

    Args:
      pixels: uint8 [H, W, 3].
      region_map: [h, w, P], Eq. 1; 0 in cells of padding.
      visibility: [P], Eq. 2.
      name: of the image.
      columns: of the region grid.
    """
    cells = region_map.shape[0] * region_map.shape[1]
    pair = picture(pixels, name) + picture(overlay(pixels, region_map, columns, 256), f"region map of {name}")
    full = 2 * cells / len(visibility)  # a whole person shows every region equally: half a bar each
    return f'<div class="pair">{pair}</div>' + bars(visibility, "visibility in cells", full, columns=columns)
