"""Exports the trained model in float16, in files small enough to carry: python export.py WORKDIR OUT FACTS.json

The parts make up a .safetensors file as `vpm_jax.convert` writes it; join.py joins them.
"""

import dataclasses
import json
import os
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from vpm_jax import parallel
from vpm_jax.pretrained import own
from vpm_jax.pretrained.weights import Pretrained
from vpm_jax.runs.checkpoints import Checkpoints

PART = 15 * 2**20  # bytes of a file
SMALL = 4096  # numbers of an array that stays in float32: biases, batch norms


def halved(weights: Pretrained) -> Pretrained:
    """The weights without an ImageNet classifier, large arrays in float16. Raises ValueError if one does not fit."""

    def half(x: np.ndarray) -> np.ndarray:
        if x.size <= SMALL:
            return x
        with np.errstate(over="ignore"):
            halves = np.asarray(x).astype(np.float16)
        if not np.isfinite(halves).all():
            raise ValueError(f"a weight of {weights.source} does not fit into float16")
        return halves

    trees = {name: jax.tree.map(half, getattr(weights, name)) for name in ("params", "batch_stats", "heads")}
    return dataclasses.replace(weights, classifier=None, **trees)


def main() -> None:
    parallel.prepare_backend()
    workdir, out, facts = map(Path, sys.argv[1:])
    model = own.read_folder(workdir)
    with tempfile.TemporaryDirectory() as folder:
        own.write_safetensors(Path(folder) / "weights.safetensors", halved(model))
        data = (Path(folder) / "weights.safetensors").read_bytes()
    parts = [data[start : start + PART] for start in range(0, len(data), PART)]
    for number, part in enumerate(parts):
        (out / "unfinished").write_bytes(part)
        os.replace(out / "unfinished", out / f"weights.safetensors.{number}")
    with Checkpoints(workdir, keep=0) as checkpoints:
        facts.write_text(json.dumps({"step": checkpoints.latest, "seconds": checkpoints.meta()["seconds"]}))
    print(f"{len(data) / 2**20:.1f} MiB in {len(parts)} parts: {model.source}")


if __name__ == "__main__":
    main()
