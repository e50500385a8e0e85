"""Files for other tools: what `evaluate --save` writes, and matching saved features again."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from plain_matching import reference as plain_distance
from plain_metrics import ranked_matches, reference
from tiny_runs import load_run

from vpm_jax import config as config_lib
from vpm_jax import evaluate, evaluation, saved
from vpm_jax.data.sources import load_dataset
from vpm_jax.description import Describer
from vpm_jax.errors import UserError


def command(workdir: Path, output: Path, *arguments: str) -> None:
    assert evaluate.main(["--workdir", str(workdir), "--output", str(output), *map(str, arguments)]) == 0


@pytest.fixture(scope="module")
def output(whole, tmp_path_factory) -> Path:
    """The output of an evaluation that saved everything."""
    folder = tmp_path_factory.mktemp("saved")
    command(whole, folder, "--save", "features", "distances", "ranking")
    return folder


@pytest.fixture(scope="module")
def dataset(whole):
    return load_dataset(config_lib.read(whole).data)


def described(path: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(path) as file:
        return file["features"], file["visibility"]


def test_the_files_hold_what_the_evaluation_used(output, whole, dataset):
    folder = output / "saved"
    suffixes = {0.5: "-top-0.5", 1.0: ""}
    kinds = ("query{}.npz", "distances{}.npy", "ranking{}.csv")
    expected = {kind.format(suffix) for kind in kinds for suffix in suffixes.values()}
    assert {path.name for path in folder.iterdir()} == expected | {"gallery.npz", "about.json"}
    gallery = evaluation.ranked(dataset.gallery)
    describer, variables = load_run(whole)
    record = json.loads((output / "evaluation.json").read_text())
    for gamma, suffix in suffixes.items():
        for split, name in ((dataset.query, f"query{suffix}.npz"), (gallery, "gallery.npz")):
            with np.load(folder / name) as file:
                found = dict(file)
            assert found["names"].tolist() == list(split.names)
            np.testing.assert_array_equal(found["identity"], split.identity)
            np.testing.assert_array_equal(found["camera"], split.camera)
            fresh = describer.split(variables, split, gamma if name[0] == "q" else 1.0)
            np.testing.assert_array_equal(found["features"], fresh.features)
            np.testing.assert_array_equal(found["visibility"], fresh.visibility)
        distance = np.load(folder / f"distances{suffix}.npy", mmap_mode="r")
        plain = plain_distance(*described(folder / f"query{suffix}.npz"), *described(folder / "gallery.npz"))
        np.testing.assert_allclose(distance, plain, rtol=1e-4)
        labels = dataset.query.identity, gallery.identity, dataset.query.camera, gallery.camera
        assert record["gammas"][str(gamma)]["mAP"] == pytest.approx(reference(distance, *labels)[0]["mAP"])
        with (folder / f"ranking{suffix}.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        for q, name in enumerate(dataset.query.names):
            mine = [row for row in rows if row["query"] == name]
            hits = ranked_matches(distance[q], labels[0][q], labels[2][q], labels[1], labels[3])
            assert [row["correct"] for row in mine] == [str(int(hit)) for hit in hits]
            assert [row["rank"] for row in mine] == [str(rank) for rank in range(1, len(hits) + 1)]
            for row in mine:
                g = gallery.names.index(row["gallery image"])
                assert (int(row["identity"]), int(row["camera"])) == (gallery.identity[g], gallery.camera[g])
                assert float(row["distance"]) == pytest.approx(distance[q, g], rel=1e-5)


def test_saved_features_give_the_same_numbers_without_images(output, whole, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(Describer, "stream", None)  # nothing is extracted
    folder = output / "saved"
    command(whole, tmp_path / "same", "--features", folder)
    one, two = (json.loads((out / "evaluation.json").read_text()) for out in (output, tmp_path / "same"))
    assert one["gammas"] == two["gammas"]
    command(whole, tmp_path / "other", "--features", folder, "--config.match.visibility=uniform", "--save", "ranking")
    uniform = json.loads((tmp_path / "other" / "evaluation.json").read_text())
    query, gallery = described(folder / "query.npz"), described(folder / "gallery.npz")
    distance = plain_distance(query[0], np.ones_like(query[1]), gallery[0], np.ones_like(gallery[1]))
    ranked = evaluation.ranked(dataset.gallery)
    expected, _ = reference(distance, dataset.query.identity, ranked.identity, dataset.query.camera, ranked.camera)
    assert uniform["gammas"]["1.0"]["mAP"] == pytest.approx(expected["mAP"])
    about = json.loads((tmp_path / "other" / "saved" / "about.json").read_text())
    assert about["matching"]["match"]["visibility"] == "uniform" and "features" not in about


def test_features_in_pieces_are_read_and_written_in_pieces(whole, dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("vpm_jax.distances.PIECE_BYTES", 1)
    settings = "--config.eval.batch=4", f"--config.data.distractors={tmp_path / 'nobody'}"
    shutil.copytree(Path(config_lib.read(whole).data.root), tmp_path / "data")
    (tmp_path / "nobody").mkdir()
    for number in range(7):
        (tmp_path / "nobody" / f"{number}.jpg").write_bytes(dataset.train.read(number))
    command(whole, tmp_path / "one", *settings, "--save", "features", "distances")
    command(whole, tmp_path / "two", *settings, "--features", tmp_path / "one" / "saved", "--save", "distances")
    count = len(evaluation.ranked(dataset.gallery)) + 7
    assert np.load(tmp_path / "one" / "saved" / "gallery.npz")["features"].shape == (count, 2, 32)
    one, two = (np.load(tmp_path / out / "saved" / "distances-top-0.5.npy") for out in ("one", "two"))
    assert one.shape == (len(dataset.query), count) and one.all()
    np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (["--config.eval.flip=true"], r"were saved with model \w+, expected \w+"),
        (["--config.eval.crop=bottom"], r"holds no query-bottom-0\.5\.npz"),
        (["--config.match.gallery_gammas=0.5"], "holds no region maps, which match.gallery_gammas needs"),
        (["--queries=3"], "were saved with queries 8, expected 3"),
        (["--save", "features"], "saved already"),
        (["--features=nowhere"], "nowhere holds no features of an evaluation"),
    ],
)
def test_features_of_something_else_are_refused(output, whole, tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        command(whole, tmp_path, "--features", output / "saved", *change)
    assert not list(tmp_path.iterdir())


def test_files_of_another_evaluation_stay(output, whole, tmp_path):
    folder = shutil.copytree(output / "saved", tmp_path / "saved")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    other = "--config.match.visibility=uniform"
    with pytest.raises(UserError, match="saved holds distances and ranking of another evaluation"):
        command(whole, tmp_path, "--features", folder, "--save", "ranking", "distances", other)
    with pytest.raises(UserError, match="saved holds features of another evaluation"):
        command(whole, tmp_path, "--save", "features", "--config.eval.flip=true")
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    about = json.loads((folder / "about.json").read_text())
    del about["matching"]["match"]["gallery_whole"]  # as an earlier version wrote it
    (folder / "about.json").write_text(json.dumps(about))
    again = ["--features", folder, "--save", "distances", "ranking"]
    with pytest.raises(UserError, match="saved holds distances and ranking of another evaluation"):
        command(whole, tmp_path, *again, "--config.match.gallery_whole=true")
    command(whole, tmp_path, *again)
    command(whole, tmp_path, "--features", folder, "--save", "ranking", "--config.eval.gammas=1.0")  # the same matching
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_features_alone_are_of_no_matching(whole, tmp_path):
    one = "--config.eval.gammas=1.0"
    command(whole, tmp_path, "--save", "features", one)
    assert list(json.loads((tmp_path / "saved" / "about.json").read_text())) == ["features"]
    other = ["--features", tmp_path / "saved", one, "--config.match.visibility=uniform"]
    command(whole, tmp_path, *other, "--save", "distances")
    assert (tmp_path / "saved" / "distances.npy").exists()


def test_damaged_features_and_other_images_are_refused(output, whole, tmp_path):
    folder = shutil.copytree(output / "saved", tmp_path / "saved")
    about = json.loads((folder / "about.json").read_text())
    whole_file = (folder / "gallery.npz").read_bytes()
    (folder / "gallery.npz").write_bytes(whole_file[:1000] + b"?" + whole_file[1001:])
    with pytest.raises(UserError, match=r"gallery\.npz is damaged \(Bad CRC-32"):
        command(whole, tmp_path / "out", "--features", folder)
    (folder / "gallery.npz").write_bytes(whole_file[:-9])
    with pytest.raises(UserError, match=r"gallery\.npz is damaged"):
        command(whole, tmp_path / "out", "--features", folder)
    about["features"]["files"]["query.npz"] = "0"
    (folder / "about.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"query\.npz describes other images than those of query"):
        command(whole, tmp_path / "out", "--features", folder)
    del about["features"]["files"]
    (folder / "about.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"holds no query"):
        command(whole, tmp_path / "out", "--features", folder)


def test_a_look_at_some_queries_says_so_everywhere(whole, output, tmp_path, figures, capsys):
    command(whole, tmp_path, "--queries", "3", "--save", "features", "distances", "ranking")
    name = "-3-of-8-queries"
    assert {path.name for path in tmp_path.iterdir()} == {
        f"evaluation{name}.json",
        f"evaluation{name}.md",
        f"gamma{name}.png",
        f"saved{name}",
    }
    assert json.loads((tmp_path / f"evaluation{name}.json").read_text())["protocol"]["of_queries"] == 8
    words = "3 of 8 queries (a preview, not a result)"
    assert words in (tmp_path / f"evaluation{name}.md").read_text() and words in capsys.readouterr().out
    assert any(words in text.get_text() for axes in figures[0].axes for text in [axes.title, *figures[0].texts])
    files = {path.name for path in (tmp_path / f"saved{name}").iterdir()}
    assert {"query-top-0.5-3-of-8.npz", "distances-3-of-8.npy", "ranking-top-0.5-3-of-8.csv", "gallery.npz"} <= files
    some, every = (
        np.load(folder / file)["features"]
        for folder, file in ((tmp_path / f"saved{name}", "query-3-of-8.npz"), (output / "saved", "query.npz"))
    )
    np.testing.assert_allclose(some, every[[0, 2, 5]], atol=1e-5)
    with pytest.raises(UserError, match="--queries is 9, expected at most the 8 queries"):
        command(whole, tmp_path, "--queries", "9")


def test_a_disk_that_fills_up_leaves_no_half_file(whole, output, tmp_path, monkeypatch):
    def full(file, shape):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "_write_header", full)
    with pytest.raises(UserError, match=r"distances.*could not be written: the disk is full"):
        command(whole, tmp_path, "--features", output / "saved", "--save", "distances")
    assert not list((tmp_path / "saved").glob("*.npy"))
