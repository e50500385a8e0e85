"""The search server in a thread of this process."""

from __future__ import annotations

import contextlib
import http.client
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator

from vpm_jax.search import serve


@contextlib.contextmanager
def running(gallery, host="127.0.0.1", token=None, thresholds=None) -> Iterator[str]:
    """The address of the page while the server runs."""
    server, listening, address = serve.prepared(gallery, host, 0, token, thresholds)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield address
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()


def talk(address: str, *pieces: bytes | float, seconds: float = 20) -> bytes:
    """What the server answers to raw bytes, until it closes the connection; numbers are pauses in seconds."""
    port = int(address.split(":")[2].partition("/")[0])
    answer = b""
    with socket.create_connection(("127.0.0.1", port), seconds) as connection, contextlib.suppress(OSError):
        for piece in pieces:
            if isinstance(piece, bytes):
                connection.sendall(piece)
            else:
                time.sleep(piece)
        while chunk := connection.recv(2**16):
            answer += chunk
    return answer


def exchange(address: str, pieces: list[bytes | float | None]) -> tuple[int, dict[str, str], bytes] | None:
    """(status, headers, body) of the first answer to pieces as of `talk`; None: it closes the connection instead.

    None as a piece closes it first.
    """
    port = int(address.split(":")[2].partition("/")[0])
    with socket.create_connection(("127.0.0.1", port), 20) as connection:
        try:
            for piece in pieces:
                if piece is None:
                    return None
                if isinstance(piece, float):
                    time.sleep(piece)
                else:
                    connection.sendall(piece)
        except ConnectionError:  # it may have answered before it read everything
            pass
        try:
            method = "HEAD" if isinstance(pieces[0], bytes) and pieces[0].startswith(b"HEAD ") else None
            with http.client.HTTPResponse(connection, method=method) as response:
                response.begin()
                return response.status, dict(response.headers.items()), response.read()
        except (ConnectionError, http.client.RemoteDisconnected):
            return None


def ask(url: str, data: bytes | None = None, token: str = "") -> tuple[int, bytes]:
    """(status, body) of a request, a POST if there are data."""
    request = urllib.request.Request(url, data, {"Authorization": f"Bearer {token}"} if token else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
