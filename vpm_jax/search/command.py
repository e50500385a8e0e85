"""Search your own pictures with a partial one.

    python -m vpm_jax.search index FOLDER --workdir runs/synthetic --index STORE
    python -m vpm_jax.search query IMAGE... --index STORE --top 20

`index` describes every image of a folder, and of the folders in it, into a feature store: again after a change, it
describes what is new or changed and drops what is gone; stopped or killed, it goes on. `query` ranks the images of a
store by Eq. 4.

With --crops, every image is described cropped too, and a query meets the crop that shows what it seems to show itself:
better for partial queries (docs/results), with as many times the work and the disk.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from vpm_jax import cli
from vpm_jax import config as config_lib
from vpm_jax.api import VPM
from vpm_jax.errors import UserError
from vpm_jax.regions import UNCUT, Part, gallery_parts
from vpm_jax.runs.logs import write_atomically
from vpm_jax.search import answers as answers_lib
from vpm_jax.search.answers import Answer, numbers, printable
from vpm_jax.search.folder import IMAGES, describe, list_images
from vpm_jax.search.store import DTYPES, About, Entry, Store, Writer

_COMMIT_SECONDS = 5.0  # what a kill can lose


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m vpm_jax.search",
        description=__doc__,
        epilog="Exit codes: 0 done; 1 an error, in one sentence; 3 done but for what was named on stderr: images that\n"
        "cannot be read (index), queries that show no region (query).",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="index | query")
    one = commands.add_parser(
        "index", help="describe the images of a folder", description="Describe a folder's images."
    )
    one.add_argument("folder", type=Path, metavar="FOLDER", help=f"with images ({', '.join(IMAGES)}) at any depth")
    one.add_argument("--index", type=Path, required=True, metavar="STORE", help="the folder of the feature store")
    cli.add_model(one)
    one.add_argument(
        "--crops",
        type=_gammas,
        metavar="GAMMAS",
        help="describe crops that keep these shares too, as 0.5,0.6,0.7,0.8,0.9, or none "
        "(default: the store's, or of a new one the model's match.gallery_gammas)",
    )
    one.add_argument("--dtype", choices=DTYPES, default="float16", help="of a new store (default: %(default)s)")
    one.add_argument("--batch", type=_positive, default=64, help="images computed together (default: %(default)s)")
    two = commands.add_parser("query", help="rank the images of a store", description="Rank the images of a store.")
    two.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="a picture of a person, or of a part of one")
    two.add_argument("--index", type=Path, required=True, metavar="STORE", help="the folder of the feature store")
    cli.add_model(two)
    two.add_argument("--top", type=_positive, default=20, help="how many images to rank (default: %(default)s)")
    two.add_argument("--json", metavar="FILE", help="write the ranking for programs; - is the standard output")
    two.add_argument("--html", type=Path, metavar="FILE", help="write a page with the pictures, self-contained")
    for word in sys.argv[1:] if argv is None else argv:
        if word.startswith("-") and os.path.isfile(word):  # as the names of Market-1501's junk do
            raise UserError(f"{word} is a file whose name begins as options do: write ./{word}.")
    args = parser.parse_args(argv)
    model = args.workdir or args.model
    if args.command == "index":
        try:
            return index(args.folder, args.index, model, args.dtype, args.batch, args.crops)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("Interrupted: run the same command to go on.") from None
    return query(args.images, args.index, model, args.top, args.json, args.html)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number from 1")
    return int(text)


def _gammas(text: str) -> tuple[float, ...]:
    try:
        gammas = () if text == "none" else tuple(float(number) for number in text.split(","))
        if all(0 < gamma < 1 for gamma in gammas):
            return gammas
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}, expected numbers between 0 and 1 as 0.5,0.75, or none")


# ---- Index ----


def index(
    folder: Path,
    store: Path,
    model_path: Path | None,
    dtype: str = "float16",
    batch: int = 64,
    gammas: tuple[float, ...] | None = None,
) -> int:
    """Makes `store` hold what the model says of every image under `folder`; the exit code.

    `gammas` are the crops that it describes too; None for those that the store has, or the model asks for.

    Raises:
      UserError: for a folder without images, a store of another folder or model, crops that the model cannot be
        searched by, or a disk that is full.
    """
    cli.check_folder("--index", store)
    found, others = list_images(folder)
    there = Store(store) if (store / "store.json").exists() else None
    if there is not None:
        _check_root(there, folder)
    model_path = model_path or _model_of(there, store)
    model = VPM.load(model_path)
    root = str(folder.resolve())
    nothing = model.features([])
    parts = _parts(model, there, gammas)

    def extra(done: Collection[Part] = ()) -> dict[str, Any]:
        told = [[part.side, part.gamma, part in done] for part in parts]
        return {"folder": root, "model": str(model_path.resolve()), "parts": told}

    about = About(
        model=model.fingerprint,
        config=config_digest(model),
        regions=nothing.features.shape[1],
        channels=nothing.features.shape[2],
        dtype=there.about.dtype if there is not None else dtype,
        extra=extra(),
    )
    with Writer(store, about) as writer:
        for part in answers_lib.parts(there) if there is not None else ():
            if part not in parts:
                shutil.rmtree(answers_lib.part_folder(store, part), ignore_errors=True)
        news = _update(writer, model, folder, found, batch)
        done, most_lost = [], 0
        for part in parts:
            with Writer(answers_lib.part_folder(store, part), about) as other:
                lost = _update(other, model, folder, Store(store).entries, batch, part)["unreadable"]
            if not lost:
                done.append(part)
            most_lost = max(most_lost, lost)
            writer.about = dataclasses.replace(writer.about, extra=extra(done))
            writer.commit()
    unreadable = news["unreadable"]
    said = ", ".join(f"{number} {word}" for word, number in news.items() if number) or "nothing changed"
    cropped = f" Also cropped: {', '.join(map(str, done))}." if done else ""
    total = len(Store(store))
    print(f"{store}: {total} images of {printable(root)} ({said}; {others} other files left out).{cropped}")
    if unreadable:
        print(f"{unreadable} of {len(found)} images could not be read and were skipped.", file=sys.stderr)
    if most_lost:
        print(f"{most_lost} of {total} images went while they were described: index again.", file=sys.stderr)
    return cli.INCOMPLETE if unreadable or most_lost else 0


def _parts(model: VPM, there: Store | None, gammas: tuple[float, ...] | None) -> list[Part]:
    """The crops to describe beside whole images."""
    config = model.config.copy_and_resolve_references()
    if gammas is not None:
        config.match.gallery_gammas = gammas
    elif there is not None and "parts" in there.about.extra:
        return list(answers_lib.parts(there))
    config.match.rerank, config.eval.crop = False, "none"  # a search does neither
    config_lib.check_gallery_gammas(config)
    return gallery_parts(config_lib.sides(config), config.match.gallery_gammas)[1:]


def _update(
    writer: Writer, model: VPM, folder: Path, found: list[Entry], batch: int, part: Part = UNCUT
) -> dict[str, int]:
    """Makes a store hold these images of the folder, and no others: how many were new, changed, deleted, unreadable."""
    before = {entry.name: entry for entry in Store(writer.folder).entries}
    fresh = [entry for entry in found if before.get(entry.name) != entry]
    changed = sum(entry.name in before for entry in fresh)
    names = {entry.name for entry in found}
    gone = sum(name not in names for name in before)
    stale = {entry.name for entry in fresh}
    writer.keep(np.array([name in names and name not in stale for name in before], bool))
    skipped, committed = {entry.name for entry in fresh}, time.monotonic()
    for some, described in describe(model, folder, fresh, batch, part):
        writer.append(some, described.features, described.visibility)
        skipped.difference_update(entry.name for entry in some)
        if time.monotonic() - committed > _COMMIT_SECONDS:
            writer.commit()
            committed = time.monotonic()
    writer.commit()
    unreadable = len(skipped)
    changed -= len(skipped & before.keys())
    return {"new": len(fresh) - unreadable - changed, "changed": changed, "deleted": gone, "unreadable": unreadable}


def _check_root(store: Store, folder: Path) -> None:
    """Refuses a store of another folder, unless that one has moved."""
    root = store.path("folder")
    if root and root.is_dir() and not root.samefile(folder):
        raise UserError(f"{store.folder} is the index of {root}: give that folder, or another --index.")


def _model_of(store: Store | None, folder: Path) -> Path:
    path = store.path("model") if store is not None else None
    if path is None:
        raise UserError(f"{folder} names no model: give --workdir RUN, the folder of a training run, or --model FILE.")
    return path


def config_digest(model: VPM) -> str:
    """16 hexadecimal digits of the model's whole config."""
    return hashlib.sha256(config_lib.to_json(model.config).encode()).hexdigest()[:16]


