"""A few cases of each door of hostile.py, which tries thousands."""

from __future__ import annotations

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
