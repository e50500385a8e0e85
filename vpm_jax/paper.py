"""Published results to compare ours with: the paper's tables, an independent reproduction, and other methods' results
by the same protocol and training set.

All numbers are percentages, as printed. To add a publication, add a `Source` for each of its tables, its numbers as a
table, and its rows to PUBLISHED.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ml_collections import ConfigDict

Scores = Mapping[str, float]  # {"R-1": 70.9, ..., "mAP": 48.8}; what a table does not report is absent
Numbers = tuple[float, ...]


@dataclass(frozen=True)
class Source:
    """One published table, measured by one protocol."""

    name: str  # in our tables
    reference: str
    protocol: str
    training: str  # the training set; "": of the dataset it is evaluated on


@dataclass(frozen=True)
class Published:
    """One method's results on one dataset in one source."""

    source: Source
    dataset: str
    method: str
    scores: Mapping[float, Scores]  # {gamma: percentages}; partial datasets have gamma 1.0 only

    def misprinted(self, gamma: float, metric: str) -> bool:
        return (self.source.name, self.dataset, self.method, gamma, metric) in MISPRINTS

    def score(self, gamma: float, metric: str) -> float | None:
        """A number to compare with: None if it is missing or misprinted."""
        return None if self.misprinted(gamma, metric) else self.scores.get(gamma, {}).get(metric)


_PAPER = (
    "Sun et al., Perceive Where to Focus: Learning Visibility-aware Part-level Features for Partial Person "
    "Re-identification, CVPR 2019"
)
_INDEPENDENT = "an independent PyTorch reproduction: warm-up, label smoothing, triplet weight 3, 200 epochs"
# The paper does not say which side its gamma sweep keeps. "VPM" in Tables 1 and 3 is "VPM (Top)" in Table 2 (the same
# 67.2 / 76.5 on Partial-iLIDS), which is trained on top crops, so we assume that the queries keep their top too.
_SWEEP = "single query, queries cropped to their top gamma, gallery whole"
_WHOLE = "single query, whole images"
_PARTIAL = "partial images as queries, whole ones as gallery"

TABLE_1 = Source("Table 1", _PAPER, _SWEEP, training="")
TABLE_2 = Source("Table 2", _PAPER, _PARTIAL, training="market1501")
TABLE_3 = Source("Table 3", _PAPER, _WHOLE, training="market1501")
TABLE_3_PARTIAL = Source("Table 3", _PAPER, _PARTIAL, training="market1501")
LIGHT_REID = Source(
    "light-reid",
    "the README of examples/occluded_reid in github.com/wangguanan/light-reid (commit 0c28d0d), whose loader takes all "
    "images; OONet also uses body keypoints",
    "occluded images as queries, whole ones as gallery, all-shot",
    training="market1501",
)
REPRODUCED = Source("reproduction", _INDEPENDENT, _SWEEP, training="market1501")
REPRODUCED_PARTIAL = Source("reproduction", _INDEPENDENT, _PARTIAL, training="market1501")

GAMMAS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

