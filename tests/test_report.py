"""vpm_jax.report: the page says what the run's files say; its ranked lists are those that the metrics count."""

from __future__ import annotations

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from html_reader import Reader
from PIL import Image
from raising import raises
from tiny_runs import make_run

from vpm_jax import config as config_lib
from vpm_jax import html, metrics, report
from vpm_jax.errors import UserError
from vpm_jax.geometry import map_shape


def run(workdir, *arguments) -> None:
    report.main(["--workdir", str(workdir), *map(str, arguments)])


@pytest.fixture(scope="module")
def page(whole, tmp_path_factory) -> str:
    """The report of a tiny finished run on synthetic pedestrians, pictures and all."""
    output = tmp_path_factory.mktemp("report") / "a.html"
    run(whole, "--output", output, "--queries", "1", "--top", "3")
    return output.read_text()


def test_the_page_says_what_the_files_say(whole, page):
    found = Reader(page)
    evaluation = json.loads((whole / "evaluation.json").read_text())
    for gamma, scores in evaluation["gammas"].items():
        assert f"gamma {float(gamma):g}: rank-1 {scores['cmc'][0]:.1%}" in page  # the plot's words
        assert f"{100 * scores['mAP']:.1f}" in found.words
    assert "<h1>VPM on synthetic pedestrians</h1>" in page
    assert (
        "11 steps" in found.words
        and "images/s (median)" in found.words
        and "model.stem" in found.words
        and "(2, 1)" in found.words
    )
    headings = re.findall(r"<h2>(.*?)</h2>", page)
    assert headings == ["Results", "Training", "Ranked lists at gamma 0.5", "Region maps", "Configuration"]


def test_pictures_have_words_and_ranks(page):
    found = Reader(page)
    assert all(a["alt"] for tag, a in found.tags if tag == "img")
    kinds = [a["class"].removeprefix("card ") for tag, a in found.tags if "card" in a.get("class", "")]
    assert kinds.count("query") == 3
    assert kinds.count("right") + kinds.count("wrong") == 3 * 3  # three ranks for each query
    assert found.words.count("✓ match") == kinds.count("right") and "first match at rank" in found.words


def test_a_figure_of_one_ranked_list(whole, tmp_path, figures):
    run(whole, "--figure", tmp_path / "best.png", "--top", "4")
    run(whole, "--figure", tmp_path / "named.pdf", "--query", "0010_c1s1_001576_01.jpg", "--gamma", "1")
    with pytest.raises(UserError, match=r"--query none\.jpg: 0 of the 8 queries"):
        run(whole, "--figure", tmp_path / "no.png", "--query", "none.jpg")
    with Image.open(tmp_path / "best.png") as image:
        assert image.mode == "P"
    assert (tmp_path / "named.pdf").read_bytes().startswith(b"%PDF")
    pictures = [axes for axes in figures[0].axes if axes.images]
    assert len(pictures) == 2 + 4
    said = [text.get_text() for text in figures[0].texts]
    assert (
        "query: the top 50% of an image" in said
        and sum(bool(re.match(r"[1-4]\. \d\.\d\d [✓✗]", text)) for text in said) == 4
    )
    assert said[0].startswith(
        "Recipe synthetic, seed 0, 11 steps, trained and evaluated on synthetic pedestrians. ResNet-"
    )
    distances = [float(text.split()[1]) for text in said if re.match(r"[1-4]\. ", text)]
    assert distances == sorted(distances)


def test_a_figure_follows_the_keys_given(whole, tmp_path, monkeypatch):
    drawn = {}

    def ranking(path, query, frame, region_map, visibility, neighbors, columns, titles, about):
        path.touch()
        drawn.update(neighbors=neighbors, visibility=visibility)

    monkeypatch.setattr(report.overlay, "ranking", ranking)
    keys = ["match.visibility=uniform", "match.squared=true", "eval.flip=true", "data.height=32"]
    run(whole, "--figure", tmp_path / "a.pdf", *(f"--config.{key}" for key in keys))
    for neighbor in drawn["neighbors"]:
        np.testing.assert_allclose(neighbor.weight, 1 / 2)
        np.testing.assert_allclose(neighbor.distance, neighbor.weight @ neighbor.region_distance, rtol=1e-4)
    cells = map_shape(config_lib.read(whole), (32, config_lib.read(whole).data.width))
    assert drawn["visibility"].sum() == pytest.approx(np.prod(cells), rel=1e-3)


def test_other_training_sets_are_not_loaded(whole, tmp_path):
    workdir = shutil.copytree(whole, tmp_path / "run")
    text = (workdir / "config.json").read_text()
    assert '"also_train": ""' in text
    (workdir / "config.json").write_text(text.replace('"also_train": ""', '"also_train": "msmt17:nowhere"'))
    run(workdir, "--figure", tmp_path / "a.png", "--top", "2")
    assert (tmp_path / "a.png").exists()


def test_a_figure_explains_eq_4_alone(whole, tmp_path):
    for key in ("rerank", "vector"):
        with pytest.raises(UserError, match=r"leave match\.rerank, match\.vector"):
            run(whole, "--figure", tmp_path / "a.png", f"--config.match.{key}=True")
    make_run(tmp_path / "run", "market")
    with pytest.raises(UserError, match="add --pictures"):
        run(tmp_path / "run", "--figure", tmp_path / "a.png")


