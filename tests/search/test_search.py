"""Search as a user runs it: a folder of odd pictures is indexed, changed, searched, and looked at."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from disk import flip
from html_reader import Reader
from images import blobs, encode, oriented, with_size
from tiny_runs import make_run

from vpm_jax import VPM, cli, images
from vpm_jax.data.decode import decode
from vpm_jax.errors import UserError
from vpm_jax.regions import WHOLE, GalleryCrop
from vpm_jax.search import command as search
from vpm_jax.search.folder import list_images
from vpm_jax.search.gallery import crop_folder, stored_crops
from vpm_jax.search.store import Store

RANDOM = np.random.default_rng(7)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a tiny run with random weights."""
    folder = tmp_path_factory.mktemp("search") / "run"
    make_run(folder)
    return folder


@pytest.fixture(scope="module")
def model(run):
    return VPM.load(run)


@pytest.fixture(autouse=True)
def loaded_once(model, run, monkeypatch):
    """The commands of this process load the run's model once."""
    load = VPM.load
    monkeypatch.setattr(VPM, "load", lambda path: model if Path(path) == run else load(path))


def picture(height=80, width=30):
    return blobs(RANDOM, height, width)


@pytest.fixture
def folder(tmp_path):
    """9 good pictures at several depths, and other things."""
    folder = tmp_path / "pictures"
    for name in ("a.jpg", "b.PNG", "deep/c.jpg.jpg", "deep/er/d.webp", "deep/er/e.bmp", "f.jpeg", "g.tif"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture().save(path)
    (folder / "行人 <b>&.png").write_bytes(encode(picture(200, 90), "PNG"))
    (folder / os.fsdecode(b"\xff.png")).write_bytes(encode(picture(), "PNG"))
    for name in (".hidden.jpg", "._a.jpg", ".git/x.jpg", "notes.txt", "deep/Thumbs.db"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).touch()
    return folder


def index(folder, run, *more):
    return search.main(["index", str(folder), "--workdir", str(run), "--index", str(folder.parent / "store"), *more])


def rows(store):
    """{name: (features, visibility)}."""
    features = np.asarray(store.features)
    return {name: (features[i], store.visibility[i]) for i, name in enumerate(store.names)}


def assert_describes(store, folder, model, dtype="float16"):
    """The store holds what the model says of each of its images."""
    for name, (features, visibility) in rows(store).items():
        said = model.features(folder / name)
        np.testing.assert_allclose(features, said.features[0], atol=2e-3 if dtype == "float16" else 1e-5)
        np.testing.assert_allclose(visibility, said.visibility[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_index_describes_every_image_of_a_folder(folder, run, model, capsys, dtype):
    assert index(folder, run, "--dtype", dtype, "--batch", "4") == 0
    store = Store(folder.parent / "store")
    found = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
    expected = [n for n in found if not re.search(r"(^|/)\.|notes|Thumbs", n)]
    assert sorted(store.names) == expected and len(expected) == 9
    assert store.about.dtype == dtype and store.about.model == model.fingerprint
    assert_describes(store, folder, model, dtype)
    said = capsys.readouterr().out
    assert "images 9/9" in said and "9 images of" in said and "(9 new; 2 other files skipped)" in said


def test_what_is_new_changed_and_deleted(folder, run, model, capsys):
    index(folder, run)
    (folder / "a.jpg").unlink()
    picture().save(folder / "f.jpeg")
    os.utime(folder / "f.jpeg", ns=(1, 1))
    picture().save(folder / "deep" / "new.png")
    assert index(folder, run) == 0
    assert "9 images of" in (said := capsys.readouterr().out) and "(1 new, 1 changed, 1 deleted;" in said
    store = Store(folder.parent / "store")
    assert "a.jpg" not in store.names and "deep/new.png" in store.names
    assert_describes(store, folder, model)
    assert index(folder, run) == 0
    assert "(nothing changed; " in capsys.readouterr().out
    assert Store(folder.parent / "store").about == store.about


def test_odd_pictures_are_taken_and_broken_ones_named(folder, run, model, capsys):
    good = {
        "grey.jpg": encode(picture().convert("L"), "JPEG"),
        "rgba.png": encode(picture().convert("RGBA"), "PNG"),
        "cmyk.jpg": encode(picture().convert("CMYK"), "JPEG"),
        "turned.jpg": oriented("JPEG", 6),
        "one-pixel.png": encode(picture(1, 1), "PNG"),
        "animated.gif": encode(picture(), "GIF", save_all=True, append_images=[picture()]),
    }
    bad = {
        "empty.jpg": (b"", "is not an image: found an empty file"),
        "text.jpg": (b"hello world", "is not an image"),
        "cut.jpg": (encode(picture(), "JPEG")[:600], "is a damaged JPEG"),
        "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(20), "is a HEIC image, which cannot be read: convert it"),
        "bomb.jpg": (with_size(encode(picture(), "JPEG"), 65_000, 65_000), "Pillow's limit"),
        "bomb.png": (with_size(encode(picture(), "PNG"), 65_000, 65_000), "Pillow's limit"),
    }
    for name, data in (good | {name: data for name, (data, _) in bad.items()}).items():
        (folder / name).write_bytes(data)
    (folder / "gone.jpg").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe.jpg")
    assert index(folder, run) == cli.INCOMPLETE == 3
    printed = capsys.readouterr()
    assert "15 images of" in printed.out and "(15 new, 8 unreadable; " in printed.out
    said = printed.err
    for name, (_, sentence) in bad.items():
        assert re.search(rf"skipped: .*{name} .*{sentence}", said)
    assert re.search(r"skipped: .*gone\.jpg cannot be read \(No such file", said)
    assert re.search(r"skipped: .*pipe\.jpg is a pipe or a device", said)
    assert "8 of 23 images could not be read and were skipped." in said
    store = Store(folder.parent / "store")
    assert len(store) == 15 and set(good) < set(store.names)
    assert_describes(store, folder, model)
    upright = model.features(np.rot90(decode(oriented("JPEG", 6), "a"), -1))
    np.testing.assert_allclose(rows(store)["turned.jpg"][0], upright.features[0], atol=2e-3)


def test_an_interrupted_index_goes_on(folder, run, model, monkeypatch, capsys):
    stream = VPM.stream
    monkeypatch.setattr("vpm_jax.search.gallery._COMMIT_SECONDS", 0)

    def stopping(self, images, batch, *more):
        for number, part in enumerate(stream(self, images, batch, *more)):
            if number == 2:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(VPM, "stream", stopping)
    with pytest.raises(KeyboardInterrupt, match="run the same command to continue"):
        index(folder, run, "--batch", "2")
    assert len(Store(folder.parent / "store")) == 4
    monkeypatch.setattr(VPM, "stream", stream)
    capsys.readouterr()
    assert index(folder, run, "--batch", "2") == 0
    assert "(5 new;" in capsys.readouterr().out
    assert_describes(Store(folder.parent / "store"), folder, model)
    assert len(Store(folder.parent / "store")) == 9


@pytest.mark.slow
def test_sigkill_at_any_moment(tmp_path, run, model):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(300):
        picture().save(folder / f"{i}.png")
    store = tmp_path / "store"
    imports = "import sys; from vpm_jax.search import command, gallery"
    code = f"{imports}; gallery._COMMIT_SECONDS = 0; sys.exit(command.main(sys.argv[1:]))"
    arguments = ["index", str(folder), "--workdir", str(run), "--index", str(store), "--batch", "8"]
    draw, kills = np.random.default_rng(0), 0
    for _ in range(6):
        process = subprocess.Popen([sys.executable, "-c", code, *arguments])
        while process.poll() is None and not (store / "store.json").exists():
            time.sleep(0.05)
        before = len(Store(store)) if (store / "store.json").exists() else 0
        while process.poll() is None and len(Store(store)) <= before:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.3))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        elif process.returncode == 0:
            break
        process.wait()
        Store(store).verify()
    assert kills >= 3
    assert search.main(arguments) == 0
    assert sorted(Store(store).names) == sorted(f"{i}.png" for i in range(300))
    assert_describes(Store(store), folder, model)


def test_another_folder_or_model_is_refused(folder, run, tmp_path, capsys):
    index(folder, run)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    with pytest.raises(UserError, match=r"store is the index of .*pictures: give that folder"):
        index(other, run)
    stranger = tmp_path / "stranger"
    make_run(stranger, model__grid=(2, 1))
    for command in (
        ["index", str(folder), "--workdir", str(stranger), "--index", str(tmp_path / "store")],
        ["query", str(folder / "a.jpg"), "--workdir", str(stranger), "--index", str(tmp_path / "store")],
    ):
        with pytest.raises(UserError, match=r"made by another model \(fingerprint"):
            search.main(command)
    assert len(Store(tmp_path / "store")) == 9
    folder.rename(tmp_path / "moved")  # the same folder under another name
    assert index(tmp_path / "moved", run) == 0
    assert "(nothing changed" in capsys.readouterr().out
    assert Store(tmp_path / "store").about.extra["folder"] == str(tmp_path / "moved")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere", r"nowhere cannot be read \(No such file or directory\)"),
        ("a.jpg", r"a\.jpg cannot be read \(Not a directory\)"),
        (".git", "holds no images"),
    ],
)
def test_a_folder_without_images_is_refused(folder, run, name, sentence):
    (folder / ".git" / "x.jpg").unlink()
    with pytest.raises(UserError, match=sentence):
        search.main(
            ["index", str(folder / name), "--workdir", str(run), "--index", str(folder.parent / "new" / "store")]
        )
    assert not (folder.parent / "new").exists()


