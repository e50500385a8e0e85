"""Measures one vector per image, and reduced features, beside Eq. 4; writes DATASET.json into the folder vectors.

    python docs/results/vectors.py --workdir runs/market_fast --features runs/market_fast/saved --learn train.npz \\
        "--config.eval.gammas=(0.5,0.6,0.7,0.8,0.9,1.0)"
    python docs/results/tables.py

--features holds what `evaluate --save features` wrote; with --dataset and --root, of another dataset. --learn is a
`Description` of training images, from which reductions are learned. Recall is the share of the 10 images that are
nearest by Eq. 4 among as many candidates as are a given share of the gallery.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from vpm_jax import Description, cli, evaluation
from vpm_jax.description import CroppedSplit
from vpm_jax.disk import write_atomically
from vpm_jax.matching import embedding, match_visibility, pairwise_distance
from vpm_jax.metrics import rank_metrics
from vpm_jax.partial import is_partial
from vpm_jax.reduction import Reduction

DIMENSIONS = (512, 256, 128)
CANDIDATES = (0.001, 0.002, 0.01)  # of the gallery
NEAREST = 10
MOST = 1684  # queries, evenly spaced


def distances(
    match, query: Description, gallery: Description, reductions: dict[int, Reduction]
) -> Iterator[tuple[str, int, np.ndarray]]:
    """(method, numbers per image, distances [Q, G])."""
    yield "Eq. 4", gallery.features[0].size, pairwise_distance(match, query, gallery)
    weights = [match_visibility(images.visibility, match.visibility) for images in (query, gallery)]
    features = [query.features, gallery.features]
    for dimensions, reduction in {gallery.features[0].size: None, **reductions}.items():
        x, y = features if reduction is None else map(reduction, features)
        if reduction is None:
            yield "one vector", dimensions, -embedding(x, weights[0]) @ embedding(y, weights[1]).T
        whole = embedding(y, np.ones_like(weights[1]))
        yield "one vector, gallery whole", y[0].size, -embedding(x, weights[0]) @ whole.T
        if reduction is not None:
            small = Description(x, query.visibility), Description(y, gallery.visibility)
            yield "Eq. 4 of reduced features", y[0].size, pairwise_distance(match, *small)


def main() -> None:
    parser = cli.Parser(prog="python docs/results/vectors.py", description=__doc__, epilog=cli.OVERRIDES)
    for name in ("workdir", "features", "learn"):
        parser.add_argument(f"--{name}", type=cli.path, required=True)
    parser.add_argument("--dataset")
    parser.add_argument("--root")
    args, overrides = parser.parse_known_args()
    opened = evaluation.open_run(args.workdir, overrides, args.dataset, args.root, features=args.features)
    config, dataset = opened.source.config, evaluation.by_protocol(opened.source.config, opened.dataset)
    queries, ranked = dataset.query, evaluation.ranked(dataset.gallery)
    learned = Description.load(args.learn)
    longest = Reduction.fit(learned, max(DIMENSIONS))
    regions = longest.matrix.shape[0]
    reductions = {n: replace(longest, matrix=longest.matrix[..., : n // regions]) for n in DIMENSIONS}
    gammas = (1.0,) if is_partial(dataset.name) else config.eval.gammas
    *cropped, gallery = opened.source.splits(
        opened.variables, [*(CroppedSplit(queries, gamma) for gamma in gammas), CroppedSplit(ranked)]
    )
    rows = np.arange(0, len(queries), -(-len(queries) // MOST))
    queries, cropped = queries.take(rows), [query[rows] for query in cropped]
    labels = queries.identity, ranked.identity, queries.camera, ranked.camera
    sizes = [round(share * len(gallery)) for share in CANDIDATES]
    record = {"model": opened.about["model"], "dataset": dataset.name, "queries": len(queries), "gallery": len(gallery)}
    record |= {
        "learned_from": len(learned),
        "nearest": NEAREST,
        "candidates": dict(zip(CANDIDATES, sizes, strict=True)),
    }
    record["gammas"] = {}
    for gamma, query in zip(gammas, cropped, strict=True):
        measured = record["gammas"][str(gamma)] = []
        nearest = None
        for method, numbers, distance in distances(config.match, query, gallery, reductions):
            result = rank_metrics(distance, *labels)
            order = np.argsort(distance, axis=1, kind="stable")[:, : sizes[-1]]
            nearest = order[:, :NEAREST] if nearest is None else nearest
            found = {
                size: float(np.mean([np.isin(x, y[:size]).mean() for x, y in zip(nearest, order, strict=True)]))
                for size in sizes
                if size >= NEAREST
            }
            cmc = result["cmc"]
            measured.append({"method": method, "numbers": numbers, "rank-1": cmc[0], "rank-3": cmc[2]})
            measured[-1] |= {"mAP": result["mAP"], "recall": found}
            print(dataset.name, gamma, measured[-1], flush=True)
    output = Path(__file__).parent / "vectors"
    output.mkdir(exist_ok=True)
    write_atomically(output / f"{dataset.name}.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
