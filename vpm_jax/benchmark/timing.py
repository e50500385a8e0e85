"""Clocks: rates of iterators, best and median times of functions, two contestants in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

Key = TypeVar("Key")


class Rate(NamedTuple):
    """What was measured: images, seconds on the clock, seconds of CPU over all threads."""

    images: int
    wall: float
    cpu: float

    @property
    def per_second(self) -> float:
        return self.images / self.wall

    @property
    def per_core(self) -> float:
        """Images per second of CPU time: what a core gives, however busy the machine is with other things."""
        return self.images / self.cpu


def measure(counts: Iterable[int], seconds: float, warm_up: int = 1) -> Rate:
    """Takes image counts from an iterator, each when the images are done, for about `seconds`.

    The first `warm_up` are not counted: they pay for imports, caches and the filling of buffers.
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
    """The seconds of one call, {"wall": on the clock, "cpu": of CPU over this process's threads}, and its result."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


def best(work: Callable[[], object], seconds: float = 1.0, clock: str = "wall") -> float:
    """The seconds of the fastest call in about `seconds`, after one that is not counted."""
    work()
    fastest, started = float("inf"), time.perf_counter()
    while True:
        fastest = min(fastest, timed(work, clock)())
        if time.perf_counter() - started >= seconds:
            return fastest


def timed(work: Callable[[], object], clock: str) -> Callable[[], float]:
    """The function that does the work and returns its seconds, for `in_turn`."""
    return lambda: clocked(work)[0][clock]


def in_turn(contestants: Mapping[Key, Callable[[], float]], rounds: int) -> dict[Key, list[float]]:
    """{name: what each round returned}, A B C, A B C, ...: whatever else the machine does, it does to all of them."""
    times: dict[Key, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items():
            times[name].append(run())
    return times


def matmul_size(platform: str) -> int:
    """n of the n x n products that stand for a device's matmul limit: at full speed, a fraction of a second."""
    return 2048 if platform == "cpu" else 8192
