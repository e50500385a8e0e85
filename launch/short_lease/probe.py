"""Times the training step on this machine's device; records its compile time, kernels and compiled program.

    python probe.py OUT.json packed.json --config FILE [--weights FILE] [--batch 256] [--program]

It compiles the program that training runs, so training finds it in the compilation cache. OUT.json is written after
every measurement, so a failure loses none of those before it.
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

STARTED = time.monotonic()
PROFILED = 3  # steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("packed", type=Path)
    parser.add_argument("--config", required=True)
    parser.add_argument("--weights", default="none")
    parser.add_argument("--batch", type=int, default=0, help="images (default: the recipe's)")
    parser.add_argument("--seconds", type=float, default=6.0, help="of timing")
    parser.add_argument("--program", action="store_true", help="also its kernels and, as OUT.hlo.gz, the program")
    args, overrides = parser.parse_known_args()
    facts: dict[str, Any] = {"arguments": sys.argv[1:], "xla_flags": os.environ.get("XLA_FLAGS", "")}

    def keep(**more: Any) -> None:
        facts.update(more, at=round(time.monotonic() - STARTED, 1))
        args.output.write_text(json.dumps(facts, indent=1))
        print({key: value for key, value in more.items() if key != "kernels"}, flush=True)

    from vpm_jax import __version__, cli, parallel

    parallel.prepare_backend()
    import jax
    import numpy as np

    from vpm_jax import config as config_lib
    from vpm_jax import pretrained, step
    from vpm_jax.benchmark import report
    from vpm_jax.benchmark.step import random_batch
    from vpm_jax.reproduce import results
    from vpm_jax.schedule import schedule

    device = jax.devices()[0]
    keep(
        device=device.device_kind,
        hardware=results.hardware(),
        versions=f"vpm_jax {__version__}, {report.versions()}",
    )
    if device.platform == "cpu" and os.environ.get("JAX_PLATFORMS") != "cpu":
        raise SystemExit("JAX sees no accelerator here")

    # ---- The config as training resolves it, for the same program ------------------------------------------
    config = cli.load_config(args.config, overrides).copy_and_resolve_references()
    counts = json.loads(args.packed.read_text())["counts"]
    config.model.num_identities = counts["identities"]
    for stage in schedule(config, counts["train"], counts["identities"]):
        config[stage.name].steps_per_epoch = stage.steps_per_epoch
    config.data.height, config.data.width = stage.height, stage.width
    images = args.batch or stage.batch
    config[stage.name].identities = images // stage.images_per_identity
    backbone = None
    if args.weights != "none":
        backbone = pretrained.load(args.weights)
        config = config_lib.for_weights(config, backbone)

    # ---- Compiling ---------------------------------------------------------------------------------------
    began = time.monotonic()
    state = step.init_state(config)
    if backbone is not None:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        state = step.new_state(config, pretrained.apply_to(variables, backbone))
    jax.block_until_ready(state)
    keep(init_s=round(time.monotonic() - began, 1), batch=images)
    place = parallel.placement("jit", parallel.data_mesh(images))
    host = random_batch(config, images) | {"camera": np.full(images, -1, np.int32)}
    state, batch, numbers = place.put_state(state), place.put_batch(host), place.put_state(step.numbers(config))
    train_step = place.compile(step.make_step, config)
    began = time.monotonic()
    state, metrics = train_step(state, batch, numbers)
    metrics = jax.device_get(metrics)
    if not np.isfinite(metrics["loss"]):
        raise SystemExit(f"the loss of the first step is {metrics['loss']}")
    keep(compile_s=round(time.monotonic() - began, 1))

    # ---- Timing ------------------------------------------------------------------------------------------
    def run(steps: int, feed: bool = False) -> tuple[float, float]:
        """Seconds until all steps are done, and until the last was dispatched."""
        nonlocal state
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = train_step(state, place.put_batch(host) if feed else batch, numbers)
        dispatched = time.perf_counter() - began
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - began, dispatched

    run(3)
    steps = max(3, min(400, int(args.seconds / 4 / (run(3)[0] / 3))))
    turns = [run(steps) for _ in range(3)]
    fed, _ = run(steps, feed=True)
    fastest = min(total for total, _ in turns)
    keep(
        steps=steps,
        step_ms=[round(1e3 * total / steps, 2) for total, _ in turns],
        dispatch_ms=round(1e3 * min(dispatched for _, dispatched in turns) / steps, 2),
        images_per_second=round(images * steps / fastest, 1),
        fed_images_per_second=round(images * steps / fed, 1),
        memory_gib=round(parallel.peak_memory(), 2),
    )

    # ---- Kernels and program, if they can be had ---------------------------------------------------------------
    if args.program:
        try:
            with tempfile.TemporaryDirectory() as folder:
                with jax.profiler.trace(folder):
                    run(PROFILED)
                keep(**kernels(Path(folder)))
        except Exception as error:
            keep(profile_error=repr(error)[:300])
        try:
            with gzip.open(args.output.with_suffix(".hlo.gz"), "wt") as file:
                file.write(train_step.lower(state, batch, numbers).compile().as_text())  # from the cache
        except Exception as error:
            keep(hlo_error=repr(error)[:300])
    keep(done=True)


def kernels(folder: Path) -> dict[str, Any]:
    """Time and number of kernels in a step, and the longest: [microseconds, calls, name]."""
    from jax.profiler import ProfileData

    [path] = folder.rglob("*.xplane.pb")
    seconds: collections.Counter = collections.Counter()
    calls: collections.Counter = collections.Counter()
    for plane in ProfileData.from_file(str(path)).planes:
        if not plane.name.startswith("/device:"):
            continue
        for line in plane.lines:
            if "Stream" in line.name:
                for event in line.events:
                    seconds[event.name] += event.duration_ns
                    calls[event.name] += 1
    longest = [[round(ns / PROFILED / 1e3, 1), calls[k] // PROFILED, k[:120]] for k, ns in seconds.most_common(80)]
    return {
        "kernel_ms_per_step": round(sum(seconds.values()) / PROFILED / 1e6, 2),
        "kernels_per_step": sum(calls.values()) // PROFILED,
        "kernels": longest,
    }


if __name__ == "__main__":
    main()
