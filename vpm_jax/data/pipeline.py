"""Grain pipelines that decode, flip, crop, resize and label images on the host.

A grain element is this host's whole batch, which makes grain's overhead per element negligible. Loading has no
randomness of its own: a batch is a function of the config and the step (see `sampling`) for any number of threads,
workers and hosts.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Generator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, NotRequired, TypedDict

import cv2
import grain
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from vpm_jax.data.decode import decode
from vpm_jax.data.fit import Fit
from vpm_jax.data.sampling import Sampler, uniform
from vpm_jax.data.split import Split
from vpm_jax.errors import UserError
from vpm_jax.geometry import Box, covered_cells, feature_map_shape, map_shape
from vpm_jax.machine import threads
from vpm_jax.regions import Crop, RegionGrid, axis_labels, draw_crop, pixel_box
from vpm_jax.schedule import stage_at

Arrays = dict[str, np.ndarray]

# Loader threads and processes already use all cores.
cv2.setNumThreads(0)


class Batch(TypedDict):
    """A host's rows of a global batch: b images of H x W pixels."""

    image: np.ndarray  # uint8 [b, H, W, 3] RGB
    identity: np.ndarray  # int32 [b]; 0..K-1 in training, otherwise as in the dataset, -1 in padding
    camera: np.ndarray  # int32 [b]; -1 in padding and in datasets without cameras
    valid: NotRequired[np.ndarray]  # bool [b, h, w]; with data.fit "pad", the cells that the image covers


class TrainBatch(Batch):
    labels: np.ndarray  # int32 [b, h, w]
    visible: np.ndarray  # bool [b, P]


class EvalBatch(Batch):
    real: np.ndarray  # bool [b]; False in padding


class Axis(NamedTuple):
    """Pixels [start, stop) of an image's `length`, placed on pixels [first, last) of the input's `canvas`."""

    start: int
    stop: int
    length: int
    first: int
    last: int
    canvas: int

    def cells(self, cells: int) -> tuple[int, int]:
        return covered_cells(self.first, self.last, self.canvas, cells)


@lru_cache(maxsize=16384)  # boxes in whole pixels repeat, and projecting costs as much as decoding
def _project_axis(axis: Axis, regions: int, cells: int, min_cells: int) -> tuple[np.ndarray, np.ndarray]:
    """(labels int [cells], visible bool [regions]) along one axis."""
    # The whole canvas in the image's pixels: larger than the kept pixels if the image is padded.
    kept, filled = axis.stop - axis.start, axis.last - axis.first
    start, size = axis.start - axis.first * kept / filled, axis.canvas * kept / filled
    return axis_labels(start / axis.length, size / axis.length, regions, cells, min_cells, axis.cells(cells))


def cut(image: np.ndarray, box: Box, flip: bool, fill: np.ndarray | int = 0) -> np.ndarray:
    """Cuts the box (top, left, bottom, right) from the image, or from its mirror image if `flip`: uint8 [h, w, 3].

    Where the box reaches beyond the image, the result has the color `fill`.
    """
    top, left, bottom, right = box
    if flip:  # mirroring the cut is less work than mirroring the image
        left, right = image.shape[1] - right, image.shape[1] - left
    inside = image[max(top, 0) : max(bottom, 0), max(left, 0) : max(right, 0)]
    if inside.shape[:2] != (bottom - top, right - left):
        padded = np.empty((bottom - top, right - left, 3), np.uint8)
        padded[:] = fill
        y, x = max(-top, 0), max(-left, 0)
        padded[y : y + inside.shape[0], x : x + inside.shape[1]] = inside
        inside = padded
    return cv2.flip(inside, 1) if flip else inside


def _moved(box: Box, down: float, right: float) -> Box:
    """The box moved by these fractions of its height and width, in whole pixels."""
    y, x = round(down * (box[2] - box[0])), round(right * (box[3] - box[1]))
    return box[0] + y, box[1] + x, box[2] + y, box[3] + x


def _jitter(image: np.ndarray, brightness: float, contrast: float) -> None:
    """Scales an image's brightness, and its contrast around middle gray, in place."""
    table = contrast * (brightness * np.arange(256) - 128) + 128
    image[:] = cv2.LUT(image, np.clip(np.rint(table), 0, 255).astype(np.uint8))


