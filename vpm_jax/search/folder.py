"""Lists the images of a folder and extracts their features."""

from __future__ import annotations

import itertools
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from vpm_jax import images as images_lib
from vpm_jax.api import VPM
from vpm_jax.data import decode
from vpm_jax.description import Description
from vpm_jax.errors import UserError
from vpm_jax.images import Image
from vpm_jax.machine import threads
from vpm_jax.progress import Progress
from vpm_jax.regions import UNCUT, GalleryCrop
from vpm_jax.search.store import Entry

IMAGES = decode.SUFFIXES
Skip = Callable[[UserError], object]  # what to do about an image that cannot be read


def list_images(folder: Path) -> tuple[list[Entry], int]:
    """The images under a folder, by suffix (IMAGES) and sorted by relative path, and the number of other files.

    Images of unsupported formats are among them: reading them gives the reason. Hidden files and folders are skipped;
    links are followed.

    Raises:
      UserError: if a folder cannot be read or there is no image.
    """

    def stop(error: OSError) -> None:
        raise UserError(f"{error.filename} cannot be read ({error.strerror}): expected a folder of images.")

    entries, others, seen = [], 0, set()
    for parent, folders, files in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(parent)
        folders[:] = [name for name in folders if not name.startswith(".") and real not in seen]
        if real in seen:  # links may form a cycle
            continue
        seen.add(real)
        for name in files:
            if name.startswith("."):
                continue
            if not name.lower().endswith((*IMAGES, *decode.UNSUPPORTED)):
                others += 1
                continue
            path = os.path.join(parent, name)
            try:
                status = os.stat(path)
            except OSError:  # a broken link: reading it reports the error
                entries.append(Entry(os.path.relpath(path, folder)))
            else:
                entries.append(Entry(os.path.relpath(path, folder), status.st_size, status.st_mtime_ns))
    if not entries:
        raise UserError(
            f"{folder} holds no images ({others} other files): expected files that end in {', '.join(IMAGES)}."
        )
    return sorted(entries), others


def report(error: UserError) -> None:
    print(f"skipped: {error}", file=sys.stderr)


def describe(
    model: VPM,
    entries: list[Entry],
    image_of: Callable[[str], Image],
    batch: int = 64,
    kept: GalleryCrop = UNCUT,
    skip: Skip = report,
    progress: Progress | None = None,
) -> Iterator[tuple[list[Entry], Description]]:
    """Describes images, cropped to `kept`, in batches.

    Args:
      image_of: the image of an entry's name.
      skip: called with the error of each image that cannot be read.
      progress: of all entries.
    """
    ready: deque[Entry] = deque()

    def read(entry: Entry) -> np.ndarray | UserError:
        try:
            return images_lib.read(image_of(entry.name), entry.name, kept.crop)
        except UserError as error:
            return error

    def pixels() -> Iterator[np.ndarray]:
        images = iter(entries)
        with ThreadPoolExecutor(threads(), "vpm_jax-read") as pool:
            while chunk := list(itertools.islice(images, batch)):
                for entry, image in zip(chunk, pool.map(read, chunk), strict=True):
                    if isinstance(image, UserError):
                        if progress is not None:
                            progress.total -= 1
                        skip(image)
                    else:
                        ready.append(entry)
                        yield image

    for description in model.stream(pixels(), batch):
        yield [ready.popleft() for _ in range(len(description))], description
        if progress is not None:
            progress.add(len(description))
