"""The tables by one command: what is run, what is kept, what is never repeated, and the numbers of the report."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
import socket
from functools import partial

import numpy as np
import pytest
from tiny_runs import KEYS

from vpm_jax import Description, paper
from vpm_jax.config import flatten
from vpm_jax.errors import UserError
from vpm_jax.matching import pairwise_distance
from vpm_jax.progress import duration
from vpm_jax.reproduce import command as reproduce
from vpm_jax.reproduce import estimate, experiments, figures, report, results, tables
from vpm_jax.reproduce.experiments import EXHIBITS, METHODS, Cell, fingerprint, make_run, plan


def names(runs):
    return [run.name for run in experiments.distinct(runs)]


# ---- What is run ----------------------------------------------------------------------------------------


def test_methods_are_the_keys_of_the_readme():
    config = make_run("market1501", "paper", "pcb").config
    assert (config.model.locator, config.loss.region_weight, config.data.crop) == ("stripes", 0, "none")
    assert (config.loss.identity_regions, config.loss.triplet_pairs) == ("all", "all")
    assert config.match.visibility == "uniform"
    for method, changes in {
        "vpm": {},
        "baseline": {"model.grid": (1, 1)},
        "vpm-notriplet": {"stage2.triplet_weight": 0.0},
        "mvpm-1": {"match.visibility": "uniform"},
        "mvpm-4": {"loss.triplet_pairs": "all", "loss.identity_regions": "all"},
        "vpm-3x2": {"model.grid": (3, 2), "data.crop": "any"},
        "vpm-bottom": {"data.crop": "bottom"},
    }.items():
        assert make_run("market1501", "paper", method, seed=3).changes == changes
    assert make_run("dukemtmc", "paper", "vpm").config.stage1.steps_per_epoch == 0  # of configs/duke.py
    assert make_run("dukemtmc", "small", "vpm").config.data.name == "dukemtmc"
    assert make_run("market1501", "released", "vpm").config.recipe == "released"


def test_pcb_compares_concatenated_features():
    config, random = make_run("market1501", "small", "pcb").config, np.random.default_rng(0)
    sides = [Description(random.normal(size=(n, 4, 8)), random.random((n, 4))) for n in (5, 7)]
    query, gallery = (side.features.reshape(len(side.features), -1) for side in sides)
    expected = np.square(np.linalg.norm(query[:, None] - gallery, axis=-1)) / 4
    np.testing.assert_allclose(pairwise_distance(config.match, *sides), expected, rtol=1e-4)


def test_every_method_has_the_papers_numbers_where_it_has_any():
    for exhibit, dataset in (("table 1", "market1501"), ("table 3", "market1501"), ("table 2", "partial_reid")):
        known = {p.method for p in paper.PAPER if p.source.name.lower() == exhibit and p.dataset == dataset}
        known -= {"MTRC", "AMC+SWM", "DSR", "SFR"}  # other people's methods
        assert {METHODS[m].published for m in EXHIBITS[exhibit].methods} >= known
    assert [m for m in METHODS if METHODS[m].published == "VPM"] == ["vpm", "vpm-p6"]  # Table 1: "p = 6 x 1"


def test_what_comes_to_the_same_is_one_run():
    cells = plan(["figure 4", "table 1"], "market1501", "small", 2)
    assert cells[Cell("vpm-p4", "", 1)].name == cells[Cell("vpm", "", 1)].name == "market1501-small-vpm-seed1"
    assert cells[Cell("vpm-p6", "", 0)].name == "market1501-small-vpm-p6-seed0"
    assert [run.config.seed for run in cells.values()] == [cell.seed for cell in cells]
    found = names(cells.values())
    assert len(found) == len(set(found)) == 2 * (6 + 4)
    assert found[: len(found) // 2] == [name for name in found if name.endswith("seed0")]  # seed by seed
    assert names(plan(["table 2"], "market1501", "paper", 1).values())[0] == "market1501-paper-vpm-bottom-seed0"


def test_mvpm_1_and_partial_images_evaluate_what_was_trained():
    cells = plan(["table 3"], "market1501", "small", 1)
    one = cells[Cell("mvpm-1", "partial_ilids", 0)]
    assert one.name == "market1501-small-mvpm-1-on-partial_ilids-seed0" and one.of.name == "market1501-small-vpm-seed0"
    assert cells[Cell("mvpm-2", "partial_ilids", 0)].of.name == "market1501-small-mvpm-2-seed0"
    order = names([one])  # asked for alone, it brings the training
    assert order == ["market1501-small-vpm-seed0", one.name]
    assert one.command() == (
        "python -m vpm_jax.evaluate --workdir runs/market1501-small-vpm-seed0 --output "
        "runs/market1501-small-mvpm-1-on-partial_ilids-seed0 --dataset partial_ilids --config.match.visibility=uniform"
    )


@pytest.mark.parametrize("scale", ["screen", "fast_screen"])
def test_screening_never_sees_a_test_set(scale):
    cells = plan(["table 2", "table 3"], "market1501", scale, 1)
    assert all(run.config.data.holdout_identities == 100 and not run.test for run in cells.values())
    assert not any(run.test for run in plan(["table 2"], "synthetic", "synthetic", 1).values())
    with pytest.raises(UserError, match="never looks at a test set"):
        make_run("market1501", scale, "vpm", variant="x", overrides=["--config.data.holdout_identities=0"])


def test_the_command_of_a_run_is_its_config(monkeypatch):
    """The command that a result carries sets every key that differs from its config file."""
    from vpm_jax import cli

    for method in METHODS:
        overrides = ["--config.data.gamma=0.4,1.0", "--config.pretrained=it's; mine.npz"]
        run = make_run("market1501", "screen", method, seed=2, variant="x", overrides=overrides)
        if run.of is not None:
            continue
        words = shlex.split(run.command())
        keys = [word for word in words if word.startswith("--config.")]
        spec = words[words.index("--config") + 1]
        assert fingerprint(cli.load_config(spec, keys)) == fingerprint(run.config)


def test_overrides_that_change_results_need_a_name():
    with pytest.raises(UserError, match=r"--config\.stage2\.epochs changes results.*--variant"):
        make_run("market1501", "small", "vpm", overrides=["--config.stage2.epochs=2"])
    run = make_run("market1501", "small", "vpm", variant="short", overrides=["--config.stage2.epochs=2"])
    assert run.name == "market1501-small-vpm-short-seed0"
    assert run.changes == {"stage2.epochs": 2, "stage2.triplet_start": 0.5, "stage2.warmup_epochs": 0.15}
    make_run("market1501", "small", "vpm", overrides=["--config.data.root=x", "--config.data.threads=7"])
    with pytest.raises(UserError, match="is set by baseline"):
        make_run("market1501", "small", "baseline", variant="x", overrides=["--config.model.grid=(2,1)"])
    with pytest.raises(UserError, match="--dataset and --seeds"):
        make_run("market1501", "small", "vpm", variant="x", overrides=["--config.seed=3"])


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ("--scale small", "name a --table"),
        ("--table 1 --dataset market1501 --scale synthetic", "synthetic pedestrians, not on market1501"),
        ("--table 1 --scale small --recipe released", "belongs to --scale paper"),
        ("--table 1 --seeds 0", "--seeds: '0'"),
        ("--table 1 --variant a/b", "for a file's name"),
        ("--table 1 --models mvpm-2", "need none of these"),
        ("--table 1 --config.model.widht=3", "did you mean"),
        ("--table 1 --models pbc", "expected some of vpm, baseline"),
        ("--table 1 --parts configs/market_plus.py", "leave out --table"),
        ("--parts configs/market_plus.py --config.stage2.epochs=2", "name this configuration with --variant"),
        ("--parts configs/market_plus.py --models emma", "expected some of base, ema"),
        ("--parts configs/market_plus.py --scale small", "not for choosing"),
        ("--parts configs/market_plus.py --dataset synthetic", "not for choosing"),
        ("--parts configs/market.py", "KeyError: 'SCREEN'"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, found, tmp_path):
    with pytest.raises(UserError, match=found):
        reproduce.main([*arguments.split(), "--plan", "--results", str(tmp_path)])


def test_a_plan_says_that_the_images_are_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "timed_rate", lambda config: 50.0)
    arguments = f"--table 1 --models vpm --config.data.root={tmp_path} --plan --results {tmp_path}"
    assert reproduce.main(arguments.split()) == 0
    assert f"They cannot start yet: {tmp_path} is empty" in capsys.readouterr().out


def test_no_step_is_timed_for_evaluations_alone(tmp_path, monkeypatch):
    monkeypatch.delattr(estimate, "timed_rate")
    runs = [make_run("market1501", "fast", "vpm", 0, test) for test in ("partial_reid", "partial_ilids")]
    assert "their time is not known" in estimate.describe(runs, tmp_path, tmp_path)
    monkeypatch.setattr(estimate, "timed_rate", lambda config: 64.0, raising=False)
    trained = make_run("market1501", "fast", "vpm-bottom")  # it alone is trained, and is not the first
    seconds = 92160 / 64 * (1 + estimate.EVALUATION * (1 + 2 * estimate.PARTIAL))
    assert f"about {duration(seconds)} on" in estimate.describe([*runs, trained], tmp_path, tmp_path)


def test_images_that_a_run_trains_on():
    assert estimate.images(make_run("market1501", "released", "vpm")) == 130 * 93 * 64
    assert estimate.images(make_run("market1501", "paper", "vpm")) == (50 * 202 + 80 * 93) * 64
    screen = make_run("market1501", "screen", "baseline").config
    assert estimate.images(make_run("market1501", "screen", "baseline")) == 500 * estimate.stages(screen)[-1].batch
    assert estimate.images(make_run("market1501", "paper", "mvpm-1")) == 0
    assert estimate.size(screen)[1] == 651


# ---- Runs that are only pretended -----------------------------------------------------------------------

GAMMAS = (0.5, 1.0)


def numbers(name):
    """{gamma: {"cmc", "mAP", "mINP"}} that a pretended run comes to, a function of its name."""
    random = np.random.default_rng(list(name.encode()))
    return {
        str(g): {"cmc": np.sort(random.random(50)).tolist(), "mAP": random.random(), "mINP": random.random()}
        for g in GAMMAS
    }


class Pretended(list):
    def __init__(self):
        super().__init__()
        self.failing, self.stopped = set(), set()  # names of runs that fail, or that their user stops


@pytest.fixture
def pretend(monkeypatch):
    """Nothing is trained; the names of the runs that would have been, in order."""
    done = Pretended()

    def work(run, *folders):
        done.append(run.name)
        if run.name in done.failing:
            raise UserError("the disk is full.")
        return 143 if run.name in done.stopped else 0

    def gather(run, workdirs):
        evaluation = {
            "gammas": numbers(run.name),
            "results": {"all-shot": numbers(run.name)["0.5"], "single-shot": {"cmc": numbers(run.name)["1.0"]["cmc"]}},
            "protocol": {"crop": "top", "queries": 3, "gallery": 4, "skipped": 0},
            "match": run.config.match.to_dict(),
            "chance_rank1": 0.01,
            "notes": ["Gallery is not the official one."],
            "steps": 7,
            "seconds": 2.0,
        }
        images = estimate.images(run)
        return results.record(run, evaluation, {}, images, 10.0 if images else 0.0, images / 10)

    monkeypatch.setattr(reproduce, "train", work)
    monkeypatch.setattr(reproduce, "evaluate", work)
    monkeypatch.setattr(reproduce, "gather", gather)
    monkeypatch.setattr(reproduce, "without_data", lambda missing, training: {})
    monkeypatch.setattr(estimate, "timed_rate", lambda config: 50.0)
    return done


def reproduce_in(folder, arguments):
    folders = {"--results": "results", "--workdirs": "workdirs", "--output": "report"}
    given = [word for option, name in folders.items() for word in (option, str(folder / name))]
    return reproduce.main([*arguments.split(), *given])


@pytest.fixture
def call(tmp_path):
    return partial(reproduce_in, tmp_path)


THREE = "--table 1 --scale small --models vpm baseline pcb"


def test_a_finished_run_is_never_repeated(pretend, call, tmp_path, capsys):
    assert call(f"{THREE} --plan") == 0
    assert not pretend and not list(tmp_path.iterdir())
    out = capsys.readouterr().out
    config = make_run("market1501", "small", "vpm").config
    images = config.stage2.epochs * config.stage2.steps_per_epoch * estimate.stages(config)[-1].batch
    assert (
        f"{images:,}" in out and f"in total {3 * images:,} images" in out and "a few timed steps (50.0 images/s" in out
    )
    assert call(THREE) == 0
    assert pretend == [f"market1501-small-{m}-seed0" for m in ("vpm", "baseline", "pcb")]
    assert {path.name for path in (tmp_path / "results").iterdir()} == {f"{name}.json" for name in pretend}
    assert "3 already finished" not in capsys.readouterr().out
    assert call(THREE) == 0 and call(f"{THREE} --seeds 2") == 0
    assert len(pretend) == 6 and len(set(pretend)) == 6
    assert call(f"{THREE} --seeds 3 --plan") == 0
    out = capsys.readouterr().out
    assert "6 already finished" in out and "the rates of finished runs" in out and out.count("seed2") == 3
    # A variant, or another dataset, may take another time.
    for other in ("--variant wide --config.model.width=99", "--dataset dukemtmc"):
        assert call(f"{THREE} {other} --plan") == 0
        assert "a few timed steps" in capsys.readouterr().out


PARTS = """
SCREEN = {"base": {}, "ema": {"optim.ema": 0.9}, "worse": {"data.erasing": 0.5, "stage2.epochs": 3}}
EVALUATED = {"flip": ("base", {"eval.flip": True}), "ema_flip": ("ema", {"eval.flip": True})}
"""


def test_parts_are_compared_seed_by_seed(pretend, call, tmp_path, capsys):
    file = tmp_path / "parts.py"
    file.write_text(PARTS)
    pretend.failing.add("market1501-screen-worse-seed1")
    with pytest.raises(UserError, match="1 of 10 runs have no result"):
        call(f"--parts {file} --seeds 2")
    assert pretend[:5] == [f"market1501-screen-{n}-seed0" for n in ("vpm", "ema", "worse", "flip", "ema_flip")]
    result = json.loads((tmp_path / "results" / "market1501-screen-ema_flip-seed1.json").read_text())
    assert result["changes"] == {"optim.ema": 0.9, "eval.flip": True} and result["images"] == 0
    assert result["evaluates"] == "market1501-screen-ema-seed1"
    assert result["protocol"]["held out identities"] == 100
    report = (tmp_path / "report" / "report.md").read_text()
    assert (tmp_path / "report" / "parts.pdf").exists()
    assert "(parts.png)" in report and (tmp_path / "report" / "parts.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "report" / "report.json").read_text())["parts"]

    def level(name, seed, metric):
        values = numbers(f"market1501-screen-{name}-seed{seed}").values()
        return 100 * np.mean([v["mAP"] if metric == "mAP" else v["cmc"][0] for v in values])

    assert data[0]["title"] == "base" and "gain" not in data[0]
    order = [row["gain"]["mAP"]["mean"] for row in data[1:]]
    assert order == sorted(order, reverse=True) and len(order) == 4
    shown = rows_of(report, "Rank-1 / mAP in percent")
    for row in data[1:]:
        seeds = [0] if row["title"] == "worse" else [0, 1]  # a failed run takes no part
        assert row["seeds"] == seeds
        cells = []
        for metric in ("R-1", "mAP"):
            gains = [level(row["title"], s, metric) - level("vpm", s, metric) for s in seeds]
            np.testing.assert_allclose(row["gain"][metric]["values"], gains, rtol=1e-9)
            several = f" ({min(gains):+.1f} to {max(gains):+.1f})" if len(gains) > 1 else ""
            cells.append(f"{np.mean(gains):+.1f}{several}")
        assert shown[row["title"]][-2:] == cells
    assert shown["worse"][0] == "`data.erasing=0.5`, `stage2.epochs=3`"

    # Chosen by name, they are compared with the base even so, and on the test set only by name.
    pretend.clear()
    assert call(f"--parts {file} --models ema --scale small") == 0
    assert pretend == ["market1501-small-vpm-seed0", "market1501-small-ema-seed0"]
    report = (tmp_path / "report" / "report.md").read_text()
    assert "parts.png" not in report and "in brackets" not in report  # of one part, of one seed

    # On another base, by another name.
    pretend.clear()
    assert call(f"--parts {file} --models ema_flip --variant wide --config.model.width=32") == 0
    assert pretend == [f"market1501-screen-{n}-wide-seed0" for n in ("vpm", "ema", "ema_flip")]
    data = json.loads((tmp_path / "report" / "report.json").read_text())["parts"]
    changes = {row["title"]: row["changes"] for row in data}
    assert changes == {"base": {}, "ema_flip": {"optim.ema": 0.9, "eval.flip": True}}


def test_what_a_part_evaluates_is_said_and_how_long_it_takes_is_known(pretend, call, tmp_path):
    file = tmp_path / "parts.py"
    file.write_text('SCREEN = {"base": {}}\nEVALUATED = {"crops": ("base", {"match.gallery_gammas": (0.5, 0.8)})}')
    assert call(f"--parts {file}") == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert " crops: Matching: Eq. 4, soft visibility, distances; the gallery also cropped to 0.5, 0.8, each" in text
    finished = {r["method"]: r for r in results.finished(tmp_path / "results")}
    base, crops = finished["vpm"], finished["crops"] | {"evaluation_seconds": 60.0}
    runs = experiments.plan_ingredients(experiments.ingredients(file), "market1501", "screen", 1)
    run = {each.method: each for each in runs.values()}
    assert estimate.rates(run["crops"], [base]) == (base["images_per_second"], base["evaluation_seconds"])
    assert estimate.rates(run["crops"], [base, crops])[1] == 60.0
    assert estimate.rates(run["vpm"], [base, crops])[1] == base["evaluation_seconds"]


def test_parts_without_their_base_have_no_gain(pretend, call, tmp_path):
    file = tmp_path / "parts.py"
    file.write_text(PARTS)
    pretend.failing.add("market1501-screen-vpm-seed0")
    with pytest.raises(UserError, match="1 of 5 runs have no result"):
        call(f"--parts {file}")
    rows = json.loads((tmp_path / "report" / "report.json").read_text())["parts"]
    assert {row["title"] for row in rows} >= {"ema", "worse"} and not any("gain" in row for row in rows)
    assert "gain is over base" in (tmp_path / "report" / "report.md").read_text()
    for name in ("ema_flip", "worse", "flip"):
        (tmp_path / "results" / f"market1501-screen-{name}-seed0.json").unlink(missing_ok=True)
    assert call(f"--parts {file} --models ema_flip --report") == 0  # ema is its parent, and finished
    assert "None has finished" in (tmp_path / "report" / "report.md").read_text()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("SCREEN = {}", "must begin with a base that changes nothing"),
        ("SCREEN = {'a': {'optim.ema': 0.9}}", "must begin with a base that changes nothing"),
        ("SCREEN = {'base': {}, 'pcb': {'optim.ema': 0.9}}", "pcb in .* another model"),
        ("SCREEN = {'base': {}, 'a': {'optim.emma': 0.9}}", r"Ingredient a sets optim\.emma"),
        ("SCREEN = {'base': {}, 'a': {'optim.ema': 'x'}}", r"Ingredient a: .*optim\.ema is 'x' \(str\)"),
        ("SCREEN = {'base': {}, 'a': {'data.holdout_identities': 0}}", "must be the same in all runs"),
        ("SCREEN = {'base': {}, 'a': {'seed': 5}}", "must be the same in all runs"),
        ("SCREEN = {'base': {}, 'a/b': {'optim.ema': 0.9}}", "expected a name of letters"),
        ("SCREEN = {'base': {}, 3: {'optim.ema': 0.9}}", "expected a name of letters"),
        ("SCREEN = {'base': {}}\nEVALUATED = {'b': ('a', {})}", "b evaluates a, which SCREEN"),
        ("SCREEN = {'base': {}}\nEVALUATED = {'b': ('base', {'optim.ema': 0.9})}", "move it to SCREEN"),
        ("SCREEN = {'base': {}, 'a': {1: 2, 'z': 3}}", "Ingredient a sets 1, which is not a config key"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("SCREEN = 3", "AttributeError"),
        ("SCREEN = ", "SyntaxError"),
        (None, "no such file, expected a recipe"),
    ],
)
def test_lists_of_parts_that_are_none(text, found, call, tmp_path):
    file = tmp_path / "parts.py"
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=found):
        call(f"--parts {file} --plan")


def test_what_changes_no_result_changes_no_fingerprint():
    plain = make_run("market1501", "paper", "vpm").config
    free = set(flatten(plain)) - set(fingerprint(plain))
    assert free >= {"data.root", "data.workers", "data.threads", "log_every", "eval.batch", "eval.every", "parallel"}
    for key in ("seed", "data.name", "data.gamma", "eval.crop", "eval.gammas", "match.visibility", "pretrained"):
        assert key not in free
    assert not any(key.startswith(("model.", "loss.", "optim.", "stage1.", "stage2.")) for key in free)
    plain.pretrained = "torchvision:/somewhere/resnet50.pth"
    assert fingerprint(plain)["pretrained"] == "torchvision:resnet50.pth"


def test_what_a_report_leaves_out_has_a_line_for_each_reason():
    left = {"a": "has not finished", "b": "is left out: no data.", "c": "has not finished"}
    assert report.absent(left) == [
        "- Not in this report: a, c: each has not finished.",
        "- Not in this report: b is left out: no data.",
    ]


def test_a_failed_run_does_not_stop_the_others(pretend, call, tmp_path, capsys):
    pretend.failing = {"market1501-small-vpm-seed0"}
    with pytest.raises(UserError, match=r"1 of 3 runs have no result \(market1501-small-vpm-seed0 failed: the disk"):
        call(THREE)
    assert len(pretend) == 3 and len(list((tmp_path / "results").iterdir())) == 2
    report = (tmp_path / "report" / "report.md").read_text()
    assert "Not in this report: market1501-small-vpm-seed0 failed: the disk is full." in report
    pretend.failing = set()
    assert call(THREE) == 0
    assert pretend.count("market1501-small-vpm-seed0") == 2 and len(pretend) == 4


def test_the_user_stops_it(pretend, call, tmp_path):
    pretend.stopped = {"market1501-small-baseline-seed0"}
    assert call(THREE) == 143
    assert pretend == ["market1501-small-vpm-seed0", "market1501-small-baseline-seed0"]
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["market1501-small-vpm-seed0.json"]


# ---- Who works on what ----------------------------------------------------------------------------------


def test_what_others_finish_meanwhile_is_in_the_report(pretend, call, tmp_path, monkeypatch):
    folder, run = tmp_path / "results", make_run("market1501", "small", "vpm")
    folder.mkdir()
    with contextlib.ExitStack() as other:
        other.enter_context(results.claim(folder, run))
        work = reproduce.train

        def meanwhile(mine, workdirs):
            if mine.method == "pcb":
                results.write(folder, run, reproduce.gather(run, workdirs))
                other.close()
            return work(mine, workdirs)

        monkeypatch.setattr(reproduce, "train", meanwhile)
        assert call(THREE) == 0
    assert len(pretend) == 2
    text = (tmp_path / "report" / "report.md").read_text()
    assert rows_of(text, "Rank-1 / mAP in percent").keys() >= {"VPM", "global feature", "PCB"} and "Not in" not in text


def test_a_claim_lasts_as_long_as_its_run(tmp_path):
    run, other = make_run("market1501", "small", "vpm"), make_run("market1501", "small", "baseline")
    with pytest.raises(KeyboardInterrupt), results.claim(tmp_path, run) as mine:
        assert mine and "process" in results.owner(tmp_path, run) and results.owner(tmp_path, other) is None
        with results.claim(tmp_path, run) as again:
            assert not again
        assert results.owner(tmp_path, run)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


# ---- The report -----------------------------------------------------------------------------------------


def rows_of(text, first):
    """{gamma or method: cells} of the table that follows a line beginning with `first`."""
    lines = text.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(first)) + 2
    table = [line.strip("| ").split(" | ") for line in lines[begin : lines.index("", begin)]]
    return {row[0]: row[1:] for row in table}


def test_mean_and_spread_are_numpys_and_differences_the_readers(pretend, call, tmp_path):
    assert call("--table 1 --scale small --models vpm baseline --seeds 3") == 0
    data = json.loads((tmp_path / "report" / "report.json").read_text())["exhibits"]["table 1"]["sweep"]
    text = (tmp_path / "report" / "report.md").read_text()
    assert [row["title"] for row in data] == ["VPM", "global feature"] and "± is the sample standard deviation" in text
    sweep, lead = rows_of(text, "Rank-1 / mAP in percent"), rows_of(text, "Rank-1 / mAP of VPM minus")
    means = {}
    for row in data:
        assert row["seeds"] == [0, 1, 2]
        beside = rows_of(text, f"Beside the paper's Table 1: {row['title']}")
        for column, gamma in enumerate(GAMMAS):
            raw = [numbers(f"market1501-small-{row['method']}-seed{s}")[str(gamma)] for s in range(3)]
            values = {
                "R-1": [100 * r["cmc"][0] for r in raw],
                "R-5": [100 * r["cmc"][4] for r in raw],
                "R-10": [100 * r["cmc"][9] for r in raw],
                "mAP": [100 * r["mAP"] for r in raw],
                "mINP": [100 * r["mINP"] for r in raw],
            }
            cells = []
            for metric, found in values.items():
                one = row["numbers"][str(gamma)][metric]
                assert one["mean"] == pytest.approx(np.mean(found)) and one["std"] == pytest.approx(
                    np.std(found, ddof=1)
                )
                assert (one["min"], one["max"]) == pytest.approx((min(found), max(found)))
                means[row["title"], gamma, metric] = one["mean"]
                if metric == "mINP":
                    continue
                theirs = paper.published("market1501", METHODS[row["method"]].published).scores[gamma][metric]
                shown = f"{np.mean(found):.1f}"
                cells += [f"{shown} ± {np.std(found, ddof=1):.1f}", f"{theirs:.1f}", f"{float(shown) - theirs:+.1f}"]
                assert one["difference"] == pytest.approx(np.mean(found) - theirs)
            assert beside[f"{gamma:g}"] == cells
            assert sweep[row["title"]][1 + column] == f"{cells[0]} / {cells[9]}"
    for column, gamma in enumerate(GAMMAS):
        gaps = [means["VPM", gamma, m] - means["global feature", gamma, m] for m in ("R-1", "mAP")]
        assert lead["global feature"][column] == " / ".join(f"{gap:+.1f}" for gap in gaps)
    assert (tmp_path / "report" / "table-1.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report" / "table-1.pdf").read_bytes().startswith(b"%PDF")


def test_one_seed_has_no_spread_and_held_out_identities_no_paper(pretend, call, tmp_path):
    assert call("--table 1 --scale screen --models vpm --variant x --config.data.gamma=0.4,1.0") == 0
    text = (tmp_path / "report" / "report.md").read_text()
    assert "±" not in text and "| paper |" not in text and "variant x" in text
    assert "- On 100 held-out training identities of Market-1501. Protocol: single query, 3 queries cropped to" in text
    assert "Not comparable with the paper: the queries and the gallery are held-out training identities." in text
    conditions = json.loads((tmp_path / "report" / "report.json").read_text())["conditions"]
    assert conditions and all(f"- {line}" in text for line in conditions)
    assert "data.gamma = (0.4, 1.0)" in text and "stage2.epochs = 10" in text
    assert str(tmp_path) not in text


def test_partial_images_stand_beside_the_papers(pretend, call, tmp_path):
    assert call("--table 2 --scale small --seeds 2 --models vpm-top") == 0
    text = (tmp_path / "report" / "report.md").read_text()
    for test in ("partial_reid", "partial_ilids"):
        runs = [f"market1501-small-vpm-on-{test}-seed{seed}" for seed in range(2)]
        assert set(runs) <= set(pretend)
        data = json.loads((tmp_path / "report" / "report.json").read_text())["exhibits"]["table 2"][test]
        found = [100 * numbers(name)["0.5"]["cmc"][2] for name in runs]
        one = data[0]["numbers"]["all-shot"]["R-3"]
        theirs = paper.published(test, "VPM (Top)").scores[1.0]["R-3"]
        assert one["mean"] == pytest.approx(np.mean(found)) and one["paper"] == theirs
        assert "mAP" not in data[0]["numbers"]["single-shot"]
        assert f"| {np.mean(found):.1f} ± {np.std(found, ddof=1):.1f} | {theirs:.1f} |" in text
    assert "3 partial images as queries, uncropped (gamma 1.0), 4 whole images as gallery" in text
    for title in ("Market-1501", "Partial-REID", "Partial-iLIDS"):
        assert text.count(f"- {title}: Gallery is not the official one.") == 1


def test_a_dataset_that_is_absent_is_left_out_in_a_sentence(pretend, call, tmp_path, monkeypatch, capsys):
    def load(data):
        if data.name != "market1501":
            raise UserError(f"there is no {data.name}.")

    monkeypatch.undo()
    monkeypatch.setattr(reproduce, "load_dataset", load)
    missing = experiments.distinct(plan(["table 3"], "market1501", "small", 1, models=["vpm", "mvpm-1"]).values())
    left = reproduce.without_data(missing)
    assert set(left) == {run.name for run in missing if run.test}
    assert set(left.values()) == {"is left out: there is no partial_ilids."}
    duke = [make_run("dukemtmc", "small", "vpm")]
    with pytest.raises(UserError, match="there is no dukemtmc"):
        reproduce.without_data(duke)
    assert reproduce.without_data(duke, training=False) == {}


def test_misprints_are_not_compared_with(pretend, call, tmp_path):
    cells = plan(["table 1"], "dukemtmc", "small", 1, models=["baseline"])
    run = next(iter(cells.values()))
    found = {"gammas": {"0.7": numbers("x")["0.5"]}}
    values = tables.rows("table 1", cells, {run.name: found})[0]["numbers"]["0.7"]
    assert "paper" in values["R-1"] and "paper" not in values["mAP"]


def test_the_command_of_a_report_has_no_paths_of_this_machine():
    words = (
        "--table 1 3 --results a --workdirs=b --output c --config.data.root /d --config.data.root=/e --seeds 2 "
        "--report --work a --out=b --repo"
    )
    assert reproduce.command_line(words.split()) == "python -m vpm_jax.reproduce --table 1 3 --seeds 2"


# ---- Real runs, tiny ------------------------------------------------------------------------------------

VPM, MVPM = "synthetic-vpm-tiny-seed0", "synthetic-mvpm-1-tiny-seed0"


@pytest.fixture(scope="module")
def command(pedestrians):
    """Arguments that train VPM and evaluate its checkpoint as MVPM-1."""
    keys = KEYS | {"data.root": str(pedestrians), "eval.every": 0}
    keys = [f"--config.{k}={str(v).replace(' ', '')}" for k, v in keys.items()]
    return f"--table 3 --figure 5 --scale synthetic --variant tiny --models vpm mvpm-1 {' '.join(keys)}"


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory):
    """(the folder of the command's results, workdirs and report; what it printed)."""
    folder, out = tmp_path_factory.mktemp("finished"), io.StringIO()
    with contextlib.redirect_stdout(out):
        assert reproduce_in(folder, command) == 0
    return folder, out.getvalue()


@pytest.fixture
def copied(finished, tmp_path):
    """The results of the finished runs; their workdirs stay where they are."""
    shutil.copytree(finished[0] / "results", tmp_path / "results")
    (tmp_path / "workdirs").symlink_to(finished[0] / "workdirs")
    return tmp_path / "results"


def test_from_the_plan_to_the_report(finished):
    folder, out = finished
    assert "0 already finished" in out and "timing a few steps" in out and "88 images" in out
    for name in (VPM, MVPM):
        found = json.loads((folder / "results" / f"{name}.json").read_text())
        evaluation = json.loads((folder / "workdirs" / name / "evaluation.json").read_text())
        assert list(found["gammas"]) == ["0.5", "1.0"] and found["chance_rank1"] == evaluation["chance_rank1"]
        for gamma, values in found["gammas"].items():
            theirs = evaluation["gammas"][gamma]
            assert values == theirs | {"cmc": theirs["cmc"][:10]}
    assert found["images"] == 0 and found["evaluates"] == VPM
    assert found["match"]["visibility"] == "uniform"
    vpm = json.loads((folder / "results" / f"{VPM}.json").read_text())
    assert vpm["images"] == 88 and vpm["seconds"] > 0 and vpm["images_per_second"] > 0 and vpm["steps"] == 11
    assert vpm["resolved"] == {"model.num_identities": 8}
    report = (folder / "report" / "report.md").read_text()
    data = json.loads((folder / "report" / "report.json").read_text())["exhibits"]["table 3"]["sweep"]
    shown = rows_of(report, "Rank-1 / mAP in percent")
    for row, name in zip(data, ("VPM", "MVPM-1"), strict=True):
        evaluation = json.loads((folder / "workdirs" / row["runs"][0] / "evaluation.json").read_text())
        expected = [f"{100 * v['cmc'][0]:.1f} / {100 * v['mAP']:.1f}" for v in evaluation["gammas"].values()]
        assert row["title"] == name and shown[name] == ["1", *expected]
    for picture in ("table-3.png", "figure-5.png", "figure-5-vpm.png"):
        assert (folder / "report" / picture).read_bytes().startswith(b"\x89PNG") and f"({picture})" in report


def test_a_result_says_how_it_came_about(finished, pedestrians):
    text = (finished[0] / "results" / f"{VPM}.json").read_text()
    found = json.loads(text)
    assert str(pedestrians) not in text and socket.gethostname() not in text
    assert found["changes"]["model.head_dim"] == 8 and "data.root" not in found["changes"]
    assert found["config"]["model.head_dim"] == 8 and "data.root" not in found["config"]
    assert {"jax", "Python"} <= set(re.findall(r"[A-Za-z]+", found["versions"])) and found["hardware"]


def test_finished_runs_are_reported_and_not_repeated(copied, command, call, tmp_path, monkeypatch, capsys):
    def no(*arguments):
        raise AssertionError("trained or evaluated again")

    monkeypatch.setattr(reproduce, "train", no)
    monkeypatch.setattr(reproduce, "evaluate", no)
    monkeypatch.setattr(figures, "region_maps", lambda *arguments: None)
    assert call(command) == 0
    assert "2 already finished" in capsys.readouterr().out
    assert call(f"{command} --seeds 2 --report") == 0
    text = (tmp_path / "report" / "report.md").read_text()
    [absent] = [line for line in text.splitlines() if line.endswith(": each has not finished.")]
    assert "| VPM | 1 |" in text and absent.count("-seed1") == 2
    shutil.rmtree(copied)
    with pytest.raises(UserError, match="leave out --report"):
        call(f"{command} --report")


@pytest.mark.parametrize(("split", "name"), [("train", VPM), ("test", MVPM)])
def test_a_result_on_other_data_is_refused(copied, command, call, split, name):
    path = copied / f"{name}.json"
    found = json.loads(path.read_text())
    assert re.fullmatch("[0-9a-f]{16}", found["data"]["test"]) and (found["data"]["train"] is None) == (name == MVPM)
    found["data"][split] = "0123456789abcdef"
    path.write_text(json.dumps(found))
    assert call(f"{command} --plan") == 0  # which works without the data
    with pytest.raises(
        UserError, match=rf"{name}\.json is the result of .* on other data .*\(the {split} set differs\)"
    ):
        call(command)


def test_a_result_of_another_config_is_refused_by_its_keys(copied, command, call):
    path = copied / f"{VPM}.json"
    before = path.read_text()
    found = json.loads(before)
    found["config"] |= {"data.gamma": [0.4, 1.0], "stage2.epochs": 3}
    path.write_text(json.dumps(found))
    with pytest.raises(UserError, match=rf"{VPM}\.json.*data\.gamma: .*stage2\.epochs: 3 in the file, 2 requested"):
        call(f"{command} --plan")
    # Keys that this version has added are as if the file had their defaults; those that are gone do not count.
    found = json.loads(before)
    found["config"]["model.name"] = "vpm"
    del found["config"]["optim.nesterov"]
    path.write_text(json.dumps(found))
    assert call(f"{command} --plan") == 0
    for text in ('{"config": {}}', '{"config": [1]}', "[]", before[:900], ""):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"{VPM}\.json is not the result of a run"):
            call(f"{command} --plan")


