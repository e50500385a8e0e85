"""Pages that people open: one self-contained HTML file, for phone and desktop, in light and dark.

Everything a page shows is inside it (pictures as data URIs); its content policy forbids any request. Text given to
these functions is plain text and is escaped here, except where a parameter is called `body` or `cells`, which is HTML.
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

from vpm_jax.overlay import overlay, region_colors

_CSS = """
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
/* A shadow at an edge says that there is more beyond it: covers that scroll with the content hide it at the ends. */
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
    """The whole document; `body` is HTML, what the functions below make. Write it by logs.write_atomically."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def section(title: str, body: str) -> str:
    """A heading and what is below it."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]], cell: Callable[[str], str] = escape) -> str:
    """A table of text; the first column is to the left, the others to the right. It scrolls where it is too wide.

    Args:
      header: of each column.
      rows: of as many cells.
      cell: makes HTML of a cell's text.
    """
    head = "".join(f'<th scope="col">{cell(str(x))}</th>' for x in header)
    lines = "\n".join("<tr>" + "".join(f"<td>{cell(str(x))}</td>" for x in line) + "</tr>" for line in rows)
    return _scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>\n{lines}\n</tbody></table>")


def _scrolling(body: str) -> str:
    return f'<div class="scroll" tabindex="0">{body}</div>\n'


def markdown(text: str) -> str:
    """Paragraphs and pipe tables, with **bold** and `code`: all that our own results are written in, as HTML."""
    made = ""
    for block in text.strip().split("\n\n"):
        lines = block.strip().splitlines()
        if len(lines) > 1 and all(line.startswith("|") for line in lines):
            header, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
            made += table(header, rows, _inline)
        elif lines:
            made += "<p>" + "<br>".join(_inline(line.lstrip("#").strip()) for line in lines) + "</p>\n"
    return made


def _inline(text: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text).replace("\\*", "*")


def row(cells: Iterable[str], wide: bool = False) -> str:
    """Cards side by side, as many as fit the screen; `wide` ones have room for two pictures or long captions."""
    return f'<div class="row{" wide" * wide}">\n' + "\n".join(cells) + "\n</div>\n"


def beside(left: str, right: str) -> str:
    """A card, such as a query's, and to its right (on a phone below it) a row of what belongs to it."""
    return f'<div class="beside">{left}{right}</div>\n'


def card(body: str, caption: str = "", kind: str = "", mark: str = "") -> str:
    """A picture and a line or more (`caption`, plain text, newlines kept) below it.

    Args:
      body: HTML.
      caption: plain text.
      kind: "right", "wrong", "junk", "query", or "" for none: the frame. Color never says it alone: give a mark too.
      mark: a word or sign above the caption, such as "\\u2713 match".
    """
    words = "<br>".join(escape(line) for line in caption.split("\n"))
    marked = f'<span class="mark">{escape(mark)}</span>{"<br>" * bool(caption)}' if mark else ""
    text = f"<figcaption>{marked}{words}</figcaption>" if mark or caption else ""
    return f'<figure class="card {kind}">{body}{text}</figure>'


def picture(pixels: np.ndarray, alt: str, height: int = 256) -> str:
    """An <img> of uint8 [H, W, 3], at most `height` pixels high. `alt` says what it shows to who cannot see it."""
    data = jpeg(pixels, height)
    return f'<img src="{_uri(data, "image/jpeg")}" alt="{escape(alt)}">'


def jpeg(pixels: np.ndarray, height: int = 256) -> bytes:
    """uint8 [H, W, 3] as a JPEG file of at most `height` pixels' height."""
    if len(pixels) > height:
        width = max(round(pixels.shape[1] * height / len(pixels)), 1)
        pixels = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_AREA)
    return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality=88, colorspace="RGB")


def plot(draw: Callable[[Any], None], alt: str) -> str:
    """What `draw` writes into the file it is given, such as `partial(plots.gamma_curves, ...)`; it scrolls."""
    file = io.BytesIO()
    draw(file)
    return _scrolling(f'<img class="plot" src="{_uri(file.getvalue(), "image/png")}" alt="{escape(alt)}">')


def _uri(data: bytes, kind: str) -> str:
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
    """A bar for each region, in its color and with its number, from region 0 downwards.

    Args:
      values: [P]; not finite: no bar.
      label: what they are, for who cannot see them, such as "visibility in cells".
      longest: the value of a full bar.
      form: how a value is written.
      counted: bool [P]; the others are faint.
      notes: [P], what is written after each value.
      columns: of the region grid.
    """
    colors = (255 * region_colors(len(values), columns)).round().astype(int)
    texts = [form.format(float(value)) for value in values]
    if notes is not None:
        texts = [f"{text} {note}" for text, note in zip(texts, notes, strict=True)]
    said = "; ".join(f"region {i}: {text}" for i, text in enumerate(texts))
    lines = []
    for i, (value, text, color) in enumerate(zip(values, texts, colors, strict=True)):
        share = min(max(float(value) / longest, 0), 1) if np.isfinite(value) and longest > 0 else 0
        off = ' class="off"' if counted is not None and not counted[i] else ""
        style = f"width:{100 * share:.1f}%;background:rgb({color[0]},{color[1]},{color[2]})"
        lines.append(f'<span{off}>{i}</span><i{off} style="{style}"></i><span{off}>{escape(text)}</span>')
    return f'<div class="bars" role="img" aria-label="{escape(f"{label}: {said}")}">{"".join(lines)}</div>'


def regions(pixels: np.ndarray, region_map: np.ndarray, visibility: np.ndarray, name: str, columns: int = 1) -> str:
    """A picture, beside it the same under its region map, and below them the visibility of each region in cells.

    Args:
      pixels: uint8 [H, W, 3].
      region_map: [h, w, P], Eq. 1; 0 in cells that the picture does not cover.
      visibility: [P], Eq. 2.
      name: what the picture is called.
      columns: of the region grid.
    """
    cells = region_map.shape[0] * region_map.shape[1]
    shown = picture(pixels, name), picture(overlay(pixels, region_map, columns, 256), f"region map of {name}")
    # A whole person fills every region alike: a bar of twice that share is full.
    full = 2 * cells / len(visibility)
    return f'<div class="pair">{"".join(shown)}</div>' + bars(visibility, "visibility in cells", full, columns=columns)
