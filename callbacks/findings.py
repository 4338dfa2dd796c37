"""What other callbacks found, for the loggers that can show it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
from torch import nn

from lq.callbacks.calibration import Calibration
from lq.callbacks.charts import Charts
from lq.callbacks.export import as_batch, detached
from lq.callbacks.quantization_aware_training import QuantizationAwareTraining
from lq.callbacks.sensitivity_sweep import SensitivitySweep
from lq.costs import Costs, count_costs
from lq.plan import PrecisionPlan
from lq.samples import first_samples
from lq.sensitivity import Sensitivity
from lq.surgery import quantized_layers

if TYPE_CHECKING:
    from matplotlib.figure import Figure


log = logging.getLogger(__name__)


class Findings:
    """Shows tables and figures of what other callbacks find, each once.

    Args:
        charts: What gives them to the loggers.
    """

    def __init__(self, charts: Charts) -> None:
        self.charts = charts
        self._shown: list[Any] = []
        self._costs: Costs | None = None
        self._batch: Any = None
        self._hook: Any = None
        self._has_plan = False
        self._loggers: list[int] = []

    def begin(self, loggers: Sequence[Any]) -> None:
        """Look for the plan again: in another run it may be another, and so may the loggers."""
        self._has_plan, self._costs, self._batch = False, None, None
        if [*map(id, loggers)] != self._loggers:
            self._shown, self._loggers = [], [*map(id, loggers)]

    def listen(self, trainer: L.Trainer, target: nn.Module) -> None:
        """Take note of the next call of the target, to count what its layers cost."""
        if not trainer.loggers or not trainer.is_global_zero:
            return
        # Where training is distributed, Lightning calls a training step by way of `forward`.
        redirected = isinstance(target, L.LightningModule) and trainer.world_size > 1
        known = self._costs is not None or self._batch is not None or self._hook is not None
        if not known and not redirected:
            self._hook = target.register_forward_pre_hook(self._keep, with_kwargs=True)

    def stop(self) -> None:
        """Listen no longer, and keep no batch."""
        self._unhook()
        self._batch = None

    def _unhook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def show(self, trainer: L.Trainer, target: nn.Module) -> None:
        """Show what is new: calibrators, sensitivities, and the plan that the target follows."""
        if not trainer.loggers or not trainer.is_global_zero:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, (Calibration, QuantizationAwareTraining)):
                if callback.ranges is not None:
                    self._table(trainer, "calibrators", callback.ranges.table())
            elif isinstance(callback, SensitivitySweep) and callback.result is not None:
                self._show_sensitivity(trainer, callback.result)
        # A look takes a while, and within a run the plan stays; its costs may become known.
        if quantized_layers(target) and (self._batch is not None or not self._has_plan):
            self._show_plan(trainer, target)
            self._has_plan = True

    def _show_sensitivity(self, trainer: L.Trainer, found: Sensitivity) -> None:
        from lq.plots import plot_sensitivity_heatmap  # which imports matplotlib

        self._table(trainer, "sensitivity", found.table())
        self._figure(trainer, "sensitivity", found, lambda: plot_sensitivity_heatmap(found))

    def _show_plan(self, trainer: L.Trainer, target: nn.Module) -> None:
        from lq.plots import plot_plan

        plan = PrecisionPlan.of(target)
        width = max(map(len, plan))
        rows = (f"{name:{width}}  {format}" for name, format in plan.items())
        self._table(trainer, "plan", "\n".join(rows))
        if self._batch is not None:
            batch, self._batch = self._batch, None
            try:
                self._costs = count_costs(target, batch)
            except Exception:  # what is only drawn must not end a training
                log.exception("No picture of the plan: its costs cannot be counted.")
        costs = self._costs
        if costs is not None:
            self._figure(trainer, "plan", plan, lambda: plot_plan(plan, costs))

    def _table(self, trainer: L.Trainer, tag: str, text: str) -> None:
        if text not in self._shown:
            self._shown.append(text)
            self.charts.table(trainer, tag, text)

    def _figure(self, trainer: L.Trainer, tag: str, found: Any, draw: Callable[[], Figure]) -> None:
        if not any(found is shown or found == shown for shown in self._shown):
            self._shown.append(found)
            self.charts.figure(trainer, f"{tag}/figure", draw)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._batch = first_samples(detached(as_batch(module, args, kwargs)), 1)
        self._unhook()
