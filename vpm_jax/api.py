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
from dataclasses import replace
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from vpm_jax import config as config_lib
from vpm_jax import models, parallel, pretrained
from vpm_jax.data.fit import Fit, Place
from vpm_jax.description import Describer, Description, Variables, check_finite, fetch
from vpm_jax.disk import intact
from vpm_jax.errors import UserError, check_count
from vpm_jax.geometry import KNOWN_PLACES, covered, feature_map_shape
from vpm_jax.images import Image, Images, each, read
from vpm_jax.keys import FEATURES, keys_with
from vpm_jax.machine import threads
from vpm_jax.matching import embedding, match_visibility, pairwise_distance, pairwise_shares
from vpm_jax.pretrained import own
from vpm_jax.reduction import Reduction
from vpm_jax.regions import WHOLE, Crop, RegionGrid

Places = str | Iterable[Place | None]  # a place for all images, or one for each
Step = Callable[..., dict[str, jax.Array]]


class VPM:
    """A trained model, loaded by `VPM.load`. Pickles, with its weights.

    Attributes:
      config: the run's configuration (vpm_jax.config).
      grid: the region grid; grid.count is P.
      image_size: (H, W) in pixels that every image is resized to.
      step: (uint8 [B, H, W, 3]) -> {"features", "visibility", "region_maps"} as in `Description`, on the devices. A
        model of padded images (data.fit) takes valid bool [B, h, w] too: see `inputs`.
      places: the named places that `features` accepts; () for a model that stretches images.
      source: where the model came from, in words.
      variables: {"params", "batch_stats"} on the host; None for an exported program.
    """

    def __init__(
        self,
        config: ConfigDict,
        step: Step,
        fingerprint: str,
        source: str,
        variables: Variables | None = None,
        program: bytes = b"",
    ):
        self._program = program  # of an exported model
        self.config, self.step, self.source, self.variables = config, step, source, variables
        self.fingerprint: str = fingerprint
        """16 hexadecimal digits that are equal for models with equal features."""
        self.grid = RegionGrid(*config.model.grid)
        self.image_size = (int(config.data.height), int(config.data.width))
        self._folder: Path | None = None  # from which it was loaded
        self._fit = Fit(config.data)
        self.places = KNOWN_PLACES if self._fit.pads else ()
        self._map_shape = feature_map_shape(config)

    def __repr__(self) -> str:
        height, width = self.image_size
        grid = f"{self.grid.rows} x {self.grid.cols} regions"
        return f"VPM({self.source}; {grid}, {height} x {width} pixels, fingerprint {self.fingerprint})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.config, self.variables, self._program, self.fingerprint, self.source)

    @classmethod
    def load(cls, path: str | os.PathLike[str], dtype: str | None = None) -> VPM:
        """Loads a training run's newest checkpoint, or a model that was exported, saved or pushed.

        Args:
          path: a workdir, a folder of `save_pretrained`, hf://user/name on the Hugging Face Hub (hf://user/name@REVISION
            for a branch, tag or commit), a .stablehlo (with its .json beside it) or .safetensors.
          dtype: "float32" or "bfloat16" to compute in; default: the run's, usually "auto", which is bfloat16 on GPU
            and TPU. Has no effect on an exported program.

        Raises:
          UserError: if the model is missing or damaged.
        """
        parallel.prepare_backend()
        path = located(path)
        if not path.exists():
            similar = sorted(path.parent.glob(f"{path.stem}-*.safetensors"))  # with the name of a network variant
            hint = (
                f"do you mean {similar[0]}?"
                if similar
                else "give the workdir of a training run, an exported file or hf://user/name."
            )
            raise UserError(f"{path} does not exist: {hint}")
        if path.suffix == ".stablehlo" and path.is_file():
            return cls._load_stablehlo(path)
        if path.is_file() and path.suffix.lower() != ".safetensors":
            raise UserError(
                f"{path} is not a model: expected the workdir of a training run, or a .stablehlo or .safetensors that "
                "python -m vpm_jax.export wrote."
            )
        weights = own.read_folder(path) if path.is_dir() else pretrained.load(f"vpm:{path}")
        if weights.heads is None or weights.config is None:
            raise UserError(
                f"{path} holds {weights.source} without VPM's locator: give the workdir of a training run, or a "
                ".safetensors that python -m vpm_jax.convert wrote."
            )
        config = config_lib.for_weights(weights.config, weights)
        config.model.dtype = dtype or config.model.dtype
        config_lib.check(config)
        variables_dtype = jnp.promote_types(models.compute_dtype(config.model.dtype), jnp.float32)
        digest = fingerprint(config, weights.variables())
        variables = jax.tree.map(lambda x: np.asarray(x, variables_dtype), weights.variables())
        model = cls(config, _step(config, variables), digest, weights.source, variables)
        model._folder = path if path.is_dir() else None
        return model

    from_pretrained = load

    def save_pretrained(
        self, folder: str | os.PathLike[str], results: str | os.PathLike[str] | None = None, name: str = ""
    ) -> None:
        """Saves the model for others: weights, config, results and a model card (README.md), in a new folder.

        `from_pretrained` and `load` read it, with the same fingerprint. No file contains a path of this machine.

        Args:
          folder: a name that does not exist, or an empty folder.
          results: a folder with evaluation*.md and .json and thresholds.json to include; default: that of the run.
          name: the model's name in the card; default: that of the folder.

        Raises:
          UserError: if the folder is in use or cannot be written, or the model is an exported program.
        """
        from vpm_jax import hub

        path = Path(os.path.expanduser(folder))
        hub.save(self, path, name or path.resolve().name, self._results(results))

    def push(self, name: str, private: bool = True, results: str | os.PathLike[str] | None = None) -> str:
        """Uploads what `save_pretrained` saves to the Hugging Face Hub; returns the address of its page.

        Args:
          name: user/name. A new repository is created; in an existing one, this is a new commit.
          private: whether a new repository is private.
          results: as for `save_pretrained`.

        Raises:
          UserError: as `save_pretrained`, and if the Hub cannot be reached or refuses.
        """
        from vpm_jax import hub

        return hub.push(self, name, private, self._results(results))

    def _results(self, folder: str | os.PathLike[str] | None) -> Path | None:
        if folder is None:
            return self._folder
        path = Path(os.path.expanduser(folder))
        if not path.is_dir():
            raise UserError(f"results is {path}, expected the folder of an evaluation.", code="no-results")
        return path

    @property
    def trained_variables(self) -> Variables:
        """`variables`. Raises UserError for an exported program, which has none."""
        if self.variables is None:
            raise UserError(f"{self.source} is an export already: give the workdir that it was exported from.")
        return self.variables

    @classmethod
    def _load_stablehlo(cls, path: Path) -> VPM:
        """Loads an exported program. Raises UserError if the file or its .json is missing or damaged."""
        again, beside = "export it again with python -m vpm_jax.export", sidecar(path)
        try:
            about = json.loads(beside.read_text(encoding="utf-8"))
            digest, config = about["sha256"], json.dumps(about["config"])
            fingerprint, source = str(about["fingerprint"]), str(about["source"])
            data = path.read_bytes()
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror}): a .stablehlo has a .json beside it; "
                f"copy both or {again}."
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{beside} was not written by an export ({error!r}): {again}.") from None
        if not intact(about):
            raise UserError(f"{beside} is damaged (its checksum differs): {again}.")
        if hashlib.sha256(data).hexdigest() != digest:
            raise UserError(f"{path} is not the file that {beside.name} describes: {again}.")
        try:
            call = _program_step(data)
        except Exception as error:  # depends on the version of JAX
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UserError(f"{path} cannot be read by JAX {jax.__version__} ({reason}): {again}.") from None
        return cls(
            config_lib.from_json(config, str(beside)),
            call,
            fingerprint,
            f"{source}, exported as {path.name}",
            None,
            data,
        )

    # ---- Features ----

    def __call__(self, images: Images, batch: int = 64, places: Places | None = None) -> Description:
        """Same as `features`."""
        return self.features(images, batch, places)

    def features(self, images: Images, batch: int = 64, places: Places | None = None) -> Description:
        """Describes an image (N = 1), an iterable of images, or an array uint8 [N, H, W, 3].

        An image is a path, a file open for reading, the bytes of an encoded file, a Pillow image, or a uint8 array: RGB
        [H, W, 3], gray [H, W] or [H, W, 1], or RGBA [H, W, 4]. It is resized to `image_size`. The EXIF orientation of
        files and Pillow images is applied; transparent pixels are blended with white; of an animation, the first frame
        is used.

        Args:
          images: iterators are read one batch at a time.
          batch: images per batch; affects speed and memory only.
          places: where the images lie on the input, if that is known and the model pads images (data.fit): "top",
            "center" or "bottom" for all, or one of these for each, or the fractions of the free height above it and of
            the free width to its left; None is data.place. A model trained on images at the top mistakes legs there
            for shoulders: "bottom" is for legs.

        Raises:
          UserError: for an invalid image, with its name or index, or an invalid place.
        """
        batches = list(self.stream(images, batch, places))
        return Description.concatenate(batches) if batches else self._nothing

    def stream(self, images: Images, batch: int = 64, places: Places | None = None) -> Iterator[Description]:
        """Yields a Description of every `batch` images; the last one may be shorter. Arguments as for `features`.

        Reads at most one batch ahead, so generators may be endless.
        """
        check_count("batch", batch)
        parallel.check_process()

        numbered = enumerate(_placed(images, places))

        def fill(out: np.ndarray, valid: np.ndarray, item: tuple[int, tuple[Image, Place | None]]) -> None:
            number, (image, place) = item
            valid[:] = self._fill(image, f"image {number}", out, place=place)

        def started() -> Iterator[tuple[dict[str, jax.Array], int]]:
            size = 0
            while chunk := list(itertools.islice(numbered, batch)):
                # Padded to a power of two, or to the size of the previous batches, to compile few sizes.
                size = size or min(batch, 1 << (len(chunk) - 1).bit_length())
                pixels = np.zeros((size, *self.image_size, 3), np.uint8)
                valid = np.zeros((size, *self._map_shape), bool)
                list(pool.map(fill, pixels, valid, chunk))
                yield self.step(*((pixels, valid) if self._fit.pads else (pixels,))), len(chunk)

        with ThreadPoolExecutor(min(batch, threads()), "vpm_jax-decode") as pool:
            # Computes the next batch while the caller uses this one.
            for outputs, count in parallel.prefetch(started(), lambda pair: pair, depth=1):
                description = fetch(outputs, count)
                check_finite(description.features, "images")
                yield replace(description, model=self.fingerprint)

    def prepare(
        self, image: Image, name: str = "the image", out: np.ndarray | None = None, crop: Crop = WHOLE
    ) -> np.ndarray:
        """Decodes, crops and resizes an image to the network's input, uint8 [H, W, 3].

        Args:
          image: as in `features`.
          name: in error messages, for an image that is not a file.
          out: an array uint8 [H, W, 3] to write into.
          crop: the box to use, as fractions of the image (`regions.draw_crop`).

        Raises:
          UserError: as `features`.
        """
        out = np.empty((*self.image_size, 3), np.uint8) if out is None else out
        self._fill(image, name, out, crop)
        return out

    def inputs(self, images: Images) -> tuple[np.ndarray, ...]:
        """The inputs of `step` and of an exported program: (uint8 [N, H, W, 3],).

        A model of padded images (data.fit) also takes bool [N, h, w]: the cells of T that each image covers. Raises as
        `features`.
        """
        given = list(each(images))
        pixels = np.empty((len(given), *self.image_size, 3), np.uint8)
        valid = np.empty((len(given), *self._map_shape), bool)
        for number, image in enumerate(given):
            valid[number] = self._fill(image, f"image {number}", pixels[number])
        return (pixels, valid) if self._fit.pads else (pixels,)

    def _fill(
        self, image: Image, name: str, out: np.ndarray, crop: Crop = WHOLE, place: Place | None = None
    ) -> np.ndarray:
        """Writes an image into `out`; returns the cells of T that it covers, bool [h, w]."""
        return covered(self._fit(read(image, name, crop), out, place), self.image_size, self._map_shape)

    @cached_property
    def _nothing(self) -> Description:
        inputs = self.inputs([np.zeros((1, 1, 3), np.uint8)])
        shapes = jax.eval_shape(self.step, *(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs))
        arrays = {key: np.zeros((0, *x.shape[1:]), np.float32) for key, x in shapes.items()}
        return Description(**arrays, model=self.fingerprint)

    # ---- Matching ----

    def match(self, query: Description | Images, gallery: Description | Images) -> np.ndarray:
        """The distance of every query to every gallery image by Eq. 4 and config.match: float32 [Q, G].

        Smaller is more similar; +inf for pairs that share no region. Ignores match.rerank and match.gallery_gammas, so
        that a distance depends on its pair only. Images are described first.

        Raises:
          UserError: as `features`, and for a Description by another model.
          ValueError: for a Description whose arrays do not fit, or whose visibility is negative or not finite.
        """
        return pairwise_distance(self.config.match, self._described(query), self._described(gallery))

    def match_regions(
        self, query: Description | Images, gallery: Description | Images
    ) -> tuple[np.ndarray, np.ndarray]:
        """The per-region terms of `match`, to explain a few pairs; takes memory for [Q, G, P].

        Returns:
          (distance, weight), float32 [Q, G, P] each: the distance of each region's features and its weight. `match` is
          sum(weight * distance). The weights of a pair sum to 1, or to 0 if it shares no region.

        Raises:
          UserError: as `match`.
        """
        return pairwise_shares(self.config.match, self._described(query), self._described(gallery))

    def embedding(
        self, images: Description | Images, whole: bool = False, reduction: Reduction | None = None
    ) -> np.ndarray:
        """One vector of unit length per image, float32 [N, P * C], for vector databases, trackers and FAISS.

        An inner product of two is larger the more similar the images are; `matching.embedding` derives how it relates
        to the distance of `match`, and when the two rank alike. Images are described first.

        Args:
          images: as for `match`.
          whole: the images show the whole person, as those of a gallery do: every region has the same weight, and they
            rank for a partial query as by squared Eq. 4. Give it for all images of a gallery or for none.
          reduction: makes the vectors shorter (`VPM.reduction`).

        Raises:
          UserError: as `match`, and for a reduction of another model.
        """
        described = self._described(images)
        weight = match_visibility(described.visibility, "uniform" if whole else self.config.match.visibility)
        if reduction is not None:
            reduction.check(self.fingerprint)
        return embedding(described.features if reduction is None else reduction(described.features), weight)

    def reduction(self, images: Description | Images, dimensions: int = 256) -> Reduction:
        """Learns to reduce `embedding` to at most `dimensions` numbers, from a few thousand images.

        Raises:
          UserError: as `match` and `Reduction.fit`.
        """
        return Reduction.fit(self._described(images), dimensions, self.fingerprint)

    def _described(self, images: Description | Images) -> Description:
        description = images if isinstance(images, Description) else self.features(images)
        if description.model not in ("", self.fingerprint):
            raise UserError(
                f"These features are another model's (fingerprint {description.model}, that of {self.source} is "
                f"{self.fingerprint}) and not comparable: describe the images again, or use the model that made them.",
                code="other-model",
            )
        shape, expected = description.features.shape[1:], self._nothing.features.shape[1:]
        if shape != expected:
            raise UserError(
                f"These features have {shape} regions and channels, this model's {expected}: they are another model's. "
                "Describe the images again."
            )
        return description


