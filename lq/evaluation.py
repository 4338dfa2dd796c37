"""Accuracy, agreement, size, memory and latency of a model, whatever it is stored as."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from lq.batches import check_batches, check_repeatable, class_targets, model_inputs
from lq.engines import Runner, open_engine
from lq.engines.torch_runner import TorchRunner
from lq.outcome import Outcome, OutcomeMeter
from lq.paired import Drop
from lq.peak_memory import peak_memory
from lq.sensitivity.plain import to_plain
from lq.tables import aligned
from lq.timing import Latency, check_sizes, of_size, time_runs

_MAYBE_NAN = ("latency_ms", "loss", "calibration_error")
_CPU = nn.Module()
"""Stands for the model where there is none: inputs of files stay on the CPU."""


@dataclass(frozen=True)
class Versus:
    """A model beside the float one, on the same samples.

    Attributes:
        agreement: Share of samples for which both predict the same class, 0..1.
        drop: Accuracy lost, with its 95% interval.
        class_drops: Class -> accuracy lost on its samples.
    """

    agreement: float
    drop: Drop
    class_drops: Mapping[int, float]


@dataclass(frozen=True)
class Evaluation:
    """What was measured of one model.

    Attributes:
        engine: What ran it.
        top1: Share of samples whose largest output is the target, 0..1.
        top5: Share of samples whose target is among the five largest outputs, or among all where
            there are fewer classes.
        n: Samples; of a dense output its places.
        latency_ms: Median time of a batch, in milliseconds: of one sample, unless other sizes were
            asked for; the first of `latencies`.
        size_mb: Weights of a torch model, or the file, in 10^6 bytes.
        simulated: Whether the formats were simulated in float32: then the latency is not theirs.
        loss: Mean cross-entropy, in nats.
        calibration_error: Mean distance between confidence and accuracy, 0..1.
        weights_mb: The weights alone, in 10^6 bytes; ``None`` where the engine does not tell.
        peak_memory_mb: By how much opening and running grew the memory in use at most, in 10^6
            bytes; ``None`` where the system does not tell.
        latencies: Times for every batch size and number of threads that was asked for.
        versus: The model beside the reference, if there was one.
    """

    engine: str
    top1: float
    top5: float
    n: int
    latency_ms: float
    size_mb: float
    simulated: bool
    loss: float = math.nan
    calibration_error: float = math.nan
    weights_mb: float | None = None
    peak_memory_mb: float | None = None
    latencies: tuple[Latency, ...] = ()
    versus: Versus | None = None

    def __str__(self) -> str:
        timed = not math.isnan(self.latency_ms)
        time = f"{self.latency_ms:.2f} ms for one sample" if timed else "not timed"
        time = "time simulated" if self.simulated else time
        parts = [f"top-1 {self.top1:.2%}", f"top-5 {self.top5:.2%}", f"loss {self.loss:.4f}"]
        if self.versus is not None:
            parts += [str(self.versus.drop), f"agreement {self.versus.agreement:.2%}"]
        return f"{self.engine}: {', '.join(parts)}, {self.n} samples; {time}, {self.size_mb:.3f} MB"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, strict JSON's; ``from_dict`` gives it back."""
        plain: dict[str, Any] = to_plain(dataclasses.asdict(self))
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """Return the evaluation that ``to_dict`` wrote, also by way of JSON."""
        latencies = tuple(Latency(**row) for row in values.get("latencies", ()))
        versus = values.get("versus")
        if versus is not None:
            drops = {int(c): drop for c, drop in versus["class_drops"].items()}
            versus = Versus(versus["agreement"], Drop(**versus["drop"]), drops)
        numbers = {name: float(values[name]) for name in _MAYBE_NAN if name in values}
        return cls(**{**values, **numbers, "latencies": latencies, "versus": versus})


def evaluate(
    model: nn.Module | str | Path | Runner,
    batches: Iterable[Any],
    engine: str | None = None,
    reference: nn.Module | str | Path | Runner | Outcome | None = None,
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (0,),
    progress: bool = True,
) -> Evaluation:
    """Measure accuracy, latency, size and memory of a torch model, an ONNX file or an engine.

    The time of fake-quant in torch is that of a simulation, and marked so.

    Args:
        model: A module, the path of an ``.onnx`` or ``.engine`` file, or an open runner.
        batches: (input, target) pairs, or mappings with labels; targets are class numbers ``[N]``.
        engine: What runs an ``.onnx`` file: ``"onnxruntime"``, unless said otherwise, or
            ``"openvino"``.
        reference: The float model, to compare with: sample by sample, so `batches` must come in
            the same order each time; or what ``outcome_of`` found of it.
        batch_sizes: Sizes of the batches that are timed; of a file for one size only, that size.
        threads: Numbers of threads they are timed with; 0 is the engine's own choice.
        progress: Show a progress bar.

    Raises:
        ValueError: If `batches` is empty or has no targets, an output is not finite, or the
            reference saw other samples.

    Example:
        >>> import torch
        >>> batches = [(torch.eye(3), torch.tensor([0, 1, 1]))]
        >>> result = evaluate(nn.Identity(), batches, progress=False)
        >>> round(result.top1, 3), result.top5, result.n
        (0.667, 1.0, 3)
    """
    check_sizes(batch_sizes, threads)
    settings = [(size, count) for count in threads for size in batch_sizes]
    return evaluate_outcome(model, batches, settings, engine, reference, progress)[0]