def test_links_are_followed_once(folder, run):
    (folder / "deep" / "round").symlink_to(folder)
    assert len(list_images(folder)[0]) == 9


def test_a_store_without_a_model_or_images(folder, run, tmp_path):
    with pytest.raises(UserError, match="records no model: give --workdir RUN"):
        search.main(["index", str(folder), "--index", str(tmp_path / "new")])
    with pytest.raises(UserError, match="holds no feature store"):
        search.main(["query", str(folder / "a.jpg"), "--index", str(tmp_path / "new")])
    for path in folder.rglob("*.*"):
        if path.is_file() and not path.name.startswith("."):
            path.unlink()
    (folder / "empty.jpg").touch()
    assert index(folder, run) == 3
    with pytest.raises(UserError, match="holds no images yet"):
        search.main(["query", str(folder / "empty.jpg"), "--index", str(tmp_path / "store")])


# ---- Queries ----


@pytest.fixture
def indexed(folder, run, capsys):
    index(folder, run, "--dtype", "float32")
    capsys.readouterr()
    return folder.parent / "store"


def test_a_query_ranks_as_matching_does(folder, indexed, model, capsys):
    queries = [folder / "deep" / "er" / "d.webp", folder / "a.jpg"]
    ranking = folder.parent / "ranking.json"
    command = ["query", *map(str, queries), "--index", str(indexed), "--top", "5", "--json", str(ranking)]
    assert search.main(command) == 0
    printed = capsys.readouterr().out
    found = json.loads(ranking.read_text())
    assert found["images"] == 9 and found["model"] == {"fingerprint": model.fingerprint, "grid": [3, 1]}
    store = Store(indexed)
    for query, answer in zip(queries, found["queries"], strict=True):
        distance = model.match(query, [folder / name for name in store.names])[0]
        order = np.argsort(distance)[:5]
        results = answer["results"]
        assert [r["image"] for r in results] == [store.names[i] for i in order]
        assert [r["rank"] for r in results] == [1, 2, 3, 4, 5]
        assert results[0]["image"] == str(query.relative_to(folder))
        np.testing.assert_allclose([r["distance"] for r in results], distance[order], atol=2e-5)
        for r in results:
            assert sum(r["weight"]) == pytest.approx(1, abs=1e-5)
            assert np.dot(r["weight"], r["region_distance"]) == pytest.approx(r["distance"], abs=1e-5)
            assert r["counted"] == [i for i in range(3) if r["weight"][i] >= 0.05]
            assert f"{r['rank']:4}  {r['distance']:8.4f}  " in printed
        np.testing.assert_allclose(answer["visibility"], model.features(query).visibility[0], rtol=1e-3, atol=1e-6)
        assert answer["visible"] == [i for i in range(3) if 3 * answer["visibility"][i] > max(answer["visibility"])]
    assert list(folder.parent.glob("*.html")) == []  # pictures are written where the user asks, nowhere else


