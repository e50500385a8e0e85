"""Fewer numbers per region: a linear map that best keeps the inner products of region features (NumPy).

reduction = Reduction.fit(model(images), 256)  # 256 // P numbers for each region
model.embedding(images, reduction=reduction)  # float32 [N, P * (256 // P)]
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from vpm_jax.chunks import Described
from vpm_jax.disk import read_arrays, write_arrays
from vpm_jax.errors import UserError, check_count

SAMPLE = 2048  # images are enough to learn from: more change rank-1 by less than its error


@dataclass(frozen=True)
class Reduction:
    """A map from region features to fewer channels, for each region by itself, so that Eq. 4 still applies."""

    matrix: np.ndarray
    """float32 [P, C, c], with orthonormal columns."""
    model: str = ""
    """The fingerprint of the model whose features it maps; "" if unknown."""

    @classmethod
    def fit(cls, images: Described, dimensions: int, model: str = "") -> Reduction:
        """Learns a reduction from described images, such as a `Description` or a store, at most SAMPLE of them.

        For each region, the c leading eigenvectors of the sum of w f f' over the images, w being the visibility: of all
        rank-c maps, they keep the inner products best (a truncated SVD, not centered, weighted by visibility).

        Args:
          images: as many as there are channels, or more, like those to compare.
          dimensions: of all regions together; c = dimensions // P, at most C.
          model: the fingerprint of the images' model (default: that of a `Description`).

        Raises:
          UserError: for no images, or fewer dimensions than regions.
        """
        check_count("dimensions", dimensions)
        count, regions = np.shape(images.visibility)
        if count == 0 or not regions <= dimensions:
            raise UserError(
                f"A reduction to {dimensions} dimensions of {regions} regions from {count} images: give some images, "
                "and at least one dimension for each region."
            )
        rows = np.arange(min(count, SAMPLE)) * count // min(count, SAMPLE)
        features, weight = images.features[rows].astype(np.float32), images.visibility[rows]
        scaled = features * np.sqrt(weight)[..., None]
        # eigh sorts by increasing eigenvalue.
        matrix = [np.linalg.eigh(x.T @ x)[1][:, ::-1][:, : dimensions // regions] for x in np.moveaxis(scaled, 1, 0)]
        return cls(np.array(matrix, np.float32), model or getattr(images, "model", ""))

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Region features [N, P, C] -> float32 [N, P, c], of unit length again."""
        reduced = np.einsum("npc,pcd->npd", np.asarray(features, np.float32), self.matrix, optimize=True)
        return reduced / np.maximum(np.linalg.norm(reduced, axis=-1, keepdims=True), 1e-12)

    def check(self, model: str) -> None:
        """Raises UserError if it was learned from features of another model than this fingerprint's."""
        if self.model not in ("", model):
            raise UserError(
                f"This reduction is another model's (fingerprint {self.model}, expected {model}): learn it again.",
                code="other-model",
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a .npz. Raises UserError if it cannot be written."""
        write_arrays(path, {"matrix": self.matrix, "model": np.array(self.model)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Reduction:
        """Reads what `save` wrote. Raises UserError if it is missing or damaged."""
        with read_arrays(path, "Reduction") as arrays:
            matrix, model = arrays["matrix"], str(arrays["model"])
            if matrix.ndim != 3 or not np.isfinite(matrix).all():
                raise ValueError(f"a matrix {matrix.shape}")
            return cls(matrix, model)
