"""DukeMTMC-reID, the paper's recipe. The authors withdrew the dataset; bring your own copy.

python -m vpm_jax.train --config configs/duke.py --config.data.root=DATA
"""

from vpm_jax.config import default


def get_config():
    config = default()
    config.data.name = "dukemtmc"
    config.stage1.steps_per_epoch = 0  # a whole pass: 16,522 // 64 = 258
    return config
