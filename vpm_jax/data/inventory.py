"""A record of a split, to recognize its data later: names, labels, and checksums of a few images."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from vpm_jax.data.split import Split, join
from vpm_jax.errors import UserError

_SAMPLED = 16  # images whose encoded bytes are compared: cheap, and enough to tell two datasets with equal names apart


@dataclass(frozen=True)
class Inventory:
    """The images of one split, in order. It does not depend on where the dataset is stored, or in which format."""

    names: tuple[str, ...]
    labels: tuple[int, ...]  # 0..K-1, the classes of the model
    checksums: Mapping[str, int]  # CRC-32 of up to 16 evenly spaced images, by name; without unreadable ones

    @classmethod
    def of(cls, split: Split) -> Inventory:
        """The inventory of a split. Reads up to 16 images."""
        names = _relative(split.names)
        checksums = {}
        for i in np.unique(np.linspace(0, len(split) - 1, min(_SAMPLED, len(split))).round().astype(int)).tolist():
            try:
                checksums[names[i]] = zlib.crc32(split.read(i))
            except UserError:  # the reader of this image decides what to do about it
                continue
        return cls(names, tuple(split.labels().tolist()), checksums)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Inventory:
        """The inventory that `to_json` recorded. Raises ValueError, KeyError or TypeError for anything else."""
        inventory = cls(tuple(record["names"]), tuple(map(int, record["labels"])), dict(record["checksums"]))
        if inventory.digest != record["digest"]:
            raise ValueError("its digest does not match")
        return inventory

    def to_json(self) -> dict[str, Any]:
        """The inventory as JSON values, for `from_json`."""
        return {
            "images": len(self.names),
            "identities": len(set(self.labels)),
            "digest": self.digest,
            "checksums": dict(self.checksums),
            "names": list(self.names),
            "labels": list(self.labels),
        }

    @property
    def digest(self) -> str:
        """16 hexadecimal digits, equal for equal inventories."""
        content = json.dumps([self.names, self.labels, sorted(self.checksums.items())])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def differences(self, other: Inventory) -> str:
        """How `other` differs from this inventory, in words with counts; "" if it holds the same data.

        A few images with other contents are the same data, since people repair damaged ones.
        """
        before, now = (dict(zip(i.names, i.labels, strict=True)) for i in (self, other))
        counts = {
            "added": len(now.keys() - before.keys()),
            "removed": len(before.keys() - now.keys()),
            "relabeled": _relabeled(before, now),
        }
        if words := [f"{count:,} {word}" for word, count in counts.items() if count]:
            return f"images: {', '.join(words)}"
        if (self.names, self.labels) != (other.names, other.labels):
            return "the same images, with identities or files in another order"
        both = self.checksums.keys() & other.checksums.keys()
        changed = sum(self.checksums[name] != other.checksums[name] for name in both)
        if 2 * changed > len(both):
            return f"the same names with other images ({changed} of {len(both)} compared)"
        return ""


def digest_of_test_set(query: Split, gallery: Split) -> str:
    """16 hexadecimal digits for what metrics use of a test set, however its identities and cameras are numbered."""
    both, content = join(query, gallery), [Inventory.of(split).digest for split in (query, gallery)]
    for group in (both.identity, both.camera):
        if group is not None:
            content.append(hashlib.sha256(np.unique(group, return_inverse=True)[1].astype("<i4").tobytes()).hexdigest())
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _relative(names: tuple[str, ...]) -> tuple[str, ...]:
    """Normalized names. Absolute ones, which a CSV may list, become relative to the folder that they share."""
    names = tuple(map(os.path.normpath, names))
    if names and all(map(os.path.isabs, names)):
        folder = os.path.commonpath([os.path.dirname(name) for name in names])
        names = tuple(os.path.relpath(name, folder) for name in names)
    return names


def _relabeled(before: Mapping[str, int], now: Mapping[str, int]) -> int:
    """The number of common images that changed from one identity to another, however identities are numbered.

    Each old identity continues as the new one with which it shares the most images.
    """
    pairs = Counter((before[name], now[name]) for name in before.keys() & now.keys())
    new_of: dict[int, int] = {}
    old_of: dict[int, int] = {}
    for old, new in sorted(pairs, key=lambda pair: (-pairs[pair], pair)):
        if old not in new_of and new not in old_of:
            new_of[old], old_of[new] = new, old
    return pairs.total() - sum(pairs[pair] for pair in new_of.items())
