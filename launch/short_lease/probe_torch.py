"""The same training step in PyTorch, eager or compiled: python probe_torch.py OUT.json CONFIG eager|compiled BATCH

BATCH 0 is the recipe's.
"""

import json
import sys
import time
from pathlib import Path

from vpm_jax import cli
from vpm_jax import config as config_lib
from vpm_jax.benchmark import torch_step
from vpm_jax.benchmark.step import fixed, random_batch

output, config_path, kind, batch, *overrides = sys.argv[1:]
config = fixed(cli.load_config(config_path, overrides))
config.model.dtype = "bfloat16" if torch_step.torch.cuda.is_available() else "float32"
images = int(batch) or config.stage2.identities * config.stage2.images_per_identity
began = time.time()
_, work = torch_step.build(config_lib.to_json(config), random_batch(config, images), kind == "compiled")
work["step"](3)
ready = time.time() - began
began = time.time()
work["step"](3)
steps = max(3, min(300, int(6 / (time.time() - began))))
times = []
for _ in range(3):
    began = time.time()
    work["step"](steps)
    times.append((time.time() - began) / steps)
facts = {
    "kind": kind,
    "batch": images,
    "ready_s": round(ready, 1),
    "step_ms": [round(1e3 * t, 2) for t in times],
    "images_per_second": round(images / min(times), 1),
}
Path(output).write_text(json.dumps(facts))
print(facts)
