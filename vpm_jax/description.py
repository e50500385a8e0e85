"""Feature extraction: one compiled feature step, applied to dataset splits or to batches of images.

Shapes: N images, B of a batch, H W pixels, h w cells of the feature map, P regions, C channels.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict, FrozenConfigDict

from vpm_jax import config as config_lib
from vpm_jax import parallel
from vpm_jax.data.pipeline import EvalBatch, eval_batches
from vpm_jax.data.split import Split, boxes
from vpm_jax.disk import read_arrays, write_arrays
from vpm_jax.errors import UserError
from vpm_jax.progress import Progress
from vpm_jax.regions import GalleryCrop, RegionGrid, nearest_crop, visible_heights
from vpm_jax.step import feature_program, make_feature_step

Variables = Mapping[str, Any]  # {"params", "batch_stats"}
_ROUTE_BATCH = 1024  # queries whose region maps are read at a time


@dataclass(frozen=True)
class Description:
    """A model's outputs for N images. Indexing and slicing select images."""

    features: np.ndarray
    """float32 [N, P, C]: region features (Eq. 3), L2-normalized."""
    visibility: np.ndarray
    """float32 [N, P]: visibility scores (Eq. 2), in cells of the feature map."""
    region_maps: np.ndarray = None  # type: ignore[assignment]  # `VPM` always sets them
    """float32 [N, h, w, P]: region probabilities of each cell (Eq. 1); w is 1 for a row locator. None if the
    `Describer` was built without region maps."""
    model: str = ""
    """The fingerprint of the model; "" if unknown. `VPM` sets it, and refuses descriptions by another model."""

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {list(x.shape)}" for name, x in self._arrays().items())
        return f"Description({len(self)} images: {shapes})"

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int | slice | np.ndarray | list[int]) -> Description:
        rows: Any = [index] if isinstance(index, int | np.integer) else index
        return Description(**{name: x[rows] for name, x in self._arrays().items()}, model=self.model)

    def __iter__(self) -> Iterator[Description]:
        return (self[i] for i in range(len(self)))

    def _arrays(self) -> dict[str, Any]:
        """The arrays by name, without missing region maps."""
        return {name: x for name, x in vars(self).items() if x is not None and name != "model"}

    @classmethod
    def concatenate(cls, batches: Iterable[Description]) -> Description:
        """Joins one or more batches of one model, in order."""
        batches = list(batches)
        arrays = [batch._arrays() for batch in batches]
        joined = {name: np.concatenate([batch[name] for batch in arrays]) for name in arrays[0]}
        return cls(**joined, model=batches[0].model)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a .npz of these arrays and the model's fingerprint. Raises UserError if it cannot be written."""
        write_arrays(path, self._arrays() | {"model": np.array(self.model)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Description:
        """Reads what `save` wrote. Raises UserError if it is missing or damaged."""
        with read_arrays(path, "Description") as arrays:
            values: dict[str, Any] = arrays | {"model": str(arrays["model"])}
            loaded = cls(**values)
            n, p, _ = loaded.features.shape
            shapes = [x.shape for x in loaded._arrays().values()]
            if shapes[1] != (n, p) or any((s[0], s[-1]) != (n, p) or len(s) != 4 for s in shapes[2:]):
                raise ValueError(f"arrays of shapes {shapes}")
            return loaded


class CroppedSplit(NamedTuple):
    """A split and the crop that `data.pipeline.eval_batches` applies to its images."""

    split: Split
    gamma: float = 1.0
    crop: str = ""  # one of regions.CROPS; "": config.eval.crop


class FeatureSource(ABC):
    """Describes the images of dataset splits by the settings of `config`."""

    config: ConfigDict

    def split(self, variables: Variables, split: Split, gamma: float = 1.0, crop: str = "") -> Description:
        """Describes every image of a split, in order. Same errors as `splits`."""
        return self.splits(variables, [CroppedSplit(split, gamma, crop)])[0]

    def splits(
        self,
        variables: Variables,
        cropped: Sequence[CroppedSplit],
        check: Callable[[], None] | None = None,
        title: str = "features",
    ) -> list[Description]:
        """Describes several splits in turn, with one progress line.

        Args:
          variables: of the model, on its devices or on the host.
          cropped: the splits.
          check: called after every batch; may raise to stop.
          title: the start of the progress line.

        Raises:
          UserError: for an image that cannot be read, or features that are not finite.
        """
        progress = Progress(title, sum(len(images.split) for images in cropped), check)
        return [piece for images in cropped for piece in self.stream(variables, images, [], progress)]

    @abstractmethod
    def stream(
        self, variables: Variables, images: CroppedSplit, stops: Sequence[int], progress: Progress
    ) -> Iterator[Description]:
        """Describes a split piece by piece: images [0, stops[0]), [stops[0], stops[1]), ..., and the rest.

        Args:
          variables: as for `splits`.
          images: the split.
          stops: increasing multiples of eval.batch, smaller than the split.
          progress: advanced by every batch.
        """


class Describer(FeatureSource):
    """A config's feature step, compiled once for all devices of a mesh.

    Args:
      config: a resolved config; splits are processed in batches of eval.batch images, by the mesh if 0.
      mesh: from `parallel.data_mesh`. Each process loads its share of every batch and receives all features.
      region_maps: whether to return region maps; default: if match.gallery_gammas needs them.
    """

    def __init__(self, config: ConfigDict, mesh: Mesh, region_maps: bool | None = None):
        if not config.eval.batch:
            config = config.copy_and_resolve_references()
            config.eval.batch = parallel.extraction_batch(mesh)
        self.config, self.mesh = config, mesh
        region_maps = bool(config.match.gallery_gammas) if region_maps is None else region_maps
        self._compiled = _compiled_step(make_feature_step, feature_program(config), mesh, region_maps)

    def step(self, variables: Variables, *inputs: np.ndarray | jax.Array) -> dict[str, jax.Array]:
        """uint8 [B, H, W, 3] -> the arrays of a `Description`, on the devices.

        Padded images are followed by `valid`, bool [B, h, w] (see `step.make_feature_step`). NumPy inputs are padded
        to a multiple of the device count, and the outputs keep the padding.
        """
        return self._compiled(variables, *(self._put(x) if isinstance(x, np.ndarray) else x for x in inputs))

    def _put(self, images: np.ndarray) -> jax.Array:
        missing = -len(images) % len(self.mesh.local_devices)
        padded = np.pad(images, [(0, missing)] + [(0, 0)] * (images.ndim - 1)) if missing else images
        return parallel.shard(self.mesh, padded)

    def _put_batch(self, batch: EvalBatch) -> list[jax.Array]:
        return [self._put(x) for x in (batch["image"], batch.get("valid")) if x is not None]

    def stream(
        self, variables: Variables, images: CroppedSplit, stops: Sequence[int], progress: Progress
    ) -> Iterator[Description]:
        split, gamma, crop = images
        batches = eval_batches(
            self.config, split, crop or self.config.eval.crop, gamma, jax.process_index(), jax.process_count()
        )
        begin = first = 0
        ends = iter([*stops, len(split)])
        end = next(ends)
        arrays: dict[str, Any] = {}
        inputs = parallel.prefetch(batches, self._put_batch)
        # One batch is computed while the one before it is fetched.
        for outputs in parallel.prefetch(inputs, lambda batch: self.step(variables, *batch), depth=1):
            count = min(self.config.eval.batch, len(split) - first)
            batch = fetch(outputs, count)._arrays()
            arrays = arrays or {name: np.empty((end - begin, *x.shape[1:]), x.dtype) for name, x in batch.items()}
            for name, x in batch.items():
                arrays[name][first - begin : first - begin + count] = x
            first += count
            progress.add(count)
            if first == end:
                check_finite(arrays["features"], f"{split.name} images")
                yield Description(**arrays)
                arrays, begin, end = {}, end, next(ends, 0)
        if first != len(split):
            raise RuntimeError(f"{first} features of {len(split)} images")


@lru_cache(maxsize=8)
def _compiled_step(make: Callable[..., Any], config: FrozenConfigDict, mesh: Mesh, region_maps: bool) -> Any:
    """The jitted feature step, shared by all models of this process with the same arguments."""
    return jax.jit(make(config, region_maps), out_shardings=parallel.replicated(mesh))


class Pooled(FeatureSource):
    """A source whose queries stand for several images each: region features and visibility are their means, weighted
    by visibility, and features have unit length again.

    Args:
      source: describes images.
      query: the queries, with their cameras. Other splits are described as they are.
      multi_query: more images of their identities and cameras (see `data.split.boxes`).
    """

    def __init__(self, source: FeatureSource, query: Split, multi_query: Split):
        self.config, self._source = source.config, source
        self._images, self._group, self._group_of_query = boxes(query, multi_query)

    def stream(
        self, variables: Variables, images: CroppedSplit, stops: Sequence[int], progress: Progress
    ) -> Iterator[Description]:
        if images.split.name != "query":
            yield from self._source.stream(variables, images, stops, progress)
            return
        progress.total += len(self._images) - len(self._group_of_query)
        every, first = 16 * max(1, self.config.eval.batch), 0
        several = images._replace(split=self._images)
        for piece in self._source.stream(variables, several, range(every, len(self._images), every), progress):
            if not first:
                count, (regions, channels) = self._group_of_query.max() + 1, piece.features.shape[1:]
                features = np.zeros((count, regions, channels))
                weights, squares = np.zeros((2, count, regions))
            for group, x, weight in zip(self._group[first:], piece.features, piece.visibility, strict=False):
                features[group] += weight[:, None] * x
                weights[group] += weight
                squares[group] += weight**2
            first += len(piece)
        features /= np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), 1e-12)
        visibility = squares / np.maximum(weights, 1e-12)
        whole = Description(features.astype(np.float32), visibility.astype(np.float32))[self._group_of_query]
        for begin, end in pairwise([0, *stops, len(whole)]):
            yield whole[begin:end]


