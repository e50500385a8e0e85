"""Evaluation: query and gallery of a dataset from images to metrics, and the report of it.

Queries are cropped to every gamma (kept area ratio), the gallery stays whole (but for match.gallery_gammas), Eq. 4
compares them. Partial-REID and Partial-iLIDS have their own protocols: partial images as they are against whole ones
(see `partial`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vpm_jax import comparison, metrics, paper, parallel, partial, plots, step
from vpm_jax import config as config_lib
from vpm_jax.data.datasets import TITLES
from vpm_jax.data.sources import load_dataset
from vpm_jax.data.split import Dataset, Split
from vpm_jax.description import CroppedSplit, Describer, Description, route
from vpm_jax.errors import UserError
from vpm_jax.matching import pairwise_distance
from vpm_jax.regions import RegionGrid, gallery_parts
from vpm_jax.reranking import rerank
from vpm_jax.runs import hosts
from vpm_jax.runs.checkpoints import Checkpoints
from vpm_jax.runs.logs import duration, make_folder, replacing, write_atomically
from vpm_jax.runs.workdir import read_run

Results = Mapping[Any, Mapping[str, Any]]  # {gamma, or protocol of a partial dataset: `metrics.rank_metrics`}


def evaluate_run(
    workdir: Path,
    output: Path,
    overrides: Sequence[str] = (),
    dataset_name: str | None = None,
    root: str | None = None,
    rerank: bool = False,
) -> None:
    """Evaluates the newest checkpoint of a run and writes the report into `output`; of many processes, all call it.

    Args:
      workdir: of the run.
      output: a folder, made if need be.
      overrides: --config.KEY=VALUE.
      dataset_name: another dataset than the run's, which then lies in $VPM_DATA or ./data unless its root is given.
      root: of the dataset; None: config.data.root.
      rerank: match.rerank.

    Raises:
      UserError: for any problem that the user can fix.
    """
    parallel.prepare_backend()
    if dataset_name:
        if dataset_name not in TITLES:
            raise UserError(f"--dataset is {dataset_name!r}, but the known ones are {', '.join(TITLES)}.")
        # Not where the run's own dataset lies, unless the user says so.
        overrides = ["--config.data.root=", *overrides]
    saved, config = read_run(workdir, overrides)
    config.match.rerank = config.match.rerank or rerank
    config_lib.check_gallery_gammas(config)
    if dataset_name:
        config.data.name, config.data.holdout_identities = dataset_name, 0
    if root is not None:
        config.data.root = root
    config.data.also_train = ""  # which need not be at hand

    dataset = hosts.in_turn(lambda: load_dataset(config.data))
    if dataset_name:
        print(*dataset.notes, sep="\n")
    check(config, dataset)
    hosts.check_job(config, dataset)
    mesh = parallel.data_mesh(config.eval.batch)
    if hosts.is_first():
        make_folder(output)
    with Checkpoints(workdir, keep=0) as checkpoints:
        state, _ = checkpoints.restore(step.state_shapes(config))
    variables = parallel.replicate(mesh, step.evaluated(state))
    trained_on = saved.data.name if dataset_name or dataset.name in partial.DATASETS else None
    evaluate_and_report(Describer(config, mesh), variables, dataset, output, int(state.step), trained_on)


def check(config: ConfigDict, dataset: Dataset) -> None:
    """Refuses, before hours of training, what could not be evaluated after them.

    Raises:
      UserError: if no query has a match in the gallery, or the batch does not divide over the devices.
    """
    try:
        chance_rank1(dataset)
    except ValueError as error:
        raise UserError(
            f"{dataset.name} cannot be evaluated ({error}): check that query and gallery are of the same dataset."
        ) from error
    parallel.data_mesh(config.eval.batch)


def chance_rank1(dataset: Dataset) -> float:
    """`metrics.chance_rank1` of a dataset's query and gallery."""
    query, gallery = dataset.query, ranked(dataset.gallery)
    return metrics.chance_rank1(query.identity, gallery.identity, query.camera, gallery.camera)


def ranked(gallery: Split) -> Split:
    """The gallery without junk (identity -1), which no protocol ranks: no features are spent on it."""
    return gallery.take(gallery.identity != -1)


# ---- From images to metrics ----


def evaluate(
    describer: Describer, variables: Any, dataset: Dataset, check: Callable[[], None] | None = None
) -> dict[Any, dict[str, Any]]:
    """{gamma: `metrics.rank_metrics`} of queries cropped to each of config.eval.gammas.

    Of a partial dataset {"all-shot": `metrics.rank_metrics` of all queries against the whole gallery, "single-shot":
    `partial.single_shot`}. "single-shot" is left out where it is the same, with one image of each identity
    (Partial-iLIDS), and where re-ranking would have found neighbors outside its groups.

    `check` is called between batches, and may raise to end the evaluation.
    """
    query, gallery = dataset.query, ranked(dataset.gallery)
    sides = query.identity, gallery.identity, query.camera, gallery.camera
    if dataset.name not in partial.DATASETS:
        gammas = describer.config.eval.gammas
        matrices = distances(describer, variables, [CroppedSplit(query, gamma) for gamma in gammas], gallery, check)
        return {g: metrics.rank_metrics(distance, *sides) for g, distance in zip(gammas, matrices, strict=True)}
    [distance] = distances(describer, variables, [CroppedSplit(query)], gallery, check)
    results = {"all-shot": metrics.rank_metrics(distance, *sides)}
    most = max(np.unique(split.identity, return_counts=True)[1].max() for split in (query, gallery))
    if most > 1 and not describer.config.match.rerank:
        results["single-shot"] = partial.single_shot(distance, query.identity, gallery.identity)
    return results