CROPPED = {"whole": (0.0, 1.0), "top 0.5": (0.0, 0.5), "top 0.8": (0.0, 0.8)}


def cropped_rows(folder, model, kept):
    """What the model says of the top of every image, by its path."""
    names = [e.name for e in list_images(folder)[0]]
    pixels = [decode((folder / name).read_bytes(), name, upright=True) for name in names]
    return names, model.features([x[: max(1, round(len(x) * kept))] for x in pixels])


def test_each_query_meets_the_crop_that_shows_as_much(folder, run, model, monkeypatch, tmp_path, capsys):
    assert index(folder, run, "--crops", "0.8,0.5", "--dtype", "float32") == 0
    said = capsys.readouterr().out
    assert "images (top 0.5) 9/9" in said and "Crops: top 0.5, top 0.8." in said
    # What each query is said to show: this model is too small to know.
    seen = {(0.0, 1.0): "whole", (0.0, 0.52): "top 0.5", (0.05, 0.75): "top 0.8", (0.0, 0.6): "top 0.5"}
    monkeypatch.setattr("vpm_jax.description.visible_heights", lambda maps, grid: np.array(list(seen)))
    queries = [str(folder / name) for name in ("a.jpg", "b.PNG", "f.jpeg", "g.tif")]
    files = [str(tmp_path / "r.json"), str(tmp_path / "r.html")]
    command = ["query", *queries, "--index", str(tmp_path / "store"), "--json", files[0], "--html", files[1]]
    assert search.main(command) == 0
    printed, page = capsys.readouterr().out, Path(files[1]).read_text()
    assert "a.jpg shows regions" in printed and printed.count("compared with the top 0.5 of every image.") == 2
    assert page.count("compared with the top 0.8 of every image") == 1
    record = json.loads(Path(files[0]).read_text())
    assert [answer["compared_with"] for answer in record["queries"]] == list(seen.values())
    for query, answer, part in zip(queries, record["queries"], seen.values(), strict=True):
        names, gallery = cropped_rows(folder, model, CROPPED[part][1])
        distance = model.match(query, gallery)[0]
        order = np.argsort(distance)
        assert [r["image"] for r in answer["results"]] == [names[i] for i in order]
        np.testing.assert_allclose([r["distance"] for r in answer["results"]], distance[order], atol=2e-5)