def test_a_run_is_left_to_who_works_on_it_unless_that_is_dead(copied, command, call, tmp_path, capsys):
    command = command.replace("--figure 5 ", "")
    [run] = (r for r in plan(["table 3"], "synthetic", "synthetic", 1, ["mvpm-1"], "tiny").values() if r.of)
    result = json.loads((copied / f"{MVPM}.json").read_text())
    (copied / f"{MVPM}.json").unlink()
    with results.claim(copied, run) as mine:
        assert mine
        with pytest.raises(UserError, match=rf"1 of 2 runs have no result .*{MVPM} is claimed by another process"):
            call(command)
        claim = json.loads((copied / f"{MVPM}.claim").read_text())
    assert f"claimed by process {os.getpid()} on {socket.gethostname()}, since" in capsys.readouterr().out
    assert socket.gethostname() not in (tmp_path / "report" / "report.md").read_text()

    (copied / f"{MVPM}.claim").write_text(json.dumps(claim | {"started": "long ago"}))
    assert results.owner(copied, run) is None
    assert call(command) == 0
    assert json.loads((copied / f"{MVPM}.json").read_text())["gammas"] == result["gammas"]
    assert not list(copied.glob("*.claim"))


def test_an_evaluation_wants_the_checkpoint_of_its_own_run(copied, command, call, tmp_path):
    command = command.replace("--figure 5 ", "")
    (copied / f"{MVPM}.json").unlink()
    config = (tmp_path / "workdirs" / VPM / "config.json").read_text()
    (tmp_path / "workdirs").unlink()
    workdir = tmp_path / "workdirs" / VPM
    workdir.mkdir(parents=True)
    (workdir / "config.json").write_text(config.replace('"head_dim": 8', '"head_dim": 9'))
    with pytest.raises(UserError, match=r"mvpm-1-tiny-seed0 failed: .*model\.head_dim differs"):
        call(command)
    (workdir / "config.json").unlink()
    with pytest.raises(UserError, match=r"which is not in .*copy it from the machine that trained it"):
        call(command)


def test_the_commit_is_the_one_given_where_code_was_copied(monkeypatch):
    monkeypatch.delenv("VPM_COMMIT", raising=False)
    assert re.fullmatch(r"[0-9a-f]{12}\+?", results.commit() or "0" * 12)  # None in an unpacked archive
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    assert results.commit() is None
    monkeypatch.setenv("VPM_COMMIT", "63a6c85")
    assert results.commit() == "63a6c85"
    monkeypatch.delenv("GIT_DIR")
    assert results.commit() == "63a6c85"  # though there may be a checkout around the copy
