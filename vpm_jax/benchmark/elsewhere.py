"""The training step compiled for another machine: whether it compiles, its memory, and a model of its time.

    python -m vpm_jax.benchmark elsewhere --target v5e:4x4 --batch 1024 --config configs/market.py
    python -m vpm_jax.benchmark elsewhere --target h200 --devices 8 --config configs/market.py

XLA can compile for a TPU slice or GPUs without having them, on Linux, with the library from `pip install '.[tpu]'` or
'.[cuda]'. For GPUs, it chooses kernels and algorithms without autotuning.

The model adds up what a device does one after another: moving the bytes of all kernels, computing, launching kernels
and waiting for collectives. It assumes that a step reaches these fractions of the data sheet's numbers.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from vpm_jax import captions, cli
from vpm_jax.benchmark import program
from vpm_jax.benchmark.report import Report, Row
from vpm_jax.benchmark.step import batch_size, fixed, random_batch
from vpm_jax.benchmark.timing import clocked
from vpm_jax.errors import UserError, first_line

if TYPE_CHECKING:
    from jax.sharding import NamedSharding

HELP = "the training step compiled for another machine's TPU slice or GPUs: memory and FLOP limit"


@dataclass(frozen=True)
class Chip:
    """A device: its usable memory in bytes, and the data sheet's FLOP/s of matrix products in bfloat16 and in float32
    at JAX's default precision (TF32 on GPU, bfloat16 on TPU)."""

    memory: float
    bfloat16: float
    float32: float
    bandwidth: float  # of the memory, bytes/s
    link: float  # to the other devices in each direction, bytes/s
    launch: float = 0.0  # seconds of a kernel; from here on only for GPUs
    multiprocessors: int = 0
    capability: int = 0
    shared_memory: int = 0  # opt-in bytes per block
    cache: int = 0


LAUNCH = 2.5e-6
TPUS = {
    "v4": Chip(32 * 2**30, 275e12, 275e12, 1.2e12, 300e9),
    "v5e": Chip(16 * 2**30, 197e12, 197e12, 0.819e12, 200e9),
    "v5p": Chip(95 * 2**30, 459e12, 459e12, 2.765e12, 600e9),
    "v6e": Chip(32 * 2**30, 918e12, 918e12, 1.6e12, 400e9),
}
GPUS = {
    "a100": Chip(79 * 2**30, 312e12, 156e12, 2.04e12, 300e9, LAUNCH, 108, 8, 166_912, 40 * 2**20),
    "h100": Chip(79 * 2**30, 989e12, 494e12, 3.35e12, 450e9, LAUNCH, 132, 9, 232_448, 50 * 2**20),
    "h200": Chip(139 * 2**30, 989e12, 494e12, 4.8e12, 450e9, LAUNCH, 132, 9, 232_448, 50 * 2**20),
}
# Assumptions of the model.
OF_BANDWIDTH, OF_PEAK, OF_LINK = 0.75, 0.5, 0.75
LATENCY = 20e-6  # seconds of a collective, whatever its size
LOADED = 5900  # images/s that a core decodes and resizes to 384x128; see docs/results/benchmark.md


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        required=True,
        metavar="CHIP",
        help=f"{', '.join(GPUS)}, or a TPU slice: {', '.join(TPUS)} with a shape, such as v5e:4x4 or v4:2x2x4",
    )
    parser.add_argument("--devices", type=cli.positive, default=1, help="number of GPUs, in one host (default: 1)")
    parser.add_argument("--batch", type=cli.positive, help="global batch size (default: that of the config's stage 2)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), help="default: the config's, with bfloat16 for auto"
    )


