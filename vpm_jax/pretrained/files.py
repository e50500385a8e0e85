"""Reads the tensors of a .pth, .safetensors or .npz file; the format is detected from its first bytes."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import numpy as np

from vpm_jax.errors import UserError, first_line
from vpm_jax.pretrained import torchfile
from vpm_jax.pretrained.weights import File

# The prefixes of DataParallel and torch.compile.
WRAPPERS = ("module.", "_orig_mod.")


def read(path: Path) -> File:
    """The tensors of the file, in their own dtypes, and its metadata. Pickles are never executed.

    Raises:
      UserError: if the file is missing, damaged, or of an unknown format.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(24)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): give a file of weights.") from None
    if start.startswith(b"\x89HDF"):
        raise UserError(f"{path} is an HDF5 file: save its weights as .npz (see vpm_jax/pretrained/keras.py).")
    if start.startswith(b"version https://g"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: fetch it (git lfs pull).")
    if start.startswith(b"PK") and _is_npz(path):
        return _read_npz(path)
    if start[8:9] == b"{":
        return _read_safetensors(path)
    return File(path, _unwrap(torchfile.read(path)), {})


def _unwrap(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    for wrapper in WRAPPERS * 2:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): x for name, x in tensors.items()}
    return tensors


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            return all(name.endswith(".npy") for name in archive.namelist())
    except Exception:  # damaged: the reader reports how
        return path.suffix == ".npz"


def _read_npz(path: Path) -> File:
    try:
        # np.load leaves a damaged file open.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            tensors = {name: archive[name] for name in archive.files}
        metadata = json.loads(str(tensors.pop("metadata"))) if "metadata" in tensors else {}
        return File(path, tensors, {str(key): str(value) for key, value in metadata.items()})
    except Exception as error:  # damaged bytes raise many types in zipfile and NumPy
        raise UserError(
            f"{path} is damaged, or holds more than arrays ({first_line(error)}): fetch or write it again."
        ) from None


def _read_safetensors(path: Path) -> File:
    from safetensors import safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            metadata = file.metadata() or {}
    except Exception as error:
        raise UserError(f"{path} is damaged or truncated ({first_line(error)}): fetch or save it again.") from None
    return File(path, _unwrap(tensors), metadata)
