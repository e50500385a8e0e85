"""Turns a dataset's folder, official zip or CSV into ArrayRecord: a few large files instead of tens of thousands.

    python -m vpm_jax.prepare market1501 --source Market-1501-v15.09.15.zip --output data

writes `data/market1501/1.0.0/`, which `config.data.root` may name, or find below `data`. The images stay the bytes
they are; those that cannot be decoded are named. The folder appears whole or not at all, and is left alone if it
exists; one of other images than --source lists is an error.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vpm_jax import cli
from vpm_jax.config import default
from vpm_jax.data.datasets import TITLES
from vpm_jax.data.sources import data_root, load_dataset
from vpm_jax.data.split import Dataset
from vpm_jax.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser(prog="python -m vpm_jax.prepare", description=__doc__)
    parser.add_argument("dataset", help=", ".join(TITLES))
    parser.add_argument(
        "--source",
        default="",
        metavar="PATH",
        help="folder, zip or CSV, or a folder that holds it; default $VPM_DATA or ./data",
    )
    parser.add_argument(
        "--output", default="", metavar="DIR", help="gets DATASET/VERSION/ inside; default $VPM_DATA or ./data"
    )
    args = parser.parse_args(argv)
    if args.dataset not in TITLES:
        raise UserError(f"The dataset is {args.dataset!r}, but the known ones are {', '.join(TITLES)}.")

    from tqdm import tqdm

    from vpm_jax.data import arrayrecord
    from vpm_jax.data.decode import decode

    output = data_root(args.output)
    folder = arrayrecord.folder_of(output, args.dataset)
    if folder.exists():
        dataset = _load(args.dataset, str(folder))
        # A source that is gone is asked nothing.
        if args.source and Path(args.source).exists() and not _same(dataset, _load(args.dataset, args.source)):
            raise UserError(
                f"{folder} was prepared from other images ({_sizes(dataset)}) than {args.source} lists: choose another "
                "--output, or delete that folder first."
            )
        print(f"Already prepared: {folder} ({_sizes(dataset)}). To prepare it again, delete that folder first.")
        return

    cli.check_folder("--output", output)
    dataset = _load(args.dataset, args.source)
    print(*dataset.notes, sep="\n")
    start = time.monotonic()
    damaged: list[str] = []

    def look(image: bytes, name: str) -> None:
        try:
            decode(image, name)
        except UserError as error:
            damaged.append(str(error))

    arrayrecord.write(dataset, output, lambda images, name: tqdm(images, desc=f"{name:>7}", unit=" images"), look)
    print(f"Prepared {folder} in {time.monotonic() - start:.1f} s ({_sizes(dataset)}).")
    if len(dataset.train):
        held = "" if len(dataset.query) else " --config.data.holdout_identities=N"
        print(f"Train from it with --config.data.name={args.dataset} --config.data.root={folder}{held}")
    else:
        print(f"Evaluate on it with python -m vpm_jax.evaluate --workdir RUN --dataset {args.dataset} --root {folder}")
    for sentence in damaged[:10]:
        print(f"warning: {sentence}", file=sys.stderr)
    if damaged:
        print(f"warning: {len(damaged)} of the images cannot be decoded and were kept as they are.", file=sys.stderr)
    for left in sorted(folder.parent.glob("incomplete.*")):
        print(f"{left} was left by a run that was killed, and may be deleted.")


def _load(name: str, root: str) -> Dataset:
    config = default().data
    config.name, config.root = name, root
    return load_dataset(config, preparing=True)


def _same(prepared: Dataset, source: Dataset) -> bool:
    """Whether both list the same images; of their pixels the first ones are compared."""
    for split in ("train", "query", "gallery"):
        one, other = getattr(prepared, split), getattr(source, split)
        if one.names != other.names or not np.array_equal(one.identity, other.identity):
            return False
        if (one.camera is None) != (other.camera is None) or not np.array_equal(one.camera, other.camera):
            return False
        if len(one) and one.read(0) != other.read(0):
            return False
    return True


def _sizes(dataset: Dataset) -> str:
    training = f"{len(dataset.train):,} training, " if len(dataset.train) else ""
    return f"{training}{len(dataset.query):,} query and {len(dataset.gallery):,} gallery images"


if __name__ == "__main__":
    cli.run(main)