def distances(
    describer: Describer,
    variables: Any,
    queries: Sequence[CroppedSplit],
    gallery: Split,
    check: Callable[[], None] | None = None,
) -> Iterator[np.ndarray]:
    """The distances float32 [Q, G] of each set of queries to a gallery as config.match says; `check` as in `evaluate`.

    With match.gallery_gammas a query is compared with the gallery cropped as the query seems to be, or whole if that
    is nearer.
    """
    match = describer.config.match
    if match.gallery_gammas:
        yield from _among_crops(describer, variables, queries, gallery, check)
        return
    whole, *described = describer.splits(variables, [CroppedSplit(gallery), *queries], check)
    among = pairwise_distance(match, whole, whole) if match.rerank else None  # once for all
    for query in described:
        distance = pairwise_distance(match, query, whole)
        yield distance if among is None else _reranked(match, distance, query, among)


def _among_crops(
    describer: Describer,
    variables: Any,
    queries: Sequence[CroppedSplit],
    gallery: Split,
    check: Callable[[], None] | None,
) -> list[np.ndarray]:
    """One crop's features of the gallery are held at a time, and all distances."""
    config = describer.config
    crops = gallery_parts(config_lib.sides(config), config.match.gallery_gammas)
    described = describer.splits(variables, queries, check, "features of queries")
    routes = [route(query, crops, RegionGrid(*config.model.grid)) for query in described]
    matrices = [np.empty((len(query), len(gallery)), np.float32) for query in described]
    for number, crop in enumerate(crops, 1):
        if any(crop in rows for rows in routes):
            title = f"features of the gallery ({crop}, {number} of {len(crops)})"
            cropped = [CroppedSplit(gallery, crop.gamma, crop.side)]
            [there] = describer.splits(variables, cropped, check, title)
            for query, rows, distance in zip(described, routes, matrices, strict=True):
                if crop in rows:
                    distance[rows[crop]] = pairwise_distance(config.match, query[rows[crop]], there)
    return matrices


def _reranked(match: ConfigDict, distance: np.ndarray, query: Description, among: np.ndarray) -> np.ndarray:
    """Distances [Q, G] re-ranked by k-reciprocal neighbors; `among` are those of the gallery, [G, G]."""
    own = pairwise_distance(match, query, query)
    return rerank(distance, own, among, match.rerank_k1, match.rerank_k2, match.rerank_lambda, match.squared)


def means(results: Results) -> dict[str, float]:
    """What two evaluations are compared by: rank-1 and mAP, the means over gamma."""
    return {
        "rank1": float(np.mean([r["cmc"][0] for r in results.values()])),
        "mAP": float(np.mean([r["mAP"] for r in results.values()])),
    }


# ---- The report ----


class _Protocol(NamedTuple):
    """What a report says of its protocol."""

    lines: list[str]
    settings: dict[str, Any]  # "protocol" of the record
    results: dict[str, Any]  # of the record: "gammas" or "results"
    table: str  # with the published numbers
    chance: str = ""  # the results that the chance is of, where there are several


def evaluate_and_report(
    describer: Describer,
    variables: Any,
    dataset: Dataset,
    output: Path,
    steps: int,
    trained_on: str | None = None,
    evaluated: tuple[Results, float] | None = None,
) -> Results:
    """Evaluates (unless `evaluated`, results and the seconds they took, is given), prints the table, and writes
    evaluation.json, evaluation.md and gamma.png into `output`; evaluation-DATASET.json and so on with the name of the
    dataset that it was `trained_on`. A partial dataset has no gammas, hence no gamma.png."""
    config, started = describer.config, time.monotonic()
    results, seconds = evaluated or (evaluate(describer, variables, dataset), 0.0)
    seconds += time.monotonic() - started
    is_partial = dataset.name in partial.DATASETS
    protocol = (_partial_protocol if is_partial else _gamma_protocol)(config, dataset, results, trained_on)
    chance = chance_rank1(dataset)
    where = f"trained on {trained_on}, evaluated on {dataset.name}" if trained_on else f"on {dataset.name}"
    lines = [
        f"Recipe {config.recipe}, seed {config.seed}, {steps} steps, {where}.",
        *protocol.lines,
        f"Matching: {matching_in_words(config)}. Chance: rank-1 {chance:.2%} ({protocol.chance}mean over random "
        "rankings).",
    ]
    text = "\n".join(lines) + "\n\n" + protocol.table.rstrip()
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
        "protocol": protocol.settings,
        "match": config.match.to_dict() | {"flip": config.eval.flip},
        "chance_rank1": chance,
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "seconds": round(seconds, 1),
        **protocol.results,
    }
    suffix = f"-{dataset.name}" if trained_on else ""
    # All notes but the first, which says where the dataset lies on this machine.
    remarks = dataset.notes[1:] if trained_on else ()
    write(output, f"evaluation{suffix}", record, "\n\n".join([text, *remarks]))
    if not is_partial:
        curve = {g: {"rank-1": float(r["cmc"][0]), "mAP": r["mAP"]} for g, r in results.items()}
        with replacing(output / f"gamma{suffix}.png") as path:
            title = plots.gamma_title(dataset.name, config.eval.crop, plots.network(config), seeds=[1])
            plots.gamma_curves(path, {paper.title(paper.method_of(config)): curve}, title, chance)
    return results