# Table 1, in the paper's layout: for each gamma, R-1, R-5, R-10 and mAP of the global baseline, of PCB, and of VPM.
_TABLE_1: dict[str, tuple[Numbers, ...]] = {
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
_TABLE_2: dict[str, Numbers] = {
    "MTRC": (23.7, 27.3, 17.7, 26.1),
    "AMC+SWM": (37.3, 46.0, 21.0, 32.8),
    "DSR": (50.7, 70.0, 58.8, 67.2),
    "SFR": (56.9, 78.5, 63.9, 74.8),
    "VPM (Bottom)": (53.2, 73.2, 53.6, 62.3),
    "VPM (Top)": (64.3, 83.6, 67.2, 76.5),
    "VPM (Bilateral)": (67.7, 81.9, 65.5, 74.8),
}

# Table 3, the ablations: on Partial-iLIDS, then and mAP on whole images of Market-1501.
_TABLE_3: dict[str, Numbers] = {
    "VPM": (67.2, 76.5, 82.4, 93.0, 97.8, 80.8),
    "VPM (no triplet)": (57.1, 73.9, 79.0, 91.3, 97.0, 77.8),
    "MVPM-1": (63.0, 74.8, 82.4, 93.0, 96.3, 79.7),
    "MVPM-2": (61.3, 73.1, 79.0, 92.8, 97.4, 80.1),
    "MVPM-3": (58.8, 74.8, 82.4, 91.4, 96.5, 75.5),
    "MVPM-4": (59.7, 74.8, 78.2, 90.4, 96.6, 75.7),
}

# The reproduction: R-1 and mAP by gamma, then on Partial-REID and on Partial-iLIDS.
_REPRODUCTION: dict[str, dict[float, Numbers]] = {
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
_REPRODUCTION_PARTIAL: dict[str, Numbers] = {"VPM": (67.7, 80.1, 58.0, 71.4)}

# light-reid: R-1 and mAP on Occluded-REID. Its numbers on Partial-REID and Partial-iLIDS are left out, because they are
# of lists of images that it does not publish.
_LIGHT_REID: dict[str, Numbers] = {"OONet": (72.1, 64.0), "OONet (IBN)": (78.7, 70.9)}

# (source, dataset, method, gamma, metric) of misprints. This one repeats the R-10 beside it; the same column reads
# 55.4 above and 58.8 below.
MISPRINTS = frozenset({("Table 1", "dukemtmc", "baseline", 0.7, "mAP")})


def _scores(names: str, numbers: Numbers) -> Scores:
    return dict(zip(names.split(), numbers, strict=True))


def _sweeps(source: Source, dataset: str, names: str, table: Mapping[str, Mapping[float, Numbers]]) -> list[Published]:
    """The rows of {method: {gamma: numbers}} with the columns `names`."""
    return [
        Published(source, dataset, method, {gamma: _scores(names, numbers) for gamma, numbers in rows.items()})
        for method, rows in table.items()
    ]


def _rows(columns: Iterable[tuple[Source, str, str]], table: Mapping[str, Numbers]) -> list[Published]:
    """The rows of {method: numbers}, where several (source, dataset, names) stand side by side."""
    rows = []
    for method, numbers in table.items():
        begin = 0
        for source, dataset, names in columns:
            end = begin + len(names.split())
            rows.append(Published(source, dataset, method, {1.0: _scores(names, numbers[begin:end])}))
            begin = end
    return rows


def _table_1() -> list[Published]:
    rows = []
    for dataset, table in _TABLE_1.items():
        for column, method in enumerate(("baseline", "PCB", "VPM")):
            by_gamma = {g: numbers[4 * column : 4 * column + 4] for g, numbers in zip(GAMMAS, table, strict=True)}
            rows += _sweeps(TABLE_1, dataset, "R-1 R-5 R-10 mAP", {method: by_gamma})
    return rows


PAPER: tuple[Published, ...] = (
    *_table_1(),
    *_rows([(TABLE_2, "partial_reid", "R-1 R-3"), (TABLE_2, "partial_ilids", "R-1 R-3")], _TABLE_2),
    *_rows([(TABLE_3_PARTIAL, "partial_ilids", "R-1 R-3 R-5"), (TABLE_3, "market1501", "R-1 R-5 mAP")], _TABLE_3),
)
REPRODUCTION: tuple[Published, ...] = (
    *_sweeps(REPRODUCED, "market1501", "R-1 mAP", _REPRODUCTION),
    *_rows(
        [(REPRODUCED_PARTIAL, "partial_reid", "R-1 R-3"), (REPRODUCED_PARTIAL, "partial_ilids", "R-1 R-3")],
        _REPRODUCTION_PARTIAL,
    ),
)
OTHERS: tuple[Published, ...] = tuple(_rows([(LIGHT_REID, "occluded_reid", "R-1 mAP")], _LIGHT_REID))
PUBLISHED = PAPER + REPRODUCTION + OTHERS


def published(dataset: str, method: str = "VPM", rows: Sequence[Published] = PAPER) -> Published | None:
    """The first of `rows` for a method on a dataset, or None."""
    return next((row for row in rows if (row.dataset, row.method) == (dataset, method)), None)


def method_of(config: ConfigDict) -> str:
    """The name in Table 1 of the method that the config trains."""
    if config.model.locator == "stripes":
        return "PCB"
    return "baseline" if tuple(config.model.grid) == (1, 1) else "VPM"


def title(method: str) -> str:
    """A method's name in our tables and figures."""
    return method.replace("baseline", "global feature")
