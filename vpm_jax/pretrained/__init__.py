"""Pretrained weights: torchvision's and timm's ResNets, Keras's, the released VPM code's, and our own.

`load` resolves config.pretrained to a `Pretrained`: checked tensors under the names of `models/resnet.py`, and the
settings that the network needs to reproduce the original features.
"""

from __future__ import annotations

import os
from pathlib import Path

from vpm_jax.errors import UserError
from vpm_jax.pretrained import files, keras, own, released, torchvision
from vpm_jax.pretrained.weights import File, Network, Pretrained, apply_to

__all__ = ["KINDS", "Network", "Pretrained", "apply_to", "load"]

# The prefixes of config.pretrained; without one, the kind is detected from the file.
KINDS = {
    "keras": "Keras's ResNet-50, a folder with model.json or an .npz",
    "torchvision": "a state dict of torchvision's resnet18, 34, 50 or 101, .pth or .safetensors",
    "timm": "a state dict of timm's resnet18, 34, 50 or 101",
    "released": "a checkpoint of the VPM authors' released code",
    "vpm": "the workdir of a training run, or a file that vpm_jax.convert wrote",
}


def load(
    spec: str, data_root: str | os.PathLike = "", partial: bool = False, key: str = "config.pretrained"
) -> Pretrained:
    """Loads the weights of `config.pretrained`: KIND:PATH, or a PATH whose kind is detected.

    "keras" alone searches `data_root`, its parent, and $VPM_DATA or ./data. All tensors must match, unless `partial` is
    set or the spec starts with "partial:": `Pretrained.skipped` then lists the differences. The caller handles "none".
    Error messages call the spec `key`.

    Raises:
      UserError: if a file is missing, damaged, unsafe, or holds weights of another network.
    """
    kind, colon, name = spec.partition(":")
    if kind == "partial" and colon:
        return load(name, data_root, partial=True, key=key)
    if kind not in KINDS:
        kind, name = "", spec
        if not spec or not os.path.exists(os.path.expanduser(spec)):
            if ":" not in spec and ("/" in spec or Path(spec).suffix):
                raise UserError(f'{key} is "{spec}", but that file does not exist: check the path.')
            known = ", ".join(f'"{k}:PATH"' for k in KINDS)
            raise UserError(f'{key} is "{spec}": expected "none", "keras", {known}, or a path that exists.')
    elif not name and kind != "keras":
        raise UserError(f'{key} is "{spec}": expected "{kind}:PATH", {KINDS[kind]}.')
    path = Path(os.path.expanduser(name))
    ours = any((path / file).is_file() for file in (own.CONFIG, own.SAVED))
    if (kind == "keras" and not path.is_file()) or (not kind and path.is_dir() and not ours):
        return keras.read_folder(name, data_root, partial)
    if path.is_dir() and kind in ("", "vpm"):
        return own.read_folder(path)
    if not path.is_file():
        problem = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f'{key} is "{spec}", but {path} {problem}: expected {KINDS[kind or "torchvision"]}.')
    file = files.read(path)
    if own.is_ours(file):  # before `kind`: the tensors have torchvision's names, but the metadata matter
        return own.read_file(file, partial)
    if kind == "vpm":
        raise UserError(f"{path} was not written by vpm_jax.convert: expected {KINDS[kind]}.")
    read = {
        "keras": keras.read_npz,
        "torchvision": torchvision.read,
        "timm": torchvision.read,
        "released": released.read,
    }[kind or detect(file)]
    return read(file, partial)


def detect(file: File) -> str:
    """The kind of a file, from its tensors' names. Raises UserError if they are unknown."""
    for kind, module in (("released", released), ("torchvision", torchvision), ("keras", keras)):
        if module.has_its_names(file.tensors):
            return kind
    names = ", ".join(name[:60] for name in list(file.tensors)[:5]) or "no tensors"
    raise UserError(f"{file.path} holds weights of an unknown network ({names}): expected {'; '.join(KINDS.values())}.")
