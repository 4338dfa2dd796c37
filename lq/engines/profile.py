"""How long each node of a graph takes in an engine, by the engine's own profile."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lq.engines.onnxruntime_runner import OnnxRuntimeRunner
from lq.export.engine import EngineInfo
from lq.export.inspector import BuiltLayer

WARM_UP, RUNS = 5, 30
_ADDED = re.compile(r"^InsertedPrecisionFreeCast_|(_bn)?(_nchwc)?(_token_\d+)?_kernel_time$")
"""What ONNX Runtime adds to the names of nodes that it fuses, and to all of them in a profile."""


def profile_onnxruntime(
    graph: ir.Model, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, float]:
    """Return node or output -> median milliseconds in ONNX Runtime, on the CPU.

    Fused nodes go by the name of one of them: an integer layer's own, or the output of the last
    one where a layer takes in what follows it.
    """
    with tempfile.TemporaryDirectory() as folder:
        runner = OnnxRuntimeRunner.timed(graph, str(Path(folder, "profile")))
        for _ in range(WARM_UP + RUNS):
            runner.run(*args, **kwargs)
        events = json.loads(Path(runner.session.end_profiling()).read_text(encoding="utf-8"))
    return parse_onnxruntime_profile(events, skip=WARM_UP)


def parse_onnxruntime_profile(
    events: Iterable[Mapping[str, Any]], skip: int = 0
) -> dict[str, float]:
    """Return name -> median milliseconds, of the events in ONNX Runtime's profile.

    Example:
        >>> event = {"cat": "Node", "name": "conv_nchwc_kernel_time", "dur": 1500}
        >>> parse_onnxruntime_profile([event])
        {'conv': 1.5}
    """
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            times[event["name"]].append(event["dur"] / 1e3)
    found: dict[str, float] = defaultdict(float)
    for name, taken in times.items():
        found[_ADDED.sub("", name)] += statistics.median(taken[skip:] or taken)
    return dict(found)


def profile_tensorrt(
    path: str | Path, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, float]:
    """Return ONNX node -> median milliseconds in a TensorRT engine, on the GPU it was built for.

    Args:
        path: An engine that ``build_engine`` wrote, its JSON sidecar beside it.
        args: Inputs by place.
        kwargs: Inputs by name.
    """
    from lq.engines.tensorrt_runner import TensorRTRunner

    runner = TensorRTRunner(path)
    times: dict[str, list[float]] = defaultdict(list)

    class Profiler(runner.trt.IProfiler):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            runner.trt.IProfiler.__init__(self)

        def report_layer_time(self, name: str, ms: float) -> None:
            times[name].append(ms)

    profiler = runner.context.profiler = Profiler()
    for _ in range(WARM_UP + RUNS):
        runner.run(*args, **kwargs)
    del profiler
    medians = {name: statistics.median(taken[WARM_UP:] or taken) for name, taken in times.items()}
    return share_among_nodes(medians, EngineInfo.load(path).layers)


def share_among_nodes(times: Mapping[str, float], layers: Iterable[BuiltLayer]) -> dict[str, float]:
    """Return ONNX node -> milliseconds, of an engine's layers: equal parts for nodes fused in one.

    Example:
        >>> layers = [BuiltLayer("kernel", "conv", (), (), ("conv", "relu"))]
        >>> share_among_nodes({"kernel": 0.5, "copy": 0.1}, layers)
        {'conv': 0.25, 'relu': 0.25, 'copy': 0.1}
    """
    nodes = {layer.name: layer.onnx for layer in layers if layer.onnx}
    found: dict[str, float] = defaultdict(float)
    for name, taken in times.items():
        for node in nodes.get(name, (name,)):
            found[node] += taken / len(nodes.get(name, (name,)))
    return dict(found)
