"""Many hosts: processes that join into one job, work in lockstep, and do not outlive each other in silence.

Process 0 alone reads and writes the workdir and prints; the others get what they need from it. So the workdir may
lie on a disk of its machine, while every host has its own copy of the dataset.
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

import numpy as np
from ml_collections import ConfigDict

from vpm_jax import config as config_lib
from vpm_jax import parallel
from vpm_jax.errors import UserError
from vpm_jax.keys import PROCESS, keys_with

T = TypeVar("T")

TIMEOUT = 60  # seconds of silence after which a process counts as gone
_EVERY = 1.0  # seconds between two signs of life
_JOINING = 300  # seconds that processes wait for each other at the start
# What the runtimes say to those whose peer has gone.
_PEER_GONE = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "Socket closed", "heartbeat", "preempt")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what `joined` reads."""
    group = parser.add_argument_group("many hosts", "one process on each host, or for each GPU: see launch/")
    group.add_argument(
        "--distributed", action="store_true", help="join as the cluster says (Cloud TPU, SLURM, Open MPI, Kubernetes)"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="join by hand: a free port of process 0's host")
    group.add_argument("--processes", type=int, metavar="N", help="how many there are")
    group.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
    group.add_argument(
        "--timeout",
        type=float,
        default=TIMEOUT,
        metavar="SECONDS",
        help="the job ends when a process has been silent for so long (default: %(default)s)",
    )


@contextlib.contextmanager
def joined(args: argparse.Namespace) -> Iterator[None]:
    """Makes this process one of a job's for the length of a block; nothing happens without the arguments for it.

    Call before JAX starts its backend. An exception in the block ends the processes of the whole job: this one says
    it, the others that this one stopped and why. So does a process that is silent for args.timeout seconds.

    Raises:
      UserError: for arguments that do not fit together, or processes that do not come.
    """
    by_hand = {"coordinator": args.coordinator, "processes": args.processes, "process": args.process}
    given = [key for key, value in by_hand.items() if value is not None]
    if not given and not args.distributed:
        yield
        return
    _check(args, given)
    import jax

    # Its handler of SIGTERM would take the place of ours, which stops all processes after the same step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        # Our watch comes first: it says who has gone and why; JAX's ends the process with a stack trace.
        jax.distributed.initialize(
            args.coordinator,
            args.processes,
            args.process,
            initialization_timeout=_JOINING,
            heartbeat_timeout_seconds=round(2 * args.timeout) + 30,
        )
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        where = args.coordinator or "the coordinator that the cluster names"
        raise UserError(
            f"The processes could not join at {where} within {_JOINING} s ({reason}): start all of them, on hosts "
            "that reach that address, with a port that is free."
        ) from error
    watch = _Watch(args.timeout)
    try:
        if jax.process_index():
            _be_quiet()
        yield
        watch.meet()  # nobody leaves while others work
    except BaseException as error:
        watch.leave(error)
    watch.end()
    jax.distributed.shutdown()


def _check(args: argparse.Namespace, given: list[str]) -> None:
    if args.distributed and given:
        raise UserError(f"--distributed takes all from the cluster, but --{given[0]} was given too: leave one out.")
    if given and len(given) < 3:
        raise UserError(f"--{given[0]} was given alone: give --coordinator HOST:PORT --processes N --process I.")
    if not args.timeout >= 5:
        raise UserError(f"--timeout is {args.timeout:g}, expected at least 5 seconds.")
    if given:
        host, _, port = args.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise UserError(f"--coordinator is {args.coordinator!r}, expected HOST:PORT, such as node0:12345.")
        if not 0 <= args.process < args.processes:
            raise UserError(f"--process is {args.process} of --processes {args.processes}, expected 0 to N - 1.")


