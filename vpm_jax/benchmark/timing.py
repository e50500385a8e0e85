"""Timing: rates of iterators, best and repeated times of functions, contestants in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

Key = TypeVar("Key")


class Rate(NamedTuple):
    """A number of images, with wall-clock seconds and CPU seconds over all threads."""

    images: int
    wall: float
    cpu: float

    @property
    def per_second(self) -> float:
        return self.images / self.wall

    @property
    def per_core(self) -> float:
        """Images per second of CPU time, which does not depend on other load."""
        return self.images / self.cpu


def measure(counts: Iterable[int], seconds: float, warm_up: int = 1) -> Rate:
    """Consumes an iterator, which yields the number of images of each finished batch, for about `seconds`.

    Excludes the first `warm_up` batches, which include imports and filling caches and buffers.
    """
    iterator = iter(counts)
    for _ in range(warm_up):
        next(iterator)
    wall, cpu, images = time.perf_counter(), time.process_time(), 0
    for count in iterator:
        images += count
        if time.perf_counter() - wall >= seconds:
            break
    return Rate(images, time.perf_counter() - wall, time.process_time() - cpu)


def clocked(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """The seconds of one call, {"wall", "cpu": over this process's threads}, and its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


def best(work: Callable[[], object], seconds: float = 1.0, clock: str = "wall") -> float:
    """The seconds of the fastest call within about `seconds`, after a warm-up call."""
    work()
    fastest, started = float("inf"), time.perf_counter()
    while True:
        fastest = min(fastest, timed(work, clock)())
        if time.perf_counter() - started >= seconds:
            return fastest


def timed(work: Callable[[], object], clock: str) -> Callable[[], float]:
    """A function that does the work and returns its seconds, for `in_turn`."""
    return lambda: clocked(work)[0][clock]


def in_turn(contestants: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, list[float]]:
    """{name: results of its rounds}, run in the order A B C, A B C, ..., so that other load affects all alike."""
    times: dict[Key, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            times[name].append(run())
    return times


def matmul_size(platform: str) -> int:
    """The size n of the n x n products that measure a device's matmul limit: full speed in a fraction of a second."""
    return 2048 if platform == "cpu" else 8192