def test_crops_follow_the_folder_and_what_is_asked(folder, run, model, monkeypatch, tmp_path, capsys):
    index(folder, run, "--crops", "0.5,0.8")
    (folder / "a.jpg").unlink()
    picture().save(folder / "f.jpeg")
    os.utime(folder / "f.jpeg", ns=(1, 1))
    picture().save(folder / "new.png")
    assert index(folder, run) == 0  # crops as before
    store = Store(tmp_path / "store")
    assert stored_crops(store) == {GalleryCrop("top", 0.5): True, GalleryCrop("top", 0.8): True}
    for part in stored_crops(store):
        names, expected = cropped_rows(folder, model, part.gamma)
        there = rows(Store(crop_folder(tmp_path / "store", part)))
        assert sorted(there) == sorted(names)
        np.testing.assert_allclose([there[n][0] for n in names], expected.features, atol=2e-3)
    assert index(folder, run, "--crops", "0.5") == 0
    assert sorted(p.name for p in (tmp_path / "store").iterdir() if p.is_dir()) == ["top-0.5"]
    assert index(folder, run, "--crops", "none") == 0
    assert not stored_crops(Store(tmp_path / "store"))
    assert not [p for p in (tmp_path / "store").iterdir() if p.is_dir()]
    monkeypatch.setitem(model.config.match, "gallery_gammas", (0.6,))
    assert index(folder, run) == 0  # a store without is not asked again
    assert not stored_crops(Store(tmp_path / "store"))
    search.main(["index", str(folder), "--workdir", str(run), "--index", str(tmp_path / "fresh")])
    assert stored_crops(Store(tmp_path / "fresh")) == {GalleryCrop("top", 0.6): True}


def test_crops_count_once_all_pictures_have_theirs(folder, run, model, monkeypatch, tmp_path, capsys):
    stream = VPM.stream

    def stopping(self, images, batch, *more):
        stopping.calls += 1
        if stopping.calls == 4:  # nothing, whole, top 0.5, top 0.8
            raise KeyboardInterrupt
        return stream(self, images, batch, *more)

    def compared():
        ranking = str(tmp_path / "r.json")
        assert search.main(["query", query, "--index", str(tmp_path / "store"), "--json", ranking]) == 0
        return json.loads(Path(ranking).read_text())["queries"][0]["compared_with"]

    query, stopping.calls = str(folder / "b.PNG"), 0
    monkeypatch.setattr(VPM, "stream", stopping)
    with pytest.raises(KeyboardInterrupt):
        index(folder, run, "--crops", "0.5,0.8")
    assert stored_crops(Store(tmp_path / "store")) == {
        GalleryCrop("top", 0.5): True,
        GalleryCrop("top", 0.8): False,
    }
    monkeypatch.setattr(VPM, "stream", stream)
    monkeypatch.setattr("vpm_jax.description.visible_heights", lambda maps, grid: np.array([[0.0, 0.8]]))
    assert compared() == "whole"  # which is no farther than the half
    assert index(folder, run) == 0
    assert compared() == "top 0.8"
    flip(tmp_path / "store" / "top-0.8" / "features-0.bin")
    with pytest.raises(UserError, match=r"top-0\.8.*is damaged \(its checksum differs\)"):
        compared()