class _Loader:
    """Shared by both kinds of batches: loads the pixels of rows [first, last) of a global batch."""

    def __init__(self, config: ConfigDict, split: Split, batch: int, host_index: int, host_count: int):
        if not 0 <= host_index < host_count:
            raise ValueError(f"host {host_index} of {host_count}")
        if batch % host_count:
            raise UserError(
                f"A batch of {batch} images cannot be divided among {host_count} hosts: choose a multiple of that "
                "number."
            )
        self._config, self._split, self._fit = config, split, Fit(config.data)
        self._batch, self._count = batch, batch // host_count
        self._first, self._last = host_index * self._count, (host_index + 1) * self._count

    def read(self, index: int) -> np.ndarray:
        """The decoded image. Raises UserError if it cannot be read."""
        return decode(self._split.read(index), self._split.names[index], self._split.upright)

    def _put(
        self,
        out: np.ndarray,
        image: np.ndarray,
        crop: Crop,
        place: tuple[float, float] | None = None,
        stretch: float = 0.0,
        flip: bool = False,
        shift: tuple[float, float] = (0.0, 0.0),
        jitter: Sequence[float] = (1.0, 1.0),
    ) -> tuple[Axis, Axis]:
        """Writes the cropped image into `out` [H, W, 3]. Returns how its height and width map to those of `out`."""
        (height, width), canvas = image.shape[:2], (out.shape[0], out.shape[1])
        top, left, bottom, right = box = _moved(pixel_box(crop, height, width), *shift)
        y, x, y_end, x_end = self._fit(cut(image, box, flip, self._fit.fill), out, place, stretch)
        if tuple(jitter) != (1, 1):
            _jitter(out[y:y_end, x:x_end], *jitter)
        return Axis(top, bottom, height, y, y_end, canvas[0]), Axis(left, right, width, x, x_end, canvas[1])

    def _pixels(self, canvas: tuple[int, int]) -> np.ndarray:
        # Allocated for every batch: JAX on CPU may keep using the memory of an array it was given.
        return np.empty((self._count, *canvas, 3), np.uint8)


def _cameras(split: Split) -> np.ndarray:
    """int32 [N], -1 in a dataset without cameras."""
    return np.full(len(split), -1, np.int32) if split.camera is None else np.asarray(split.camera, np.int32)


class _TrainLoader(_Loader):
    def __init__(self, config: ConfigDict, split: Split, host_index: int, host_count: int):
        self._identity, self._camera = np.asarray(split.labels(), np.int32), _cameras(split)
        self._sampler = Sampler(config, self._identity)
        super().__init__(config, split, self._sampler.batch, host_index, host_count)
        self._grid, self._min_cells = RegionGrid(*config.model.grid), int(config.loss.min_cells)
        self._hides = config.data.erasing_hides if config.data.erasing else 1.0
        self._skips = config.data.corrupt == "skip"

    def _readable(self, index: int) -> tuple[int, np.ndarray]:
        """(index, image) of this image or, if config.data.corrupt is "skip", the next readable one of its identity."""
        try:
            return index, self.read(index)
        except UserError as error:
            if not self._skips:
                advice = "or train with --config.data.corrupt=skip, which uses another image of its identity"
                raise UserError(f"{str(error).removesuffix('.')}; {advice}.", code=error.code) from None
            same = np.flatnonzero(self._identity == self._identity[index])
            for other in np.roll(same, -1 - np.searchsorted(same, index))[:-1].tolist():
                with contextlib.suppress(UserError):
                    return other, self.read(other)
            raise

    def __call__(self, step: int) -> Arrays:
        plan, stage = self._sampler.plan(int(step)), stage_at(self._sampler.stages, int(step))
        canvas = stage.height, stage.width
        (h, w), (_, label_width) = feature_map_shape(self._config, canvas), map_shape(self._config, canvas)
        local = slice(self._first, self._last)
        planned, indices, pixels = plan.indices[local], plan.indices[local].copy(), self._pixels(canvas)
        labels = np.empty((self._count, h, label_width), np.int32)
        visible = np.empty((self._count, self._grid.count), bool)
        valid = np.zeros((self._count, h, w), bool)
        flips, shifts, jitters, places, stretches, erased = (
            numbers[local].tolist()
            for numbers in (plan.flips, plan.shifts, plan.jitters, plan.places, plan.stretches, plan.erased)
        )
        for row, (out, flip, crop, shift, jitter, place, stretch, (y, x, y_end, x_end)) in enumerate(
            zip(pixels, flips, plan.crops[local], shifts, jitters, places, stretches, erased, strict=True)
        ):
            indices[row], image = self._readable(int(planned[row]))
            down, across = self._put(out, image, crop, place, stretch, flip, shift, jitter)
            out[y:y_end, x:x_end] = self._fit.fill
            row_labels, row_visible = _project_axis(down, self._grid.rows, h, self._min_cells)
            column_labels, column_visible = _project_axis(across, self._grid.cols, label_width, self._min_cells)
            labels[row] = row_labels[:, None] * self._grid.cols + column_labels
            visible[row] = (row_visible[:, None] & column_visible).reshape(-1)
            valid[row, slice(*down.cells(h)), slice(*across.cells(w))] = True
        if self._hides < 1:
            visible &= ~self._hidden(labels, plan.erased[local], canvas)
        batch = {
            "image": pixels,
            "identity": self._identity[indices],
            "camera": self._camera[indices],
            "labels": labels,
            "visible": visible,
        }
        if self._fit.pads:
            batch["valid"] = valid
        # `_iterate` reports these in the main process.
        return batch | {"unread": np.where(planned != indices, planned, -1)} if self._skips else batch

    def _hidden(self, labels: np.ndarray, erased: np.ndarray, canvas: tuple[int, int]) -> np.ndarray:
        """Regions that lose more than data.erasing_hides of their cells: bool [b, P], from labels [b, h, w]."""

        def covered(start: np.ndarray, stop: np.ndarray, cells: int, length: int) -> np.ndarray:  # fractions [b, cells]
            edges = np.arange(cells + 1) / cells * length
            inside = np.minimum(edges[1:], stop[:, None]) - np.maximum(edges[:-1], start[:, None])
            return np.maximum(inside, 0) * (cells / length)

        (_, h, w), (top, left, bottom, right) = labels.shape, erased.T
        lost = covered(top, bottom, h, canvas[0])[:, :, None] * covered(left, right, w, canvas[1])[:, None, :]
        regions = labels[..., None] == np.arange(self._grid.count)
        return (lost[..., None] * regions).sum((1, 2)) > self._hides * regions.sum((1, 2))


