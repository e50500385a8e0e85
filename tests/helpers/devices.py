"""Whether the number of devices changes what is learnt: both recipes on one device and on several, by jit and by pmap.

    python tests/helpers/devices.py                  # float64, virtual CPU devices: equal to 1e-10, the same triplets
    python tests/helpers/devices.py --dtype float32  # how far rounding drives them apart

Each runs the same steps on the same global batches from the same state. Prints the largest difference of any metric
of any step and of any array of the last state, and how many anchors were mined other triplets.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence

BATCH, IDENTITIES, REGIONS = 16, 4, 3
RUNS = ("market:jit", "market:pmap", "market_released:jit", "market_released:pmap")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--devices", type=int, nargs="+", default=(1, 2, 4, 8), help="divisors of 16")
    parser.add_argument("--stem", action="store_true", help="no residual blocks: most time to compile is theirs")
    parser.add_argument("--runs", nargs="+", default=RUNS, metavar="RECIPE:KIND")
    parser.add_argument("--json", action="store_true", help="one JSON line for each comparison instead of a table")
    args = parser.parse_args(argv)
    # Before JAX starts: the virtual devices, and float64.
    os.environ["XLA_FLAGS"] = (
        f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={max(args.devices)}"
    )
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": str(args.dtype == "float64")}
    from vpm_jax.parallel import prepare_backend

    prepare_backend()
    for run in args.runs:
        recipe, kind = run.split(":")
        for row in compare(recipe, args.dtype, args.steps, args.devices, kind, args.stem):
            if args.json:
                print(json.dumps(row), flush=True)
            else:
                print(
                    f"{recipe:16}{args.dtype}  {row['kind']:4} on {row['devices']}: metrics {row['metrics']:.1e}  "
                    f"state {row['state']:.1e}  other triplets {row['other_triplets']} of {row['anchors']}  "
                    f"(closest runner-up {row['gap']:.1e})",
                    flush=True,
                )
    return 0


def compare(recipe: str, dtype: str, steps: int, counts: Sequence[int], kind: str, stem: bool):
    """Yields a row of differences from one device for each number of devices."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from tiny import STEM_ALONE, drop_blocks, fill, shrunk

    from vpm_jax import parallel
    from vpm_jax import step as step_lib
    from vpm_jax.config import stage

    if stem:
        drop_blocks()
    config = shrunk(recipe, model__dtype=dtype, **STEM_ALONE if stem else {})
    # The second stage, with the triplet loss and new momentum, starts in between.
    config.stage1 = stage(epochs=1, steps_per_epoch=steps // 3)
    config.stage2 = stage(epochs=1, steps_per_epoch=steps, triplet_weight=config.stage2.triplet_weight)
    state = fill(step_lib.state_shapes(config))
    batches = [new_batch(config, seed) for seed in range(steps)]
    find = miner(config)

    def run(kind: str, count: int):
        """The metrics and mined triplets of every step, and the last state."""
        mesh = parallel.data_mesh(BATCH, jax.devices()[:count])
        place = parallel.placement(kind, mesh)
        step, now = place.compile(step_lib.make_step, config), place.put_state(state)
        numbers = place.put_state(step_lib.numbers(config))
        measured, mined = [], []
        for batch in batches:
            # A copy: looking at the state itself would keep its memory from being donated.
            mined.append(find(jax.device_get(jax.tree.map(jnp.copy, place.whole(now))), batch))
            with jax.transfer_guard("disallow"):
                before, (now, metrics) = now, step(now, place.put_batch(batch), numbers)
            assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))  # donated
            measured.append(jax.device_get(place.whole(metrics)))
        return measured, mined, jax.device_get(place.whole(now))

    def difference(one, two) -> float:
        return max(
            float(np.max(np.abs(a - b) / np.maximum(1, np.abs(b)), initial=0))
            for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True)
        )

    metrics, mined, last = run("jit", 1)
    for count in counts:
        if (kind, count) == ("jit", 1):
            continue
        other_metrics, other_mined, other_last = run(kind, count)
        yield {
            "recipe": recipe,
            "kind": kind,
            "devices": count,
            "metrics": difference(other_metrics, metrics),
            "state": difference(other_last, last),
            "other_triplets": sum(int((a[0] != b[0]).any(0).sum()) for a, b in zip(mined, other_mined, strict=True)),
            "anchors": BATCH * steps,
            "gap": min(float(gap) for _, gap in mined),
            "loss": float(metrics[-1]["loss"]),
            "triplet": float(metrics[-1]["loss_triplet"]),
        }


def new_batch(config, seed: int) -> dict:
    import numpy as np

    from vpm_jax import models

    random = np.random.default_rng(seed)
    visible = random.random((BATCH, REGIONS)) < 0.7
    visible[:, 0] = True
    return {
        "image": random.integers(0, 256, (BATCH, config.data.height, config.data.width, 3), np.uint8),
        "identity": np.arange(BATCH, dtype=np.int32) % IDENTITIES,  # positives are on other devices
        "labels": random.integers(0, REGIONS, (BATCH, *models.map_shape(config)), np.int32),
        "visible": visible,
    }


def miner(config):
    """(state, batch) -> (int [2, B] the hardest positive and negative of each anchor, the least lead over the next)."""
    import jax
    import numpy as np

    from vpm_jax import models
    from vpm_jax import step as step_lib

    model = models.create(config)

    @jax.jit
    def forward(state, batch):
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        rngs = {"dropout": key}
        (_, out), _ = model.apply(
            variables, batch["image"], train=True, visible=batch["visible"], rngs=rngs, mutable=["batch_stats"]
        )
        return step_lib.l2_normalize(out["region_features"]), out["visibility"]

    def find(state, batch):
        features, visibility = (np.asarray(x, np.float64) for x in forward(state, batch))
        shown = visibility if config.loss.triplet_pairs == "soft" else batch["visible"].astype(float)
        weights = shown[:, None] * shown[None]
        weights /= weights.sum(-1, keepdims=True)
        distance = (weights * np.linalg.norm(features[:, None] - features[None], axis=-1)).sum(-1)
        same = batch["identity"][:, None] == batch["identity"][None]
        positive = np.where(same & ~np.eye(BATCH, dtype=bool), distance, -np.inf)
        negative = np.where(same, np.inf, distance)
        far, near = np.sort(positive, axis=1), np.sort(negative, axis=1)
        gap = min((far[:, -1] - far[:, -2]).min(), (near[:, 1] - near[:, 0]).min())
        return np.stack([positive.argmax(1), negative.argmin(1)]), gap

    return find


if __name__ == "__main__":
    raise SystemExit(main())
