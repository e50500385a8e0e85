"""Evaluation: from a dataset's query and gallery images to metrics and a report.

Queries are cropped to every gamma (kept area ratio); the gallery stays whole unless match.gallery_gammas is set; Eq. 4
compares the two. Partial-REID and Partial-iLIDS have their own protocols (see `partial`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vpm_jax import captions, comparison, metrics, paper, parallel, partial, plots, saved, step
from vpm_jax import config as config_lib
from vpm_jax.api import fingerprint
from vpm_jax.data.datasets import DATASETS, TITLES
from vpm_jax.data.inventory import digest_of_test_set
from vpm_jax.data.sources import load_test_set
from vpm_jax.data.split import Dataset, Split
from vpm_jax.description import CroppedSplit, Describer, FeatureSource, Pooled, Variables
from vpm_jax.disk import make_folder, replacing, write_atomically
from vpm_jax.distances import blocks
from vpm_jax.errors import UserError
from vpm_jax.keys import EVALUATE, NO_RESULT, keys_with
from vpm_jax.progress import duration
from vpm_jax.runs import hosts
from vpm_jax.runs.checkpoints import Checkpoints
from vpm_jax.runs.workdir import read_run

Results = Mapping[Any, Mapping[str, Any]]  # {gamma, or protocol of a partial dataset: `metrics.rank_metrics`}


def evaluate_run(
    workdir: Path,
    output: Path,
    overrides: Sequence[str] = (),
    dataset_name: str | None = None,
    root: str | None = None,
    save: Sequence[str] = (),
    features: Path | None = None,
    queries: int = 0,
) -> None:
    """Evaluates a run's newest checkpoint and writes the report into `output`. Every process of a job calls it.

    Args:
      workdir: the run's folder.
      output: a folder, created if missing.
      overrides: --config.KEY=VALUE.
      dataset_name: evaluate on this dataset instead of the run's; looked up in $VPM_DATA or ./data without `root`.
      root: the dataset's folder, zip or CSV; None: config.data.root.
      save: files for other tools, written into a folder in `output`: "features", "distances", "ranking".
      features: match the features that an earlier evaluation saved in this folder, instead of extracting them.
      queries: evaluate on this many evenly spaced queries; 0: all.

    Raises:
      UserError: for any problem the user can fix.
    """
    if features is not None and "features" in save:
        raise UserError(f"--save features with --features {features}: these features are saved already, save others.")
    opened = open_run(workdir, overrides, dataset_name, root, features, queries, bool(save))
    trained, source, dataset, about = opened.trained, opened.source, opened.dataset, opened.about
    # A workdir keeps its run's own evaluation: the one with the run's settings, on its own test set.
    before, now = config_lib.flatten(trained), config_lib.flatten(source.config)
    own = all(before[key] == now[key] for key in set(keys_with(EVALUATE)) - set(keys_with(NO_RESULT)))
    own = own and root is None and output.resolve() == workdir.resolve()
    own = own or bool(dataset_name) or not (output / "config.json").exists()
    if hosts.is_first():
        make_folder(output)
    request = None
    if save and hosts.is_first():
        request = saved.Request(output / f"saved{suffix(dataset, opened.trained_on)}", save, about)
        request.check(source.config)
        make_folder(request.folder)
        source = saved.Saving(source, request) if "features" in save else source
    run, steps, trained_on = workdir.resolve().name, opened.steps, opened.trained_on
    evaluate_and_report(source, opened.variables, dataset, output, steps, trained_on, run=run, own=own, save=request)


class Opened(NamedTuple):
    """A run and the dataset to evaluate it on."""

    trained: ConfigDict  # the run's config
    source: FeatureSource  # describes images by the config of the evaluation
    variables: Variables
    steps: int  # of training
    dataset: Dataset
    trained_on: str | None  # the training set, if `dataset` is another
    about: dict[str, Any]  # the origin of the features; with "model" if they are saved, or come from files


def open_run(
    workdir: Path,
    overrides: Sequence[str] = (),
    dataset_name: str | None = None,
    root: str | None = None,
    features: Path | None = None,
    queries: int = 0,
    fingerprinted: bool = False,
) -> Opened:
    """Restores a run's newest checkpoint and lists a dataset. Arguments and errors as for `evaluate_run`.

    `fingerprinted`: include the model's fingerprint in `about`.
    """
    parallel.prepare_backend()
    if dataset_name:
        if dataset_name not in TITLES:
            raise UserError(f"--dataset is {dataset_name!r}, expected one of {', '.join(TITLES)}.")
        # The run's data.root and data.distractors belong to its own dataset.
        overrides = ["--config.data.root=", "--config.data.distractors=", *overrides]
    trained, config = read_run(workdir, overrides)
    data = config.data.copy_and_resolve_references()  # of the evaluation; config.data is that of the training
    if dataset_name:
        data.name, data.holdout_identities = dataset_name, 0
    if root is not None:
        data.root = root
    dataset = _some_queries(hosts.in_turn(lambda: load_test_set(data)), queries)
    if dataset_name:
        print(*dataset.notes, sep="\n")
    check(config, dataset)
    hosts.check_job(config, dataset)
    mesh = parallel.data_mesh(config.eval.batch)
    with Checkpoints(workdir, keep=0) as checkpoints:
        state, _ = checkpoints.restore(step.state_shapes(config))
    variables, steps = step.evaluated(state), int(state.step)
    trained_on = trained.data.name if dataset_name or partial.is_partial(dataset.name) else None
    about: dict[str, Any] = {"dataset": dataset.name, **_queries(dataset), "recipe": config.recipe}
    about |= {"seed": config.seed, "steps": steps}
    if fingerprinted or features is not None:
        about["model"] = fingerprint(config, jax.device_get(variables))
    source: FeatureSource = Describer(config, mesh) if features is None else saved.Saved(config, features, about)
    return Opened(trained, source, parallel.replicate(mesh, variables), steps, dataset, trained_on, about)


def _some_queries(dataset: Dataset, count: int) -> Dataset:
    """The dataset with `count` evenly spaced queries; 0: all.

    Raises:
      UserError: if it has fewer.
    """
    total = len(dataset.query)
    if not 0 <= count <= total:
        raise UserError(f"--queries is {count}, expected at most the {total:,} queries of {dataset.name}; 0: all.")
    if count in (0, total):
        return dataset
    return replace(dataset, query=dataset.query.take(np.arange(count) * total // count), all_queries=total)


def suffix(dataset: Dataset, trained_on: str | None) -> str:
    """The end of the names of result files: the dataset, if another was trained on, and the queries of a preview."""
    few = f"-{len(dataset.query)}-of-{dataset.all_queries}-queries" if dataset.all_queries else ""
    return (f"-{dataset.name}" if trained_on else "") + few


def check(config: ConfigDict, dataset: Dataset) -> None:
    """Checks before training that the dataset can be evaluated after it.

    Raises:
      UserError: if no query has a match in the gallery, eval.multi_query has no boxes, or eval.batch does not divide
        over the devices.
    """
    if config.eval.multi_query and dataset.multi_query is None:
        raise UserError(
            f"eval.multi_query is on, but {dataset.name} has no further boxes of its queries (gt_bbox in Market-1501): "
            "complete it from the official archive, or turn the key off."
        )
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


def gammas_of(config: ConfigDict, dataset: Dataset) -> tuple[float, ...]:
    """The gammas that queries are cropped to; partial images stay as they are."""
    return (1.0,) if partial.is_partial(dataset.name) else config.eval.gammas


def ranked(gallery: Split) -> Split:
    """The gallery without junk (identity -1), which no protocol ranks."""
    return gallery.take(gallery.identity != -1)


# ---- From images to metrics ----


def evaluate(
    source: FeatureSource,
    variables: Variables,
    dataset: Dataset,
    check: Callable[[], None] | None = None,
    save: saved.Request | None = None,
) -> dict[Any, dict[str, Any]]:
    """{gamma: `metrics.rank_metrics`} of queries cropped to each of config.eval.gammas.

    For a partial dataset: {"all-shot": `metrics.rank_metrics` of all queries against the whole gallery, "single-shot":
    `partial.single_shot`}. "single-shot" is omitted if every identity has one image (Partial-iLIDS), where both
    are the same, and with re-ranking, which would use neighbors outside the groups.

    `check` is called between batches and may raise to stop. `save`: distances and ranked lists to write.
    """
    config, source = source.config, with_boxes(source, dataset)
    dataset = by_protocol(config, dataset)
    query, gallery = dataset.query, ranked(dataset.gallery)
    is_partial, gammas = partial.is_partial(dataset.name), gammas_of(config, dataset)
    queries = [CroppedSplit(query, gamma) for gamma in gammas]
    files = saved.Matching(save, config, queries, gallery) if save else None
    labels = query.identity, gallery.identity, query.camera, gallery.camera
    rankings = [metrics.Ranking(*labels, keep=files.keep if files else 0) for _ in gammas]
    most_images = max(np.unique(split.identity, return_counts=True)[1].max() for split in (query, gallery))
    single = is_partial and "single" in DATASETS[dataset.name].protocol.shots
    single = single and most_images > 1 and not config.match.rerank
    matrix = np.empty((len(query), len(gallery)), np.float32) if single else None
    with files.writing() if files else contextlib.nullcontext():
        for number, rows, columns, distance in blocks(source, variables, queries, gallery, check):
            rankings[number].add(distance, rows, columns)
            if files:
                files.add(number, rows, columns, distance)
            if matrix is not None:
                matrix[rows, columns] = distance
    if files:
        files.finish(rankings)
    if not is_partial:
        return {gamma: ranking.metrics() for gamma, ranking in zip(gammas, rankings, strict=True)}
    results = {"all-shot": rankings[0].metrics()}
    if matrix is not None:
        results["single-shot"] = partial.single_shot(matrix, query.identity, gallery.identity)
    return results


def with_boxes(source: FeatureSource, dataset: Dataset) -> FeatureSource:
    """The source; with eval.multi_query, its queries stand for all their boxes."""
    if not source.config.eval.multi_query:
        return source
    assert dataset.multi_query is not None  # see `check`
    return Pooled(source, dataset.query, dataset.multi_query)


def means(results: Results) -> dict[str, float]:
    """Rank-1 and mAP averaged over gamma, to compare evaluations of a run."""
    return {
        "rank1": float(np.mean([r["cmc"][0] for r in results.values()])),
        "mAP": float(np.mean([r["mAP"] for r in results.values()])),
    }


# ---- The report ----


def evaluate_and_report(
    source: FeatureSource,
    variables: Variables,
    dataset: Dataset,
    output: Path,
    steps: int,
    trained_on: str | None = None,
    evaluated: tuple[Results, float] | None = None,
    run: str | None = None,
    own: bool = True,
    save: saved.Request | None = None,
) -> Results:
    """Evaluates, prints the table, and writes evaluation.json, evaluation.md and gamma.png into `output`.

    Args:
      steps: the number of training steps.
      trained_on: the training set if it is another dataset; the files are then evaluation-DATASET.json and so on.
      evaluated: (results, seconds) of an earlier evaluation to report.
      run: the name of the run; None: that of `output`, which is its workdir.
      own: whether this evaluation takes the name without a number, as `write` does.
      save: more files to write.
    """
    config, started = source.config, time.monotonic()
    results, seconds = evaluated or (evaluate(source, variables, dataset, save=save), 0.0)
    seconds += time.monotonic() - started
    is_partial, dataset = partial.is_partial(dataset.name), by_protocol(config, dataset)
    run, skipped = output.resolve().name if run is None else run, next(iter(results.values()))["skipped"]
    record = record_of(config, dataset, run, steps, trained_on, skipped) | {
        "seconds": round(seconds, 1),
        "results" if is_partial else "gammas": {
            str(name): {k: np.asarray(v).tolist() for k, v in r.items() if is_partial or k != "skipped"}
            for name, r in results.items()
        },
    }
    table = (_partial_table if is_partial else _gamma_table)(config, record, results)
    text = "\n".join(captions.lines(record)) + "\n\n" + table.rstrip()
    if not hosts.is_first():
        return results
    notes = dataset.notes[1:]  # the first is the dataset's path on this machine
    name = write(output, f"evaluation{suffix(dataset, trained_on)}", record, "\n\n".join([text, *notes]), own)
    if not is_partial:  # a partial dataset has no gammas
        curve = {g: {"rank-1": float(r["cmc"][0]), "mAP": r["mAP"]} for g, r in results.items()}
        with replacing(output / _picture(name)) as path:
            title, chance = captions.title(record), record["chance_rank1"]
            plots.gamma_curves(path, {paper.title(paper.method_of(config)): curve}, title, chance)
    print("\n" + text + f"\n(evaluated in {duration(seconds)}; written to {output / name}.md)")
    if save:
        print(f"(wrote {', '.join(save.kinds)} into {save.folder})")
    return results


def record_of(
    config: ConfigDict, dataset: Dataset, run: str, steps: int, trained_on: str | None, skipped: int
) -> dict[str, Any]:
    """The settings of a result on a dataset (see `by_protocol`), as JSON for `captions`.

    `skipped` is the number of queries without a match; the rest is as for `evaluate_and_report`.
    """
    query, gallery = dataset.query, ranked(dataset.gallery)
    settings: dict[str, Any] = {"gamma": 1.0} if partial.is_partial(dataset.name) else {"crop": config.eval.crop}
    if config.eval.multi_query:
        settings["multi_query"] = True
    same_camera = "none" if query.camera is None else "drop"
    return {
        "run": run,
        "recipe": config.recipe,
        "seed": config.seed,
        "steps": steps,
        "dataset": dataset.name,
        **({"trained_on": trained_on} if trained_on else {}),
        "training_set": captions.training_set(config),
        "held_out_identities": dataset.held_out,
        "not_comparable": captions.not_comparable(config, dataset),
        "test_set": digest_of_test_set(dataset.query, dataset.gallery),
        "notes": dataset.notes[1:],
        "protocol": {
            **settings,
            **_queries(dataset),
            "gallery": len(gallery),
            "skipped": skipped,
        },
        "identities": {split.name: split.num_identities for split in (query, gallery)},
        "junk": len(dataset.gallery) - len(gallery),
        "same_camera": "keep" if config.eval.same_camera == "keep" else same_camera,
        "match": config.match.to_dict() | {"flip": config.eval.flip},
        "input": [config.data.height, config.data.width],
        "network": captions.network(config),
        "chance_rank1": chance_rank1(dataset),
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
    }


def _queries(dataset: Dataset) -> dict[str, int]:
    """The number of queries and, if not all, the number of all."""
    few = {"of_queries": dataset.all_queries} if dataset.all_queries else {}
    return {"queries": len(dataset.query), **few}


def _gamma_table(config: ConfigDict, record: Mapping[str, Any], results: Results) -> str:
    """The results over gamma and, if they follow the paper's protocol, the published ones beside them."""
    table, dataset = comparison.gamma_table(results), record["dataset"]
    if not record["not_comparable"] and (published := comparison.sweep(results, dataset, paper.method_of(config))):
        table += "\n" + published
        if config.eval.flip:
            table = table.rstrip() + "\n\nOurs average each image with its mirror image, the paper's do not."
    return table