def test_a_picture_that_goes_while_its_crops_are_made(folder, run, monkeypatch, tmp_path, capsys):
    read = images.read

    def vanishing(image, name="the image", crop=WHOLE):
        if crop != WHOLE and Path(image).name == "a.jpg":
            Path(image).unlink(missing_ok=True)
        return read(image, name, crop)

    monkeypatch.setattr(images, "read", vanishing)
    assert index(folder, run, "--crops", "0.5") == cli.INCOMPLETE
    said = capsys.readouterr()
    assert "a.jpg cannot be read" in said.err and "1 of 9 images disappeared during indexing: index again." in said.err
    assert stored_crops(Store(tmp_path / "store")) == {GalleryCrop("top", 0.5): False}
    assert index(folder, run) == 0
    assert stored_crops(Store(tmp_path / "store")) == {GalleryCrop("top", 0.5): True}


@pytest.mark.parametrize(
    ("gammas", "sentence"),
    [
        ("0.5,x", "--crops: '0.5,x', expected numbers"),
        ("0.5,1.5", "--crops: '0.5,1.5', expected numbers between 0 and"),
    ],
)
def test_crops_that_are_none(folder, run, tmp_path, monkeypatch, gammas, sentence):
    monkeypatch.setattr(VPM, "load", None)  # said before
    with pytest.raises(UserError, match=sentence):
        index(folder, run, "--crops", gammas)
    assert not (tmp_path / "store").exists()


def test_a_model_that_cannot_tell_how_much_a_query_shows(folder, tmp_path):
    make_run(tmp_path / "other", data__crop="any")
    with pytest.raises(UserError, match=r"data.crop is 'any': expected top, bottom or bilateral"):
        index(folder, tmp_path / "other", "--crops", "0.5")


@pytest.mark.parametrize("parts", [3, [["top"]], [["top", 2, True]], [["up", 0.5, True]]])
def test_damaged_parts_of_a_store(folder, indexed, parts):
    about = json.loads((indexed / "store.json").read_text())
    about["extra"]["parts"] = parts
    (indexed / "store.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"store\.json is damaged \(parts are"):
        search.main(["query", str(folder / "a.jpg"), "--index", str(indexed)])


def test_the_home_directory_is_found_in_any_path(folder, indexed, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (
        search.main(["query", str(folder / "a.jpg"), f"--index={indexed}", "--json=~/a.json", "--html=~/a.html"]) == 0
    )
    assert (tmp_path / "a.json").exists() and (tmp_path / "a.html").exists()


def test_json_for_a_pipe_is_all_there_is(folder, indexed, capsys):
    assert search.main(["query", str(folder / "a.jpg"), "--index", str(indexed), "--json", "-"]) == 0
    assert len(json.loads(capsys.readouterr().out)["queries"][0]["results"]) == 9


def test_the_page_shows_what_was_found_and_asks_nobody(folder, indexed, tmp_path):
    (folder / "b.PNG").unlink()
    page = tmp_path / "page.html"
    query = folder / "行人 <b>&.png"
    assert search.main(["query", str(query), "--index", str(indexed), "--html", str(page)]) == 0
    read = Reader(page.read_text())
    images = [attributes for tag, attributes in read.tags if tag == "img"]
    assert len(images) == 2 + 8  # the query, its region map, and every picture that is still there
    for attributes in images:
        assert attributes["src"].startswith("data:image/") and attributes["alt"]
    assert [a["alt"] for a in images[:3]] == [
        "query 行人 <b>&.png",
        "region map of query 行人 <b>&.png",
        "rank 1: 行人 <b>&.png",
    ]
    assert "This image is missing" in read.words and "b.PNG" in read.words
    assert not {tag for tag, _ in read.tags} & {"script", "link", "iframe", "b"}
    assert "http" not in page.read_text().replace("http-equiv", "") and str(folder.parent) not in page.read_text()
    bars = [a["aria-label"] for _, a in read.tags if a.get("class") == "bars"]
    assert len(bars) == 1 + 9 and bars[1].startswith("distance in each region, and the region's weight")


def test_a_picture_that_changed_since_it_was_indexed_is_named_and_not_shown(folder, indexed, tmp_path, capsys):
    picture().save(folder / "b.PNG")
    page, ranking = tmp_path / "page.html", tmp_path / "ranking.json"
    command = ["query", str(folder / "a.jpg"), "--index", str(indexed), "--html", str(page), "--json", str(ranking)]
    assert search.main(command) == 0
    assert "changed since they were indexed: b.PNG: index again." in capsys.readouterr().err
    results = json.loads(ranking.read_text())["queries"][0]["results"]
    assert [result["image"] for result in results if result["changed"]] == ["b.PNG"]
    assert page.read_text().count("This image has changed since it was indexed.") == 1


def test_a_query_that_shows_no_region(folder, indexed, model, tmp_path, monkeypatch, capsys):
    """By "binary" visibility, where no score reaches a cell."""
    features = VPM.features

    def blind(self, images, **settings):
        said = features(self, images, **settings)
        said.visibility[: min(1, len(said))] = 0
        return said

    monkeypatch.setattr(VPM, "features", blind)
    monkeypatch.setitem(model.config.match, "visibility", "binary")
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "html")}
    command = ["query", str(folder / "a.jpg"), str(folder / "f.jpeg"), "--index", str(indexed)]
    assert search.main([*command, "--json", str(files["json"]), "--html", str(files["html"])]) == cli.INCOMPLETE
    said = capsys.readouterr()
    assert re.search(r"a\.jpg shares no visible region with any image: there is nothing to rank\.", said.err)
    assert "a.jpg shows regions none of 0 to 2" in said.out
    first, second = json.loads(files["json"].read_text())["queries"]
    assert first["results"] == [] and len(second["results"]) > 0
    assert "there is nothing to rank" in files["html"].read_text()


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("nowhere.jpg", "nowhere.jpg cannot be read"), ("notes.txt", "is not an image"), ("deep", "is a folder")],
)
def test_a_query_that_is_no_image(folder, indexed, name, sentence):
    with pytest.raises(UserError, match=sentence):
        search.main(["query", str(folder / name), "--index", str(indexed)])