def _be_quiet() -> None:
    """Output is process 0's; errors are everybody's."""
    sys.stdout.flush()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def are_many() -> bool:
    """Whether this process has joined others."""
    jax = sys.modules.get("jax")  # before JAX is needed, nobody has
    return jax is not None and jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process is the one that reads, writes and prints."""
    return not are_many() or sys.modules["jax"].process_index() == 0


def from_first(function: Callable[[], T]) -> T:
    """What function() returns on process 0, for all: bit for bit, whatever can be pickled. Others do not call it."""
    if not are_many():
        return function()
    from jax.experimental.multihost_utils import broadcast_one_to_all

    data = pickle.dumps(function()) if is_first() else b""
    size = int(broadcast_one_to_all(np.int32(len(data))))
    buffer = np.frombuffer(data, np.uint8) if is_first() else np.empty(size, np.uint8)
    return pickle.loads(np.asarray(broadcast_one_to_all(buffer)).tobytes())


def check_same(what: str, value: Any) -> None:
    """Raises UserError where `value` is not that of process 0, as with another copy of a dataset."""
    if from_first(lambda: value) != value:
        raise UserError(f"The {what} of {_me()} is not that of process 0: give every process the same.")


def check_job(resolved: ConfigDict, dataset: Any) -> None:
    """Raises UserError where the configuration or the dataset is not that of process 0."""
    splits = (dataset.train, dataset.query, dataset.gallery)
    names = hashlib.sha256(repr([(split.names, split.identity.tobytes()) for split in splits]).encode())
    check_same("dataset", names.hexdigest())
    own = keys_with(PROCESS)
    check_same("config", {key: value for key, value in config_lib.flatten(resolved).items() if key not in own})


def in_turn(function: Callable[[], T]) -> T:
    """function() on process 0, then on all others: the first makes files that the others find if they share a disk."""
    if is_first():
        value = function()
    from_first(lambda: None)  # waits for it
    return value if is_first() else function()


class Agreement:
    """Lets all processes act on a number that some have, such as a signal, after the same step.

    Every process calls it as often. Each call starts a maximum over all devices, of one integer each, beside the
    step's own sums, and returns that of LAG calls before: nobody waits for it. One process gets its number at once.
    """

    LAG = 2

    def __init__(self, mesh: Any):
        import jax
        import jax.numpy as jnp

        self._alone = not are_many()
        self._mesh = mesh
        self._max = jax.jit(jnp.max, out_shardings=parallel.everywhere(mesh))
        self._under_way: deque = deque()

    def __call__(self, number: int) -> int:
        import jax

        if self._alone:
            return number
        mine = np.full(len(self._mesh.local_devices), number, np.int32)
        self._under_way.append(self._max(parallel.shard(self._mesh, {"number": mine})["number"]))
        return int(jax.device_get(self._under_way.popleft())) if len(self._under_way) > self.LAG else 0


class _Watch:
    """A thread that gives signs of life, and ends this process when another has gone or failed.

    Through the coordinator, process 0: it declares gone whoever was silent for `timeout` seconds. A process that
    fails leaves its reason there. When process 0 itself is gone, nothing can be asked: that is a sign, too.
    """

    def __init__(self, timeout: float):
        import jax
        from jax._src import distributed  # no public way to the store that all processes share

        client: Any = distributed.global_state.client
        self._client = client
        self._index, self._count = jax.process_index(), jax.process_count()
        self._timeout, self._ended = timeout, threading.Event()
        self._client.key_value_set(f"vpm_jax/host/{self._index}", socket.gethostname())
        threading.Thread(target=self._run, daemon=True).start()

    def meet(self) -> None:
        """Waits for all."""
        self._client.wait_at_barrier("vpm_jax/end", 24 * 3600 * 1000)

    def end(self) -> None:
        self._ended.set()

    def leave(self, error: BaseException) -> NoReturn:
        """Ends this process for an error of its own, and tells the others; not at once if another's end caused it."""
        from vpm_jax import cli

        if not isinstance(error, UserError) and any(sign in str(error) for sign in _PEER_GONE):
            time.sleep(self._timeout + 10 * _EVERY)  # until the thread has found out who, and ended this process
        self.end()
        sentence = "Interrupted." if isinstance(error, KeyboardInterrupt) else cli.explain(error)
        if sentence is None:
            traceback.print_exception(error)
            sentence = f"{type(error).__name__}: {cli.first_line(error)}"
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
            time.sleep(5 * _EVERY)  # the others read the reason here
        os._exit(1)  # leaving in order would wait for processes that are gone

    def _run(self) -> None:
        heard: dict[str, tuple[str, float]] = {}
        beat = 0
        while not self._ended.wait(_EVERY):
            beat += 1
            try:
                self._client.key_value_set(f"vpm_jax/alive/{self._index}", str(beat), allow_overwrite=True)
                if self._index == 0:
                    self._find_silent(heard)
                stopped = dict(self._client.key_value_dir_get("vpm_jax/"))
                reason = next((text for key, text in stopped.items() if key.endswith("/stopped")), None)
            except Exception:
                reason = "process 0 is gone"
            if reason is not None and not self._ended.is_set():
                print(f"error: {_me()} stops: {reason}", file=sys.stderr)
                self._exit()

    def _find_silent(self, heard: dict[str, tuple[str, float]]) -> None:
        now = time.monotonic()
        for key, beat in self._client.key_value_dir_get("vpm_jax/alive/"):
            if key not in heard or heard[key][0] != beat:
                heard[key] = beat, now
        gone = [key.rpartition("/")[2] for key, (_, when) in heard.items() if now - when > self._timeout]
        if gone:
            hosts = dict(self._client.key_value_dir_get("vpm_jax/host/"))
            names = " and ".join(f"process {i} on {hosts.get(f'vpm_jax/host/{i}', 'its host')}" for i in sorted(gone))
            text = f"{names} gave no sign of life for {self._timeout:g} s: see what it said last, then start all again."
            self._client.key_value_set("vpm_jax/stopped", text)


def _me() -> str:
    import jax

    return f"process {jax.process_index()} of {jax.process_count()} on {socket.gethostname()}"
