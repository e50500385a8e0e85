"""What `evaluate --save` writes for other tools, and matching saved features again (`evaluate --features`).

In a folder, for queries whole and cropped ("-top-0.5" and so on):

  about.json          model, dataset, number of queries, matching
  query-top-0.5.npz   features float32 [N, P, C] (Eq. 3), visibility float32 [N, P] (Eq. 2), names, identity, camera
                      (if there are any), region_maps [N, h, w, P] (if match.gallery_gammas needs them)
  gallery.npz         the same of the ranked gallery, without junk
  distances-top-0.5.npy   float32 [Q, G]: a row for each image of query.npz, a column for each of gallery.npz
  ranking-top-0.5.csv     the nearest images of each query, as the protocol ranks them: query, rank, gallery image, its
                          identity and camera, distance, correct (0 or 1)

File names show when only some of the queries were evaluated: query-top-0.5-100-of-3368.npz.
"""

from __future__ import annotations

import contextlib
import csv
import json
import zipfile
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import config as config_lib
from vpm_jax.data.inventory import Inventory
from vpm_jax.data.split import Split
from vpm_jax.description import CroppedSplit, Description, FeatureSource, Variables
from vpm_jax.disk import DAMAGED, replacing, write_atomically
from vpm_jax.errors import UserError
from vpm_jax.metrics import Ranking
from vpm_jax.progress import Progress

RANKED = 50  # images of each query in ranking.csv
_AGAIN = "extract them again with --save features"


class Request(NamedTuple):
    """What to save."""

    folder: Path  # exists
    kinds: Sequence[str]  # "features", "distances", "ranking"
    about: dict[str, Any]  # for about.json: model, dataset, queries, of_queries if there are more, ...

    def check(self, config: ConfigDict) -> None:
        """Raises UserError if the folder holds such files of another evaluation."""
        expected = {"features": self.about, "matching": self.about | {"match": _match(config)}}
        for part, found in _read_about(self.folder).items():
            if "match" in found:  # earlier versions had fewer settings
                found["match"] = _match(config_lib.default()) | found["match"]
            files = {kind for kind in self.kinds if (kind == "features") == (part == "features")}
            if files and any(found.get(key) != value for key, value in expected[part].items()):
                raise UserError(
                    f"{self.folder} holds {' and '.join(sorted(files))} of another evaluation: choose another --output."
                )


class Saving(FeatureSource):
    """A source of features that also writes them into the folder of `request`."""

    def __init__(self, source: FeatureSource, request: Request):
        self.config, self._source, self._folder = source.config, source, request.folder
        self._about = {"files": {}} | _read_about(request.folder).get("features", {}) | request.about
        _describe(self._folder, "features", self._about)

    def stream(
        self, variables: Variables, images: CroppedSplit, stops: Sequence[int], progress: Progress
    ) -> Iterator[Description]:
        split, path = images.split, self._folder / f"{images.split.name}{_suffix(self.config, images, self._about)}.npz"
        labels = {"names": np.array(split.names), "identity": split.identity, "camera": split.camera}
        small: dict[str, list[np.ndarray]] = {"visibility": []}
        if split.name != "gallery":
            small["region_maps"] = []
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            with archive.open("features.npy", "w", force_zip64=True) as file:
                for piece in self._source.stream(variables, images, stops, progress):
                    if not small["visibility"]:
                        _write_header(file, (len(split), *piece.features.shape[1:]))
                    file.write(np.ascontiguousarray(piece.features, np.float32).data)
                    for name, parts in small.items():
                        if (part := getattr(piece, name)) is not None:
                            parts.append(part)
                    yield piece
            arrays = labels | {name: np.concatenate(parts) for name, parts in small.items() if parts}
            for name, array in arrays.items():
                if array is not None:
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                        np.lib.format.write_array(file, array, allow_pickle=False)
        self._about["files"][path.name] = Inventory.of(split).digest
        _describe(self._folder, "features", self._about)


class Saved(FeatureSource):
    """Features from the files of `Saving`.

    Args:
      config: of the evaluation.
      folder: the files.
      about: the "features" that about.json must have.

    Raises:
      UserError: if there are none, or about.json differs; from `stream` if they are damaged or of other images.
    """

    def __init__(self, config: ConfigDict, folder: Path, about: dict[str, Any]):
        self.config, self._folder, self._about = config, folder, about
        found = _read_about(folder).get("features")
        if found is None:
            raise UserError(
                f"{folder} holds no features of an evaluation (no about.json that lists them): write them with --save "
                "features."
            )
        for key in about | found:
            if key != "files" and found.get(key) != about.get(key):
                raise UserError(
                    f"The features in {folder} were saved with {key} {found.get(key)}, expected {about.get(key)}: "
                    f"choose another --features, or {_AGAIN}."
                )
        self._files = found.get("files", {})

    def stream(
        self, variables: Variables, images: CroppedSplit, stops: Sequence[int], progress: Progress
    ) -> Iterator[Description]:
        split, path = images.split, self._folder / f"{images.split.name}{_suffix(self.config, images, self._about)}.npz"
        if path.name not in self._files:
            raise UserError(f"{self._folder} holds no {path.name}, which these gammas and crops need: {_AGAIN}.")
        if self._files[path.name] != Inventory.of(split).digest:
            raise UserError(f"{path} describes other images than those of {split.name} in the dataset: {_AGAIN}.")
        try:
            with zipfile.ZipFile(path) as archive:
                small = {name: _read(archive, name) for name in ("visibility", "region_maps")}
                if small["region_maps"] is None and split.name != "gallery" and self.config.match.gallery_gammas:
                    raise UserError(
                        f"{path} holds no region maps, which match.gallery_gammas needs: {_AGAIN} and that key."
                    )
                with archive.open("features.npy") as file:
                    np.lib.format.read_magic(file)
                    shape, *_ = np.lib.format.read_array_header_1_0(file)
                    for begin, end in pairwise([0, *stops, len(split)]):
                        size = (end - begin, *shape[1:])
                        features = np.frombuffer(file.read(4 * int(np.prod(size))), np.float32).reshape(size)
                        rows: dict[str, Any] = {name: x[begin:end] for name, x in small.items() if x is not None}
                        progress.add(len(features))
                        yield Description(features, **rows)
        except DAMAGED as error:
            raise UserError(f"{path} is damaged ({error}): {_AGAIN}.") from error


