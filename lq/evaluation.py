"""Accuracy, size and latency of a model, whatever it is stored as."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from lq.batches import model_inputs
from lq.engines import Runner, open_engine
from lq.engines.torch_runner import TorchRunner

WARM_UP, RUNS = 5, 30
_CPU = nn.Module()
"""Stands for the model where there is none: inputs of files stay on the CPU."""


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    Attributes:
        engine: What ran it.
        top1: Share of samples whose largest output is the target, 0..1.
        top5: Share of samples whose target is among the five largest outputs, or among all where
            there are fewer classes.
        n: Samples.
        latency_ms: Median time of a batch of one sample, in milliseconds.
        size_mb: Weights of a torch model, or the file, in 10^6 bytes.
        simulated: Whether the formats were simulated in float32: then the latency is not theirs.
    """

    engine: str
    top1: float
    top5: float
    n: int
    latency_ms: float
    size_mb: float
    simulated: bool


def evaluate(
    model: nn.Module | str | Path | Runner, batches: Iterable[Any], engine: str | None = None
) -> Evaluation:
    """Measure top-1, top-5, latency and size of a torch model, an ONNX file or an engine.

    Args:
        model: A module, the path of an ``.onnx`` or ``.engine`` file, or an open runner.
        batches: (input, target) pairs; targets are class numbers ``[N]``.
        engine: What runs an ``.onnx`` file: ``"onnxruntime"``, unless said otherwise, or
            ``"openvino"``.

    Raises:
        ValueError: If `batches` is empty or has no targets, or an output is not finite.

    Example:
        >>> batches = [(torch.eye(3), torch.tensor([0, 1, 1]))]
        >>> result = evaluate(nn.Identity(), batches)
        >>> round(result.top1, 3), result.top5, result.n
        (0.667, 1.0, 3)
    """
    runner = open_engine(model, engine)
    module = runner.model if isinstance(runner, TorchRunner) else _CPU
    with runner.many_runs():
        return _measured(runner, module, batches)


def _measured(runner: Runner, module: nn.Module, batches: Iterable[Any]) -> Evaluation:
    top1 = top5 = None
    one: tuple[tuple[Any, ...], dict[str, Any]] | None = None
    n = 0
    for batch in batches:
        target = _target(batch)
        args, kwargs = model_inputs(module, batch)
        logits = runner.run(*args, **kwargs)[0].float().cpu()
        if not logits.isfinite().all():
            raise ValueError(
                f"Expected finite outputs, but the batch after {n} samples gives NaN or infinity; "
                "look at its inputs."
            )
        if top1 is None or top5 is None:
            classes = logits.shape[1]
            top1 = MulticlassAccuracy(classes, average="micro")
            top5 = MulticlassAccuracy(classes, top_k=min(5, classes), average="micro")
            one = tuple(_first(x) for x in args), {k: _first(x) for k, x in kwargs.items()}
        top1.update(logits, target)
        top5.update(logits, target)
        n += len(target)
    if top1 is None or top5 is None or one is None:
        raise ValueError("Expected `batches` to hold at least one batch, but got none.")
    return Evaluation(
        engine=runner.name,
        top1=float(top1.compute()),
        top5=float(top5.compute()),
        n=n,
        latency_ms=_latency_ms(runner, *one),
        size_mb=runner.size_mb,
        simulated=runner.simulates,
    )


def _target(batch: Any) -> Tensor:
    if isinstance(batch, (list, tuple)) and len(batch) > 1 and isinstance(batch[-1], Tensor):
        return batch[-1].cpu()
    raise ValueError(
        f"Expected `batches` of (input, target) pairs, but got {type(batch).__name__}."
    )


def _first(x: Any) -> Any:
    return x[:1] if isinstance(x, Tensor) else x


def _latency_ms(runner: Runner, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
    times = []
    for _ in range(WARM_UP + RUNS):
        started = time.perf_counter()
        runner.run(*args, **kwargs)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[WARM_UP:]) * 1e3


def comparison_table(rows: Mapping[str, Evaluation]) -> str:
    """Return evaluations as a table of text; simulated integers have no latency to show.

    Example:
        >>> row = Evaluation("torch", 0.98, 1.0, 400, 1.2, 0.31, False)
        >>> print(comparison_table({"float": row}))
               engine   top-1    top-5   size MB   batch-1 ms
        float  torch   98.00%  100.00%     0.310         1.20
    """
    header = ["", "engine", "top-1", "top-5", "size MB", "batch-1 ms"]
    lines = [header] + [
        [
            name,
            row.engine,
            f"{row.top1:.2%}",
            f"{row.top5:.2%}",
            f"{row.size_mb:.3f}",
            "simulated" if row.simulated else f"{row.latency_ms:.2f}",
        ]
        for name, row in rows.items()
    ]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )
