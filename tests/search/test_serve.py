"""The search server: the answers of the command over HTTP, and no more than that."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shutil
import sys
import threading
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from images import blobs, encode, oriented, with_size
from paths import ROOT
from PIL import Image
from tiny_runs import make_run

from vpm_jax import VPM, Gallery, benchmark
from vpm_jax.benchmark.serve import load
from vpm_jax.errors import UserError
from vpm_jax.geometry import KNOWN_PLACES
from vpm_jax.search import command, ranking
from vpm_jax.thresholds import RATES, Thresholds

pytest.importorskip("uvicorn", reason="the extra serve")
pytest.importorskip("httpx2", reason="starlette's test client needs it")
from serving import ask, running, talk
from starlette.testclient import TestClient

from vpm_jax.search import serve, web

TOKEN = "a-token-of-32-letters-and-digits"


def picture(seed: int, height: int = 80, width: int = 30) -> Image.Image:
    return blobs(np.random.default_rng(seed), height, width)


@pytest.fixture(scope="module")
def gallery(tmp_path_factory):
    return indexed(tmp_path_factory.mktemp("serve"))


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A gallery of a model of padded images, and its server's client."""
    gallery = indexed(tmp_path_factory.mktemp("padded"), data__fit="pad", data__aspect=2.0)
    with client_of(serve.Service(gallery)) as client:
        yield gallery, client


def indexed(folder, **changes):
    make_run(folder / "run", **changes)
    (folder / "pictures" / "deep").mkdir(parents=True)
    for number in range(11):
        picture(number).save(folder / "pictures" / f"{number}.png")
    picture(11).save(folder / "pictures" / "deep" / "行人 <b>&.png")
    gallery = Gallery.open(folder / "store", folder / "run")
    gallery.index(folder / "pictures")
    return gallery


@pytest.fixture(scope="module")
def service(gallery):
    return serve.Service(gallery)


def client_of(service, **settings):
    return TestClient(serve.application(service, **settings), base_url="http://127.0.0.1")


@pytest.fixture(scope="module")
def client(service):
    with client_of(service) as client:
        yield client


QUERY = encode(picture(3, 160, 60), "PNG")


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def assert_same(told, expected: ranking.Ranking) -> None:
    """The JSON of an answer is that of a ranking from Python."""
    record = ranking.query_record(expected)
    assert told["visibility"] == pytest.approx(record["visibility"], rel=1e-3, abs=1e-5)
    for key in ("visible", "compared_with", "max_distance", "place"):
        assert told[key] == record[key]
    assert [line["image"] for line in told["results"]] == [line["image"] for line in record["results"]]
    for line, other in zip(told["results"], record["results"], strict=True):
        assert line.keys() == (other.keys() | {"id"}) - {"path"}
        for key in ("distance", "region_distance", "weight"):
            assert line[key] == pytest.approx(other[key], rel=1e-3, abs=1e-5)


def test_an_upload_ranks_as_in_python(client, gallery):
    answer = client.post("/query?k=5", content=QUERY)
    assert answer.status_code == 200
    assert_same(answer.json(), gallery.query([QUERY], 5)[0])
    assert answer.json()["size"] == [160, 60] and answer.json()["upload"] is None
    assert answer.json()["region_map"].startswith("data:image/jpeg;base64,")
    plain = client.post("/query?k=5&region_map=false", content=QUERY).json()
    assert plain == answer.json() | {"region_map": None}
    most = np.mean([line["distance"] for line in answer.json()["results"][1:3]])
    nearer = client.post(f"/query?max_distance={most}", content=QUERY).json()
    assert len(nearer["results"]) == 2 and nearer["max_distance"] == most
    assert nearer["nearest"] == answer.json()["results"][0]["distance"]


@pytest.mark.parametrize("box", [(0, 0, 1, 0.5), (0.25, 0.1, 0.75, 0.9), (0, 0.55, 1, 1)])
def test_a_box_is_a_partial_image(client, gallery, box):
    answer = client.post(f"/query?box={','.join(map(str, box))}", content=QUERY).json()
    left, top, right, bottom = np.rint(np.multiply(box, (60, 160, 60, 160))).astype(int)
    assert_same(answer, gallery.query([pixels(QUERY)[top:bottom, left:right]], 50)[0])
    assert answer["box"] == pytest.approx(box)


