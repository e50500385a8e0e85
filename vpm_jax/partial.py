"""The protocols of Partial-REID and Partial-iLIDS (Section 4.3, Table 2): partial pictures against whole ones.

Queries are the partial images as they are, the gallery the whole ones. There are no cameras, so that nothing is
dropped. Both datasets are for testing alone: the paper trains on Market-1501.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from numpy.typing import ArrayLike

from vpm_jax import comparison, metrics
from vpm_jax.data.folders import TITLES
from vpm_jax.evaluate import Job, distances, headline, matching_in_words, remarks, write
from vpm_jax.runs import hosts
from vpm_jax.runs.logs import duration

DATASETS = ("partial_reid", "partial_ilids")


def groups(identity: ArrayLike) -> list[np.ndarray]:
    """The single-shot groups of images in the order of their names: group k holds image k of every identity.

    Args:
      identity: int [N].

    Returns:
      int arrays [identities] of indices, as many as the identity with the fewest images has; what others have more
      is in no group.
    """
    order = np.argsort(identity, kind="stable")
    _, first, counts = np.unique(np.asarray(identity)[order], return_index=True, return_counts=True)
    return [order[first + k] for k in range(counts.min())]


def single_shot(distance: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray) -> dict[str, Any]:
    """The mean over every group of queries against every group of gallery images (see `groups`).

    Args:
      distance: float [Q, G].
      query_ids: int [Q].
      gallery_ids: int [G].

    Returns:
      "cmc": float64 [ranks], the mean of the groups' CMC; "spread": float64 [ranks], their standard deviation;
      "groups": (groups of queries, groups of gallery images).
    """
    queries, galleries = groups(query_ids), groups(gallery_ids)
    curves = [
        metrics.rank_metrics(distance[np.ix_(q, g)], query_ids[q], gallery_ids[g])["cmc"]
        for q in queries
        for g in galleries
    ]
    return {
        "cmc": np.mean(curves, axis=0),
        "spread": np.std(curves, axis=0),
        "groups": (len(queries), len(galleries)),
    }


def evaluate(config: ConfigDict, variables: Any, dataset: Any, mesh: Any) -> dict[str, dict[str, Any]]:
    """{"all-shot": `metrics.rank_metrics` of all queries against the whole gallery, "single-shot": `single_shot`}.

    "single-shot" is left out where it is the same, with one image of each identity (Partial-iLIDS), and where
    re-ranking would have found neighbours outside its groups.
    """
    query, gallery = dataset.query, dataset.gallery
    [distance] = distances(config, variables, [Job(query)], gallery, mesh)
    results = {"all-shot": metrics.rank_metrics(distance, query.identity, gallery.identity)}
    most = max(np.unique(split.identity, return_counts=True)[1].max() for split in (query, gallery))
    if most > 1 and not config.match.rerank:
        results["single-shot"] = single_shot(distance, query.identity, gallery.identity)
    return results


def evaluate_and_report(
    config: ConfigDict, variables: Any, dataset: Any, mesh: Any, output: Path, steps: int, trained_on: str
) -> dict[str, dict[str, Any]]:
    """Evaluates, prints the numbers beside the published ones, and writes evaluation-DATASET.json and .md."""
    import jax

    started = time.monotonic()
    results = evaluate(config, variables, dataset, mesh)
    query, gallery = dataset.query, dataset.gallery
    chance = metrics.chance_rank1(query.identity, gallery.identity)
    skipped = results["all-shot"]["skipped"]
    sizes = f"{len(query)} x {len(gallery)}"
    lines = [
        headline(config, dataset, steps, trained_on),
        f"Protocol: {len(query)} partial images as queries, as they are (gamma 1.0), {len(gallery)} whole ones as "
        f"gallery; no cameras, so nothing is dropped; {skipped} queries without a match skipped.",
        f"Matching: {matching_in_words(config)}. Chance: rank-1 {chance:.2%} (all-shot, mean over random rankings).",
    ]
    named = {f"all-shot ({sizes})": results["all-shot"]}
    if single := results.get("single-shot"):
        q, g = single["groups"]
        people = f"{len(np.unique(query.identity))} x {len(np.unique(gallery.identity))}"
        named[f"single-shot ({q} x {g} groups of {people})"] = single
        # As `comparison.measured`: a gallery smaller than k is exhausted before rank k.
        spread = ", ".join(f"{100 * single['spread'][:k][-1]:.1f} at R-{k}" for k in (1, 3, 5))
        lines.insert(
            2,
            "Single-shot: image k by name of every identity makes group k; the mean over every group of queries "
            f"against every group of the gallery (standard deviation {spread}). The paper does not say which of the "
            "two it measured.",
        )
    table = comparison.partial(named, dataset.name)
    remark = "Published numbers are of training on Market-1501."
    if trained_on != "market1501":
        remark += f" This run was trained on {trained_on}: the differences say nothing of the method."
    text = "\n".join(lines) + f"\n\n{TITLES[dataset.name]}, in percent. {remark}\n\n" + table.rstrip()
    if not hosts.is_first():
        return results
    print("\n" + text + f"\n(evaluated in {duration(time.monotonic() - started)}; written to {output})")
    record = {
        "recipe": config.recipe,
        "seed": config.seed,
        "steps": steps,
        "dataset": dataset.name,
        "trained_on": trained_on,
        "notes": dataset.notes[1:],
        "protocol": {"queries": len(query), "gallery": len(gallery), "skipped": skipped, "gamma": 1.0},
        "match": config.match.to_dict() | {"flip": config.eval.flip},
        "chance_rank1": chance,
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "seconds": round(time.monotonic() - started, 1),
        "results": {name: {k: np.asarray(v).tolist() for k, v in r.items()} for name, r in results.items()},
    }
    write(output, f"evaluation-{dataset.name}", record, text + remarks(dataset))
    return results
