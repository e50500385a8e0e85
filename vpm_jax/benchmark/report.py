"""What a part measured: figures beside their limits and aims, as a table and as JSON."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vpm_jax.parallel import threads

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "opencv-python-headless", "simplejpeg", "torch")


class Row(NamedTuple):
    """One figure. `limit` is what the machine would allow, in the same unit; a rate unless `unit` is a time."""

    name: str
    value: float
    unit: str
    limit: float | None = None
    limit_is: str = ""  # what was measured for it
    aim: str = ""  # the project's, as text

    @property
    def share(self) -> float | None:
        """Of the limit."""
        if self.limit is None:
            return None
        return self.limit / self.value if self.unit == "s" else self.value / self.limit


@dataclass
class Report:
    """The figures of a part. `lines` say what was measured and how; `figures` replaces the usual table of `rows`."""

    rows: list[Row]
    lines: list[str] = field(default_factory=list)
    figures: str = ""
    device: str = ""  # what JAX ran on, where that is no CPU
    config: dict[str, Any] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)  # the parts of `all` that could not be measured


def align(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of text as an aligned table; the first row is the header, the first column is left-aligned."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def number(value: float) -> str:
    """Three digits or more: 12,345 123 12.3 1.23 0.0123"""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def text(report: Report) -> str:
    """The report for a person."""
    figures = report.figures
    if not figures:
        rows = [("", "measured", "unit", "limit", "of the limit", "the limit is", "aim")]
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
    """The device that JAX ran on, and the processor with the cores that this process may use."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    count = threads()
    return f"{device + ', ' if device else ''}{count} core{'s' * (count > 1)} of {name}"


def versions() -> str:
    """Of Python and the packages that do the work, as far as they are installed."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)
