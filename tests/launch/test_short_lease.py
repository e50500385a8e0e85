"""launch/short_lease, rehearsed on the CPU: a tiny network on a few synthetic pedestrians, from packing to results."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
from paths import ROOT
from tiny_runs import KEYS, saved_steps

from vpm_jax import cli
from vpm_jax import config as config_lib
from vpm_jax.data import synthetic
from vpm_jax.data.inventory import digest_of_test_set
from vpm_jax.data.sources import load_dataset
from vpm_jax.errors import UserError
from vpm_jax.pretrained import own
from vpm_jax.pretrained.weights import Network, Pretrained, nested
from vpm_jax.reproduce import experiments, results

SCRIPTS = ROOT / "launch" / "short_lease"
RECIPE = KEYS | {
    "pretrained": "keras",
    "model.stem": "3x3",
    "stage1.epochs": 0,
    "stage1.steps_per_epoch": 0,
    "stage2.epochs": 2,
    "eval.every": 0,
    "data.name": "market1501",
}


@pytest.fixture(scope="module")
def module_path():
    """Makes the scripts importable."""
    sys.path.insert(0, str(SCRIPTS))
    yield
    sys.path.remove(str(SCRIPTS))
    for script in SCRIPTS.glob("*.py"):
        sys.modules.pop(script.stem, None)


def load(name: str) -> ModuleType:
    sys.modules.pop(name, None)  # device.py reads its environment when it is imported
    return importlib.import_module(name)


def make_checkout(folder: Path) -> Path:
    """A git checkout of the package and one tiny recipe."""
    (folder / "configs").mkdir(parents=True)
    (folder / "vpm_jax").symlink_to(ROOT / "vpm_jax")
    (folder / ".gitignore").write_text("/.gpu1/\n/.gpu2/\n")
    keys = "\n".join(f"    set_key(config, {key!r}, {value!r})" for key, value in RECIPE.items())
    (folder / "configs" / "tiny.py").write_text(
        f"from vpm_jax.config import set_key, small\n\ndef get_config():\n    config = small()\n{keys}\n"
        "    return config\n"
    )
    subprocess.run(["git", "init", "--quiet", str(folder)], check=True)
    return folder


def make_data(folder: Path, pedestrians: Path) -> Path:
    """Market-1501 as it would be with a dozen synthetic people, and weights of a tiny ResNet."""
    small = synthetic.ensure(pedestrians, 0, 8, 4, 2, 2)
    shutil.copytree(small, folder / "Market-1501-v15.09.15")
    own.write_npz(folder / "tiny.npz", tiny_weights())
    (folder / "wheels").mkdir()
    return folder


def tiny_weights() -> Pretrained:
    network, random = Network(10, 4, "3x3", (1, 2, 2)), np.random.default_rng(0)
    flat = {name: random.uniform(0.1, 0.3, shape).astype(np.float32) for name, shape in network.shapes().items()}
    return Pretrained(
        **nested(flat),
        stride_on="3x3",
        bn_epsilon=1e-3,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        source="made up",
        network=network,
    )


class Machine:
    """The leased machine: its home, the folder $OUT, and the commands of README.md."""

    first: dict  # the first command's summary

    def __init__(self, folder: Path, checkout: Path):
        self.home, self.out, self.checkout = folder / "home", folder / "out", checkout
        for path in (self.home, folder / "fast"):
            path.mkdir(parents=True)
        self.environment = {
            "HOME": str(self.home),
            "OUT": str(self.out),
            "TMPDIR": str(folder / "fast"),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "",
            "PYTHONPATH": "",
            "VPM_CONFIG": "configs/tiny.py",
            "VPM_EXTRA": "--config.eval.batch=16",
        }

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        command = command.replace("python3", sys.executable)
        env = os.environ | self.environment
        return subprocess.run(
            ["bash", "-c", command], cwd=self.checkout, env=env, capture_output=True, text=True, timeout=900
        )

    def empty_out(self) -> None:
        """As before every command."""
        shutil.rmtree(self.out, ignore_errors=True)

    def summary(self) -> dict:
        assert not (self.out / "unfinished").exists()
        return json.loads((self.out / "summary.json").read_text())

    def returned(self) -> list[str]:
        """The files in results.tar.gz."""
        with tarfile.open(self.out / "results.tar.gz") as tar:
            return tar.getnames()


@pytest.fixture(scope="module")
def rehearsal(module_path, pedestrians, tmp_path_factory):
    """Packs, and runs both commands; yields the machine."""
    folder = tmp_path_factory.mktemp("lease")
    checkout, data = make_checkout(folder / "checkout"), make_data(folder / "data", pedestrians)
    arguments = ["--repo", checkout, "--data", data, "--weights", data / "tiny.npz", "--wheels", data / "wheels"]
    assert load("pack").main(list(map(str, arguments))) == 0
    machine = Machine(folder, checkout)
    first = machine.run("python3 .gpu1/device.py first 900 --rehearse")
    assert first.returncode == 0, first.stdout + first.stderr
    machine.first = machine.summary()
    machine.empty_out()
    shutil.rmtree(checkout / ".gpu1")  # each command carries its own folder
    beside = 'echo "$VPM_COMMIT" > "$VPM_LEASE/beside/commit"; ls "$VPM_DATA"/Market* > "$VPM_LEASE/beside/data"'
    second = machine.run(f"""VPM_BESIDE='{beside}' python3 "$HOME/vpm-gpu/device.py" second 900 --rehearse""")
    assert second.returncode == 0, second.stdout + second.stderr
    return machine


def test_both_commands_leave_everything(rehearsal):
    assert rehearsal.first["code"] == 0
    assert rehearsal.first["step-0"]["images_per_second"] > 0
    summary, returned = rehearsal.summary(), rehearsal.returned()
    assert summary["code"] == summary["train"]["code"] == summary["export"] == 0
    assert summary["train"]["told"] == "" and summary["plan"]["overrides"] == []
    assert summary["images"] == 50
    assert set(summary["results"]) == {"0.5", "1.0"}
    assert {path.name for path in rehearsal.out.iterdir()} == {"summary.json", "results.tar.gz", *summary["weights"]}
    logs = {f"logs/{name}.txt" for name in ("check", "step-0", "plan", "train", "export")}
    files = {
        f"run/{name}" for name in ("config.json", "metrics.jsonl", "evaluation.json", "evaluation.md", "gamma.png")
    }
    facts = {f"facts/{name}" for name in ("packed.json", "step.json", "step-0.hlo.gz", "plan.json", "trained.json")}
    assert logs | files | facts | {"beside/commit", "beside/data"} <= set(returned)
    assert summary["beside"] == 0
    assert not any("checkpoints" in name for name in returned)


def test_what_came_back_is_a_workdir_and_a_result(rehearsal, tmp_path, monkeypatch):
    join = load("join")
    monkeypatch.chdir(rehearsal.checkout)
    monkeypatch.setitem(experiments.SCALES, "tiny", experiments.Scale({"": "configs/tiny.py"}))
    workdir, folder = tmp_path / "run", tmp_path / "results"
    assert join.main([str(rehearsal.out), str(workdir), "--results", str(folder)]) == 0
    assert saved_steps(workdir) == [8]
    assert (workdir / "lease" / "beside" / "data").exists()
    assert (workdir / "evaluation.json").exists() and (workdir / "lease" / "facts" / "step.json").exists()
    assert config_lib.read(workdir).data.root == ""  # nothing of the machine
    trained, back = own.read_folder(rehearsal.home / "vpm-gpu" / "run"), own.read_folder(workdir)
    for a, b in zip(jax.tree.leaves(trained.heads), jax.tree.leaves(back.heads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6)
    for name, x in trained.flat().items():
        np.testing.assert_allclose(x, back.flat()[name], rtol=1e-3, atol=1e-6, err_msg=name)

    run = experiments.make_run("market1501", "tiny", "vpm")
    result = results.read(folder, run)
    assert result["images"] == 64 and result["seconds"] > 0 and result["steps"] == 8
    assert set(result["gammas"]) == {"0.5", "1.0"}
    assert result["resolved"]["pretrained"] == "imagenet.npz" and result["resolved"]["model.num_identities"] == 8
    assert result["commit"] == json.loads((workdir / "lease" / "facts" / "packed.json").read_text())["commit"]
    assert len(results.finished(folder)) == 1
    before = experiments.fingerprint(config_lib.read(rehearsal.home / "vpm-gpu" / "run"))
    assert experiments.fingerprint(config_lib.read(workdir)) == before  # so reproduce evaluates it on other data

    config = config_lib.read(rehearsal.home / "vpm-gpu" / "run")
    with pytest.raises(UserError, match="not --method pcb: its "):
        join.find_run(config, "configs/tiny.py", "pcb", "")
    config.stage2.epochs = 1  # as where time was short
    with pytest.raises(UserError, match="--variant NAME"):
        join.find_run(config, "configs/tiny.py", "vpm", "")
    assert join.find_run(config, "configs/tiny.py", "vpm", "short").name == "market1501-tiny-vpm-short-seed0"
    with pytest.raises(UserError, match=r"other.py belongs to no scale"):
        join.find_run(config, "configs/other.py", "vpm", "")


def test_training_that_the_clock_stops_is_saved_evaluated_and_exported(rehearsal, tmp_path, monkeypatch):
    workdir = rehearsal.home / "vpm-gpu" / "run"
    extra = rehearsal.environment["VPM_EXTRA"] + " --config.stage2.epochs=1000 --config.checkpoint_seconds=3600"
    out = tmp_path / "out"
    for key, value in (rehearsal.environment | {"VPM_EXTRA": extra, "OUT": str(out)}).items():
        monkeypatch.setenv(key, value)
    monkeypatch.chdir(rehearsal.checkout)
    device = load("device")

    def clock() -> float:
        """Time is up once training has begun, and there is all of it again once it has saved."""
        begun = (workdir / "metrics.jsonl").exists() and (workdir / "metrics.jsonl").stat().st_size
        return 5000.0 - 20 if begun and not any(workdir.glob("checkpoints/*/_CHECKPOINT_METADATA")) else 0.0

    shutil.rmtree(workdir)
    lease = device.Lease("second", 5000, rehearse=True, clock=clock)
    assert device.second(lease) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["train"]["code"] == 143 and summary["train"]["told"] == "SIGTERM with 20 s left"
    assert summary["evaluate"]["code"] == summary["export"] == 0
    assert set(summary["results"]) == {"0.5", "1.0"}
    assert {path.name for path in out.iterdir()} == {"summary.json", "results.tar.gz", *summary["weights"]}

    with tarfile.open(out / "results.tar.gz") as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    with pytest.raises(UserError, match=r"stopped after step \d+ of 4000"):
        load("join").convert(tmp_path / "unpacked", "vpm", "")


def test_a_fresh_machine_says_what_to_do(rehearsal, tmp_path):
    fresh = Machine(tmp_path, rehearsal.checkout)
    (fresh.home / "vpm-gpu").mkdir()
    shutil.copy(SCRIPTS / "device.py", fresh.home / "vpm-gpu")
    command = 'python3 "$HOME/vpm-gpu/device.py" second 300'
    assert fresh.run(command).returncode == 1
    assert "run `first` on it (carry .gpu1)" in fresh.summary()["failed"]
    (fresh.home / "vpm-gpu" / "facts" / "step.json").write_text('{"flags": ""}')
    shutil.move(rehearsal.checkout / ".gpu2", tmp_path)
    assert fresh.run(command).returncode == 1
    assert "carry .gpu2" in fresh.summary()["failed"]
    shutil.move(tmp_path / ".gpu2", rehearsal.checkout)
    del fresh.environment["OUT"]
    unset = fresh.run(f"unset OUT; {command}")
    assert unset.returncode == 1 and "Set OUT to the folder" in unset.stderr


def test_pack_refuses_missing_data_and_too_large_a_folder(module_path, tmp_path, pedestrians, capsys):
    pack = load("pack")
    checkout, data = make_checkout(tmp_path / "checkout"), make_data(tmp_path / "data", pedestrians)
    arguments = ["--repo", str(checkout), "--data", str(data), "--wheels", str(data / "wheels"), "--weights"]
    assert pack.main([*arguments, "none"]) == 0
    assert not (checkout / ".gpu1" / "imagenet.npz").exists()
    assert "of 64 MiB" in capsys.readouterr().out
    (checkout / "large").write_bytes(bytes(2**20))
    with pytest.raises(UserError, match=r"\.gpu1: .* of 1 MiB: too much"):
        pack.main([*arguments, "none", "--limit", "1"])
    with pytest.raises(UserError, match=r"missing\.npz"):
        pack.main([*arguments, str(data / "missing.npz")])
    shutil.rmtree(data / "Market-1501-v15.09.15" / "query")
    with pytest.raises(UserError, match="has no images in query: give --data"):
        pack.main([*arguments, "none"])


def test_packed_images_keep_their_bytes_but_junk(rehearsal, pedestrians):
    source = synthetic.ensure(pedestrians, 0, 8, 4, 2, 2)
    unpacked = rehearsal.home.parent / "fast" / "vpm-data" / "Market-1501-v15.09.15"
    files = [path.relative_to(source) for path in sorted(source.rglob("*.jpg"))]
    assert any(path.name.startswith("-1") for path in files)
    kept = load("pack").recognized(rehearsal.home.parent / "data")
    for path in files:
        expected = b"" if path.name.startswith("-1") and str(path) not in kept else (source / path).read_bytes()
        assert (unpacked / path).read_bytes() == expected


def test_packed_images_are_recognized_as_the_same_test_set(module_path, tmp_path):
    pack = load("pack")
    source = tmp_path / "data" / pack.DATASET
    for split in pack.SPLITS.values():
        (source / split).mkdir(parents=True)
        for number in range(40):
            junk = split == "bounding_box_test" and number < 30
            name = f"-1_c1s1_{number:06}_00.jpg" if junk else f"{number // 2:04}_c{number % 2 + 1}s1_{number:06}_00.jpg"
            (source / split / name).write_bytes(f"{split} {number}".encode())
    images = pack.find_images(source)
    folder = pack.empty(tmp_path / ".gpu2")
    pack.pack_images(folder, images, pack.recognized(tmp_path / "data"))
    with tarfile.open(folder / "images.tar.xz") as tar:
        tar.extractall(tmp_path / "there", filter="data")
    empty = [path for path in (tmp_path / "there").rglob("*.jpg") if not path.stat().st_size]
    assert 0 < len(empty) < 30
    digests = []
    for root in (source, tmp_path / "there" / pack.DATASET):
        data = config_lib.default().data.copy_and_resolve_references()
        data.name, data.root = "market1501", str(root)
        dataset = load_dataset(data)
        digests.append(digest_of_test_set(dataset.query, dataset.gallery))
    assert digests[0] == digests[1]


def test_large_arrays_travel_as_float16(module_path):
    halved = load("export").halved
    kernel, scale = np.full((3, 3, 64, 64), 1 / 3, np.float32), np.full(64, 1 / 3, np.float32)
    given = tiny_weights()
    params = {"conv_stem": {"kernel": kernel}, "bn_stem": {"scale": scale}}
    small = halved(replace(given, params=params, classifier={"kernel": kernel, "bias": scale}))
    assert small.classifier is None
    np.testing.assert_array_equal(small.params["bn_stem"]["scale"], scale, strict=True)
    np.testing.assert_array_equal(small.params["conv_stem"]["kernel"], kernel.astype(np.float16), strict=True)
    with pytest.raises(ValueError, match="made up does not fit"):
        halved(replace(given, params={"conv_stem": {"kernel": kernel * 1e6}}))


def test_a_plan_shortens_every_stage_by_the_same_share(module_path):
    plan = load("plan").plan
    counts = {"train": 12936, "identities": 751, "query": 3368, "gallery": 15913}
    released = cli.load_config(str(ROOT / "configs" / "market_released.py"))
    whole = plan(released, counts, rate=5000, compiling=60, measured=True, seconds=600)
    assert whole["overrides"] == [] and whole["images"] == whole["of"] == 130 * 93 * 64
    assert 80 < whole["reserve"] < 90
    half = plan(released, counts, rate=1000, compiling=60, measured=True, seconds=600)
    assert half["images"] == pytest.approx((600 - 30 - half["reserve"]) * 1000, rel=0.02)
    config = cli.load_config(str(ROOT / "configs" / "market_released.py"), half["overrides"])
    assert config.stage2.epochs < 130 and config.stage2.decay_epochs == (round(80 * config.stage2.epochs / 130),)
    late = plan(released, counts, rate=1000, compiling=60, measured=False, seconds=10)
    assert late["images"] == 93 * 64  # an epoch, whatever the time

    paper = cli.load_config(str(ROOT / "configs" / "market.py"))
    short = plan(paper, counts, rate=2000, compiling=60, measured=True, seconds=600)
    config = cli.load_config(str(ROOT / "configs" / "market.py"), short["overrides"])
    assert 0 < config.stage1.epochs < 50 and 0 < config.stage2.epochs < 80
    assert config.stage1.epochs / 50 == pytest.approx(config.stage2.epochs / 80, abs=0.03)


def test_the_page_names_every_script():
    page = (SCRIPTS / "README.md").read_text()
    assert all(f"`{path.name}`" in page for path in SCRIPTS.glob("*.py"))
    assert "python3 .gpu1/device.py first" in page and 'python3 "$HOME/vpm-gpu/device.py" second' in page
