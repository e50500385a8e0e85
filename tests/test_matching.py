"""Eq. 4 against float64 NumPy, written out with the [Q, G, P] array that the module never makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from plain_matching import example, reference
from stores import Streamed

from vpm_jax import Description, chunks, matching, topk
from vpm_jax.config import default
from vpm_jax.matching import match_visibility, region_distance
from vpm_jax.topk import top_k


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("images_per_chunk", [1, 4, 10, 1000])
def test_equals_float64_for_any_chunking(monkeypatch, squared, images_per_chunk):
    data = example()
    monkeypatch.setattr(matching, "CHUNK_BYTES", 4 * images_per_chunk * data[0][0].size)
    found = region_distance(*data, squared=squared)
    assert found.dtype == np.float32 and found.shape == (7, 23)
    # Unit features: a squared distance of order 1 is off by a few float32 units of the norms' sum.
    np.testing.assert_allclose(found, reference(*data, squared=squared), atol=3e-6)


def test_by_hand():
    q = np.array([[[0.0, 0.0], [1.0, 0.0]]], np.float32)
    g = np.array([[[3.0, 4.0], [1.0, 2.0]], [[0.0, 0.0], [1.0, 0.0]]], np.float32)
    q_weight, g_weight = np.array([[2.0, 1.0]], np.float32), np.array([[1.0, 3.0], [0.0, 1.0]], np.float32)
    # Local distances 5 and 2, weights 2 x 1 and 1 x 3; then only the second region, which is the same.
    np.testing.assert_allclose(region_distance(q, q_weight, g, g_weight), [[16 / 5, 0]], rtol=1e-6)
    np.testing.assert_allclose(region_distance(q, q_weight, g, g_weight, squared=True), [[62 / 5, 0]], rtol=1e-6)


def test_pairs_without_a_shared_region_are_infinite():
    q, q_weight, g, g_weight = example(regions=4)
    q_weight[2] = [1, 1, 0, 0]
    g_weight[5] = [0, 0, 1, 1]
    g_weight[6] = 0
    found = region_distance(q, q_weight, g, g_weight)
    assert np.isposinf(found[2, 5]) and np.isposinf(found[:, 6]).all() and not np.isnan(found).any()
    assert np.isfinite(found[3, 0])


def test_identical_features_without_a_shared_region_are_infinite(monkeypatch):
    """As when invisible regions hold zeros; where a weight is zero, nothing needs to be computed again."""
    monkeypatch.delattr(matching, "_recompute")
    random = np.random.default_rng(0)
    x, weight = random.standard_normal((6, 4, 16)).astype(np.float32), np.zeros((6, 4), np.float32)
    weight[:3, :2] = weight[3:, 2:] = 1
    x[weight == 0] = 0
    assert np.isposinf(region_distance(x[:3], weight[:3], x[3:], weight[3:])).all()
    assert np.isposinf(region_distance(x[:3], weight[:3], x[:3], 0 * weight[:3])).all()


@pytest.mark.parametrize("scale", [1e-35, 1e-21, 1e21, 1e37])
def test_the_scale_of_visibility_cancels_even_where_products_leave_float32(scale):
    q, q_weight, g, g_weight = example(regions=3)
    exact = reference(q, q_weight, g, g_weight)
    scaled = [(scale * weight).astype(np.float32) for weight in (q_weight, g_weight)]
    np.testing.assert_allclose(region_distance(q, scaled[0], g, scaled[1]), exact, rtol=1e-4)
    distance, index = top_k(q, scaled[0], g, scaled[1], 3)
    np.testing.assert_array_equal(index, np.argsort(exact, axis=1)[:, :3])
    np.testing.assert_allclose(distance, np.sort(exact, axis=1)[:, :3], rtol=1e-4)


def test_identical_features_are_at_distance_zero():
    """Though |q|^2 + |g|^2 - 2 q.g alone leaves the root of a rounding error, about 1e-2 for these norms."""
    random = np.random.default_rng(0)
    x = random.standard_normal((40, 3, 2048)).astype(np.float32)
    weight = np.ones((40, 3), np.float32)
    for squared in (False, True):
        found = region_distance(x, weight, x, weight, squared)
        assert np.all(np.diag(found) == 0)
        np.testing.assert_allclose(found, reference(x, weight, x, weight, squared), rtol=1e-5)


@pytest.mark.parametrize("distance", [1e-4, 1e-3, 1e-2, 2e-2, 5e-2, 1e-1])
def test_near_duplicates_keep_their_digits(distance):
    random = np.random.default_rng(1)
    q, weight, others, _ = example(30, 30, 6, 2048)
    offset = random.standard_normal(q.shape)
    g = (q + distance * offset / np.linalg.norm(offset, axis=-1, keepdims=True)).astype(np.float32)
    g, weight = np.concatenate([g, others]), np.ones((30, 6), np.float32)
    found = region_distance(q, weight, g, np.ones((60, 6), np.float32))
    np.testing.assert_allclose(found, reference(q, weight, g, np.ones((60, 6))), rtol=1e-4, atol=3e-6)


def test_a_large_common_offset_costs_no_digits(monkeypatch):
    """A collapsed network: features far from the origin, and near one another. Nothing is computed twice for it."""
    monkeypatch.delattr(matching, "_recompute")
    q, q_weight, g, g_weight = example()
    q_weight, g_weight = q_weight + 1, g_weight + 1
    q, g = (0.01 * q + 10).astype(np.float32), (0.01 * g + 10).astype(np.float32)
    np.testing.assert_allclose(
        region_distance(q, q_weight, g, g_weight), reference(q, q_weight, g, g_weight), rtol=1e-5
    )


def test_takes_every_kind_of_array(tmp_path, monkeypatch):
    q, q_weight, g, g_weight = example()
    expected = region_distance(q, q_weight, g, g_weight)
    monkeypatch.setattr(matching, "CHUNK_BYTES", 4 * 10 * q[0].size)
    np.save(tmp_path / "gallery.npy", g)
    mapped = np.load(tmp_path / "gallery.npy", mmap_mode="r")
    np.testing.assert_allclose(region_distance(q, q_weight, mapped, g_weight), expected, atol=1e-6)
    on_device = [jnp.asarray(x) for x in (q, q_weight, g, g_weight)]
    np.testing.assert_allclose(region_distance(*on_device), expected, atol=1e-6)
    wide = [x.astype(np.float64) for x in (q, q_weight, g, g_weight)]
    with jax.enable_x64(True):
        found = region_distance(*wide)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)
    half = jnp.asarray(q, jnp.bfloat16), q_weight, jnp.asarray(g, jnp.bfloat16), g_weight
    exact = reference(np.asarray(half[0], np.float32), q_weight, np.asarray(half[2], np.float32), g_weight)
    np.testing.assert_allclose(region_distance(*half), exact, atol=3e-6)


def test_streams_the_gallery_once_through_one_program(monkeypatch):
    q, q_weight, g, g_weight = example(queries=5, gallery=103, regions=3, channels=24)
    g[50] = q[1]  # a pair that is computed again reads nothing again
    streamed = Streamed(g)
    monkeypatch.setattr(matching, "CHUNK_BYTES", 4 * 10 * q[0].size)
    programs = chunks.block_distance._cache_size()
    found = region_distance(q, q_weight, streamed, g_weight)
    read = streamed.slices
    assert sum(read) < 103 + len(read) and max(read) <= 10 and not streamed.scattered  # the last two chunks overlap
    assert chunks.block_distance._cache_size() == programs + 1
    np.testing.assert_allclose(found, reference(q, q_weight, g, g_weight), atol=3e-6)


@pytest.mark.parametrize("images_per_chunk", [1000, 40])
def test_few_sizes_compile(monkeypatch, images_per_chunk):
    """Neither a query more nor a gallery image more compiles anything."""
    q, q_weight, g, g_weight = example(queries=16, gallery=160, regions=3, channels=20)
    monkeypatch.setattr(matching, "CHUNK_BYTES", 4 * images_per_chunk * q[0].size)
    before = chunks.prepare._cache_size() + chunks.block_distance._cache_size()
    for queries, galleries in [(9, 145), (16, 146), (12, 160), (11, 153)]:
        sides = q[:queries], q_weight[:queries], g[:galleries], g_weight[:galleries]
        np.testing.assert_allclose(region_distance(*sides), reference(*sides), atol=3e-6)
    assert chunks.prepare._cache_size() + chunks.block_distance._cache_size() <= before + 3
    monkeypatch.undo()
    scan = topk._scanner(Mesh(np.array(jax.local_devices()), ("gallery",)), False)
    before = scan._cache_size()
    for queries, galleries in [(9, 145), (16, 146), (12, 160), (11, 153)]:
        top_k(q[:queries], q_weight[:queries], g[:galleries], g_weight[:galleries], 3)
    assert scan._cache_size() <= before + 1


def test_memory_does_not_grow_with_the_regions():
    """The compiled block keeps a few [q, g] arrays, never one for each region."""

    def temporary_bytes(regions):
        side = jnp.zeros((regions, 256, 8)), jnp.zeros((regions, 256)), jnp.zeros((regions, 256))
        return chunks.block_distance.lower(side, side, squared=False).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(32) - temporary_bytes(4) < 8 * 4 * 256 * 256


def test_empty_sides():
    q, q_weight, g, g_weight = example()
    assert region_distance(q[:0], q_weight[:0], g, g_weight).shape == (0, 23)
    assert region_distance(q, q_weight, g[:0], g_weight[:0]).shape == (7, 0)


@pytest.mark.parametrize("which", range(4))
@pytest.mark.usefixtures("unchecked_shapes")
def test_shapes_that_do_not_fit_are_named(which):
    data = list(example())
    data[which] = data[which][:, :3]
    with pytest.raises(ValueError, match=r"query features \(7, .*expected \[Q, P, C\]"):
        region_distance(*data)


def test_bad_numbers_are_named():
    q, q_weight, g, g_weight = example()
    broken = g.copy()
    broken[11, 2, 3] = np.nan
    with pytest.raises(ValueError, match="gallery image 11 are not finite"):
        region_distance(q, q_weight, broken, g_weight)
    broken = q.copy()
    broken[4, 0, 1] = np.inf
    with pytest.raises(ValueError, match="query image 4 are not finite"):  # and no other, nor the gallery's
        region_distance(broken, q_weight, g, g_weight)
    broken = q_weight.copy()
    for value in (-0.5, np.nan, np.inf):
        broken[4, 1] = value
        with pytest.raises(ValueError, match="visibility of query image 4"):
            region_distance(q, broken, g, g_weight)


def test_match_visibility():
    scores = np.array([[12.5, 1.0, 0.99, 0.0]])
    np.testing.assert_array_equal(match_visibility(scores, "soft"), scores.astype(np.float32))
    np.testing.assert_array_equal(match_visibility(scores, "uniform"), [[1, 1, 1, 1]])
    shares = [[12, 4, 0, 0], [4, 4, 4, 4], [8, 6, 1, 1], [0, 0, 0, 0]]  # of 16 cells, and of none
    expected = [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0.25, 0.25], [0, 0, 0, 0]]
    np.testing.assert_array_equal(match_visibility(np.array(shares), "saturated"), expected)
    assert match_visibility(scores, "saturated").dtype == np.float32
    np.testing.assert_array_equal(match_visibility(scores, "binary"), [[1, 1, 0, 0]])
    assert match_visibility(scores, "soft").dtype == np.float32
    with pytest.raises(ValueError, match="'hard' is not one of soft"):
        match_visibility(scores, "hard")


# ---- One vector per image ----


def test_an_embedding_is_eq_4_where_images_show_the_same():
    features, weight, others, _ = example()
    same = np.broadcast_to(weight[:1], (len(others), weight.shape[1]))
    inner = matching.embedding(features, same[: len(features)]) @ matching.embedding(others, same).T
    expected = reference(features, same[: len(features)], others, same, squared=True)
    np.testing.assert_allclose(2 - 2 * inner, expected, atol=1e-5)


def test_an_embedding_ranks_whole_images_like_eq_4():
    features, weight, others, _ = example()
    whole = np.full((len(others), weight.shape[1]), 3.0, np.float32)
    inner = matching.embedding(features, weight) @ matching.embedding(others, whole).T
    expected = reference(features, weight, others, whole, squared=True)
    np.testing.assert_array_equal(np.argsort(-inner, axis=1), np.argsort(expected, axis=1))


def test_embeddings_are_unit_vectors_and_nothing_is_zero():
    features, weight, _, _ = example()
    weight[0] = 0
    vectors = matching.embedding(features, weight)
    assert vectors.dtype == np.float32 and vectors.shape == (len(features), features[0].size)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), [0] + [1] * (len(features) - 1), atol=1e-6)


@pytest.mark.parametrize("vector", [False, True])
def test_a_gallery_of_whole_people_weighs_its_regions_equally(vector):
    features, weight, others, other_weight = example()
    match = default().match
    match.vector = vector
    query, gallery = Description(features, weight), Description(others, other_weight)
    equal = Description(others, np.ones_like(other_weight))
    expected = [f(match, query, equal) for f in (matching.pairwise_distance, matching.pairwise_shares)]
    assert not np.allclose(expected[0], matching.pairwise_distance(match, query, gallery), atol=1e-3)
    match.gallery_whole = True
    distance = matching.pairwise_distance(match, query, gallery)
    np.testing.assert_array_equal(distance, expected[0])
    np.testing.assert_array_equal(matching.pairwise_shares(match, query, gallery), expected[1])
    nearest, index = matching.nearest(match, query, gallery, 3)
    np.testing.assert_array_equal(index, np.argsort(distance, axis=1, kind="stable")[:, :3])
    np.testing.assert_allclose(nearest, np.sort(distance, axis=1)[:, :3], atol=1e-5)


@pytest.mark.parametrize("visibility", ["soft", "saturated", "uniform"])
def test_matching_by_vectors_is_their_distance(visibility):
    features, weight, others, other_weight = example()
    other_weight[2] = 0
    match = default().match
    match.vector, match.visibility = True, visibility
    query, gallery = Description(features, weight), Description(others, other_weight)
    distance = matching.pairwise_distance(match, query, gallery)
    vectors = [
        matching.embedding(x.features, matching.match_visibility(x.visibility, visibility)) for x in (query, gallery)
    ]
    expected = np.linalg.norm(vectors[0][:, None] - vectors[1], axis=-1)
    expected[:, 2] = np.inf if visibility != "uniform" else expected[:, 2]
    np.testing.assert_allclose(distance, expected, atol=1e-5)
    nearest, index = matching.nearest(match, query, gallery, 3)
    np.testing.assert_array_equal(index, np.argsort(expected, axis=1, kind="stable")[:, :3])
    np.testing.assert_allclose(nearest, np.sort(expected, axis=1)[:, :3], atol=1e-5)
