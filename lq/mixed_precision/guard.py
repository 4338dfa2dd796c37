"""A ladder from the cheapest remedy to the dearest, climbed until the limits are kept."""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lq.calibration import calibrate
from lq.costs import Costs
from lq.mixed_precision.bench import Bench, find_costs
from lq.mixed_precision.constraints import PrecisionConstraints, UnreachableError, keeps_to
from lq.mixed_precision.searching import search
from lq.mixed_precision.verify import verified_search
from lq.paired import Drop
from lq.plan import PrecisionPlan
from lq.repairs import METHODS, repair
from lq.sensitivity import Sensitivity, sweep
from lq.spec import Recipe

log = logging.getLogger(__name__)
FinetuneFunction = Callable[[nn.Module], nn.Module | None]


@dataclass(frozen=True)
class Rung:
    """One remedy, what it cost and what it brought.

    Attributes:
        name: ``ptq``, ``repair``, ``mixed precision`` or ``qat``.
        plan: The formats of the layers.
        drop: Accuracy lost against the float model; ``None`` where the rung came to nothing.
        size_mb: Size of the weights, counted.
        gain: By how much the drop is smaller than on the rung before.
        seconds: What it cost.
        kept: Whether all limits are kept.
        note: What else there is to say.
    """

    name: str
    plan: PrecisionPlan | None = None
    drop: Drop | None = None
    size_mb: float | None = None
    gain: float | None = None
    seconds: float = 0.0
    kept: bool = False
    note: str = ""

    def __str__(self) -> str:
        parts = [str(self.drop)] if self.drop is not None else []
        parts += [f"gain {self.gain:+.2%}"] if self.gain is not None else []
        parts += [f"{self.size_mb:.3f} MB"] if self.size_mb is not None else []
        parts += [repr(self.plan)] if self.plan is not None else []
        parts += [f"{self.seconds:.1f} s", "kept" if self.kept else "not enough"]
        return f"{self.name}: {', '.join(parts)}{'. ' * bool(self.note)}{self.note}"


@dataclass(frozen=True)
class GuardReport:
    """How far the ladder was climbed.

    Attributes:
        model: The quantized model of the last rung that was measured, or the best of them where
            none is enough.
        plan: The formats of its layers.
        kept: Whether it keeps to all limits.
        rungs: All rungs that were climbed, in order.
    """

    model: nn.Module
    plan: PrecisionPlan
    kept: bool
    rungs: Sequence[Rung]

    def __str__(self) -> str:
        return "\n".join(map(str, self.rungs))


def accuracy_guard(
    model: nn.Module,
    batches: Iterable[Any],
    held_out: Iterable[Any],
    constraints: PrecisionConstraints,
    finetune: FinetuneFunction | None = None,
    recipe: Recipe | str | Path = "tensorrt_int8",
    formats: Sequence[str] = ("int8", "fp16"),
    calibrator: str = "auto",
    sensitivity: Sensitivity | None = None,
    costs: Costs | None = None,
    progress: bool = True,
    journal: str | Path | None = None,
) -> GuardReport:
    """Quantize a model with the least effort that keeps to the limits.

    Post-training quantization; the same with repair; mixed precision, each plan repaired where
    that helped; then training of what the cost limits leave. The first rung that keeps to all
    limits is the last. A drop counts with the upper end of its interval.

    Args:
        model: The float model; it stays as it is.
        batches: Calibration batches; the layers are swept on them too.
        held_out: (input, target) pairs to measure on.
        constraints: The limits.
        finetune: Trains a quantized, calibrated model in place, or returns another one; without
            it the ladder ends before.
        recipe: What post-training quantization does, and which additions are quantized.
        formats: Formats for mixed precision, besides fp32.
        calibrator: How ranges are found.
        sensitivity: What a sweep found already.
        costs: What layers cost, as for ``verified_search``.
        progress: Show progress bars.
        journal: File that keeps what the sweep measured, as for ``lq.sweep``.

    Raises:
        ValueError: If `held_out` has too few samples to show so small a drop.

    Example:
        >>> import torch
        >>> from lq.models import digits_cnn
        >>> _ = torch.manual_seed(0)
        >>> data = [(torch.randn(64, 1, 8, 8), torch.randint(10, (64,))) for _ in range(4)]
        >>> report = accuracy_guard(digits_cnn().eval(), data[:2], data[2:],
        ...                         PrecisionConstraints(max_accuracy_drop=0.5), progress=False)
        >>> report.kept, [rung.name for rung in report.rungs]
        (True, ['ptq'])
    """
    costs = costs or find_costs(model, next(iter(batches)), constraints, formats, recipe)
    units = {} if sensitivity is None else sensitivity.units
    constraints.check_pins([*units, *costs.layers])
    constraints = constraints.by_layer(units)
    ladder = _Ladder(model, batches, held_out, constraints, recipe, calibrator, costs, progress)
    rungs: dict[str, Callable[[], nn.Module]] = {
        "ptq": ladder.calibrated,
        "repair": ladder.repaired,
        "mixed precision": lambda: ladder.mixed(tuple(formats), sensitivity, journal),
    }
    if finetune is not None:
        rungs["qat"] = lambda: ladder.trained(finetune)
    for name, climb in rungs.items():
        if ladder.climb(name, climb).kept:
            break
    return ladder.report()


