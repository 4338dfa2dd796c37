"""How long a model takes for batches of some sizes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

WARM_UP, RUNS, SECONDS = 5, 100, 3.0
"""Runs that do not count; runs that do; and the seconds after which fewer are enough."""
LEAST_RUNS, LEAST_ROUNDS = 20, 10


@dataclass(frozen=True)
class Latency:
    """How long batches of one size took.

    Attributes:
        batch_size: Samples in a batch.
        threads: Threads that were asked for; 0 for the engine's own choice.
        p50_ms: Median time of a batch, in milliseconds.
        p90_ms: The time that 9 batches of 10 stay within.
        p99_ms: The time that 99 batches of 100 stay within.
        runs: Batches timed.
    """

    batch_size: int
    threads: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    runs: int

    @property
    def throughput(self) -> float:
        """Samples a second, one batch after the other."""
        return self.batch_size / self.p50_ms * 1e3


def time_runs(run: Callable[[], Any], batch_size: int = 1, threads: int = 0) -> Latency:
    """Call a function again and again, and return how long that took.

    After 5 calls to warm up, 100 are timed, or after three seconds as many as there were, but at
    least 20. On a GPU a call ends when its work is done.

    Args:
        run: What is timed.
        batch_size: How many samples it is for.
        threads: How many threads it has; for the record.

    Example:
        >>> found = time_runs(lambda: time.sleep(0.001))
        >>> found.runs, found.p50_ms >= 1
        (100, True)
    """
    for _ in range(WARM_UP):
        run()
    times: list[float] = []
    while len(times) < LEAST_RUNS or (len(times) < RUNS and sum(times) < SECONDS):
        times.append(_time(run))
    return latency_of([x * 1e3 for x in times], batch_size, threads)


def interleaved(
    runs: Mapping[str, Callable[[], Any]], rounds: int = RUNS, seconds: float = 2 * SECONDS
) -> dict[str, list[float]]:
    """Call functions in turn, round by round, and return the milliseconds of each call.

    What else goes on in the machine then comes upon all of them. Each round begins with another
    one. There are `rounds` of them, or as many as there were after some seconds, but at least 10.

    Example:
        >>> found = interleaved({"a": lambda: None, "b": lambda: time.sleep(0.001)}, rounds=12)
        >>> [len(times) for times in found.values()], min(found["b"]) > max(found["a"])
        ([12, 12], True)
    """
    for run in [*runs.values()] * WARM_UP:
        run()
    names, times = [*runs], {name: list[float]() for name in runs}
    ends = time.perf_counter() + seconds
    for i in range(rounds):
        if i >= LEAST_ROUNDS and time.perf_counter() > ends:
            break
        for name in names[i % len(names) :] + names[: i % len(names)]:
            times[name].append(_time(runs[name]) * 1e3)
    return times


def _time(run: Callable[[], Any]) -> float:
    """Return how many seconds a call takes, what it started on a GPU included."""
    _wait()
    started = time.perf_counter()
    run()
    _wait()
    return time.perf_counter() - started


def latency_of(times: Sequence[float], batch_size: int, threads: int) -> Latency:
    """Return the percentiles of some times in milliseconds."""
    p50, p90, p99 = (float(x) for x in np.percentile(times, [50, 90, 99]))
    return Latency(batch_size, threads, p50, p90, p99, len(times))


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def of_size(x: Any, size: int) -> Any:
    """Return a tensor with as many samples as asked for, repeated where it has fewer.

    Example:
        >>> of_size(torch.tensor([1, 2]), 3)
        tensor([1, 2, 1])
    """
    if not isinstance(x, Tensor) or not x.dim():
        return x
    return x[torch.arange(size, device=x.device) % len(x)]


def check_sizes(batch_sizes: Sequence[int], threads: Sequence[int]) -> None:
    """Raise a ``ValueError`` unless there are sizes of at least 1, and threads of at least 0."""
    for name, values, least in (("batch_sizes", batch_sizes, 1), ("threads", threads, 0)):
        if not values:
            raise ValueError(f"Expected `{name}` to hold at least one number, but got none.")
        for value in values:
            if value < least:
                raise ValueError(f"Expected `{name}` to be at least {least}, but got {value}.")
