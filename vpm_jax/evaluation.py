"""Evaluation: from a dataset's query and gallery images to metrics and a report.

Queries are cropped to every gamma (kept area ratio); the gallery stays whole unless match.gallery_gammas is set; Eq. 4
compares the two. Partial-REID and Partial-iLIDS have their own protocols (see `partial`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vpm_jax import comparison, metrics, paper, parallel, partial, plots, step
from vpm_jax import config as config_lib
from vpm_jax.data.datasets import DATASETS, TITLES
from vpm_jax.data.inventory import digest_of_test_set
from vpm_jax.data.sources import load_dataset
from vpm_jax.data.split import Dataset, Split
from vpm_jax.description import CroppedSplit, Describer, Description, Variables, route
from vpm_jax.errors import UserError
from vpm_jax.keys import EVALUATE, NO_RESULT, keys_with
from vpm_jax.matching import pairwise_distance
from vpm_jax.regions import RegionGrid, gallery_crops
from vpm_jax.reranking import rerank
from vpm_jax.runs import hosts
from vpm_jax.runs.checkpoints import Checkpoints
from vpm_jax.runs.logs import Progress, duration, make_folder, replacing, write_atomically
from vpm_jax.runs.workdir import read_run

PIECE_BYTES = 2**28  # of distractor features in memory at a time
BLOCK_BYTES = 2**28  # of distances in memory at a time

Results = Mapping[Any, Mapping[str, Any]]  # {gamma, or protocol of a partial dataset: `metrics.rank_metrics`}


def evaluate_run(
    workdir: Path,
    output: Path,
    overrides: Sequence[str] = (),
    dataset_name: str | None = None,
    root: str | None = None,
    rerank: bool = False,
) -> None:
    """Evaluates a run's newest checkpoint and writes the report into `output`. Every process of a job calls it.

    Args:
      workdir: the run's folder.
      output: a folder, created if missing.
      overrides: --config.KEY=VALUE.
      dataset_name: evaluate on this dataset instead of the run's; looked up in $VPM_DATA or ./data without `root`.
      root: the dataset's folder, zip or CSV; None: config.data.root.
      rerank: turns match.rerank on.

    Raises:
      UserError: for any problem the user can fix.
    """
    parallel.prepare_backend()
    if dataset_name:
        if dataset_name not in TITLES:
            raise UserError(f"--dataset is {dataset_name!r}, expected one of {', '.join(TITLES)}.")
        # The run's data.root points to its own dataset.
        overrides = ["--config.data.root=", *overrides]
    saved, config = read_run(workdir, overrides)
    config.match.rerank = config.match.rerank or rerank
    config_lib.check_gallery_gammas(config)
    # A workdir keeps its run's own evaluation: the one with the run's settings, on its own test set.
    before, now = config_lib.flatten(saved), config_lib.flatten(config)
    own = all(before[key] == now[key] for key in set(keys_with(EVALUATE)) - set(keys_with(NO_RESULT)))
    own = own and root is None and output.resolve() == workdir.resolve()
    own = own or bool(dataset_name) or not (output / "config.json").exists()
    if dataset_name:
        config.data.name, config.data.holdout_identities = dataset_name, 0
    if root is not None:
        config.data.root = root
    config.data.also_train = ""  # extra training sets are not needed here

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
    trained_on = saved.data.name if dataset_name or partial.is_partial(dataset.name) else None
    describer, run = Describer(config, mesh), workdir.resolve().name
    evaluate_and_report(describer, variables, dataset, output, int(state.step), trained_on, run=run, own=own)


def check(config: ConfigDict, dataset: Dataset) -> None:
    """Checks before training that the dataset can be evaluated after it.

    Raises:
      UserError: if no query has a match in the gallery, or eval.batch does not divide over the devices.
    """
    try:
        chance_rank1(by_protocol(config, dataset))
    except ValueError as error:
        advice = "check that query and gallery come from the same dataset"
        if np.isin(dataset.query.identity, dataset.gallery.identity[dataset.gallery.identity != -1]).any():
            advice = (
                "every gallery image of a query's identity is from the query's own camera and so not ranked; "
                "--config.eval.same_camera=keep ranks them"
            )
        raise UserError(f"{dataset.name} cannot be evaluated ({error}): {advice}.") from error
    parallel.data_mesh(config.eval.batch)


def by_protocol(config: ConfigDict, dataset: Dataset) -> Dataset:
    """The dataset for the metrics: without cameras if eval.same_camera is "keep", so that nothing is dropped."""
    if config.eval.same_camera == "drop":
        return dataset
    query, gallery = (replace(split, camera=None) for split in (dataset.query, dataset.gallery))
    return replace(dataset, query=query, gallery=gallery)


def chance_rank1(dataset: Dataset) -> float:
    """`metrics.chance_rank1` of a dataset."""
    query, gallery = dataset.query, ranked(dataset.gallery)
    return metrics.chance_rank1(query.identity, gallery.identity, query.camera, gallery.camera)


def ranked(gallery: Split) -> Split:
    """The gallery without junk (identity -1), which no protocol ranks."""
    return gallery.take(gallery.identity != -1)


# ---- From images to metrics ----


def evaluate(
    describer: Describer, variables: Variables, dataset: Dataset, check: Callable[[], None] | None = None
) -> dict[Any, dict[str, Any]]:
    """{gamma: `metrics.rank_metrics`} of queries cropped to each of config.eval.gammas.

    For a partial dataset: {"all-shot": `metrics.rank_metrics` of all queries against the whole gallery, "single-shot":
    `partial.single_shot`}. "single-shot" is omitted if every identity has one image (Partial-iLIDS), where both
    are the same, and with re-ranking, which would use neighbors outside the groups.

    `check` is called between batches and may raise to stop.
    """
    config, dataset = describer.config, by_protocol(describer.config, dataset)
    query, gallery = dataset.query, ranked(dataset.gallery)
    is_partial = partial.is_partial(dataset.name)
    gammas = (1.0,) if is_partial else config.eval.gammas
    rankings = [metrics.Ranking(query.identity, gallery.identity, query.camera, gallery.camera) for _ in gammas]
    most_images = max(np.unique(split.identity, return_counts=True)[1].max() for split in (query, gallery))
    single = is_partial and "single" in DATASETS[dataset.name].protocol.shots
    single = single and most_images > 1 and not config.match.rerank
    matrix = np.empty((len(query), len(gallery)), np.float32) if single else None
    for block in blocks(describer, variables, [CroppedSplit(query, gamma) for gamma in gammas], gallery, check):
        rankings[block.number].add(block.distance, block.rows, block.columns)
        if matrix is not None:
            matrix[block.rows, block.columns] = block.distance
    if not is_partial:
        return {gamma: ranking.metrics() for gamma, ranking in zip(gammas, rankings, strict=True)}
    results = {"all-shot": rankings[0].metrics()}
    if matrix is not None:
        results["single-shot"] = partial.single_shot(matrix, query.identity, gallery.identity)
    return results


class Block(NamedTuple):
    """Distances float32 [q, g] of some queries to some gallery images."""

    number: int  # index of the query set
    rows: slice | np.ndarray  # indices of the queries
    columns: slice  # indices of the gallery images
    distance: np.ndarray


def blocks(
    describer: Describer,
    variables: Variables,
    queries: Sequence[CroppedSplit],
    gallery: Split,
    check: Callable[[], None] | None = None,
) -> Iterator[Block]:
    """The distances of query sets to the gallery by config.match, block by block, in the order of `metrics.Ranking`.

    A query's first block extends to the last gallery image that has the identity of any query. The images after it,
    such as added distractors, are described and compared PIECE_BYTES of features at a time, so that memory does not
    depend on their number. With match.gallery_gammas, each query is compared with the gallery crop closest to it
    (`description.route`). `check` is as in `evaluate`.

    Raises:
      UserError: if re-ranking needs more memory than there is.
    """
    config = describer.config
    if config.match.rerank:
        yield from _reranked(describer, variables, queries, gallery, check)
        return
    described = describer.splits(variables, queries, check, "features of queries")
    crops = gallery_crops(config_lib.sides(config), config.match.gallery_gammas)
    routes = [route(query, crops, RegionGrid(*config.model.grid)) for query in described]
    stops = _stops(queries[0].split, gallery, described[0], config.eval.batch)
    for number, crop in enumerate(crops, 1):
        if not any(crop in rows for rows in routes):
            continue
        title = "features of the gallery" + f" ({crop}, {number} of {len(crops)})" * (len(crops) > 1)
        images, start = CroppedSplit(gallery, crop.gamma, crop.side), 0
        for piece in describer.stream(variables, images, stops, Progress(title, len(gallery)), check):
            columns = slice(start, start + len(piece))
            size = max(1, BLOCK_BYTES // (4 * len(piece)))
            for index, (query, queries_of) in enumerate(zip(described, routes, strict=True)):
                chosen = queries_of.get(crop, np.empty(0, int))
                for first in range(0, len(chosen), size):
                    rows = chosen[first : first + size]
                    subset = query if len(rows) == len(query) else query[rows]
                    yield Block(index, rows, columns, pairwise_distance(config.match, subset, piece))
            start += len(piece)


def _stops(query: Split, gallery: Split, described: Description, batch: int) -> list[int]:
    """Where `blocks` divides the gallery: multiples of `batch`."""
    last = int(np.flatnonzero(np.isin(gallery.identity, query.identity)).max(initial=-1)) + 1
    size = min(PIECE_BYTES // described.features[0].nbytes, BLOCK_BYTES // (4 * len(query)))
    size = max(1, size // batch) * batch
    return list(range(-(-last // batch) * batch or size, len(gallery), size))


def distances(
    describer: Describer,
    variables: Variables,
    queries: Sequence[CroppedSplit],
    gallery: Split,
    check: Callable[[], None] | None = None,
) -> list[np.ndarray]:
    """The distances float32 [Q, G] of each query set to the gallery: `blocks`, as whole matrices."""
    matrices = [np.empty((len(query.split), len(gallery)), np.float32) for query in queries]
    for number, rows, columns, distance in blocks(describer, variables, queries, gallery, check):
        matrices[number][rows, columns] = distance
    return matrices


def _reranked(
    describer: Describer,
    variables: Variables,
    queries: Sequence[CroppedSplit],
    gallery: Split,
    check: Callable[[], None] | None,
) -> Iterator[Block]:
    """Distances after k-reciprocal re-ranking: one block for each query set."""
    match = describer.config.match
    needed, available = 4 * len(gallery) ** 2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise UserError(
            f"Re-ranking needs the distances between all {len(gallery):,} gallery images, {needed / 2**30:,.0f} GiB, "
            f"and this machine has {available / 2**30:,.0f} GiB: leave out match.rerank, or data.distractors."
        )
    whole, *described = describer.splits(variables, [CroppedSplit(gallery), *queries], check)
    gallery_distance = pairwise_distance(match, whole, whole)
    parameters = match.rerank_k1, match.rerank_k2, match.rerank_lambda, match.squared
    for number, query in enumerate(described):
        inputs = pairwise_distance(match, query, whole), pairwise_distance(match, query, query), gallery_distance
        yield Block(number, slice(None), slice(None), rerank(*inputs, *parameters))


def means(results: Results) -> dict[str, float]:
    """Rank-1 and mAP averaged over gamma, to compare evaluations of a run."""
    return {
        "rank1": float(np.mean([r["cmc"][0] for r in results.values()])),
        "mAP": float(np.mean([r["mAP"] for r in results.values()])),
    }


# ---- The report ----


class _Protocol(NamedTuple):
    """The protocol-specific content of a report."""

    lines: list[str]
    settings: dict[str, Any]  # the record's "protocol"
    results: dict[str, Any]  # the record's "gammas" or "results"
    table: str  # with the published numbers
    chance: str = ""  # which results the chance rank-1 refers to, if there are several


def evaluate_and_report(
    describer: Describer,
    variables: Variables,
    dataset: Dataset,
    output: Path,
    steps: int,
    trained_on: str | None = None,
    evaluated: tuple[Results, float] | None = None,
    run: str | None = None,
    own: bool = True,
) -> Results:
    """Evaluates, prints the table, and writes evaluation.json, evaluation.md and gamma.png into `output`.

    Args:
      steps: the number of training steps.
      trained_on: the training set if it is another dataset; the files are then evaluation-DATASET.json and so on.
      evaluated: (results, seconds) of an earlier evaluation to report.
      run: the name of the run; None: that of `output`, which is its workdir.
      own: whether this evaluation takes the name without a number, as `write` does.
    """
    config, started = describer.config, time.monotonic()
    results, seconds = evaluated or (evaluate(describer, variables, dataset), 0.0)
    seconds += time.monotonic() - started
    is_partial, dataset = partial.is_partial(dataset.name), by_protocol(config, dataset)
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
    record = {
        "run": output.resolve().name if run is None else run,
        "recipe": config.recipe,
        "seed": config.seed,
        "steps": steps,
        "dataset": dataset.name,
        **({"trained_on": trained_on} if trained_on else {}),
        "test_set": digest_of_test_set(dataset.query, dataset.gallery),
        "notes": dataset.notes[1:],
        "protocol": protocol.settings,
        "match": config.match.to_dict() | {"flip": config.eval.flip},
        "input": [config.data.height, config.data.width],
        "chance_rank1": chance,
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "seconds": round(seconds, 1),
        **protocol.results,
    }
    notes = dataset.notes[1:] if trained_on else ()  # the first is the dataset's path on this machine
    name = f"evaluation-{dataset.name}" if trained_on else "evaluation"
    name = write(output, name, record, "\n\n".join([text, *notes]), own)
    if not is_partial:  # a partial dataset has no gammas
        curve = {g: {"rank-1": float(r["cmc"][0]), "mAP": r["mAP"]} for g, r in results.items()}
        with replacing(output / _picture(name)) as path:
            title = plots.gamma_title(dataset.name, config.eval.crop, plots.network(config), seeds=[1])
            plots.gamma_curves(path, {paper.title(paper.method_of(config)): curve}, title, chance)
    print("\n" + text + f"\n(evaluated in {duration(seconds)}; written to {output / name}.md)")
    return results


def _gamma_protocol(config: ConfigDict, dataset: Dataset, results: Results, trained_on: str | None) -> _Protocol:
    query, gallery = dataset.query, ranked(dataset.gallery)
    junk = len(dataset.gallery) - len(gallery)
    skipped = next(iter(results.values()))["skipped"]
    kept = "whole and cropped" if config.match.gallery_gammas else "whole"
    line = (
        f"Protocol: single query, {len(query)} queries cropped to gamma ({config.eval.crop}), {len(gallery)} gallery "
        f"images {kept} ({junk} of identity -1 left out); {_dropped(config, query)}; {skipped} queries without a match "
        "skipped."
    )
    table = metrics.gamma_table(results)
    own_test_set = not config.data.holdout_identities and trained_on in (None, dataset.name)
    if config.eval.crop == "top" and config.eval.same_camera == "drop" and own_test_set:  # the paper's protocol
        published = comparison.sweep(results, dataset.name, paper.method_of(config))
        if published and config.match.gallery_gammas:
            published = published.rstrip() + "\n\nOur numbers use a cropped gallery; the paper's do not."
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


def _dropped(config: ConfigDict, query: Split) -> str:
    if config.eval.same_camera == "keep":
        return "images of the same camera stay (eval.same_camera=keep)"
    return "same identity and camera dropped" if query.camera is not None else "no cameras, so nothing is dropped"


def _partial_protocol(config: ConfigDict, dataset: Dataset, results: Results, trained_on: str | None) -> _Protocol:
    query, gallery = dataset.query, ranked(dataset.gallery)
    skipped = results["all-shot"]["skipped"]
    lines = [
        f"Protocol: {len(query)} partial images as queries, uncropped (gamma 1.0), {len(gallery)} whole images as "
        f"gallery; {_dropped(config, query)}; {skipped} queries without a match skipped."
    ]
    rows = {f"all-shot ({len(query)} x {len(gallery)})": results["all-shot"]}
    if single := results.get("single-shot"):
        q, g = single["groups"]
        people = f"{len(np.unique(query.identity))} x {len(np.unique(gallery.identity))}"
        rows[f"single-shot ({q} x {g} groups of {people})"] = single
        deviations = ", ".join(f"{100 * metrics.rank_k(single['spread'], k):.1f} at R-{k}" for k in (1, 3, 5))
        lines.append(
            "Single-shot: group k holds the k-th image by name of every identity; the mean over all pairs of a query "
            f"group and a gallery group (standard deviation {deviations}). The paper does not say which protocol it "
            "used."
        )
    remark = "Published models were trained on Market-1501."
    if trained_on != "market1501":
        remark += f" This run was trained on {trained_on}, so the differences do not compare methods."
    return _Protocol(
        lines,
        {"queries": len(query), "gallery": len(gallery), "skipped": skipped, "gamma": 1.0},
        {"results": {name: {k: np.asarray(v).tolist() for k, v in r.items()} for name, r in results.items()}},
        f"{TITLES[dataset.name]}, in percent. {remark}\n\n{comparison.partial(rows, dataset.name)}",
        "all-shot, ",
    )


def matching_in_words(config: ConfigDict) -> str:
    """The settings of config.match and eval.flip, for a report."""
    m = config.match
    parameters = f"k1 {m.rerank_k1}, k2 {m.rerank_k2}, lambda {m.rerank_lambda:g}"
    reranked = f", re-ranked by k-reciprocal neighbors ({parameters})" * m.rerank
    variant = " after the neck" * (m.feature == "after") + " (mean of an image and its mirror)" * config.eval.flip
    features = f" of features{variant}" if variant else ""
    gammas = ", ".join(f"{gamma:g}" for gamma in m.gallery_gammas)
    crops = f"; the gallery also cropped to {gammas}, each query compared with the closest crop" * bool(gammas)
    return f"Eq. 4, {m.visibility} visibility, {'squared ' * m.squared}distances{features}{reranked}{crops}"


def write(output: Path, name: str, record: Mapping[str, Any], text: str, own: bool = True) -> str:
    """Writes NAME.json and NAME.md, and returns the name.

    Files of an evaluation with other settings are kept: with `own` they are renamed to NAME-1, NAME-2, ...; otherwise
    they stay and the new files get a number.
    """
    numbered = (f"{name}-{number}" for number in itertools.count(1))
    if own:
        if _is_other(output / f"{name}.json", record):
            kept = next(other for other in numbered if not (output / f"{other}.json").exists())
            for suffix in (".json", ".md"):
                with contextlib.suppress(FileNotFoundError):
                    (output / f"{name}{suffix}").replace(output / f"{kept}{suffix}")
            with contextlib.suppress(FileNotFoundError):
                (output / _picture(name)).replace(output / _picture(kept))
            print(f"({name}.md had other settings: renamed to {kept}.md)")
    elif not (output / f"{name}.json").exists() or _is_other(output / f"{name}.json", record):
        name = next(other for other in numbered if not _is_other(output / f"{other}.json", record))
    write_atomically(output / f"{name}.md", text + "\n")
    write_atomically(output / f"{name}.json", json.dumps(record, indent=1) + "\n")
    return name


def _picture(name: str) -> str:
    """The file of an evaluation's curve over gamma."""
    return f"{name.replace('evaluation', 'gamma', 1)}.png"


def _is_other(file: Path, record: Mapping[str, Any]) -> bool:
    """Whether a file holds anything but an evaluation of the same run with the same settings.

    Settings that an earlier version did not record count as equal.
    """
    if not file.exists():
        return False
    try:
        earlier, now = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(record))
        pairs = [(earlier[key], now[key]) for key in ("run", "dataset", "test_set", "input") if key in earlier]
        for group in ("protocol", "match"):
            pairs += [(value, now[group].get(key)) for key, value in earlier[group].items()]
        pairs.append((list(earlier.get("gammas", ())), list(now.get("gammas", ()))))
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return True
    return any(before != after for before, after in pairs)
