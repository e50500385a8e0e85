"""A Hugging Face Hub on the loopback: repositories of plain files, as huggingface_hub reads and writes them."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """The repositories, {name: {file: bytes}}, those that are private, and the address."""

    def __init__(self, address: str):
        self.address, self.repositories, self.private = address, dict[str, dict[str, bytes]](), dict[str, bool]()


@contextlib.contextmanager
def serving() -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.hub  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _commit(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, body: bytes = b"", status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say(self, value, status: int = 200, **headers: str) -> None:
        self.answer(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def route(self) -> tuple[dict[str, bytes] | None, str, str]:
        """(the files of the repository, what is asked for, what follows)."""
        match = re.match(r"(?:/api/models)?/([^/]+/[^/]+)/(revision|tree|preupload|commit|resolve)/([^?]*)", self.path)
        name, kind, rest = match.groups() if match else ("", "", "")
        files = self.server.hub.repositories.get(name)
        if files is None or (kind == "revision" and rest not in ("main", _commit(files))):
            what = "Repo" if files is None else "Revision"
            self.say({"error": f"{what} not found"}, 404, X_Error_Code=f"{what}NotFound")
            return None, "", ""
        return files, kind, rest

    def do_GET(self) -> None:
        files, kind, rest = self.route()
        if files is None:
            return
        if kind == "revision":
            siblings = [{"rfilename": file} for file in files]
            self.say({"_id": "1", "id": "user/name", "sha": _commit(files), "siblings": siblings, "private": False})
        elif kind == "tree":
            self.say([{"type": "file", "path": f, "size": len(x), "oid": _commit({f: x})} for f, x in files.items()])
        else:
            file = rest.partition("/")[2]
            body = files[file]
            self.answer(body, ETag=f'"{_commit({file: body})}"', X_Repo_Commit=_commit(files))

    do_HEAD = do_GET

    def do_POST(self) -> None:
        text, hub = self.rfile.read(int(self.headers["Content-Length"])).decode(), self.server.hub
        if self.path == "/api/repos/create":
            about = json.loads(text)
            name = f"{about.get('organization') or 'user'}/{about['name']}"
            hub.repositories.setdefault(name, {})
            hub.private.setdefault(name, about.get("private", about.get("visibility") == "private"))
            return self.say({"url": f"{hub.address}/{name}", "name": name, "id": name})
        if self.path == "/api/validate-yaml":
            return self.say({"errors": [], "warnings": []})
        files, kind, _ = self.route()
        if files is None:
            return None
        if kind == "preupload":
            return self.say(
                {"files": [{**x, "uploadMode": "regular", "shouldIgnore": False} for x in json.loads(text)["files"]]}
            )
        for line in map(json.loads, text.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        commit = _commit(files)
        return self.say({"commitUrl": f"{hub.address}/user/name/commit/{commit}", "commitOid": commit, "success": True})
