"""The training step compiled for a machine that is not here: that it compiles, and what it takes of a device.

    python -m vpm_jax.benchmark elsewhere --target v5e:4x4 --batch 1024 --config configs/market.py
    python -m vpm_jax.benchmark elsewhere --target h200 --devices 8 --config configs/market.py

XLA compiles for a TPU slice or for GPUs without one, on Linux: it needs the library that `pip install '.[tpu]'` or
'.[cuda]' brings, nothing else. Of a GPU, kernels and algorithms are those chosen without timing any.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import Any

from ml_collections import ConfigDict

from vpm_jax import cli
from vpm_jax.benchmark.report import Report, Row
from vpm_jax.benchmark.step import fixed, random_batch
from vpm_jax.benchmark.timing import clocked
from vpm_jax.errors import UserError

HELP = "the training step compiled for a TPU slice or GPUs that are not here: its memory, what its FLOPs allow"


@dataclass(frozen=True)
class Chip:
    """A device: the bytes that it has for a program, and by its data sheet the FLOP/s of matrix products of bfloat16
    and of float32 at JAX's default precision (TF32 on GPU, bfloat16 on TPU)."""

    memory: float
    bfloat16: float
    float32: float
    bandwidth: float = 0.0  # bytes/s; this and the rest of GPUs alone
    multiprocessors: int = 0
    capability: int = 0
    shared_memory: int = 0  # that a block may ask for
    cache: int = 0


TPUS = {
    "v4": Chip(32 * 2**30, 275e12, 275e12),
    "v5e": Chip(16 * 2**30, 197e12, 197e12),
    "v5p": Chip(95 * 2**30, 459e12, 459e12),
    "v6e": Chip(32 * 2**30, 918e12, 918e12),
}
GPUS = {
    "a100": Chip(79 * 2**30, 312e12, 156e12, 2.04e12, 108, 8, 166_912, 40 * 2**20),
    "h100": Chip(79 * 2**30, 989e12, 494e12, 3.35e12, 132, 9, 232_448, 50 * 2**20),
    "h200": Chip(139 * 2**30, 989e12, 494e12, 4.8e12, 132, 9, 232_448, 50 * 2**20),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        required=True,
        metavar="CHIP",
        help=f"{', '.join(GPUS)}, or a TPU slice: {', '.join(TPUS)} with its shape, such as v5e:4x4 or v4:2x2x4",
    )
    parser.add_argument("--devices", type=int, default=1, help="of GPUs, in one host (default: 1)")
    parser.add_argument("--batch", type=int, help="images, of all devices (default: those of the config's stage 2)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default: the config's, bfloat16 if that is auto"
    )


