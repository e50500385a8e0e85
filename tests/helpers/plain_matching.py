"""Eq. 4 in float64 NumPy, written out with the [Q, G, P] array that the package never makes."""

from __future__ import annotations

import numpy as np


def reference(q, q_weight, g, g_weight, squared=False):
    """Eq. 4 in float64, written out. A pair without weight is +inf."""
    local = ((q.astype(np.float64)[:, None] - g.astype(np.float64)[None]) ** 2).sum(-1)
    if not squared:
        local = np.sqrt(local)
    weight = q_weight.astype(np.float64)[:, None] * g_weight.astype(np.float64)[None]
    total = weight.sum(-1)
    return np.where(total > 0, (weight * local).sum(-1) / np.where(total > 0, total, 1), np.inf)


def example(queries=7, gallery=23, regions=5, channels=64, seed=0):
    random = np.random.default_rng(seed)

    def features(n):
        x = random.standard_normal((n, regions, channels)).astype(np.float32)
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    def weight(n):
        return (random.random((n, regions)) * (random.random((n, regions)) > 0.3)).astype(np.float32) * 30

    return features(queries), weight(queries), features(gallery), weight(gallery)
