"""Packs what a machine without network needs: .gpu1 (scripts, wheels, weights) and .gpu2 (images) in the checkout.

    python launch/short_lease/pack.py --data data

Images keep their bytes; of junk (identity -1), which nothing decodes, only the names are packed, except those few by
which results recognize their data. Takes one to three minutes of one core.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np
from export import halved

from vpm_jax import cli, pretrained
from vpm_jax import config as config_lib
from vpm_jax.data.inventory import Inventory
from vpm_jax.data.sources import load_dataset
from vpm_jax.errors import UserError
from vpm_jax.pretrained import own
from vpm_jax.reproduce import results

HERE = Path(__file__).resolve().parent
DATASET = "Market-1501-v15.09.15"
SPLITS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
# Container images with JAX lack these.
NEEDED = (
    "grain==0.2.18",
    "array_record==0.8.6",
    "cloudpickle==3.1.3",
    "ml-collections==1.1.0",
    "simplejpeg==1.9.0",
    "portpicker==1.6.0",
)
# Installed only where the machine's own versions fail the check.
SPARE = ("flax==0.12.12", "optax==0.2.8", "orbax-checkpoint==0.12.8")
PLATFORMS = (*(f"manylinux_2_{n}_x86_64" for n in (28, 27, 24, 17)), "manylinux2014_x86_64", "manylinux1_x86_64")


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(prog="python launch/short_lease/pack.py", description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help=f"the folder of {DATASET} and of the weights")
    parser.add_argument("--weights", default="keras", help='as config.pretrained; "none": train from scratch')
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to pack, instead of downloading them")
    parser.add_argument("--python", default="3.12", help="the machine's Python, for the wheels (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=64, help="MiB that the machine takes at a time (default: 64)")
    parser.add_argument("--repo", type=Path, default=HERE.parents[1], help="the checkout (default: this one)")
    args = parser.parse_args(argv)
    images = find_images(args.data / DATASET)
    pack_first(args, images)
    pack_images(empty(args.repo / ".gpu2"), images, recognized(args.data))
    tree = sum(path.lstat().st_size for path in tracked(args.repo))
    for folder in (args.repo / ".gpu1", args.repo / ".gpu2"):
        check_size(folder, tree, args.limit)
    return 0


def find_images(dataset: Path) -> dict[str, list[Path]]:
    """{"train", "query", "gallery": paths}. Raises UserError if one of them has no images."""
    images = {split: sorted((dataset / folder).glob("*.jpg")) for split, folder in SPLITS.items()}
    if missing := [SPLITS[split] for split, paths in images.items() if not paths]:
        raise UserError(
            f"{dataset} has no images in {', '.join(missing)}: give --data the folder that holds {DATASET} (unzipped)."
        )
    return images


def counts(images: dict[str, list[Path]]) -> dict[str, int]:
    """What the length of training and evaluation is estimated from; junk is not ranked."""
    return {
        "train": len(images["train"]),
        "identities": len({path.name[:4] for path in images["train"]}),
        "query": len(images["query"]),
        "gallery": sum(not is_junk(path) for path in images["gallery"]),
    }


def is_junk(path: Path) -> bool:
    return path.name.startswith("-1")


def recognized(data: Path) -> set[str]:
    """The gallery images whose bytes are part of a result's digest of its test set, FOLDER/NAME."""
    config = config_lib.default().data.copy_and_resolve_references()
    config.name, config.root = "market1501", str(data / DATASET)
    return set(Inventory.of(load_dataset(config).gallery).checksums)


def pack_first(args: argparse.Namespace, images: dict[str, list[Path]]) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        npz = Path(temporary) / "weights.npz"
        if args.weights != "none":  # first, to report missing weights at once
            own.write_npz(npz, halved(pretrained.load(args.weights, args.data, key="--weights")))
        folder = empty(args.repo / ".gpu1")
        if npz.exists():
            with np.load(npz) as arrays:
                np.savez_compressed(folder / "imagenet.npz", **arrays)
    for script in HERE.glob("*.py"):
        if script.name not in ("pack.py", "join.py"):
            shutil.copy(script, folder)
    if args.wheels:
        shutil.copytree(args.wheels, folder / "wheels")
    else:
        download(NEEDED, folder / "wheels", args.python)
        download(SPARE, folder / "spare", args.python)
    facts = {"commit": results.commit(), "counts": counts(images)}
    (folder / "packed.json").write_text(json.dumps(facts))


def download(packages: Iterable[str], folder: Path, python: str) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, "--dest", str(folder)]
    for platform in PLATFORMS:
        command += ["--platform", platform]
    if subprocess.run([*command, *packages]).returncode:
        raise UserError("pip could not download the wheels (its message is above): try again, or give --wheels FOLDER.")


def pack_images(folder: Path, images: dict[str, list[Path]], kept: Collection[str]) -> None:
    with tarfile.open(folder / "images.tar.xz", "w:xz", preset=1) as tar:
        for path in (path for paths in images.values() for path in paths):
            name = f"{path.parent.name}/{path.name}"
            data = b"" if is_junk(path) and name not in kept else path.read_bytes()
            member = tarfile.TarInfo(f"{DATASET}/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    count = sum(map(len, images.values()))
    (folder / "packed.json").write_text(json.dumps({"images": count}))
    print(f"{count:,} images")


def empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def tracked(repo: Path) -> list[Path]:
    """The files of the working tree that travel with every command: tracked, or not ignored."""
    command = ["git", "-C", str(repo), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, capture_output=True, text=True)
    if listed.returncode:
        raise UserError(f"--repo {repo} is not a git checkout ({listed.stderr.strip()}).")
    return [path for name in listed.stdout.split("\0") if name and (path := repo / name).is_file()]


def check_size(folder: Path, tree: int, limit: float) -> None:
    """Prints a folder's size. Raises UserError if it is too large to travel with the working tree."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    total = (size + tree) / 2**20
    line = f"{folder.name}: {size / 2**20:.1f} MiB + working tree {tree / 2**20:.1f} MiB = {total:.1f} of {limit:g} MiB"
    if total >= limit:
        raise UserError(f"{line}: too much. Remove or ignore large files of the working tree, or raise --limit.")
    print(line)


if __name__ == "__main__":
    cli.run(main)
