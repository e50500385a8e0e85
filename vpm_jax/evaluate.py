"""Evaluates a trained run on partial queries: python -m vpm_jax.evaluate --workdir runs/market

Queries are cropped to every gamma (kept area ratio), the gallery stays whole (but for match.gallery_gammas), Eq. 4
compares them. Writes evaluation.json, evaluation.md and gamma.png into the workdir.

    python -m vpm_jax.evaluate --workdir runs/market --dataset partial_reid --root Partial-REID_Dataset.zip

evaluates the same weights on another dataset's test set, into evaluation-DATASET.json and .md (and gamma-DATASET.png):
on Partial-REID and Partial-iLIDS by their own protocols, where the partial images are queries as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import cli, comparison, metrics, paper, parallel, plots
from vpm_jax import config as config_lib
from vpm_jax.data.folders import TITLES
from vpm_jax.errors import UserError
from vpm_jax.regions import RegionGrid, gallery_parts, nearest_part, visible_heights
from vpm_jax.runs import hosts
from vpm_jax.runs.logs import Status, duration, make_folder, replacing, write_atomically
from vpm_jax.runs.workdir import OVERRIDES, read_run


class Features(NamedTuple):
    """Of N images, in the order of the split."""

    features: np.ndarray  # float32 [N, P, C], each region of unit length
    visibility: np.ndarray  # float32 [N, P], Eq. 2
    heights: np.ndarray | None = None  # float64 [N, 2], `regions.visible_heights`, where matching asks for it

    def take(self, rows: np.ndarray) -> Features:
        """Those of some images: indices, or bool [N]."""
        heights = None if self.heights is None else self.heights[rows]
        return Features(self.features[rows], self.visibility[rows], heights)


class Job(NamedTuple):
    """What to extract features of."""

    split: Any
    gamma: float = 1.0
    crop: str = ""  # "": config.eval.crop


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m vpm_jax.evaluate",
        description=__doc__,
        epilog=OVERRIDES,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="the folder of a training run")
    parser.add_argument("--output", type=Path, help="where results go (default: the workdir)")
    parser.add_argument("--dataset", metavar="NAME", help=f"another than the run's: {', '.join(TITLES)}")
    parser.add_argument(
        "--root",
        metavar="PATH",
        help="the dataset's folder, zip or CSV, or a folder that holds it (default: the run's, and of --dataset "
        "$VPM_DATA or ./data)",
    )
    parser.add_argument("--rerank", action="store_true", help="re-rank by k-reciprocal neighbours (match.rerank)")
    hosts.add_arguments(parser)
    args, overrides = parser.parse_known_args(argv)
    with hosts.joined(args):
        return run(args, overrides)


def run(args: argparse.Namespace, overrides: Sequence[str]) -> int:
    """What the command does, in every process of it."""
    parallel.prepare_backend()
    saved, config = read_run(args.workdir, overrides)
    config.match.rerank = config.match.rerank or args.rerank
    config_lib.check_gallery_gammas(config)
    if args.dataset:
        if args.dataset not in TITLES:
            raise UserError(f"--dataset is {args.dataset!r}, but the known ones are {', '.join(TITLES)}.")
        if config.data.root == saved.data.root:
            config.data.root = ""
        config.data.name, config.data.holdout_identities = args.dataset, 0
    config.data.root = args.root or config.data.root

    from vpm_jax import partial, step
    from vpm_jax.data.sources import load_dataset
    from vpm_jax.runs.checkpoints import Checkpoints

    dataset = hosts.in_turn(lambda: load_dataset(config.data))
    if args.dataset:
        print(*dataset.notes, sep="\n")
    check(config, dataset)
    hosts.check_job(config, dataset)
    mesh = parallel.data_mesh(config.eval.batch)
    output = args.output or args.workdir
    if hosts.is_first():
        make_folder(output)
    with Checkpoints(args.workdir, keep=0) as checkpoints:
        state, _ = checkpoints.restore(step.state_shapes(config))
    variables = parallel.replicate(mesh, step.evaluated(state))
    trained_on = saved.data.name if args.dataset else None
    if dataset.name in partial.DATASETS:
        partial.evaluate_and_report(config, variables, dataset, mesh, output, int(state.step), saved.data.name)
    else:
        evaluate_and_report(config, variables, dataset, mesh, output, int(state.step), trained_on=trained_on)
    return 0


def extract(config: ConfigDict, variables: Any, split: Any, mesh: Any, gamma: float = 1.0) -> Features:
    """Features of every image of a split, cropped to gamma by config.eval.crop."""
    return extract_many(config, variables, [(split, gamma)], mesh)[0]


def extract_many(
    config: ConfigDict,
    variables: Any,
    jobs: Sequence[tuple[Any, ...]],
    mesh: Any,
    check: Callable[[], None] | None = None,
    title: str = "features",
) -> list[Features]:
    """`extract` for several `Job`s, one after the other, with one progress line, which begins with the title.

    `check` is called after every batch, and may raise to end the work.
    """
    import jax

    from vpm_jax.data.pipeline import eval_batches

    feature_step = _feature_step(config_lib.to_json(config), mesh)
    share, grid = (jax.process_index(), jax.process_count()), RegionGrid(*config.model.grid)
    total, done = sum(len(split) for split, *_ in jobs), 0
    status, started = Status(), time.monotonic()
    extracted = []
    for split, gamma, kept in (Job(*job) for job in jobs):

        def batches(split=split, gamma=gamma, kept=kept) -> Iterator[tuple[int, Any]]:
            crop = (kept or config.eval.crop) if gamma < 1 else "none"
            for number, batch in enumerate(eval_batches(config, split, crop, gamma, *share)):
                arrays = parallel.shard(mesh, {key: batch[key] for key in ("image", "valid") if key in batch})
                yield min(config.eval.batch, len(split) - number * config.eval.batch), tuple(arrays.values())

        arrays: Features | None = None
        first = 0
        for count, inputs in parallel.prefetch(batches(), lambda pair: pair):
            out = jax.device_get(feature_step(variables, *inputs))
            if arrays is None:
                arrays = Features(
                    np.empty((len(split), *out["features"].shape[1:]), np.float32),
                    np.empty((len(split), *out["visibility"].shape[1:]), np.float32),
                    np.empty((len(split), 2)) if "region_maps" in out else None,
                )
            arrays.features[first : first + count] = out["features"][:count]
            arrays.visibility[first : first + count] = out["visibility"][:count]
            if arrays.heights is not None:
                arrays.heights[first : first + count] = visible_heights(out["region_maps"][:count], grid)
            first, done = first + count, done + count
            rate = done / (time.monotonic() - started)
            text = f"{title} {done}/{total}  {rate:.0f} images/s  ETA {duration((total - done) / rate)}"
            status.show(text, final=done == total)
            if check is not None:
                check()
        if arrays is None or first != len(split):
            raise RuntimeError(f"{first} features of {len(split)} images")  # every image exactly once
        broken = ~np.isfinite(arrays.features).all(axis=(1, 2))
        if broken.any():
            raise UserError(
                f"The features of {broken.sum()} of {len(split)} {split.name} images are not finite: these weights "
                "have diverged, evaluate another checkpoint or train with a lower learning rate."
            )
        extracted.append(arrays)
    return extracted


@functools.lru_cache(maxsize=1)  # evaluating again during training compiles nothing
def _feature_step(config_json: str, mesh: Any) -> Any:
    import jax

    from vpm_jax import step

    # Every process gets the features of all.
    config = config_lib.from_json(config_json, "config")
    function = step.make_feature_step(config, region_maps=bool(config.match.gallery_gammas))
    return jax.jit(function, out_shardings=parallel.everywhere(mesh))


def check(config: ConfigDict, dataset: Any) -> None:
    """Refuses, before hours of training, what could not be evaluated after them.

    Raises:
      UserError: if no query has a match in the gallery, or the batch does not divide over the devices.
    """
    query, gallery = dataset.query, ranked(dataset.gallery)
    try:
        metrics.chance_rank1(query.identity, gallery.identity, query.camera, gallery.camera)
    except ValueError as error:
        raise UserError(
            f"{dataset.name} cannot be evaluated ({error}): check that query and gallery are of the same dataset."
        ) from error
    parallel.data_mesh(config.eval.batch)


def ranked(gallery: Any) -> Any:
    """The gallery without junk (identity -1), which no protocol ranks: no features are spent on it."""
    return gallery.take(gallery.identity != -1)


def evaluate(
    config: ConfigDict, variables: Any, dataset: Any, mesh: Any, check: Callable[[], None] | None = None
) -> dict[float, dict[str, Any]]:
    """{gamma: `metrics.rank_metrics`} of queries cropped to each of config.eval.gammas.

    `check` is called between batches, and may raise to end the evaluation.
    """
    query, gallery = dataset.query, ranked(dataset.gallery)
    jobs = [Job(query, gamma) for gamma in config.eval.gammas]
    found = distances(config, variables, jobs, gallery, mesh, check)
    return {
        gamma: metrics.rank_metrics(distance, query.identity, gallery.identity, query.camera, gallery.camera)
        for gamma, distance in zip(config.eval.gammas, found, strict=True)
    }


def distances(
    config: ConfigDict,
    variables: Any,
    queries: Sequence[Job],
    gallery: Any,
    mesh: Any,
    check: Callable[[], None] | None = None,
) -> Iterator[np.ndarray]:
    """The distances float32 [Q, G] of each job's images to a gallery as config.match says; `check` as in `evaluate`."""
    if config.match.gallery_gammas:
        yield from _among_crops(config, variables, queries, gallery, mesh, check)
        return
    whole, *parts = extract_many(config, variables, [Job(gallery), *queries], mesh, check)
    among = eq4(config, whole, whole) if config.match.rerank else None  # once for all
    for part in parts:
        yield match(config, part, whole, among)


