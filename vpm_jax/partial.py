"""The protocols of Partial-REID and Partial-iLIDS (Section 4.3, Table 2): partial pictures against whole ones.

Queries are the partial images as they are, the gallery the whole ones. There are no cameras, so that nothing is
dropped. Both datasets are for testing alone: the paper trains on Market-1501.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vpm_jax import metrics

DATASETS = ("partial_reid", "partial_ilids")


def groups(identity: ArrayLike) -> list[np.ndarray]:
    """The single-shot groups of images in the order of their names: group k holds image k of every identity.

    Args:
      identity: int [N].

    Returns:
      int arrays [identities] of indices, as many as the identity with the fewest images has; what others have more
      is in no group.
    """
    order = np.argsort(identity, kind="stable")
    _, first, counts = np.unique(np.asarray(identity)[order], return_index=True, return_counts=True)
    return [order[first + k] for k in range(counts.min())]


def single_shot(distance: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray) -> dict[str, Any]:
    """The mean over every group of queries against every group of gallery images (see `groups`).

    Args:
      distance: float [Q, G].
      query_ids: int [Q].
      gallery_ids: int [G].

    Returns:
      "cmc": float64 [ranks], the mean of the groups' CMC; "spread": float64 [ranks], their standard deviation;
      "groups": (groups of queries, groups of gallery images).
    """
    queries, galleries = groups(query_ids), groups(gallery_ids)
    curves = [
        metrics.rank_metrics(distance[np.ix_(q, g)], query_ids[q], gallery_ids[g])["cmc"]
        for q in queries
        for g in galleries
    ]
    return {
        "cmc": np.mean(curves, axis=0),
        "spread": np.std(curves, axis=0),
        "groups": (len(queries), len(galleries)),
    }
