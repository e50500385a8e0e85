"""What a query finds in a feature store, and why: as Python, as JSON, and as a page to look at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vpm_jax import api, html
from vpm_jax.api import VPM
from vpm_jax.description import Description, route
from vpm_jax.errors import UserError
from vpm_jax.matching import nearest, pairwise_shares
from vpm_jax.regions import UNCUT, Part, RegionGrid
from vpm_jax.search.store import Store

_LEAST_SHARE = 0.05  # a region counts where it has this share of a pair's weight
_SHOWN = 1 / 3  # a query shows the regions with more than this share of the cells of the one it shows most of


class Result(NamedTuple):
    """One image of a ranking; arrays are [P]."""

    name: str
    path: Path
    distance: float
    region_distance: np.ndarray
    weight: np.ndarray  # the share of each region in the distance; they sum to 1
    visibility: np.ndarray  # of the gallery image, or the part of it that was compared; Eq. 2

    @property
    def counted(self) -> np.ndarray:
        return self.weight >= _LEAST_SHARE


class Answer(NamedTuple):
    """What one query image finds."""

    path: Path
    query: Description
    results: list[Result]  # nearest first; none that shares no region
    part: Part = UNCUT  # which part of every image of the store it was compared with

    @property
    def visible(self) -> np.ndarray:
        """Which regions the query shows, bool [P]: scores of 0 are rare, for probabilities leak into neighbours."""
        visibility = self.query.visibility[0]
        return visibility > _SHOWN * visibility.max()


def parts(store: Store) -> dict[Part, bool]:
    """Which parts of its pictures a store describes too, and whether it is done with that.

    Each is a store of its own, see `part_folder`. Raises UserError if store.json is damaged.
    """
    said = store.about.extra.get("parts", [])
    try:
        found = {Part(str(side), float(gamma)): bool(done) for side, gamma, done in said}
        _ = [part.crop for part in found]
    except (TypeError, ValueError):
        raise UserError(
            f"{store.folder / 'store.json'} is damaged (parts are {said!r}): make the store again in another folder."
        ) from None
    return found


def part_folder(store: Path, part: Part) -> Path:
    """Where the store of a part lies."""
    return store / str(part).replace(" ", "-")


def search(model: VPM, store: Store, images: Sequence[Path], top: int) -> list[Answer]:
    """The `top` nearest images of the store for each query image, with what their distances are made of.

    Where the store describes parts of its pictures too, each query meets the part that it seems to show itself.

    Raises:
      UserError: for an image that cannot be read, a store of another model, or one of a part that is damaged.
    """
    store.check_model(model.fingerprint, model.source)
    described = model.features(list(images))
    crops = [UNCUT, *(part for part, done in parts(store).items() if done)]
    root = store.path("folder") or Path()
    answers: dict[int, Answer] = {}
    for part, rows in route(described, crops, model.grid).items():
        there = store
        if part != UNCUT:
            there = Store(part_folder(store.folder, part))
            there.check_model(model.fingerprint, model.source)
            there.verify()
        for row, results in zip(rows, _ranked(model, there, described[rows], top, root), strict=True):
            answers[int(row)] = Answer(images[row], described[row], results, part)
    return [answers[row] for row in range(len(images))]


def _ranked(model: VPM, store: Store, queries: Description, top: int, root: Path) -> list[list[Result]]:
    match, names, rankings = model.config.match, store.names, []
    for query, distances, indices in zip(queries, *nearest(match, queries, store, top), strict=True):
        index = indices[np.isfinite(distances)]
        gallery = Description(store.features[index], store.visibility[index])
        local, shares = pairwise_shares(match, query, gallery)
        results = [
            Result(names[i], root / names[i], float(distances[rank]), local[0, rank], shares[0, rank], scores)
            for rank, (i, scores) in enumerate(zip(index, gallery.visibility, strict=True))
        ]
        rankings.append(results)
    return rankings


def numbers(which: np.ndarray) -> str:
    """The regions where `which` [P] is true: "0 1 2"."""
    return " ".join(str(i) for i in np.flatnonzero(which)) or "none"


def printable(text: object) -> str:
    """A file's name as people read it: names that are no UTF-8 cannot be printed or written."""
    return str(text).encode(errors="replace").decode()


