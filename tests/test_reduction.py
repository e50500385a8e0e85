"""Reduced region features: the best linear map for inner products, by an independent SVD, and its file."""

from __future__ import annotations

import numpy as np
import pytest

from vpm_jax import Description
from vpm_jax.errors import UserError
from vpm_jax.reduction import Reduction


def described(count: int = 60, rank: int = 8) -> Description:
    """Unit features [N, 3, 8] in a subspace for each region, and visibility."""
    random = np.random.default_rng(1)
    features = np.einsum("npr,prc->npc", random.normal(size=(count, 3, rank)), random.normal(size=(3, rank, 8)))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    return Description(features.astype(np.float32), random.uniform(0, 5, (count, 3)).astype(np.float32), model="a" * 16)


def test_features_of_low_rank_lose_nothing():
    images = described(rank=4)
    reduced = Reduction.fit(images, 13)(images.features)  # 4 for each of 3 regions
    assert reduced.shape == (60, 3, 4)
    for x, y in zip(np.moveaxis(images.features, 1, 0), np.moveaxis(reduced, 1, 0), strict=True):
        np.testing.assert_allclose(x @ x.T, y @ y.T, atol=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 8, 20])
def test_the_subspace_is_that_of_a_weighted_svd(channels):
    images = described()
    matrix = Reduction.fit(images, 3 * channels).matrix
    for i in range(3):
        scaled = images.features[:, i].astype(np.float64) * np.sqrt(images.visibility[:, i : i + 1])
        basis = np.linalg.svd(scaled)[2][:channels]
        np.testing.assert_allclose(matrix[i] @ matrix[i].T, basis.T @ basis, atol=1e-4)


def test_a_reduction_is_saved_for_its_model(tmp_path):
    reduction = Reduction.fit(described(), 6)
    reduction.save(tmp_path / "r.npz")
    loaded = Reduction.load(tmp_path / "r.npz")
    np.testing.assert_array_equal(loaded.matrix, reduction.matrix)
    loaded.check("a" * 16)
    with pytest.raises(UserError, match="another model's"):
        loaded.check("b" * 16)
    described().save(tmp_path / "d.npz")
    with pytest.raises(UserError, match="not a saved Reduction"):
        Reduction.load(tmp_path / "d.npz")


@pytest.mark.parametrize(("count", "dimensions"), [(0, 6), (5, 2)])
def test_nothing_to_learn(count, dimensions):
    with pytest.raises(UserError, match="give some images, and at least one dimension for each region"):
        Reduction.fit(described()[:count], dimensions)
    with pytest.raises(UserError, match=r"dimensions is 6\.5, expected a whole number"):
        Reduction.fit(described(), 6.5)
