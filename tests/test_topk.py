"""The nearest gallery images, streamed, against float64 NumPy with the whole distance matrix."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from plain_matching import example, reference
from stores import Streamed, write

from vpm_jax import topk
from vpm_jax.search.store import About, Store
from vpm_jax.topk import top_k

Q, G, P, C, K = 6, 90, 3, 16, 5


@pytest.fixture(params=[1, 2], ids=["one device", "two devices"])
def devices(request):
    if jax.device_count() < request.param:
        pytest.skip("one device")
    return jax.devices()[: request.param]


@pytest.fixture(params=[2**27, 2**12], ids=["one chunk", "many chunks"])
def chunks(request, monkeypatch):
    """Chunks of all images, or of 10 of them and 5 queries."""
    monkeypatch.setattr(topk, "CHUNK_BYTES", request.param)


def nearest(data, k, squared=False):
    """By definition: Eq. 4 in float64, rounded to float32, sorted stably."""
    distance = reference(*data, squared=squared).astype(np.float32)
    order = np.argsort(distance, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distance, order, axis=1), order


def assert_nearest(found, data, squared=False):
    expected = nearest(data, found[0].shape[1], squared)
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_allclose(found[0], expected[0], rtol=3e-7)
    assert found[0].dtype == np.float32 and found[1].dtype == np.int64


def counted(monkeypatch):
    """The numbers of candidates that the gallery was read for."""
    kept, scan = [], topk._scan

    def counting(*args):
        kept.append(args[2])
        return scan(*args)

    monkeypatch.setattr(topk, "_scan", counting)
    return kept


@pytest.mark.parametrize("squared", [False, True])
def test_equals_sorting_everything(devices, chunks, squared):
    data = example(Q, G, P, C)
    data[3][[3, 50]] = 0  # these share no region with anyone
    assert_nearest(top_k(*data, K, squared, devices), data, squared)


@pytest.mark.parametrize("k", [1, G, 10 * G])
def test_any_k(chunks, k):
    data = example(Q, G, P, C)
    data[1][2] = 0  # a query without a region: everything is +inf, in gallery order
    data[3][[3, 50, 51]] = 0
    distance, index = top_k(*data, k)
    assert distance.shape == index.shape == (Q, min(k, G))
    assert_nearest((distance, index), data)
    np.testing.assert_array_equal(index[2], np.arange(min(k, G)))
    if k > 1:
        assert np.isposinf(distance[:, -3:]).all() and set(index[0, -3:]) == {3, 50, 51}


def test_more_ties_than_spare_candidates_rank_in_gallery_order(devices, chunks, monkeypatch):
    """More equals than SPARE: one reading cannot tell, the next one does."""
    data = example(Q, G, P, C)
    same = np.random.default_rng(1).permutation(G)[: topk.SPARE + 20]
    data[2][same], data[3][same] = data[0][1], 1.0  # the second query's own picture, many times
    data[1][1] = 1.0
    kept = counted(monkeypatch)
    distance, index = top_k(*data, K, devices=devices)
    np.testing.assert_array_equal(index[1], np.sort(same)[:K])
    assert not distance[1].any()
    assert_nearest((distance, index), data)
    assert max(kept) > K + topk.SPARE


def test_usual_galleries_are_read_once(monkeypatch):
    data, kept = example(Q, G, P, C), counted(monkeypatch)
    top_k(*data, K)
    assert kept == [K + topk.SPARE]


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-5])
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_bounds_are_below_and_rankings_exact_where_float32_cannot_tell(monkeypatch, spread, offset):
    """Distances far smaller than the features, where |q|^2 + |g|^2 - 2 q.g loses every digit."""
    q, q_weight, g, g_weight = example(Q, G, P, C)
    g = (q[0] + spread * g + offset * (np.arange(C) == 3)).astype(np.float32)
    q = (q[0] + spread * q + offset * (np.arange(C) == 3)).astype(np.float32)
    data = (q, q_weight, g, g_weight)
    bounds = []
    scan = topk._scan
    monkeypatch.setattr(topk, "_scan", lambda *args: bounds.append(scan(*args)) or bounds[-1])
    found = top_k(q, q_weight, g, g_weight, G)
    assert_nearest(found, data)
    lowest, index = bounds[0]
    exact = np.take_along_axis(reference(*data), index, axis=1)
    assert (lowest <= exact)[np.isfinite(exact)].all() and (np.isinf(lowest) == np.isinf(exact)).all()
    if spread == 1 and not offset:  # and close enough to be of use
        np.testing.assert_allclose(lowest, exact, atol=1e-4)
    assert_nearest(top_k(q, q_weight, g, g_weight, K), data)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_store_is_streamed(tmp_path, monkeypatch, dtype, devices):
    monkeypatch.setattr(topk, "CHUNK_BYTES", 2**12)
    q, q_weight, g, g_weight = example(Q, G, P, C)
    write(tmp_path, About("model", "config", P, C, dtype), map(str, range(G)), g, g_weight)
    store = Store(tmp_path)
    found = top_k(q, q_weight, store.features, store.visibility, K, devices=devices)
    data = (q, q_weight, g.astype(dtype).astype(np.float32), g_weight)
    assert_nearest(found, data)
    streamed = Streamed(store.features)
    again = top_k(q, q_weight, streamed, store.visibility, K, devices=devices)
    for x, y in zip(found, again, strict=True):
        np.testing.assert_array_equal(x, y)
    # 10 images at a time in each pass; then each query's candidates.
    assert max(streamed.slices) <= 10 and len(streamed.slices) % 9 == 0
    assert max(streamed.scattered) <= K + topk.SPARE


def test_any_number_of_devices_and_chunks_gives_the_same_bits(monkeypatch):
    data = example(Q, G, P, C)
    found = []
    for devices in (jax.devices()[:1], jax.devices()):
        for chunk in (2**27, 2**12):
            monkeypatch.setattr(topk, "CHUNK_BYTES", chunk)
            found.append(top_k(*data, K, devices=devices))
    for distance, index in found[1:]:
        np.testing.assert_array_equal(distance, found[0][0])
        np.testing.assert_array_equal(index, found[0][1])


def test_empty_sides():
    q, q_weight, g, g_weight = example(Q, G, P, C)
    assert top_k(q[:0], q_weight[:0], g, g_weight, K)[0].shape == (0, K)
    assert top_k(q, q_weight, g[:0], g_weight[:0], K)[1].shape == (Q, 0)


@pytest.mark.usefixtures("unchecked_shapes")
def test_bad_input_is_named(monkeypatch):
    monkeypatch.setattr(topk, "CHUNK_BYTES", 2**12)
    q, q_weight, g, g_weight = example(Q, G, P, C)
    with pytest.raises(ValueError, match="k is 0, expected at least 1"):
        top_k(q, q_weight, g, g_weight, 0)
    with pytest.raises(ValueError, match=r"expected \[Q, P, C\]"):
        top_k(q, q_weight, g[:, :2], g_weight, K)
    broken = g.copy()
    broken[77, 2, 3] = np.nan
    with pytest.raises(ValueError, match="features of gallery image 77 are not finite"):
        top_k(q, q_weight, broken, g_weight, K)
    for value in (np.nan, 1e30):
        broken = q.copy()
        broken[4] = value
        with pytest.raises(ValueError, match="features of query image 4 are not finite"):
            top_k(broken, q_weight, g, g_weight, K)