# ---- Places and files ----


def _placed(images: Images, places: Places | None) -> Iterator[tuple[Image, Place | None]]:
    """Images with their places. Raises UserError, after the last pair, if there are more of one than of the other."""
    if places is None or isinstance(places, str):
        yield from ((image, places) for image in each(images))
        return
    missing: Any = object()
    for number, (image, place) in enumerate(zip_longest(each(images), places, fillvalue=missing)):
        if image is missing or place is missing:
            what = "images" if image is missing else "places"
            raise UserError(f"There are only {number} {what}: give a place for each image.")
        yield image, place


def located(path: str | os.PathLike[str]) -> Path:
    """The local path of what `VPM.load` takes. A model on the Hub is downloaded (`hub.fetch`)."""
    if not isinstance(path, str | os.PathLike):
        raise UserError(
            f"The model is given as {type(path).__name__}, expected the path of a run or of an exported file."
        )
    text = os.fspath(path)
    if text.startswith("hf:/"):  # a Path has lost the second slash
        from vpm_jax import hub

        return hub.fetch(hub.SCHEME + text.removeprefix("hf:").lstrip("/"))
    return Path(os.path.expanduser(path))


# ---- The network ----


def _step(config: ConfigDict, variables: Variables) -> Step:
    """The compiled feature step with region maps, on all devices of this host."""
    mesh = parallel.data_mesh(devices=jax.local_devices())
    return partial(Describer(config, mesh, region_maps=True).step, parallel.replicate(mesh, variables))


