"""The search server under load on the loopback: queries per second and latency of 1, 4 and 16 clients, compared with
the same queries in Python and by the command."""

from __future__ import annotations

import argparse
import http.client
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median
from urllib.parse import urlsplit

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import cli
from vpm_jax.benchmark.report import Report, Row
from vpm_jax.benchmark.timing import in_turn
from vpm_jax.errors import UserError

Clock = Callable[[], float]

HELP = "the search server under load, compared with the same queries in Python and by the command"
CLIENTS = (1, 4, 16)
PERCENTILES = {"median": 50, "99th percentile": 99}
BOX = "0,0,1,0.5"  # the upper half


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--index", type=cli.path, required=True, metavar="STORE", help="a feature store, whose images are the queries"
    )
    parser.add_argument("--queries", type=cli.positive, default=200, help="of each round (default: %(default)s)")
    parser.add_argument("--rounds", type=cli.positive, default=3, help="(default: %(default)s)")


def load(
    address: str, images: Sequence[bytes], clients: int, clock: Clock = time.perf_counter
) -> tuple[float, np.ndarray]:
    """Sends the images from as many clients at once; returns the seconds of all by `clock`, and of each by the wall."""

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
        begun = clock()
        seconds = list(pool.map(send, [images[client::clients] for client in range(clients)]))
        return clock() - begun, np.concatenate([np.array(part) for part in seconds])


def cpu_of(process: int) -> float:
    """The seconds of CPU time that a process has taken."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_of_children() -> float:
    """The seconds of CPU time of the processes that have ended."""
    used = os.times()
    return used.children_user + used.children_system


def run(args: argparse.Namespace, config: ConfigDict) -> Report:
    if args.clock == "cpu" and not Path("/proc/self/stat").exists():
        raise UserError("--clock cpu: the CPU time of the server is read from /proc, which this system lacks.")
    if args.queries < max(CLIENTS):
        raise UserError(f"--queries {args.queries}: expected at least {max(CLIENTS)}, one for each client.")
    from vpm_jax.benchmark.limits import accelerator
    from vpm_jax.images import read
    from vpm_jax.regions import Crop
    from vpm_jax.search.gallery import Gallery
    from vpm_jax.search.serve import BATCH, TOP

    gallery = Gallery.open(args.index)
    if gallery.store is None or not len(gallery):
        raise UserError(f"{args.index} holds no images: run python -m vpm_jax.search index.")
    root = gallery.store.path("folder") or Path()
    names = np.resize(gallery.store.names, args.queries)
    images = [(root / name).read_bytes() for name in names]

    def in_python(batch: int) -> float:
        """Queries per second without a server."""
        halves = [read(image, crop=Crop(0, 0, 0.5, 1)) for image in images]
        chunks = [halves[start : start + batch] for start in range(0, len(halves), batch)]
        gallery.query(chunks[0], TOP)  # compiles
        begun = clocks["here"]()
        for chunk in chunks:
            gallery.query(chunk, TOP)
        return len(halves) / (clocks["here"]() - begun)

    def by_command(count: int) -> float:
        """The seconds of the command for some queries."""
        files = [str(root / name) for name in names[:count]]
        begun = clocks["command"]()
        subprocess.run([*command, "query", *files, "--index", str(args.index)], check=True, stdout=subprocess.DEVNULL)
        return clocks["command"]() - begun

    clocks: dict[str, Clock] = {"here": time.perf_counter, "command": time.perf_counter}
    if args.clock == "cpu":
        clocks = {"here": time.process_time, "command": cpu_of_children}
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
            clocks["server"] = partial(cpu_of, server.pid) if args.clock == "cpu" else time.perf_counter
            rounds = [
                {clients: load(address, images, clients, clocks["server"]) for clients in CLIENTS}
                for _ in range(args.rounds)
            ]
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
        f"Upper halves of {args.queries} of the {len(gallery):,} images of the gallery ({gallery.model}), "
        f"{args.rounds} rounds; the clients share the server's cores.",
        "The command loads the model first; its queries are whole images. Latencies are wall-clock times.",
    ]
    return Report(rows, lines, device=accelerator())
