"""Jobs of several processes, which work in lockstep and stop together.

Only process 0 prints and uses the workdir, and it sends the others what they need. The workdir may therefore be on a
local disk of its machine. Every host needs its own copy of the dataset.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import pickle
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax._src import distributed  # there is no public access to the key-value store
from jax.experimental.multihost_utils import broadcast_one_to_all
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vpm_jax import cli, parallel
from vpm_jax import config as config_lib
from vpm_jax.data.split import Dataset
from vpm_jax.errors import UserError, first_line
from vpm_jax.keys import PROCESS, keys_with

T = TypeVar("T")

_HEARTBEAT = 1.0  # seconds
_JOIN_TIMEOUT = 300  # seconds
# Fragments of the errors that the runtimes raise when a peer has died.
_PEER_GONE = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "Socket closed", "heartbeat", "preempt")


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """Joins this process to a job for the duration of the block, if the arguments of `cli.add_hosts` ask for it.

    Enter it before JAX starts its backend. The whole job ends when a process raises an exception in the block or is
    silent for args.timeout seconds; the other processes then report which one it was and why.

    Raises:
      UserError: for arguments that do not fit together, or processes that fail to join.
    """
    by_hand = {"coordinator": args.coordinator, "processes": args.processes, "process": args.process}
    given = [key for key, value in by_hand.items() if value is not None]
    if not given and not args.distributed:
        yield
        return
    _check(args, given)
    # JAX's SIGTERM handler would replace ours, which stops all processes after the same step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process,
            initialization_timeout=_JOIN_TIMEOUT,
            # Longer than ours: JAX's own heartbeat ends the process with a stack trace.
            heartbeat_timeout_seconds=round(2 * args.timeout) + 30,
        )
    except (RuntimeError, ValueError, OSError) as error:
        where = args.coordinator or "the coordinator that the cluster names"
        raise UserError(
            f"The processes could not join at {where} within {_JOIN_TIMEOUT} s ({first_line(error)}): start all of "
            "them, on hosts that can reach that address, with a free port."
        ) from error
    watch = _Watch(args.timeout)
    try:
        if jax.process_index():  # only process 0 prints
            sys.stdout.flush()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        yield
        watch.barrier()
    except BaseException as error:
        watch.fail(error)
    watch.end()
    jax.distributed.shutdown()


def _check(args: argparse.Namespace, given: list[str]) -> None:
    if args.distributed and given:
        raise UserError(f"--distributed and --{given[0]} exclude each other: leave one out.")
    if given and len(given) < 3:
        raise UserError(f"--{given[0]} is not enough: give all of --coordinator HOST:PORT --processes N --process I.")
    if not args.timeout >= 5:
        raise UserError(f"--timeout is {args.timeout:g}, expected at least 5 seconds.")
    if given:
        host, _, port = args.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator is {args.coordinator!r}, expected HOST:PORT, such as node0:12345.")
        if not 0 <= args.process < args.processes:
            raise UserError(
                f"--process is {args.process} with --processes {args.processes}, expected 0 to {args.processes - 1}."
            )


def are_many() -> bool:
    """Whether this process has joined others."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that reads, writes and prints."""
    return not are_many() or jax.process_index() == 0


def from_first(function: Callable[[], T]) -> T:
    """Calls function() on process 0 and returns its result, which must pickle, on all processes."""
    if not are_many():
        return function()
    data = pickle.dumps(function()) if is_first() else b""
    size = int(broadcast_one_to_all(np.int32(len(data))))
    buffer = np.frombuffer(data, np.uint8) if is_first() else np.empty(size, np.uint8)
    return pickle.loads(np.asarray(broadcast_one_to_all(buffer)).tobytes())


def check_same(name: str, value: Any) -> None:
    """Raises UserError if `value` differs from process 0's."""
    if from_first(lambda: value) != value:
        raise UserError(f"The {name} of {_me()} differs from that of process 0: give every process the same.")


def check_job(resolved: ConfigDict, dataset: Dataset) -> None:
    """Raises UserError if the config or the dataset differs from process 0's."""
    splits = (dataset.train, dataset.query, dataset.gallery)
    names = hashlib.sha256(repr([(split.names, split.identity.tobytes()) for split in splits]).encode())
    check_same("dataset", names.hexdigest())
    local = keys_with(PROCESS)
    check_same("config", {key: value for key, value in config_lib.flatten(resolved).items() if key not in local})


