"""The Market-1501 protocol against an evaluator that sorts everything and spells every rule out."""

import numpy as np
import pytest
from plain_metrics import reference

from vpm_jax import metrics
from vpm_jax.metrics import chance_rank1, rank_metrics


def assert_same(found, expected):
    assert set(found) == {"cmc", "mAP", "mINP", "skipped"}
    np.testing.assert_allclose(found["cmc"], expected["cmc"], rtol=0, atol=1e-12)
    assert found["mAP"] == pytest.approx(expected["mAP"], abs=1e-12)
    assert found["mINP"] == pytest.approx(expected["mINP"], abs=1e-12)
    assert found["skipped"] == expected["skipped"]


def example(seed, identities=8, queries=25, gallery=90):
    random = np.random.default_rng(seed)
    distance = random.random((queries, gallery)).astype(np.float32)
    query_ids, gallery_ids = random.integers(1, identities + 4, queries), random.integers(-1, identities + 1, gallery)
    return distance, query_ids, gallery_ids, random.integers(1, 4, queries), random.integers(1, 4, gallery)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("cameras", [True, False])
@pytest.mark.parametrize("levels", [0, 1, 3, 20])
@pytest.mark.parametrize("sort_above", [0, 100])
def test_equals_the_plain_evaluator(monkeypatch, seed, cameras, levels, sort_above):
    """Junk, distractors, queries without a match, and `levels` distinct distances (0: all), some of them infinite."""
    monkeypatch.setattr(metrics, "SORT_ABOVE", sort_above)
    distance, *labels = example(seed)
    if levels:
        distance = np.floor(distance * levels)
    distance[np.random.default_rng(seed).random(distance.shape) < 0.2] = np.inf
    labels = labels if cameras else labels[:2]
    expected, chance = reference(distance, *labels)
    assert expected["skipped"] > 0
    assert_same(rank_metrics(distance, *labels), expected)
    assert chance_rank1(*labels) == pytest.approx(chance, abs=1e-12)


def test_a_gallery_smaller_than_the_curve():
    distance, *labels = example(0, identities=2, gallery=9)
    found = rank_metrics(distance, *labels)
    assert found["cmc"].shape == (9,) and found["cmc"].dtype == np.float64
    assert_same(found, reference(distance, *labels)[0])
    assert rank_metrics(*example(0)[:3])["cmc"].shape == (50,)


def test_by_hand():
    #          hit   miss  hit   same camera  junk  distractor
    distance = [[0.3, 0.2, 0.5, 0.1, 0.05, 0.4]]
    found = rank_metrics(distance, [7], [7, 8, 7, 7, -1, 0], [1], [2, 1, 3, 1, 2, 2])
    # Ranked: miss, hit, distractor, hit.
    np.testing.assert_array_equal(found["cmc"], [0, 1, 1, 1, 1, 1])
    assert found["mAP"] == (1 / 2 + 2 / 4) / 2 and found["mINP"] == 2 / 4 and found["skipped"] == 0
    assert isinstance(found["mAP"], float) and isinstance(found["mINP"], float) and isinstance(found["skipped"], int)
    assert chance_rank1([7], [7, 8, 7, 7, -1, 0], [1], [2, 1, 3, 1, 2, 2]) == 2 / 4
    # Without cameras the third hit counts too: hit, miss, hit, distractor, hit.
    found = rank_metrics(distance, [7], [7, 8, 7, 7, -1, 0])
    assert found["mAP"] == pytest.approx((1 + 2 / 3 + 3 / 5) / 3) and found["mINP"] == pytest.approx(3 / 5)


def test_equal_distances_rank_in_gallery_order():
    for value in (0.5, np.inf):
        distance = np.full((1, 4), value)
        assert rank_metrics(distance, [1], [2, 1, 2, 1])["mAP"] == (1 / 2 + 2 / 4) / 2
        assert rank_metrics(distance, [1], [1, 1, 2, 2])["mAP"] == 1
    many = np.zeros((1, 600)), [1], np.random.default_rng(0).integers(1, 3, 600)
    assert_same(rank_metrics(*many), reference(*many)[0])