def _among_crops(
    config: ConfigDict,
    variables: Any,
    queries: Sequence[Job],
    gallery: Any,
    mesh: Any,
    check: Callable[[], None] | None = None,
) -> list[np.ndarray]:
    """`distances` of every query to the gallery cropped as the query seems to be, or whole if that is nearer.

    One crop's features of the gallery are held at a time, and all distances.
    """
    parts = gallery_parts(config_lib.sides(config), config.match.gallery_gammas)
    asked = extract_many(config, variables, queries, mesh, check, "features of queries")
    chosen = [nearest_part(np.asarray(query.heights), parts) for query in asked]
    found = [np.empty((len(query.features), len(gallery)), np.float32) for query in asked]
    for number, part in enumerate(parts):
        rows = [which == number for which in chosen]
        if any(map(np.any, rows)):
            title = f"features of the gallery ({part}, {number + 1} of {len(parts)})"
            [cropped] = extract_many(config, variables, [Job(gallery, part.gamma, part.side)], mesh, check, title)
            for query, mine, distance in zip(asked, rows, found, strict=True):
                if mine.any():
                    distance[mine] = eq4(config, query.take(mine), cropped)
    return found


def match(config: ConfigDict, query: Features, gallery: Features, among: np.ndarray | None = None) -> np.ndarray:
    """Distances float32 [Q, G] as config.match says: by Eq. 4, re-ranked or not; `among` is `eq4` of the gallery."""
    distance = eq4(config, query, gallery)
    if not config.match.rerank:
        return distance
    from vpm_jax.reranking import rerank

    m = config.match
    among = eq4(config, gallery, gallery) if among is None else among
    return rerank(distance, eq4(config, query, query), among, m.rerank_k1, m.rerank_k2, m.rerank_lambda, m.squared)


