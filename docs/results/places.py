"""What it matters to know which part of a person a query shows, for a model of padded images.

    python -m vpm_jax.evaluate --workdir runs/market_fast --save features
    python docs/results/places.py --workdir runs/market_fast --features runs/market_fast/saved --queries 500
    python docs/results/tables.py

Ranks the whole gallery for halves of queries, placed at the top, in the center and at the bottom, and by the least
distance over these places. With --dataset and --root, for the partial queries of another dataset, as they are. Writes
DATASET.json into the folder places.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from vpm_jax import VPM, cli, evaluation
from vpm_jax.benchmark.report import hardware, versions
from vpm_jax.data.datasets import TITLES
from vpm_jax.description import CroppedSplit
from vpm_jax.disk import write_atomically
from vpm_jax.geometry import KNOWN_PLACES
from vpm_jax.images import read
from vpm_jax.matching import pairwise_distance
from vpm_jax.metrics import rank_metrics
from vpm_jax.partial import is_partial
from vpm_jax.regions import WHOLE, Crop

HALVES = {
    "upper halves": Crop(0, 0, 0.5, 1),
    "middle halves": Crop(0.25, 0, 0.5, 1),
    "lower halves": Crop(0.5, 0, 0.5, 1),
}


def main() -> None:
    parser = cli.Parser(prog="python docs/results/places.py", description=__doc__, epilog=cli.OVERRIDES)
    parser.add_argument("--workdir", type=cli.path, required=True)
    parser.add_argument("--features", type=cli.path)
    parser.add_argument("--dataset")
    parser.add_argument("--root")
    parser.add_argument("--queries", type=int, default=0)
    args, overrides = parser.parse_known_args()
    opened = evaluation.open_run(args.workdir, overrides, args.dataset, args.root, queries=args.queries)
    dataset = evaluation.by_protocol(opened.source.config, opened.dataset)
    queries, ranked = dataset.query, evaluation.ranked(dataset.gallery)
    labels = queries.identity, ranked.identity, queries.camera, ranked.camera
    source = opened.source
    if args.features:
        source = evaluation.open_run(args.workdir, overrides, args.dataset, args.root, features=args.features).source
    [gallery] = source.splits(opened.variables, [CroppedSplit(ranked)])
    model = VPM.load(args.workdir)
    rows = [["queries", *(f"placed: {place}" for place in KNOWN_PLACES), "the nearest of the three"]]
    for part, crop in {"partial images": WHOLE}.items() if is_partial(dataset.name) else HALVES.items():
        images = [read(queries.read(i), queries.names[i], crop) for i in range(len(queries))]
        placed = [model.features(images, places=place) for place in KNOWN_PLACES]
        distances = [pairwise_distance(opened.source.config.match, query, gallery) for query in placed]
        found = [rank_metrics(distance, *labels) for distance in (*distances, np.minimum.reduce(distances))]
        rows.append(
            [f"{TITLES[dataset.name]}, {part}", *(f"{100 * r['cmc'][0]:.1f} / {100 * r['mAP']:.1f}" for r in found)]
        )
    record = {"table": rows, **opened.about, "gallery": len(ranked), "hardware": hardware(), "versions": versions()}
    file = Path(__file__).parent / "places" / f"{dataset.name}.json"
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, json.dumps(record, indent=1) + "\n")
    print(*(" | ".join(row) for row in rows), sep="\n")


if __name__ == "__main__":
    main()