@pytest.mark.parametrize(
    ("box", "asked", "place"),
    [
        ((0, 0, 1, 1), None, None),
        ((0, 0, 1, 0.5), None, (0, 0.5)),
        ((0, 0.5, 1, 1), None, (1, 0.5)),
        ((0, 0.25, 1, 0.75), None, (0.5, 0.5)),
        ((0, 0.2, 1, 0.6), None, (1 / 3, 0.5)),
        ((0.5, 0, 1, 1), None, (0, 0.8)),  # the image fills three quarters of the input's width
        ((0, 0.5, 1, 1), "top", "top"),
        ((0, 0, 1, 0.5), "bottom", "bottom"),
    ],
)
def test_a_padded_model_sees_a_box_where_it_lies_or_where_it_is_told(padded, box, asked, place):
    gallery, client = padded
    words = f"&place={asked}" if asked else ""
    answer = client.post(f"/query?box={','.join(map(str, box))}{words}", content=QUERY).json()
    left, top, right, bottom = np.rint(np.multiply(box, (60, 160, 60, 160))).astype(int)
    [expected] = gallery.query([pixels(QUERY)[top:bottom, left:right]], 50, places=[place])
    if isinstance(place, tuple):
        assert answer["place"] == pytest.approx(place, abs=1e-3)
        expected = expected._replace(place=answer["place"])
    assert_same(answer, expected)


def test_only_a_padded_model_is_told_where_a_picture_lies(padded, client):
    _, told = padded
    assert told.get("/about").json()["places"] == ["top", "center", "bottom"]
    assert client.get("/about").json()["places"] == []
    for one, value, sentence in (
        (client, "bottom", "place is 'bottom', and this model takes none: leave it out."),
        (told, "left", "place is 'left', expected top, center, bottom."),
    ):
        answer = one.post(f"/query?place={value}", content=QUERY)
        assert (answer.status_code, answer.json()) == (400, {"error": sentence, "code": "bad-parameter"})


def test_a_box_is_on_the_upright_image(client, gallery):
    turned = oriented("JPEG", 6)
    answer = client.post("/query?box=0,0,1,0.5", content=turned).json()
    assert answer["size"] == [64, 128]
    upright = gallery.model.features(np.rot90(np.asarray(Image.open(io.BytesIO(turned)).convert("RGB")), -1)[:32])
    assert answer["visibility"] == pytest.approx(upright.visibility[0].tolist(), rel=1e-3)


def test_gallery_images_and_kept_uploads_are_queries(client, gallery):
    images = client.get("/gallery?count=5").json()
    assert images["total"] == 12 and [line["image"] for line in images["images"]] == gallery.store.names[:5]
    rest = client.get("/gallery?start=5&count=200").json()["images"]
    assert [line["image"] for line in rest] == gallery.store.names[5:]
    by_name = {line["image"]: line["id"] for line in images["images"] + rest}
    assert len(set(by_name.values())) == 12
    for name, id in by_name.items():
        path = gallery.store.path("folder") / name
        assert_same(answer := client.post(f"/query?image={id}&k=3").json(), gallery.query([path], 3)[0])
        assert answer["image"] == name and answer["id"] == id and answer["results"][0]["distance"] < 0.01
        shown = client.get(f"/image/{id}?height=40")
        assert shown.headers["content-type"] == "image/jpeg" and pixels(shown.content).shape == (40, 15, 3)

    kept = client.post("/query?keep=true", content=QUERY).json()
    assert len(kept["upload"]) > 20
    again = client.post(f"/query?upload={kept['upload']}").json()
    assert again == kept
    assert pixels(client.get(f"/upload/{kept['upload']}").content).shape == (160, 60, 3)


def test_a_form_is_told_what_to_send(client):
    answer = client.post("/query", files={"file": QUERY})
    assert (answer.status_code, answer.json()["code"]) == (415, "a-form")


def test_uploads_are_forgotten(monkeypatch, gallery):
    with client_of(serve.Service(gallery)) as client:
        keys = [client.post("/query?keep=true", content=QUERY).json()["upload"] for _ in range(3)]
        assert len(set(keys)) == 3, "a key is not derived from the image"
        monkeypatch.setattr(serve, "KEPT_BYTES", 2 * len(QUERY))
        assert [client.get(f"/upload/{key}").status_code for key in keys] == [410, 200, 200]
        monkeypatch.setattr(serve, "KEPT_SECONDS", 0)
        answer = client.post(f"/query?upload={keys[2]}")
        assert (answer.status_code, answer.json()["code"]) == (410, "upload-gone")
        assert "no longer in memory" in answer.json()["error"]


