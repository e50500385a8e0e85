"""Writing and reading datasets prepared as ArrayRecord by TFDS, which needs no TensorFlow if it encodes no images.

Import this module only when needed: TFDS takes a second to import. A prepared folder, `<output>/<dataset>/<version>/`,
loads with plain TFDS. Its `index.json` adds the names, identities and cameras, to list the dataset without reading
images.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from vpm_jax.data.datasets import DATASETS
from vpm_jax.data.split import Dataset, Split
from vpm_jax.disk import check_utf8, disk_trouble, intact, sealed
from vpm_jax.errors import UserError, first_line

VERSION = "1.0.0"
INDEX = "index.json"
SPLITS = ("train", "query", "gallery", "multi_query")
Progress = Callable[[Iterable[int], str], Iterable[int]]  # wraps the loop over the images of a split, given its name
Inspect = Callable[[bytes, str], object]  # is called with every encoded image and its name


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """Writes a dataset with its images as they are encoded."""

    VERSION = tfds.core.Version(VERSION)
    code_path = None  # no checksum files; looking for them needs a package that TFDS does not require

    def __init__(self, dataset: Dataset, output: Path, progress: Progress, inspect: Inspect):
        self.name = dataset.name
        self._dataset = dataset
        self._progress, self._inspect = progress, inspect
        super().__init__(data_dir=output, file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"{self.name}: pedestrian images with identity and camera, in the order of their names.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(),
                    "identity": np.int32,  # -1 junk, 0 distractor
                    "camera": np.int32,  # -1: the dataset has no cameras
                    "name": tfds.features.Text(),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict:
        # TFDS writes into a temporary folder and renames it at the end, so the index appears together with the images.
        index: dict[str, Any] = {"notes": list(self._dataset.notes[1:])}  # without the first, which names the source
        splits: dict[str, Split] = {
            name: split for name in SPLITS if (split := getattr(self._dataset, name)) is not None
        }
        for name, split in splits.items():
            camera = None if split.camera is None else split.camera.tolist()
            index[name] = dict(names=split.names, identity=split.identity.tolist(), camera=camera)
        (Path(self.data_dir) / INDEX).write_text(json.dumps(sealed(index)), encoding="utf-8")
        return {name: self._generate_examples(split) for name, split in splits.items() if len(split)}

    def _generate_examples(self, split: Split) -> Iterator[tuple[int, dict[str, Any]]]:
        for i in self._progress(range(len(split)), split.name):
            image = split.read(i)
            self._inspect(image, split.names[i])
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
    """The folder that `write` creates for the dataset `name`."""
    return output / name / VERSION


def write(
    dataset: Dataset,
    output: Path,
    progress: Progress = lambda images, name: images,
    inspect: Inspect = lambda image, name: None,
) -> Path:
    """Writes all splits under `output` and returns the prepared folder, which appears only when it is complete.

    Raises:
      UserError: for an image that cannot be read, or an output that cannot be written.
    """
    folder = folder_of(output, dataset.name)
    check_utf8(folder, "ArrayRecord files")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        # TFDS requires a folder for downloads, and prints sizes that it does not know.
        with tempfile.TemporaryDirectory() as downloads, contextlib.redirect_stdout(io.StringIO()):
            tfds.disable_progress_bar()
            _Builder(dataset, output.absolute(), progress, inspect).download_and_prepare(download_dir=downloads)
    except (OSError, RuntimeError) as error:
        trouble = disk_trouble(error) or f"{first_line(error)}: choose another output"
        raise UserError(f"{folder} could not be written and was removed: {trouble}.") from error
    return folder


def read(folder: Path, name: str) -> tuple[dict[str, Split], list[str]]:
    """Reads the prepared dataset `name`: (splits, the notes from its preparation).

    Raises:
      UserError: if the folder has another dataset or is damaged.
    """
    check_utf8(folder, "ArrayRecord files")
    _open.cache_clear()  # the folder may have been prepared again since this process last read it
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if not intact(index):
            raise ValueError(f"the checksum of {INDEX} differs")
        splits = {}
        for split in SPLITS:
            if split == "multi_query" and split not in index:
                continue
            listed = index[split]
            identity = np.array(listed["identity"], np.int32)
            camera = None if listed["camera"] is None else np.array(listed["camera"], np.int32)
            reader = Reader(folder, split)
            splits[split] = Split(split, tuple(listed["names"]), identity, camera, reader, upright=DATASETS[name].own)
            lengths = {len(listed["names"]), len(identity), len(identity if camera is None else camera)}
            if listed["names"]:  # TFDS leaves out empty splits
                lengths.add(len(_open(str(folder), split, os.getpid())))
            if len(lengths) > 1:
                raise ValueError(f"{INDEX} and the records of {split} differ in length")
        info = tfds.builder_from_directory(folder).info
        if missing := info.splits.keys() - splits.keys():
            raise ValueError(f"{INDEX} lacks {', '.join(sorted(missing))}")
        dataset_name, notes = info.name, [str(note) for note in index["notes"]]
    except Exception as error:  # TFDS and its formats raise many types
        raise UserError(
            f"The prepared folder {folder} is damaged ({first_line(error)}): "
            "delete it and run python -m vpm_jax.prepare again."
        ) from error
    if dataset_name != name:
        raise UserError(
            f"{folder} contains {dataset_name}, but config.data.name is {name}: change the root or the name."
        )
    for images in filter(len, splits.values()):
        images.read(len(images) - 1)  # opening a truncated file succeeds, but reading fails
    return splits, notes


@dataclass(frozen=True)
class Reader:
    """Reads images of a prepared split. Keeps no open file, so that it pickles; each process opens its own."""

    folder: Path
    split: str

    def read(self, name: str, position: int) -> bytes:
        try:
            record = _open(str(self.folder), self.split, os.getpid())[position]
            # TFDS's own parser is general, and slower than reading the record.
            features = tf_example_pb2.Example.FromString(record).features.feature
            record_name = features["name"].bytes_list.value[0].decode("utf-8", "surrogateescape")
            if record_name != name:
                raise ValueError(f"the record is that of {record_name}")
            return features["image"].bytes_list.value[0]
        except Exception as error:
            raise UserError(
                f"The image {name} in the prepared folder {self.folder} cannot be read ({first_line(error)}): "
                "delete the folder and run python -m vpm_jax.prepare again."
            ) from error


@lru_cache(maxsize=16)
def _open(folder: str, split: str, process: int) -> Any:
    """The TFDS data source of a split's serialized examples, one per process (`process` is its id)."""
    builder = tfds.builder_from_directory(folder)
    return builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
