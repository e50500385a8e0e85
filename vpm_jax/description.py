"""Describing images: the feature step compiled once, over splits of a dataset or streams of pictures.

Shapes: N images, B of a batch, H W pixels, h w cells of the feature map, P regions, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from vpm_jax import parallel
from vpm_jax.data.pipeline import eval_batches
from vpm_jax.data.split import Split
from vpm_jax.errors import UserError
from vpm_jax.regions import Part, RegionGrid, nearest_part, visible_heights
from vpm_jax.runs.logs import Progress
from vpm_jax.step import make_feature_step

_ROUTED = 1024  # images whose region maps are read at a time


@dataclass(frozen=True)
class Description:
    """What a model says of N images; slicing and indexing select images."""

    features: np.ndarray
    """float32 [N, P, C]: Eq. 3, each region of unit length."""
    visibility: np.ndarray
    """float32 [N, P]: Eq. 2, the expected number of the feature map's cells that show the region."""
    region_maps: np.ndarray = None  # type: ignore[assignment]  # every VPM gives them
    """float32 [N, h, w, P]: Eq. 1, the probability of each region in each cell; w is 1 for a row locator. None where
    a `Describer` was not asked for them."""

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, which: int | slice | np.ndarray | list[int]) -> Description:
        rows: Any = [which] if isinstance(which, int | np.integer) else which
        return Description(**{name: x[rows] for name, x in self._arrays().items()})

    def __iter__(self) -> Iterator[Description]:
        return (self[i] for i in range(len(self)))

    def _arrays(self) -> dict[str, np.ndarray]:
        """The arrays by name, without region maps where there are none."""
        return {name: x for name, x in vars(self).items() if x is not None}

    @classmethod
    def concatenate(cls, parts: Iterable[Description]) -> Description:
        """The images of all parts, in order. There must be at least one part."""
        arrays = [part._arrays() for part in parts]
        return cls(**{name: np.concatenate([each[name] for each in arrays]) for name in arrays[0]})


class CroppedSplit(NamedTuple):
    """The images of a split, cropped as `data.pipeline.eval_batches` does."""

    split: Split
    gamma: float = 1.0
    crop: str = ""  # one of regions.CROPS; "": config.eval.crop


class Describer:
    """The feature step of a config, compiled once and over all devices of a mesh.

    Args:
      config: a resolved config; eval.batch images are described at a time.
      mesh: of `parallel.data_mesh`. Each process gives its share of every batch, and gets the features of all.
      region_maps: describe region maps too; default: where match.gallery_gammas needs them.
    """

    def __init__(self, config: ConfigDict, mesh: Any, region_maps: bool | None = None):
        self.config, self.mesh = config, mesh
        region_maps = bool(config.match.gallery_gammas) if region_maps is None else region_maps
        self._compiled = jax.jit(make_feature_step(config, region_maps), out_shardings=parallel.everywhere(mesh))

    def step(self, variables: Any, *images: Any) -> dict[str, Any]:
        """uint8 [B, H, W, 3] -> the arrays of a `Description`, on the devices.

        Of padded pictures valid bool [B, h, w] follows (`step.make_feature_step`). NumPy arrays are padded to a
        multiple of the devices, and so are the arrays that come out.
        """
        return self._compiled(variables, *(self._put(x) if isinstance(x, np.ndarray) else x for x in images))

    def _put(self, images: np.ndarray) -> Any:
        missing = -len(images) % len(self.mesh.local_devices)
        padded = np.pad(images, [(0, missing)] + [(0, 0)] * (images.ndim - 1)) if missing else images
        return parallel.shard(self.mesh, {"images": padded})["images"]

    def _put_batch(self, batch: dict[str, np.ndarray]) -> list[Any]:
        return [self._put(batch[key]) for key in ("image", "valid") if key in batch]

    def split(self, variables: Any, split: Split, gamma: float = 1.0, crop: str = "") -> Description:
        """Describes every image of a split, in its order. Raises as `splits`."""
        return self.splits(variables, [CroppedSplit(split, gamma, crop)])[0]

    def splits(
        self,
        variables: Any,
        cropped: Sequence[CroppedSplit],
        check: Callable[[], None] | None = None,
        title: str = "features",
    ) -> list[Description]:
        """Describes several splits, one after the other, with one progress line.

        Args:
          variables: the network's, on the mesh's devices or on the host.
          cropped: the splits.
          check: is called after every batch, and may raise to end the work.
          title: begins the progress line.

        Raises:
          UserError: for an image that cannot be read, or features that are not finite.
        """
        progress = Progress(title, sum(len(images.split) for images in cropped))
        return [self._describe(variables, images, progress, check) for images in cropped]

    def _describe(
        self, variables: Any, images: CroppedSplit, progress: Progress, check: Callable[[], None] | None
    ) -> Description:
        split, gamma, crop = images
        crop = (crop or self.config.eval.crop) if gamma < 1 else "none"
        batches = eval_batches(self.config, split, crop, gamma, jax.process_index(), jax.process_count())
        arrays: dict[str, np.ndarray] = {}
        first = 0
        for inputs in parallel.prefetch(batches, self._put_batch):
            count = min(self.config.eval.batch, len(split) - first)
            batch = fetch(self.step(variables, *inputs), count)._arrays()
            arrays = arrays or {name: np.empty((len(split), *x.shape[1:]), x.dtype) for name, x in batch.items()}
            for name, x in batch.items():
                arrays[name][first : first + count] = x
            first += count
            progress.add(count)
            if check is not None:
                check()
        if not arrays or first != len(split):
            raise RuntimeError(f"{first} features of {len(split)} images")  # every image exactly once
        check_finite(arrays["features"], f"{split.name} images")
        return Description(**arrays)


def fetch(out: dict[str, Any], count: int) -> Description:
    """The first `count` images of what a feature step returned, on the host."""
    return Description(**{name: np.asarray(x)[:count] for name, x in jax.device_get(out).items()})


def check_finite(features: np.ndarray, images: str) -> None:
    """Raises UserError, which calls the images so, unless features [N, P, C] are finite."""
    broken = ~np.isfinite(features).all(axis=(1, 2))
    if broken.any():
        raise UserError(
            f"The features of {broken.sum()} of {len(features)} {images} are not finite: these weights have diverged, "
            "take another checkpoint or train with a lower learning rate."
        )


def route(queries: Description, crops: Sequence[Part], grid: RegionGrid) -> dict[Part, np.ndarray]:
    """Which crop of the gallery each query is compared with: the one that shows what the query seems to show.

    Args:
      queries: with region maps, unless there is one crop alone.
      crops: of every gallery image (`regions.gallery_parts`).
      grid: the model's regions.

    Returns:
      {crop: the rows of its queries, increasing}, in the order of the crops, without those that no query shows.
    """
    chosen = np.zeros(len(queries), int)
    if len(crops) > 1:
        for start in range(0, len(queries), _ROUTED):
            rows = slice(start, start + _ROUTED)
            chosen[rows] = nearest_part(visible_heights(queries.region_maps[rows], grid), crops)
    return {crop: np.flatnonzero(chosen == number) for number, crop in enumerate(crops) if (chosen == number).any()}
