"""The protocols of partial datasets, and evaluating a run on datasets that it was not trained on."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from partial_files import make, pack
from plain_matching import reference as plain_distance
from plain_metrics import reference
from tiny_runs import STEPS, load_run, rendered, tiny_run

from vpm_jax import comparison, evaluate, evaluation, metrics, parallel, partial, training
from vpm_jax import config as config_lib
from vpm_jax.data.sources import load_dataset
from vpm_jax.description import Describer
from vpm_jax.errors import UserError

pytestmark = pytest.mark.usefixtures("undrawn")


def command(workdir: Path, output: Path, *arguments) -> dict:
    """`evaluate` on another dataset: the one record that it wrote."""
    assert evaluate.main(["--workdir", str(workdir), "--output", str(output), *map(str, arguments)]) == 0
    [file] = output.glob("*.json")
    return json.loads(file.read_text())


def table(text: str) -> dict[str, list[str]]:
    """The rows of a Markdown table by their first cell."""
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert len({len(row) for row in rows}) == 1
    return {row[0]: row[1:] for row in rows}


def test_a_group_holds_image_k_of_every_identity():
    assert [g.tolist() for g in partial.groups([7, 7, 2, 2, 9, 9])] == [[2, 0, 4], [3, 1, 5]]
    random = np.random.default_rng(0)
    for _ in range(20):
        identity = random.integers(0, 6, 40)
        found = partial.groups(identity)
        counts = np.unique(identity, return_counts=True)[1]
        assert len(found) == counts.min()
        for k, group in enumerate(found):
            assert identity[group].tolist() == np.unique(identity).tolist()
            assert all(np.count_nonzero(identity[:i] == identity[i]) == k for i in group)


def test_single_shot_is_the_mean_over_all_pairs_of_groups():
    random = np.random.default_rng(1)
    query, gallery = np.repeat(np.arange(6), 3), random.permutation(np.repeat(np.arange(6), 2))
    distance = random.random((len(query), len(gallery)))
    curves = []
    for q in range(3):
        for g in range(2):
            rows = [np.flatnonzero(query == i)[q] for i in range(6)]
            columns = [np.flatnonzero(gallery == i)[g] for i in range(6)]
            ranks = [1 + np.sum(distance[row, columns] < distance[row, columns[i]]) for i, row in enumerate(rows)]
            curves.append([np.mean(np.array(ranks) <= k) for k in range(1, 7)])
    found = partial.single_shot(distance, query, gallery)
    np.testing.assert_allclose(found["cmc"], np.mean(curves, axis=0))
    np.testing.assert_allclose(found["spread"], np.std(curves, axis=0), atol=1e-12)
    assert found["groups"] == (3, 2) and 0 < found["spread"][0] < 1


def test_published_numbers_beside_ours():
    ours = {"one": {"cmc": np.array([0.5, 0.6, 0.7, 0.8, 0.9]), "mAP": 0.4}, "two": {"cmc": np.array([0.1, 0.2, 0.3])}}
    rows = table(comparison.partial(ours, "partial_reid"))
    assert rows["ours, one"] == ["50.0", "70.0", "90.0", "40.0", "", ""]
    assert rows["ours, two"] == ["10.0", "30.0", "30.0", "–", "", ""]  # a gallery of three
    assert rows["VPM (Bilateral), Table 2"] == ["67.7", "81.9", "–", "–", "-17.7", "-11.9"]
    assert rows["VPM, reproduction"] == ["67.7", "80.1", "–", "–", "-17.7", "-10.1"]
    assert len(rows) == 2 + 2 + 7 + 1  # header and rule, ours, Table 2, the reproduction
    rows = table(comparison.partial(ours, "partial_ilids"))
    assert rows["MVPM-4, Table 3"] == ["59.7", "74.8", "78.2", "–", "-9.7", "-4.8"]
    assert rows["VPM, reproduction"][:2] == ["58.0", "71.4"] and len(rows) == 2 + 2 + 7 + 6 + 1


def test_partial_reid(whole, tmp_path, capsys):
    """Five identities of three images, each image of its own size."""
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    make(tmp_path, "original", 5, 3)
    root = tmp_path / "Partial-REID_Dataset"
    record = command(whole, tmp_path / "out", "--dataset", "partial_reid", "--root", root)
    printed = capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == before
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "evaluation-partial_reid.json",
        "evaluation-partial_reid.md",
    }

    describer, variables = load_run(whole, data__name="partial_reid", data__root=str(root))
    dataset = load_dataset(describer.config.data)
    here, there = (describer.split(variables, split) for split in (dataset.query, dataset.gallery))
    distance = plain_distance(here.features, here.visibility, there.features, there.visibility)
    whole_gallery, chance = reference(distance, dataset.query.identity, dataset.gallery.identity)  # no cameras
    found = record["results"]["all-shot"]
    np.testing.assert_allclose(found["cmc"], whole_gallery["cmc"])
    assert found["mAP"] == pytest.approx(whole_gallery["mAP"])
    firsts = []
    for q in range(3):
        for g in range(3):  # by name the images of an identity lie one after the other
            part, _ = reference(distance[q::3, g::3], dataset.query.identity[q::3], dataset.gallery.identity[g::3])
            firsts.append(part["cmc"][0])
    single = record["results"]["single-shot"]
    assert single["cmc"][0] == pytest.approx(np.mean(firsts)) and single["spread"][0] == pytest.approx(np.std(firsts))
    assert single["groups"] == [3, 3]

    assert record["trained_on"] == "synthetic" and record["steps"] == STEPS and record["dataset"] == "partial_reid"
    assert record["protocol"] == {"queries": 15, "gallery": 15, "skipped": 0, "gamma": 1.0}
    assert record["chance_rank1"] == pytest.approx(chance)
    text = (tmp_path / "out" / "evaluation-partial_reid.md").read_text()
    assert text.split("\n\npartial_body_images is not")[0] in printed and str(root) in printed
    assert str(tmp_path) not in text and str(tmp_path) not in json.dumps(record)  # results travel, paths do not
    assert f"{STEPS} steps, trained on synthetic pedestrians, evaluated on Partial-REID." in text
    assert "15 images of 5 identities, Partial-REID 300 of 60; results are not comparable" in text
    assert "no cameras, so nothing is dropped" in text and "group k holds the k-th image by name" in text
    assert "Not comparable with the paper: the model was trained on synthetic pedestrians;" in text
    rows = table(text)
    numbers = [whole_gallery["cmc"][k - 1] for k in (1, 3, 5)] + [whole_gallery["mAP"]]
    assert rows["ours, all-shot (15 x 15)"][:4] == [f"{100 * n:.1f}" for n in numbers]
    assert rows["ours, single-shot (3 x 3 groups of 5 x 5)"][0] == f"{100 * np.mean(firsts):.1f}"
    assert len(rows) == 4  # header, rule, ours: published models were trained on Market-1501


@pytest.mark.parametrize("flag", ["--root={}", "--config.data.root={}", "--config.data.root {}"])
def test_another_dataset_may_lie_where_the_runs_own_does(whole, tmp_path, monkeypatch, flag):
    """A root that the user gives counts, the run's too; without one the run's does not, nor do its distractors."""
    make(tmp_path / "data", "original", 5, 3)
    workdir = shutil.copytree(whole, tmp_path / "run")
    config = config_lib.read(workdir)
    config.data.root, config.data.distractors = str(tmp_path / "data"), str(tmp_path / "gone")
    (workdir / "config.json").write_text(config_lib.to_json(config))
    monkeypatch.setenv("VPM_DATA", str(tmp_path / "nowhere"))
    given = flag.format(config.data.root).split(" ")
    assert command(workdir, tmp_path / "out", "--dataset=partial_reid", *given)["protocol"]["queries"] == 15
    with pytest.raises(UserError, match=r"nowhere \(\$VPM_DATA\) does not exist"):
        command(workdir, tmp_path / "out", "--dataset=partial_reid")


def test_fewer_identities_than_ranks(tmp_path, capsys):
    make(tmp_path, "original", 3, 2)
    config = config_lib.default()
    config.data.name, config.data.root = "partial_reid", str(tmp_path)
    dataset = load_dataset(config.data)
    distance, ids = np.random.default_rng(2).random((6, 6)), dataset.query.identity
    found = {
        "all-shot": metrics.rank_metrics(distance, ids, ids),
        "single-shot": partial.single_shot(distance, ids, ids),
    }
    describer = Describer(config, parallel.data_mesh())
    evaluation.evaluate_and_report(describer, None, dataset, tmp_path, 7, "synthetic", (found, 0.0))
    at_3 = 100 * found["single-shot"]["spread"][2]  # every gallery image is among the first three
    assert f"{at_3:.1f} at R-3, {at_3:.1f} at R-5" in capsys.readouterr().out


def test_partial_ilids_from_a_zip(whole, tmp_path):
    make(tmp_path / "data", "dashed", 6)
    record = command(whole, tmp_path, "--dataset=partial_ilids", "--root", pack(tmp_path / "data", tmp_path / "i.zip"))
    assert list(record["results"]) == ["all-shot"]  # one image of each identity: the same
    assert record["protocol"] == {"queries": 6, "gallery": 6, "skipped": 0, "gamma": 1.0}
    text = (tmp_path / "evaluation-partial_ilids.md").read_text()
    rows = table(text)
    assert "ours, all-shot (6 x 6)" in rows
    assert "Single-shot" not in text


def test_another_dataset_with_cameras(whole, pedestrians, tmp_path, monkeypatch):
    """The tiny run's own images under DukeMTMC-reID's names give the numbers of its own test set."""
    own = rendered(pedestrians)
    duke = tmp_path / "data" / "DukeMTMC-reID"
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (duke / folder).mkdir(parents=True)
        for number, image in enumerate(sorted((own / folder).iterdir())):
            identity, camera = re.match(r"(-1|\d{4})_c(\d)", image.name).groups()
            if identity != "-1":
                (duke / folder / f"{identity}_c{camera}_f{number:07d}.jpg").write_bytes(image.read_bytes())
    monkeypatch.setenv("VPM_DATA", str(tmp_path / "data"))
    record = command(whole, tmp_path / "out", "--dataset", "dukemtmc")
    expected = json.loads((whole / "evaluation.json").read_text())
    for gamma, row in expected["gammas"].items():
        assert record["gammas"][gamma]["mAP"] == pytest.approx(row["mAP"])
        np.testing.assert_allclose(record["gammas"][gamma]["cmc"], row["cmc"])
    assert record["trained_on"] == "synthetic" and record["dataset"] == "dukemtmc"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "evaluation-dukemtmc.json",
        "evaluation-dukemtmc.md",
        "gamma-dukemtmc.png",
    }
    text = (tmp_path / "out" / "evaluation-dukemtmc.md").read_text()
    assert (
        "trained on synthetic pedestrians, evaluated on DukeMTMC-reID" in text
        and "same identity and camera dropped" in text
    )
    assert "DukeMTMC-reID 16,522 of 702" in text and "beside the paper's" not in text  # which trained on Duke
    by_key = command(whole, tmp_path / "key", "--dataset", "dukemtmc", f"--config.data.root={duke}")
    assert by_key["gammas"] == record["gammas"]


@pytest.fixture(scope="module")
def own_images(pedestrians, whole, tmp_path_factory) -> Path:
    """The tiny run's pedestrians as a CSV, with their cameras."""
    own = rendered(pedestrians)
    path = tmp_path_factory.mktemp("own") / "own.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "identity", "camera", "split"])
        for split, folder in (("train", "bounding_box_train"), ("query", "query"), ("gallery", "bounding_box_test")):
            for image in sorted((own / folder).iterdir()):
                identity, camera = re.match(r"(-1|\d{4})_c(\d)", image.name).groups()
                name = identity if identity == "-1" else f"person {identity}"
                writer.writerow([image, name, camera, split])
    return path