BIG = with_size(QUERY, 6000, 6000)
REFUSED = [
    ("POST", "/query", b"", 400, "no-image"),
    ("POST", "/query", b"hello", 422, "not-an-image"),
    ("POST", "/query", QUERY[:200], 422, "damaged-image"),
    ("POST", "/query", BIG, 413, "too-many-pixels"),
    ("POST", "/query", with_size(encode(picture(1), "JPEG"), 60_000, 60_000), 413, "too-many-pixels"),
    (
        "POST",
        "/query",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        422,
        "not-an-image",
    ),
    ("POST", "/query", bytes(web.UPLOAD_BYTES + 1), 413, "too-large"),
    ("POST", "/query?image=0123456789abcdef", b"", 404, "no-such-image"),
    ("POST", "/query?image=..%2F..%2Fetc%2Fpasswd", b"", 404, "no-such-image"),
    ("POST", "/query?upload=AAAAAAAAAAAAAAAAAAAAAA", b"", 410, "upload-gone"),
    ("POST", "/query?image=a&upload=b", b"", 400, "two-images"),
    ("POST", "/query?box=0,0,1", QUERY, 400, "bad-box"),
    ("POST", "/query?box=0,0,0,1", QUERY, 400, "bad-box"),
    ("POST", "/query?box=nan,0,1,1", QUERY, 400, "bad-box"),
    ("POST", "/query?box=0,0,1,1.01", QUERY, 400, "bad-box"),
    ("POST", "/query?k=0", QUERY, 400, "bad-parameter"),
    ("POST", "/query?k=501", QUERY, 400, "bad-parameter"),
    ("POST", "/query?k=٣", QUERY, 400, "bad-parameter"),
    ("POST", "/query?k=1&k=2", QUERY, 400, "bad-parameter"),
    ("POST", "/query?max_distance=nan", QUERY, 400, "bad-parameter"),
    ("POST", "/query?max_distance=-1", QUERY, 400, "bad-parameter"),
    ("POST", "/query?keep=1", QUERY, 400, "bad-parameter"),
    ("POST", "/query?top=5", QUERY, 400, "unknown-parameter"),
    ("GET", "/query", b"", 405, "wrong-method"),
    ("DELETE", "/image/0123456789abcdef", b"", 405, "wrong-method"),
    ("GET", "/gallery?start=-1", b"", 400, "bad-parameter"),
    ("GET", "/image/0123456789abcdef", b"", 404, "no-such-image"),
    ("GET", "/image/..%2f..%2fetc%2fpasswd", b"", 404, "no-such-page"),
    ("GET", "/image/%2e%2e", b"", 404, "no-such-image"),
    ("GET", "/../../etc/passwd", b"", 404, "no-such-page"),
    ("GET", "/store.json", b"", 404, "no-such-page"),
    ("GET", "/upload/x", b"", 410, "upload-gone"),
]


@pytest.mark.parametrize(
    ("method", "url", "body", "status", "code"), REFUSED, ids=[f"{c[4]} {c[1]}"[:40] for c in REFUSED]
)
def test_what_is_wrong_is_one_sentence(client, method, url, body, status, code):
    answer = client.request(method, url, content=body)
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert answer.json().keys() == {"error", "code"}
    assert_harmless(answer.status_code, dict(answer.headers), answer.content)
    assert answer.json()["error"].endswith((".", "memory", "again")) and "\n" not in answer.json()["error"]


def assert_harmless(status: int, headers: dict[str, str], body: bytes) -> None:
    """Nothing of this machine, and headers that keep browsers from doing anything with it."""
    for word in ("Traceback", 'File "', "site-packages", "/tmp/", str(Path.home()) + "/"):
        assert word.encode() not in body
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert headers["x-content-type-options"] == "nosniff" and headers["cache-control"] == "no-store"
    assert headers["cross-origin-resource-policy"] == "same-origin" and "access-control-allow-origin" not in headers