def _gamma_protocol(config: ConfigDict, dataset: Dataset, results: Results, trained_on: str | None) -> _Protocol:
    query, gallery = dataset.query, ranked(dataset.gallery)
    junk = len(dataset.gallery) - len(gallery)
    skipped = next(iter(results.values()))["skipped"]
    dropped = "same identity and camera dropped" if query.camera is not None else "no cameras, so nothing is dropped"
    kept = "whole and cropped" if config.match.gallery_gammas else "whole"
    line = (
        f"Protocol: single query, {len(query)} queries keeping their {config.eval.crop} gamma, {len(gallery)} gallery "
        f"images {kept} ({junk} of identity -1 left out); {dropped}; {skipped} queries without a match skipped."
    )
    table = metrics.gamma_table(results)
    own_test_set = not config.data.holdout_identities and trained_on in (None, dataset.name)
    if config.eval.crop == "top" and own_test_set:  # the paper's protocol
        published = comparison.sweep(results, dataset.name, paper.method_of(config))
        if published and config.match.gallery_gammas:
            published = published.rstrip() + "\n\nOurs meet a gallery that is cropped too."
        table += "\n" + published
    return _Protocol(
        [line],
        {"crop": config.eval.crop, "queries": len(query), "gallery": len(gallery), "skipped": skipped},
        {
            "gammas": {
                str(g): {"cmc": r["cmc"].tolist(), "mAP": r["mAP"], "mINP": r["mINP"]} for g, r in results.items()
            }
        },
        table,
    )


def _partial_protocol(config: ConfigDict, dataset: Dataset, results: Results, trained_on: str | None) -> _Protocol:
    query, gallery = dataset.query, dataset.gallery
    skipped = results["all-shot"]["skipped"]
    lines = [
        f"Protocol: {len(query)} partial images as queries, as they are (gamma 1.0), {len(gallery)} whole ones as "
        f"gallery; no cameras, so nothing is dropped; {skipped} queries without a match skipped."
    ]
    rows = {f"all-shot ({len(query)} x {len(gallery)})": results["all-shot"]}
    if single := results.get("single-shot"):
        q, g = single["groups"]
        people = f"{len(np.unique(query.identity))} x {len(np.unique(gallery.identity))}"
        rows[f"single-shot ({q} x {g} groups of {people})"] = single
        spread = ", ".join(f"{100 * metrics.rank_k(single['spread'], k):.1f} at R-{k}" for k in (1, 3, 5))
        lines.append(
            "Single-shot: image k by name of every identity makes group k; the mean over every group of queries "
            f"against every group of the gallery (standard deviation {spread}). The paper does not say which of the "
            "two it measured."
        )
    remark = "Published numbers are of training on Market-1501."
    if trained_on != "market1501":
        remark += f" This run was trained on {trained_on}: the differences say nothing of the method."
    return _Protocol(
        lines,
        {"queries": len(query), "gallery": len(gallery), "skipped": skipped, "gamma": 1.0},
        {"results": {name: {k: np.asarray(v).tolist() for k, v in r.items()} for name, r in results.items()}},
        f"{TITLES[dataset.name]}, in percent. {remark}\n\n{comparison.partial(rows, dataset.name)}",
        "all-shot, ",
    )


def matching_in_words(config: ConfigDict) -> str:
    m = config.match
    numbers = f"k1 {m.rerank_k1}, k2 {m.rerank_k2}, lambda {m.rerank_lambda:g}"
    reranked = f", re-ranked by k-reciprocal neighbours ({numbers})" * m.rerank
    made = " after the neck" * (m.feature == "after") + " (means over an image and its mirror)" * config.eval.flip
    features = f" of features{made}" if made else ""
    cropped = ", ".join(f"{gamma:g}" for gamma in m.gallery_gammas)
    crops = f"; the gallery also cropped to {cropped}, each query compared with the crop most like it" * bool(cropped)
    return f"Eq. 4, {m.visibility} visibility, {'squared ' * m.squared}distances{features}{reranked}{crops}"


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
