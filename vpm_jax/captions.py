"""A result in words: the lines above its table, the titles of its figures, and why it is not comparable.

Lines and titles come from the record alone (evaluation.json, or a result of `reproduce`), so that the console, texts,
figures and pages agree. Records of earlier versions may lack some keys.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vpm_jax import metrics, paper, partial
from vpm_jax.data.datasets import DATASETS, TITLES, further_sets
from vpm_jax.data.split import Dataset

Record = Mapping[str, Any]


def test_set(dataset: str, held_out: int = 0) -> str:
    """The queries and gallery of a dataset (a name), or the `held_out` training identities that replace them."""
    title = TITLES.get(dataset, dataset)
    return f"{held_out} held-out training identities of {title}" if held_out else title


def training_set(config: ConfigDict) -> str:
    """What a config trains on."""
    held_out = config.data.holdout_identities
    titles = [TITLES.get(name, name) for name in training_names(config)]
    titles[0] += f" without {held_out} identities" * bool(held_out)
    return " and ".join(titles)


def training_names(config: ConfigDict) -> list[str]:
    """The names of the datasets that a config trains on."""
    return [config.data.name, *(name for name, _ in further_sets(config.data.also_train))]


def network(config: ConfigDict) -> str:
    """The backbone and input size, such as "ResNet-18 of width 24, 128x64 input"."""
    width = f" of width {config.model.width}" if config.model.width != 64 else ""
    return f"ResNet-{config.model.depth}{width}, {config.data.height}x{config.data.width} input"


def kept(crop: str, share: str) -> str:
    """What a crop (one of `regions.CROPS`) keeps of an image, such as "the top of an image, 0.5 of its area"."""
    if crop == "none":
        return "the whole image"
    sides = {"bilateral": "the top or the bottom", "horizontal": "the left or the right", "any": "any part"}
    return f"{sides.get(crop, f'the {crop}')} of an image, {share} of its area"


def run_title(model: str, config: ConfigDict) -> str:
    """The title of training curves."""
    trained = f"{model} trained on {training_set(config)}"
    return f"{trained}; recipe {config.recipe}, seed {config.seed}; {network(config)}"


def count_seeds(seeds: Sequence[int]) -> str:
    """Numbers of seeds in words, such as "1 to 3 seeds"."""
    low, high = min(seeds), max(seeds)
    if high == 1:
        return "one seed"
    return f"{high} seeds" if low == high else f"{low} to {high} seeds"


def departures(config: ConfigDict, dataset: str, held_out: int = 0) -> list[str]:
    """Why results by a config on a dataset (a name) are not comparable with the paper's; [] if they are.

    Args:
      config: of the run that was trained, with the keys of the evaluation.
      dataset: whose test set is evaluated.
      held_out: the number of training identities that replace the test set.
    """
    if dataset not in {row.dataset for row in paper.PUBLISHED}:
        return [f"it has no results on {TITLES.get(dataset, dataset)}"]
    expected = TITLES["market1501"] if partial.is_partial(dataset) else TITLES[dataset]
    reasons = [
        (held_out, "the queries and the gallery are held-out training identities"),
        (not held_out and training_set(config) != expected, f"the model was trained on {training_set(config)}"),
        (
            not partial.is_partial(dataset) and config.eval.crop != "top",
            f"query crops keep {config.eval.crop}, not top",
        ),
        (config.eval.same_camera == "keep", "images of a query's own camera are ranked"),
        (config.eval.multi_query, "each query stands for several boxes"),
        (config.match.rerank, "distances are re-ranked"),
        (config.match.vector, "images are compared as single vectors"),
        (config.match.gallery_whole, "the regions of gallery images weigh the same"),
        (config.match.gallery_gammas, "the gallery is also cropped"),
        (config.data.distractors, "the gallery has more distractors"),
    ]
    return [reason for holds, reason in reasons if holds]


def not_comparable(config: ConfigDict, dataset: Dataset) -> list[str]:
    """`departures` of an evaluation, including those of the images at hand."""
    reasons = departures(config, dataset.name, dataset.held_out)
    if dataset.name in {row.dataset for row in paper.PUBLISHED}:
        trained_here = config.data.name == dataset.name
        sets = [split for split in dataset.unofficial if split != "train" or trained_here]
        if dataset.all_queries:
            reasons.append(f"these are {len(dataset.query)} of {dataset.all_queries} queries")
        reasons += [f"the {'training' if split == 'train' else split} set is not the official one" for split in sets]
    return reasons


def lines(record: Record) -> list[str]:
    """The sentences about a result: run, test set, protocol, matching, chance and comparability."""
    chance = f"{'all-shot, ' if 'single-shot' in record.get('results', ()) else ''}mean over random rankings"
    return [
        subject(record),
        *protocol(record),
        f"Matching: {matching(record['match'])}. Chance: rank-1 {record['chance_rank1']:.2%} ({chance}).",
        *comparability(record.get("not_comparable", ())),
    ]


def subject(record: Record) -> str:
    """The sentence about the run of a result, its training set and its test set."""
    tested = test_set(record["dataset"], _held_out(record))
    trained = record.get("training_set") or TITLES.get(record.get("trained_on", ""), "") or tested
    sets = f"trained and evaluated on {tested}" if trained == tested else f"trained on {trained}, evaluated on {tested}"
    return f"{_upper(run(record))}, {sets}."


def run(record: Record, seeds: str = "") -> str:
    """The recipe, seed and steps of a result, or of the runs of several seeds like it."""
    return f"recipe {record['recipe']}, {seeds or 'seed {seed}'.format_map(record)}, {record['steps']} steps"


def protocol(record: Record) -> list[str]:
    """The protocol in sentences."""
    p, match, dropped = record["protocol"], record["match"], DROPPED[_same_camera(record)]
    number, few = _queries(record)
    counted = f"{dropped}{p['skipped']} queries without a match skipped."
    if partial.is_partial(record["dataset"]):
        text = f"Protocol: {number} partial images as queries{few}, uncropped (gamma 1.0), {p['gallery']} whole images "
        return [f"{text}as gallery; {counted}", *_single_shot(record)]
    kept = "whole and cropped" if match.get("gallery_gammas") else "whole"
    junk = f" ({record['junk']} of identity -1 left out)" if "junk" in record else ""
    query = "multiple query (boxes of the same identity and camera pooled by visibility)"
    query = query if p.get("multi_query") else "single query"
    return [
        f"Protocol: {query}, {number} queries{few} cropped to gamma ({p['crop']}), {p['gallery']} gallery images "
        f"{kept}{junk}; {counted}"
    ]


DROPPED = {  # by the "same_camera" of a record
    "drop": "same identity and camera dropped; ",
    "keep": "images of the same camera stay (eval.same_camera=keep); ",
    "none": "no cameras, so nothing is dropped; ",
    "": "",  # not known
}


def _same_camera(record: Record) -> str:
    """How images of a query's own camera are treated. Earlier versions followed the dataset's protocol."""
    entry = DATASETS.get(record["dataset"])
    return record.get("same_camera") or ("" if entry is None or entry.own else entry.protocol.same_camera)


def _single_shot(record: Record) -> list[str]:
    single = record.get("results", {}).get("single-shot")
    if single is None:
        return []
    deviations = ", ".join(f"{100 * metrics.rank_k(single['spread'], k):.1f} at R-{k}" for k in (1, 3, 5))
    return [
        "Single-shot: group k holds the k-th image by name of every identity; the mean over all pairs of a query group "
        f"and a gallery group (standard deviation {deviations}). The paper does not say which protocol it used."
    ]


def matching(match: Mapping[str, Any]) -> str:
    """How distances are computed: the keys of config.match, and `flip`."""
    parameters = f"k1 {match['rerank_k1']}, k2 {match['rerank_k2']}, lambda {match['rerank_lambda']:g}"
    reranked = f", re-ranked by k-reciprocal neighbors ({parameters})" * match["rerank"]
    after = " after the neck" * (match.get("feature") == "after")
    variant = after + " (mean of an image and its mirror)" * match.get("flip", False)
    features = f" of features{variant}" if variant else ""
    gammas = ", ".join(f"{gamma:g}" for gamma in match.get("gallery_gammas", ()))
    crops = f"; the gallery also cropped to {gammas}, each query compared with the closest crop" * bool(gammas)
    squared = "squared " * match["squared"]
    equation = "one vector per image instead of Eq. 4" if match.get("vector") else "Eq. 4"
    whole = " of queries, equal weights in the gallery" * bool(match.get("gallery_whole"))
    return f"{equation}, {match['visibility']} visibility{whole}, {squared}distances{features}{reranked}{crops}"


def comparability(reasons: Any) -> list[str]:
    return [f"Not comparable with the paper: {'; '.join(reasons)}."] if reasons else []


def title(record: Record, seeds: str = "") -> str:
    """The title of a figure about a result, of two or more lines; `seeds` counts them if it shows several runs."""
    p, match, trained = record["protocol"], record["match"], record.get("training_set", "")
    tested, (number, few) = test_set(record["dataset"], _held_out(record)), _queries(record)
    settings = {
        f"trained on {trained}": trained not in ("", tested),
        "multiple query": p.get("multi_query"),
        "re-ranked": match["rerank"],
        "features averaged with the mirror image's": match.get("flip"),
        "gallery also cropped": match.get("gallery_gammas"),
    }
    about = [run(record, seeds), record.get("network", "")]
    cropped = f"cropped to gamma ({p['crop']})" if "crop" in p else "not cropped"
    parts = [
        f"{_upper(tested)}, {number} queries{few} {cropped}",
        "; ".join(filter(None, about)),
        ", ".join(words for words, holds in settings.items() if holds),
        *(text.removesuffix(".") for text in comparability(record.get("not_comparable", ()))),
    ]
    return "\n".join(textwrap.fill(part, 92) for part in parts if part)


def _queries(record: Record) -> tuple[str, str]:
    """The number of queries, and a warning if they are not all."""
    count, of_all = record["protocol"]["queries"], record["protocol"].get("of_queries")
    return (f"{count} of {of_all}", " (a preview, not a result)") if of_all else (str(count), "")


def _held_out(record: Record) -> int:
    return record.get("held_out_identities", record["protocol"].get("held out identities", 0))


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
