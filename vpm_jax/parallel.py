"""Data parallelism: placement of state and batches on the devices, and compilation of the step.

Each device computes the step on its rows of the batch, and the step itself reduces over the devices: "jit" (the
default) maps it over a mesh of all devices, "pmap" over those of one host. Both match a single device.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import resource
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from ml_collections import ConfigDict, FrozenConfigDict

from vpm_jax.errors import UserError

if TYPE_CHECKING:  # loader processes use this module without JAX
    from jax import Array, Device
    from jax.sharding import Mesh, NamedSharding

Item = TypeVar("Item")
Placed = TypeVar("Placed")

# jaxlib 0.10.2 on CPU miscomputes some jitted reductions (jax#39103), and 0.11.0 can still crash in them (jax#39257).
# These versions accept the flag that avoids both; an unknown flag would abort the process.
_CPU_REDUCTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-reduce"
_CPU_REDUCTION_VERSIONS = ("0.10.2", "0.11.", "0.12.0")


_process = 0  # the one that called `prepare_backend` first


def prepare_backend() -> None:
    """Sets XLA's flags and JAX's compilation cache unless the user has. Call before JAX starts its backend.

    Raises:
      UserError: as `check_process`.
    """
    global _process
    _process = _process or os.getpid()
    check_process()
    flags = os.environ.get("XLA_FLAGS", "")
    version = importlib.metadata.version("jaxlib")
    if "ynn_fusion_type" not in flags and version.startswith(_CPU_REDUCTION_VERSIONS):
        os.environ["XLA_FLAGS"] = f"{flags} {_CPU_REDUCTION_FLAG}".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # "" disables it
        import jax

        with contextlib.suppress(OSError, RuntimeError):  # no home directory, or a read-only one
            folder = compilation_cache()
            folder.mkdir(parents=True, exist_ok=True)
            jax.config.update("jax_compilation_cache_dir", str(folder))


def check_process() -> None:
    """Raises UserError in a process forked from one that uses JAX: without that one's threads, JAX would hang."""
    if _process not in (0, os.getpid()):
        raise UserError(
            "This process was forked from one that uses JAX, which would hang here: start processes with "
            "multiprocessing.get_context('spawn').",
            code="forked",
        )


def compilation_cache() -> Path:
    """The folder of compiled programs, one for each kind of processor.

    Machines with different processors may share a home directory, and programs compiled for one CPU may not run on
    another.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    kind = platform.machine() + platform.processor()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        kind += repr(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))
    return Path(root) / "vpm_jax" / f"xla-{zlib.crc32(kind.encode()):08x}"


def data_mesh(batch: int | None = None, devices: Sequence[Device] | None = None) -> Mesh:
    """A mesh of all devices (or `devices`) along one axis, "data", in process order: each holds consecutive rows.

    Raises:
      UserError: if `batch`, the global batch size, is not a multiple of the device count.
    """
    import jax
    from jax.sharding import AxisType, Mesh

    # Not jax.make_mesh: it may reorder devices for their interconnect.
    devices = sorted(devices or jax.devices(), key=lambda device: (device.process_index, device.id))
    count = len(devices)
    if batch is not None and batch % count:
        raise UserError(
            f"A batch of {batch} images does not divide over {count} devices: "
            "choose a multiple (stage identities x images_per_identity, or eval.batch) or fewer devices.",
            code="indivisible-batch",
        )
    return Mesh(np.array(devices), ("data",), axis_types=(AxisType.Auto,))


def extraction_batch(mesh: Mesh) -> int:
    """The batch size of feature extraction for eval.batch=0: 256 images per GPU or TPU; on CPUs 128, rounded up."""
    count = mesh.size
    return -(-128 // count) * count if mesh.devices.flat[0].platform == "cpu" else 256 * count


def shard(mesh: Mesh, tree: Any) -> Any:
    """Global arrays, sharded over the mesh, from this process's rows of them (NumPy)."""
    import jax

    with jax.transfer_guard("allow"):  # on several hosts, JAX counts this transfer as implicit
        return jax.make_array_from_process_local_data(data_sharding(mesh), tree)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """Copies the tree to every device; all processes must pass the same values."""
    import jax

    sharding = replicated(mesh)
    if not mesh.is_multi_process:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), tree)


