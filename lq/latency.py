"""The time that each layer takes in each format, measured on the engine at hand."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import importlib
import json
import logging
import platform
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from lq.batches import model_inputs
from lq.calibration import calibrate
from lq.costs import Costs, count_costs
from lq.engines.base import Runner
from lq.engines.onnxruntime_runner import OnnxRuntimeRunner
from lq.engines.profile import profile_onnxruntime, profile_tensorrt
from lq.export.engine import build_engine, find_builder
from lq.export.onnxruntime_encoding import ENCODINGS
from lq.export.owners import node_owners, owner_by_name
from lq.export.to_onnx import trace
from lq.files import check_file_path, write_text
from lq.messages import one_line
from lq.plan import PrecisionPlan
from lq.samples import first_samples
from lq.spec import Recipe
from lq.surgery import dequantize, quantize, quantizers
from lq.timing import time_runs

log = logging.getLogger(__name__)
Times = dict[str, float]
"""Layer -> milliseconds; under "" what is no layer."""


def engine_at_hand() -> str:
    """Return ``tensorrt`` where there are a GPU and a builder, else ``onnxruntime``."""
    gpu = torch.cuda.is_available() and find_builder() is not None
    return "tensorrt" if gpu else "onnxruntime"


def hardware_name(engine: str) -> str:
    """Return what an engine runs on: the GPU, or the processor and its threads; and its version.

    Args:
        engine: ``tensorrt``, or a module that runs on the processor: ``onnxruntime``,
            ``openvino``, ``torch``.
    """
    if engine == "tensorrt":
        builder = find_builder()
        assert builder is not None
        return f"{torch.cuda.get_device_name()}, {builder.__name__} {builder.__version__}"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    library = importlib.import_module(engine)
    return f"{name} x {len(names) or '?'}, {engine} {library.__version__}"


def measure_latency(
    model: nn.Module,
    batch: Any,
    formats: Sequence[str] = ("int8", "fp16"),
    cache: str | Path | None = None,
    recipe: Recipe | str | Path = "onnxruntime_int8",
    costs: Costs | None = None,
) -> Costs:
    """Return what layers cost with the time that each takes in each format, measured here.

    The whole model is exported in one format after the other and run by the engine's profiler: by
    TensorRT where there is a GPU with it, else by ONNX Runtime on the CPU. Times are medians for
    one sample, scaled so that they add up to that of a run without the profiler. What a format adds
    to the time of no layer, as additions and conversions, is shared out over the layers. Changing
    formats between layers costs more, which is seen only when a plan as a whole is measured. What
    an engine cannot run is left out, with a log message.

    Args:
        model: The float model, or a quantized one.
        batch: One batch, whose first sample is run.
        formats: Formats besides fp32.
        cache: JSON file of times by hardware; what it has of this graph, recipe and image size is
            not measured again.
        recipe: What additions and pooling get.
        costs: What was counted of the layers, if it was.

    Raises:
        ValueError: If the cache is no such file.
    """
    costs = count_costs(model, batch) if costs is None else costs
    model = dequantize(copy.deepcopy(model))
    engine = engine_at_hand()
    hardware = hardware_name(engine)
    stored = _read_cache(cache)
    key = _key(model, batch, recipe)
    known: dict[str, Times] = dict(stored.get(hardware, {}).get(key, {}))
    for format in ("fp32", *formats):
        if format not in known:
            times = _layer_times(model, batch, format, recipe, engine)
            known |= {format: times} if times is not None else {}
    if cache is not None:
        stored.setdefault(hardware, {})[key] = known
        write_text(cache, json.dumps(stored, indent=1))
    return _with_times(costs, known, engine, hardware)


def _with_times(costs: Costs, known: Mapping[str, Times], engine: str, hardware: str) -> Costs:
    rest, count = known["fp32"].get("", 0.0), len(costs.layers)
    more = {f: (times.get("", 0.0) - rest) / count for f, times in known.items()}
    latency = {
        name: {f: max(times.get(name, 0.0) + more[f], 0.0) for f, times in known.items()}
        for name in costs.layers
    }
    return dataclasses.replace(
        costs, latency=latency, rest_ms=rest, engine=engine, hardware=hardware
    )


def _layer_times(
    model: nn.Module, batch: Any, format: str, recipe: Recipe | str | Path, engine: str
) -> Times | None:
    """Return layer -> milliseconds with all layers in a format, ``None`` where it does not run."""
    model = copy.deepcopy(model)
    plan = PrecisionPlan(dict.fromkeys(PrecisionPlan.of(model), format))
    quantize(model, Recipe.from_plan(plan, recipe))
    if quantizers(model):
        calibrate(model, [batch], progress=False)
    graph = _graph(model, batch, engine)
    owners = node_owners(graph.graph)
    try:
        args, kwargs = model_inputs(model, first_samples(batch, 1))
        found = _profile(graph, args, kwargs, engine)
        scale = _run_time(graph, args, kwargs, engine) / sum(found.values())
    except Exception as error:  # engines fail in their own ways on what they do not have
        if format == "fp32":
            raise
        log.warning("No latency of %s: %s cannot run it (%s).", format, engine, one_line(error))
        return None
    times: Times = defaultdict(float)
    for name, taken in found.items():
        times[owners.get(name) or owner_by_name(name, plan) or ""] += taken * scale
    unnamed = sorted(plan.keys() - times.keys())
    if unnamed:
        log.warning("The profile of %s has no time of %s: it counts as none.", format, unnamed)
    return dict(times)


def _profile(graph: ir.Model, args: Any, kwargs: Any, engine: str) -> Times:
    """Return node or kernel -> milliseconds."""
    if engine == "onnxruntime":
        return profile_onnxruntime(graph, args, kwargs)
    with tempfile.TemporaryDirectory() as folder:
        return profile_tensorrt(_built(graph, Path(folder)), args, kwargs)


def file_latency(model: nn.Module, batch: Any, engine: str) -> float:
    """Return the median milliseconds of one sample in the graph that a model exports to.

    Args:
        model: A quantized and calibrated model, or a float one.
        batch: One batch, whose first sample is run.
        engine: ``tensorrt`` or ``onnxruntime``.
    """
    args, kwargs = model_inputs(model, first_samples(batch, 1))
    return _run_time(_graph(model, batch, engine), args, kwargs, engine)


def _run_time(graph: ir.Model, args: Any, kwargs: Any, engine: str) -> float:
    """Return the median milliseconds of a run."""
    with tempfile.TemporaryDirectory() as folder:
        runner: Runner
        if engine == "onnxruntime":
            runner = OnnxRuntimeRunner.timed(graph)
        else:
            from lq.engines.tensorrt_runner import TensorRTRunner

            runner = TensorRTRunner(_built(graph, Path(folder)))
        return time_runs(lambda: runner.run(*args, **kwargs)).p50_ms


def _graph(model: nn.Module, batch: Any, engine: str) -> ir.Model:
    graph = trace(model, batch)
    if engine in ENCODINGS:
        ENCODINGS[engine](graph.graph)
    return graph


def _built(graph: ir.Model, folder: Path) -> Path:
    """Build a TensorRT engine of a graph."""
    ir.save(graph, folder / "model.onnx")
    build_engine(folder / "model.onnx", folder / "model.engine", batch=(1, 1, 1))
    return folder / "model.engine"


def _key(model: nn.Module, batch: Any, recipe: Recipe | str | Path) -> str:
    """Return what times depend on besides format and hardware: operations, shapes and recipe."""
    told = [Recipe.parse(recipe).to_json()]
    for node in trace(model, batch).graph:
        values = (*node.inputs, *node.outputs)
        told += [node.op_type, *(str(value.shape) for value in values if value is not None)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]


def _read_cache(path: str | Path | None) -> dict[str, dict[str, dict[str, Times]]]:
    if path is None:
        return {}
    check_file_path(path)
    if not Path(path).is_file():
        return {}
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        if not all(isinstance(models, dict) for models in stored.values()):
            raise ValueError("no times by hardware")
    except (ValueError, AttributeError) as error:
        raise ValueError(
            f"Expected {str(path)!r} to hold latencies that lq saved, but it cannot be read: "
            f"{error}; name another `cache`."
        ) from None
    return stored  # type: ignore[no-any-return]
