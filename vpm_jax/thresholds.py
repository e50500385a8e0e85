"""Measures which distance means the same person, by gamma, and writes thresholds.json, a table and a plot.

thresholds.json is a record for `captions`, with the model's fingerprint and, for each gamma, what `measure` returns.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vpm_jax import captions, comparison, plots
from vpm_jax.data.split import Dataset
from vpm_jax.description import CroppedSplit, FeatureSource, Variables
from vpm_jax.disk import replacing, write_atomically
from vpm_jax.distances import blocks
from vpm_jax.errors import UserError
from vpm_jax.evaluation import by_protocol, gammas_of, ranked
from vpm_jax.verification import Pairs, Rate

RATES = (1e-1, 1e-2, 1e-3, 1e-4)  # false match rates
ALARMS = (1e-1, 1e-2)  # false alarm rates of open-set identification
POINTS = 200  # of a curve in the file
_AGAIN = "write it with python -m vpm_jax.threshold"


def measure(source: FeatureSource, variables: Variables, dataset: Dataset) -> dict[str, dict[str, Any]]:
    """{gamma: rates and thresholds} of queries cropped to each of config.eval.gammas against the gallery.

    Partial images are not cropped again: their gamma is 1.0.

    Of each gamma: "pairs" (numbers of same- and different-person pairs), "equal_error_rate" [value, low, high],
    "verification" {false match rate: {"distance", "true_match_rate" [value, low, high]}}, "identification" {false alarm
    rate: {"distance", "rate" [value, low, high]}}, and the ROC as "curve". Intervals are those of `Pairs`; a number
    that too few pairs determine is null.

    Raises:
      UserError: as `distances.blocks`.
    """
    config, dataset = source.config, by_protocol(source.config, dataset)
    query, gallery = dataset.query, ranked(dataset.gallery)
    labels = query.identity, gallery.identity, query.camera, gallery.camera
    most = 4.0 if config.match.squared else 2.0  # between unit vectors
    gammas = gammas_of(config, dataset)
    counts = [Pairs(*labels, most) for _ in gammas]
    queries = [CroppedSplit(query, gamma) for gamma in gammas]
    for number, rows, columns, distance in blocks(source, variables, queries, gallery):
        counts[number].add(distance, rows, columns)
    return {str(gamma): _of_gamma(pairs) for gamma, pairs in zip(gammas, counts, strict=True)}


def _of_gamma(pairs: Pairs) -> dict[str, Any]:
    verification, identification = {}, {}
    for rate in RATES:
        distance, true = pairs.true_match_rate(rate)
        verification[f"{rate:g}"] = {"distance": _number(distance), "true_match_rate": _numbers(true)}
    for rate in ALARMS:
        distance, found = pairs.identification_rate(rate)
        identification[f"{rate:g}"] = {"distance": _number(distance), "rate": _numbers(found)}
    names = ("distance", "true_match_rate", "false_match_rate")
    curve = dict(zip(names, (pairs.thresholds, *pairs.curve()), strict=True))
    shown = np.unique(np.linspace(0, len(pairs.thresholds) - 1, POINTS).astype(int))
    return {
        "pairs": pairs.count,
        "equal_error_rate": _numbers(pairs.equal_error_rate()),
        "verification": verification,
        "identification": identification,
        "curve": {name: [float(f"{x:.6g}") for x in values[shown]] for name, values in curve.items()},
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _numbers(rate: Rate) -> list[float] | None:
    return None if math.isnan(rate.value) else list(rate)


def table(gammas: Mapping[str, Mapping[str, Any]]) -> str:
    """What `measure` returns as Markdown, with a sentence about its columns."""

    def percent(rate: list[float] | None) -> str:
        return "–" if rate is None else "{:.1f} ({:.1f}-{:.1f})".format(*(100 * x for x in rate))

    def number(value: float | None) -> str:
        return "–" if value is None else f"{value:.3f}"

    pairs = [["gamma", "equal error rate"]]
    pairs[0] += [title for rate in RATES for title in (f"TMR at FMR {rate:g}", "distance")]
    alarms = [["gamma"]]
    alarms[0] += [title for rate in ALARMS for title in (f"identified at {rate:.0%} false alarms", "distance")]
    for gamma, measured in gammas.items():
        pairs.append([f"{float(gamma):g}", percent(measured["equal_error_rate"])])
        for point in measured["verification"].values():
            pairs[-1] += [percent(point["true_match_rate"]), number(point["distance"])]
        alarms.append([f"{float(gamma):g}"])
        for point in measured["identification"].values():
            alarms[-1] += [percent(point["rate"]), number(point["distance"])]
    explanation = (
        "Percentages with 95 % confidence intervals by identity. TMR is the true match rate, the share of same-person "
        "pairs below the distance; FMR is the false match rate, that of different-person pairs, as a fraction."
    )
    return "\n".join([explanation, "", *comparison.table(pairs), *comparison.table(alarms)])


class Thresholds(NamedTuple):
    """The content of a thresholds.json."""

    path: Path
    model: str  # the fingerprint of its model
    gammas: Mapping[str, Mapping[str, Any]]

    @classmethod
    def read(cls, path: Path, model: str, match: Mapping[str, Any]) -> Thresholds:
        """Reads the thresholds for a model (its fingerprint) and config.match.

        Raises:
          UserError: if the file is missing or damaged, or was measured with another model or matching.
        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            found = cls(path, record["model"], record["gammas"])
            measured = {key: record["match"][key] for key in ("squared", "visibility", "vector")}
            measured["gallery_whole"] = record["match"].get("gallery_whole", False)  # absent from older files
            _ = [found.distance(gamma, rate) for gamma in (1.0, *map(float, found.gammas)) for rate in RATES]
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror}): {_AGAIN}.") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} holds no thresholds ({error!r}): {_AGAIN}.") from None
        expected = {key: match[key] for key in measured}
        if found.model != model or measured != expected:
            raise UserError(
                f"{path} was measured with the model {found.model} and {measured}, not {model} and {expected}: "
                f"{_AGAIN} for this model.",
                code="other-model",
            )
        return found

    def distance(self, gamma: float, false_match_rate: float) -> float | None:
        """The threshold of the measured gamma nearest to `gamma`; None if too few pairs determine it.

        Raises:
          UserError: for a rate that is not one of RATES.
        """
        if false_match_rate not in RATES:
            rates = ", ".join(f"{rate:g}" for rate in RATES)
            raise UserError(f"The false match rate is {false_match_rate!r}, expected one of {rates}.")
        nearest = min(self.gammas, key=lambda text: abs(float(text) - gamma))
        value = self.gammas[nearest]["verification"][f"{false_match_rate:g}"]["distance"]
        return None if value is None else float(value)


def write(folder: Path, name: str, record: Mapping[str, Any], text: str) -> None:
    """Writes NAME.json, NAME.md and NAME.png. Raises UserError if the folder cannot be written."""
    with replacing(folder / f"{name}.png") as path:
        plots.error_rates(path, record["gammas"], captions.title(record))
    write_atomically(folder / f"{name}.md", text)
    write_atomically(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