def matching_in_words(config: ConfigDict) -> str:
    m = config.match
    numbers = f"k1 {m.rerank_k1}, k2 {m.rerank_k2}, lambda {m.rerank_lambda:g}"
    reranked = f", re-ranked by k-reciprocal neighbours ({numbers})" * m.rerank
    made = " after the neck" * (m.feature == "after") + " (means over an image and its mirror)" * config.eval.flip
    features = f" of features{made}" if made else ""
    cropped = ", ".join(f"{gamma:g}" for gamma in m.gallery_gammas)
    crops = f"; the gallery also cropped to {cropped}, each query compared with the crop most like it" * bool(cropped)
    return f"Eq. 4, {m.visibility} visibility, {'squared ' * m.squared}distances{features}{reranked}{crops}"


def eq4(config: ConfigDict, query: Features, gallery: Features) -> np.ndarray:
    """Distances float32 [Q, G] by Eq. 4, with the visibility of config.match."""
    from vpm_jax.matching import match_visibility, region_distance

    mode = config.match.visibility
    return region_distance(
        query.features,
        match_visibility(query.visibility, mode),
        gallery.features,
        match_visibility(gallery.visibility, mode),
        squared=config.match.squared,
    )


def compared_model(config: ConfigDict) -> str:
    """The name in the paper's Table 1 of what the config trains."""
    if config.model.locator == "stripes":
        return "PCB"
    return "baseline" if tuple(config.model.grid) == (1, 1) else "VPM"


def means(results: Mapping[float, Mapping[str, Any]]) -> dict[str, float]:
    """What two evaluations are compared by: rank-1 and mAP, the means over gamma."""
    return {
        "rank1": float(np.mean([r["cmc"][0] for r in results.values()])),
        "mAP": float(np.mean([r["mAP"] for r in results.values()])),
    }