def test_how_many_is_at_least_one(indexed):
    with pytest.raises(UserError, match=r"--top: '0', expected a positive whole number: see .*search query --help\.$"):
        search.main(["query", "a.jpg", "--index", str(indexed), "--top", "0"])


def test_a_picture_whose_name_begins_as_options_do(folder, indexed, monkeypatch, capsys):
    (folder / "a.jpg").rename(folder / "-1_c1s1_000401_03.jpg")
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"write \./-1_c1s1_000401_03\.jpg\.$"):
        search.main(["query", "-1_c1s1_000401_03.jpg", "--index", str(indexed)])
    assert search.main(["query", "./-1_c1s1_000401_03.jpg", "--index", str(indexed)]) == 0


def test_a_store_that_is_damaged_ranks_nothing(folder, indexed, capsys):
    flip(indexed / "features-0.bin")
    with pytest.raises(UserError, match=r"features-0\.bin is damaged \(its checksum differs\)"):
        search.main(["query", str(folder / "a.jpg"), "--index", str(indexed)])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--json", "--html"])
def test_what_cannot_be_written_is_said_before_anything_is(folder, indexed, tmp_path, flag):
    other = "--json" if flag == "--html" else "--html"
    where = ["--index", str(indexed), other, str(tmp_path / "good")]
    for bad, sentence in [(tmp_path, "that is a folder"), (tmp_path / "none" / "a", "there is no folder")]:
        with pytest.raises(UserError, match=rf"{flag} .*{sentence}"):
            search.main(["query", str(folder / "a.jpg"), flag, str(bad), *where])
    assert not (tmp_path / "good").exists()


def test_a_part_that_the_model_was_not_trained_on_is_warned_of(indexed, folder, capsys, monkeypatch):
    query = ["query", str(folder / "a.jpg"), "--index", str(indexed)]
    for part, expected in [((0.0, 0.5), False), ((0.5, 1.0), True)]:
        monkeypatch.setattr("vpm_jax.search.ranking.visible_heights", lambda *_, part=part: np.array([part]))
        assert search.main(query) == 0
        warning = "a.jpg seems to show the bottom part, which no training crop of this model did"
        assert (warning in capsys.readouterr().err) is expected


def test_names_that_are_not_text_are_shown(indexed, folder, tmp_path, capsys):
    page = tmp_path / "page.html"
    query = ["query", str(folder / os.fsdecode(b"\xff.png")), "--index", str(indexed), "--html", str(page)]
    assert search.main(query) == 0
    assert "\\xff.png" in capsys.readouterr().out.encode().decode()
    assert "\\xff.png" in page.read_text(encoding="utf-8")
