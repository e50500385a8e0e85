"""Weights from elsewhere: torchvision's and timm's ResNets, Keras's, the released VPM code's, and our own.

`load` takes what config.pretrained says and gives a `Pretrained`: the tensors by the names of `models/resnet.py`, all
of them checked, and what the network must be built with so that the same picture gives the same features.
"""

from __future__ import annotations

import os
from pathlib import Path

from vpm_jax.errors import UserError
from vpm_jax.pretrained import files, keras, own, released, torchvision
from vpm_jax.pretrained.weights import File, Network, Pretrained, apply_to

__all__ = ["KINDS", "Network", "Pretrained", "apply_to", "load"]

# What config.pretrained may begin with; a path alone is recognised by what it holds.
KINDS = {
    "keras": "Keras's ResNet-50, a folder with model.json or an .npz",
    "torchvision": "a state dict of torchvision's resnet18, 34, 50 or 101, .pth or .safetensors",
    "timm": "the same of timm's",
    "released": "a checkpoint of the VPM authors' released code",
    "vpm": "the workdir of a training run, or a file that vpm_jax.convert wrote",
}


def load(
    spec: str, data_root: str | os.PathLike = "", partial: bool = False, key: str = "config.pretrained"
) -> Pretrained:
    """The weights that `config.pretrained` names: KIND:PATH, or a PATH whose kind shows.

    "keras" alone looks under `data_root`, beside it, and in $VPM_DATA or ./data. Every tensor is matched; `partial`, or
    "partial:" in front, takes what fits, and `Pretrained.skipped` says what did not. "none" is the caller's to handle.
    Messages call the spec `key`.

    Raises:
      UserError: when a file is missing, damaged, unsafe, or not the weights of such a network.
    """
    kind, colon, name = spec.partition(":")
    if kind == "partial" and colon:
        return load(name, data_root, partial=True, key=key)
    if kind not in KINDS:
        kind, name = "", spec
        if not spec or not Path(spec).expanduser().exists():
            if ":" not in spec and ("/" in spec or Path(spec).suffix):
                raise UserError(f'{key} is "{spec}", but that file does not exist: check the path.')
            known = ", ".join(f'"{k}:PATH"' for k in KINDS)
            raise UserError(f'{key} is "{spec}": expected "none", "keras", {known}, or a path that exists.')
    elif not name and kind != "keras":
        raise UserError(f'{key} is "{spec}": expected "{kind}:PATH", {KINDS[kind]}.')
    path = Path(name).expanduser()
    if not name or (path.is_dir() and kind in ("", "keras") and not (path / "config.json").is_file()):
        return keras.read_folder(name, data_root, partial)
    if path.is_dir() and kind in ("", "vpm"):
        return own.read_workdir(path)
    if kind == "keras" and not path.is_file():
        return keras.read_folder(name, data_root, partial)  # says what to do
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f'{key} is "{spec}", but {path} {found}: expected {KINDS[kind or "torchvision"]}.')
    file = files.read(path)
    if own.is_ours(file):  # whatever it was called: its names are torchvision's, and the rest is in its metadata
        return own.read_file(file, partial)
    if kind == "vpm":
        raise UserError(f"{path} was not written by vpm_jax.convert: expected {KINDS[kind]}.")
    read = {
        "keras": keras.read_npz,
        "torchvision": torchvision.read,
        "timm": torchvision.read,
        "released": released.read,
    }[kind or recognise(file)]
    return read(file, partial)


def recognise(file: File) -> str:
    """The kind of a file, by its names. Raises UserError if they are nobody's."""
    if released.is_named_so(file.tensors):
        return "released"
    if torchvision.is_named_so(file.tensors):
        return "torchvision"
    if keras.is_named_so(file.tensors):
        return "keras"
    names = ", ".join(name[:60] for name in list(file.tensors)[:5]) or "no tensors"
    raise UserError(f"{file.path} holds weights of no known network ({names}): expected {'; '.join(KINDS.values())}.")
