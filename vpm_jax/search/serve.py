"""A page to search with, and the same over HTTP as JSON (openapi.json describes it).

The page is page.html; Starlette answers its requests. Uploads live in memory only. Queries that arrive while the model
works form the next batch.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import importlib.resources
import math
import os
import re
import secrets
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from vpm_jax import html
from vpm_jax import images as images_lib
from vpm_jax.api import VPM
from vpm_jax.data.decode import decode
from vpm_jax.data.fit import Place
from vpm_jax.errors import UserError, printable
from vpm_jax.geometry import PLACES, fit_box, place_between
from vpm_jax.overlay import LOW_WEIGHT, overlay, region_colors
from vpm_jax.regions import WHOLE, Crop, visible_heights
from vpm_jax.search import ranking as ranking_lib
from vpm_jax.search import web
from vpm_jax.search.gallery import Gallery
from vpm_jax.search.ranking import Ranking
from vpm_jax.thresholds import RATES, Thresholds

UPLOAD_PIXELS = 25_000_000
KEPT_BYTES = 64 * 2**20  # of all uploads that links refer to
KEPT_SECONDS = 3600.0
BATCH = 8  # queries
DECODED = 2 * BATCH  # images in memory; uploads have at most UPLOAD_PIXELS each
CONNECTIONS = 256  # at once; more get 503
TOP, MOST = 50, 500  # results: by default, and at most
MAP_HEIGHT, THUMBNAIL_HEIGHT, IMAGE_HEIGHT = 256, 256, 1024  # pixels

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Batches(Generic[Item, Answer]):
    """Answers items one batch at a time, in a thread of its own; a batch holds what arrived during the previous one.

    Args:
      work: answers a batch. If it raises, each item is tried alone.
      most: the largest number of items in a batch.
    """

    def __init__(self, work: Callable[[list[Item]], list[Answer]], most: int):
        self._work, self._most = work, most
        self._pool = ThreadPoolExecutor(1, "vpm_jax-query")
        self._waiting: list[tuple[Item, asyncio.Future[Answer]]] = []
        self._running: asyncio.Task[None] | None = None

    async def __call__(self, item: Item) -> Answer:
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, answer))
        if self._running is None:
            self._running = asyncio.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        try:
            while batch := self._waiting[: self._most]:
                del self._waiting[: self._most]
                await self._answer(batch)
        finally:
            self._running = None

    async def _answer(self, batch: list[tuple[Item, asyncio.Future[Answer]]]) -> None:
        loop = asyncio.get_running_loop()
        try:
            answers = await loop.run_in_executor(self._pool, self._work, [item for item, _ in batch])
        except Exception as error:
            if len(batch) > 1:
                for pair in batch:
                    await self._answer([pair])
            elif not batch[0][1].done():
                batch[0][1].set_exception(error)
            return
        for (_, future), answer in zip(batch, answers, strict=True):
            if not future.done():  # its request was not canceled
                future.set_result(answer)


class Uploads:
    """Uploads that links refer to, in memory: the newest `KEPT_BYTES` of them, for `KEPT_SECONDS`."""

    def __init__(self) -> None:
        self._data: OrderedDict[str, tuple[float, bytes]] = OrderedDict()

    def add(self, data: bytes) -> str:
        """Keeps an upload; returns its key, which cannot be guessed."""
        key = secrets.token_urlsafe(16)
        self._data[key] = time.monotonic(), data
        self._forget()
        return key

    def __getitem__(self, key: str) -> bytes:
        self._forget()
        if key not in self._data:
            raise web.Refusal(
                410,
                "upload-gone",
                f"This upload is no longer in memory: uploads are kept for {KEPT_SECONDS / 60:.0f} minutes, until "
                "newer ones need the room or the server stops. Upload the image again.",
            )
        return self._data[key][1]

    def _forget(self) -> None:
        size, oldest = sum(len(data) for _, data in self._data.values()), time.monotonic() - KEPT_SECONDS
        for key, (added, data) in list(self._data.items()):
            if size > KEPT_BYTES or added < oldest:
                size -= len(data)
                del self._data[key]


class _Query(NamedTuple):
    """What the worker ranks."""

    pixels: np.ndarray  # uint8 [H, W, 3], inside the box
    place: Place | None = None
    k: int = TOP
    max_distance: float = math.inf
    draw: bool = True  # the region map


class Service:
    """Answers requests about a gallery.

    Args:
      gallery: must hold images.
      thresholds: of its model, or None.
    """

    def __init__(self, gallery: Gallery, thresholds: Thresholds | None = None):
        assert gallery.store is not None
        self._gallery, self._thresholds = gallery, thresholds
        self._entries, self._root = gallery.store.entries, gallery.store.path("folder") or Path()
        self._rows = {identifier(entry.name): row for row, entry in enumerate(self._entries)}
        self._uploads, self._ranking = Uploads(), Batches(self.rank, BATCH)
        self._slots = asyncio.Semaphore(DECODED)
        self._page, self._policy = _page()

    def routes(self) -> list[Route]:
        return [
            Route("/", self.page),
            Route("/openapi.json", self.openapi),
            Route("/about", self.about),
            Route("/gallery", self.gallery),
            Route("/image/{id}", self.image),
            Route("/upload/{key}", self.upload),
            Route("/query", self.query, methods=["POST"]),
        ]

    # ---- Pages ----

    async def page(self, request: Request) -> Response:
        return Response(self._page, media_type="text/html", headers={"Content-Security-Policy": self._policy})

    async def openapi(self, request: Request) -> Response:
        return Response(_resource("openapi.json"), media_type="application/json")

    async def about(self, request: Request) -> Response:
        model = self._gallery.model
        colors = (255 * region_colors(model.grid.count, model.grid.cols)).round().astype(int).tolist()
        return JSONResponse(
            {
                "gallery": printable(self._root.name),
                "images": len(self._entries),
                "model": {"fingerprint": model.fingerprint, "grid": [model.grid.rows, model.grid.cols]},
                "places": model.places,
                "numbering": ranking_lib.numbering(model.grid),
                "colors": [f"rgb({red},{green},{blue})" for red, green, blue in colors],
                "low_weight": LOW_WEIGHT,
                "upload_bytes": web.UPLOAD_BYTES,
                "upload_pixels": UPLOAD_PIXELS,
            }
        )

    # ---- Images ----

    async def gallery(self, request: Request) -> Response:
        given = web.parameters(request, "start", "count")
        start, count = web.whole(given, "start", 0, 0, 10**9), web.whole(given, "count", 24, 1, 200)
        entries = self._entries[start : start + count]
        images = [{"id": identifier(entry.name), "image": _name(entry.name)} for entry in entries]
        return JSONResponse({"total": len(self._entries), "start": start, "images": images})

    async def image(self, request: Request) -> Response:
        height = web.whole(web.parameters(request, "height"), "height", THUMBNAIL_HEIGHT, 1, IMAGE_HEIGHT)
        pixels = await self._decoded(partial(self._gallery_image, request.path_params["id"]))
        return _jpeg(pixels, height)

    async def upload(self, request: Request) -> Response:
        web.parameters(request)
        data = self._uploads[request.path_params["key"]]
        return _jpeg(await self._decoded(partial(_uploaded, data)), IMAGE_HEIGHT)

    async def _decoded(self, read: Callable[[], np.ndarray]) -> np.ndarray:
        async with self._slots:
            return await run_in_threadpool(read)

    def _gallery_image(self, name: str) -> np.ndarray:
        path = self._root / self._entries[self._row(name)].name
        try:
            return images_lib.read(path)
        except UserError:  # the sentence holds the path
            raise web.Refusal(404, "unreadable", "The file of this image is missing or cannot be read.") from None

    def _row(self, name: str) -> int:
        if name not in self._rows:
            raise web.Refusal(404, "no-such-image", "The gallery has no image of this id: see /gallery.")
        return self._rows[name]

    # ---- Queries ----

    async def query(self, request: Request) -> Response:
        given = web.parameters(request, "image", "upload", "box", "place", "k", "max_distance", "region_map", "keep")
        k, limit, box = web.whole(given, "k", TOP, 1, MOST), web.distance(given), web.box(given)
        place: Place | None = web.choice(given, "place", self._gallery.model.places)
        draw, keep = web.flag(given, "region_map", True), web.flag(given, "keep", False)
        source: dict[str, Any] = {"image": None, "id": None, "upload": None}
        if ("image" in given) + ("upload" in given) > 1:
            raise web.Refusal(400, "two-images", "Both image and upload are given: choose one.")
        if "image" in given:
            row = self._row(given["image"])
            source |= {"image": _name(self._entries[row].name), "id": given["image"]}
            read: Callable[[], np.ndarray] = partial(self._gallery_image, given["image"])
        else:
            data = self._uploads[given["upload"]] if "upload" in given else await web.body(request)
            read = partial(_uploaded, data)
        async with self._slots:
            pixels = await run_in_threadpool(read)
            inside = np.ascontiguousarray(images_lib.read(pixels, crop=box))
            size = pixels.shape[:2]
            place = place or _place(self._gallery.model, size, box)
            del pixels
            ranked = _Query(inside, place, k, limit, draw)
            ranking = await self._ranking(ranked)
            answer = await run_in_threadpool(self._record, ranked, ranking)
        if "upload" in given:
            source["upload"] = given["upload"]
        elif "image" not in given and keep:
            source["upload"] = self._uploads.add(data)
        corners = [box.left, box.top, box.left + box.width, box.top + box.height]
        return JSONResponse({**answer, **source, "size": size, "box": corners})

    def rank(self, queries: list[_Query]) -> list[Ranking]:
        """A batch of queries, with more results than they ask for."""
        k = max(TOP, *(query.k for query in queries))  # few values, since each compiles
        images, places = [query.pixels for query in queries], [query.place for query in queries]
        return self._gallery.query(images, k, places=places)

    def _record(self, query: _Query, ranking: Ranking) -> dict[str, Any]:
        model = self._gallery.model
        results = [result for result in ranking.results[: query.k] if result.distance < query.max_distance]
        ranking = ranking._replace(results=results, limit=query.max_distance)
        heights = visible_heights(ranking.query.region_maps, model.grid)
        record = ranking_lib.query_record(ranking)
        for result, line in zip(results, record["results"], strict=True):
            del line["path"]
            line |= {"image": _name(result.name), "id": identifier(result.name)}
        thresholds = {}
        if self._thresholds is not None:
            gamma = float(heights[0, 1] - heights[0, 0])
            thresholds = {f"{rate:g}": self._thresholds.distance(gamma, rate) for rate in RATES}
        region_map = None
        if query.draw:
            drawn = overlay(query.pixels, ranking.query.region_maps[0], model.grid.cols, MAP_HEIGHT)
            region_map = html.data_uri(html.jpeg(drawn, MAP_HEIGHT), "image/jpeg")
        return record | {
            "region_map": region_map,
            "shown": [float(f"{edge:.4g}") for edge in heights[0]],
            "unfamiliar": ranking_lib.unfamiliar(model, ranking),
            "nearest": None if math.isinf(ranking.nearest) else float(f"{ranking.nearest:.6g}"),
            "thresholds": thresholds,
        }


def _place(model: VPM, size: tuple[int, int], box: Crop) -> Place | None:
    """The place at which a model of padded images sees a box: where it lies on the image."""
    if not model.places or box == WHOLE:
        return None
    (height, width), data = model.image_size, model.config.data
    top, left, bottom, right = fit_box(size, model.image_size, data.aspect, PLACES[data.place])
    before = top + box.top * (bottom - top), left + box.left * (right - left)
    after = height - before[0] - box.height * (bottom - top), width - before[1] - box.width * (right - left)
    y, x = place_between(before, np.maximum(after, 0), PLACES[data.place]).round(4).tolist()
    return y, x


def identifier(name: str) -> str:
    """The id of a gallery image, the same after the folder was indexed again."""
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _name(name: str) -> str:
    """The name of a gallery image without the folders of this machine."""
    return printable(os.path.basename(name) if os.path.isabs(name) else name)


def _uploaded(data: bytes) -> np.ndarray:
    try:
        return decode(data, "The upload", upright=True, most=UPLOAD_PIXELS)
    except UserError as error:
        code = "not-an-image" if error.code == "user-error" else error.code
        raise web.Refusal(413 if code == "too-many-pixels" else 422, code, str(error)) from None


def _jpeg(pixels: np.ndarray, height: int) -> Response:
    return Response(html.jpeg(pixels, height), media_type="image/jpeg")


# ---- The application ----


def application(service: Service, token: str | None = None, hosts: set[str] | None = None) -> ASGIApp:
    """The application of a service.

    Args:
      service: answers the requests.
      token: that requests for data must carry as `Authorization: Bearer TOKEN`; None: none is needed.
      hosts: the host names that requests may use; None: any. This refuses a page of another site that points its own
        name at this server's address.
    """

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, web.Refusal)
        return error.response()

    async def unknown(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 405:
            return web.Refusal(
                405, "wrong-method", f"{request.method[:20]} is not possible here: see /openapi.json."
            ).response()
        return web.Refusal(error.status_code, "no-such-page", "There is nothing here: see /openapi.json.").response()

    async def failed(request: Request, error: Exception) -> Response:  # raised again: web.Guard logs it
        return web.Refusal(500, "failed", "The server could not answer: see its log.").response()

    handlers = {web.Refusal: refused, HTTPException: unknown, Exception: failed}
    return web.Guard(Starlette(routes=service.routes(), exception_handlers=handlers), token, hosts)


def _resource(name: str) -> bytes:
    return importlib.resources.files("vpm_jax.search").joinpath(name).read_bytes()


def _page() -> tuple[str, str]:
    """The page, and the policy that allows only its own script and style."""
    page = _resource("page.html").decode().replace("/* vpm_jax.html */", html.CSS)
    digests = {
        tag: base64.b64encode(hashlib.sha256(re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[0].encode()).digest())
        for tag in ("script", "style")
    }
    policy = (
        f"default-src 'none'; script-src 'sha256-{digests['script'].decode()}'; "
        f"style-src 'sha256-{digests['style'].decode()}'; img-src data: blob:; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    )
    return page, policy


# ---- The server ----


def prepared(
    gallery: Gallery, host: str, port: int, token: str | None, thresholds: Thresholds | None
) -> tuple[uvicorn.Server, socket.socket, str]:
    """A server that is ready to run, its listening socket, and the address of its page; arguments as for `serve`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (while")[0]
        sentence = f"{host} port {port} cannot be used ({reason}): choose another --port or --host."
        raise UserError(sentence, code="bad-address") from None
    local = web.is_loopback(host)
    if token is None and not local:
        token = secrets.token_urlsafe(24)
    hosts = {"localhost", "127.0.0.1", "::1", host} if local and token is None else None
    service = Service(gallery, thresholds)
    blank = np.full((2, 1, 3), 128, np.uint8)
    for power in range(BATCH.bit_length()):  # compiles the batches that occur
        service.rank([_Query(blank)] * 2**power)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/"
    settings = uvicorn.Config(
        application(service, token, hosts),
        http=web.Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=5,
    )
    return uvicorn.Server(settings), listening, address if token is None else f"{address}#token={token}"


def serve(gallery: Gallery, host: str, port: int, token: str | None, thresholds: Thresholds | None) -> None:
    """Serves the page until it is interrupted.

    Args:
      gallery: must hold images.
      host: a name or address of this machine.
      port: 0: any that is free.
      token: None: none is needed on the loopback; elsewhere one is generated.
      thresholds: of the gallery's model, or None.

    Raises:
      UserError: if the address cannot be used, and as `Gallery.query`.
    """
    server, listening, address = prepared(gallery, host, port, token, thresholds)
    print(f"{len(gallery):,} images. Open {address} in a browser; Ctrl-C stops.", flush=True)
    with listening, contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listening])
