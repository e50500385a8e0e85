"""The figures of a section with their limits and targets, as a table and as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vpm_jax.machine import threads

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "opencv-python-headless", "simplejpeg", "torch")


class Row(NamedTuple):
    """One figure and the machine's limit, in the same unit: a rate, unless `unit` is a time."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    limit_is: str = ""  # what the limit is
    aim: str = ""  # the project's target, as text

    @property
    def share(self) -> float | None:
        """The fraction of the limit that is reached."""
        if self.limit is None:
            return None
        return self.limit / self.value if self.unit == "s" else self.value / self.limit


@dataclass
class Report:
    """The results of a section. `lines` explain the measurement; `figures` replaces the default table of `rows`."""

    rows: list[Row]
    lines: list[str] = field(default_factory=list)
    figures: str = ""
    device: str = ""  # JAX's device, "" for a CPU
    config: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)  # sections of `all` that raised an error


def align(rows: Sequence[tuple[str, ...]]) -> str:
    """Formats rows of text, the first of them the header, as a table; only the first column is left-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float) -> str:
    """Formats with at least three digits: 12,345 123 12.3 1.23 0.0123"""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def text(report: Report) -> str:
    """The report as text."""
    figures = report.figures
    if not figures:
        rows = [("", "measured", "unit", "limit", "of the limit", "the limit is", "target")]
        for row in report.rows:
            limit = ("", "") if row.limit is None or row.share is None else (number(row.limit), f"{row.share:.0%}")
            rows.append((row.name, number(row.value), row.unit, *limit, row.limit_is, row.aim))
        figures = align(rows)
    return "\n".join([f"{hardware(report.device)}; {versions()}.", *report.lines, figures])


def to_json(report: Report) -> str:
    record = {
        "hardware": hardware(report.device),
        "versions": versions(),
        "lines": report.lines,
        "rows": [row._asdict() | {"share": row.share} for row in report.rows],
        "config": report.config,
    }
    return json.dumps(record, indent=1) + "\n"


def hardware(device: str = "") -> str:
    """JAX's device, and the processor with the number of cores that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    count = threads()
    return f"{device + ', ' if device else ''}{count} core{'s' * (count > 1)} of {name}"


def versions() -> str:
    """The versions of Python and of the installed packages that matter for speed."""
    names = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            names.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(names)
