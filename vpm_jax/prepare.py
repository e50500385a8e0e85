"""Converts a dataset's folder, official zip or CSV to ArrayRecord: a few large files instead of tens of thousands.

    python -m vpm_jax.prepare market1501 --source Market-1501-v15.09.15.zip --output data

writes `data/market1501/1.0.0/`; set `config.data.root` to it or to `data`. Encoded images are copied unchanged, and
those that cannot be decoded are reported. An existing folder is never changed; it is an error if its images differ from
those of --source.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from vpm_jax import cli
from vpm_jax.config import default
from vpm_jax.data.datasets import TITLES
from vpm_jax.data.decode import decode
from vpm_jax.data.inventory import Inventory
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
        help="folder, zip or CSV, or a folder that contains it (default: $VPM_DATA or ./data)",
    )
    parser.add_argument(
        "--output", default="", metavar="DIR", help="where to create DATASET/VERSION/ (default: $VPM_DATA or ./data)"
    )
    args = parser.parse_args(argv)
    if args.dataset not in TITLES:
        raise UserError(f"The dataset is {args.dataset!r}, expected one of {', '.join(TITLES)}.")

    from vpm_jax.data import arrayrecord  # TFDS takes a second to import

    output = data_root(args.output)
    folder = arrayrecord.folder_of(output, args.dataset)
    if folder.exists():
        dataset = _load(args.dataset, str(folder))
        compared = f"not compared with {args.source}, which does not exist" if args.source else "no --source to compare"
        if args.source and data_root(args.source).exists():
            compared = f"the same images as {args.source}"
            if differences := _differences(dataset, _load(args.dataset, args.source)):
                raise UserError(
                    f"{folder} was prepared from other images ({_sizes(dataset)}) than those of {args.source} "
                    f"({differences}): choose another --output, or delete that folder first."
                )
        print(
            f"Already prepared: {folder} ({_sizes(dataset)}), {compared}. To prepare it again, delete that folder "
            "first."
        )
        return

    cli.check_folder("--output", output)
    dataset = _load(args.dataset, args.source)
    print(*dataset.notes, sep="\n")
    start = time.monotonic()
    damaged: list[str] = []

    def inspect(image: bytes, name: str) -> None:
        try:
            decode(image, name)
        except UserError as error:
            damaged.append(str(error))

    arrayrecord.write(
        dataset, output, lambda images, name: tqdm(images, desc=f"{name:>7}", unit=" images", disable=None), inspect
    )
    print(f"Prepared {folder} in {time.monotonic() - start:.1f} s ({_sizes(dataset)}).")
    if len(dataset.train):
        holdout = "" if len(dataset.query) else " --config.data.holdout_identities=N"
        print(f"Train from it with --config.data.name={args.dataset} --config.data.root={folder}{holdout}")
    else:
        print(f"Evaluate on it with python -m vpm_jax.evaluate --workdir RUN --dataset {args.dataset} --root {folder}")
    for sentence in damaged[:10]:
        print(f"warning: {sentence}", file=sys.stderr)
    if damaged:
        print(f"warning: images that cannot be decoded, copied unchanged: {len(damaged)}.", file=sys.stderr)
    for leftover in sorted(folder.parent.glob("incomplete.*")):
        print(f"{leftover} is left over from a killed process and can be deleted.")


def _load(name: str, root: str) -> Dataset:
    config = default().data
    config.name, config.root = name, root
    return load_dataset(config, preparing=True)


def _differences(prepared: Dataset, source: Dataset) -> str:
    """How the source differs from the prepared images, in words; "" if it does not. Compares a few contents only."""
    for name in ("train", "query", "gallery"):
        a, b = getattr(prepared, name), getattr(source, name)
        before, now = Inventory.of(a), Inventory.of(b)
        if before != now:
            return f"{name}: {before.differences(now) or 'other images under the same names'}"
        if not np.array_equal(a.identity, b.identity) or not np.array_equal(a.camera, b.camera):
            return f"{name}: other identities or cameras"
    return ""


def _sizes(dataset: Dataset) -> str:
    training = f"{len(dataset.train):,} training, " if len(dataset.train) else ""
    return f"{training}{len(dataset.query):,} query and {len(dataset.gallery):,} gallery images"


if __name__ == "__main__":
    cli.run(main)
