"""What the paper and an independent reproduction report, to compare our own numbers with.

Sun et al., "Perceive Where to Focus: Learning Visibility-aware Part-level Features for Partial Person
Re-identification", CVPR 2019, Tables 1, 2 and 3. All numbers are percentages, as printed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from vpm_jax.metrics import rank_k

Scores = Mapping[str, float]  # {"R-1": 70.9, ..., "mAP": 48.8}; what a table does not report is absent

GAMMAS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

# Table 1, in the paper's layout: for each gamma, R-1, R-5, R-10 and mAP of the global baseline, of PCB, and of VPM.
_TABLE_1: dict[str, tuple[tuple[float, ...], ...]] = {
    "market1501": (
        (64.5, 82.2, 88.1, 44.4, 0.9, 3.2, 5.6, 1.7, 70.9, 86.5, 92.1, 48.8),
        (79.0, 91.4, 94.3, 57.9, 8.1, 16.5, 23.2, 6.6, 84.4, 94.3, 96.1, 62.5),
        (83.9, 93.9, 95.9, 63.7, 36.5, 58.9, 67.4, 26.8, 88.2, 95.8, 97.2, 71.7),
        (85.7, 94.3, 96.4, 66.1, 71.9, 87.3, 91.4, 56.8, 90.1, 95.8, 97.7, 74.7),
        (87.1, 95.5, 97.4, 67.8, 88.8, 95.8, 97.1, 77.2, 91.7, 96.6, 98.0, 78.7),
        (86.8, 95.3, 97.4, 67.7, 93.4, 97.8, 98.4, 83.0, 93.0, 97.8, 98.8, 80.8),
    ),
    "dukemtmc": (
        (65.0, 81.1, 86.7, 47.2, 5.0, 10.1, 13.6, 4.0, 69.5, 83.1, 87.9, 52.2),
        (76.2, 87.3, 90.4, 55.4, 13.1, 25.6, 33.5, 10.5, 78.2, 89.0, 91.3, 60.9),
        (76.3, 87.3, 90.6, 90.6, 35.9, 57.0, 65.4, 28.4, 80.3, 89.5, 92.0, 63.1),
        (76.3, 88.3, 91.9, 58.8, 64.0, 82.6, 87.7, 52.3, 80.3, 89.3, 92.4, 63.5),
        (77.0, 88.1, 91.7, 59.0, 81.6, 90.4, 93.0, 70.3, 81.7, 90.9, 93.1, 70.7),
        (76.2, 87.3, 91.2, 58.6, 84.1, 92.4, 94.5, 73.2, 83.6, 91.7, 94.2, 72.6),
    ),
}

# Table 2: on Partial-REID, then on Partial-iLIDS; trained on Market-1501.
_TABLE_2: dict[str, tuple[float, ...]] = {
    "MTRC": (23.7, 27.3, 17.7, 26.1),
    "AMC+SWM": (37.3, 46.0, 21.0, 32.8),
    "DSR": (50.7, 70.0, 58.8, 67.2),
    "SFR": (56.9, 78.5, 63.9, 74.8),
    "VPM (Bottom)": (53.2, 73.2, 53.6, 62.3),
    "VPM (Top)": (64.3, 83.6, 67.2, 76.5),
    "VPM (Bilateral)": (67.7, 81.9, 65.5, 74.8),
}

# Table 3, the ablations: on Partial-iLIDS, then and mAP on whole images of Market-1501.
_TABLE_3: dict[str, tuple[float, ...]] = {
    "VPM": (67.2, 76.5, 82.4, 93.0, 97.8, 80.8),
    "VPM (no triplet)": (57.1, 73.9, 79.0, 91.3, 97.0, 77.8),
    "MVPM-1": (63.0, 74.8, 82.4, 93.0, 96.3, 79.7),
    "MVPM-2": (61.3, 73.1, 79.0, 92.8, 97.4, 80.1),
    "MVPM-3": (58.8, 74.8, 82.4, 91.4, 96.5, 75.5),
    "MVPM-4": (59.7, 74.8, 78.2, 90.4, 96.6, 75.7),
}

# An independent PyTorch reproduction (warm-up, label smoothing, triplet weight 3, 200 epochs): R-1 and mAP by gamma.
_REPRODUCTION: dict[str, dict[float, tuple[float, float]]] = {
    "VPM": {
        0.5: (73.3, 48.7),
        0.6: (85.0, 63.7),
        0.7: (89.5, 70.4),
        0.8: (91.3, 75.9),
        0.9: (93.0, 79.5),
        1.0: (93.6, 81.8),
    },
    "VPM (no train crops)": {0.5: (8.2, 7.3), 1.0: (94.2, 81.6)},
    "VPM (one region)": {0.5: (68.2, 45.6), 1.0: (87.0, 65.3)},
}
_REPRODUCTION_PARTIAL: dict[str, tuple[float, float]] = {"partial_reid": (67.7, 80.1), "partial_ilids": (58.0, 71.4)}

# (dataset, method, gamma, metric) of numbers that cannot be what was measured. This one repeats the R-10 beside it;
# the same column reads 55.4 above and 58.8 below.
MISPRINTS = frozenset({("dukemtmc", "baseline", 0.7, "mAP")})

# The paper does not say which side its gamma sweep keeps. Its "VPM" of Tables 1 and 3 is Table 2's "VPM (Top)" (the
# same 67.2 / 76.5 on Partial-iLIDS), trained by keeping the top: so the queries are read as keeping theirs.
_PROTOCOL = {
    "Table 1": "single query, each query keeping its top gamma, gallery whole",
    "Table 2": "trained on Market-1501; partial images as queries, whole ones as gallery",
    "Table 3": "single query, whole images",
}


@dataclass(frozen=True)
class Published:
    """What a source reports for one method on one dataset."""

    where: str  # "Table 1", ..., "reproduction"
    dataset: str
    method: str
    scores: Mapping[float, Scores]  # {gamma: percentages}; a dataset of partial images has gamma 1.0 alone
    protocol: str

    def misprinted(self, gamma: float, metric: str) -> bool:
        return (self.dataset, self.method, gamma, metric) in MISPRINTS and self.where != "reproduction"


def _scores(names: str, values: Sequence[float]) -> Scores:
    return dict(zip(names.split(), values, strict=True))


def _table_1() -> list[Published]:
    published = []
    for dataset, rows in _TABLE_1.items():
        for column, method in enumerate(("baseline", "PCB", "VPM")):
            part = slice(4 * column, 4 * column + 4)
            scores = {g: _scores("R-1 R-5 R-10 mAP", row[part]) for g, row in zip(GAMMAS, rows, strict=True)}
            published.append(Published("Table 1", dataset, method, scores, _PROTOCOL["Table 1"]))
    return published


def _other_tables() -> list[Published]:
    published = []
    for method, row in _TABLE_2.items():
        for dataset, values in (("partial_reid", row[:2]), ("partial_ilids", row[2:])):
            scores = {1.0: _scores("R-1 R-3", values)}
            published.append(Published("Table 2", dataset, method, scores, _PROTOCOL["Table 2"]))
    for method, row in _TABLE_3.items():
        scores = {1.0: _scores("R-1 R-3 R-5", row[:3])}
        published.append(Published("Table 3", "partial_ilids", method, scores, _PROTOCOL["Table 2"]))
        scores = {1.0: _scores("R-1 R-5 mAP", row[3:])}
        published.append(Published("Table 3", "market1501", method, scores, _PROTOCOL["Table 3"]))
    return published


def _reproduction() -> list[Published]:
    published = []
    for method, rows in _REPRODUCTION.items():
        scores = {gamma: _scores("R-1 mAP", row) for gamma, row in rows.items()}
        published.append(Published("reproduction", "market1501", method, scores, _PROTOCOL["Table 1"]))
    for dataset, row in _REPRODUCTION_PARTIAL.items():
        scores = {1.0: _scores("R-1 R-3", row)}
        published.append(Published("reproduction", dataset, "VPM", scores, _PROTOCOL["Table 2"]))
    return published


PAPER: tuple[Published, ...] = (*_table_1(), *_other_tables())
REPRODUCTION: tuple[Published, ...] = tuple(_reproduction())


def published(dataset: str, method: str = "VPM", sources: Sequence[Published] = PAPER) -> Published | None:
    """What `sources` report of a method on a dataset, None without anything; the first table that does."""
    return next((p for p in sources if (p.dataset, p.method) == (dataset, method)), None)


def method_of(config: ConfigDict) -> str:
    """The name in Table 1 of what the config trains."""
    if config.model.locator == "stripes":
        return "PCB"
    return "baseline" if tuple(config.model.grid) == (1, 1) else "VPM"


def title(method: str) -> str:
    """What our tables and pictures call a method of the paper."""
    return method.replace("baseline", "global feature")


def comparison(
    results: Mapping[float, Mapping[str, Any]],
    dataset: str,
    method: str = "VPM",
    metrics: Sequence[str] = ("R-1", "mAP"),
) -> str:
    """Our numbers, the paper's, and the difference (ours less the paper's), side by side in percent, as Markdown.

    It compares numbers of one protocol only if ours are measured by the one it names: on the test set, queries
    keeping their top gamma. The reproduction's numbers stand beside the paper's where it has any.

    Args:
      results: {gamma: {"cmc": [ranks], entry k - 1 the rank-k accuracy, "mAP": float}} in [0, 1], as
        `vpm_jax.metrics.rank_metrics` returns them.
      dataset: "market1501", "dukemtmc", "partial_reid" or "partial_ilids".
      method: a row of a table: "VPM", "baseline", "PCB", "MVPM-1", "VPM (Top)", ...
      metrics: "R-k" and "mAP".

    Returns:
      A heading line, the table and its notes, ending in a newline; "" where the paper reports nothing of this method
      on this dataset (so for the synthetic pedestrians), or at none of these gammas.
    """
    paper = published(dataset, method)
    if paper is None or not any(gamma in paper.scores for gamma in results):
        return ""
    again = published(dataset, method, REPRODUCTION)

    header = ["gamma"]
    for metric in metrics:
        header += [f"{metric} ours", "paper", "difference"] + ["reproduction"] * (again is not None)
    lines = ["| " + " | ".join(header) + " |", "|" + "---:|" * len(header)]
    misprints = []
    for gamma in sorted(results):
        cells = [f"{gamma:g}"]
        for metric in metrics:
            ours = 100 * _measured(results[gamma], metric)
            theirs = paper.scores.get(gamma, {}).get(metric)
            if theirs is None:
                cells += [f"{ours:.1f}", "–", "–"]
            elif paper.misprinted(gamma, metric):
                cells += [f"{ours:.1f}", f"{theirs:.1f}*", "–"]
                misprints.append(f"{theirs:.1f}")
            else:
                # Of the rounded number, so that a reader who subtracts finds the same.
                cells += [f"{ours:.1f}", f"{theirs:.1f}", f"{round(ours, 1) - theirs:+.1f}"]
            if again is not None:
                other = again.scores.get(gamma, {}).get(metric)
                cells.append("–" if other is None else f"{other:.1f}")
        lines.append("| " + " | ".join(cells) + " |")
    text = f"{title(method)} on {dataset} beside the paper's {paper.where}, in percent. "
    text += f"Its protocol: {paper.protocol}.\n\n"
    text += "\n".join(lines) + "\n"
    if misprints:
        text += f"\n\\* {', '.join(misprints)} is a misprint in the paper (it repeats the R-10 beside it).\n"
    if again is not None:
        text += "\nThe reproduction is an independent one in PyTorch: warm-up, label smoothing, triplet weight 3, "
        text += "200 epochs.\n"
    return text


def beside(ours: Mapping[str, Mapping[str, Any]], dataset: str) -> str:
    """Our numbers on a dataset of partial images above all that is published of it, in percent, as a Markdown table.

    Args:
      ours: {protocol: {"cmc": [ranks] in [0, 1], optionally "mAP": float}}; differences are those of the first.
      dataset: "partial_reid" or "partial_ilids".
    """
    names = ("R-1", "R-3", "R-5", "mAP")
    lines = ["| | " + " | ".join(names) + " | ours less theirs: R-1 | R-3 |", "|---|" + "---:|" * (len(names) + 2)]
    for protocol, result in ours.items():
        have = [f"{100 * _measured(result, n):.1f}" if n != "mAP" or n in result else "–" for n in names]
        lines.append(f"| **ours, {protocol}** | " + " | ".join([*have, "", ""]) + " |")
    first = next(iter(ours.values()))
    for row in PAPER + REPRODUCTION:
        if row.dataset == dataset:
            scores = row.scores[1.0]
            theirs = [f"{scores[n]:.1f}" if n in scores else "–" for n in names]
            theirs += [f"{round(100 * _measured(first, n), 1) - scores[n]:+.1f}" for n in ("R-1", "R-3")]
            lines.append(f"| {row.method}, {row.where} | " + " | ".join(theirs) + " |")
    return "\n".join(lines) + "\n"


def _measured(result: Mapping[str, Any], metric: str) -> float:
    if metric == "mAP":
        return float(result["mAP"])
    return rank_k(result["cmc"], int(metric.removeprefix("R-")))