def evaluate_and_report(
    config: ConfigDict,
    variables: Any,
    dataset: Any,
    mesh: Any,
    output: Path,
    steps: int,
    evaluated: tuple[dict[float, dict[str, Any]], float] | None = None,
    trained_on: str | None = None,
) -> dict[float, dict[str, Any]]:
    """Evaluates (unless `evaluated`, results and the seconds they took, is given), prints the table, and writes
    evaluation.json, evaluation.md and gamma.png into `output`; evaluation-DATASET.json and so on with the name of the
    dataset that it was `trained_on`."""
    import jax

    started = time.monotonic()
    results, seconds = evaluated or (evaluate(config, variables, dataset, mesh), 0.0)
    seconds += time.monotonic() - started
    query, gallery = dataset.query, ranked(dataset.gallery)
    junk = len(dataset.gallery) - len(gallery)
    chance = metrics.chance_rank1(query.identity, gallery.identity, query.camera, gallery.camera)
    skipped = next(iter(results.values()))["skipped"]
    dropped = "same identity and camera dropped" if query.camera is not None else "no cameras, so nothing is dropped"
    kept = "whole and cropped" if config.match.gallery_gammas else "whole"
    lines = [
        headline(config, dataset, steps, trained_on),
        f"Protocol: single query, {len(query)} queries keeping their {config.eval.crop} gamma, {len(gallery)} gallery "
        f"images {kept} ({junk} of identity -1 left out); {dropped}; {skipped} queries without a match skipped.",
        f"Matching: {matching_in_words(config)}. Chance: rank-1 {chance:.2%} (mean over random rankings).",
    ]
    text = "\n".join(lines) + "\n\n" + metrics.gamma_table(results)
    suffix = f"-{dataset.name}" if trained_on else ""
    own_test_set = not config.data.holdout_identities and trained_on in (None, dataset.name)
    if config.eval.crop == "top" and own_test_set:  # the paper's protocol
        published = comparison.sweep(results, dataset.name, compared_model(config))
        if published and config.match.gallery_gammas:
            published = published.rstrip() + "\n\nOurs meet a gallery that is cropped too."
        text = text.rstrip() + "\n\n" + published
    text = text.rstrip()
    if not hosts.is_first():
        return results
    print("\n" + text + f"\n(evaluated in {duration(seconds)}; written to {output})")
    record = {
        "recipe": config.recipe,
        "seed": config.seed,
        "steps": steps,
        "dataset": dataset.name,
        **({"trained_on": trained_on} if trained_on else {}),
        "notes": dataset.notes[1:],
        "protocol": {"crop": config.eval.crop, "queries": len(query), "gallery": len(gallery), "skipped": skipped},
        "match": config.match.to_dict() | {"flip": config.eval.flip},
        "chance_rank1": chance,
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "seconds": round(seconds, 1),
        "gammas": {
            str(gamma): {"cmc": r["cmc"].tolist(), "mAP": r["mAP"], "mINP": r["mINP"]} for gamma, r in results.items()
        },
    }
    write(output, f"evaluation{suffix}", record, text + (remarks(dataset) if trained_on else ""))
    curve = {g: {"rank-1": float(r["cmc"][0]), "mAP": r["mAP"]} for g, r in results.items()}
    with replacing(output / f"gamma{suffix}.png") as path:
        title = plots.gamma_title(dataset.name, config.eval.crop, plots.network(config), seeds=[1])
        plots.gamma_curves(path, {paper.title(compared_model(config)): curve}, title, chance)
    return results


def write(output: Path, name: str, record: Mapping[str, Any], text: str) -> None:
    """NAME.json and NAME.md. Those of an evaluation by another protocol or matching stay, as NAME-1, NAME-2, ..."""

    def setting(record: Mapping[str, Any]) -> Any:
        return [record.get(key) for key in ("protocol", "match")] + list(record.get("gammas", ()))

    with contextlib.suppress(OSError, ValueError, AttributeError):
        earlier = json.loads((output / f"{name}.json").read_text())
        if setting(earlier) != setting(json.loads(json.dumps(record))):
            kept = next(f"{name}-{n}" for n in itertools.count(1) if not (output / f"{name}-{n}.json").exists())
            for suffix in (".json", ".md"):
                (output / f"{name}{suffix}").replace(output / f"{kept}{suffix}")
            print(f"({name}.md was of other settings: it is {kept}.md now)")
    write_atomically(output / f"{name}.md", text + "\n")
    write_atomically(output / f"{name}.json", json.dumps(record, indent=1) + "\n")


def headline(config: ConfigDict, dataset: Any, steps: int, trained_on: str | None = None) -> str:
    """What was trained, and where it is evaluated."""
    where = f"trained on {trained_on}, evaluated on {dataset.name}" if trained_on else f"on {dataset.name}"
    return f"Recipe {config.recipe}, seed {config.seed}, {steps} steps, {where}."


def remarks(dataset: Any) -> str:
    """What is missing or unexpected in a dataset, as the end of a report: all notes but the first, which says where
    it lies on this machine."""
    return "".join(f"\n\n{note}" for note in dataset.notes[1:])


if __name__ == "__main__":
    cli.run(main)
