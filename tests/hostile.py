"""Throws damaged files, random values and random objects at every door of the package, and counts what comes of it.

    python tests/hostile.py --cases 10000 --jobs 2 --page docs/results/survival.md
    python tests/hostile.py --cases 10000 --doors zip csv --page docs/results/survival.md  # of the same series, these
    python tests/hostile.py --doors npz --case 123          # one case again, with its traceback

A door reads an intact input once; that is the right answer. A case damages the input and reads it again:

    reported    one sentence that says what is wrong (UserError, or where it is documented, ValueError)
    unchanged   the right answer, in spite of the damage
    other       another answer that no program can tell from a right one: the format has no checksum (JPEG, CSV, logs)
    wrong       another answer from a format whose damage can be told
    traceback   any other exception
    hang        nothing after --seconds
    crash       the process died

Every case follows from --seed, the door's name and its number. Cases run in processes of their own. Exit code 1 if any
case is wrong, a traceback, a hang or a crash.
"""

from __future__ import annotations

import argparse
import atexit
import collections
import contextlib
import hashlib
import io
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS / "helpers"), str(TESTS.parent)]

import numpy as np  # noqa: E402

from vpm_jax.errors import UserError  # noqa: E402

FAULTS = ("wrong", "traceback", "hang", "crash")
VERDICTS = ("reported", "unchanged", "other", *FAULTS)


# ---- Damage ----


def damage(data: bytes, random: random.Random) -> tuple[str, bytes]:
    """(what was done, the damaged bytes)."""
    n = len(data)
    at = random.randrange(n + 1)
    length = min(n - at, 1 + int(random.expovariate(1 / 16)))
    kind = random.choice(("bit", "bit", "bytes", "zeros", "cut", "cut", "append", "remove", "insert", "swap", "empty"))
    if kind == "bit" and n:
        at = min(at, n - 1)
        out = bytearray(data)
        out[at] ^= 1 << random.randrange(8)
        return f"bit of byte {at}", bytes(out)
    if kind in ("bytes", "insert"):
        end = at + length if kind == "bytes" else at
        return f"{kind} {at}:{at + length}", data[:at] + random.randbytes(max(1, length)) + data[end:]
    if kind == "zeros":
        return f"zeros {at}:{at + length}", data[:at] + bytes(length) + data[at + length :]
    if kind == "cut":
        return f"cut at {at}", data[:at]
    if kind == "append":
        more = random.choice((random.randbytes(1 + length), bytes(1 + length), data[:at] or b"\n"))
        return f"append {len(more)} bytes", data + more
    if kind == "remove":
        return f"remove {at}:{at + length}", data[:at] + data[at + length :]
    if kind == "swap" and n > 1:
        middle = n // 2
        return "halves swapped", data[middle:] + data[:middle]
    return "empty", b""


def damaged_text(text: str, random: random.Random) -> tuple[str, bytes]:
    """JSON or CSV damaged as a person or an editor would: a value replaced; otherwise as `damage`."""
    if random.random() < 0.5:
        return damage(text.encode(), random)
    tokens = [i for i, c in enumerate(text) if c.isalnum() and (i == 0 or not text[i - 1].isalnum())]
    if not tokens:
        return damage(text.encode(), random)
    start = random.choice(tokens)
    end = start
    while end < len(text) and (text[end].isalnum() or text[end] in "._-"):
        end += 1
    new = random.choice(
        ("-1", "0", "NaN", "null", "true", "1e999", "-0.0", '"', "[]", "{}", "99999999999999999999", "é")
    )
    return f"{text[start:end]!r} -> {new}", (text[:start] + new + text[end:]).encode()


def digest(*values: Any) -> str:
    """A digest of arrays, bytes, numbers, text and containers of them."""
    total = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, dict):
            value = sorted(value.items(), key=str)
        if isinstance(value, (list, tuple)):
            for item in value:
                add(item)
        elif hasattr(value, "dtype"):
            array = np.ascontiguousarray(value)
            total.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
        else:
            total.update(value if isinstance(value, bytes) else repr(value).encode())

    add(values)
    return total.hexdigest()


# ---- Doors ----


