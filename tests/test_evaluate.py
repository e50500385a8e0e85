"""Evaluation from a workdir: the numbers of training's own, of a plain reference, and what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from plain_matching import reference as plain_distance
from plain_metrics import reference
from tiny_runs import STEPS, load_run

from vpm_jax import config as config_lib
from vpm_jax import description, evaluate, evaluation, metrics, parallel
from vpm_jax.data.sources import load_dataset
from vpm_jax.data.split import Dataset, Split, join
from vpm_jax.description import CroppedSplit, Describer
from vpm_jax.distances import blocks, distances, spans
from vpm_jax.errors import UserError
from vpm_jax.evaluation import matching_in_words, ranked
from vpm_jax.matching import region_distance
from vpm_jax.reranking import rerank

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture(scope="module")
def trained(whole):
    """(describer, variables, dataset) of the finished run."""
    describer, variables = load_run(whole)
    return describer, variables, load_dataset(describer.config.data)


def with_changes(describer: Describer, **changes) -> Describer:
    """A describer by a config with other values; changes are keys with __ for the dots."""
    config = describer.config.copy_and_resolve_references()
    for key, value in changes.items():
        config_lib.set_key(config, key.replace("__", "."), value)
    return Describer(config, describer.mesh)


def test_the_command_gives_the_numbers_of_trainings_own_evaluation(whole, tmp_path):
    times = {path: path.stat().st_mtime_ns for path in whole.rglob("*")}
    assert evaluate.main(["--workdir", str(whole), "--output", str(tmp_path / "again")]) == 0
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*")} == times  # a run is only read
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"evaluation.json", "evaluation.md", "gamma.png"}
    one, two = (json.loads((folder / "evaluation.json").read_text()) for folder in (whole, tmp_path / "again"))
    assert {k: v for k, v in one.items() if k != "seconds"} == {k: v for k, v in two.items() if k != "seconds"}
    assert (whole / "evaluation.md").read_text() == (tmp_path / "again" / "evaluation.md").read_text()


def test_the_report_names_recipe_protocol_skipped_and_chance(whole, trained):
    describer, _, dataset = trained
    text, record = (whole / "evaluation.md").read_text(), json.loads((whole / "evaluation.json").read_text())
    query, gallery = dataset.query, dataset.gallery.take(dataset.gallery.identity != -1)
    assert len(gallery) < len(dataset.gallery)  # these pedestrians have junk
    assert f"Recipe synthetic, seed 0, {STEPS} steps, trained and evaluated on synthetic pedestrians." in text
    assert f"{len(query)} queries cropped to gamma (top), {len(gallery)} gallery images whole (1 of" in text
    assert "0 queries without a match skipped" in text
    assert record["recipe"] == describer.config.recipe
    assert record["protocol"] == {"crop": "top", "queries": len(query), "gallery": len(gallery), "skipped": 0}
    shares = []
    for identity, camera in zip(query.identity, query.camera, strict=True):
        ranked = (gallery.identity != identity) | (gallery.camera != camera)
        shares.append((gallery.identity[ranked] == identity).mean())
    assert record["chance_rank1"] == pytest.approx(np.mean(shares))
    assert f"rank-1 {np.mean(shares):.2%}" in text
    for gamma, row in record["gammas"].items():
        cmc = row["cmc"]
        values = (cmc[0], cmc[4], cmc[-1], row["mAP"], row["mINP"])  # 9 gallery images: rank 10 is the last
        assert f"| {float(gamma):g} | " + " | ".join(f"{100 * v:.1f}" for v in values) + " |" in text


def test_the_numbers_are_those_of_a_plain_reference(whole, trained):
    describer, variables, dataset = trained
    query, gallery = dataset.query, dataset.gallery  # with junk: the reference leaves it out itself
    there = describer.split(variables, gallery)
    record = json.loads((whole / "evaluation.json").read_text())
    assert set(record["gammas"]) == {"0.5", "1.0"}
    for gamma in (0.5, 1.0):
        here, found = describer.split(variables, query, gamma), record["gammas"][str(gamma)]
        distance = plain_distance(here.features, here.visibility, there.features, there.visibility)
        expected, _ = reference(distance, query.identity, gallery.identity, query.camera, gallery.camera)
        np.testing.assert_allclose(found["cmc"], expected["cmc"][: len(found["cmc"])])
        assert found["mAP"] == pytest.approx(expected["mAP"]) and found["mINP"] == pytest.approx(expected["mINP"])


def test_features_follow_the_images_whatever_the_batch(trained):
    describer, variables, dataset = trained
    order = np.random.default_rng(0).permutation(len(dataset.gallery))
    straight = describer.split(variables, dataset.gallery)
    smaller = with_changes(describer, eval__batch=4)  # the last one is padded
    shuffled = smaller.split(variables, dataset.gallery.take(order))
    by_machine = with_changes(describer, eval__batch=0)
    assert by_machine.config.eval.batch == parallel.extraction_batch(describer.mesh)
    np.testing.assert_allclose(by_machine.split(variables, dataset.gallery).features, straight.features, atol=1e-5)
    assert straight.features.shape == (len(dataset.gallery), 2, 32)
    np.testing.assert_allclose(np.linalg.norm(straight.features, axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(shuffled.features, straight.features[order], atol=1e-5)
    np.testing.assert_allclose(shuffled.visibility, straight.visibility[order], rtol=1e-4)
    cropped = describer.split(variables, dataset.gallery, 0.5)
    assert np.abs(cropped.features - straight.features).max() > 1e-3


@pytest.mark.parametrize(
    "platform, count, expected", [("cpu", 1, 128), ("cpu", 3, 129), ("gpu", 1, 256), ("tpu", 4, 1024)]
)
def test_a_batch_divides_over_the_devices(platform, count, expected):
    mesh = SimpleNamespace(size=count, devices=np.array([SimpleNamespace(platform=platform)] * count))
    assert parallel.extraction_batch(mesh) == expected


def test_a_set_of_one_camera_names_the_key_that_ranks_it():
    def split(name: str) -> Split:
        return Split(name, ("a", "b"), np.array([1, 2], np.int32), np.array([3, 3], np.int32))

    dataset = Dataset("csv", split("train"), split("query"), split("gallery"), ())
    config = config_lib.default()
    with pytest.raises(UserError, match=r"from the query's own camera .*; --config\.eval\.same_camera=keep ranks them"):
        evaluation.check(config, dataset)
    config.eval.same_camera = "keep"
    evaluation.check(config, dataset)


def test_several_parts_are_extracted_one_after_the_other(trained):
    describer, variables, dataset = trained
    one, two = describer.splits(variables, [CroppedSplit(dataset.query, 0.5), CroppedSplit(dataset.gallery)])
    np.testing.assert_array_equal(one.features, describer.split(variables, dataset.query, 0.5).features)
    np.testing.assert_array_equal(two.features, describer.split(variables, dataset.gallery).features)
    assert one.region_maps is None  # nobody asked for them


def test_a_report_says_how_features_are_made():
    config = config_lib.default()
    assert "features" not in matching_in_words(config)
    config.match.feature = "after"
    assert "distances of features after the neck" in matching_in_words(config)
    config.eval.flip = True
    assert "after the neck (mean of an image and its mirror)" in matching_in_words(config)


def test_matching_and_gammas_may_change(whole, tmp_path, capsys):
    changes = ["--config.match.visibility=uniform", "--config.eval.gammas=0.7", "--config.eval.crop=bottom"]
    assert evaluate.main(["--workdir", str(whole), "--output", str(tmp_path), *changes]) == 0
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert list(record["gammas"]) == ["0.7"]
    assert record["match"] | {"squared": False, "visibility": "uniform", "rerank": False} == record["match"]
    assert "cropped to gamma (bottom)" in capsys.readouterr().out

    plain = ["--workdir", str(whole), "--output", str(tmp_path)]  # of other settings: both stay
    assert evaluate.main(plain) == evaluate.main(plain) == 0
    assert capsys.readouterr().out.count("(evaluation.md had other settings: renamed to evaluation-1.md)") == 1
    assert json.loads((tmp_path / "evaluation-1.json").read_text()) == record
    assert "gamma (bottom)" in (tmp_path / "evaluation-1.md").read_text()
    again = json.loads((tmp_path / "evaluation.json").read_text())
    assert again["gammas"] == json.loads((whole / "evaluation.json").read_text())["gammas"] != record["gammas"]
    assert not (tmp_path / "evaluation-2.json").exists()


def test_a_workdir_keeps_the_runs_own_evaluation(whole, tmp_path, capsys):
    workdir = shutil.copytree(whole, tmp_path / "run")
    own = [workdir / name for name in ("evaluation.json", "evaluation.md", "gamma.png")]
    record = json.loads(own[0].read_text())
    del record["match"]["gallery_whole"]  # as an earlier version wrote it
    own[0].write_text(json.dumps(record))
    before = [path.read_bytes() for path in own]

    def files() -> list[str]:
        return sorted(path.name for path in workdir.glob("*-[0-9]*.*"))

    def evaluation_of(*changes: str) -> str:
        assert evaluate.main(["--workdir", str(workdir), *changes]) == 0
        assert [path.read_bytes() for path in own] == before
        [name] = re.findall(r"written to .*/run/(.*)\.md\)", capsys.readouterr().out)
        return name

    assert evaluation_of("--config.eval.gammas=1.0") == "evaluation-1"
    assert files() == ["evaluation-1.json", "evaluation-1.md", "gamma-1.png"]
    assert evaluation_of("--rerank", "--config.match.rerank_k1=4") == "evaluation-2"
    assert evaluation_of("--config.match.vector=True", "--config.match.gallery_whole=True") == "evaluation-3"
    text = (workdir / "evaluation-3.md").read_text()
    assert "\nMatching: one vector per image instead of Eq. 4, soft visibility of queries, equal weights in the" in text
    with pytest.raises(UserError, match=r"match\.gallery_whole and match\.rerank are both on"):
        evaluation_of("--rerank", "--config.match.gallery_whole=True")
    assert evaluation_of("--config.eval.gammas=1.0") == "evaluation-1"  # the same again
    moved = shutil.copytree(json.loads((workdir / "config.json").read_text())["data"]["root"], tmp_path / "data")
    other = shutil.copytree(next(moved.glob("synthetic-v*train8-*")), tmp_path / "other")
    sorted((other / "query").iterdir())[0].unlink()
    assert evaluation_of("--root", str(other)) == "evaluation-4"  # a test set without one query
    another = shutil.copytree(workdir, tmp_path / "another")  # other weights by the same settings, in a run's workdir
    assert evaluate.main(["--workdir", str(another), "--output", str(workdir)]) == 0
    assert [path.read_bytes() for path in own] == before and (workdir / "evaluation-5.json").exists()


def test_pictures_move_aside_with_their_tables(whole, tmp_path):
    for gammas in ("0.7", "1.0"):
        command = ["--workdir", str(whole), "--output", str(tmp_path), f"--config.eval.gammas={gammas}"]
        assert evaluate.main(command) == 0
    names = ("evaluation-1.json", "evaluation-1.md", "evaluation.json", "evaluation.md", "gamma-1.png", "gamma.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == list(names)


@pytest.mark.parametrize("crops", [(), (0.5,)])
def test_distractors_are_described_and_compared_in_pieces(trained, monkeypatch, crops):
    plain, variables, dataset = trained
    describer = with_changes(plain, eval__batch=4, match__gallery_gammas=crops)
    nobody = replace(dataset.train, identity=np.zeros_like(dataset.train.identity))
    dataset = replace(dataset, gallery=join(dataset.gallery, nobody))
    query, gallery = dataset.query, ranked(dataset.gallery)
    matrices = distances(describer, variables, [CroppedSplit(query, gamma) for gamma in (0.5, 1.0)], gallery)
    monkeypatch.setattr("vpm_jax.distances.PIECE_BYTES", 6 * 2 * 32 * 4)  # 6 images, which leaves batches of 4
    monkeypatch.setattr("vpm_jax.distances.BLOCK_BYTES", 4 * 4 * len(query))
    queries = [CroppedSplit(query, gamma) for gamma in (0.5, 1.0)]
    found = list(blocks(describer, variables, queries, gallery))
    assert {block.columns.stop - block.columns.start for block in found} == {12, 4, len(gallery) % 4}
    assert max(block.distance.nbytes for block in found) <= 4 * 4 * len(query)
    seen = [np.zeros(matrix.shape, int) for matrix in matrices]
    for number, rows, columns, _ in found:
        seen[number][rows, columns] += 1
    assert all((times == 1).all() for times in seen)
    for number, rows, columns, distance in found:
        np.testing.assert_allclose(distance, matrices[number][rows, columns], rtol=1e-5, atol=1e-5)
    results = evaluation.evaluate(describer, variables, dataset)
    labels = query.identity, gallery.identity, query.camera, gallery.camera
    for gamma, distance in zip((0.5, 1.0), matrices, strict=True):
        expected, _ = reference(distance, *labels)
        np.testing.assert_allclose(results[gamma]["cmc"], expected["cmc"])
        assert results[gamma]["mAP"] == pytest.approx(expected["mAP"])


def test_queries_of_all_gammas_are_compared_together_with_a_gallery_crop():
    chosen = [np.arange(10), np.array([1, 4]), np.empty(0, int), np.array([0, 2, 9]), np.arange(10)]
    found_spans = list(spans(chosen, 10, 6))
    sizes = [sum(len(rows) for _, rows in span) for span in found_spans]
    assert sorted(sizes) == [4, 4, 5, 6, 6]  # two complete sets, and one span of the others
    assert [[index for index, _ in span] for span in found_spans].count([1, 3]) == 1
    for index, rows in enumerate(chosen):
        found = [part for span in found_spans for number, part in span if number == index]
        np.testing.assert_array_equal(np.concatenate([np.empty(0, int), *found]), rows)


@pytest.mark.parametrize("same_camera", ["drop", "keep"])
def test_queries_stand_for_all_their_boxes(trained, same_camera):
    """Pooled per region by visibility, against float64; one query has no box and stands for itself."""
    describer, variables, dataset = trained
    query, gallery = dataset.query, ranked(dataset.gallery)
    of_query = np.arange(len(gallery)) % len(query)
    of_query[of_query == 3] = 2
    labels = {"identity": query.identity[of_query], "camera": query.camera[of_query]}
    stranger = replace(dataset.train.take([0]), identity=np.array([999], np.int32), camera=np.array([1], np.int32))
    dataset = replace(dataset, multi_query=join(replace(gallery, name="multi_query", **labels), stranger))
    found = evaluation.evaluate(
        with_changes(describer, eval__multi_query=True, eval__same_camera=same_camera, eval__batch=2),
        variables,
        dataset,
    )
    there = describer.split(variables, gallery)
    cameras = (query.camera, gallery.camera) if same_camera == "drop" else ()
    for gamma in (0.5, 1.0):
        boxes, own = describer.split(variables, gallery, gamma), describer.split(variables, query, gamma)
        features, visibility = np.float64(own.features), np.float64(own.visibility)
        for q in set(of_query.tolist()):
            weight = np.float64(boxes.visibility[of_query == q])
            mean = (weight[..., None] * boxes.features[of_query == q]).sum(0) / weight.sum(0)[:, None]
            features[q] = mean / np.linalg.norm(mean, axis=-1, keepdims=True)
            visibility[q] = (weight * weight).sum(0) / weight.sum(0)
        distance = plain_distance(features, visibility, there.features, there.visibility)
        expected, _ = reference(distance, query.identity, gallery.identity, *cameras)
        np.testing.assert_allclose(found[gamma]["cmc"], expected["cmc"])
        assert found[gamma]["mAP"] == pytest.approx(expected["mAP"])


def test_multiple_query_needs_boxes_and_says_so(whole, trained, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="synthetic has no further boxes of its queries"):
        evaluate.main(["--workdir", str(whole), "--output", str(tmp_path), "--config.eval.multi_query=true"])
    dataset = replace(trained[2], multi_query=replace(trained[2].query, name="multi_query"))
    monkeypatch.setattr(evaluation, "load_test_set", lambda config: dataset)
    for value in ("true", "false"):
        key = f"--config.eval.multi_query={value}"
        assert evaluate.main(["--workdir", str(whole), "--output", str(tmp_path), key, "--save", "features"]) == 0
    assert "multiple query (boxes of the same" in (tmp_path / "evaluation-1.md").read_text()
    assert "single query" in (tmp_path / "evaluation.md").read_text()
    names = {path.name for path in (tmp_path / "saved").iterdir()}
    assert {"multi_query.npz", "multi_query-top-0.5.npz", "query.npz"} <= names
    one, two = (json.loads((tmp_path / f"evaluation{n}.json").read_text()) for n in ("", "-1"))
    assert two["protocol"] == one["protocol"] | {"multi_query": True}
    for gamma, result in one["gammas"].items():  # the boxes are the queries themselves
        assert two["gammas"][gamma]["mAP"] == pytest.approx(result["mAP"])


def test_reranking_that_does_not_fit_is_refused_at_once(trained, monkeypatch):
    describer, variables, dataset = trained
    monkeypatch.setattr("os.sysconf", lambda name: 16)
    with pytest.raises(UserError, match="all 9 gallery images, 0 GiB, and this machine has 0 GiB: leave out"):
        evaluation.evaluate(with_changes(describer, match__rerank=True), variables, dataset)


@pytest.mark.parametrize("crop", ["top", "bilateral"])
def test_each_query_meets_the_gallery_cropped_as_itself(trained, crop, monkeypatch):
    plain, variables, dataset = trained
    describer = with_changes(plain, match__gallery_gammas=(0.8, 0.5), data__crop=crop, eval__crop="top")
    query, gallery = dataset.query, ranked(dataset.gallery)
    # What each query is said to show; the trained model is too small to know.
    said = np.array([(0, 1), (0, 0.52), (0.02, 0.78), (0.5, 1), (0, 0.9), (0.1, 0.6), (0.21, 1), (0, 0.1)])
    boxes = {("none", 1.0): (0, 1), ("top", 0.5): (0, 0.5), ("top", 0.8): (0, 0.8)}
    if crop == "bilateral":
        boxes |= {("bottom", 0.5): (0.5, 1), ("bottom", 0.8): (0.2, 1)}
    monkeypatch.setattr(description, "visible_heights", lambda maps, grid: said)
    [found] = distances(describer, variables, [CroppedSplit(query, 0.7)], gallery)
    here = plain.split(variables, query, 0.7, "top")
    used = set()
    for row, (top, bottom) in enumerate(said):
        kept, gamma = min(boxes, key=lambda k: abs(top - boxes[k][0]) + abs(bottom - boxes[k][1]))
        there = plain.split(variables, gallery, gamma, kept)
        sides = here.features[row : row + 1], here.visibility[row : row + 1], there.features, there.visibility
        np.testing.assert_allclose(found[row : row + 1], region_distance(*sides), rtol=1e-4, atol=1e-4)
        used.add((kept, gamma))
    assert used == set(boxes)


def test_what_a_cropped_gallery_is_called(whole, tmp_path, capsys):
    gallery = "--config.match.gallery_gammas=0.5"
    assert evaluate.main(["--workdir", str(whole), "--output", str(tmp_path), gallery]) == 0
    said = capsys.readouterr().out
    assert "gallery images whole and cropped (1 of" in said
    assert "features of queries at 2 gammas" in said and "features of the gallery (" in said and " of 2) " in said


@pytest.mark.parametrize(
    ("changes", "sides"),
    [
        ({"data.crop": "top"}, ["top"]),
        ({"data.crop": "bilateral"}, ["top", "bottom"]),
        ({"data.crop": "top", "data.mix": 0.3, "data.mix_crop": "bottom"}, ["top", "bottom"]),
        ({"data.crop": "top", "data.mix": 0.3, "data.mix_crop": "any"}, ["top"]),
        ({"data.crop": "top", "data.mix": 0.7, "data.whole": 0.3, "data.mix_crop": "bottom"}, ["bottom"]),
        ({"data.crop": "none", "data.mix": 0.5, "data.mix_crop": "top"}, ["top"]),
        ({"data.crop": "none", "data.mix_crop": "top"}, []),
    ],
)
def test_a_gallery_is_cropped_as_training_images_were(changes, sides):
    config = config_lib.default()
    for key, value in changes.items():
        config_lib.set_key(config, key, value)
    assert config_lib.sides(config) == sides


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"data.crop": "any"}, "expected top, bottom or bilateral training crops"),
        ({"model.locator": "stripes"}, "cannot estimate how much a query shows"),
        ({"model.grid": (1, 2)}, "cannot estimate how much a query shows"),
        ({"match.rerank": True}, "match.rerank is on"),
        ({"eval.multi_query": True}, "eval.multi_query is on"),
        (
            {"eval.crop": "bottom"},
            r"eval.crop is 'bottom': expected query crops on the same sides as training crops \(top\)",
        ),
        ({"eval.crop": "bilateral"}, r"eval.crop is 'bilateral': expected"),
        ({"data.crop": "bottom"}, r"eval.crop is 'top': expected query crops .* crops \(bottom\)"),
    ],
)
def test_what_does_not_go_with_a_cropped_gallery(changes, sentence):
    config = config_lib.default()
    config.match.gallery_gammas = (0.5,)
    config_lib.check(config)
    assert "the gallery also cropped to 0.5, each query" in matching_in_words(config)
    for key, value in changes.items():
        config_lib.set_key(config, key, value)
    with pytest.raises(UserError, match=sentence):
        config_lib.check(config)


def test_reranking(whole, trained, tmp_path, capsys):
    describer, variables, dataset = trained
    k = ["--config.match.rerank_k1=4", "--config.match.rerank_k2=2"]
    assert evaluate.main(["--workdir", str(whole), "--output", str(tmp_path), "--rerank", *k]) == 0
    assert "distances, re-ranked by k-reciprocal neighbors (k1 4, k2 2, lambda 0.3)" in capsys.readouterr().out
    record = json.loads((tmp_path / "evaluation.json").read_text())
    assert record["notes"] == list(dataset.notes[1:])
    query, gallery = dataset.query, ranked(dataset.gallery)
    there = describer.split(variables, gallery)
    for gamma in (0.5, 1.0):
        here = describer.split(variables, query, gamma)
        pairs = ((here, there), (here, here), (there, there))
        three = [region_distance(a.features, a.visibility, b.features, b.visibility) for a, b in pairs]
        distance = rerank(*three, k1=4, k2=2)
        expected = metrics.rank_metrics(distance, query.identity, gallery.identity, query.camera, gallery.camera)
        assert record["gammas"][str(gamma)]["mAP"] == pytest.approx(expected["mAP"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("--config.seed=1", r"trained with another config \(seed: 0 -> 1\)"),
        ("--config.recipe=paper", r"trained with another config \(recipe: synthetic -> paper\)"),
        ("--config.stage2.epochs=999", r"stage2\.epochs: \d+ -> 999"),
        ("--config.model.width=8", r"trained with another config \(model\.width: 4 -> 8\)"),
        ("--config.eval.gamas=0.5", r"did you mean eval\.gammas\?"),
        ("--config.data.root=nowhere_else", "nowhere_else does not exist"),
    ],
)
def test_what_may_not_change_is_refused(whole, change, sentence, monkeypatch):
    if "root" in change:  # real data are not rendered
        config = config_lib.read(whole)
        config.data.name = "market1501"
        monkeypatch.setattr(config_lib, "read", lambda workdir: config)
    with pytest.raises(UserError, match=sentence):
        evaluate.main(["--workdir", str(whole), change])


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no run \(no config\.json\)"):
        evaluate.main(["--workdir", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_a_run_without_a_checkpoint_is_refused(whole, tmp_path):
    shutil.copy(whole / "config.json", tmp_path)
    with pytest.raises(UserError, match="There is no checkpoint in"):
        evaluate.main(["--workdir", str(tmp_path)])


def test_an_edited_config_is_another_model(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    text = (workdir / "config.json").read_text()
    assert '"head_dim": 8' in text
    (workdir / "config.json").write_text(text.replace('"head_dim": 8', '"head_dim": 9'))
    with pytest.raises(UserError, match=r"step 11 .* is of another model .*is \(.*8.*\) there and \(.*9.*\) here"):
        evaluate.main(["--workdir", str(workdir)])


def test_features_that_are_not_finite_are_refused(trained):
    describer, variables, dataset = trained
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), variables)
    with pytest.raises(UserError, match=r"features of 8 of 8 query images are not finite.*lower learning rate"):
        describer.split(broken, dataset.query)