def test_data_needs_the_token(service):
    with client_of(service, token=TOKEN) as client:
        assert client.get("/").status_code == client.get("/openapi.json").status_code == 200
        for given in (
            {},
            {"Authorization": f"Bearer {TOKEN}x"},
            {"Authorization": TOKEN},
            {"Authorization": "Bearer é"},
        ):
            for method, url in (("GET", "/about"), ("GET", "/image/x"), ("POST", "/query"), ("GET", "/nothing")):
                headers = {name: value.encode() for name, value in given.items()}
                answer = client.request(method, url, headers=headers)
                assert (answer.status_code, answer.json()["code"]) == (401, "no-token")
        assert client.get("/about", headers={"Authorization": f"Bearer {TOKEN}"}).json()["images"] == 12


def test_pages_of_other_sites_are_refused(service):
    with client_of(service, hosts={"127.0.0.1", "::1"}) as client:
        for host, origin, status in [
            ("127.0.0.1:8000", None, 200),
            ("[::1]:8000", "http://[::1]:8000", 200),
            ("127.0.0.1:8000", "http://127.0.0.1:8000", 200),
            ("127.0.0.1:8000", "http://127.0.0.1:9000", 403),
            ("127.0.0.1:8000", "https://example.org", 403),
            ("127.0.0.1:8000", "null", 403),
            ("rebound.example.org:8000", None, 403),
            ("[", None, 403),
            ("", None, 403),
        ]:
            headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
            assert client.get("/about", headers=headers).status_code == status, (host, origin)


def test_queries_in_flight_are_batched():
    release, batches = threading.Event(), []

    def work(items):
        batches.append(items)
        release.wait(10)
        if "bad" in items:
            raise ValueError("one of them")
        return [item.upper() for item in items]

    async def ask():
        answer = serve.Batches(work, 3)
        first = asyncio.create_task(answer("a"))
        while not batches:
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(answer(item)) for item in ("b", "bad", "c", "d")]
        others[3].cancel()
        await asyncio.sleep(0.01)
        release.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    first, *others = asyncio.run(ask())
    assert batches[:2] == [["a"], ["b", "bad", "c"]], "what arrived during the first batch"
    assert [first, others[0], others[2]] == ["A", "B", "C"] and isinstance(others[1], ValueError)
    assert isinstance(others[3], asyncio.CancelledError)


def test_everybody_gets_their_own_ranking(gallery):
    """Many at once, with different images, boxes and numbers of results."""
    with running(gallery) as address:
        asked = [(number, k, box) for number in range(12) for k, box in ((3, "0,0,1,1"), (7, "0,0,1,0.5"))]
        answers: dict = {}

        def query(number, k, box):
            answer = ask(f"{address}query?k={k}&box={box}", encode(picture(number), "PNG"))
            answers[number, k] = json.loads(answer[1])

        threads = [threading.Thread(target=query, args=one) for one in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for number, k, box in asked:
            whole = pixels(encode(picture(number), "PNG"))
            assert_same(answers[number, k], gallery.query([whole if box == "0,0,1,1" else whole[:40]], k)[0])


def test_too_many_at_once_are_told_so(gallery, monkeypatch):
    monkeypatch.setattr(web, "REQUESTS", 2)
    with running(gallery) as address, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: ask(f"{address}query", QUERY), range(8)))
        assert {status for status, _ in answers} == {200, 503}
        assert all(json.loads(body)["code"] == "busy" for status, body in answers if status == 503)
        assert ask(f"{address}query", QUERY)[0] == 200


def test_an_unexpected_error_stays_in_the_log(gallery, monkeypatch, capsys):
    service = serve.Service(gallery)

    def fail(self, *more, **options):
        raise RuntimeError(f"{gallery.folder} is on fire")

    monkeypatch.setattr(Gallery, "query", fail)
    with client_of(service) as client:
        answer = client.post("/query", content=QUERY)
    assert (answer.status_code, answer.json()["code"]) == (500, "failed")
    assert_harmless(answer.status_code, dict(answer.headers), answer.content)
    log = capsys.readouterr().err
    assert log.count("\n") == 1 and "is on fire" in log and "test_serve.py, line" in log


