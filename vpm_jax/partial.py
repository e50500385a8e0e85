"""The protocols of Partial-REID and Partial-iLIDS (Section 4.3, Table 2): partial queries, a whole gallery.

The datasets have no cameras, so nothing is dropped. Both are test sets only: the paper trains on Market-1501.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from vpm_jax import metrics
from vpm_jax.data.datasets import DATASETS


def is_partial(dataset: str) -> bool:
    """Whether a dataset's queries are partial or occluded images, taken as they are."""
    return dataset in DATASETS and DATASETS[dataset].protocol.queries == "partial"


def groups(identity: ArrayLike) -> list[np.ndarray]:
    """The single-shot groups: group k holds the k-th image of every identity.

    Args:
      identity: int [N], of images in the order of their names.

    Returns:
      Index arrays int [identities]. There are as many groups as the identity with the fewest images has images;
      further images are in no group.
    """
    order = np.argsort(identity, kind="stable")
    _, first, counts = np.unique(np.asarray(identity)[order], return_index=True, return_counts=True)
    return [order[first + k] for k in range(counts.min())]


def single_shot(distance: np.ndarray, query_ids: np.ndarray, gallery_ids: np.ndarray) -> dict[str, Any]:
    """The mean CMC over all pairs of a query group and a gallery group (see `groups`).

    Args:
      distance: float [Q, G].
      query_ids: int [Q].
      gallery_ids: int [G].

    Returns:
      {"cmc": float64 [ranks], the mean; "spread": float64 [ranks], the standard deviation;
      "groups": (number of query groups, number of gallery groups)}.
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