def record(model: VPM, store: Store, answers: list[Answer]) -> dict[str, Any]:
    """The rankings as JSON; visibility is in cells of the feature map, weights are shares."""

    def listed(values: np.ndarray) -> list[float]:
        return [float(f"{value:.6g}") for value in values]

    return {
        "index": str(store.folder),
        "images": len(store),
        "model": {"fingerprint": model.fingerprint, "grid": [model.grid.rows, model.grid.cols]},
        "match": model.config.match.to_dict(),
        "queries": [
            {
                "image": str(answer.path),
                "visibility": listed(answer.query.visibility[0]),
                "visible": [int(i) for i in np.flatnonzero(answer.visible)],
                "compared_with": str(answer.part),
                "results": [
                    {
                        "rank": rank,
                        "image": result.name,
                        "path": str(result.path),
                        "distance": float(f"{result.distance:.6g}"),
                        "region_distance": listed(result.region_distance),
                        "weight": listed(result.weight),
                        "counted": [int(i) for i in np.flatnonzero(result.counted)],
                        "visibility": listed(result.visibility),
                    }
                    for rank, result in enumerate(answer.results, 1)
                ],
            }
            for answer in answers
        ],
    }


def compared(answer: Answer) -> str:
    """With which part of every image a query was compared, for people."""
    return "" if answer.part == UNCUT else f"; compared with the {answer.part} of every picture"


def numbering(grid: RegionGrid) -> str:
    """In which order regions are numbered, for people."""
    return "from the top down" if grid.cols == 1 else f"{grid.rows} rows of {grid.cols}, from the top left"


# ---- The page ----


def page(model: VPM, store: Store, answers: list[Answer]) -> str:
    """One self-contained HTML file. Pictures are read from the folder that was indexed."""
    folder = html.escape(printable((store.path("folder") or store.folder).name))
    intro = (
        f"<p>Ranked among the {len(store):,} images of {folder} by the regions that both pictures show. "
        f"Regions are numbered {numbering(model.grid)}.</p>"
        '<p class="soft">Under a query: how much of the picture shows each region, in cells of the feature map. Under '
        "a result: how far apart the two pictures are in each region, and the region's share in the overall distance, "
        f"which is the more the better both show it. Regions with less than {100 * _LEAST_SHARE:.0f} % are faint.</p>"
    )
    return html.page("Search results", intro + "".join(_section(answer, model.grid.cols) for answer in answers))


def _section(answer: Answer, columns: int) -> str:
    name = printable(answer.path.name)
    pixels = api.read(answer.path)
    seen = html.regions(pixels, answer.query.region_maps[0], answer.query.visibility[0], f"query {name}", columns)
    said = f"shows regions {numbers(answer.visible)}{compared(answer)}"
    body = html.row([html.card(seen, said, "query", "Query")], wide=True)
    if answer.results:
        longest = max(float(result.region_distance.max()) for result in answer.results)
        cards = [_card(rank, result, longest, columns) for rank, result in enumerate(answer.results, 1)]
        body += f"<h3>{len(cards)} nearest</h3>\n" + html.row(cards, wide=True)
    else:
        body += "<p>It shares no visible region with any image: there is nothing to rank.</p>"
    return html.section(name, body)


def _card(rank: int, result: Result, longest: float, columns: int) -> str:
    name = printable(result.name)
    try:
        shown = html.picture(api.read(result.path), f"rank {rank}: {name}")
    except UserError:
        shown = '<p class="soft">This picture is not there any more, or cannot be read.</p>'
    shares = [f"· {100 * weight:.0f} %" for weight in result.weight]
    label = "distance in each region, and its share in the overall distance"
    shown += html.bars(result.region_distance, label, longest, "{:.2f}", result.counted, shares, columns)
    return html.card(shown, name, mark=f"{rank}. distance {result.distance:.3f}")
