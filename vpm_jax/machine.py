"""What this machine has, without JAX."""

from __future__ import annotations

import os


def threads() -> int:
    """The number of CPU cores that this process may use, considering taskset and containers."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