def run(args: argparse.Namespace, config: ConfigDict) -> Report:
    import jax

    from vpm_jax import parallel, step

    chip = find(args.target, args.devices)
    parallel.prepare_backend()
    jax.config.update("jax_platforms", "cpu")  # whatever is here stays free
    jax.config.update("jax_enable_compilation_cache", False)
    config = fixed(config)
    images = config.stage2.identities * config.stage2.images_per_identity if args.batch is None else args.batch
    if images < 1:
        raise UserError(f"--batch is {images}, expected at least one image.")
    devices = topology(args.target, args.devices)
    dtype = config.model.dtype = args.dtype or config.model.dtype.replace("auto", "bfloat16")
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"model.dtype is {dtype}, which no accelerator multiplies: expected bfloat16 or float32.")
    batch = random_batch(config, images)
    mesh = parallel.data_mesh(images, devices)
    everywhere, rows = parallel.everywhere(mesh), parallel.rows(mesh)

    def shaped(tree: Any, sharding: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    state, function = step.state_shapes(config), step.make_step(config)
    flops = (jax.jit(function).lower(state, batch).cost_analysis() or {})["flops"]
    train_step = jax.jit(function, donate_argnums=0, out_shardings=everywhere)
    lowered = train_step.lower(shaped(state, everywhere), shaped(batch, rows))
    # Nothing can be timed there.
    options: dict[str, str | bool] = {"xla_gpu_autotune_level": "0"} if args.target in GPUS else {}
    seconds, compiled = clocked(lambda: lowered.compile(options))

    memory, gib = compiled.memory_analysis(), 2**30
    assert memory is not None  # XLA plans it for every target
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed, peak = held + memory.temp_size_in_bytes, getattr(chip, dtype) * len(devices)
    m, height, width = config.model, config.data.height, config.data.width
    lines = [
        f"Recipe {config.recipe}: ResNet-{m.depth} of width {m.width}, {images} images of {height} x {width} a batch, "
        f"{dtype}; compiled for {len(devices)} x {args.target.partition(':')[0]}, which is not here.",
        f"A device holds {held / gib:.3g} GiB of state, batch and metrics, and {memory.temp_size_in_bytes / gib:.3g} "
        "GiB more while it computes.",
        f"The step computes {flops / 1e9:,.4g} GFLOP: at most {images * peak / flops:,.0f} images/s of all devices at "
        f"their data sheet's {peak / 1e12:,.0f} TFLOP/s.",
    ]
    return Report(
        [
            Row("memory of a device", needed / gib, "GiB", chip.memory / gib, "what it has"),
            Row("compiling, on this machine", seconds[args.clock], "s"),
        ],
        lines,
        config=config.to_dict(),
    )


def find(target: str, count: int) -> Chip:
    """The chip of a --target.

    Raises:
      UserError: for another, or for so many.
    """
    name, _, shape = target.partition(":")
    if name in GPUS and not shape:
        if count < 1:
            raise UserError(f"--devices {count}: expected at least 1.")
        return GPUS[name]
    if name in TPUS and shape:
        if count != 1:
            raise UserError(f"--devices is of GPUs: the shape of {target} says how many chips it has.")
        return TPUS[name]
    raise UserError(
        f"--target {target}: expected {', '.join(GPUS)}, or {', '.join(TPUS)} with a slice's shape, such as v5e:4x4."
    )


def topology(target: str, count: int) -> list[Any]:
    """Devices that can only be compiled for.

    Raises:
      UserError: for a slice that there is not, or without the library that compiles for it.
    """
    from jax.experimental import topologies

    gpu = target in GPUS
    if not gpu:  # the library looks for a TPU host's name and its metadata server, and waits, unless it is told
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    try:
        if gpu:
            options = {"topology": f"1x1x{count}", "target_config": _describe(target)}
            return list(topologies.get_topology_desc("", "cuda", **options).devices)
        return list(topologies.get_topology_desc(target, "tpu").devices)
    except Exception as error:
        raise UserError(
            f"Cannot compile for {target} here ({cli.first_line(error)}): it takes Linux, the library of pip install "
            f"'.[{'cuda' if gpu else 'tpu'}]', and for a TPU a shape that there is."
        ) from error


def _describe(name: str) -> str:
    """What XLA must know of a GPU to compile for it: a text-format GpuTargetConfigProto."""
    chip = GPUS[name]
    return f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {chip.capability} }}
          core_count: {chip.multiprocessors}
          fpus_per_core: {128 if chip.capability > 8 else 64}
          threads_per_warp: 32
          threads_per_block_limit: 1024
          threads_per_core_limit: 2048
          block_dim_limit_x: 2147483647
          block_dim_limit_y: 65535
          block_dim_limit_z: 65535
          registers_per_core_limit: 65536
          registers_per_block_limit: 65536
          shared_memory_per_block: 49152
          shared_memory_per_block_optin: {chip.shared_memory}
          shared_memory_per_core: {chip.shared_memory + 1024}
          l2_cache_size: {chip.cache}
          memory_bandwidth: {chip.bandwidth:.0f}
          device_memory_size: {chip.memory:.0f}
          clock_rate_ghz: {1.98 if chip.capability > 8 else 1.41}
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 8 }}
        device_description_str: "NVIDIA {name.upper()}"
    """