class Door(ABC):
    """One way in: an intact input in `folder`, and what the package makes of it."""

    checksum = True  # damage that changes the answer can be told
    share = 1.0  # of the cases

    def __init__(self, folder: Path):
        self.folder = folder
        self.make(folder)
        self.right = self.read()
        self.intact = {path: path.read_bytes() for path in self.files()}
        self.entries = set(folder.rglob("*"))

    @abstractmethod
    def make(self, folder: Path) -> None:
        """Writes the intact input into the empty folder."""

    @abstractmethod
    def read(self) -> Any:
        """What the package reads there."""

    def files(self) -> list[Path]:
        """The files that a case may damage."""
        return sorted(path for path in self.folder.rglob("*") if path.is_file())

    def case(self, random: random.Random) -> tuple[str, Callable[[], Any]]:
        """(what is done to the input, which reads it)."""
        path = random.choice(list(self.intact))
        if path.suffix in (".json", ".jsonl", ".csv"):
            what, data = damaged_text(self.intact[path].decode(), random)
        else:
            what, data = damage(self.intact[path], random)
        path.write_bytes(data)
        return f"{path.name}: {what}", self.read

    def mend(self) -> None:
        """Makes the input intact again."""
        for path in sorted(set(self.folder.rglob("*")) - self.entries, reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        for path, data in self.intact.items():
            if not path.exists() or path.read_bytes() != data:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def judge(self, answer: Any) -> str:
        if answer == self.right:
            return "unchanged"
        return "wrong" if self.checksum else "other"


class Jpeg(Door):
    checksum, share = False, 2.0
    form = "JPEG"

    def make(self, folder):
        from images import PICTURE, encode, oriented
        from PIL import Image

        (folder / "plain").write_bytes(encode(Image.fromarray(PICTURE), self.form))
        (folder / "turned").write_bytes(oriented(self.form, 6))
        (folder / "gray").write_bytes(encode(Image.fromarray(PICTURE[..., 0]), self.form))

    def read(self):
        from vpm_jax.data.decode import decode

        return [digest(decode(path.read_bytes(), path.name, upright=True)) for path in self.files()]


class Png(Jpeg):
    checksum, form = True, "PNG"


class Dataset(Door):
    """Every name, label and image of a dataset."""

    name = "market1501"

    @property
    def root(self) -> Path:
        return self.folder

    def read(self):
        from market_files import config

        from vpm_jax.data.sources import load_dataset

        dataset = load_dataset(config(self.root, self.name))
        splits = (dataset.train, dataset.query, dataset.gallery)
        return [digest(s.names, s.identity, s.camera, [digest(s.read(i)) for i in range(len(s))]) for s in splits]


class Zip(Dataset):
    @property
    def root(self):
        return self.folder / "market.zip"

    def make(self, folder):
        from market_files import make_folder, make_zip

        with tempfile.TemporaryDirectory() as temporary:
            make_zip(make_folder(Path(temporary)), self.root)


class Csv(Dataset):
    name, checksum = "csv", False

    @property
    def root(self):
        return self.folder / "own.csv"

    def files(self):
        return [self.root]

    def make(self, folder):
        from market_files import jpeg

        lines = ["path,identity,camera,split"]
        for i in range(12):
            (folder / f"{i}.jpg").write_bytes(jpeg(i))
            lines.append(f"{i}.jpg,person{i % 4},{i % 3},{('train', 'query', 'gallery')[i // 4]}")
        self.root.write_text("\n".join(lines) + "\n")


class ArrayRecord(Dataset):
    share = 0.5

    def make(self, folder):
        from market_files import config, make_folder

        from vpm_jax.data import arrayrecord
        from vpm_jax.data.sources import load_dataset

        with tempfile.TemporaryDirectory() as temporary:
            make_folder(Path(temporary) / "market")
            dataset = load_dataset(config(Path(temporary) / "market"), preparing=True)
            arrayrecord.write(dataset, folder)


class Names(Dataset):
    """Entries with random names, kinds and sizes beside those of a dataset."""

    def make(self, folder):
        from market_files import make_folder

        make_folder(folder)

    def case(self, random):
        what = []
        for _ in range(random.randint(1, 4)):
            length = random.choice((1, 3, 8, 40, 200))
            letters = random.choice(
                ("abc.", "0123_csj.", "".join(map(chr, range(1, 47))) + "é日\udcff", "*?[]{}()!~$&;'\" ")
            )
            name = "".join(random.choice(letters) for _ in range(length)).strip("/\0") or "x"
            name += random.choice(("", ".jpg", ".JPG", ".png", ".txt", ".heic"))
            path = self.folder / random.choice(("query", "bounding_box_test", "bounding_box_train", ".")) / name
            kind = random.choice(("empty", "junk", "link to nothing", "link to itself", "folder", "pipe", "sparse"))
            with contextlib.suppress(OSError):
                if os.path.lexists(path):
                    continue
                if kind in ("empty", "junk"):
                    path.write_bytes(random.randbytes(100 * (kind == "junk")))
                elif kind == "folder":
                    path.mkdir()
                elif kind == "pipe":
                    os.mkfifo(path)
                elif kind == "sparse":
                    with path.open("wb") as file:
                        file.truncate(2**33)
                else:
                    path.symlink_to("nothing" if kind == "link to nothing" else path.name)
                what.append(f"{kind} {path.relative_to(self.folder).as_posix()!r}")
        return ", ".join(what), self.read

    def judge(self, answer):
        """All that was there is still there; more images may be, since some names are those of images."""
        return "unchanged" if answer == self.right else "other"


class Weights(Door):
    """Files of weights, by `pretrained.load`."""

    suffix, share = "npz", 0.5

    def make(self, folder):
        import torch_files

        from vpm_jax import pretrained
        from vpm_jax.pretrained import own

        torch = torch_files.save(folder / "weights.pth", torch_files.resnet(18))
        weights = pretrained.load(str(torch))
        if self.suffix == "npz":
            own.write_npz(folder / "weights.npz", weights)
        if self.suffix == "safetensors":
            own.write_safetensors(folder / "weights.safetensors", weights)
        if self.suffix != "pth":
            torch.unlink()

    def read(self):
        from vpm_jax import pretrained

        weights = pretrained.load(str(self.files()[0]))
        return digest(weights.flat(), weights.stride_on, weights.bn_epsilon, weights.mean, weights.std)


class Pth(Weights):
    suffix = "pth"


class Safetensors(Weights):
    suffix = "safetensors"


class Checkpoint(Door):
    share = 0.3

    def make(self, folder):
        from tiny_runs import make_run

        make_run(folder / "run")

    def files(self):
        return [path for path in super().files() if "checkpoints" in path.parts]

    def read(self):
        from tiny_runs import saved_state

        state, meta = saved_state(self.folder / "run")
        import jax

        return digest(jax.tree.leaves(state), meta)


class Store(Door):
    """A ranking from a feature store, and opening it for appending."""

    share = 2.0

    def make(self, folder):
        from plain_matching import example
        from stores import write

        from vpm_jax.search.store import About

        _, _, features, visibility = example(gallery=40, regions=3, channels=8)
        write(folder / "store", About("model", "config", 3, 8), [f"{i}.jpg" for i in range(40)], features, visibility)

    def files(self):
        return [path for path in super().files() if path.name != "lock"]

    def read(self):
        from plain_matching import example

        from vpm_jax import Description
        from vpm_jax.config import default
        from vpm_jax.matching import nearest
        from vpm_jax.search.store import Store

        queries, scores, _, _ = example(queries=3, regions=3, channels=8)
        store = Store(self.folder / "store")
        store.verify()
        distance, index = nearest(default().match, Description(queries, scores), store, 5)
        return digest([[store.names[i] for i in row] for row in index], np.round(distance, 4))


class Appending(Store):
    """Opening a damaged store for appending: what cannot be opened is left as it is."""

    def read(self):
        from vpm_jax.search.store import About, Store, Writer

        before = {path: path.read_bytes() for path in self.files()}
        try:
            with Writer(self.folder / "store", About("model", "config", 3, 8)):
                pass
        except UserError:
            assert {path: path.read_bytes() for path in self.files()} == before, "a refused store was changed"
            raise
        store = Store(self.folder / "store")
        store.verify()
        return digest(store.names, np.asarray(store.features), store.visibility)


class Export(Door):
    share = 0.2

    def make(self, folder):
        from tiny_runs import make_run

        from vpm_jax import VPM, export

        with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
            make_run(Path(temporary) / "run")
            export.write_stablehlo(folder / "model.stablehlo", VPM.load(Path(temporary) / "run"))

    def read(self):
        from images import PICTURE

        from vpm_jax import VPM

        model = VPM.load(self.folder / "model.stablehlo")
        features = model([PICTURE])
        return digest(np.round(features.features, 4), np.round(features.visibility, 2), model.config.to_dict())


class ConfigFile(Door):
    """The config.json of a run, which people edit."""

    checksum = False

    def make(self, folder):
        from tiny import shrunk

        from vpm_jax.config import to_json

        (folder / "config.json").write_text(to_json(shrunk("market")))

    def read(self):
        from vpm_jax import config

        saved = config.read(self.folder)
        assert saved is not None
        return config.to_json(saved)


class Log(Door):
    """metrics.jsonl, as the plots read it and as a continued run does."""

    checksum, share = False, 0.3  # each case draws a figure

    def make(self, folder):
        lines = [
            {"step": n, "loss": 1 / n, "images_per_second": 3.0, "accuracy_identity": [0.1, 0.2]} for n in range(1, 30)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def read(self):
        from vpm_jax import plots

        path = self.folder / "metrics.jsonl"
        try:
            lines = plots.read_steps(path)
            plots.training_curves(io.BytesIO(), path)
        except ValueError as error:
            raise UserError(str(error)) from None  # documented
        return digest({step: line for step, line in lines.items()})


VALUES = (
    *(
        "0",
        "-1",
        "1",
        "2",
        "0.5",
        "nan",
        "inf",
        "-inf",
        "1e400",
        "''",
        "[]",
        "()",
        "(1,)",
        "(0.5, 1.0)",
        "None",
        "True",
    ),
    *("{}", "auto", "none", "pad", "é", "a b", "'x", "[1", "1,2", "9" * 30, "-0.0", "lambda: 0", "__import__('os')"),
)


class Flags(Door):
    """--config.KEY=VALUE with random values; what is accepted must describe a network."""

    checksum, share = False, 2.0

    def make(self, folder):
        """Nothing: the input is the command line."""

    def read(self, arguments=()):
        import jax

        from vpm_jax import cli, config, step
        from vpm_jax.geometry import feature_map_shape

        loaded = cli.load_config(str(TESTS.parent / "configs" / "market.py"), list(arguments))
        config.check(loaded)
        loaded.model.num_identities = loaded.model.num_identities or 4
        feature_map_shape(loaded)
        if self.deep:
            loaded.model.dtype = "float32"
            jax.tree.leaves(step.state_shapes(loaded))
        return config.to_json(loaded)

    deep = False

    def case(self, random):
        from vpm_jax import config

        keys = list(config.flatten(config.default()))
        arguments = []
        for _ in range(random.choice((1, 1, 2, 3))):
            key = random.choice(keys)
            if random.random() < 0.1:
                key = key[: random.randrange(len(key))] + random.choice(("", "x", ".", "é"))
            arguments.append(f"--config.{key}={random.choice(VALUES)}")
        return " ".join(arguments), lambda: self.read(arguments)


class Networks(Flags):
    """As `Flags`, of the model's keys, and the network is built."""

    share, deep = 0.3, True

    def case(self, random):
        choices = {
            "depth": (10, 18, 50),
            "width": (1, 3, 8),
            "stem": ("7x7", "3x3", "4x4"),
            "grid": ((1, 1), (6, 1), (3, 2), (99, 1)),
            "strides": ((1, 1, 1), (2, 2, 2)),
            "last_stride": (1, 2),
            "locator_stage": (1, 2, 3, 4),
            "locator_groups": (1, 2, 3, 7),
            "locator_hidden": (0, 5),
            "head_dim": (0, 1, 7),
            "dummy_classes": (0, 3),
            "global_head": (True, False),
        }
        chosen = random.sample(sorted(choices), random.randint(1, 5))
        arguments = [f"--config.model.{key}={random.choice(choices[key])}" for key in chosen]
        arguments += [f"--config.data.{side}={random.choice((1, 7, 32, 33))}" for side in ("height", "width")]
        return " ".join(arguments), lambda: self.read(arguments)


class Images(Door):
    """Objects and arrays given to VPM.features, which are images or not."""

    checksum, share = False, 1.0

    def make(self, folder):
        from images import PICTURE, encode
        from PIL import Image
        from tiny_runs import make_run

        from vpm_jax import VPM

        make_run(folder / "run")
        self.model = VPM.load(folder / "run")
        (folder / "a.png").write_bytes(encode(Image.fromarray(PICTURE)))
        (folder / "folder").mkdir()

    def files(self):
        return []

    def mend(self):
        pass

    def read(self, images=()):
        out = self.model.features(images, batch=2)
        values = (out.features, out.visibility, out.region_maps)
        assert all(np.isfinite(x).all() for x in values), "not finite"
        assert len({len(x) for x in values}) == 1
        return digest(*values)

    dtypes = (*[np.uint8] * 4, np.int32, np.float32, np.float64, bool, "U3", object, np.complex64)
    modes = ("RGB", "L", "1", "RGBA", "CMYK", "I", "F", "P", "LA", "I;16")
    objects = (None, 3, 2.5, "", "é\udcff", "a\0b", {}, {"a": 1}, set(), object(), len, [], [[]])

    def one(self, random) -> Any:
        from PIL import Image

        path = self.folder / "a.png"
        shape = tuple(random.choice((0, 1, 2, 3, 4, 5, 16)) for _ in range(random.randint(0, 4)))
        makers = (
            lambda: np.zeros(shape, random.choice(self.dtypes)),
            lambda: np.zeros((16, 8, 3), np.uint8)[:: random.choice((1, -1, 2))],
            lambda: self.folder / random.choice(("a.png", "folder", "nothing.jpg", "run", "a.png/b")),
            lambda: str(path),
            lambda: random.randbytes(random.randrange(50)),
            lambda: bytearray(path.read_bytes()),
            lambda: io.BytesIO(path.read_bytes()),
            lambda: Image.new(random.choice(self.modes), shape[:2] if len(shape) > 1 else (3, 2)),
            lambda: random.choice(self.objects),
            lambda: iter([path]),
            lambda: [path, random.choice((None, 5, b"", "x"))],
        )
        return random.choice(makers)()

    def case(self, random):
        thing = self.one(random) if random.random() < 0.6 else [self.one(random) for _ in range(random.randrange(4))]
        return repr(thing)[:100], lambda: self.read(thing)


class Matching(Images):
    """Descriptions and images given to VPM.match."""

    share = 0.5

    def read(self, query=None, gallery=None):
        good = self.model.features([np.zeros((16, 8, 3), np.uint8)])
        try:
            distance = self.model.match(good if query is None else query, good if gallery is None else gallery)
        except ValueError as error:
            raise UserError(str(error)) from None  # documented
        assert not np.isnan(distance).any() and distance.ndim == 2 and distance.dtype == np.float32
        return digest(distance)

    def case(self, random):
        from vpm_jax import Description

        regions, channels = self.model.grid.count, int(self.model.config.model.width) * 8

        def description():
            shape = [random.choice((0, 1, 2)), random.choice((regions, regions, 1)), random.choice((channels, 2))]
            shape = shape[: random.choice((3, 3, 3, 2))]
            scores = np.full(shape[:2] if random.random() < 0.8 else (3, 1), random.choice((1, 0, -1, np.nan, np.inf)))
            features = np.ones(shape, random.choice((np.float32, np.float64, np.int8)))
            return Description(features, scores.astype(np.float32))

        things = [random.choice((description, description, lambda: self.one(random)))() for _ in range(2)]
        return repr(things)[:100], lambda: self.read(*things)


class Requests(Door):
    """Bytes sent to the search server: images, paths, parameters, headers, slow and broken uploads."""

    checksum = False
    secret = b"the content of a file beside the images"

    def make(self, folder):
        from images import PICTURE, encode
        from PIL import Image
        from serving import ask, running
        from tiny_runs import make_run

        from vpm_jax import VPM, Gallery
        from vpm_jax.search import serve, web

        web.UPLOAD_SECONDS, web.HEADER_SECONDS = 0.4, 0.6
        make_run(folder / "run")
        (folder / "images").mkdir()
        for turn in range(4):
            Image.fromarray(np.rot90(PICTURE, turn)).save(folder / "images" / f"{turn}.png")
        for name in ("secret.txt", "images/secret.jpg"):
            (folder / name).write_bytes(self.secret)
        gallery = Gallery.open(folder / "store", VPM.load(folder / "run"))
        gallery.add(sorted((folder / "images").glob("*.png")))
        self.address = SERVERS.enter_context(running(gallery))
        self.image, self.png = (encode(Image.fromarray(PICTURE), form) for form in ("JPEG", "PNG"))
        self.id = serve.identifier(str(folder / "images" / "0.png")).encode()
        _, body = ask(f"{self.address}query?keep=true", encode(Image.fromarray(PICTURE[::-1])))
        self.key = json.loads(body)["upload"].encode()  # of somebody else
        forms, modes = ("PNG", "GIF", "BMP", "TIFF", "PPM", "WEBP", "ICO", "PCX"), ("I", "F", "I;16", "1")
        self.bodies = [encode(Image.fromarray(PICTURE), form) for form in forms]
        self.bodies += [encode(Image.fromarray(PICTURE[..., 0]).convert(mode), "TIFF") for mode in modes]
        self.bodies += [encode(Image.new("RGB", size)) for size in ((1, 1), (1, 9000), (9000, 1), (6000, 6000))]
        self.bodies += [b"", b"\0", b"hello", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.7\n", b"PK\3\4"]
        self.bodies += [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(secret.txt) run\n"]

    def files(self):
        return []

    def mend(self):
        pass

    def request(self, target=b"/query", body=None, method=b"", headers=()) -> bytes:
        def missing(*names):
            return not any(line.lower().startswith(names) for line in headers)

        lines = [(method or (b"GET" if body is None else b"POST")) + b" " + target + b" HTTP/1.1", *headers]
        if missing(b"host:"):
            lines.append(b"Host: 127.0.0.1")
        if body is not None and missing(b"content-length:", b"transfer-encoding:"):
            lines.append(b"Content-Length: %d" % len(body))
        return b"\r\n".join([*lines, b"", body or b""])

    def read(self, pieces=None):
        from serving import exchange

        answer = exchange(self.address, [self.request(body=self.image)] if pieces is None else pieces)
        if answer is None:
            return None
        status, headers, body = answer
        for leaked in (str(self.folder).encode(), b"Traceback", b"site-packages", self.secret, self.key):
            assert leaked not in body, leaked
        assert status < 500, (status, body)
        if status == 400 and headers["content-type"].startswith("text/plain"):
            assert body in (b"", b"Invalid HTTP request received.")  # HEAD has no body
            raise UserError("Invalid HTTP request received.")
        assert {"content-security-policy", "x-content-type-options", "cache-control"} <= headers.keys()
        if status >= 400:
            told = json.loads(body) if body else {"error": "Nothing, as an answer to HEAD.", "code": "none"}
            assert told.keys() == {"error", "code"}
            raise UserError(told["error"])
        return digest(status, body)

    def case(self, random):
        kinds = self.of_image, self.of_type, self.of_size, self.of_path, self.of_parameters, self.of_headers
        kind = random.choice((*kinds, self.slow, self.broken, self.of_bytes))
        what, *pieces = kind(random)

        def read():
            try:
                return self.read(pieces)
            finally:
                assert self.read() == self.right, "the server answers otherwise afterwards"

        return f"{kind.__name__}: {what[:100]!r}", read

    def of_image(self, random):
        what, body = damage(random.choice((self.image, self.png)), random)
        return what, self.request(body=body)

    def of_type(self, random):
        body = random.choice((*self.bodies, random.randbytes(random.randrange(2000))))
        kind = random.choice((b"image/jpeg", b"text/html", b"multipart/form-data; boundary=x", b"", b"\xff"))
        return body[:20], self.request(body=body, headers=[b"Content-Type: " + kind])

    def of_size(self, random):
        from images import with_size

        if random.random() < 0.7:
            size = random.choice((0, 1, 5001, 9000, 30_000, 65_000)), random.choice((0, 1, 5001, 9000, 65_000))
            return str(size), self.request(body=with_size(random.choice((self.image, self.png)), *size))
        length = 10 * 2**20 + random.choice((0, 1, 2**20))
        return str(length), self.request(body=self.image + bytes(length - len(self.image)))

    def of_path(self, random):
        steps = rb".. .. %2e%2e %2e%2e%2f . \ %00 %c0%ae etc passwd secret.txt images store.json ~root query".split()
        steps += [b"", b"\xff", b"a" * 9000, self.id]
        root = random.choice([b"", *b"/ /image/ /upload/ http://example.org/ *".split(), b"/image/" + self.id + b"/"])
        target = root + b"/".join(random.choices(steps, k=random.randint(1, 4)))
        method = random.choice(b"GET GET HEAD POST PUT DELETE OPTIONS TRACE CONNECT X".split())
        return method + b" " + target, self.request(target, b"" if method == b"POST" else None, method)

    def of_parameters(self, random):
        names = b"image upload box place k max_distance keep height start count %00 x".split()
        values = b"0 -1 1e999 nan true 0,0,1,1 0,0,1,1,1 1,1,0,0 0,0,1e-9,1 0,0,inf,1 %ff %F0%9F%98%80 ' <x>".split()
        values += [b"", b"9" * 5000, b"../../secret.txt", self.id, b"A" * 22]
        pairs = [random.choice(names) + b"=" + random.choice(values) for _ in range(random.randint(1, 3))]
        path = random.choice((b"/query", b"/query", b"/gallery", b"/image/" + self.id, b"/about"))
        target = path + b"?" + b"&".join(pairs)
        return target, self.request(target, self.image if path == b"/query" else None)

    def of_headers(self, random):
        lines = (
            "Host: example.org|Host:|Host: [|Origin: https://example.org|Origin: null|Origin: http://[|: x|X: a\nY: b|"
            "Content-Length: -1|Content-Length: 99999999999999999999|Content-Length: 5|Content-Length: x|X: a\rb|X: \0|"
            "Transfer-Encoding: chunked|Transfer-Encoding: gzip|Expect: 100-continue|Upgrade: websocket|Accept: */*|"
            "Connection: upgrade|Range: bytes=0-3|X-Forwarded-For: 10.0.0.1|Authorization: Bearer \xff"
        )
        headers = random.sample([*lines.split("|"), "X: " + "a" * 70_000], random.randint(1, 3))
        pieces = [self.request(body=self.image, headers=[line.encode("latin-1") for line in headers])]
        more = random.choice((b"", b"", b"\r\n\r\n", b"5\r\nhello\r\n0\r\n\r\n"))
        return " | ".join(line[:40] for line in headers), *pieces, more

    def slow(self, random):
        data = self.request(body=self.image)
        cuts = sorted(random.sample(range(len(data)), random.randint(1, 4)))
        pieces = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        kept = random.randint(1, len(pieces))  # the rest never comes
        pauses = [random.choice((0.0, 0.05, 0.3)) for _ in range(kept)]
        return f"{cuts}, {kept} sent", *itertools.chain(*zip(pieces[:kept], pauses, strict=True))

    def broken(self, random):
        data = self.request(body=self.image)
        end = random.randrange(len(data))
        return f"gone after {end} bytes", data[:end], None

    def of_bytes(self, random):
        target = random.choice((b"/about", b"/query", b"/image/" + self.id))
        what, data = damage(self.request(target, self.image if target == b"/query" else None), random)
        return what, data


SERVERS = contextlib.ExitStack()  # run as long as the process
atexit.register(SERVERS.close)


DOORS: dict[str, type[Door]] = {
    "jpeg": Jpeg,
    "png": Png,
    "csv": Csv,
    "zip": Zip,
    "names": Names,
    "arrayrecord": ArrayRecord,
    "pth": Pth,
    "npz": Weights,
    "safetensors": Safetensors,
    "checkpoint": Checkpoint,
    "store": Store,
    "append": Appending,
    "export": Export,
    "config.json": ConfigFile,
    "metrics.jsonl": Log,
    "flags": Flags,
    "networks": Networks,
    "images": Images,
    "match": Matching,
    "requests": Requests,
}


# ---- Running them ----


def try_case(door: Door, name: str, seed: int, number: int) -> tuple[str, str, str]:
    """(what was done, the verdict, more about a fault)."""
    what = "?"
    try:
        what, read = door.case(random.Random(f"{seed} {name} {number}"))
        with contextlib.redirect_stderr(io.StringIO()):
            answer = read()
        return what, door.judge(answer), ""
    except UserError as error:
        good = str(error) and "\n" not in str(error)
        return what, "reported" if good else "traceback", "" if good else f"not one sentence: {error}"
    except Exception:
        return what, "traceback", traceback.format_exc()
    finally:
        door.mend()


def work(name: str, seed: int, first: int, last: int) -> None:
    """Runs the cases first..last - 1 of a door: an empty line when it is set up, then a line of JSON for each."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print too
    with tempfile.TemporaryDirectory() as folder:
        door = DOORS[name](Path(folder))
        print(file=out, flush=True)
        for number in range(first, last):
            print(json.dumps([number, *try_case(door, name, seed, number)]), file=out, flush=True)


def outcomes(name: str, seed: int, cases: int, seconds: float) -> Iterator[tuple[int, str, str, str]]:
    """The cases of a door, tried in processes that are replaced when they hang or die."""
    number = 0
    while number < cases:
        command = [sys.executable, __file__, "--worker", name, "--seed", str(seed), "--case", f"{number}:{cases}"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stderr is not None
            errors: list[str] = []
            threading.Thread(target=errors.extend, args=(process.stderr,), daemon=True).start()
            if not process.stdout.readline():
                raise RuntimeError(f"{name} could not be set up:\n{''.join(errors)}")
            late = threading.Event()

            def stop(process=process, late=late) -> None:
                late.set()
                process.kill()

            while True:
                watch = threading.Timer(seconds, stop)
                watch.start()
                line = process.stdout.readline()
                watch.cancel()
                if not line:
                    break
                number, what, verdict, more = json.loads(line)
                yield number, what, verdict, more
                number += 1
        if number < cases:
            end = process.returncode
            name_of_end = signal.Signals(-end).name if end < 0 else f"exit code {end}"
            yield number, "?", "hang" if late.is_set() else "crash", f"{name_of_end}\n{''.join(errors[-30:])}"
            number += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="over all doors, each its share")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--doors", nargs="+", choices=DOORS, default=list(DOORS))
    parser.add_argument("--case", help="only this case of each door")
    parser.add_argument("--seconds", type=float, default=30, help="for one case")
    parser.add_argument("--jobs", type=int, default=1, help="doors tried at once")
    parser.add_argument("--page", type=Path, help="Markdown; its table gets a row as each door ends")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "True"}
    if args.worker:
        first, _, last = args.case.partition(":")
        work(args.worker, args.seed, int(first), int(last))
        return 0
    if args.case is not None:
        for name in args.doors:
            with tempfile.TemporaryDirectory() as folder:
                what, verdict, more = try_case(DOORS[name](Path(folder)), name, args.seed, int(args.case))
            print(f"{name} {args.case}: {verdict}: {what}\n{more}")
        return 0

    from vpm_jax.benchmark.report import hardware, versions
    from vpm_jax.reproduce.results import commit

    version, shares, lock = commit() or "?", sum(door.share for door in DOORS.values()), threading.Lock()

    def run_door(name: str) -> Row:
        begun, count = time.monotonic(), collections.Counter[str]()
        cases = math.ceil(args.cases * DOORS[name].share / shares)
        for number, what, verdict, more in outcomes(name, args.seed, cases, args.seconds):
            count[verdict] += 1
            if verdict in FAULTS:
                print(f"{name} {number}: {verdict}: {what}\n{more}", flush=True)
        row = Row(name, version, args.seed, time.monotonic() - begun, count)
        print(f"{name}: {dict(count)} in {row.seconds:.0f} s", flush=True)
        if args.page:
            with lock:
                update(args.page, row, f"On {hardware()}; {versions()}.")
        return row

    with ThreadPoolExecutor(args.jobs) as pool:
        rows = list(pool.map(run_door, args.doors))
    print(f"\n{table(rows)}")
    return int(any(row.count[verdict] for row in rows for verdict in FAULTS))


# ---- The page ----


class Row(NamedTuple):
    door: str
    commit: str
    seed: int
    seconds: float
    count: collections.Counter[str]


def table(rows: list[Row]) -> str:
    lines = [
        f"| door | commit | seed | seconds | cases | {' | '.join(VERDICTS)} |",
        "|---|---|" + "---:|" * (len(VERDICTS) + 3),
    ]
    total = sum((row.count for row in rows), collections.Counter[str]())
    for row in rows:
        numbers = [row.seconds, row.count.total(), *(row.count[verdict] for verdict in VERDICTS)]
        lines.append(f"| {row.door} | {row.commit} | {row.seed} | {' | '.join(f'{n:,.0f}' for n in numbers)} |")
    numbers = [sum(row.seconds for row in rows), total.total(), *(total[verdict] for verdict in VERDICTS)]
    lines.append(f"| all | | | {' | '.join(f'{n:,.0f}' for n in numbers)} |")
    return "\n".join(lines)


def update(page: Path, row: Row, where: str) -> None:
    """Writes a row, and where it was measured, between the markers of a page; the rows of other doors stay."""
    before, _, rest = page.read_text().partition("<!-- doors -->\n")
    old, _, after = rest.partition("<!-- end -->")
    rows = {}
    for line in old.splitlines():
        door, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if door in DOORS:
            seed, seconds, _, *counts = (int(cell.replace(",", "")) for cell in cells[1:])
            count = collections.Counter(dict(zip(VERDICTS, counts, strict=True)))
            rows[door] = Row(door, cells[0], seed, seconds, count)
    rows[row.door] = row
    ordered = [rows[door] for door in DOORS if door in rows]
    page.write_text(f"{before}<!-- doors -->\n\n{table(ordered)}\n\n{where}\n\n<!-- end -->{after}")


if __name__ == "__main__":
    sys.exit(main())
