"""What a region's feature takes from the rest of the image, from saved features of whole and half queries.

    python -m vpm_jax.evaluate --workdir RUN --save features
    python docs/results/context.py RUN/saved --page docs/results/market1501-fast-padded/context.md

Compares queries with the gallery by Eq. 4 over the first k regions alone, all equally visible. The first half of the
regions are the same pixels whether the query is whole or its top half. What whole queries score more over them comes
from the lower half, through the receptive field of the features.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from vpm_jax.comparison import number, table
from vpm_jax.matching import region_distance
from vpm_jax.metrics import rank_metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("saved", type=Path, help="the folder that evaluate --save features wrote")
    parser.add_argument("--page", type=Path, help="the page to write (default: print)")
    args = parser.parse_args()
    about = json.loads((args.saved / "about.json").read_text(encoding="utf-8"))["features"]
    gallery, whole, half = (np.load(args.saved / f"{name}.npz") for name in ("gallery", "query", "query-top-0.5"))
    labels = [split[key] for key in ("identity", "camera") for split in (whole, gallery)]
    images, seen = gallery["features"], gallery["visibility"]
    queries = [(split["features"], split["visibility"]) for split in (half, whole)]
    regions = seen.shape[1]

    def scores(chosen: slice, predicted: bool = False) -> list[str]:
        cells = []
        for features, visibility in queries:
            weights = [x if predicted else np.ones_like(x) for x in (visibility, seen)]
            query, others = ((f[:, chosen], w[:, chosen]) for f, w in zip((features, images), weights, strict=True))
            found = rank_metrics(region_distance(*query, *others), *labels)
            cells.append(f"{number(100 * found['cmc'][0])} / {number(100 * found['mAP'])}")
        return cells

    rows = [["all regions, predicted visibility", *scores(slice(regions), predicted=True)]]
    rows += [[f"the first {k}", *scores(slice(k))] for k in range(1, regions + 1)]
    rows += [[f"region {k} alone", *scores(slice(k - 1, k))] for k in range(1, regions + 1)]
    same = np.einsum("npc,npc->p", *(features for features, _ in queries)) / len(whole["names"])
    inside = queries[0][1].mean(axis=0)
    cosines = ", ".join(f"{value:.3f}" for value in same[: regions // 2])
    what = ", ".join(f"{key} {about[key]}" for key in ("recipe", "seed", "steps", "dataset", "queries"))
    page = [
        f"# What a region takes from the rest of the image ({what})",
        "",
        "Written by `docs/results/context.py`, which says what is compared. Rank-1 / mAP in percent,",
        "against whole gallery images.",
        "",
        *table([["compared over", "queries at gamma 0.5", "whole queries"], *rows]),
        f"Mean cosine between a region of a query at gamma 0.5 and the same region of the whole query: {cosines}.",
        f"Mean visibility of the regions at gamma 0.5: {', '.join(f'{value:.1f}' for value in inside)}.",
    ]
    text = "\n".join(page).rstrip() + "\n"
    args.page.write_text(text, encoding="utf-8") if args.page else print(text)


if __name__ == "__main__":
    main()
