"""One device or many: where state and batches lie, and what maps the step over them.

"jit" (the default) compiles the step for the global batch and lets XLA divide it over a mesh of all devices;
"pmap" maps the same step, which then sums over the mapped axis itself. Both give what one device gives.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vpm_jax.errors import UserError

# jaxlib on CPU can miscompute some jitted reductions (jax#39103). The flag that avoids it is known to parse
# on these versions; an unknown flag would abort the process.
_CPU_REDUCTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-reduce"
_CPU_REDUCTION_VERSIONS = ("0.10.2", "0.12.0")


def threads() -> int:
    """The CPU cores this process may use (taskset, containers); as many threads as each library gets."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def prepare_backend() -> None:
    """Sets XLA's flags and JAX's compilation cache; call before JAX starts its backend. What the user has set stays."""
    flags = os.environ.get("XLA_FLAGS", "")
    version = importlib.metadata.version("jaxlib")
    if "ynn_fusion_type" not in flags and version.startswith(_CPU_REDUCTION_VERSIONS):
        os.environ["XLA_FLAGS"] = f"{flags} {_CPU_REDUCTION_FLAG}".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # "" is none
        import jax

        with contextlib.suppress(OSError, RuntimeError):  # no home, or one that cannot be written
            folder = compilation_cache()
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))


def compilation_cache() -> Path:
    """The folder where compiled programs are kept for the next run: one for each kind of processor.

    A home may be shared by machines of several kinds, and a program compiled for a CPU runs on that kind alone.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    kind = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        kind += repr(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return Path(root) / "vpm_jax" / f"xla-{zlib.crc32(kind.encode()):08x}"


def data_mesh(batch: int | None = None, devices: Sequence | None = None):
    """All devices (or these) along one axis, "data": those of process 0 first, so that each has consecutive rows.

    Raises:
      UserError: if `batch`, the global batch size, is not a multiple of the device count.
    """
    import jax
    from jax.sharding import AxisType, Mesh

    # Not jax.make_mesh: it may order devices by their wiring, which sums over all of them do not need.
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    count = len(devices)
    if batch is not None and batch % count:
        raise UserError(
            f"A batch of {batch} images does not divide over {count} devices: "
            "choose a multiple (stage identities x images_per_identity, or eval.batch) or fewer devices.",
            code="indivisible-batch",
        )
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def shard(mesh, batch: dict) -> dict:
    """This process's rows of a batch, as global arrays sharded over the mesh."""
    import jax

    sharding, devices = rows(mesh), list(mesh.local_devices)

    def one(value: Any):
        value = np.asarray(value)
        # Each device's rows, told to go there: JAX's own assembling counts as a transfer that nobody asked for.
        pieces = jax.device_put(np.split(value, len(devices)), devices)
        shape = (len(value) * mesh.size // len(devices), *value.shape[1:])
        return jax.make_array_from_single_device_arrays(shape, sharding, pieces)

    return {key: one(value) for key, value in batch.items()}


def replicate(mesh, tree):
    """The tree on every device; every process gives the same values."""
    import jax

    sharding = everywhere(mesh)
    if not mesh.is_multi_process:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def rows(mesh):
    """The sharding of arrays whose first axis is divided over the mesh."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec("data"))


def everywhere(mesh):
    """The sharding of arrays that every device holds whole."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec())


def peak_memory() -> float:
    """The most memory held so far, in GiB: of a device, or of this process where devices do not tell (CPU)."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Placement(NamedTuple):
    """How training runs on the devices."""

    compile: Callable[[Callable, Any], Callable]  # (make_step, config) -> the step; its state is donated
    put_batch: Callable[[dict], dict]
    put_state: Callable[[Any], Any]
    whole: Callable[[Any], Any]  # what the step returns (state, metrics), each array once


def placement(kind: str, mesh) -> Placement:
    """The placement of config.parallel: "jit" over the mesh, or "pmap" over this process's devices.

    Raises:
      UserError: for "pmap" on several hosts.
    """
    import jax

    if kind == "jit":

        def compile_jit(make_step: Callable, config: Any) -> Callable:
            return jax.jit(make_step(config), donate_argnums=0, out_shardings=everywhere(mesh))

        return Placement(compile_jit, partial(shard, mesh), partial(replicate, mesh), lambda tree: tree)

    n = mesh.size
    if jax.process_count() > 1:
        raise UserError(f'parallel=pmap maps the devices of one host, found {jax.process_count()} hosts: use "jit".')

    def compile_pmap(make_step: Callable, config: Any) -> Callable:
        devices = list(mesh.devices.flat)
        return jax.pmap(make_step(config, "data"), axis_name="data", devices=devices, donate_argnums=0)

    def put(tree: Any) -> Any:  # leaves [n, ...], one row for each device
        return jax.device_put(tree, rows(mesh))

    def split(batch: dict) -> dict:
        return put({k: np.asarray(v).reshape(n, len(v) // n, *np.shape(v)[1:]) for k, v in batch.items()})

    def copy(state: Any) -> Any:
        return put(jax.tree.map(lambda x: np.broadcast_to(x, (n, *np.shape(x))), jax.device_get(state)))

    one = jax.jit(lambda tree: jax.tree.map(lambda x: x[0], tree), out_shardings=everywhere(mesh))
    return Placement(compile_pmap, split, copy, one)


def prefetch(batches: Iterable, place: Callable, depth: int = 2) -> Iterator:
    """Puts batches on the device `depth` ahead of their use (device_put does not wait)."""
    ahead: list = []
    for batch in batches:
        ahead.append(place(batch))
        if len(ahead) > depth:
            yield ahead.pop(0)
    yield from ahead
