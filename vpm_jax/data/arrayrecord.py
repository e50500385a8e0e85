"""Datasets prepared as ArrayRecord through TFDS, which works without TensorFlow as long as it encodes no image itself.

Imported only where such a dataset is written or read, since TFDS takes a second to import. A prepared folder,
`<output>/<dataset>/<version>/`, is what any TFDS user can load, plus `index.json` with the names, identities and
cameras, so that listing a dataset reads no image.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from vpm_jax.data.datasets import DATASETS
from vpm_jax.data.split import Dataset, Split
from vpm_jax.errors import UserError, disk_trouble

VERSION = "1.0.0"
INDEX = "index.json"
SPLITS = ("train", "query", "gallery", "multi_query")
Progress = Callable[[Iterable[int], str], Iterable[int]]  # wraps the loop over one split's images, named
Look = Callable[[bytes, str], object]  # is shown every encoded image, and its name


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes a listed dataset; images stay the encoded bytes they are."""

    VERSION = tfds.core.Version(VERSION)
    code_path = (
        None  # no checksum files beside this module; looking for them takes a package that TFDS does not require
    )

    def __init__(self, dataset: Dataset, output: Path, progress: Progress, look: Look):
        self.name = dataset.name
        self._dataset = dataset
        self._progress, self._look = progress, look
        super().__init__(data_dir=output, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.name}: pedestrian images with identity and camera, in the order of their names.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "identity": np.int32,  # -1 junk, 0 distractor
                    "camera": np.int32,  # -1: the dataset has none
                    "name": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict:
        # TFDS fills a temporary folder and renames it at the end: the index appears with the images or not at all.
        index: dict[str, Any] = {"notes": list(self._dataset.notes[1:])}  # the first tells the path of the source
        splits: dict[str, Split] = {
            name: split for name in SPLITS if (split := getattr(self._dataset, name)) is not None
        }
        for name, split in splits.items():
            camera = None if split.camera is None else split.camera.tolist()
            index[name] = dict(names=split.names, identity=split.identity.tolist(), camera=camera)
        (Path(self.data_dir) / INDEX).write_text(json.dumps(index))
        return {name: self._generate_examples(split) for name, split in splits.items() if len(split)}

    def _generate_examples(self, split: Split):
        for i in self._progress(range(len(split)), split.name):
            image = split.read(i)
            self._look(image, split.names[i])
            yield (
                i,
                {
                    "image": image,
                    "identity": split.identity[i],
                    "camera": -1 if split.camera is None else split.camera[i],
                    "name": split.names[i].encode("utf-8", "surrogateescape"),
                },
            )


def folder_of(output: Path, name: str) -> Path:
    """Where `write` puts the dataset `name`."""
    return output / name / VERSION


def write(
    dataset: Dataset,
    output: Path,
    progress: Progress = lambda images, name: images,
    look: Look = lambda image, name: None,
) -> Path:
    """Writes all splits under `output`; returns the prepared folder, which appears whole or not at all.

    UserError for an image that cannot be read, and for an output that cannot be written.
    """
    folder = folder_of(output, dataset.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # TFDS insists on a folder for downloads, and prints sizes that it does not know.
        with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
            tfds.disable_progress_bar()
            _Builder(dataset, output.absolute(), progress, look).download_and_prepare(download_dir=downloads)
    except UserError:
        raise
    except (OSError, RuntimeError) as error:
        trouble = disk_trouble(error) or f"{_line(error)}: free some space or choose another output"
        raise UserError(f"{folder} could not be written, and nothing was kept: {trouble}.") from error
    return folder


def read(folder: Path, name: str) -> tuple[dict[str, Split], list[str]]:
    """The splits of the dataset `name` in a prepared folder, and the notes made when it was prepared.

    UserError when the folder holds another dataset, or is damaged.
    """
    _open.cache_clear()  # the folder may have been prepared again since this process last read it
    try:
        index = json.loads((folder / INDEX).read_text())
        splits = {}
        for split in SPLITS:
            if split == "multi_query" and split not in index:
                continue
            listed, reader = index[split], Reader(folder, split)
            identity = np.array(listed["identity"], np.int32)
            camera = None if listed["camera"] is None else np.array(listed["camera"], np.int32)
            splits[split] = Split(split, tuple(listed["names"]), identity, camera, reader, upright=DATASETS[name].own)
            lengths = {len(listed["names"]), len(identity), len(identity if camera is None else camera)}
            if listed["names"]:  # TFDS has no split without images
                lengths.add(len(_open(str(folder), split, os.getpid())))
            if len(lengths) > 1:
                raise ValueError(f"{INDEX} and the records of {split} differ in length")
        held = tfds.builder_from_directory(folder).info.name
    except Exception as error:  # TFDS and its formats raise a dozen kinds
        raise UserError(
            f"The prepared folder {folder} is damaged ({_line(error)}): "
            "delete it and run python -m vpm_jax.prepare again."
        ) from error
    if held != name:
        raise UserError(
            f"{folder} holds {held}, but config.data.name is {name}: give the root of {name}, or the other name."
        )
    for images in filter(len, splits.values()):
        images.read(len(images) - 1)  # a truncated file opens, and fails at the first image only
    return splits, index["notes"]


@dataclass(frozen=True)
class Reader:
    """Reads images of one split of a prepared folder. Holds no handle: each process opens it when it first reads."""

    folder: Path
    split: str

    def read(self, name: str, position: int) -> bytes:
        try:
            record = _open(str(self.folder), self.split, os.getpid())[position]
            # TFDS's own parsing handles every kind of feature, and takes longer than the reading.
            features = tf_example_pb2.Example.FromString(record).features.feature
            held = features["name"].bytes_list.value[0].decode("utf-8", "surrogateescape")
            if held != name:
                raise ValueError(f"the record is that of {held}")
            return features["image"].bytes_list.value[0]
        except Exception as error:
            raise UserError(
                f"The image {name} in the prepared folder {self.folder} cannot be read ({_line(error)}): "
                "delete the folder and run python -m vpm_jax.prepare again."
            ) from error


@lru_cache(maxsize=16)
def _open(folder: str, split: str, process: int) -> Any:
    """The TFDS data source of a split's serialised examples, one per process (`process` is its id), for all threads."""
    builder = tfds.builder_from_directory(folder)
    return builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)


def _line(error: Exception) -> str:
    """What went wrong, in one line without the closing stop."""
    return " ".join(f"{error}".split())[:200].rstrip(".") or type(error).__name__
