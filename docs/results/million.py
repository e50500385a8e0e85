"""What two stages of search find among a million images with the features of ResNet-50; writes search/recall.json.

    python docs/results/million.py --workdir runs/market_fast --features runs/market_fast/saved \\
        --learn train.npz --folder FOLDER
    python docs/results/tables.py

The gallery is that of Market-1501 and, up to a million, mixes of two of its images each: their region features and
visibility, by weights from 0.2 to 0.8. A gallery of mixes alone, of Market-1501's size, shows how hard it is to tell
mixes apart. FOLDER takes 26 GB for the time of the run. --features and --learn are as for vectors.py.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import numpy as np

from vpm_jax import Description, cli, evaluation
from vpm_jax.benchmark.report import hardware, versions
from vpm_jax.description import CroppedSplit
from vpm_jax.disk import write_atomically
from vpm_jax.matching import nearest
from vpm_jax.reduction import Reduction
from vpm_jax.search import reduced
from vpm_jax.search.store import About, Entry, Store, Writer

IMAGES, SLICE = 1_000_000, 2000
DIMENSIONS, CANDIDATES, NEAREST = 252, (1000, 2000), 10
GAMMAS, QUERIES = (0.5, 1.0), 200  # of each gamma


def mixes(images: Description, count: int, rng: np.random.Generator) -> Description:
    first, second = rng.integers(0, len(images), (2, count))
    weight = rng.uniform(0.2, 0.8, (count, 1)).astype(np.float32)
    features = weight[..., None] * images.features[first] + (1 - weight[..., None]) * images.features[second]
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    return Description(features, weight * images.visibility[first] + (1 - weight) * images.visibility[second])


def recall(exact: np.ndarray, candidates: np.ndarray) -> float:
    return float(np.mean([np.isin(x, y).mean() for x, y in zip(exact, candidates, strict=True)]))


def main() -> None:
    parser = cli.Parser(prog="python docs/results/million.py", description=__doc__, epilog=cli.OVERRIDES)
    for name in ("workdir", "features", "learn", "folder"):
        parser.add_argument(f"--{name}", type=cli.path, required=True)
    args, overrides = parser.parse_known_args()
    opened = evaluation.open_run(args.workdir, overrides, features=args.features)
    match, dataset = opened.source.config.match, evaluation.by_protocol(opened.source.config, opened.dataset)
    crops = [CroppedSplit(dataset.query, gamma) for gamma in GAMMAS]
    *queries, gallery = opened.source.splits(
        opened.variables, [*crops, CroppedSplit(evaluation.ranked(dataset.gallery))]
    )
    rows = np.linspace(0, len(dataset.query) - 1, QUERIES).astype(int)
    query = Description.concatenate([Description(x.features[rows], x.visibility[rows]) for x in queries])
    reduction, rng = Reduction.fit(Description.load(args.learn), DIMENSIONS), np.random.default_rng(0)
    small = Description(reduction(query.features), query.visibility)

    record = {"model": opened.about["model"], "hardware": hardware(), "versions": versions(), "queries": QUERIES}
    record["table"] = [["gallery", "candidates", "gamma 0.5", "whole"]]

    def add(title: str, images: Description | Store, short: Description | Store, sizes: tuple[int, ...]) -> None:
        exact, order = nearest(match, query, images, NEAREST)[1], nearest(match, small, short, max(sizes))[1]
        for size in sizes:
            found = [recall(exact[i : i + QUERIES], order[i : i + QUERIES, :size]) for i in (0, QUERIES)]
            record["table"].append([title, f"{size:,}", *(f"{100 * share:.2f}" for share in found)])
            print(record["table"][-1], flush=True)

    for title, images in {"Market-1501": gallery, "mixes alone": mixes(gallery, len(gallery), rng)}.items():
        size = round(CANDIDATES[0] / IMAGES * len(gallery))
        add(f"{title}, {len(images):,}", images, Description(reduction(images.features), images.visibility), (size,))

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        regions, channels = gallery.features.shape[1:]
        with Writer(folder, About("million", "none", regions, channels, "float16")) as writer:
            for start in range(0, IMAGES, SLICE):
                images = gallery[start : start + SLICE]
                if len(images) < SLICE:
                    images = Description.concatenate([images, mixes(gallery, SLICE - len(images), rng)])
                names = [Entry(f"{number}.jpg") for number in range(start, start + SLICE)]
                writer.append(names, images.features, images.visibility)
                if start % 50_000 == 0:
                    print(f"{start:,} images", flush=True)
        store = Store(folder)
        reduced.write(store, reduction)
        add(f"with mixes, {IMAGES:,}", store, Store(store.folder / "reduced"), CANDIDATES)
    write_atomically(Path(__file__).parent / "search" / "recall.json", json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main)
