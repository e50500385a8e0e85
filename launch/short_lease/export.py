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

parallel.prepare_backend()
from vpm_jax.pretrained import own  # noqa: E402
from vpm_jax.runs.checkpoints import Checkpoints  # noqa: E402

PART = 15 * 2**20  # bytes of a file
SMALL = 4096  # numbers of an array that stays in float32: biases, batch norms


def halved(tree):
    halves = jax.tree.map(lambda x: x.astype(np.float16) if x.size > SMALL else x, tree)
    for x in jax.tree.leaves(halves):
        assert np.isfinite(x).all(), "a weight does not fit into float16"
    return halves


workdir, out, facts = map(Path, sys.argv[1:])
model = own.read_folder(workdir)
small = dataclasses.replace(
    model, params=halved(model.params), batch_stats=halved(model.batch_stats), heads=halved(model.heads)
)
with tempfile.TemporaryDirectory() as folder:
    own.write_safetensors(Path(folder) / "weights.safetensors", small)
    data = (Path(folder) / "weights.safetensors").read_bytes()
parts = [data[start : start + PART] for start in range(0, len(data), PART)]
for number, part in enumerate(parts):
    (out / "unfinished").write_bytes(part)
    os.replace(out / "unfinished", out / f"weights.safetensors.{number}")
with Checkpoints(workdir, keep=0) as checkpoints:
    facts.write_text(json.dumps({"step": checkpoints.latest, "seconds": checkpoints.meta()["seconds"]}))
print(f"{len(data) / 2**20:.1f} MiB in {len(parts)} parts: {model.source}")