def test_a_missing_file_does_not_show_its_path(client, gallery):
    name = gallery.store.names[0]
    path = gallery.store.path("folder") / name
    data = path.read_bytes()
    path.unlink()
    try:
        answer = client.get(f"/image/{serve.identifier(name)}")
        assert (answer.status_code, answer.json()["code"]) == (404, "unreadable")
        assert str(path.parent) not in answer.text
    finally:
        path.write_bytes(data)


WRITTEN: list[str] | None = None


def note_writing(event: str, details: tuple) -> None:
    """Notes every file that is opened for writing while WRITTEN is a list."""
    if WRITTEN is not None and event == "open":
        path, mode, flags = details
        if isinstance(path, str | bytes) and (set(mode or "") & set("wax+") or (flags or 0) & 3):
            WRITTEN.append(str(path))


def test_uploads_are_never_written_to_disk(client):
    global WRITTEN
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), dtype=np.uint8))
    data = encode(noise, "PNG")
    assert 6e6 < len(data) < web.UPLOAD_BYTES  # larger than what parsers of forms keep in memory
    client.post("/query", content=data)  # compiles
    sys.addaudithook(note_writing)  # for the rest of the process
    WRITTEN = []
    try:
        kept = client.post("/query?keep=true", content=data).json()["upload"]
        assert client.get(f"/upload/{kept}").status_code == 200
        assert WRITTEN == []
    finally:
        WRITTEN = None


def test_openapi_describes_the_answers(client, service):
    described = client.get("/openapi.json").json()
    methods = {(path, method) for path, operations in described["paths"].items() for method in operations}
    assert methods == {(route.path, "post" if "POST" in route.methods else "get") for route in service.routes()}
    schemas = described["components"]["schemas"]
    query = client.post("/query", content=QUERY).json()
    for name, answer in [
        ("Ranking", query),
        ("Result", query["results"][0]),
        ("About", client.get("/about").json()),
        ("Images", client.get("/gallery").json()),
        ("Error", client.post("/query").json()),
    ]:
        assert answer.keys() == set(schemas[name]["required"]) == schemas[name]["properties"].keys(), name
    given = {one["name"]: one["schema"] for one in described["paths"]["/query"]["post"]["parameters"]}
    told = client.post("/query?nothing=1").json()["error"]
    assert told.endswith(f"expected: {', '.join(given)}.")
    assert given["place"]["enum"] == list(KNOWN_PLACES)
    assert given["k"]["maximum"] == serve.MOST and given["k"]["default"] == serve.TOP
    assert f"{serve.UPLOAD_PIXELS:,}" in (body := described["paths"]["/query"]["post"]["requestBody"]["description"])
    assert f"{web.UPLOAD_BYTES // 2**20} MiB" in body


def test_the_page_asks_nobody_else(client):
    page = client.get("/")
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "//" not in page.text.replace("// ", "").partition("<script>")[0]
    policy = page.headers["content-security-policy"]
    assert "unsafe" not in policy and "connect-src 'self'" in policy and policy.count("sha256-") == 2
    assert "vpm_jax.html */" not in page.text and " style=" not in page.text


def measured(gallery, *distances):
    """Thresholds of two gammas, 0.2 and 1: the distances of the first false match rate, which grow with the rate."""
    points = [{f"{rate:g}": {"distance": distance + rate} for rate in RATES} for distance in distances]
    gammas = {gamma: {"verification": point} for gamma, point in zip(("0.2", "1.0"), points, strict=True)}
    return Thresholds(Path("thresholds.json"), gallery.model.fingerprint, gammas)


def test_thresholds_are_those_of_what_the_query_shows(gallery):
    with client_of(serve.Service(gallery, measured(gallery, 1, 2))) as client:
        answer = client.post("/query", content=QUERY).json()
    top, bottom = answer["shown"]
    assert answer["thresholds"] == {f"{rate:g}": (1 if bottom - top < 0.6 else 2) + rate for rate in RATES}


# ---- A real server ----