class _EvalLoader(_Loader):
    def __init__(
        self, config: ConfigDict, split: Split, crop: str, gamma: float, batch: int, host_index: int, host_count: int
    ):
        super().__init__(config, split, batch, host_index, host_count)
        self._identity, self._camera = np.asarray(split.identity, np.int32), _cameras(split)
        self._crops = eval_crops(crop, gamma, len(split))
        self._canvas = int(config.data.height), int(config.data.width)
        self._shape = feature_map_shape(config)

    def __call__(self, number: int) -> Arrays:
        first = int(number) * self._batch + self._first
        count = max(0, min(self._count, len(self._split) - first))
        pixels = self._pixels(self._canvas)
        h, w = self._shape
        valid = np.zeros((self._count, h, w), bool)
        identity, camera = np.full(self._count, -1, np.int32), np.full(self._count, -1, np.int32)
        for row in range(count):
            down, across = self._put(pixels[row], self.read(first + row), self._crops[first + row])
            valid[row, slice(*down.cells(h)), slice(*across.cells(w))] = True
        pixels[count:] = 0
        identity[:count] = self._identity[first : first + count]
        camera[:count] = self._camera[first : first + count]
        batch = {"image": pixels, "identity": identity, "camera": camera, "real": np.arange(self._count) < count}
        return batch | {"valid": valid} if self._fit.pads else batch


def eval_crops(crop: str, gamma: float, count: int) -> list[Crop]:
    """The crops that `eval_batches` cuts from `count` images."""
    if crop in ("bilateral", "horizontal", "any"):
        # The key does not depend on config.seed: all runs are evaluated on the same crops.
        draws = uniform((0, 0, 3), 3 * count).reshape(-1, 3).tolist()
        return [draw_crop(crop, gamma, (a, b, c)) for a, b, c in draws]
    return [draw_crop(crop, gamma, (0.0, 0.0, 0.0))] * count


def eval_picture(split: Split, index: int, crop: Crop) -> np.ndarray:
    """A cropped image of the split for display, not resized: uint8 [h, w, 3]. Raises as `decode` does."""
    image = decode(split.read(index), split.names[index], split.upright)
    return cut(image, pixel_box(crop, *image.shape[:2]), flip=False)


def train_batches(
    config: ConfigDict,
    split: Split,
    start_step: int,
    total_steps: int,
    host_index: int = 0,
    host_count: int = 1,
) -> Generator[TrainBatch]:
    """This host's rows of the training batches of steps [start_step, total_steps) (Sections 3.3 and 3.4).

    Images are flipped, cropped and resized to the stage's input size as config.data says. Labels and the visible set
    are projected from the box of whole pixels that was cut.

    Args:
      config: of the experiment, checked by `vpm_jax.config.check`.
      split: the training images.
      start_step: the first step.
      total_steps: the step to stop before, at most the end of the schedule.
      host_index: this host, which loads contiguous rows of the global batch.
      host_count: the number of hosts, a divisor of the batch size.

    Returns:
      An iterator; `close()` ends its threads and processes.

    Raises:
      UserError: at once as `Sampler`, and for a batch that `host_count` does not divide; while iterating for an image
        that cannot be read.
      ValueError: for steps outside the schedule.
    """
    loader = _TrainLoader(config, split, host_index, host_count)
    end = loader._sampler.stages[-1].end_step
    if not 0 <= start_step <= total_steps <= end:
        raise ValueError(f"steps {start_step} to {total_steps} are not within the schedule's 0 to {end}")
    return _run(config, loader, start_step, total_steps)