def fetch(outputs: dict[str, jax.Array], count: int) -> Description:
    """The first `count` images of a feature step's outputs, on the host."""
    arrays: dict[str, Any] = {name: np.asarray(x)[:count] for name, x in jax.device_get(outputs).items()}
    return Description(**arrays)


def check_finite(features: np.ndarray, name: str) -> None:
    """Raises UserError unless features [N, P, C] are finite; `name` describes the images in the message."""
    broken = ~np.isfinite(features).all(axis=(1, 2))
    if broken.any():
        raise UserError(
            f"The features of {broken.sum()} of {len(features)} {name} are not finite: the weights have diverged. Use "
            "another checkpoint or train with a lower learning rate."
        )


def route(queries: Description, crops: Sequence[GalleryCrop], grid: RegionGrid) -> dict[GalleryCrop, np.ndarray]:
    """Assigns each query to the gallery crop whose extent is closest to what the query shows.

    Args:
      queries: with region maps, unless there is only one crop.
      crops: from `regions.gallery_crops`.
      grid: the model's region grid.

    Returns:
      {crop: increasing indices of its queries}, in the order of `crops`; crops without queries are left out.
    """
    chosen = np.zeros(len(queries), int)
    if len(crops) > 1:
        for start in range(0, len(queries), _ROUTE_BATCH):
            rows = slice(start, start + _ROUTE_BATCH)
            chosen[rows] = nearest_crop(visible_heights(queries.region_maps[rows], grid), crops)
    return {crop: np.flatnonzero(chosen == number) for number, crop in enumerate(crops) if (chosen == number).any()}


def visible_parts(extents: np.ndarray) -> dict[str, np.ndarray]:
    """{visible part in words: bool [N]} of extents [N, 2]."""
    top, bottom = extents.T
    return {
        "the whole person": (top == 0) & (bottom == 1),
        "the top part": (top == 0) & (bottom < 1),
        "the bottom part": (top > 0) & (bottom == 1),
        "a middle part": (top > 0) & (bottom < 1),
    }


def unfamiliar_parts(config: ConfigDict, extents: np.ndarray) -> dict[str, np.ndarray]:
    """Those `visible_parts` of extents [N, 2] that the training crops of the config do not cover."""
    if "any" in config_lib.crops(config):
        return {}
    known = {"the whole person", *(f"the {side} part" for side in config_lib.sides(config))}
    return {name: mask for name, mask in visible_parts(extents).items() if mask.any() and name not in known}
