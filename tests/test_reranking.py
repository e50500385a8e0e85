"""k-reciprocal re-ranking against loops over sets, written from the paper and its published code's conventions."""

from __future__ import annotations

import numpy as np
import pytest
from plain_matching import example

from vpm_jax import reranking
from vpm_jax.matching import region_distance
from vpm_jax.reranking import rerank

Q, G, P, C = 7, 40, 3, 8


def reference(qg, qq, gg, k1, k2, lambda_):
    """Sets and dictionaries, one image after the other, in float64."""
    d = np.block([[qq, qg], [qg.T, gg]]).astype(np.float64) ** 2
    np.fill_diagonal(d, 0)
    largest = np.where(np.isfinite(d), d, 0).max(axis=1, keepdims=True)
    d = d / np.where(largest > 0, largest, 1)
    n = len(d)

    def ranking(i):
        order = sorted(range(n), key=lambda j: (j != i, d[i, j]))
        return [j for j in order if np.isfinite(d[i, j])]

    rank = [ranking(i) for i in range(n)]

    def reciprocal(i, k):
        """R(i, k): those among i's first k that have i among theirs (Eq. 2); the image itself is one more."""
        return {j for j in rank[i][: k + 1] if i in rank[j][: k + 1]}

    v = np.zeros((n, n))
    for i in range(n):
        members = set(reciprocal(i, k1))
        for j in reciprocal(i, k1):
            small = reciprocal(j, int(np.around(k1 / 2)))
            if len(small & reciprocal(i, k1)) > 2 / 3 * len(small):  # Eq. 5
                members |= small
        for j in members:
            v[i, j] = np.exp(-d[i, j])  # Eq. 7
        v[i] /= v[i].sum()
    v = np.stack([np.mean([v[j] for j in rank[i][:k2]], axis=0) for i in range(n)])  # Eq. 11
    result = np.empty(qg.shape)
    for i in range(len(qg)):
        for j in range(qg.shape[1]):
            a, b = v[i], v[len(qg) + j]
            jaccard = 1 - np.minimum(a, b).sum() / np.maximum(a, b).sum()  # Eq. 10
            far = np.inf if np.isinf(qg[i, j]) else lambda_ * d[i, len(qg) + j]
            result[i, j] = (1 - lambda_) * jaccard + far  # Eq. 12
    return result


def people(seed=0):
    """Images of a few persons, of whom each shows some regions: features and visibility of queries and gallery."""
    q, q_weight, g, g_weight = example(Q, G, P, C, seed)
    centres = np.random.default_rng(seed + 1).standard_normal((5, P, C)).astype(np.float32)
    q, g = (0.6 * x + centres[np.arange(len(x)) % 5] for x in (q, g))
    return q, q_weight, g, g_weight


def distances(q, q_weight, g, g_weight):
    return (
        region_distance(q, q_weight, g, g_weight),
        region_distance(q, q_weight, q, q_weight),
        region_distance(g, g_weight, g, g_weight),
    )


@pytest.fixture(params=[2**27, 2**10], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    monkeypatch.setattr(reranking, "CHUNK_BYTES", request.param)


@pytest.mark.parametrize(("k1", "k2", "lambda_"), [(20, 6, 0.3), (5, 3, 0.5), (8, 1, 0.0)])
def test_equals_loops_over_sets(chunks, k1, k2, lambda_):
    three = distances(*people())
    found = rerank(*three, k1, k2, lambda_)
    assert found.dtype == np.float32 and found.shape == (Q, G)
    np.testing.assert_allclose(found, reference(*three, k1, k2, lambda_), rtol=1e-5, atol=2e-6)
    finite = found[np.isfinite(found)]
    assert finite.min() >= 0 and finite.max() <= 1 + 1e-6


def test_images_without_a_shared_region(chunks):
    """+inf pairs are nobody's neighbours and stay last, an image without regions has only itself."""
    q, q_weight, g, g_weight = people()
    q_weight[0], q_weight[1] = [1, 0, 0], [0, 0, 0]
    g_weight[:5], g_weight[5] = [0, 0, 2], [0, 0, 0]
    three = distances(q, q_weight, g, g_weight)
    assert np.isinf(three[0][0, :6]).all() and np.isinf(three[0][1]).all()
    for lambda_ in (0.3, 0.0):
        found = rerank(*three, 10, 3, lambda_)
        np.testing.assert_array_equal(np.isinf(found), np.isinf(three[0]))
        np.testing.assert_allclose(found, reference(*three, 10, 3, lambda_), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("k1", [50, 500])
def test_fewer_images_than_neighbours(k1):
    three = distances(*people())
    np.testing.assert_allclose(rerank(*three, k1), reference(*three, k1, 6, 0.3), rtol=1e-5, atol=2e-6)


def test_correct_matches_rank_higher():
    """Gallery images of the query's person rank higher: what re-ranking is for."""
    q, q_weight, g, g_weight = people()
    ones = np.ones_like(q_weight), np.ones_like(g_weight)
    noise = np.random.default_rng(5)
    q, g = (x + 0.9 * noise.standard_normal(x.shape).astype(np.float32) for x in (q, g))
    three = distances(q, ones[0], g, ones[1])
    same = (np.arange(Q) % 5)[:, None] == np.arange(G) % 5

    def precision(distance):
        return np.mean([same[i][np.argsort(row)[:8]].mean() for i, row in enumerate(distance)])

    assert precision(rerank(*three, 8, 3)) > precision(three[0])


def test_squared_distances():
    q, q_weight, g, g_weight = people()
    three = distances(q, q_weight, g, g_weight)
    expected = rerank(*three)
    np.testing.assert_allclose(rerank(*(x * x for x in three), squared=True), expected, atol=1e-6)


def test_empty_sides():
    qg, qq, gg = distances(*people())
    assert rerank(qg[:0], qq[:0, :0], gg).shape == (0, G)
    assert rerank(qg[:, :0], qq, gg[:0, :0]).shape == (Q, 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"query_query": np.zeros((Q, G))}, r"expected \[Q, Q\] and \[G, G\] beside \[Q, G\]"),
        ({"k1": 0}, "k1 0, k2 6"),
        ({"k2": 0}, "k2 0"),
        ({"lambda_": 1.5}, "lambda_ 1.5"),
    ],
)
@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_arguments_are_named(change, sentence):
    arguments = {
        "query_gallery": np.zeros((Q, G)),
        "query_query": np.zeros((Q, Q)),
        "gallery_gallery": np.zeros((G, G)),
    }
    with pytest.raises(ValueError, match=sentence):
        rerank(**(arguments | change))
