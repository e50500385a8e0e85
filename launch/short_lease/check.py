"""Checks that the machine's packages do what training needs: imports, a model's shapes, a checkpoint."""

import importlib
import sys
import tempfile
from pathlib import Path

from vpm_jax import parallel

parallel.prepare_backend()
import jax.numpy as jnp  # noqa: E402

from vpm_jax import config, step  # noqa: E402
from vpm_jax.benchmark import report  # noqa: E402
from vpm_jax.runs.checkpoints import Checkpoints  # noqa: E402

print(report.versions())
for module in ("grain", "cv2", "simplejpeg", "vpm_jax.training", "vpm_jax.evaluation", "vpm_jax.data.pipeline"):
    importlib.import_module(module)
if len(sys.argv) > 1:  # the pretrained weights
    from vpm_jax import pretrained

    print(pretrained.load(sys.argv[1]).source)
model = config.default().copy_and_resolve_references()
model.model.num_identities, model.stage1.epochs, model.stage2.steps_per_epoch = 4, 0, 1
step.state_shapes(model)
state = step.State(jnp.zeros([], jnp.int32), {"a": jnp.ones(3)}, {}, {})
with tempfile.TemporaryDirectory() as folder, Checkpoints(Path(folder), keep=1) as checkpoints:
    checkpoints.save(1, state, {"seconds": 0.0, "pending": [], "best": None})
    checkpoints.wait()
    assert int(checkpoints.restore(state)[0].step) == 0
print("imports and checkpoints work")