def in_turn(function: Callable[[], T]) -> T:
    """Calls function() on process 0 first, then on the others, which may use files that the first call made."""
    if is_first():
        value = function()
    from_first(lambda: None)  # waits for process 0
    return value if is_first() else function()


class Agreement:
    """Shares a number that only some processes have, such as a signal, so that all act on it after the same step.

    All processes must call it equally often. A call starts a maximum over all devices alongside the step and returns
    the result of LAG calls earlier, so that it never waits. A single process gets its own number at once.
    """

    LAG = 2

    def __init__(self, mesh: Mesh):
        self._alone = not are_many()
        self._mesh = mesh
        self._max = jax.jit(jnp.max, out_shardings=parallel.replicated(mesh))
        self._pending: deque[jax.Array] = deque()

    def __call__(self, number: int) -> int:
        if self._alone:
            return number
        numbers = np.full(len(self._mesh.local_devices), number, np.int32)
        self._pending.append(self._max(parallel.shard(self._mesh, numbers)))
        return int(jax.device_get(self._pending.popleft())) if len(self._pending) > self.LAG else 0


class _Watch:
    """A thread that sends heartbeats and ends this process when another one has died or failed.

    Heartbeats and the reasons of failures go through the coordinator. Process 0 declares a process dead after `timeout`
    seconds of silence. If the coordinator does not respond, process 0 itself has died.
    """

    def __init__(self, timeout: float):
        client: Any = distributed.global_state.client
        self._client = client
        self._index = jax.process_index()
        self._timeout, self._ended = timeout, threading.Event()
        self._client.key_value_set(f"vpm_jax/host/{self._index}", socket.gethostname())
        threading.Thread(target=self._run, daemon=True).start()

    def barrier(self) -> None:
        """Waits until all processes are done."""
        self._client.wait_at_barrier("vpm_jax/end", 24 * 3600 * 1000)

    def end(self) -> None:
        self._ended.set()

    def fail(self, error: BaseException) -> NoReturn:
        """Reports an error, to the other processes too, and ends this process."""
        if not isinstance(error, UserError) and any(sign in str(error) for sign in _PEER_GONE):
            time.sleep(self._timeout + 10 * _HEARTBEAT)  # a peer failed: leave it to the thread to report which
        self.end()
        sentence = "Interrupted." if isinstance(error, KeyboardInterrupt) else cli.explain(error)
        if sentence is None:
            traceback.print_exception(error)
            sentence = f"{type(error).__name__}: {first_line(error)}"
        else:
            print(f"error: {sentence}", file=sys.stderr)
        with contextlib.suppress(Exception):
            self._client.key_value_set("vpm_jax/stopped", f"{_me()} stopped: {sentence}")
        self._exit()

    def _exit(self) -> NoReturn:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        if self._index == 0:
            time.sleep(5 * _HEARTBEAT)  # time for the others to read the reason from this coordinator
        os._exit(1)  # a regular exit would wait for dead processes

    def _run(self) -> None:
        last_beats: dict[str, tuple[str, float]] = {}  # of each process, and when it was first seen
        beat = 0
        while not self._ended.wait(_HEARTBEAT):
            beat += 1
            try:
                self._client.key_value_set(f"vpm_jax/alive/{self._index}", str(beat), allow_overwrite=True)
                if self._index == 0:
                    self._check_heartbeats(last_beats)
                store = dict(self._client.key_value_dir_get("vpm_jax/"))
                reason = next((text for key, text in store.items() if key.endswith("/stopped")), None)
            except Exception:
                reason = "process 0 has died"
            if reason is not None and not self._ended.is_set():
                print(f"error: {_me()} stops: {reason}", file=sys.stderr)
                self._exit()

    def _check_heartbeats(self, last_beats: dict[str, tuple[str, float]]) -> None:
        now = time.monotonic()
        for key, beat in self._client.key_value_dir_get("vpm_jax/alive/"):
            if key not in last_beats or last_beats[key][0] != beat:
                last_beats[key] = beat, now
        dead = [key.rpartition("/")[2] for key, (_, when) in last_beats.items() if now - when > self._timeout]
        if dead:
            hosts = dict(self._client.key_value_dir_get("vpm_jax/host/"))
            names = " and ".join(f"process {i} on {hosts.get(f'vpm_jax/host/{i}', 'its host')}" for i in sorted(dead))
            text = f"no heartbeat from {names} for {self._timeout:g} s: see its last output, then start all again."
            self._client.key_value_set("vpm_jax/stopped", text)


def _me() -> str:
    return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