def run(args: argparse.Namespace, config: ConfigDict) -> Report:
    import jax

    from vpm_jax import parallel, step

    chip = chip_of(args.target, args.devices)
    jax.config.update("jax_platforms", "cpu")  # leaves this machine's accelerators free
    jax.config.update("jax_enable_compilation_cache", False)
    config = fixed(config)
    images = batch_size(args, config)
    devices = topology(args.target, args.devices)
    dtype = config.model.dtype = args.dtype or config.model.dtype.replace("auto", "bfloat16")
    if dtype not in ("bfloat16", "float32"):
        raise UserError(f"model.dtype is {dtype}, expected bfloat16 or float32.")
    batch = random_batch(config, images)
    mesh = parallel.data_mesh(images, devices)
    replicated = parallel.replicated(mesh)

    def shaped(tree: Any, sharding: NamedSharding) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

    state, function, numbers = step.state_shapes(config), step.make_step(config), step.numbers(config)
    flops = (jax.jit(function).lower(state, batch, numbers).cost_analysis() or {})["flops"]
    lowered = (
        parallel.placement("jit", mesh)
        .compile(step.make_step, config)
        .lower(shaped(state, replicated), shaped(batch, parallel.data_sharding(mesh)), shaped(numbers, replicated))
    )
    options: dict[str, str | bool] = {}
    if args.target in GPUS:  # autotuning needs the device, and Triton's matrix products need autotuning
        options = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False}
    seconds, compiled = clocked(lambda: lowered.compile(options))

    memory, gib = compiled.memory_analysis(), 2**30
    assert memory is not None
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    needed, peak = held + memory.temp_size_in_bytes, getattr(chip, dtype) * len(devices)
    amounts = program.read(compiled.as_text())
    seconds_of = {
        "moving bytes": amounts.moved / (OF_BANDWIDTH * chip.bandwidth),
        "computing": flops / (OF_PEAK * peak),
        "launching kernels": amounts.kernels * chip.launch,
        "collectives": collective_seconds(amounts.collectives, len(devices), chip),
    }
    modelled = sum(seconds_of.values())
    lines = [
        f"Recipe {config.recipe}: {captions.network(config)}, {images} images per batch, {dtype}; "
        f"compiled for {len(devices)} x {args.target.partition(':')[0]}.",
        f"Each device holds {held / gib:.3g} GiB of state, batch and metrics, and "
        f"{memory.temp_size_in_bytes / gib:.3g} GiB of temporary buffers.",
        f"The step computes {flops / 1e9:,.4g} GFLOP: at most {images * peak / flops:,.0f} images/s on all devices at "
        f"the data sheet's {peak / 1e12:,.0f} TFLOP/s.",
        f"Modelled: {OF_BANDWIDTH:.0%} of {chip.bandwidth / 1e12:.3g} TB/s, {OF_PEAK:.0%} of the peak, "
        f"{OF_LINK:.0%} of {chip.link / 1e9:,.0f} GB/s between devices, {chip.launch * 1e6:g} us per kernel and "
        f"{LATENCY * 1e6:g} us per collective; a core loads {LOADED:,} images/s.",
    ]
    return Report(
        [
            Row("rate, modelled", images / modelled, "images/s", images * peak / flops, "FLOPs"),
            Row("step, modelled", modelled * 1e3, "ms"),
            *(Row(f"  {name}", value * 1e3, "ms") for name, value in seconds_of.items()),
            Row("cores that load as fast", images / modelled / LOADED, ""),
            Row("computation", flops / 1e9, "GFLOP"),
            Row("bytes of a device", amounts.moved / 1e9, "GB"),
            *([Row("cycles, by the compiler", amounts.cycles / 1e6, "million")] if amounts.cycles else []),
            Row("kernels", amounts.kernels, ""),
            Row("collectives", len(amounts.collectives), ""),
            Row("bytes of collectives", sum(amounts.collectives) / 1e6, "MB"),
            Row("memory of a device", needed / gib, "GiB", chip.memory / gib, "its capacity"),
            Row("compiling, on this machine", seconds[args.clock], "s"),
        ],
        lines,
        config=config.to_dict(),
    )


def collective_seconds(sizes: list[float], devices: int, chip: Chip) -> float:
    """The time of ring all-reduces of these bytes."""
    if devices == 1:
        return 0.0
    return sum(LATENCY + 2 * (devices - 1) / devices * size / (OF_LINK * chip.link) for size in sizes)


def chip_of(target: str, count: int) -> Chip:
    """The chip of a --target. Raises UserError for an unknown target or an invalid number of devices."""
    name, _, shape = target.partition(":")
    if name in GPUS and not shape:
        return GPUS[name]
    if name in TPUS and shape:
        if count != 1:
            raise UserError(f"--devices is for GPUs: the shape of {target} sets the number of chips.")
        return TPUS[name]
    raise UserError(
        f"--target {target}: expected {', '.join(GPUS)}, or {', '.join(TPUS)} with a slice's shape, such as v5e:4x4."
    )


def topology(target: str, count: int) -> list[Any]:
    """Device descriptions to compile for.

    Raises:
      UserError: for an invalid slice, or without the library that compiles for it.
    """
    from jax.experimental import topologies

    gpu = target in GPUS
    if not gpu:  # otherwise the library waits for a TPU host's metadata server
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another process may use the TPU, or compile too
    try:
        if gpu:
            options = {"topology": f"1x1x{count}", "target_config": _gpu_config(target)}
            return list(topologies.get_topology_desc("", "cuda", **options).devices)
        return list(topologies.get_topology_desc(target, "tpu").devices)
    except Exception as error:
        raise UserError(
            f"Cannot compile for {target} here ({first_line(error)}): this needs Linux, the library of pip install "
            f"'.[{'cuda' if gpu else 'tpu'}]', and for a TPU a valid shape."
        ) from error


def _gpu_config(name: str) -> str:
    """The description of a GPU that XLA needs to compile for it: a text-format GpuTargetConfigProto."""
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