def evaluate_outcome(
    model: nn.Module | str | Path | Runner,
    batches: Iterable[Any],
    settings: Sequence[tuple[int, int]],
    engine: str | None = None,
    reference: nn.Module | str | Path | Runner | Outcome | None = None,
    progress: bool = True,
) -> tuple[Evaluation, Outcome]:
    """Do what ``evaluate`` does, and return also what the model says of each sample.

    It is timed for `settings`: batch sizes, each with its threads. Without any the latency is NaN.
    """
    check_batches(batches)
    if reference is not None and not isinstance(reference, Outcome):
        check_repeatable(batches, "batches")
        reference = outcome_of(open_engine(reference), batches, progress)
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError("Expected `batches` to hold at least one batch, but got none.")
    with peak_memory() as peak:
        runner = open_engine(model, engine, settings[0][1] if settings else 0)
        latencies = [_timed(runner, first, *setting) for setting in settings[:1]]
        if not settings:
            outcome_of(runner, [first], progress=False)
    for size, count in settings[1:]:
        latencies.append(_timed(open_engine(model, engine, count), first, size, count))
    outcome = outcome_of(runner, chain([first], rest), progress)
    found = Evaluation(
        engine=runner.name,
        top1=outcome.top1,
        top5=outcome.top5,
        n=len(outcome.target),
        latency_ms=latencies[0].p50_ms if latencies else math.nan,
        size_mb=runner.size_mb,
        simulated=runner.simulates,
        loss=outcome.loss,
        calibration_error=outcome.calibration_error,
        weights_mb=runner.weights_mb,
        peak_memory_mb=peak.mb,
        latencies=tuple(latencies),
        versus=None if reference is None else _beside(outcome, reference),
    )
    return found, outcome


def outcome_of(runner: Runner, batches: Iterable[Any], progress: bool = True) -> Outcome:
    """Return what a model says of samples whose class is known.

    Args:
        runner: The model, as ``lq.open_engine`` returns it.
        batches: (input, target) pairs, or mappings with labels.
        progress: Show a progress bar.

    Raises:
        ValueError: If a batch has no class numbers, or an output is not finite.
    """
    meter = OutcomeMeter()
    shown = tqdm(batches, desc=f"Evaluate {runner.name}", leave=False, disable=not progress)
    with runner.many_runs():
        for batch in shown:
            args, kwargs = model_inputs(_module(runner), batch)
            logits = runner.run(*args, **kwargs)[0].float().cpu()
            target = class_targets(batch, logits)
            if target is None:
                raise ValueError(
                    "Expected `batches` of (input, target) pairs with class numbers, or of "
                    f"mappings with labels, but got {type(batch).__name__}."
                )
            meter.add(logits, target)
    return meter.result()


def _beside(outcome: Outcome, reference: Outcome) -> Versus:
    return Versus(
        outcome.agreement(reference), outcome.drop(reference), outcome.class_drops(reference)
    )


def _module(runner: Runner) -> nn.Module:
    return runner.model if isinstance(runner, TorchRunner) else _CPU


def _timed(runner: Runner, batch: Any, size: int, threads: int) -> Latency:
    given, named = model_inputs(_module(runner), batch)
    args = [of_size(x, size) for x in given]
    kwargs = {name: of_size(x, size) for name, x in named.items()}
    with runner.many_runs():
        return time_runs(lambda: runner.run(*args, **kwargs), size, threads)


def comparison_table(rows: Mapping[str, Evaluation]) -> str:
    """Return evaluations as a table of text; simulated integers have no latency to show.

    With the drop to the float model, its 95% interval and the agreement, where one was compared.

    Example:
        >>> row = Evaluation("torch", 0.98, 1.0, 400, 1.2, 0.31, False)
        >>> print(comparison_table({"float": row}))
               engine   top-1    top-5   size MB   batch-1 ms
        float  torch   98.00%  100.00%     0.310         1.20
    """
    header = ["", "engine", "top-1", "top-5", "size MB", "batch-1 ms"]
    beside = any(row.versus is not None for row in rows.values())
    header += ["drop (95%)", "agreement"] if beside else []
    lines = [header] + [
        [
            name,
            row.engine,
            f"{row.top1:.2%}",
            f"{row.top5:.2%}",
            f"{row.size_mb:.3f}",
            "simulated" if row.simulated else f"{row.latency_ms:.2f}",
            *(_versus_cells(row.versus) if beside else ()),
        ]
        for name, row in rows.items()
    ]
    return aligned(lines, left=(0, 1))


def _versus_cells(versus: Versus | None) -> tuple[str, str]:
    if versus is None:
        return "", ""
    drop = versus.drop
    return f"{drop.mean:+.2%} ({drop.low:+.2%} .. {drop.high:+.2%})", f"{versus.agreement:.2%}"
