"""The benchmarks run and say what they measured."""

import contextlib
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from paths import CONFIGS
from plain_matching import reference
from tiny import SHRUNK, shrunk

from vpm_jax import benchmark
from vpm_jax import config as config_lib
from vpm_jax.benchmark import SECTIONS, convolutions, main, matching, search, step
from vpm_jax.benchmark.report import Report, Row
from vpm_jax.benchmark.timing import measure
from vpm_jax.errors import UserError


def test_measure_leaves_out_the_warm_up():
    rate = measure(itertools.chain([1000], itertools.repeat(7, 3)), seconds=60, warm_up=1)
    assert rate.images == 21 and rate.wall > 0 and rate.per_second == 21 / rate.wall


def test_data(monkeypatch, capsys):
    monkeypatch.delenv("VPM_DATA", raising=False)
    arguments = ["--seconds=0.05", "--threads=2", "--config.data.height=64", "--config.data.width=32"]
    main(["data", *arguments])
    out = capsys.readouterr().out
    assert "64 x 32" in out and "generated JPEGs" in out
    for row in ("decode, resize: the limit", "train_batches, 1 thread ", "train_batches, 2 threads"):
        (line,) = (line for line in out.splitlines() if line.startswith(row))
        per_second, per_core = (float(number.replace(",", "")) for number in line[len(row) :].split()[:2])
        assert per_second > 0 and per_core > 0


class FakeSide:
    """A side whose step takes 0.1 s in JAX, 0.2 s in eager and 0.15 s in compiled PyTorch; each turn all slow down."""

    def __init__(self, name: str, seconds: dict[str, float], facts: dict | str):
        self.facts, self.offers, self._seconds, self._turns = facts, list(seconds), seconds, 0

    def time(self, what, repetitions):
        self._turns += what == "step"
        return dict.fromkeys(("wall", "cpu"), self._seconds[what] * repetitions * self._turns)

    def repetitions(self, what, args):
        return 3


def fake_side(kind, *arguments):
    if kind == "limits":
        return contextlib.nullcontext(FakeSide("", {}, ""))
    if kind == "jax_step":
        facts = {"flops": 4e9, "bytes": 1e9, "limits": {"matmul": 1e10, "copy": 1e9}}
        return contextlib.nullcontext(FakeSide("JAX", {"step": 0.1, "matmul": 0.2, "copy": 0.05}, facts))
    seconds = 0.15 if arguments[-1] else 0.2
    facts = {"limits": {"matmul": 1.2e10}}  # on a device of its own, whose product is larger
    return contextlib.nullcontext(FakeSide("PyTorch", {"step": seconds, "matmul": 0.1}, facts))


def test_step_divides_what_it_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(step, "start_side", fake_side)
    file = tmp_path / "step.json"
    main(["step", "--against=torch", "--batch=8", "--rounds=3", f"--json={file}"])
    rows = {
        (r["name"], r["limit_is"].split()[0] if r["limit_is"] else ""): r for r in json.loads(file.read_text())["rows"]
    }
    # The second of three turns, twice as slow as said: 0.2 s for 8 images; the ratio is that of the faster PyTorch.
    ours = rows["step float32: JAX", "matmul"]
    assert ours["value"] == pytest.approx(8 / 0.2)
    assert ours["limit"] == pytest.approx(8 * (1.2e10 / 0.1) / 4e9)  # PyTorch's product is the faster
    assert rows["step float32: JAX", "roofline,"]["limit"] == pytest.approx(8 * (1e9 / 0.05) / 1e9)
    assert rows["step float32: PyTorch, eager", "matmul"]["value"] == pytest.approx(8 / 0.4)
    assert rows["step float32: JAX / PyTorch, compiled", ""]["value"] == pytest.approx(1.5)
    assert "step float32: JAX" in capsys.readouterr().out


def test_step_says_why_torch_was_not_compiled(monkeypatch, capsys):
    def no_compiler(kind, *arguments):
        if kind == "torch_step" and arguments[-1]:
            raise UserError("no compiler here")
        return fake_side(kind, *arguments)

    monkeypatch.setattr(step, "start_side", no_compiler)
    main(["step", "--against=torch", "--batch=8"])
    out = capsys.readouterr().out
    assert "no compiler here" in out and "JAX / PyTorch, eager" in out and "PyTorch, compiled" not in out


def test_steps_batch_is_one_that_training_draws():
    config = step.fixed(shrunk("market"))
    batch = step.random_batch(config, 8)
    assert batch["image"].shape == (8, 64, 32, 3) and batch["image"].dtype == np.uint8
    identities, counts = np.unique(batch["identity"], return_counts=True)
    assert len(identities) > 1 and counts.min() > 1 and identities.max() < config.model.num_identities
    assert not batch["visible"].all() and batch["visible"].any(axis=1).all()
    for labels, visible in zip(batch["labels"], batch["visible"], strict=True):
        assert set(np.unique(labels)) == set(np.flatnonzero(visible))


@pytest.mark.parametrize(
    "arguments",
    ["step --batch=1", "step --dtype=float16", "step --rounds=0", "metrics --gallery=49", "distractors --queries=501"],
)
def test_bad_sizes_are_refused(monkeypatch, arguments):
    monkeypatch.setattr(step, "start_side", fake_side)
    with pytest.raises(UserError, match=arguments.split()[1].partition("=")[0]):
        main(arguments.split())


def test_a_share_of_a_time_is_the_limit_over_it():
    assert Row("", 4.0, "s", 2.0).share == 0.5 and Row("", 2.0, "images/s", 4.0).share == 0.5


def test_matching_and_its_rivals_agree(capsys):
    main(["matching", "--queries=30", "--gallery=2100", "--channels=8", "--rounds=1"])
    out = capsys.readouterr().out
    (apart,) = re.findall(r"differ by at most (\S+)\.", out)
    assert float(apart) < 1e-3  # of distances up to 2; the rivals keep fewer digits of near pairs
    assert "matching: JAX" in out and "matching: NumPy" in out


def test_what_matching_is_compared_with_is_equation_4():
    random = np.random.default_rng(0)
    sides = *matching.images(4, 3, 5, random), *matching.images(6, 3, 5, random)
    np.testing.assert_allclose(np.linalg.norm(sides[0], axis=-1), 1, rtol=1e-6)
    for distance, rtol in ((matching.numpy_distance, 1e-5), (matching.exact_distance, 1e-12)):
        np.testing.assert_allclose(distance(*sides), reference(*sides), rtol=rtol)


def test_search_reads_a_store_and_is_exact(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(search, "SLICE_BYTES", 2**10)  # many slices
    sizes = ["--queries=3", "--gallery=200", "--regions=2", "--channels=8", "--rounds=1"]
    file = tmp_path / "search.json"
    main(["search", *sizes, f"--folder={tmp_path}", f"--json={file}"])
    out = capsys.readouterr().out
    assert "200 images of 2 x 8 float16" in out and "of the first 200 images" in out
    rows = json.loads(file.read_text())["rows"]
    assert [row["name"] for row in rows[:3]] == ["search: 3 queries"] * 3
    assert rows[3]["name"].startswith("search in two stages: 1,000 candidates by ")
    assert len({row["limit_is"] for row in rows}) == 4 and all(row["share"] > 0 for row in rows)
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]  # the gallery is gone
    with pytest.raises(UserError, match="is not a folder"):
        main(["search", *sizes, f"--folder={file}"])


def test_search_notices_wrong_answers(monkeypatch):
    random = np.random.default_rng(0)
    query, gallery = (matching.images(n, 2, 8, random) for n in (3, 60))
    search.check(query, gallery, 5)
    from vpm_jax.topk import top_k

    def off_by_one(*arguments):
        distance, index = top_k(*arguments)
        return distance, (index + 1) % 60

    monkeypatch.setattr("vpm_jax.topk.top_k", off_by_one)
    with pytest.raises(RuntimeError, match="whole distance matrix"):
        search.check(query, gallery, 5)


def test_metrics_and_the_plain_evaluator_agree(tmp_path, capsys):
    file = tmp_path / "metrics.json"
    main(["metrics", "--queries=40", "--gallery=300", "--rounds=1", f"--json={file}"])
    (apart,) = re.findall(r"agree to (\S+)\.\n", capsys.readouterr().out)
    assert float(apart) < 1e-12
    record = json.loads(file.read_text())
    assert [row["name"] for row in record["rows"]] == ["metrics: rank_metrics", "metrics: plain evaluator"]
    assert all(row["value"] > 0 and row["share"] > 0 for row in record["rows"]) and "numpy" in record["versions"]


@pytest.fixture
def tiny_network(stem_alone) -> list[str]:
    """Overrides of a config."""
    changes = SHRUNK | {key.replace("__", "."): value for key, value in stem_alone.items()}
    return [f"--config.{key}={value}" for key, value in changes.items() if key != "model.num_identities"]


def test_extraction_and_evaluation(capsys, tiny_network):
    for arguments in (["extraction", "--images=10"], ["evaluation", "--queries=3", "--gallery=12"]):
        main([*arguments, "--seconds=0.1", "--config.eval.batch=4", "--config.eval.gammas=(0.5,1.0)", *tiny_network])
    out = capsys.readouterr().out
    for row in ("extraction: network alone", "extraction: from JPEG to features", "evaluation: whole"):
        assert row in out


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_tracking(fit, capsys, tiny_network):
    main(["tracking", "--people", "1", "3", "--rounds=1", f"--config.data.fit={fit}", *tiny_network])
    out = capsys.readouterr().out
    for people in (1, 3):
        rates = [
            float(line.removeprefix(name).split()[0].replace(",", ""))
            for name in (f"tracking: network alone, {people} crops", f"tracking: {people} people in a frame")
            for line in out.splitlines()
            if line.startswith(name)
        ]
        assert len(rates) == 2 and min(rates) > 0


