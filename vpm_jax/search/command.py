"""Searches a folder of images with a partial query image.

    python -m vpm_jax.search index FOLDER --workdir runs/synthetic --index STORE
    python -m vpm_jax.search query IMAGE... --index STORE --top 20
    python -m vpm_jax.search serve --index STORE

`index` extracts the features of every image under a folder into a feature store. Run it again to process new and
changed files and to drop deleted ones, or to continue after an interruption. `query` ranks the store by Eq. 4. `serve`
does so on a page in the browser.

With --crops, `index` also stores crops of every image, and each query is compared with the crop closest to it. This
improves partial queries (docs/results), at a multiple of the time and disk space.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from vpm_jax import cli
from vpm_jax.disk import write_atomically
from vpm_jax.errors import UserError, optional, printable
from vpm_jax.geometry import KNOWN_PLACES
from vpm_jax.search import ranking as ranking_lib
from vpm_jax.search.folder import IMAGES
from vpm_jax.search.gallery import Gallery, stored_crops
from vpm_jax.search.ranking import Ranking, region_numbers
from vpm_jax.search.store import DTYPES
from vpm_jax.thresholds import RATES, Thresholds


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.Parser(
        prog="python -m vpm_jax.search",
        description=__doc__,
        epilog="Exit codes: 0 success; 1 an error; 3 success, except for images that cannot be read (index) or\n"
        "queries without results (query), which are listed on stderr.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="index | query | serve")
    indexing = commands.add_parser(
        "index", help="index the images of a folder", description="Index the images of a folder."
    )
    querying = commands.add_parser(
        "query", help="rank the images of a store", description="Rank the images of a store."
    )
    serving = commands.add_parser(
        "serve",
        help="a page to search with",
        description="Serve a page to search with, and the same as JSON (/openapi.json), until Ctrl-C.",
    )
    for command in (indexing, querying, serving):
        command.add_argument(
            "--index", type=cli.path, required=True, metavar="STORE", help="the folder of the feature store"
        )
        cli.add_model(command)
    indexing.add_argument("folder", type=cli.path, metavar="FOLDER", help=f"images ({', '.join(IMAGES)}) at any depth")
    indexing.add_argument(
        "--crops",
        type=_gammas,
        metavar="GAMMAS",
        help="gammas of the crops to index, such as 0.5,0.6,0.7,0.8,0.9, or none "
        "(default: those of the store; for a new store, the model's match.gallery_gammas)",
    )
    indexing.add_argument("--dtype", choices=DTYPES, default="float16", help="of a new store (default: %(default)s)")
    indexing.add_argument("--batch", type=cli.positive, default=64, help="images per batch (default: %(default)s)")
    indexing.add_argument(
        "--reduce",
        type=int,
        metavar="D",
        help="also store features of D numbers per image, such as 256, for query --candidates; 0 removes them",
    )
    querying.add_argument(
        "images", type=cli.path, nargs="+", metavar="IMAGE", help="a whole or partial image of a person"
    )
    querying.add_argument(
        "--top", type=cli.positive, default=20, help="number of images to rank (default: %(default)s)"
    )
    limit = querying.add_mutually_exclusive_group()
    limit.add_argument("--max-distance", type=float, metavar="D", help="show only images nearer than this")
    limit.add_argument(
        "--false-match-rate",
        type=float,
        choices=RATES,
        metavar="RATE",
        help="show only images nearer than the distance that python -m vpm_jax.threshold measured for this rate and "
        f"for what the query shows: {', '.join(f'{rate:g}' for rate in RATES)}",
    )
    querying.add_argument(
        "--thresholds",
        type=cli.path,
        metavar="FILE",
        help="of --false-match-rate (default: the run's thresholds.json)",
    )
    querying.add_argument(
        "--place",
        choices=KNOWN_PLACES,
        help="which part of a person the images show; without it, a model of padded images (data.fit=pad) takes them "
        "for the part at data.place",
    )
    querying.add_argument(
        "--json", type=os.path.expanduser, metavar="FILE", help="write the ranking as JSON; - writes to standard output"
    )
    querying.add_argument("--html", type=cli.path, metavar="FILE", help="write a self-contained page with the images")
    serving.add_argument(
        "--host", default="127.0.0.1", help="a name or address of this machine, 0.0.0.0 for all (default: %(default)s)"
    )
    serving.add_argument("--port", type=_port, default=8000, help="0: any that is free (default: %(default)s)")
    serving.add_argument(
        "--token",
        help="a token that requests must carry (default: none on the loopback; elsewhere one is generated and printed)",
    )
    serving.add_argument(
        "--thresholds", type=cli.path, metavar="FILE", help="of false match rates (default: the run's thresholds.json)"
    )
    for command in (querying, serving):
        command.add_argument(
            "--candidates",
            type=cli.positive,
            metavar="N",
            help="compare only the N nearest by the features of index --reduce, such as 1000: fast in large galleries",
        )
    for argument in sys.argv[1:] if argv is None else argv:
        if argument.startswith("-") and os.path.isfile(argument):  # such as Market-1501's junk, -1_c1s1_...
            raise UserError(f"{argument} is a file whose name starts like an option: write ./{argument}.")
    args = parser.parse_args(argv)
    args.model = args.workdir or args.model
    try:
        return {"index": index, "query": query, "serve": serve}[args.command](args)
    except KeyboardInterrupt:
        if args.command != "index":
            raise
        raise KeyboardInterrupt("Interrupted: run the same command to continue.") from None


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a port: a number from 0 to 65535")
    return int(text)


def _gammas(text: str) -> tuple[float, ...]:
    try:
        gammas = () if text == "none" else tuple(float(number) for number in text.split(","))
        if all(0 < gamma < 1 for gamma in gammas):
            return gammas
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r}, expected numbers between 0 and 1, such as 0.5,0.75, or none")


# ---- Index ----


def index(args: argparse.Namespace) -> int:
    """Brings a store up to date with the images of a folder; returns the exit code.

    Raises:
      UserError: for a folder without images, a store of another folder or model, crops that the model does not
        support, or a full disk.
    """
    cli.check_folder("--index", args.index)
    if args.model is None and not (args.index / "store.json").exists():
        raise UserError(
            f"{args.index} records no model: give --workdir RUN, the folder of a training run, or --model FILE."
        )
    gallery = Gallery.open(args.index, args.model, args.crops, args.dtype)
    update = gallery.index(args.folder, args.crops, args.batch)
    if args.reduce is not None:
        gallery.reduce(args.reduce)
    assert gallery.store is not None
    total, unreadable, lost = len(gallery), update.unreadable, update.lost
    counts = {word: getattr(update, word) for word in ("new", "changed", "deleted", "unreadable")}
    summary = ", ".join(f"{number} {word}" for word, number in counts.items() if number) or "nothing changed"
    complete = [str(crop) for crop, done in stored_crops(gallery.store).items() if done]
    cropped = f" Crops: {', '.join(complete)}." if complete else ""
    root = printable(args.folder.resolve())
    print(f"{args.index}: {total} images of {root} ({summary}; {update.others} other files skipped).{cropped}")
    if unreadable:
        print(f"{unreadable} of {total + unreadable} images could not be read and were skipped.", file=sys.stderr)
    if lost:
        print(f"{lost} of {total} images disappeared during indexing: index again.", file=sys.stderr)
    return cli.INCOMPLETE if unreadable or lost else 0


# ---- Query ----


def query(args: argparse.Namespace) -> int:
    """Prints and writes the ranking of the store for each query image; returns the exit code.

    Raises:
      UserError: for an image that cannot be read, a store that is damaged, empty or of another model, or a place if
        the model does not pad images.
    """
    for flag, file in (("--json", args.json if args.json != "-" else None), ("--html", args.html)):
        if file:
            cli.check_output(flag, Path(file))
    gallery = Gallery.open(args.index, args.model, candidates=args.candidates)
    if args.place is not None and not gallery.model.places:
        raise UserError(f"--place {args.place}: {gallery.model.source} stretches images to its input; leave it out.")
    rankings = gallery.query(
        args.images, args.top, args.max_distance, args.false_match_rate, args.thresholds, args.place
    )
    model, store = gallery.model, gallery.store
    assert store is not None
    if args.json:
        text = json.dumps(ranking_lib.record(model, store, rankings), indent=1, allow_nan=False) + "\n"
        if args.json == "-":
            print(text, end="")
        else:
            write_atomically(Path(args.json), text)
    if args.html:
        write_atomically(args.html, ranking_lib.page(model, store, rankings))
    if args.json != "-":
        _print(rankings, ranking_lib.numbering(model.grid))
    if changed := {result.name for ranking in rankings for result in ranking.results if result.changed}:
        names = printable(", ".join(sorted(changed)[:3]) + ", ..." * (len(changed) > 3))
        print(f"Images that have changed since they were indexed: {names}: index again.", file=sys.stderr)
    for ranking in rankings:
        for part in ranking_lib.unfamiliar(model, ranking):
            print(
                f"warning: {printable(ranking.name)} seems to show {part}, which no training crop of this model did: "
                "its ranking may be poor; use a model trained with data.crop=any.",
                file=sys.stderr,
            )
    empty = [ranking for ranking in rankings if not ranking.results]
    for ranking in empty:
        print(f"{printable(ranking.name)} {ranking_lib.nothing(ranking)}.", file=sys.stderr)
    return cli.INCOMPLETE if empty else 0


def _print(rankings: list[Ranking], numbering: str) -> None:
    for ranking in rankings:
        count, visible = ranking.query.visibility.shape[1], region_numbers(ranking.visible)
        crop = ranking_lib.compared_with(ranking)
        print(f"\n{printable(ranking.name)} shows regions {visible} of 0 to {count - 1} ({numbering}){crop}.")
        if not ranking.results:
            continue
        if math.isfinite(ranking.limit):
            print(f"Images below a distance of {ranking.limit:.3f}:")
        width = max(4 * count, len("weight of each region, %"))
        print(f"rank  distance  {'weight of each region, %':{width}}  image")
        for rank, result in enumerate(ranking.results, 1):
            weights = "".join(f"{100 * weight:4.0f}" for weight in result.weight)
            print(f"{rank:4}  {result.distance:8.4f}  {weights:{width}}  {printable(result.name)}")


# ---- Serve ----


def serve(args: argparse.Namespace) -> int:
    """Serves a page to search with until it is interrupted (see `search.serve`); returns the exit code.

    Raises:
      UserError: without Starlette and uvicorn, for a short token, thresholds that do not apply, an address that cannot
        be used, and as `Gallery.query`.
    """
    with optional("serve", "starlette uvicorn"):
        from vpm_jax.search import serve as serving
    if args.token is not None and not re.fullmatch("[!-~]{16,}", args.token):
        raise UserError("--token: expected at least 16 letters, digits or signs, without spaces.")
    print("Loading and compiling the model ...", file=sys.stderr)
    gallery = Gallery.open(args.index, args.model, candidates=args.candidates)
    if not len(gallery):
        raise UserError(f"{args.index} holds no images yet: run python -m vpm_jax.search index.")
    serving.serve(gallery, args.host, args.port, args.token, _thresholds(gallery, args.thresholds))
    return 0


def _thresholds(gallery: Gallery, given: Path | None) -> Thresholds | None:
    """The thresholds in the `given` file, or those of the model if there are any that apply."""
    try:
        return gallery.thresholds(given)
    except UserError as error:
        if given is not None:
            raise
        if gallery.thresholds_file.exists():
            print(f"No false match rates: {error}", file=sys.stderr)
        return None
