"""What other callbacks found, for the loggers that can show it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
from torch import nn

from lq.callbacks.calibration import Calibration
from lq.callbacks.charts import Charts
from lq.callbacks.quantization_aware_training import QuantizationAwareTraining
from lq.callbacks.sensitivity_sweep import SensitivitySweep
from lq.plan import PrecisionPlan
from lq.sensitivity import Sensitivity
from lq.surgery import quantized_layers


class Findings:
    """Shows tables and figures of what other callbacks find, each once."""

    def __init__(self) -> None:
        self._shown: list[Any] = []

    def show(self, trainer: L.Trainer, charts: Charts, target: nn.Module | None = None) -> None:
        """Show what is new: calibrators, sensitivities, and the plan that a target follows."""
        for found, show in _found(trainer, target):
            if found is not None and not any(found == shown for shown in self._shown):
                self._shown.append(found)
                show(trainer, charts, found)


def _found(
    trainer: L.Trainer, target: nn.Module | None
) -> Iterator[tuple[Any, Callable[[L.Trainer, Charts, Any], None]]]:
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, (Calibration, QuantizationAwareTraining)):
            table = None if callback.ranges is None else callback.ranges.table()
            yield table, _show_calibrators
        elif isinstance(callback, SensitivitySweep):
            yield callback.result, _show_sensitivity
    if target is not None and quantized_layers(target):
        yield PrecisionPlan.of(target), _show_plan


def _show_calibrators(trainer: L.Trainer, charts: Charts, table: str) -> None:
    charts.table(trainer, "calibrators", table)


def _show_sensitivity(trainer: L.Trainer, charts: Charts, found: Sensitivity) -> None:
    charts.table(trainer, "sensitivity", found.table())


def _show_plan(trainer: L.Trainer, charts: Charts, plan: PrecisionPlan) -> None:
    width = max(map(len, plan))
    charts.table(trainer, "plan", "\n".join(f"{name:{width}}  {plan[name]}" for name in plan))