def test_own_images_train_as_the_dataset_they_are(own_images, whole, pedestrians, tmp_path):
    config = tiny_run(pedestrians, data__name="csv", data__root=str(own_images), eval__every=0)
    assert training.train(config, tmp_path) == 0
    one, two = (json.loads((folder / "evaluation.json").read_text()) for folder in (whole, tmp_path))
    assert one["gammas"] == two["gammas"] and two["dataset"] == "csv"
    assert evaluate.main(["--workdir", str(tmp_path), "--output", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "evaluation.json").read_text())["gammas"] == two["gammas"]


def test_without_cameras_nothing_is_dropped(own_images, whole, tmp_path):
    with own_images.open(newline="") as file:
        rows = [row[:2] + row[3:] for row in csv.reader(file) if row[3] != "train"]
    path = tmp_path / "nocameras.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    record = command(whole, tmp_path / "out", "--dataset", "csv", "--root", path, "--config.eval.gammas=1.0")
    text = (tmp_path / "out" / "evaluation-csv.md").read_text()
    assert "no cameras, so nothing is dropped" in text and "same identity" not in text
    # Without the drop a query finds its own camera's images first, or at least none is lost.
    own = json.loads((whole / "evaluation.json").read_text())["gammas"]["1.0"]
    assert record["gammas"]["1.0"]["cmc"][0] != own["cmc"][0]


