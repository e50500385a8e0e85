"""The Market-1501 protocol by an evaluator that sorts everything and spells every rule out."""

from __future__ import annotations

import numpy as np


def ranked_matches(distance, query_id, query_camera, gallery_ids, gallery_cameras):
    """The gallery that one query ranks, best first, as booleans: does it match?"""
    gallery = []
    for index in range(len(gallery_ids)):
        if gallery_ids[index] == -1:
            continue
        if query_camera is not None and gallery_ids[index] == query_id and gallery_cameras[index] == query_camera:
            continue
        gallery.append((distance[index], index))
    return [bool(gallery_ids[index] == query_id) for _, index in sorted(gallery)]


def reference(distance, query_ids, gallery_ids, query_cameras=None, gallery_cameras=None):
    cmc, precisions, penalties, chances, skipped = [], [], [], [], 0
    for q in range(len(query_ids)):
        camera = None if query_cameras is None else query_cameras[q]
        hits = ranked_matches(distance[q], query_ids[q], camera, gallery_ids, gallery_cameras)
        if not any(hits):
            skipped += 1
            continue
        length = min(len(gallery_ids), 50)
        cmc.append([any(hits[:k]) for k in range(1, length + 1)])
        ranks = [rank for rank, hit in enumerate(hits, start=1) if hit]
        precisions.append(np.mean([sum(hits[:rank]) / rank for rank in ranks]))
        penalties.append(len(ranks) / ranks[-1])
        chances.append(len(ranks) / len(hits))
    found = {"cmc": np.mean(cmc, axis=0), "mAP": np.mean(precisions), "mINP": np.mean(penalties), "skipped": skipped}
    return found, np.mean(chances)