@pytest.mark.parametrize("distractors", [0, 300])  # fewer images than the longest CMC, and more
def test_distractors_in_pieces(monkeypatch, capsys, distractors):
    monkeypatch.setattr("vpm_jax.distances.PIECE_BYTES", 1)  # a batch at a time
    size = ["--queries=6", "--gallery=30", f"--distractors={distractors}", "--channels=8", "--config.eval.batch=64"]
    main(["distractors", *size, "--config.eval.gammas=1.0"])
    out = capsys.readouterr().out
    (apart,) = re.findall(r"The metrics of 4 queries differ by (\S+) from", out)
    assert float(apart) < 1e-12
    assert f"{30 + distractors} gallery images, {distractors} of them distractors" in out
    assert "distractors: whole evaluation" in out


def test_all_is_one_table(monkeypatch, capsys):
    prepared = []
    monkeypatch.setattr(benchmark.parallel, "prepare_backend", lambda: prepared.append(True))

    def part(name):
        def run(args, config):
            assert prepared, "JAX would start without XLA's flags"
            if name == "matching":
                raise UserError("too little memory")
            return Report([Row(f"{name}: it", 1.0, "s", 0.5, "a limit", "an aim")], [f"{name} was measured"])

        return SimpleNamespace(HELP="", add_arguments=SECTIONS[name].add_arguments, run=run)

    monkeypatch.setattr(benchmark, "SECTIONS", {name: part(name) for name in SECTIONS})
    monkeypatch.setattr(step, "start_side", fake_side)
    assert main(["all"]) == 1
    out = capsys.readouterr().out
    assert out.count("of the limit") == 1 and out.count(": it") == len(SECTIONS) - 3
    assert "elsewhere" not in out and "serve" not in out  # another machine's; needs a gallery
    assert "matching: failed: too little memory" in out


def test_cpu_time_is_of_one_thread(monkeypatch):
    monkeypatch.setattr(benchmark, "threads", lambda: 2)
    with pytest.raises(UserError, match="taskset"):
        main(["metrics", "--clock=cpu"])


@pytest.mark.slow  # compiles in processes of their own
def test_step_runs(capsys):
    config = ["--config.model.width=4", "--config.data.height=64", "--config.data.width=32", "--config.model.depth=10"]
    main(["step", "--batch=8", "--rounds=2", "--steps=1", "--dtype=float32", "--config.model.grid=(3,1)", *config])
    assert "step float32: JAX" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("--target h300", "expected a100, h100, h200"),
        ("--target v5e", "such as v5e:4x4"),
        ("--target h200:2x2", "such as v5e:4x4"),
        ("--target h200 --devices 0", "--devices: '0'"),
        ("--target h200 --batch 0", "--batch: '0'"),
        ("--target v5e:2x2 --devices 2", "the shape of v5e:2x2"),
    ],
)
def test_elsewhere_refuses_what_it_cannot_compile_for(arguments, named):
    with pytest.raises(UserError, match=named):
        main(["elsewhere", *arguments.split()])


@pytest.mark.parametrize(
    ("target", "library", "devices"),
    [
        ("h200 --devices 2", ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"), 2),
        ("v5e:2x2", ("libtpu",), 4),
    ],
)
def test_the_step_compiles_elsewhere(target, library, devices, tmp_path):
    """Runs where the library of '.[cuda]' or '.[tpu]' is installed; a GPU or a TPU is not needed."""
    if not any(installed(name) for name in library):
        pytest.skip(f"needs {' or '.join(library)}")
    file = tmp_path / "elsewhere.json"
    command = [sys.executable, "-m", "vpm_jax.benchmark", "elsewhere", "--target", *target.split()]
    command += ["--config", str(CONFIGS / "market.py:small"), "--json", str(file)]
    subprocess.run(command, check=True, timeout=600)
    found = json.loads(file.read_text())
    assert f"compiled for {devices} x {target.split(':')[0].split()[0]}." in found["lines"][0]
    (row,) = (row for row in found["rows"] if row["name"] == "memory of a device")
    assert 3 * 4 * 1_800_000 / 2**30 < row["value"] < row["limit"]  # parameters, momentum and gradients


def installed(name):
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def test_convolutions_are_those_of_the_step(capsys):
    tiny = [f"--config.{key}={value}" for key, value in SHRUNK.items() if key != "model.num_identities"]
    assert main(["convolutions", "--batch=4", "--seconds=0", *tiny]) == 0
    assert "by kernel" in capsys.readouterr().out


def test_convolutions_of_resnet_50_are_the_multiplications_torchvision_states():
    config = step.fixed(config_lib.default())
    config.data.update(height=224, width=224)
    config.model.update(last_stride=2)
    found = convolutions.distinct(config, 1)
    assert sum(found.values()) == 53 and sum(conv.is_stem for conv in found) == 1
    classifier = 2048 * 1000
    convs = sum(count * conv.flops for conv, count in found.items()) / 2
    assert round((convs + classifier) / 1e9, 2) == 4.09  # "GFLOPS" of ResNet50_Weights
