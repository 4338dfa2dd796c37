"""How many times as fast as the float model others are, measured in turn."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from lq.batches import model_inputs
from lq.engines import Runner, open_engine
from lq.engines.onnxruntime_runner import OnnxRuntimeRunner
from lq.export.graph import load_graph
from lq.messages import one_line
from lq.timing import Latency, interleaved, latency_of, of_size

log = logging.getLogger(__name__)
_Z = 1.959964
Setting = tuple[int, int]
"""Batch size, and threads."""


@dataclass(frozen=True)
class Speedup:
    """How many times as fast as the float model one is.

    Attributes:
        batch_size: Samples in a batch.
        threads: Threads; 0 for the engine's own choice.
        ratio: Median over the rounds of the float model's time by this one's.
        low: Lower end of the 95% interval of that median.
        high: Upper end.
    """

    batch_size: int
    threads: int
    ratio: float
    low: float
    high: float

    @property
    def setting(self) -> Setting:
        """Batch size and threads."""
        return self.batch_size, self.threads

    def __str__(self) -> str:
        return f"{self.ratio:.2f}x (95%: {self.low:.2f} .. {self.high:.2f})"


Speed = tuple[tuple[Latency, ...], tuple[Speedup, ...]]


def measure_speed(
    files: Mapping[str, Path],
    batch: Any,
    engine: str | None,
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (0,),
    progress: bool = True,
) -> dict[str, Speed]:
    """Time files in turn, round by round, and return latencies and speed-ups of each.

    What an engine does not run at a size or with a number of threads is left out, with a log
    message; where that is the float model, the whole setting. A TensorRT engine has no threads.

    Args:
        files: Name -> file; the first is the float model.
        batch: One batch of inputs.
        engine: What runs an ``.onnx`` file.
        batch_sizes: Sizes of batches.
        threads: Numbers of threads; 0 is the engine's own choice.
        progress: Show a progress bar.
    """
    asked = [(size, count) for count in threads for size in batch_sizes]
    found: dict[str, list[tuple[Latency, Speedup]]] = {name: [] for name in files}
    for size, count in tqdm(asked, "Timing", leave=False, disable=not progress):
        runs = {
            name: run for name in files if (run := _run(files[name], batch, engine, size, count))
        }
        reference = next(iter(files))
        times = interleaved(runs) if reference in runs else {}
        for name, own in times.items():
            pair = latency_of(own, size, count), speedup(times[reference], own, size, count)
            found[name].append(pair)
    return {
        name: (tuple(latency for latency, _ in pairs), tuple(ratio for _, ratio in pairs))
        for name, pairs in found.items()
    }


def _run(
    path: Path, batch: Any, engine: str | None, size: int, threads: int
) -> Callable[[], Any] | None:
    """Return what runs a file once, ``None`` where the engine does not run it so."""
    args, kwargs = model_inputs(nn.Module(), batch)
    args = tuple(of_size(x, size) for x in args)
    kwargs = {name: of_size(x, size) for name, x in kwargs.items()}
    try:
        runner = _opened(path, engine, threads)
        runner.run(*args, **kwargs)
    except Exception as error:  # engines fail in their own ways on what they do not have
        log.warning("No time of %s for %d samples: %s", path, size, one_line(error))
        return None
    return lambda: runner.run(*args, **kwargs)


def _opened(path: Path, engine: str | None, threads: int) -> Runner:
    if path.suffix == ".onnx" and engine in (None, "onnxruntime"):
        # 16-bit layers as ONNX Runtime runs them, without the rounding that makes results exact.
        return OnnxRuntimeRunner.timed(load_graph(path), threads=threads)
    if path.suffix == ".onnx":
        return open_engine(path, engine, threads)
    return open_engine(path)


def speedup(
    reference: Sequence[float], times: Sequence[float], batch_size: int = 1, threads: int = 0
) -> Speedup:
    """Return the median of the ratios of two series of times measured in turn.

    The interval is that of order statistics, ranks ``n / 2 -+ 1.96 sqrt(n) / 2`` (Conover 1999,
    "Practical Nonparametric Statistics", section 3.2): it assumes no distribution.

    Example:
        >>> str(speedup([2.0] * 30, [1.0] * 30))
        '2.00x (95%: 2.00 .. 2.00)'
    """
    ratios = np.sort(np.asarray(reference) / np.asarray(times))
    n, half = len(ratios), _Z * math.sqrt(len(ratios)) / 2
    low = ratios[max(math.floor(n / 2 - half) - 1, 0)]
    high = ratios[min(math.ceil(n / 2 + half), n - 1)]
    return Speedup(batch_size, threads, float(np.median(ratios)), float(low), float(high))