def test_a_query_without_a_match_leaves_every_mean():
    distance, *labels = example(1)
    kept = rank_metrics(distance, *labels)
    more = rank_metrics(
        np.concatenate([distance, distance[:3]]),
        np.concatenate([labels[0], [900, -1, 901]]),  # two strangers and junk
        labels[1],
        np.concatenate([labels[2], [1, 1, 1]]),
        labels[3],
    )
    assert_same(more, kept | {"skipped": kept["skipped"] + 3})


def test_chance_is_the_mean_of_random_rankings():
    _, *labels = example(3)
    random = np.random.default_rng(0)
    shape = len(labels[0]), len(labels[1])
    rank1 = [rank_metrics(random.random(shape), *labels)["cmc"][0] for _ in range(500)]
    error = np.std(rank1) / np.sqrt(len(rank1))
    assert abs(np.mean(rank1) - chance_rank1(*labels)) < 4 * error


@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_input_is_named():
    distance, query_ids, gallery_ids, query_cameras, _ = example(0)
    with pytest.raises(ValueError, match=r"\(90, 25\) for 25 queries and 90 gallery images, expected \(25, 90\)"):
        rank_metrics(distance.T, query_ids, gallery_ids)
    with pytest.raises(ValueError, match=r"\(25, 1\) and gallery identities \(90,\)"):
        rank_metrics(distance, query_ids[:, None], gallery_ids)
    with pytest.raises(ValueError, match=r"\(25,\) and gallery identities \(0,\).*at least one"):
        rank_metrics(distance[:, :0], query_ids, gallery_ids[:0])
    with pytest.raises(ValueError, match="only one of query and gallery"):
        rank_metrics(distance, query_ids, gallery_ids, query_cameras)
    with pytest.raises(ValueError, match=r"gallery cameras \(25,\)"):
        rank_metrics(distance, query_ids, gallery_ids, query_cameras, query_cameras)
    with pytest.raises(ValueError, match="none of the 25 queries has a match among the 90"):
        rank_metrics(distance, query_ids + 1000, gallery_ids)
    with pytest.raises(ValueError, match="none of the 25 queries"):
        chance_rank1(query_ids + 1000, gallery_ids)
    distance[3, 8] = np.nan
    with pytest.raises(ValueError, match="distance of query 3 to gallery image 8 is NaN"):
        rank_metrics(distance, query_ids, gallery_ids)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("levels", [0, 3])
def test_blocks_give_what_the_whole_matrix_gives(seed, levels):
    """Rows in two parts; columns up to the last match first, then in pieces; equal distances across pieces."""
    distance, *labels = example(seed, gallery=400)
    labels[1][90:] = np.minimum(labels[1][90:], 0)  # distractors and junk
    if levels:
        distance = np.floor(distance * levels)
    whole = metrics.Ranking(*labels, keep=7)
    whole.add(distance)
    blocks = metrics.Ranking(*labels, keep=7)
    for columns in (slice(0, 100), slice(100, 101), slice(101, 380), slice(380, 400)):
        for rows in (np.array([3, 4, 20]), np.delete(np.arange(25), [3, 4, 20])):
            blocks.add(distance[rows, columns], rows, columns)
    assert_same(blocks.metrics(), reference(distance, *labels)[0])
    np.testing.assert_array_equal(blocks.average_precision(), metrics.average_precision(distance, *labels))
    for query in range(25):
        dropped = (labels[1] == labels[0][query]) & (labels[3] == labels[2][query]) | (labels[1] == -1)
        expected = [i for i in np.argsort(distance[query], kind="stable") if not dropped[i]][:7]
        for ranking in (whole, blocks):
            index, near = ranking.nearest(query)
            assert index.tolist() == expected
            np.testing.assert_array_equal(near, distance[query, expected])


def test_blocks_that_cannot_be_ranked():
    distance, *labels = example(0)
    ranking = metrics.Ranking(*labels)
    with pytest.raises(ValueError, match="no distances of query 0"):
        ranking.metrics()
    query = int(np.flatnonzero(np.isin(labels[0], labels[1][50:]))[0])
    with pytest.raises(ValueError, match=f"the first distances of query {query} lack gallery images of its identity"):
        ranking.add(distance[[query], :50], np.array([query]), slice(0, 50))