class Matching:
    """Writes the distances and ranked lists that `request` asks for."""

    def __init__(self, request: Request, config: ConfigDict, queries: Sequence[CroppedSplit], gallery: Split):
        self._folder, self._kinds, self._about = request
        self._gallery = gallery
        self._queries = [(query.split, _suffix(config, query, self._about)) for query in queries]
        self._match = _match(config)
        self.keep = RANKED if "ranking" in self._kinds else 0  # nearest images that `metrics.Ranking` keeps
        self._files: list[tuple[IO[bytes], int]] = []

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """The files of distances appear when the block ends without an error."""
        with contextlib.ExitStack() as stack:
            for query, suffix in self._queries if "distances" in self._kinds else ():
                path = stack.enter_context(replacing(self._folder / f"distances{suffix}.npy"))
                file = stack.enter_context(path.open("wb"))
                _write_header(file, (len(query), len(self._gallery)))
                self._files.append((file, file.tell()))
            yield

    def add(self, number: int, rows: slice | np.ndarray, columns: slice, distance: np.ndarray) -> None:
        """Takes the distances of some queries of a query set to some gallery images."""
        if self._files:
            file, start = self._files[number]
            width, first = len(self._gallery), columns.start or 0
            for query, row in zip(np.arange(len(self._queries[number][0]))[rows].tolist(), distance, strict=True):
                file.seek(start + 4 * (query * width + first))
                file.write(np.ascontiguousarray(row, "<f4").data)

    def finish(self, rankings: Sequence[Ranking]) -> None:
        """Writes the ranked lists of each query set."""
        gallery = self._gallery
        for (query, suffix), ranking in zip(self._queries, rankings, strict=True):
            if self.keep:
                path = self._folder / f"ranking{suffix}.csv"
                with (
                    replacing(path) as temporary,
                    temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file,
                ):
                    writer = csv.writer(file)
                    writer.writerow(("query", "rank", "gallery image", "identity", "camera", "distance", "correct"))
                    for q, name in enumerate(query.names):
                        for rank, (g, distance) in enumerate(zip(*ranking.nearest(q), strict=True), 1):
                            camera = "" if gallery.camera is None else gallery.camera[g]
                            correct = int(gallery.identity[g] == query.identity[q])
                            found = gallery.names[g], gallery.identity[g], camera, f"{distance:.6g}", correct
                            writer.writerow((name, rank, *found))
        if set(self._kinds) - {"features"}:
            _describe(self._folder, "matching", self._about | {"gallery": len(gallery), "match": self._match})


def _suffix(config: ConfigDict, images: CroppedSplit, about: dict[str, Any]) -> str:
    """The crop of a split's images, and how many of the queries they are, for file names."""
    crop = "" if images.gamma >= 1 else f"-{images.crop or config.eval.crop}-{images.gamma:g}"
    if images.split.name == "gallery" or "of_queries" not in about:
        return crop
    return f"{crop}-{about['queries']}-of-{about['of_queries']}"


def _match(config: ConfigDict) -> dict[str, Any]:
    """The settings that distances depend on beyond the features."""
    return json.loads(json.dumps(config.match.to_dict() | {"same_camera": config.eval.same_camera}))


def _describe(folder: Path, part: str, about: dict[str, Any]) -> None:
    """Sets a part of about.json."""
    parts = _read_about(folder) | {part: about}
    write_atomically(folder / "about.json", json.dumps(parts, indent=1) + "\n")


def _read_about(folder: Path) -> dict[str, dict[str, Any]]:
    """The parts "features" and "matching" of about.json, without missing ones."""
    try:
        parts = json.loads((folder / "about.json").read_text())
        return {part: dict(parts[part]) for part in ("features", "matching") if part in parts}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / 'about.json'} is damaged ({error}): choose another folder.") from error


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    """The header of a float32 array in a .npy."""
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})


def _read(archive: zipfile.ZipFile, name: str) -> np.ndarray | None:
    """An array of a .npz; None if it is missing."""
    if f"{name}.npy" not in archive.namelist():
        return None
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)
