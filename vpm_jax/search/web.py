"""HTTP of the search server: refusals, parameters, uploads, access and time limits."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import math
import re
import secrets
import sys
from pathlib import Path
from urllib.parse import urlsplit

import h11
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from vpm_jax.errors import UserError, printable
from vpm_jax.regions import WHOLE, Crop

UPLOAD_BYTES = 10 * 2**20
UPLOAD_SECONDS = 20.0  # for a whole upload
HEADER_SECONDS = 10.0  # for a request's header
REQUESTS = 64  # at once; more get 503


class Refusal(UserError):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str, sentence: str):
        super().__init__(sentence, code=code)
        self.status = status

    def response(self) -> Response:
        headers = {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        if self.status in (408, 413):  # the rest of the upload is not read
            headers["Connection"] = "close"
        return JSONResponse({"error": str(self), "code": self.code}, self.status, headers)


# ---- Parameters and uploads ----


def parameters(request: Request, *known: str) -> dict[str, str]:
    given = request.query_params
    for name in given:
        if name not in known:
            choices = ", ".join(known) or "none"
            raise Refusal(400, "unknown-parameter", f"There is no parameter {name[:40]!r}; expected: {choices}.")
        if len(given.getlist(name)) > 1:
            raise Refusal(400, "bad-parameter", f"{name} is given twice: choose one value.")
    return dict(given)


def whole(given: dict[str, str], name: str, default: int, least: int, most: int) -> int:
    text = given.get(name, str(default))
    if not re.fullmatch("[0-9]{1,10}", text) or not least <= int(text) <= most:
        raise Refusal(400, "bad-parameter", f"{name} is {text[:40]!r}, expected a whole number from {least} to {most}.")
    return int(text)


def flag(given: dict[str, str], name: str, default: bool) -> bool:
    text = given.get(name, str(default).lower())
    if text not in ("true", "false"):
        raise Refusal(400, "bad-parameter", f"{name} is {text[:40]!r}, expected true or false.")
    return text == "true"


def choice(given: dict[str, str], name: str, values: tuple[str, ...]) -> str | None:
    text = given.get(name)
    if text is not None and text not in values:
        expected = f"expected {', '.join(values)}" if values else "and this model takes none: leave it out"
        raise Refusal(400, "bad-parameter", f"{name} is {text[:40]!r}, {expected}.")
    return text


def _number(text: str) -> float:
    try:
        return float(text[:40])
    except ValueError:
        return math.nan


def distance(given: dict[str, str]) -> float:
    text = given.get("max_distance", "inf")
    if not (value := _number(text)) >= 0:  # not a number, too
        raise Refusal(400, "bad-parameter", f"max_distance is {text[:40]!r}, expected a number of at least 0.")
    return value


def box(given: dict[str, str]) -> Crop:
    if "box" not in given:
        return WHOLE
    numbers = [_number(text) for text in given["box"].split(",")[:5]]
    if len(numbers) == 4:
        left, top, right, bottom = numbers
        if 0 <= left < right <= 1 and 0 <= top < bottom <= 1:
            return Crop(top, left, bottom - top, right - left)
    sentence = (
        f"box is {given['box'][:80]!r}, expected left,top,right,bottom as fractions of the image, such as 0,0,1,0.5."
    )
    raise Refusal(400, "bad-box", sentence)


async def body(request: Request) -> bytes:
    too_large = Refusal(413, "too-large", f"The upload has more than {UPLOAD_BYTES:,} bytes: make the image smaller.")
    if int(request.headers.get("content-length", 0)) > UPLOAD_BYTES:
        raise too_large
    if request.headers.get("content-type", "").startswith("multipart/"):
        sentence = "The body is a form: send the bytes of one file as the body, as curl --data-binary @FILE does."
        raise Refusal(415, "a-form", sentence)
    data = bytearray()
    try:
        async with asyncio.timeout(UPLOAD_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > UPLOAD_BYTES:
                    raise too_large
    except TimeoutError:
        raise Refusal(408, "too-slow", f"The upload took more than {UPLOAD_SECONDS:.0f} seconds: try again.") from None
    if not data:
        sentence = "There is no image: send the bytes of a file as the body, or set image or upload."
        raise Refusal(400, "no-image", sentence)
    return bytes(data)


# ---- Access ----


class Guard:
    """Checks access, sets headers, and answers errors as JSON."""

    PUBLIC = ("/", "/openapi.json")  # hold nothing about the gallery
    HEADERS = {
        "Cache-Control": "no-store",
        "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
    }

    def __init__(self, app: ASGIApp, token: str | None, hosts: set[str] | None):
        self._app, self._token, self._hosts, self._active = app, token, hosts, 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        self._active += 1
        try:
            self._check(scope)
            await self._app(scope, receive, sending)
        except Refusal as error:
            await error.response()(scope, receive, sending)
        except ClientDisconnect:
            pass
        except Exception as error:
            place = _place(error)
            print(f"{scope['method']} {printable(scope['path'][:80])!r} failed{place}: {error!r}", file=sys.stderr)
        finally:
            self._active -= 1

    def _check(self, scope: Scope) -> None:
        if self._active > REQUESTS:
            raise Refusal(503, "busy", f"The server is answering {REQUESTS} requests: try again in a moment.")
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._hosts is not None and _hostname(host) not in self._hosts:
            names = ", ".join(sorted(self._hosts))
            raise Refusal(
                403, "wrong-host", f"This server is called {names} here: open it by that name, or set --token."
            )
        if origin is not None and origin.partition("//")[2] != host:
            raise Refusal(
                403,
                "cross-site",
                "This request comes from a page of another site: only this server's page may send requests.",
            )
        if self._token is not None and scope["path"] not in self.PUBLIC:
            given = headers.get("authorization", "")
            if not secrets.compare_digest(given.encode(), f"Bearer {self._token}".encode()):
                sentence = "This needs the token that the server printed, as Authorization: Bearer TOKEN."
                raise Refusal(401, "no-token", sentence)


def _hostname(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _place(error: BaseException) -> str:
    """Where the error was raised, for the log."""
    step = error.__traceback__
    while step is not None and step.tb_next is not None:
        step = step.tb_next
    return "" if step is None else f" ({Path(step.tb_frame.f_code.co_filename).name}, line {step.tb_lineno})"


def is_loopback(host: str) -> bool:
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


# ---- Connections ----


class Protocol(H11Protocol):
    """Closes a connection that does not send the whole header of a request in time."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late: asyncio.TimerHandle | None = None
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._late is not None:
            self._late.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            if self._late is not None:
                self._late.cancel()
            self._late = None
        elif self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.close)
