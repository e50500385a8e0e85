"""What a result is of stands on every artefact, and the paper's numbers only beside comparable ones."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_runs import tiny_run

from vpm_jax import captions, config, evaluate, report
from vpm_jax.config import set_key
from vpm_jax.data.datasets import DATASETS
from vpm_jax.data.split import Dataset, Split


def changed(**changes):
    settings = config.default()
    for key, value in changes.items():
        set_key(settings, key.replace("__", "."), value)
    return settings


@pytest.mark.parametrize(
    ("changes", "dataset", "held_out", "reason"),
    [
        ({}, "market1501", 0, ""),
        ({"data__name": "dukemtmc"}, "dukemtmc", 0, ""),
        ({}, "partial_reid", 0, ""),  # the paper trains on Market-1501
        ({"match__visibility": "uniform", "eval__flip": True}, "market1501", 0, ""),  # said, but the same protocol
        ({"data__holdout_identities": 100}, "market1501", 100, "are held-out training identities"),
        ({"data__holdout_identities": 100}, "market1501", 0, "trained on Market-1501 without 100 identities"),
        ({"data__holdout_identities": 100}, "partial_reid", 0, "trained on Market-1501 without 100 identities"),
        ({}, "dukemtmc", 0, "the model was trained on Market-1501"),
        ({"data__name": "dukemtmc"}, "partial_ilids", 0, "the model was trained on DukeMTMC-reID"),
        (
            {"data__also_train": "msmt17:/data/x, csv:a.csv"},
            "market1501",
            0,
            "on Market-1501 and MSMT17 and own images",
        ),
        ({"data__name": "synthetic"}, "synthetic", 0, "it has no results on synthetic pedestrians"),
        ({"data__name": "csv"}, "csv", 0, "it has no results on own images"),
        ({"eval__crop": "bottom"}, "market1501", 0, "query crops keep bottom, not top"),
        ({"eval__crop": "bottom"}, "partial_reid", 0, ""),  # whose queries are not cropped
        ({"eval__same_camera": "keep"}, "market1501", 0, "own camera are ranked"),
        ({"match__rerank": True}, "market1501", 0, "distances are re-ranked"),
        ({"match__gallery_gammas": (0.5,)}, "market1501", 0, "the gallery is also cropped"),
        ({"match__gallery_whole": True}, "market1501", 0, "the regions of gallery images weigh the same"),
        ({"data__distractors": "images"}, "market1501", 0, "more distractors"),
    ],
)
def test_why_numbers_are_not_comparable(changes, dataset, held_out, reason):
    reasons = captions.departures(changed(**changes), dataset, held_out)
    assert len(reasons) == bool(reason) and reason in "".join(reasons)


def test_images_that_are_not_the_official_ones_are_not_comparable():
    empty = Split("train", (), None, None)
    sets = Dataset("market1501", empty, empty, empty, (), unofficial=("train", "gallery"))
    reasons = captions.not_comparable(changed(), sets)
    assert reasons == ["the training set is not the official one", "the gallery set is not the official one"]
    sets = Dataset("market1501", empty, empty, empty, (), held_out=9)
    assert captions.not_comparable(changed(data__holdout_identities=9), sets)[0].startswith("the queries and")


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_has_words(name):
    assert captions.training_set(changed(data__name=name)) == captions.test_set(name) == DATASETS[name].title


def texts(figures) -> str:
    """The titles of figures, whatever their line breaks."""
    return " ".join(" ".join(figure.get_suptitle() for figure in figures).split())


def test_held_out_identities_stand_on_every_artefact(pedestrians, whole, tmp_path, figures, capsys):
    """Of a run of the tiny one's weights that says to have held out two of ten identities."""
    workdir = shutil.copytree(whole, tmp_path / "run")
    held = tiny_run(pedestrians, data__holdout_identities=2, data__synthetic__train_identities=10)
    held.model.num_identities = 8
    (workdir / "config.json").write_text(config.to_json(held))
    (workdir / "evaluation.md").unlink()
    (workdir / "evaluation.json").unlink()
    assert evaluate.main(["--workdir", str(workdir), "--config.eval.flip=True", "--config.match.squared=True"]) == 0
    record = json.loads((workdir / "evaluation-1.json").read_text())
    printed, text = capsys.readouterr().out, (workdir / "evaluation-1.md").read_text()
    report.main(["--workdir", str(workdir), "--no-pictures"])
    page = (workdir / "report.html").read_text()
    sentences = captions.lines(record)
    assert record["held_out_identities"] == 2 and record["protocol"]["queries"] == 4
    assert record["notes"][-1].startswith("Held out 2 of 10") and all(note in text for note in record["notes"])
    for artefact in (printed, text, page):
        assert all(sentence in artefact for sentence in sentences)
    both = " ".join(sentences)
    for words in (
        "seed 0, 11 steps, trained on synthetic pedestrians without 2 identities, evaluated on 2 held-out training",
        "4 queries cropped to gamma (top)",
        "same identity and camera dropped",
        "(mean of an image and its mirror)",
        "Not comparable with the paper: it has no results on synthetic pedestrians.",
    ):
        assert words in both
    drawn = texts(figures)
    assert drawn.count("2 held-out training identities of synthetic pedestrians, 4 queries cropped to gamma (top)") == 2
    assert drawn.count("recipe synthetic, seed 0, 11 steps; ResNet-10 of width 4, 32x16 input trained on") == 2
    assert drawn.count("features averaged with the mirror image's") == 2
    assert drawn.count("Not comparable with the paper: it has no results on") == 2
    assert "VPM trained on synthetic pedestrians without 2 identities; recipe synthetic, seed 0;" in drawn
    assert "<h1>VPM on 2 held-out training identities of synthetic pedestrians</h1>" in page


def test_records_of_earlier_versions_have_words():
    match = {key.rpartition(".")[2]: value for key, value in config.flatten(changed()).items() if "match." in key}
    record = {
        "recipe": "small",
        "seed": 1,
        "steps": 600,
        "dataset": "market1501",
        "protocol": {"crop": "top", "queries": 3368, "gallery": 15913, "skipped": 0},
        "match": match,
        "chance_rank1": 0.001,
    }
    first, protocol, matching = captions.lines(record)
    assert first == "Recipe small, seed 1, 600 steps, trained and evaluated on Market-1501."
    assert (
        "3368 queries cropped to gamma (top), 15913 gallery images whole; same identity and camera dropped; 0 queries"
        in protocol
    )
    assert matching.startswith("Matching: Eq. 4, soft visibility, distances. Chance: rank-1 0.10%")
    assert captions.title(record).splitlines() == [
        "Market-1501, 3368 queries cropped to gamma (top)",
        "recipe small, seed 1, 600 steps",
    ]
    [first, *_] = captions.lines(record | {"trained_on": "dukemtmc"})
    assert first.endswith("trained on DukeMTMC-reID, evaluated on Market-1501.")


def test_titles_name_the_network_and_the_seeds():
    run = config.default()
    assert captions.network(run) == "ResNet-50, 384x128 input"
    run.model.depth, run.model.width, run.data.height, run.data.width, run.seed = 18, 24, 128, 64, 3
    title = "VPM trained on Market-1501; recipe paper, seed 3; ResNet-18 of width 24, 128x64 input"
    assert captions.run_title("VPM", run) == title
    assert [captions.count_seeds(seeds) for seeds in ([2, 2], [3, 1])] == ["2 seeds", "1 to 3 seeds"]