def test_datasets_for_testing_alone_train_nothing(pedestrians, tmp_path):
    make(tmp_path, "probe")
    with pytest.raises(UserError, match=r"no training images.*evaluate --workdir .* --dataset partial_ilids\."):
        training.train(tiny_run(pedestrians, data__name="partial_ilids", data__root=str(tmp_path)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--dataset", "partial"], r"--dataset is 'partial', expected one of .*partial_reid"),
        (["--dataset", "partial_reid"], r"does not exist: put the folder or zip of Partial-REID"),
        (["--dataset", "csv", "--root", "a.csv"], r"a\.csv does not exist: set .* to a CSV with the header"),
    ],
)
def test_what_is_not_there_is_one_sentence(whole, arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VPM_DATA", "nowhere")
    with pytest.raises(UserError, match=sentence):
        evaluate.main(["--workdir", str(whole), *arguments])


def test_a_partial_picture_that_is_none_is_named(whole, tmp_path):
    make(tmp_path, "short", 2, 2)
    (tmp_path / "PartialREID" / "partial_body_images" / "002_001.JPG").write_bytes(b"text")
    with pytest.raises(UserError, match=r"partial_body_images/002_001\.JPG is not an image: found 4 bytes"):
        evaluate.main(
            ["--workdir", str(whole), "--output", str(tmp_path), "--dataset=partial_reid", f"--root={tmp_path}"]
        )
    assert not list(tmp_path.glob("evaluation*"))
