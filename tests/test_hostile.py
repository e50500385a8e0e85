"""A few cases of each door of hostile.py, which tries thousands."""

from __future__ import annotations

from collections import Counter

import hostile
import pytest

SLOW = ("export", "networks", "checkpoint")  # doors that compile or restore in every case


@pytest.mark.parametrize("name", hostile.DOORS)
def test_damage_is_reported_or_harmless(name, tmp_path):
    door = hostile.DOORS[name](tmp_path)
    for number in range(2 if name in SLOW else 8):
        what, verdict, more = hostile.try_case(door, name, 1, number)
        assert verdict in ("reported", "unchanged", "other"), f"{what}: {verdict}\n{more}"


@pytest.mark.parametrize("name", ["png", "zip", "npz", "safetensors", "store"])
def test_an_undetected_change_would_be_found(name, tmp_path, monkeypatch):
    """A door that reads past a change calls it wrong."""
    door = hostile.DOORS[name](tmp_path)
    door.read = lambda: "another answer"
    verdicts = {hostile.try_case(door, name, 1, number)[1] for number in range(3)}
    assert verdicts == {"wrong"}


def test_the_page_keeps_the_doors_that_were_not_tried_again(tmp_path):
    page, counts = tmp_path / "page.md", Counter({"reported": 1_200, "unchanged": 3})
    page.write_text("before\n<!-- doors -->\n<!-- end -->\nafter\n")
    for door in ("png", "csv"):
        hostile.update(page, hostile.Row(door, "abc1234", 0, 61, counts), "On 1 core.")
    hostile.update(page, again := hostile.Row("png", "def5678", 1, 5, Counter({"unchanged": 7})), "On 2 cores.")
    table = hostile.table([again, hostile.Row("csv", "abc1234", 0, 61, counts)])
    assert page.read_text() == f"before\n<!-- doors -->\n\n{table}\n\nOn 2 cores.\n\n<!-- end -->\nafter\n"
    assert "| all | | | 66 | 1,210 | 1,200 | 10 | 0 |" in table