def test_without_pictures_no_dataset_is_needed(whole, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(whole, copy, ignore=shutil.ignore_patterns("checkpoints"))
    run(copy, "--no-pictures", f"--config.data.root={tmp_path / 'nowhere'}")
    text = (copy / "report.html").read_text()
    assert text.count("<img") == 2 and "Ranked" not in text  # the two plots


def test_real_people_are_shown_on_request_alone(tmp_path):
    elsewhere = tmp_path / "nowhere"
    paths = {"data__root": elsewhere, "data__distractors": elsewhere, "data__also_train": f"dukemtmc:{elsewhere}"}
    make_run(tmp_path / "run", "market", **{key: str(path) for key, path in paths.items()})
    run(tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text()
    Reader(text)
    assert "Run python -m vpm_jax.evaluate --workdir WORKDIR" in text and str(tmp_path) not in text
    assert "Not evaluated yet" in text and "no metrics.jsonl" in text and "<img" not in text
    with pytest.raises(UserError, match="nowhere"):
        run(tmp_path / "run", "--pictures")


def test_evaluations_of_any_kind_are_shown(tmp_path):
    make_run(tmp_path / "run", "market")
    (tmp_path / "run" / "evaluation-other.md").write_text("Other <protocol>\n\n| a | b |\n|---:|---:|\n| 1 | 2.5 |\n")
    (tmp_path / "run" / "evaluation.md").write_text("First\n")
    (tmp_path / "run" / "evaluation.json").write_text('{"gammas": {"0.5": {}}}')
    run(tmp_path / "run")
    text = (tmp_path / "run" / "report.html").read_text()
    assert text.index("First") < text.index("Other &lt;protocol&gt;") < text.index("<td>2.5</td>")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--output", "{tmp}"], "that is a folder"),
        (["--output", "{tmp}/none/a.html"], "there is no folder"),
        (["--figure", "{tmp}/a.xyz"], "a.xyz: expected a name that ends in one of ."),
        (["--figure", "{tmp}/a"], "a: expected a name that ends in one of"),
        (["--gamma", "0"], "--gamma 0"),
        (["--gamma", "nan"], "--gamma nan"),
        (["--queries", "0"], "--queries: '0', expected a positive"),
        (["--top", "-1"], "--top: '-1', expected a positive"),
        (["--config.model.depth=50"], "trained with another config (model.depth: 10 -> 50)"),
        (["--config.modle=50"], "no config key"),
    ],
)
def test_bad_arguments_are_one_sentence(tmp_path, arguments, sentence):
    make_run(tmp_path / "run")
    with pytest.raises(UserError) as error:
        run(tmp_path / "run", *[a.format(tmp=tmp_path) for a in arguments])
    assert sentence in str(error.value) and "\n" not in str(error.value)
    with raises("no-run"):
        run(tmp_path)


# ---- Ranked lists ----


def protocol(seed: int):
    """Random distances with ties, junk, distractors and queries without a match."""
    random = np.random.default_rng(seed)
    query = SimpleNamespace(identity=random.integers(1, 9, 20), camera=random.integers(1, 4, 20))
    gallery = SimpleNamespace(identity=random.integers(-1, 7, 40), camera=random.integers(1, 4, 40))
    return random.integers(0, 30, (20, 40)) / 8, query, gallery


@pytest.mark.parametrize("seed", range(5))
def test_a_ranked_list_is_the_protocols(seed):
    distance, query, gallery = protocol(seed)
    precision = metrics.average_precision(distance, query.identity, gallery.identity, query.camera, gallery.camera)
    for index in np.flatnonzero(np.isfinite(precision)):
        ranking = report.rank(int(index), distance[index], query, gallery)
        alone = metrics.rank_metrics(
            distance[index : index + 1],
            query.identity[index : index + 1],
            gallery.identity,
            query.camera[index : index + 1],
            gallery.camera,
        )
        assert report.first_match(ranking) == int(np.argmax(alone["cmc"] > 0)) + 1
        counted = [i for i in ranking.order if not ranking.junk[i]]
        assert (np.diff(distance[index][counted]) >= 0).all()
        hits = [place for place, i in enumerate(counted, 1) if ranking.correct[i]]
        np.testing.assert_allclose(np.mean(np.arange(1, len(hits) + 1) / hits), precision[index])


@pytest.mark.parametrize("seed", range(5))
def test_best_typical_and_worst_are_of_different_identities(seed):
    random = np.random.default_rng(seed)
    identity, precision = random.integers(0, 8, 30), random.random(30)
    precision[random.integers(0, 30, 6)] = np.nan
    known = [i for i in range(30) if np.isfinite(precision[i])]
    for count in (1, 3, 50):
        chosen = report.choose(precision, identity, count)
        assert list(chosen) == ["Best", "Typical", "Worst"]
        for queries in chosen.values():
            assert len(queries) == min(count, len(set(identity[known])))
            assert len({*identity[queries]}) == len(queries)
        middle = np.median(precision[known])
        for title, key in (
            ("Best", lambda i: -precision[i]),
            ("Worst", lambda i: precision[i]),
            ("Typical", lambda i, middle=middle: abs(precision[i] - middle)),
        ):
            best_of_each = sorted(min(key(i) for i in known if identity[i] == k) for k in set(identity[known]))
            np.testing.assert_array_equal([key(i) for i in chosen[title]], best_of_each[:count])


def test_tables_become_tables():
    text = html.markdown(
        "# A & B\n\ntwo\nlines\n\n| gamma | R-1 |\n|---:|---:|\n| **ours, <1>** | 21.7* |\n\n\\* a `note`\n"
    )
    found = Reader(text)
    assert [tag for tag, _ in found.tags].count("td") == 2
    assert "<td><b>ours, &lt;1&gt;</b></td>" in text and "<p>* a <code>note</code></p>" in text
    assert "<p>A &amp; B</p>" in text and "two<br>lines" in text and "21.7*" in found.words
