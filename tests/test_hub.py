"""vpm_jax.hub: a model comes back as it left, by folder and by hub; a folder without one is refused in a sentence."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_hub
import numpy as np
import pytest
from disk import largest_file
from paths import ROOT
from raising import raises
from tiny import assert_equal
from tiny_runs import make_run

from vpm_jax import VPM, Gallery, pretrained
from vpm_jax import config as config_lib
from vpm_jax import hub as hub_lib
from vpm_jax.api import located

RANDOM = np.random.default_rng(4)
PICTURES = list(RANDOM.integers(0, 256, (3, 50, 30, 3), np.uint8))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that trained on real people, with results."""
    folder = tmp_path_factory.mktemp("hub") / "run"
    config, _ = make_run(folder)
    config.data.root, config.data.also_train = "/home/me/market", "dukemtmc:/home/me/duke"
    config.pretrained = "torchvision:/home/me/r18.pth"
    (folder / "config.json").write_text(config_lib.to_json(config))
    (folder / "evaluation.md").write_text("Recipe paper, seed 0.\n\n| gamma | R-1 |\n|---|---|\n| 1 | 12.3 |\n")
    (folder / "evaluation-partial_reid.md").write_text("On Partial-REID.\n")
    (folder / "evaluation.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def model(run):
    return VPM.load(run)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """The model as a folder; copy it to change it."""
    folder = tmp_path_factory.mktemp("saved") / "name"
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with fake_hub.serving() as server:
        use(server.address, tmp_path / "cache", monkeypatch)
        yield server


def use(address, cache, monkeypatch):
    """What HF_ENDPOINT, HF_HUB_CACHE and HF_TOKEN do when set before the package is imported."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="the extra hub")
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    values = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache)}
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_token")


# ---- A folder ----


def test_a_model_comes_back_as_it_left(model, saved, tmp_path):
    again = VPM.from_pretrained(saved)
    assert (again.fingerprint, again.source) == (model.fingerprint, model.source)
    assert_equal(again(PICTURES), model(PICTURES))
    again.save_pretrained(tmp_path / "b", name="name")
    first, second = (
        {x.name: x.read_bytes() for x in folder.iterdir() if x.suffix != ".safetensors"}  # its metadata have no order
        for folder in (saved, tmp_path / "b")
    )
    assert first == second
    assert VPM.load(saved / "model.safetensors").fingerprint == model.fingerprint


def test_the_card_says_what_the_model_is(model, saved):
    card = (saved / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: vpm_jax\n") and "license: other" in card
    for words in ("Market-1501 and DukeMTMC-reID", "r18.pth", model.fingerprint, "| 1 | 12.3 |", "On Partial-REID."):
        assert words in card
    assert "from the weights torchvision:r18.pth." in card
    assert card.index("| 1 | 12.3 |") < card.index("On Partial-REID.")
    for file in saved.iterdir():
        assert b"/home/me" not in file.read_bytes(), file.name


@pytest.mark.parametrize(
    ("crop", "whole", "gamma", "sentence"),
    [
        ("top", 0.0, (0.5, 1.1), "keep the top of an image, 0.5 to 1 of its area."),
        ("bilateral", 0.0, (0.4, 0.4), "keep the top or the bottom of an image, 0.4 of its area."),
        ("any", 0.0, (0.3, 0.6, 0.9), "keep any part of an image, 0.3 to 0.9 of its area."),
        ("none", 0.0, (0.5, 1.0), "keep the whole image."),
        ("top", 1.0, (0.5, 1.0), "keep the whole image."),
    ],
)
def test_the_card_says_what_training_showed(model, crop, whole, gamma, sentence):
    config = model.config.copy_and_resolve_references()
    config.data.crop, config.data.whole, config.data.gamma = crop, whole, gamma
    described = SimpleNamespace(config=config, image_size=model.image_size, source="a run", fingerprint="0")
    assert f"Training crops {sentence}" in hub_lib.card(described, "name", []).replace("\n", " ")


def test_rendered_people_are_nobodys_data(whole, tmp_path):
    VPM.load(whole).save_pretrained(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "license: apache-2.0" in card and "rendered pedestrians alone" in card
    assert (whole / "evaluation.md").read_text().strip() in card


def test_results_may_lie_elsewhere(model, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "evaluation.md").write_bytes(b"Other results. \xff")
    model.save_pretrained(tmp_path / "a", results=tmp_path / "elsewhere")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "Other results." in card and "12.3" not in card
    assert sorted(x.name for x in (tmp_path / "a").glob("evaluation*")) == ["evaluation.md"]
    with raises("no-results"):
        model.save_pretrained(tmp_path / "b", results=tmp_path / "elsewere")
    assert not (tmp_path / "b").exists()


def other_config(folder):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"soft"', '"uniform"'))


def other_weights(folder):
    from safetensors.numpy import save_file

    save_file({"a": np.zeros(3, np.float32)}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "change, code",
    [
        (lambda folder: (folder / "config.json").unlink(), "no-run"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no-run"),
        (other_config, "wrong-weights"),
        (other_weights, "wrong-weights"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"<html>not found</html>"), None),
    ],
)
def test_a_folder_without_a_model_is_refused(saved, tmp_path, change, code):
    shutil.copytree(saved, tmp_path / "a")
    change(tmp_path / "a")
    for load in VPM.from_pretrained, pretrained.load:
        with raises(code or "user-error"):
            load(str(tmp_path / "a"))


def test_nothing_is_overwritten_or_half_written(model, saved, tmp_path):
    with raises("bad-output"):
        model.save_pretrained(saved)
    with largest_file(2000), raises("not-written"):
        model.save_pretrained(tmp_path / "b")
    assert not list(tmp_path.iterdir())


# ---- A hub ----


def test_a_model_comes_back_from_a_hub(hub, model, saved, monkeypatch):
    assert model.push("user/name") == f"{hub.address}/user/name"
    assert hub.private == {"user/name": True}
    assert hub.repositories["user/name"].keys() == {x.name for x in saved.iterdir()}
    assert 'VPM.from_pretrained("hf://user/name")' in hub.repositories["user/name"]["README.md"].decode()
    assert VPM.from_pretrained("hf://user/name").fingerprint == model.fingerprint
    # A model that was loaded before loads without the hub, another one does not.
    monkeypatch.setattr(sys.modules["huggingface_hub"].constants, "HF_HUB_OFFLINE", True)
    assert VPM.from_pretrained("hf://user/name").fingerprint == model.fingerprint
    with raises("no-hub") as error:
        VPM.from_pretrained("hf://user/other")
    assert "cannot be reached and is not in the cache" in str(error.value)


def test_results_of_the_model_before_go(hub, model, tmp_path):
    model.push("user/name")
    model.push("user/name", results=tmp_path)
    assert hub.repositories["user/name"].keys() == {"README.md", "config.json", "model.safetensors"}


def test_a_search_takes_a_model_of_the_hub_and_its_thresholds(hub, model, tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "thresholds.json").write_text("{}")
    model.push("user/name", results=tmp_path / "results")
    address = Path("hf://user/name")  # as commands parse it
    gallery = Gallery.open(tmp_path / "store", address)
    assert gallery.model.fingerprint == model.fingerprint
    assert (located(address) / "thresholds.json").read_text() == "{}"
    model.push("user/name", results=tmp_path)
    assert "thresholds.json" not in hub.repositories["user/name"]


def test_what_a_hub_does_not_have(hub):
    hub.repositories["user/bare"] = {"model.safetensors": b"", "pytorch_model.bin": b""}
    for address, code, words in [
        ("hf://user/other", "no-hub", "does not exist or is private"),
        ("hf://user/bare", "no-model", "has no config.json"),
        ("hf://user/bare@v2", "no-hub", "no such revision"),
        ("hf://user", "bad-address", "expected hf://user/name"),
    ]:
        with raises(code) as error:
            VPM.from_pretrained(address)
        assert words in str(error.value) and address in str(error.value)


def test_an_unreachable_hub_is_named(model, tmp_path, monkeypatch):
    use("http://127.0.0.1:9", tmp_path, monkeypatch)
    for call in (lambda: VPM.from_pretrained("hf://user/name"), lambda: model.push("user/name")):
        with raises("no-hub") as error:
            call()
        assert "hf://user/name cannot be reached" in str(error.value)
    with raises("bad-address"):
        model.push("name")


def test_without_the_package_it_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with raises("missing-package"):
        VPM.from_pretrained("hf://user/name")


# ---- PyTorch ----


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__depth": 50, "model__stem": "3x3", "model__stride_on": "1x1", "model__last_stride": 2},
        {"model__stem": "4x4", "model__strides": (1, 2, 1), "model__grid": (2, 2), "model__bn_epsilon": 1e-3},
        {"data__fit": "pad", "data__aspect": 2.5, "model__last_stride": 1},
    ],
)
def test_the_module_of_the_docs_computes_the_same(tmp_path, changes):
    torch = pytest.importorskip("torch")
    [code] = re.findall(r"^import ast\n.*?(?=^# The same in JAX)", (ROOT / "docs/sharing.md").read_text(), re.M | re.S)
    names: dict = {"__name__": "example"}
    exec(code, names)
    make_run(tmp_path / "run", **changes)
    model = VPM.load(tmp_path / "run")
    model.save_pretrained(tmp_path / "a")
    with torch.inference_mode():
        inputs = map(torch.from_numpy, model.inputs(PICTURES))
        features, visibility = names["TorchVPM"](tmp_path / "a" / "model.safetensors").eval()(*inputs)
    described = model(PICTURES)
    np.testing.assert_allclose(features, described.features, atol=1e-4)
    np.testing.assert_allclose(visibility, described.visibility, rtol=1e-4)