def _partial_table(config: ConfigDict, record: Mapping[str, Any], results: Results) -> str:
    """The results by protocol and, if they follow the paper's, the published ones below them."""
    p = record["protocol"]
    rows = {f"all-shot ({p['queries']} x {p['gallery']})": results["all-shot"]}
    if single := results.get("single-shot"):
        q, g = single["groups"]
        people = "{query} x {gallery}".format_map(record["identities"])
        rows[f"single-shot ({q} x {g} groups of {people})"] = single
    dataset, published = record["dataset"], not record["not_comparable"]
    remark = " Published models were trained on Market-1501." * published
    return f"{TITLES[dataset]}, in percent.{remark}\n\n{comparison.partial(rows, dataset, published)}"


def matching_in_words(config: ConfigDict) -> str:
    """How distances are computed."""
    return captions.matching(config.match.to_dict() | {"flip": config.eval.flip})


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

    Of settings that an earlier version did not record, those of matching had their defaults; others count as equal.
    """
    if not file.exists():
        return False
    try:
        earlier, now = json.loads(file.read_text(encoding="utf-8")), json.loads(json.dumps(record))
        pairs = [
            (earlier[key], now[key]) for key in ("run", "dataset", "test_set", "same_camera", "input") if key in earlier
        ]
        earlier["match"] = json.loads(json.dumps(config_lib.default().match.to_dict())) | earlier["match"]
        for group in ("protocol", "match"):
            pairs += [(value, now[group].get(key)) for key, value in earlier[group].items()]
        pairs.append((earlier["protocol"].get("multi_query"), now["protocol"].get("multi_query")))
        pairs.append((list(earlier.get("gammas", ())), list(now.get("gammas", ()))))
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return True
    return any(before != after for before, after in pairs)
