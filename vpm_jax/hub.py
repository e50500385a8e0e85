"""Models for others: a folder with weights, config and a model card, on this machine or on the Hugging Face Hub.

    model = VPM.load("runs/market")
    model.save_pretrained("market")
    model.push("user/market")
    model = VPM.from_pretrained("hf://user/market")

The folder holds model.safetensors, config.json, README.md (the card), evaluation*.md and .json, and thresholds.json.
The Hub needs the package huggingface_hub (the extra "hub").
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from vpm_jax import __version__, captions, paper
from vpm_jax import config as config_lib
from vpm_jax.data.datasets import DATASETS
from vpm_jax.disk import disk_trouble, make_folder, write_atomically, writing
from vpm_jax.errors import UserError, first_line, optional
from vpm_jax.pretrained import own

if TYPE_CHECKING:
    from vpm_jax.api import VPM

SCHEME = "hf://"
_THRESHOLDS = "thresholds.json"  # search --false-match-rate reads it beside the model
_RESULTS = ("evaluation*.md", "evaluation*.json", _THRESHOLDS)
_ADDRESS = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@(.+))?")


# ---- A folder ----


def save(model: VPM, folder: Path, name: str, results: Path | None) -> None:
    """Writes a model as a new folder, see `VPM.save_pretrained`.

    Args:
      model: the model, not an exported program.
      folder: a name that does not exist, or an empty folder.
      name: the model's name in its card.
      results: a folder whose evaluation*.md and .json and thresholds.json are included.

    Raises:
      UserError: if the folder is in use or cannot be written, or if the weights do not read back the same. Nothing is
        written then.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already: choose a new folder.", code="bad-output")
    config = own.without_paths(model.config)
    files = [] if results is None else [file for pattern in _RESULTS for file in results.glob(pattern)]
    files.sort(key=lambda file: (file.stem != "evaluation", file.name))  # the run's own first
    weights = own.whole(config, model.trained_variables, model.source)

    def check(file: Path) -> None:
        if type(model).load(file).fingerprint != model.fingerprint:
            raise UserError(f"{model.source} is not the same after writing: please report this.", code="wrong-export")

    make_folder(folder.parent)
    with writing(folder), tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        new = Path(temporary) / "model"
        new.mkdir()
        own.write_safetensors(new / own.SAVED, weights, check=check, fingerprint=model.fingerprint)
        write_atomically(new / own.CONFIG, config_lib.to_json(config) + "\n")
        for file in files:
            shutil.copyfile(file, new / file.name)
        evaluations = [file.read_text("utf-8", "replace") for file in files if file.suffix == ".md"]
        write_atomically(new / "README.md", card(model, name, evaluations))
        os.replace(new, folder)


def card(model: VPM, name: str, evaluations: list[str]) -> str:
    """The model card, Markdown with the Hub's metadata: use, training data, results, limits, license and privacy.

    Args:
      model: the model.
      name: its name.
      evaluations: texts of evaluation.md and others.
    """
    config, (height, width) = own.without_paths(model.config), model.image_size
    free = _only_synthetic(config)
    license_ = ["license: apache-2.0"] if free else ["license: other", "license_name: terms-of-the-training-data"]
    tags = ["tags:", *(f"- {tag}" for tag in ("person-re-identification", "partial-person-re-identification", "jax"))]
    metadata = ["---", "library_name: vpm_jax", *tags, *license_, "---"]
    m, data = config.model, config.data
    low, high = min(data.gamma), min(1, max(data.gamma))
    share = f"{low:g}" if low == high else f"{low:g} to {high:g}"
    kept = "; or ".join(captions.kept(crop, share) for crop in sorted(config_lib.crops(config) or {"none"}))
    known = {"none": "random weights", "keras": "Keras's ImageNet weights"}
    start = known.get(config.pretrained, f"the weights {config.pretrained}")
    title = paper.title(paper.method_of(config))
    results = "\n\n".join(evaluations).strip() or "No evaluation came with this model."
    return "\n".join(
        [
            *metadata,
            f"# {name}",
            "",
            f"A model of vpm_jax {__version__} for partial person re-identification ({title}): {model.source}. "
            f"Fingerprint `{model.fingerprint}`.",
            "",
            "```python",
            "from vpm_jax import VPM",
            "",
            f'model = VPM.from_pretrained("{name}")',
            'distance = model.match("partial.jpg", ["a.jpg", "b.jpg"])  # smaller is more similar',
            "```",
            "",
            "## Model",
            "",
            f"ResNet-{m.depth} of width {m.width}, {height} x {width} pixels (RGB), {m.grid[0]} x {m.grid[1]} regions, "
            f"{m.locator} locator. `model.safetensors` holds the backbone under torchvision's names, the locator and "
            "the heads; `config.json` holds every setting of the run.",
            "",
            "## Training",
            "",
            f"Recipe {config.recipe}, seed {config.seed}, on {captions.training_set(config)}, from {start}. Training "
            f"crops keep {kept}.",
            "",
            "## Results",
            "",
            results,
            "",
            "## Limits",
            "",
            f"- Distances are meaningful for images like those of {captions.training_set(config)}: other cameras and "
            "other boxes need their own evaluation, and their own threshold (`python -m vpm_jax.threshold`).",
            "- Images that show less of a person, or another part, than the training crops rank worse.",
            "- A small distance is not a proof of identity: people in similar clothes look alike to the model, and the "
            "same person in other clothes does not.",
            "",
            "## Data, license and privacy",
            "",
            *_data(config),
            "",
            "The model recognizes people by their appearance. Its vectors of real people are personal data: describe "
            "and search only images that you may process, and keep vectors as safe as the images.",
            "",
        ]
    )