def test_slow_and_broken_requests_end(gallery, monkeypatch):
    monkeypatch.setattr(web, "UPLOAD_SECONDS", 0.3)
    monkeypatch.setattr(web, "HEADER_SECONDS", 0.5)
    head = b"POST /query HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\n"
    with running(gallery) as address:
        started = time.monotonic()
        answer = talk(address, head, b"ab")
        assert answer.startswith(b"HTTP/1.1 408 ") and b'"too-slow"' in answer
        assert talk(address) == b"" == talk(address, b"GET / HTTP/1.1\r\nHost:"), "no header, or half of one"
        first = b"GET /about HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
        assert talk(address, first, 0.1, b"GET /ab").count(b"HTTP/1.1") == 1, "half a header after a whole one"
        assert talk(address, b"\x16\x03\x01\x00\xff TLS\r\n\r\n").startswith(b"HTTP/1.1 400 ")
        assert talk(address, head[:-2] + b"Transfer-Encoding: chunked\r\n\r\n", b"zz\r\n").startswith(b"HTTP/1.1 400 ")
        assert time.monotonic() - started < 15
        large = b"POST /query HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999999999\r\n\r\n"
        assert b'"too-large"' in talk(address, large, b"x" * 1000)
        for _ in range(3):  # gone in the middle of an upload
            talk(address, head + b"abc", seconds=0.01)
        assert b'"images":12' in talk(address, first.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "0.0.0.0"])
def test_other_hosts_than_the_loopback_need_a_token(gallery, host):
    with ExitStack() as stack:
        try:
            address = stack.enter_context(running(gallery, host))
        except UserError as error:
            pytest.skip(str(error))
        plain, _, token = address.replace("0.0.0.0", "127.0.0.1").partition("#token=")
        assert bool(token) == (host == "0.0.0.0") and (not token or len(token) >= 32)
        assert ask(f"{plain}about")[0] == (401 if token else 200)
        assert ask(f"{plain}about", token=token)[0] == 200


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", 1), ("127.1.2.3", 1), ("::1", 1), ("localhost", 1), ("0.0.0.0", 0), ("10.0.0.1", 0), ("x.org", 0)],
)
def test_what_is_the_loopback(host, local):
    assert web.is_loopback(host) == bool(local)


def test_the_command_says_what_is_wrong(gallery, tmp_path, monkeypatch):
    store = str(gallery.folder)
    with pytest.raises(UserError, match="--token: expected at least 16"):
        command.main(["serve", "--index", store, "--token", "short"])
    busy = r"^127\.0\.0\.1 port \d+ cannot be used \(Address already in use\)"
    with running(gallery) as address, pytest.raises(UserError, match=busy):
        serve.prepared(gallery, "127.0.0.1", int(address.split(":")[2][:-1]), None, None)
    with pytest.raises(UserError, match="--port: '70000', expected a port"):
        command.main(["serve", "--index", store, "--port", "70000"])
    with pytest.raises(UserError, match=r"^no-such-host port 0 cannot be used"):
        serve.prepared(gallery, "no-such-host", 0, None, None)
    monkeypatch.delattr("vpm_jax.search.serve")
    monkeypatch.delitem(sys.modules, "vpm_jax.search.serve")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    sentence = r"^serve needs an optional package \(.*uvicorn.*\): pip install starlette uvicorn\.$"
    with pytest.raises(UserError, match=sentence):
        command.main(["serve", "--index", store])


def test_the_command_serves_until_it_is_interrupted(gallery, monkeypatch, capsys):
    import uvicorn

    def run(server, sockets):
        assert sockets[0].getsockname()[1] > 0
        raise KeyboardInterrupt

    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.setattr(VPM, "load", lambda path: gallery.model)
    assert command.main(["serve", "--index", str(gallery.folder), "--port", "0", "--workdir", str(gallery.folder)]) == 0
    assert capsys.readouterr().out.startswith("12 images. Open http://127.0.0.1:")


def test_json_of_the_command_and_the_server_agree(gallery, client, tmp_path, monkeypatch):
    monkeypatch.setattr(VPM, "load", lambda path: gallery.model)
    (tmp_path / "query.png").write_bytes(QUERY)
    file = tmp_path / "ranking.json"
    arguments = ["query", str(tmp_path / "query.png"), "--index", str(gallery.folder), "--json", str(file)]
    assert command.main([*arguments, "--workdir", str(gallery.folder)]) == 0
    [expected] = json.loads(file.read_text())["queries"]
    told = client.post("/query?k=20", content=QUERY).json()
    assert [line["image"] for line in told["results"]] == [line["image"] for line in expected["results"]]


