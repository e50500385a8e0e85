"""Our numbers beside published ones, as readers see them."""

import re

import numpy as np
import pytest

from vpm_jax import comparison
from vpm_jax.paper import GAMMAS


def cells(text):
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| [\d.]", line)]
    return {row[0]: row[1:] for row in rows}


def result(rank1, mean):
    return {"cmc": np.linspace(rank1, 1, 50), "mAP": mean}


def test_a_sweep_beside_the_papers():
    text = comparison.sweep(
        {0.5: result(0.7123, 0.5), 0.55: result(0.75, 0.52), 1.0: result(0.93, 0.8)}, "market1501", "VPM"
    )
    assert text.endswith("\n") and "Table 1" in text and "top gamma, gallery whole" in text
    assert cells(text) == {
        "0.5": ["71.2", "70.9", "+0.3", "73.3", "50.0", "48.8", "+1.2", "48.7"],
        "0.55": ["75.0", "–", "–", "–", "52.0", "–", "–", "–"],
        "1": ["93.0", "93.0", "+0.0", "93.6", "80.0", "80.8", "-0.8", "81.8"],
    }
    widths = {line.count("|") for line in text.splitlines() if line.startswith("|")}
    assert widths == {10}


def test_the_misprint_is_marked_and_gives_no_difference():
    text = comparison.sweep({g: result(0.76, 0.57) for g in GAMMAS}, "dukemtmc", "baseline")
    assert cells(text)["0.7"] == ["76.0", "76.3", "-0.3", "57.0", "90.6*", "–"]
    assert "misprint" in text
    assert "misprint" not in comparison.sweep({0.6: result(0.76, 0.57)}, "dukemtmc", "baseline")


@pytest.mark.parametrize(
    "dataset, method, gamma", [("synthetic", "VPM", 0.5), ("market1501", "none", 0.5), ("market1501", "VPM", 0.55)]
)
def test_nothing_to_compare_with(dataset, method, gamma):
    assert comparison.sweep({gamma: result(0.5, 0.4)}, dataset, method) == ""


def test_gamma_table():
    result = {"cmc": np.linspace(0.3, 0.79, 50), "mAP": 0.2, "mINP": 0.0512, "skipped": 0}
    short = {"cmc": np.array([0.5, 0.75]), "mAP": 1.0, "mINP": 1 / 3, "skipped": 4}
    assert comparison.gamma_table({1.0: short, 0.5: result}) == (
        "| gamma | R-1 | R-5 | R-10 | mAP | mINP |\n"
        "|---|---:|---:|---:|---:|---:|\n"
        "| 0.5 | 30.0 | 34.0 | 39.0 | 20.0 | 5.1 |\n"
        "| 1 | 50.0 | 75.0 | 75.0 | 100.0 | 33.3 |\n"
    )
