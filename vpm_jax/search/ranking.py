"""Ranking a feature store for query images, as Python objects, as JSON, and as an HTML page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vpm_jax import html
from vpm_jax.api import VPM
from vpm_jax.config import estimates_extent
from vpm_jax.data.fit import Place
from vpm_jax.description import Description, unfamiliar_parts
from vpm_jax.errors import UserError, printable
from vpm_jax.images import Image, read
from vpm_jax.overlay import LOW_WEIGHT
from vpm_jax.regions import UNCUT, GalleryCrop, RegionGrid, visible_heights
from vpm_jax.search.store import Store

# A region counts as visible above this fraction of the highest score: probabilities leak into neighboring regions, so
# scores of 0 are rare.
_VISIBLE = 1 / 3


class Result(NamedTuple):
    """One image of a ranking; arrays are [P]."""

    name: str
    path: Path
    distance: float
    region_distance: np.ndarray
    weight: np.ndarray  # of each region in the distance (Eq. 4); sums to 1
    visibility: np.ndarray  # of the gallery crop that was compared (Eq. 2)
    changed: bool = False  # the file is no longer the image that was indexed

    @property
    def counted(self) -> np.ndarray:
        return self.weight >= LOW_WEIGHT


class Ranking(NamedTuple):
    """The ranking of one query image."""

    name: str  # the query's path, or "image N" for one that is not a file
    image: Image  # as given
    query: Description
    results: list[Result]  # nearest first, without images that share no region or are beyond the limit
    crop: GalleryCrop = UNCUT  # the gallery crop that the query was compared with
    limit: float = np.inf  # the distance from which on an image does not show the same person
    nearest: float = np.inf  # the distance of the nearest image, within the limit or not
    place: Place | None = None  # where the query was said to lie (see `VPM.features`)

    @property
    def visible(self) -> np.ndarray:
        """The regions that the query shows, bool [P]."""
        visibility = self.query.visibility[0]
        return visibility > _VISIBLE * visibility.max()

    @property
    def nobody(self) -> bool:
        """Whether images share a region with the query, but all are beyond the limit."""
        return not self.results and bool(np.isfinite(self.nearest))


def region_numbers(mask: np.ndarray) -> str:
    """The true regions of a mask [P], such as "0 1 2"."""
    return " ".join(str(i) for i in np.flatnonzero(mask)) or "none"


def record(model: VPM, store: Store, rankings: list[Ranking]) -> dict[str, Any]:
    """The rankings as JSON."""
    return {
        "index": str(store.folder),
        "images": len(store),
        "model": {"fingerprint": model.fingerprint, "grid": [model.grid.rows, model.grid.cols]},
        "match": model.config.match.to_dict(),
        "queries": [query_record(ranking) for ranking in rankings],
    }


def query_record(ranking: Ranking) -> dict[str, Any]:
    """One ranking as JSON; visibility is in cells of the feature map; weights sum to 1."""

    def rounded(values: np.ndarray) -> list[float]:
        return [float(f"{value:.6g}") for value in values]

    return {
        "image": ranking.name,
        "place": ranking.place,
        "visibility": rounded(ranking.query.visibility[0]),
        "visible": [int(i) for i in np.flatnonzero(ranking.visible)],
        "compared_with": str(ranking.crop),
        "max_distance": None if np.isinf(ranking.limit) else ranking.limit,
        "results": [
            {
                "rank": rank,
                "image": result.name,
                "path": str(result.path),
                "changed": result.changed,
                "distance": float(f"{result.distance:.6g}"),
                "region_distance": rounded(result.region_distance),
                "weight": rounded(result.weight),
                "counted": [int(i) for i in np.flatnonzero(result.counted)],
                "visibility": rounded(result.visibility),
            }
            for rank, result in enumerate(ranking.results, 1)
        ],
    }


def compared_with(ranking: Ranking) -> str:
    """The gallery crop of a ranking in words; "" for whole images."""
    return "" if ranking.crop == UNCUT else f"; compared with the {ranking.crop} of every image"


def nothing(ranking: Ranking) -> str:
    """Why a ranking has no results."""
    if not ranking.nobody:
        return "shares no visible region with any image: there is nothing to rank"
    return f"matches nobody here: the nearest image is at {ranking.nearest:.3f}, the threshold is {ranking.limit:.3f}"


def unfamiliar(model: VPM, ranking: Ranking) -> list[str]:
    """Parts of a person that the query seems to show and that no training crop of the model did."""
    if not estimates_extent(model.config):
        return []
    return list(unfamiliar_parts(model.config, visible_heights(ranking.query.region_maps, model.grid)))


def numbering(grid: RegionGrid) -> str:
    """The order of the region numbers in words."""
    return "from top to bottom" if grid.cols == 1 else f"{grid.rows} rows of {grid.cols}, from the top left"


# ---- The page ----


def page(model: VPM, store: Store, rankings: list[Ranking]) -> str:
    """A self-contained HTML page, with images from the indexed folder."""
    folder = html.escape(printable((store.path("folder") or store.folder).name))
    intro = (
        f"<p>Ranked among the {len(store):,} images of {folder} by the regions that both images show. "
        f"Regions are numbered {numbering(model.grid)}.</p>"
        '<p class="soft">Under a query: the visibility of each region, in cells of the feature map. Under a result: '
        "the distance in each region and the region's weight in the overall distance, which is larger the better both "
        f"images show the region. Regions with a weight of less than {100 * LOW_WEIGHT:.0f} % are faint.</p>"
    )
    return html.page("Search results", intro + "".join(_section(ranking, model.grid.cols) for ranking in rankings))


def _section(ranking: Ranking, columns: int) -> str:
    name = printable(os.path.basename(ranking.name))
    region_map, visibility = ranking.query.region_maps[0], ranking.query.visibility[0]
    regions = html.regions(read(ranking.image), region_map, visibility, f"query {name}", columns)
    caption = f"shows regions {region_numbers(ranking.visible)}{compared_with(ranking)}"
    body = html.row([html.card(regions, caption, "query", "Query")], wide=True)
    if ranking.results:
        longest = max(float(result.region_distance.max()) for result in ranking.results)
        cards = [_card(rank, result, longest, columns) for rank, result in enumerate(ranking.results, 1)]
        limit = "" if np.isinf(ranking.limit) else f" below a distance of {ranking.limit:.3f}"
        body += f"<h3>{len(cards)} nearest{limit}</h3>\n" + html.row(cards, wide=True)
    else:
        body += f"<p>The query {nothing(ranking)}.</p>"
    return html.section(name, body)


def _card(rank: int, result: Result, longest: float, columns: int) -> str:
    name = printable(result.name)
    if result.changed:
        body = '<p class="soft">This image has changed since it was indexed.</p>'
    else:
        try:
            body = html.picture(read(result.path), f"rank {rank}: {name}")
        except UserError:
            body = '<p class="soft">This image is missing or cannot be read.</p>'
    weights = [f"· {100 * weight:.0f} %" for weight in result.weight]
    label = "distance in each region, and the region's weight in the overall distance"
    body += html.bars(result.region_distance, label, longest, "{:.2f}", result.counted, weights, columns)
    return html.card(body, name, mark=f"{rank}. distance {result.distance:.3f}")
