"""PyTorch's side of `benchmark step` does the work of ours: same weights and batch, same losses, same update."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from tiny import fill, shrunk

from vpm_jax import step as step_lib
from vpm_jax.benchmark import step as benchmark_step
from vpm_jax.config import set_key
from vpm_jax.errors import UserError
from vpm_jax.pretrained import torchvision

CASES = {
    "paper": ("market", {}),
    "released": ("market_released", {}),
    "bottleneck with the stride on its 1x1": ("market", {"model.depth": 50, "model.stride_on": "1x1"}),
    "3x3 stem, stripes, smoothing": (
        "market",
        {"model.stem": "3x3", "model.last_stride": 2, "model.locator": "stripes", "loss.label_smoothing": 0.1},
    ),
    "patches, MVPM": (
        "market",
        # 62 rows are padded to 64: patches of 4.
        {"model.stem": "4x4", "data.height": 62, "loss.identity_regions": "all", "loss.triplet_pairs": "all"},
    ),
}
UPDATED = ("paper", "released")  # compiling gradients is what these tests spend their time on


def load(model, variables):
    """Loads the JAX model's variables {"params", "batch_stats"} into the PyTorch model."""
    import torch

    flat = {name: np.asarray(x) for name, x in flatten_dict(dict(variables), sep="/").items()}
    backbone = {name.replace("/backbone/", "/"): x for name, x in flat.items() if "/backbone/" in name}
    named = {f"base.{name}": x for name, x in torchvision.to_torch(backbone).items()}
    names = {
        "params/locator_kernel": "locator_kernel",
        "params/locator_bias": "locator_bias",
        "params/heads/reducer": "heads.reducer",
        "params/heads/classifier": "heads.classifier",
        "params/heads/bias": "heads.bias",
        "params/heads/bn/scale": "heads.scale",
        "params/heads/bn/bias": "heads.shift",
        "batch_stats/heads/bn/mean": "heads.mean",
        "batch_stats/heads/bn/var": "heads.var",
    }
    named |= {names[name]: x for name, x in flat.items() if "/backbone/" not in name}
    own = {name for name in model.state_dict() if not name.endswith(("num_batches_tracked", "image_mean", "image_std"))}
    assert own == set(named), own ^ set(named)
    model.load_state_dict({name: torch.tensor(x) for name, x in named.items()}, strict=False)


@pytest.mark.parametrize("case", CASES)
def test_both_sides_compute_the_same_step(case):
    torch = pytest.importorskip("torch")
    from vpm_jax.benchmark import torch_step

    file, changes = CASES[case]
    config = shrunk(file, **changes)
    # Dropout draws different numbers on each side.
    for key, value in {"model.head_dropout": 0.0, "model.locator_dropout": 0.0, "model.dtype": "float64"}.items():
        set_key(config, key, value)
    config = benchmark_step.fixed(config)
    config.stage2.learning_rate = 0.1
    batch = benchmark_step.random_batch(config, 8)
    assert not batch["visible"].all() and batch["visible"].any(axis=1).all()

    model = torch_step.VPM(config)
    tensors = {k: torch.from_numpy(v.astype(np.int64) if v.dtype == np.int32 else v) for k, v in batch.items()}
    with jax.enable_x64(True):
        state, step = fill(step_lib.state_shapes(config)), step_lib.make_step(config)
        load(model, step_lib.evaluated(state))
        theirs = torch_step.make_loss(config, config.stage2.triplet_weight)(model, tensors)

        def wanted(state, batch):  # what is not returned is not compiled
            after, metrics = step(state, batch)
            return (after, metrics) if case in UPDATED else (None, {name: metrics[name] for name in theirs})

        options = {"xla_backend_optimization_level": 0}
        after, metrics = jax.device_get(jax.jit(wanted, compiler_options=options)(state, batch))

    for name, value in theirs.items():
        np.testing.assert_allclose(value.detach(), metrics[name], rtol=1e-6, err_msg=name)  # metrics are float32
    if case not in UPDATED:
        return
    theirs["loss"].backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    np.testing.assert_allclose(norm, metrics["grad_norm"], rtol=1e-8)
    torch_step.optimizer(config, model, config.stage2.learning_rate).step()
    ours = torch_step.VPM(config)
    load(ours, {"params": after.params, "batch_stats": after.batch_stats})
    values = dict(model.named_parameters()) | {name: x for name, x in model.named_buffers() if name.startswith("heads")}
    for name, value in values.items():
        expected = ours.state_dict()[name]
        assert torch.linalg.norm(value - expected) <= 1e-8 * torch.linalg.norm(expected), name


@pytest.mark.parametrize(
    "key, value", [("model.neck", "bn"), ("model.head_dim", 0), ("optim.ema", 0.9), ("data.fit", "pad")]
)
def test_a_step_that_the_other_side_lacks_is_refused(key, value):
    config = shrunk("market", **{key: value})
    with pytest.raises(UserError, match=f"{key} is .*PyTorch side"):
        benchmark_step.check_rival(config)
    benchmark_step.check_rival(shrunk("market", **{"model.head_dim": 8}))