class _Ladder:
    """The rungs, each with what those below it found."""

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        held_out: Iterable[Any],
        constraints: PrecisionConstraints,
        recipe: Recipe | str | Path,
        calibrator: str,
        costs: Costs,
        progress: bool,
    ) -> None:
        self.model, self.batches, self.held_out = model, batches, held_out
        self.constraints, self.recipe = constraints, recipe
        self.calibrator, self.progress = calibrator, progress
        self.bench = Bench(model, batches, held_out, recipe, self._prepare)
        self.bench.check_provable(constraints)
        self.costs = costs
        self.limits = constraints.limits(self.costs)
        self.repairs: tuple[str, ...] = ()
        self.sensitivity: Sensitivity | None = None
        self.climbed: list[tuple[Rung, nn.Module | None]] = []

    def climb(self, name: str, climb: Callable[[], nn.Module]) -> Rung:
        """Try a rung, measure it, and note what it cost and brought."""
        started = time.perf_counter()
        model, note = None, ""
        try:
            model = climb()
        except UnreachableError as error:
            model, note = error.nearest, str(error)
        rung = Rung(name) if model is None else self._measured(name, model)
        rung = dataclasses.replace(rung, note=note, seconds=time.perf_counter() - started)
        self.climbed.append((rung, model))
        log.info("%s", rung)
        return rung

    def calibrated(self) -> nn.Module:
        """Return the model quantized as recipe and pins say, and calibrated."""
        pins = {name: self.constraints.pin(name) for name in self.costs.layers}
        pinned = {name: format for name, format in pins.items() if format is not None}
        return self.bench.prepared(pinned)

    def repaired(self) -> nn.Module:
        """Return the same, repaired."""
        model = copy.deepcopy(self._last())
        self.repairs = self._repair(model, METHODS)
        return model

    def mixed(
        self, formats: tuple[str, ...], found: Sensitivity | None, journal: str | Path | None
    ) -> nn.Module:
        """Return the model with the best plan that keeps to the limits, measured."""
        self.sensitivity = found or sweep(
            self.model,
            self.batches,
            formats,
            metric="kl",
            recipe=self.recipe,
            journal=journal,
            progress=self.progress,
        )
        return verified_search(
            self.model,
            self.sensitivity,
            self.constraints,
            self.batches,
            self.held_out,
            self.costs,
            self.recipe,
            self._prepare,
        ).model

    def trained(self, finetune: FinetuneFunction) -> nn.Module:
        """Return a trained model, with the plan that the cost limits leave, if there are any.

        Where no plan of the formats keeps to them, but an earlier rung does, with what it left.
        """
        model: nn.Module | None
        free = [name for name in self.constraints.limited if name != "max_accuracy_drop"]
        if free and self.sensitivity is not None:
            within = dataclasses.replace(self.constraints, max_accuracy_drop=None)
            try:
                model = self.bench.prepared(search(self.sensitivity, within, self.costs))
            except UnreachableError:
                model = self._within_costs()
                if model is None:
                    raise
        else:
            model = self.calibrated()
        return finetune(model) or model

    def _within_costs(self) -> nn.Module | None:
        """Return a copy of the best model so far that keeps to all limits but the drop's."""
        limits = [limit for limit in self.limits if limit.quantity != "drop"]
        found = [
            (rung, model)
            for rung, model in self.climbed
            if model is not None and rung.plan is not None
            if keeps_to(limits, self._values(rung.plan, model))
        ]
        best = min(found, key=lambda pair: _upper(pair[0]), default=None)
        return None if best is None else copy.deepcopy(best[1])

    def report(self) -> GuardReport:
        """Return the last rung that was measured if it is enough, else the best of all."""
        found = [(rung, model) for rung, model in self.climbed if model is not None]
        rung, model = min(found, key=lambda pair: (not pair[0].kept, _upper(pair[0])))
        assert rung.plan is not None
        return GuardReport(model, rung.plan, rung.kept, [rung for rung, _ in self.climbed])

    def _prepare(self, model: nn.Module) -> None:
        calibrate(model, self.batches, self.calibrator, self.progress)
        if self.repairs:
            self._repair(model, self.repairs)

    def _repair(self, model: nn.Module, methods: Sequence[str]) -> tuple[str, ...]:
        """Repair a model, and return what helped."""
        report = repair(model, self.batches, self.held_out, methods, self.calibrator, self.progress)
        return tuple(step.method for step in report.steps if step.kept)

    def _last(self) -> nn.Module:
        model = self.climbed[-1][1]
        assert model is not None
        return model

    def _latency(self, model: nn.Module, plan: PrecisionPlan) -> float:
        """Return what was measured, or predicted where no engine is named to measure with."""
        measured = self.bench.latency(model, self.costs.engine)
        return self.costs.total("latency_ms", plan) if measured is None else measured

    def _measured(self, name: str, model: nn.Module) -> Rung:
        plan, drop = PrecisionPlan.of(model), self.bench.drop(model)
        values = {"drop": drop.high, **self._values(plan, model)}
        before = [rung.drop.mean for rung, _ in self.climbed if rung.drop is not None]
        gain = before[-1] - drop.mean if before else None
        kept = keeps_to(self.limits, values) and self.constraints.allows(plan)
        return Rung(name, plan, drop, values["size_mb"], gain, kept=kept)

    def _values(self, plan: PrecisionPlan, model: nn.Module) -> dict[str, float]:
        """Return what a model costs."""
        values = {name: self.costs.total(name, plan) for name in ("size_mb", "bitops")}
        if any(limit.quantity == "latency_ms" for limit in self.limits):
            values["latency_ms"] = self._latency(model, plan)
        return values


def _upper(rung: Rung) -> float:
    return math.inf if rung.drop is None else rung.drop.high