# ---- Query ----


def query(
    images: Sequence[Path],
    store: Path,
    model_path: Path | None,
    top: int = 20,
    json_file: str | None = None,
    html_file: Path | None = None,
) -> int:
    """Prints and writes the rankings of the store's images for each query; the exit code.

    Raises:
      UserError: for an image that cannot be read, a store that is damaged or empty, or one of another model.
    """
    for flag, file in (("--json", json_file if json_file != "-" else None), ("--html", html_file)):
        if file:
            cli.check_output(flag, Path(file))
    there = Store(store)
    if not len(there):
        raise UserError(f"{store} holds no images yet: run python -m vpm_jax.search index.")
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(there.verify)  # while the model is loaded: wrong bytes would rank wrongly, in silence
        model = VPM.load(model_path or _model_of(there, store))
        whole.result()
    answers = answers_lib.search(model, there, images, top)
    if json_file:
        text = json.dumps(answers_lib.record(model, there, answers), indent=1, allow_nan=False) + "\n"
        if json_file == "-":
            print(text, end="")
        else:
            write_atomically(Path(json_file), text)
    if html_file:
        write_atomically(html_file, answers_lib.page(model, there, answers))
    if json_file != "-":
        _print(answers, answers_lib.numbering(model.grid))
    empty = [answer for answer in answers if not answer.results]
    for answer in empty:
        print(f"{answer.path} shares no visible region with any image: there is nothing to rank.", file=sys.stderr)
    return cli.INCOMPLETE if empty else 0


def _print(answers: list[Answer], numbering: str) -> None:
    for answer in answers:
        count, shown = answer.query.visibility.shape[1], numbers(answer.visible)
        with_part = answers_lib.compared(answer)
        print(f"\n{printable(answer.path)} shows regions {shown} of 0 to {count - 1} ({numbering}){with_part}.")
        if not answer.results:
            continue
        width = max(4 * count, len("share of each region, %"))
        print(f"rank  distance  {'share of each region, %':{width}}  image")
        for rank, result in enumerate(answer.results, 1):
            shares = "".join(f"{100 * weight:4.0f}" for weight in result.weight)
            print(f"{rank:4}  {result.distance:8.4f}  {shares:{width}}  {printable(result.name)}")
