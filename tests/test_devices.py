"""Eight virtual devices, in a process of their own, learn what one does (tests/helpers/devices.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from paths import HELPERS, PYTHON_PATH


def compare(*arguments: str) -> list[dict]:
    environment = os.environ | {"PYTHONPATH": PYTHON_PATH}
    command = [sys.executable, str(HELPERS / "devices.py"), "--json", *arguments]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3000)
    assert process.returncode == 0, process.stderr
    return [json.loads(line) for line in process.stdout.splitlines()]


def check(rows: list[dict]) -> None:
    for row in rows:
        assert row["metrics"] < 1e-10 and row["state"] < 1e-10, row
        assert row["other_triplets"] == 0 and row["gap"] > 1e-8, row
        assert row["triplet"] > 0, row


def test_a_few_steps_on_eight_devices():
    rows = compare("--stem", "--steps", "4", "--runs", "market:pmap", "market_released:jit", "--devices", "8")
    check(rows)
    assert [(row["recipe"], row["kind"], row["devices"]) for row in rows] == [
        ("market", "pmap", 8),
        ("market_released", "jit", 8),
    ]


@pytest.mark.slow
def test_ten_steps_on_one_to_eight_devices():
    rows = compare()
    check(rows)
    assert len(rows) == 2 * (3 + 4)