def _only_synthetic(config: ConfigDict) -> bool:
    return (config.data.name, config.data.also_train, config.pretrained) == ("synthetic", "", "none")


def _data(config: ConfigDict) -> list[str]:
    """Sentences about each training set."""
    if _only_synthetic(config):
        return ["The weights come from rendered pedestrians alone, not from real people. Apache-2.0, as vpm_jax."]
    lines = []
    for name in captions.training_names(config):
        entry = DATASETS[name]
        source = f" ({entry.paper})" if entry.paper else ""
        lines.append(f"- {entry.title}{source}: not included.")
    terms = "The terms of the training data apply to the weights too; most permit research only. Check them before use."
    return [terms, "", *lines]


# ---- The Hub ----


def fetch(address: str) -> Path:
    """The folder of hf://user/name or hf://user/name@revision, downloaded into the cache of huggingface_hub.

    Raises:
      UserError: if it is missing, private, unreachable and not in the cache, or holds no model of vpm_jax.
    """
    match = _ADDRESS.fullmatch(address)
    if match is None:
        raise UserError(f"{address} is not a model's address: expected hf://user/name.", code="bad-address")
    name, revision = match.groups()
    hub = _package()
    with _reaching(address):
        folder = Path(
            hub.snapshot_download(name, revision=revision, allow_patterns=[own.SAVED, own.CONFIG, _THRESHOLDS])
        )
    missing = [file for file in (own.CONFIG, own.SAVED) if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{address} has no {' and no '.join(missing)}: expected a model that VPM.push wrote.", code="no-model"
        )
    return folder


def push(model: VPM, name: str, private: bool, results: Path | None) -> str:
    """Uploads a model, see `VPM.push`; returns its page's address."""
    match = _ADDRESS.fullmatch(f"{SCHEME}{name.removeprefix(SCHEME)}")
    if match is None or match[2]:
        raise UserError(f"{name} is not a model's name: expected user/name.", code="bad-address")
    hub, address = _package(), f"{SCHEME}{match[1]}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        save(model, folder, address, results)
        with _reaching(address):
            api = hub.HfApi()
            page = api.create_repo(match[1], private=private, exist_ok=True)
            message = f"{model.source}, fingerprint {model.fingerprint}"
            # Results of a model that was here before would be taken for this one's.
            api.upload_folder(
                repo_id=match[1], folder_path=folder, commit_message=message, delete_patterns=list(_RESULTS)
            )
    return str(page)


def _package() -> Any:
    with optional("The Hugging Face Hub", "huggingface_hub"):
        import huggingface_hub
    return huggingface_hub


@contextlib.contextmanager
def _reaching(address: str) -> Iterator[None]:
    """Turns the errors of huggingface_hub, which are of many types, into UserErrors."""
    from huggingface_hub import errors

    try:
        yield
    except UserError:
        raise
    except errors.RepositoryNotFoundError:
        problem = "does not exist or is private: check the name, and log in with `hf auth login`"
    except errors.RevisionNotFoundError:
        problem = "has no such revision: check what follows the @"
    except Exception as error:
        reason = disk_trouble(error) or first_line(error)
        problem = f"failed ({reason}): try again, or save the model with VPM.save_pretrained and copy the folder"
        if isinstance(error, errors.LocalEntryNotFoundError) or re.search(
            "Connect|Timeout|Offline", type(error).__name__
        ):
            problem = "cannot be reached and is not in the cache: check the connection, HF_ENDPOINT and HF_HUB_OFFLINE"
    else:
        return
    raise UserError(f"{address} {problem}.", code="no-hub")
