"""A trained VPM for other programs: images in, region features, visibility and region maps out.

    from vpm_jax import VPM

    model = VPM.load("runs/synthetic")
    gallery = model(["a.jpg", "b.jpg", "c.jpg"])
    distance = model.match("partial.jpg", gallery)  # [1, 3]

Shapes: N images, H W pixels, h w cells of the feature map, P regions (row-major from the top left), C channels.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from PIL import Image as Pillow

from vpm_jax import config as config_lib
from vpm_jax import models, parallel, pretrained
from vpm_jax.data import decode
from vpm_jax.data.fit import Fit
from vpm_jax.description import Describer, Description, check_finite, fetch
from vpm_jax.errors import UserError
from vpm_jax.geometry import covered
from vpm_jax.keys import FEATURES, keys_with
from vpm_jax.matching import pairwise_distance, pairwise_shares
from vpm_jax.pretrained import own
from vpm_jax.regions import WHOLE, Crop, RegionGrid, pixel_box

# A path, an encoded file's bytes, a Pillow image, or uint8 RGB (or grey, or RGBA) [H, W, 3], of any size.
Image = str | os.PathLike[str] | bytes | Pillow.Image | np.ndarray
# One image, several, or uint8 [N, H, W, 3].
Images = Image | Iterable[Image]


class VPM:
    """A trained model; `VPM.load` makes one.

    Attributes:
      config: the run's configuration (vpm_jax.config).
      grid: the region grid; grid.count is P.
      image_size: (H, W) in pixels that every image is resized to.
      step: (uint8 [B, H, W, 3]) -> {"features", "visibility", "region_maps"} as in `Description`, on the devices. A
        model of padded images (data.fit) takes valid bool [B, h, w] too: see `inputs`.
      source: where the model came from, in words.
      variables: the network's parameters and statistics on the host; None of an exported program.
    """

    def __init__(
        self,
        config: ConfigDict,
        step: Callable[..., dict[str, Any]],
        fingerprint: str,
        source: str,
        variables: dict[str, Any] | None = None,
    ):
        self.config, self.step, self.source, self.variables = config, step, source, variables
        self.fingerprint: str = fingerprint
        """16 hexadecimal digits, the same wherever the same parameters make the same features of an image."""
        self.grid = RegionGrid(*config.model.grid)
        self.image_size = (int(config.data.height), int(config.data.width))
        self._fit = Fit(config.data)
        self._map_shape = models.feature_map_shape(config)

    def __repr__(self) -> str:
        height, width = self.image_size
        grid = f"{self.grid.rows} x {self.grid.cols} regions"
        return f"VPM({self.source}; {grid}, {height} x {width} pixels, fingerprint {self.fingerprint})"

    @classmethod
    def load(cls, path: str | os.PathLike[str], dtype: str | None = None) -> VPM:
        """The model of a training run's workdir (its newest checkpoint), or of a file that `vpm_jax.export` wrote.

        Args:
          path: a workdir, .stablehlo (with its .json beside it) or .safetensors.
          dtype: "float32" or "bfloat16" to compute in; default: as the run was configured, "auto" for most, which is
            bfloat16 on GPU and TPU. An exported program computes as it was exported.

        Raises:
          UserError: if there is no such model, or it is damaged.
        """
        parallel.prepare_backend()
        path = Path(path).expanduser()
        if not path.exists():
            longer = sorted(path.parent.glob(f"{path.stem}-*.safetensors"))  # names that say how a network differs
            hint = f"do you mean {longer[0]}?" if longer else "give the workdir of a training run, or an exported file."
            raise UserError(f"{path} does not exist: {hint}")
        if path.suffix == ".stablehlo" and path.is_file():
            return cls._load_stablehlo(path)
        if path.is_file() and path.suffix.lower() != ".safetensors":
            raise UserError(
                f"{path} is no model: expected the workdir of a training run, or a .stablehlo or .safetensors that "
                "python -m vpm_jax.export wrote."
            )
        weights = own.read_workdir(path) if path.is_dir() else pretrained.load(f"vpm:{path}")
        if weights.heads is None or weights.config is None:
            raise UserError(
                f"{path} holds {weights.source} without VPM's locator: give the workdir of a training run, or the "
                ".safetensors that python -m vpm_jax.convert wrote of one."
            )
        config = config_lib.for_weights(weights.config, weights)
        config.model.dtype = dtype or config.model.dtype
        config_lib.check(config)
        kept_in = jnp.promote_types(models.compute_dtype(config.model.dtype), jnp.float32)
        variables = {
            "params": {"backbone": weights.params, **weights.heads["params"]},
            "batch_stats": {"backbone": weights.batch_stats, **weights.heads["batch_stats"]},
        }
        digest = fingerprint(config, variables)
        variables = jax.tree.map(lambda x: np.asarray(x, kept_in), variables)
        return cls(config, _step(config, variables), digest, weights.source, variables)

    @classmethod
    def _load_stablehlo(cls, path: Path) -> VPM:
        """What `vpm_jax.export` wrote. Raises UserError if the file or its .json is missing or damaged."""
        from jax import export  # needs flatbuffers

        again, beside = "export it again by python -m vpm_jax.export", sidecar(path)
        try:
            about = json.loads(beside.read_text())
            digest, config = about["sha256"], json.dumps(about["config"])
            fingerprint, source = str(about["fingerprint"]), str(about["source"])
            data = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror}): a .stablehlo has a .json beside it; "
                f"copy both or {again}."
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{beside} is not what an export writes ({error!r}): {again}.") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise UserError(f"{path} is not the file that {beside.name} describes: {again}.")
        try:
            call = jax.jit(export.deserialize(bytearray(data)).call)
        except Exception as error:  # of many kinds: another version of JAX, or no such file at all
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"{path} cannot be read by JAX {jax.__version__} ({reason}): {again}.") from None
        return cls(config_lib.from_json(config, str(beside)), call, fingerprint, f"{source}, exported as {path.name}")

    # ---- Features ----

    def __call__(self, images: Images, batch: int = 64) -> Description:
        """The same as `features`."""
        return self.features(images, batch)

    def features(self, images: Images, batch: int = 64) -> Description:
        """Describes images: one (N = 1), a list or generator of them, or an array uint8 [N, H, W, 3].

        An image is a path, the bytes of an encoded file, a Pillow image, or a uint8 array: RGB [H, W, 3], grey [H, W]
        or [H, W, 1], or RGBA [H, W, 4]. Any size is resized to `image_size`. Files and Pillow images are turned
        upright by their EXIF orientation; transparency is shown on white; of an animation the first frame counts.

        Args:
          images: of an iterator, `batch` images are held at a time.
          batch: images computed together. It changes speed and memory, not results.

        Raises:
          UserError: for what is no image, with its name or its place among the images (from 0).
        """
        parts = list(self.stream(images, batch))
        return Description.concatenate(parts) if parts else self._nothing

    def stream(self, images: Images, batch: int = 64) -> Iterator[Description]:
        """`features` as they come: one Description for every `batch` images, the last one shorter.

        Reads no further ahead of what was taken than one batch, so that endless generators do.
        """
        if batch < 1:
            raise UserError(f"batch is {batch}, expected at least 1.")

        numbered = enumerate(_each(images))

        def fill(out: np.ndarray, valid: np.ndarray, image: tuple[int, Image]) -> None:
            box = self._fit(read(image[1], f"image {image[0]}"), out)
            valid[:] = covered(box, self.image_size, self._map_shape)

        def started() -> Iterator[tuple[dict[str, Any], int]]:
            size = 0
            while chunk := list(itertools.islice(numbered, batch)):
                # A lone short batch is padded a little, the last one of several to the others' size: that size is
                # compiled already. Every image is computed for itself, so padding changes nothing.
                size = size or min(batch, 1 << (len(chunk) - 1).bit_length())
                pixels = np.zeros((size, *self.image_size, 3), np.uint8)
                valid = np.zeros((size, *self._map_shape), bool)
                list(pool.map(fill, pixels, valid, chunk))
                yield self.step(*((pixels, valid) if self._fit.pads else (pixels,))), len(chunk)

        with ThreadPoolExecutor(min(batch, parallel.threads()), "vpm_jax-decode") as pool:
            # A batch computes while the one before is handed out.
            for out, count in parallel.prefetch(started(), lambda pair: pair, depth=1):
                described = fetch(out, count)
                check_finite(described.features, "images")
                yield described

    def prepare(
        self, image: Image, name: str = "the image", out: np.ndarray | None = None, crop: Crop = WHOLE
    ) -> np.ndarray:
        """What the network sees of an image: uint8 [H, W, 3] of `image_size`.

        Args:
          image: as in `features`.
          name: how errors call an image that is not a file.
          out: an array uint8 [H, W, 3] to write into.
          crop: the box of the image to look at, as fractions of it (`regions.draw_crop`).

        Raises:
          UserError: as `features`.
        """
        out = np.empty((*self.image_size, 3), np.uint8) if out is None else out
        self._fit(read(image, name, crop), out)
        return out

    def inputs(self, images: Images) -> tuple[np.ndarray, ...]:
        """What `step`, and an exported program, takes: (uint8 [N, H, W, 3],).

        Of a model of padded images (uint8 [N, H, W, 3], bool [N, h, w]): the cells of T that each image covers. Raises
        as `features`.
        """
        pixels, valid = [], []
        for number, image in enumerate(_each(images)):
            out = np.empty((*self.image_size, 3), np.uint8)
            valid.append(covered(self._fit(read(image, f"image {number}"), out), self.image_size, self._map_shape))
            pixels.append(out)
        shown = np.array(pixels, np.uint8).reshape(-1, *self.image_size, 3)
        return (shown, np.array(valid, bool).reshape(-1, *self._map_shape)) if self._fit.pads else (shown,)

    @cached_property
    def _nothing(self) -> Description:
        one = self.inputs([np.zeros((1, 1, 3), np.uint8)])
        shapes = jax.eval_shape(self.step, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in one))
        return Description(**{key: np.zeros((0, *x.shape[1:]), np.float32) for key, x in shapes.items()})

    # ---- Matching ----

    def match(self, query: Description | Images, gallery: Description | Images) -> np.ndarray:
        """The distance of every query to every gallery image by Eq. 4, as config.match says: float32 [Q, G].

        Never re-ranked, which would make a distance depend on the whole gallery, nor by match.gallery_gammas: pictures
        count as they are. The smaller, the more alike; +inf where the two share no region. Images are described first.

        Raises:
          UserError: as `features`, and for descriptions by another kind of model.
        """
        return pairwise_distance(self.config.match, self._described(query), self._described(gallery))

    def match_regions(
        self, query: Description | Images, gallery: Description | Images
    ) -> tuple[np.ndarray, np.ndarray]:
        """What `match` is made of, for explaining a few pairs: everything here is of size [Q, G, P].

        Returns:
          (distance, weight), float32 [Q, G, P] each: the distance of each region's features, and its share in the
          overall distance, sum(weight * distance). The weights of a pair sum to 1, or to 0 if it shares no region.

        Raises:
          UserError: as `match`.
        """
        return pairwise_shares(self.config.match, self._described(query), self._described(gallery))

    def _described(self, images: Description | Images) -> Description:
        described = images if isinstance(images, Description) else self.features(images)
        shape, expected = described.features.shape[1:], self._nothing.features.shape[1:]
        if shape != expected:
            raise UserError(
                f"These features have {shape} regions and channels, this model's {expected}: they are another model's, "
                "describe the images again."
            )
        return described


# ---- Images ----


def read(image: Image, name: str = "the image", crop: Crop = WHOLE) -> np.ndarray:
    """A crop of an image as uint8 [H, W, 3], RGB, upright; what it may be is said in `VPM.features`.

    Raises:
      UserError: if it is none, or cannot be read.
    """
    pixels = _read(image, name)
    top, left, bottom, right = pixel_box(crop, *pixels.shape[:2])
    return pixels[top:bottom, left:right]


def _read(image: Image, name: str) -> np.ndarray:
    if isinstance(image, str | os.PathLike):
        path = Path(image)
        try:
            if path.is_dir():
                raise UserError(f"{path} is a folder, expected an image: give the images that are in it.")
            if path.exists() and not path.is_file():  # opening a pipe would wait for who writes into it
                raise UserError(f"{path} is a pipe or a device, expected an image file.")
            data = path.read_bytes()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{path} cannot be read ({reason}): expected an image file.") from None
        return decode.decode(data, str(path), upright=True)
    if isinstance(image, bytes | bytearray | memoryview):
        return decode.decode(bytes(image), name, upright=True)
    if isinstance(image, Pillow.Image):
        return decode.from_pillow(image, name)
    if not hasattr(image, "__array__"):
        raise UserError(
            f"{name} is of type {type(image).__name__}, expected a path, bytes, a Pillow image or a uint8 array."
        )
    pixels = np.asarray(image)
    if pixels.ndim == 2:
        pixels = pixels[:, :, None]
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or not pixels.size:
        raise UserError(f"{name} is {pixels.dtype} {pixels.shape}, expected uint8 [H, W, 3] with values from 0 to 255.")
    if pixels.shape[2] == 4:
        return decode.from_pillow(Pillow.fromarray(pixels), name)
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3)))


def _each(images: Images) -> Iterator[Image]:
    one = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Pillow.Image)
    if not one and hasattr(images, "__array__"):
        ndim = np.ndim(images)  # type: ignore[arg-type]
        if ndim not in (2, 3, 4):
            raise UserError(f"images is an array of {ndim} axes, expected uint8 [H, W, 3] or [N, H, W, 3].")
        one = ndim < 4
    if one:
        return iter([images])  # type: ignore[list-item]
    try:
        return iter(images)  # type: ignore[arg-type]
    except TypeError:
        return iter([images])  # type: ignore[list-item]  # `read` says what is wrong with it


# ---- The network ----


def _step(config: ConfigDict, variables: Any) -> Callable[[Any], dict[str, Any]]:
    """uint8 [B, H, W, 3] -> the arrays of a Description, compiled for each B, over all devices of this host."""
    mesh = parallel.data_mesh(devices=jax.local_devices())
    return partial(Describer(config, mesh, region_maps=True).step, parallel.replicate(mesh, variables))


def sidecar(path: Path) -> Path:
    """The .json beside a .stablehlo."""
    return path.with_name(path.name + ".json")


def fingerprint(config: ConfigDict, variables: Any) -> str:
    """A digest of what features depend on: parameters and statistics (not the identity heads'), keys of the resolved
    config, never the device or the precision.
    """
    leaves = config_lib.flatten(config)
    values = [leaves[key] for key in keys_with(FEATURES)]
    if (
        config.data.fit == "pad"
    ):  # a model of stretched images keeps the fingerprint that it had before there was padding
        values += [leaves[f"data.{key}"] for key in ("fit", "place", "aspect")]
    digest = hashlib.sha256(json.dumps(values).encode())
    for name, x in sorted(flatten_dict(variables, sep="/").items()):
        if "/heads/" not in name:
            digest.update(f"{name} {np.shape(x)}".encode())
            digest.update(np.ascontiguousarray(x, np.dtype("<f4")).tobytes())
    return digest.hexdigest()[:16]