@pytest.mark.slow
def test_the_benchmark_measures_the_server_and_the_command(gallery, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # its processes find the package
    file = tmp_path / "serve.json"
    assert (
        benchmark.main(
            ["serve", "--index", str(gallery.folder), "--queries", "16", "--rounds", "1", "--json", str(file)]
        )
        == 0
    )
    rows = {row["name"]: row for row in json.loads(file.read_text())["rows"]}
    assert len(rows) == 11 and all(row["value"] > 0 for row in rows.values())
    assert rows["serve: 4 clients, median"]["value"] <= rows["serve: 4 clients, 99th percentile"]["value"]


def test_load_is_shared_by_the_clients(gallery):
    with running(gallery) as address:
        seconds, each = load(address, [QUERY] * 10, 4)
        assert len(each) == 10 and (each > 0).all() and each.max() <= seconds <= each.sum() + 1
        with pytest.raises(RuntimeError, match="answered 422"):
            load(address, [b"hello"], 1)


# ---- The page ----


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium."""
    api = pytest.importorskip("playwright.sync_api", reason="drives the browser")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("needs Chromium")
    quiet = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=[*quiet, "--disable-sync", "--no-first-run"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, address, **settings):
    """A page of a browser of its own, which raises no error and asks nobody else."""
    context = browser.new_context(**settings)
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    origin = address.partition("#")[0]
    page.on(
        "request",
        lambda request: faults.append(request.url) if not request.url.startswith((origin, "blob:", "data:")) else None,
    )
    page.goto(address)
    yield page
    context.close()
    assert not [fault for fault in faults if "status of 4" not in fault]  # the console repeats what the page says


DROP = """([bytes, name]) => {
    const files = new DataTransfer();
    files.items.add(new File([new Uint8Array(bytes)], name, {type: "image/png"}));
    document.body.dispatchEvent(new DragEvent("drop", {dataTransfer: files, bubbles: true, cancelable: true}));
}"""


def drop(page, data=QUERY):
    page.evaluate(DROP, [list(data), "query.png"])
    settle(page)


def settle(page):
    page.wait_for_selector("#status:not(.busy):not(:empty)", timeout=60_000)


def names(page):
    return [text.split()[-1] for text in page.locator("#results .card:visible figcaption").all_inner_texts()]


def expected(gallery, box, limit=np.inf):
    left, top, right, bottom = np.rint(np.multiply(box, (60, 160, 60, 160))).astype(int)
    [ranked] = gallery.query([pixels(QUERY)[top:bottom, left:right]], 50)
    return [result.name.split()[-1] for result in ranked.results if result.distance < limit]


def test_drop_drag_rank_and_link(browser, gallery):
    with running(gallery) as address:
        with opened(browser, address) as page:
            page.wait_for_selector("#tiles img[src]")
            drop(page)
            assert names(page) == expected(gallery, (0, 0, 1, 1))

            area = page.locator("#stage").bounding_box()
            at = lambda x, y: (area["x"] + x * area["width"], area["y"] + y * area["height"])  # noqa: E731
            page.mouse.move(*at(0.1, 0.05))
            page.mouse.down()
            page.mouse.move(*at(0.5, 0.3))
            page.mouse.move(*at(0.9, 0.5))
            with page.expect_response("**/query?*"):
                page.mouse.up()
            settle(page)
            link = urllib.parse.parse_qs(page.url.partition("#")[2])
            box = [float(edge) for edge in link["box"][0].split(",")]
            assert box == pytest.approx([0.1, 0.05, 0.9, 0.5], abs=0.02)
            assert names(page) == expected(gallery, box)

            distances = [line.split()[1] for line in page.locator("#results .mark").all_inner_texts()]
            limit = float(distances[4]) + 1e-3
            page.fill("#limit", f"{limit:.4f}")
            assert names(page) == expected(gallery, box, limit) and 5 <= len(names(page)) < 12
            page.locator("#slider").focus()
            page.keyboard.press("Home")
            assert not names(page) and "Nobody here" in page.inner_text("#status")
            page.fill("#limit", f"{limit:.4f}")
            shown, link = names(page), page.url

            page.locator("#box").focus()  # the keyboard moves the box too
            with page.expect_response("**/query?*"):
                page.keyboard.press("ArrowDown")
            settle(page)
            assert page.url != link
            page.go_back()
            settle(page)

        with opened(browser, link, viewport={"width": 400, "height": 800}, color_scheme="dark") as page:
            page.wait_for_selector("#results .card img[src]")
            assert names(page) == shown and page.url == link
            assert float(page.input_value("#limit")) == pytest.approx(limit, abs=1e-4)
            assert page.locator("html").evaluate("html => html.scrollWidth") == 400
            page.locator("#results .pick").first.click()
            page.wait_for_url("**/#image=*")
            settle(page)
            assert names(page)[0] == shown[0], "an image is nearest to itself"

        gone = link.replace(urllib.parse.parse_qs(link.partition("#")[2])["upload"][0], "A" * 22)
        with opened(browser, gone) as page:
            page.wait_for_selector("#tiles img[src]")
            assert "no longer in memory" in page.inner_text("#status")


def test_the_page_asks_for_the_token(browser, gallery):
    with running(gallery, token=TOKEN) as address:
        with opened(browser, address) as page:  # with the token in the link
            page.wait_for_selector("#tiles img[src]")
            assert TOKEN not in page.url
        with opened(browser, address.partition("#")[0]) as page:
            page.fill("#token", "wrong")
            page.keyboard.press("Enter")
            page.wait_for_selector("#token:visible")
            page.fill("#token", TOKEN)
            page.keyboard.press("Enter")
            page.wait_for_selector("#tiles img[src]")


def test_the_page_offers_measured_thresholds(browser, gallery):
    distances = [result.distance for result in gallery.query([QUERY], 12)[0].results]
    limit = float(np.mean(distances[3:5])) - 0.1
    thresholds = measured(gallery, limit, limit)
    with running(gallery, thresholds=thresholds) as address, opened(browser, address) as page:
        page.wait_for_selector("#tiles img[src]")
        drop(page)
        page.get_by_role("button", name="10 %", exact=True).click()  # the rate of 0.1
        assert names(page) == expected(gallery, (0, 0, 1, 1), limit + 0.1) and len(names(page)) == 4
        assert float(page.input_value("#limit")) == pytest.approx(limit + 0.1, abs=1e-4)


def test_the_page_asks_what_part_is_visible_where_the_model_needs_it(browser, gallery, padded):
    with running(padded[0]) as address:
        with opened(browser, address) as page:
            page.wait_for_selector("#tiles img[src]")
            drop(page)
            page.get_by_role("button", name="Upper half").click()
            settle(page)
            pressed = page.locator("#parts [aria-pressed=true]")
            assert pressed.all_inner_texts() == ["Auto"] and "place" not in page.url
            by_box = names(page)
            page.get_by_role("button", name="Auto").focus()
            for key in ("Tab", "Tab", "Tab"):
                page.keyboard.press(key)
            with page.expect_response("**/query?*place=bottom*"):
                page.keyboard.press("Enter")
            settle(page)
            shown, link = names(page), page.url
            assert pressed.all_inner_texts() == ["Bottom"] and "place=bottom" in link
            [ranked] = padded[0].query([pixels(QUERY)[:80]], 50, places="bottom")
            assert shown == [result.name.split()[-1] for result in ranked.results] != by_box
            page.go_back()
            page.wait_for_function("document.querySelector('#parts [aria-pressed=true]').value === ''")
            settle(page)
            assert names(page) == by_box
        with opened(browser, link, viewport={"width": 400, "height": 800}) as page:
            page.wait_for_selector("#results .card img[src]")
            assert names(page) == shown and page.url == link
            assert page.locator("#parts [aria-pressed=true]").all_inner_texts() == ["Bottom"]
            assert page.locator("html").evaluate("html => html.scrollWidth") == 400
            page.locator("#results .pick").first.click()
            page.wait_for_url("**/#image=*")
            assert "place" not in page.url
    with running(gallery) as address, opened(browser, address) as page:
        page.wait_for_selector("#tiles img[src]")
        drop(page)
        assert not page.locator("#parts").is_visible()


def test_the_page_says_what_is_wrong(browser, gallery):
    with running(gallery) as address, opened(browser, address) as page:
        page.wait_for_selector("#tiles img[src]")
        drop(page, b"hello")
        assert "is not an image" in page.inner_text("#status") and "bad" in page.get_attribute("#status", "class")
        drop(page)
        assert names(page)
