"""One device or many: where state and batches lie, and what maps the step over them.

"jit" (the default) compiles the step for the global batch and lets XLA divide it over a mesh of all devices;
"pmap" maps the same step, which then sums over the mapped axis itself. Both give what one device gives.
"""

from __future__ import annotations

import importlib.metadata
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from vpm_jax.errors import UserError

# jaxlib on CPU can miscompute some jitted reductions (jax#39103). The flag that avoids it is known to parse
# on these versions; an unknown flag would abort the process.
_CPU_REDUCTION_FLAG = "--xla_cpu_experimental_ynn_fusion_type=-reduce"
_CPU_REDUCTION_VERSIONS = ("0.10.2", "0.12.0")


def prepare_backend() -> None:
    """Sets XLA's flags; call before JAX starts its backend. What the user has set stays."""
    flags = os.environ.get("XLA_FLAGS", "")
    version = importlib.metadata.version("jaxlib")
    if "ynn_fusion_type" not in flags and version.startswith(_CPU_REDUCTION_VERSIONS):
        os.environ["XLA_FLAGS"] = f"{flags} {_CPU_REDUCTION_FLAG}".strip()


def data_mesh(batch: int | None = None):
    """All devices along one axis, "data".

    Raises:
      UserError: if `batch`, the global batch size, is not a multiple of the device count.
    """
    import jax
    from jax.sharding import AxisType

    count = jax.device_count()
    if batch is not None and batch % count:
        raise UserError(
            f"A batch of {batch} images does not divide over {count} devices: "
            "choose a multiple (stage identities x images_per_identity) or fewer devices."
        )
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))


def shard(mesh, batch: dict) -> dict:
    """This host's rows of a batch, as global arrays sharded over the mesh."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    sharding = NamedSharding(mesh, PartitionSpec("data"))
    return {k: jax.make_array_from_process_local_data(sharding, np.asarray(v)) for k, v in batch.items()}


def replicate(mesh, tree):
    """The tree on every device."""
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


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
    import jax.numpy as jnp

    if kind == "jit":

        def compile_jit(make_step: Callable, config: Any) -> Callable:
            return jax.jit(make_step(config), donate_argnums=0)

        return Placement(compile_jit, partial(shard, mesh), partial(replicate, mesh), lambda tree: tree)

    n = mesh.size
    if jax.process_count() > 1:
        raise UserError(f'parallel=pmap maps the devices of one host, found {jax.process_count()} hosts: use "jit".')

    def compile_pmap(make_step: Callable, config: Any) -> Callable:
        return jax.pmap(make_step(config, "data"), axis_name="data", donate_argnums=0)

    def split(batch: dict) -> dict:
        return {k: np.asarray(v).reshape(n, len(v) // n, *np.shape(v)[1:]) for k, v in batch.items()}

    def copy(state: Any) -> Any:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *jnp.shape(x))), state)

    return Placement(compile_pmap, split, copy, lambda tree: jax.tree.map(lambda x: x[0], tree))


def prefetch(batches: Iterable, place: Callable, depth: int = 2) -> Iterator:
    """Puts batches on the device `depth` ahead of their use (device_put does not wait)."""
    ahead: list = []
    for batch in batches:
        ahead.append(place(batch))
        if len(ahead) > depth:
            yield ahead.pop(0)
    yield from ahead