def data_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays whose first axis is divided over the mesh."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of arrays that are replicated on every device."""
    from jax.sharding import NamedSharding, PartitionSpec

    return NamedSharding(mesh, PartitionSpec())


def mapped(mesh: Mesh, step: Callable[..., Any]) -> Callable[..., Any]:
    """The step (state, batch, numbers) of one device, mapped over the mesh; only the batch is divided."""
    import jax
    from jax.sharding import PartitionSpec

    whole, rows = PartitionSpec(), PartitionSpec("data")
    # Not checked: the step follows pmap's rules for gradients through sums over devices.
    of_mesh = jax.shard_map(step, mesh=mesh, in_specs=(whole, rows, whole), out_specs=whole, check_vma=False)
    return lambda state, batch, numbers=None: of_mesh(state, batch, numbers)


def peak_memory() -> float:
    """The peak memory in GiB of a device, or of this process if devices do not report it (CPU)."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class Placement(NamedTuple):
    """How training runs on the devices."""

    compile: Callable[[Callable[..., Any], ConfigDict], Any]  # (make_step, config) -> jitted step, state donated
    put_batch: Callable[[Mapping[str, Any]], dict[str, Array]]
    put_state: Callable[[Any], Any]
    whole: Callable[[Any], Any]  # undoes the mapping of (state, metrics)


@lru_cache(maxsize=8)
def _compiled_step(kind: str, mesh: Mesh, make_step: Callable[..., Any], config: FrozenConfigDict) -> Any:
    """The jitted step, one for all runs of this process that need the same."""
    import jax

    if kind == "pmap":
        devices = list(mesh.devices.flat)
        return jax.pmap(make_step(config, "data"), axis_name="data", devices=devices, donate_argnums=0)
    function = make_step(config) if mesh.size == 1 else mapped(mesh, make_step(config, "data"))
    return jax.jit(function, donate_argnums=0, out_shardings=replicated(mesh))


def placement(kind: str, mesh: Mesh) -> Placement:
    """The placement of config.parallel: "jit" over the mesh, or "pmap" over this process's devices.

    Raises:
      UserError: for "pmap" on several hosts.
    """
    import jax

    def compile(make_step: Callable[..., Any], config: ConfigDict) -> Any:
        return _compiled_step(kind, mesh, make_step, FrozenConfigDict(config))

    if kind == "jit":
        return Placement(compile, partial(shard, mesh), partial(replicate, mesh), lambda tree: tree)

    n = mesh.size
    if jax.process_count() > 1:
        raise UserError(f'parallel=pmap maps the devices of one host, found {jax.process_count()} hosts: use "jit".')

    def put(tree: Any) -> Any:  # leaves [n, ...], one row per device
        return jax.device_put(tree, data_sharding(mesh))

    def split(batch: Mapping[str, Any]) -> dict[str, Array]:
        return put({k: np.asarray(v).reshape(n, len(v) // n, *np.shape(v)[1:]) for k, v in batch.items()})

    def copy(state: Any) -> Any:
        return put(jax.tree.map(lambda x: np.broadcast_to(x, (n, *np.shape(x))), jax.device_get(state)))

    first = jax.jit(lambda tree: jax.tree.map(lambda x: x[0], tree), out_shardings=replicated(mesh))
    return Placement(compile, split, copy, first)


def prefetch(batches: Iterable[Item], place: Callable[[Item], Placed], depth: int = 2) -> Iterator[Placed]:
    """Places batches on the device `depth` ahead of their use (device_put is asynchronous)."""
    ahead: list[Placed] = []
    for batch in batches:
        ahead.append(place(batch))
        if len(ahead) > depth:
            yield ahead.pop(0)
    yield from ahead
