"""Error rates of thresholds against loops over all pairs, the command, and searches that use its file."""

from __future__ import annotations

import io
import json
import re
import shutil

import numpy as np
import pytest
from partial_files import make
from raising import raises
from tiny_runs import rendered

from vpm_jax import Gallery, evaluation, plots, threshold
from vpm_jax.errors import UserError
from vpm_jax.search import command as search
from vpm_jax.verification import BINS, Pairs

Q, G = 40, 90


@pytest.fixture
def example():
    """Distances on the grid of thresholds (so that counting is exact), labels, and some pairs without a region."""
    random = np.random.default_rng(0)
    ids, gallery_ids = random.integers(1, 8, Q), random.integers(0, 8, G)
    cameras, gallery_cameras = random.integers(0, 3, Q), random.integers(0, 3, G)
    near = (ids[:, None] == gallery_ids) * random.integers(0, BINS // 2, (Q, G))
    distance = (random.integers(BINS // 2, BINS, (Q, G)) - near // 1) * (2 / BINS)
    distance[random.random((Q, G)) < 0.02] = np.inf
    return distance.astype(np.float32), ids, gallery_ids, cameras, gallery_cameras


def pairs_of(example) -> tuple[list[float], list[float]]:
    """(same, different) distances, one pair after the other."""
    distance, ids, gallery_ids, cameras, gallery_cameras = example
    same, different = [], []
    for q in range(Q):
        for g in range(G):
            if ids[q] != gallery_ids[g]:
                different.append(distance[q, g])
            elif cameras[q] != gallery_cameras[g]:
                same.append(distance[q, g])
    return same, different


def counted(example) -> Pairs:
    distance, ids, gallery_ids, cameras, gallery_cameras = example
    pairs = Pairs(ids, gallery_ids, cameras, gallery_cameras, 2.0)
    for rows in (np.arange(0, Q, 2), np.arange(1, Q, 2)):  # in blocks
        pairs.add(distance[rows, :50], rows, slice(0, 50))
        pairs.add(distance[rows, 50:], rows, slice(50, G))
    return pairs


def test_rates_are_those_of_a_loop_over_pairs(example):
    same, different = pairs_of(example)
    pairs = counted(example)
    assert pairs.count == {"same": len(same), "different": len(different)}
    true, false = pairs.curve()
    for at in range(0, BINS, 97):
        assert true[at] == np.mean(np.array(same) < pairs.thresholds[at])
        assert false[at] == np.mean(np.array(different) < pairs.thresholds[at])


def test_identities_may_be_numbered_from_0(example):
    """As those of MSMT17: distractors become one identity, and all numbers are lower by one."""
    distance, ids, gallery_ids, *cameras = example
    renumbered = distance, ids - 1, np.where(gallery_ids == 0, 50, gallery_ids) - 1, *cameras
    one, two = counted(example), counted(renumbered)
    assert one.count == two.count
    np.testing.assert_array_equal(one.curve(), two.curve())
    assert one.identification_rate(0.1) == two.identification_rate(0.1)


@pytest.mark.parametrize("rate", [0.3, 0.1, 0.01])
def test_a_threshold_keeps_its_false_match_rate(example, rate):
    same, different = pairs_of(example)
    distance, true = counted(example).true_match_rate(rate)
    assert np.mean(np.array(different) < distance) <= rate
    assert np.mean(np.array(different) < distance + 2 / BINS) > rate  # the next one would not
    assert true.value == np.mean(np.array(same) < distance)
    assert true.low <= true.value <= true.high and true.low < true.high


def test_a_rate_that_no_pair_determines_is_unknown(example):
    distance, true = counted(example).true_match_rate(1e-4)
    assert np.isnan(distance) and np.isnan(true.value)


def test_equal_error_rate(example):
    same, different = pairs_of(example)
    error = counted(example).equal_error_rate()
    candidates = np.unique([*same, *different])
    rejected = [np.mean(np.array(same) >= t) for t in candidates]
    accepted = [np.mean(np.array(different) < t) for t in candidates]
    at = np.argmin(np.abs(np.subtract(rejected, accepted)))
    np.testing.assert_allclose(error.value, (rejected[at] + accepted[at]) / 2, atol=1e-3)


def test_open_set_identification(example):
    distance, ids, gallery_ids, cameras, gallery_cameras = example
    threshold, found = counted(example).identification_rate(0.1)
    alarms, right, total = 0, 0, 0
    for q in range(Q):
        mate = (gallery_ids == ids[q]) & (gallery_cameras != cameras[q])
        if not mate.any():
            continue
        total += 1
        others = distance[q][gallery_ids != ids[q]].min()
        alarms += others < threshold
        right += distance[q][mate].min() < min(others, threshold)
    assert alarms / total <= 0.1
    assert found.value == right / total


def test_a_mate_that_shares_no_region_is_a_miss():
    ids, gallery_ids = np.arange(1, 11), np.array([*range(1, 11), 0])
    distance = np.where(ids[:, None] == gallery_ids, 0.1, 1.0).astype(np.float32)
    distance[0, 0] = np.inf
    pairs = Pairs(ids, gallery_ids, None, None, 2.0)
    pairs.add(distance)
    assert pairs.identification_rate(0.1)[1].value == pairs.true_match_rate(0.01)[1].value == 0.9


def test_an_interval_is_over_identities_with_a_mate():
    ids = np.array([*10 * [1], 2, 3, 4, 5])
    pairs = Pairs(ids, np.array([1, 9]), None, None, 2.0)
    pairs.add(np.where(ids[:, None] == [1, 9], 0.1, 1.0).astype(np.float32))
    assert pairs.identification_rate(0.1)[1] == (1, 1, 1)


def test_intervals_are_wider_by_identity_than_by_pair():
    """Ten people, each either always or never recognized: a hundred pairs say no more than ten."""
    ids = np.repeat(np.arange(1, 11), 10)
    distance = np.where(ids[:, None] == ids, np.where(ids[:, None] <= 5, 0.1, 1.9), 1.0).astype(np.float32)
    pairs = Pairs(ids, ids, None, None, 2.0)
    pairs.add(distance)
    _, true = pairs.true_match_rate(0.01)
    assert true.value == 0.5
    assert true.high - true.low > 0.4  # by pair: 0.06


@pytest.fixture(scope="module")
def measured(whole, pedestrians, tmp_path_factory):
    """A copy of the tiny run with its thresholds."""
    workdir = shutil.copytree(whole, tmp_path_factory.mktemp("thresholds") / "run")
    assert threshold.main(["--workdir", str(workdir)]) == 0
    return workdir


def test_the_command_says_what_its_thresholds_are_of(measured):
    record = json.loads((measured / "thresholds.json").read_text())
    assert list(record["gammas"]) == ["0.5", "1.0"]
    assert record["gammas"]["0.5"]["pairs"]["same"] > 0
    text = (measured / "thresholds.md").read_text()
    assert text.startswith("Recipe synthetic, seed 0, 11 steps, trained and evaluated on")
    assert "\n\nPercentages with 95 % confidence intervals by identity. TMR is" in text
    assert "| gamma | equal error rate |" in text
    assert (measured / "thresholds.png").read_bytes().startswith(b"\x89PNG")


def test_a_preview_leaves_the_thresholds_in_place(measured):
    before = (measured / "thresholds.json").read_bytes()
    assert threshold.main(["--workdir", str(measured), "--queries", "3"]) == 0
    assert (measured / "thresholds.json").read_bytes() == before
    preview = measured / "thresholds-3-of-8-queries.json"
    assert json.loads(preview.read_text())["protocol"]["of_queries"] == 8


def test_the_histogram_of_distances_is_numpys(figures):
    random, edges = np.random.default_rng(0), np.linspace(0, 2, 41)
    pairs = random.beta(2, 5, 500) * 2, random.beta(5, 2, 900) * 2
    true, false = ([(x <= edge).mean() for edge in edges[1:]] for x in pairs)
    curve = {"distance": edges[1:], "true_match_rate": true, "false_match_rate": false}
    plots.error_rates(io.BytesIO(), {"0.5": {"curve": curve}}, "a title")
    drawn = [patch.get_data().values for patch in figures[0].axes[-1].patches]
    for values, distances in zip(drawn, pairs, strict=True):
        np.testing.assert_allclose(values, np.histogram(distances, edges, density=True)[0], rtol=1e-9, atol=1e-9)


def test_partial_images_are_not_cropped_again(whole, tmp_path):
    make(tmp_path, "short", identities=4, images=3)
    arguments = ["--dataset", "partial_reid", "--root", str(tmp_path / "PartialREID"), "--output", str(tmp_path)]
    assert threshold.main(["--workdir", str(whole), *arguments]) == 0
    record = json.loads((tmp_path / "thresholds-partial_reid.json").read_text())
    assert list(record["gammas"]) == ["1.0"] and record["gammas"]["1.0"]["pairs"] == {"same": 36, "different": 108}
    assert "uncropped (gamma 1.0)" in (tmp_path / "thresholds-partial_reid.md").read_text()


@pytest.mark.parametrize("key", ["match.rerank=true", "match.gallery_gammas=0.5", "eval.multi_query=true"])
def test_no_thresholds_where_other_images_change_the_distance(whole, tmp_path, monkeypatch, key):
    monkeypatch.setattr(evaluation, "check", lambda *_: None)  # these pedestrians have no further boxes
    with pytest.raises(UserError, match=f"{key.partition('=')[0]}.* the distance of a pair depends on other images"):
        threshold.main(["--workdir", str(whole), "--output", str(tmp_path), f"--config.{key}"])


@pytest.fixture(scope="module")
def store(measured, pedestrians, tmp_path_factory):
    """An index of the gallery, and a query."""
    folder = rendered(pedestrians)
    store = tmp_path_factory.mktemp("store") / "store"
    arguments = ["index", folder / "bounding_box_test", "--index", store, "--workdir", measured]
    assert search.main(list(map(str, arguments))) == 0
    return store, next((folder / "query").glob("*.jpg"))


def results(store, query, tmp_path, *arguments) -> tuple[int, dict]:
    file = tmp_path / "ranking.json"
    code = search.main(["query", str(query), "--index", str(store), "--json", str(file), *arguments])
    return code, json.loads(file.read_text())["queries"][0]


def test_a_search_keeps_what_is_near_enough(measured, store, tmp_path, capsys):
    _, everyone = results(*store, tmp_path)
    limit = (everyone["results"][2]["distance"] + everyone["results"][3]["distance"]) / 2
    code, near = results(*store, tmp_path, f"--max-distance={limit}")
    assert code == 0 and near["max_distance"] == limit
    assert near["results"] == everyone["results"][:3]
    assert everyone["max_distance"] is None

    code, nobody = results(*store, tmp_path, "--max-distance=0")
    assert code == 3 and nobody["results"] == []
    said = r"\.jpg matches nobody here: the nearest image is at \d\.\d+, the threshold is 0\.000"
    assert re.search(said, capsys.readouterr().err)


def test_a_search_uses_the_thresholds_of_its_model(measured, store, tmp_path, capsys):
    record = json.loads((measured / "thresholds.json").read_text())
    capsys.readouterr()
    _, found = results(*store, tmp_path, "--false-match-rate=0.1")
    assert f"Images below a distance of {found['max_distance']:.3f}:" in capsys.readouterr().out
    distances = [measured["verification"]["0.1"]["distance"] for measured in record["gammas"].values()]
    assert found["max_distance"] in distances

    other = tmp_path / "other.json"
    older = {key: value for key, value in record["match"].items() if key != "gallery_whole"}
    other.write_text(json.dumps(record | {"match": older}))
    assert results(*store, tmp_path, "--false-match-rate=0.1", f"--thresholds={other}")[1] == found
    for change in ({"model": "0" * 16}, {"match": older | {"gallery_whole": True}}):
        other.write_text(json.dumps(record | change))
        with raises("other-model"):
            results(*store, tmp_path, "--false-match-rate=0.1", f"--thresholds={other}")
    for text in ("{}", json.dumps(record | {"gammas": {}})):
        other.write_text(text)
        with pytest.raises(UserError, match="holds no thresholds"):
            results(*store, tmp_path, "--false-match-rate=0.1", f"--thresholds={other}")
    with pytest.raises(UserError, match=r"The false match rate is 0\.05, expected one of 0\.1, 0\.01,"):
        Gallery.open(store[0]).query(store[1], false_match_rate=0.05)
    with pytest.raises(UserError, match=r"too few pairs for a false match rate of 0\.0001"):
        results(*store, tmp_path, "--false-match-rate=0.0001")