def eval_batches(
    config: ConfigDict,
    split: Split,
    crop: str = "none",
    gamma: float = 1.0,
    host_index: int = 0,
    host_count: int = 1,
) -> Generator[EvalBatch]:
    """All images of the split in order, in batches of config.eval.batch, the last one padded.

    The random strategies ("bilateral", "horizontal", "any") draw the same numbers for an image at every gamma and in
    every run.

    Args:
      config: of the experiment, checked by `vpm_jax.config.check`.
      split: query or gallery.
      crop: one of vpm_jax.regions.CROPS; the default keeps images whole.
      gamma: the kept area ratio, in (0, 1].
      host_index: this host, which loads contiguous rows of every batch.
      host_count: the number of hosts, a divisor of config.eval.batch. All hosts get the same number of batches.

    Returns:
      An iterator; `close()` ends its threads and processes.

    Raises:
      UserError: at once for a batch that is empty or that `host_count` does not divide; while iterating for an image
        that cannot be read.
      ValueError: for an unknown crop or a gamma out of range.
    """
    batch = int(config.eval.batch)
    if batch < 1:
        raise UserError(f"config.eval.batch is {batch}, expected at least 1.")
    loader = _EvalLoader(config, split, crop, gamma, batch, host_index, host_count)
    return _run(config, loader, 0, -(-len(split) // batch))


def _begin_worker(worker_index: int, worker_count: int) -> None:
    """Makes a loader process end with the main process, even a killed one, but not by Ctrl-C, which reaches both."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _run(config: ConfigDict, loader: _Loader, start: int, stop: int) -> Generator[Any]:
    """Yields loader(start), ..., loader(stop - 1), computed ahead in threads and processes."""
    workers, count = int(config.data.workers), int(config.data.threads)
    count = count or min(8, -(-threads() // max(1, workers)))
    dataset = (
        grain.MapDataset.range(start, stop)
        .map(loader)
        .to_iter_dataset(grain.ReadOptions(num_threads=count, prefetch_buffer_size=2 * count))
    )
    if workers:
        if not flags.FLAGS.is_parsed():  # grain reads its flags when it starts processes
            flags.FLAGS.mark_as_parsed()
        # A loader that is stopped early leaves batches in shared memory. Python's tracker frees them with a warning.
        quiet = "ignore:resource_tracker"
        if quiet not in os.environ.get("PYTHONWARNINGS", ""):
            os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), quiet]))
        dataset = dataset.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2),
            worker_init_fn=_begin_worker,
        )
    batches = _iterate(dataset, loader, copy=workers > 0)
    _running.add(batches)
    return batches


def _iterate(dataset: grain.IterDataset, loader: _Loader, copy: bool) -> Generator[Any]:
    iterator = iter(dataset)
    unread: Counter[int] = Counter()
    try:
        for batch in iterator:
            for index in batch.pop("unread", np.empty(0)).tolist():
                if index >= 0:
                    if index not in unread:
                        _warn(loader, index)
                    unread[index] += 1
            # Copied out of the shared memory of a worker process.
            yield {key: np.array(value) for key, value in batch.items()} if copy else batch
    except UserError as error:
        raise UserError(str(error), code=error.code) from None  # drops the notes and frames that grain adds
    except RuntimeError as error:
        if "terminated unexpectedly" not in str(error):
            raise
        code = str(error).partition("exit code ")[2].partition(".")[0]
        raise UserError(
            f"A loader process died (exit code {code}; -9 usually means out of memory): "
            "run the same command again, with fewer config.data.workers if it dies again."
        ) from None
    finally:
        iterator.close()
        if unread:
            print(
                f"warning: {len(unread)} training images could not be read and were replaced {unread.total()} times.",
                file=sys.stderr,
            )


def _warn(loader: _Loader, index: int) -> None:
    try:
        loader.read(index)
    except UserError as error:
        print(f"warning: replaced an image by another of its identity: {error}", file=sys.stderr)


_running: weakref.WeakSet[Generator[Any]] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Ends the processes of iterators that were never closed, before the interpreter shuts down."""
    for batches in list(_running):
        with contextlib.suppress(ValueError):  # running in another thread
            batches.close()