def _program_step(program: bytes) -> Step:
    from jax import export  # needs flatbuffers

    return jax.jit(export.deserialize(bytearray(program)).call)


def _restore(config: ConfigDict, variables: Variables | None, program: bytes, fingerprint: str, source: str) -> VPM:
    """A pickled model."""
    parallel.prepare_backend()
    step = _program_step(program) if variables is None else _step(config, variables)
    return VPM(config, step, fingerprint, source, variables, program)


def sidecar(path: Path) -> Path:
    """The .json beside a .stablehlo."""
    return path.with_name(path.name + ".json")


def fingerprint(config: ConfigDict, variables: Variables) -> str:
    """A digest of what features depend on: variables (without the identity heads) and keys of the resolved config, but
    not the device or the precision.
    """
    leaves = config_lib.flatten(config)
    values = [leaves[key] for key in keys_with(FEATURES)]
    if config.data.fit == "pad":  # keeps the fingerprints of models without padding
        values += [leaves[f"data.{key}"] for key in ("fit", "place", "aspect")]
    digest = hashlib.sha256(json.dumps(values).encode())
    for name, x in sorted(flatten_dict(variables, sep="/").items()):
        if "/heads/" not in name:
            digest.update(f"{name} {np.shape(x)}".encode())
            digest.update(np.ascontiguousarray(x, np.dtype("<f4")).tobytes())
    return digest.hexdigest()[:16]
