"""The search server under load on the loopback: queries per second and latency of 1, 4 and 16 clients, compared with
the same queries in Python and by the command."""

from __future__ import annotations

import argparse
import http.client
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import cli, parallel
from vpm_jax.benchmark.report import Report, Row
from vpm_jax.benchmark.timing import in_turn
from vpm_jax.errors import UserError

HELP = "the search server under load, compared with the same queries in Python and by the command"
CLIENTS = (1, 4, 16)
PERCENTILES = {"median": 50, "99th percentile": 99}
BOX = "0,0,1,0.5"  # the upper half


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--index", type=cli.path, required=True, metavar="STORE", help="a feature store, whose images are the queries"
    )
    parser.add_argument("--queries", type=int, default=200, help="of each round (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")


def load(address: str, images: Sequence[bytes], clients: int) -> tuple[float, np.ndarray]:
    """Sends the images from as many clients at once; returns the seconds of all and of each query."""

    def send(share: Sequence[bytes]) -> list[float]:
        seconds = []
        with closing(http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)) as connection:
            for image in share:
                begun = time.perf_counter()
                connection.request("POST", f"/query?box={BOX}", image)
                answer = connection.getresponse()
                body = answer.read()
                if answer.status != 200:
                    raise RuntimeError(f"the server answered {answer.status}: {body[:200]!r}")
                seconds.append(time.perf_counter() - begun)
        return seconds

    with ThreadPoolExecutor(clients) as pool:
        begun = time.perf_counter()
        seconds = list(pool.map(send, [images[client::clients] for client in range(clients)]))
        return time.perf_counter() - begun, np.concatenate([np.array(part) for part in seconds])


def run(args: argparse.Namespace, config: ConfigDict) -> Report:
    if args.clock == "cpu":
        raise UserError(
            "--clock cpu would leave out the server, a process of its own: measure serve by the wall clock."
        )
    if args.queries < max(CLIENTS) or args.rounds < 1:
        raise UserError(f"--queries and --rounds: expected at least {max(CLIENTS)}, one for each client, and 1.")
    parallel.prepare_backend()
    from vpm_jax import api
    from vpm_jax.benchmark.limits import describe
    from vpm_jax.regions import Crop
    from vpm_jax.search.gallery import Gallery
    from vpm_jax.search.serve import BATCH, TOP

    gallery, here = Gallery.open(args.index), describe()
    if gallery.store is None or not len(gallery):
        raise UserError(f"{args.index} holds no images: run python -m vpm_jax.search index.")
    root = gallery.store.path("folder") or Path()
    names = np.resize(gallery.store.names, args.queries)
    images = [(root / name).read_bytes() for name in names]

    def in_python(batch: int) -> float:
        """Queries per second without a server."""
        halves = [api.read(image, crop=Crop(0, 0, 0.5, 1)) for image in images]
        chunks = [halves[start : start + batch] for start in range(0, len(halves), batch)]
        gallery.query(chunks[0], TOP)  # compiles
        begun = time.perf_counter()
        for chunk in chunks:
            gallery.query(chunk, TOP)
        return len(halves) / (time.perf_counter() - begun)

    def by_command(count: int) -> float:
        """The seconds of the command for some queries."""
        files = [str(root / name) for name in names[:count]]
        begun = time.perf_counter()
        subprocess.run([*command, "query", *files, "--index", str(args.index)], check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - begun

    command = [sys.executable, "-m", "vpm_jax.search"]
    serving = [*command, "serve", "--index", str(args.index), "--port", "0"]
    with subprocess.Popen(serving, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            address = next((word for word in server.stdout.readline().split() if word.startswith("http")), None)
            if address is None:
                raise UserError("The server did not start: see above.")
            load(address, images[: max(CLIENTS)], max(CLIENTS))
            rates = in_turn({batch: partial(in_python, batch) for batch in (1, BATCH)}, args.rounds)
            rounds = [{clients: load(address, images, clients) for clients in CLIENTS} for _ in range(args.rounds)]
        finally:
            server.terminate()
    rows = []
    for clients in CLIENTS:
        name, batch = f"serve: {clients} client{'s' * (clients > 1)}", 1 if clients == 1 else BATCH
        seconds, each = zip(*(results[clients] for results in rounds), strict=True)
        limit = f"Gallery.query, {batch} image{'s' * (batch > 1)} at once"
        rows.append(Row(name, len(images) / median(seconds), "queries/s", median(rates[batch]), limit))
        rows += [Row(f"{name}, {of}", float(np.percentile(each, q)), "s") for of, q in PERCENTILES.items()]
    rows += [Row(f"search query, {n} image{'s' * (n > 1)}", by_command(n), "s") for n in (1, args.queries)]
    lines = [
        f"Upper halves of {args.queries} of the {len(gallery):,} images of the gallery ({gallery.model}) on "
        f"{here['device']}, {args.rounds} rounds; the clients share the server's cores.",
        "The command loads and compiles the model first; its queries are whole images.",
    ]
    return Report(rows, lines, device=here["accelerator"])
