"""What the quantizers do, as curves, histograms, figures and tables."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning as L
from torch import Tensor
from torch.optim import Optimizer

from lq.callbacks.charts import Charts
from lq.callbacks.findings import Findings
from lq.callbacks.oscillation import OscillationControl
from lq.callbacks.run_settings import log_settings
from lq.callbacks.target import target_module
from lq.quantizer_watch import QuantizerWatch
from lq.surgery import quantizers


class QuantizerMonitor(L.Callback):
    """Logs how well every quantizer does, at an interval.

    ``quantizer/<name>/...`` are, each of one training batch, ``sqnr_db``, the
    signal-to-quantization-noise ratio; ``clip_rate``, the share of values beyond the range;
    ``dead_channels``, the share of channels that are all zero, 1 of a dead quantizer; ``scale`` and
    ``amax``, means over channels; ``drift``, by how much the range has grown since it was
    calibrated, 0.1 for a tenth; ``scale_gradient``, the norm of a learned range's gradient; and
    ``oscillation``, the share of weights that oscillate, where OscillationControl looks.

    TensorBoard also gets histograms, a layout that groups the curves by layers, the table of
    calibrators, sensitivities and plans that other callbacks find, and, for its HParams tab, the
    settings of the quantization with the results that EngineComparison measures: accuracy, drop,
    size, latency. Loggers without one of these get the rest. Between the measured steps nothing
    runs.

    Args:
        every_n_steps: Measure one step in so many, and the first after calibration.
        histogram_every_n_steps: Show how weights are distributed in one step in so many; 0 never.
        input_histograms: Show the same of what the input quantizers are given.
        module: Submodule to watch; a QuantModule's model, or the whole module, if not given.

    Example:
        >>> L.Trainer(callbacks=QuantizerMonitor(histogram_every_n_steps=500), logger=False)
        <lightning.pytorch.trainer.trainer.Trainer object at 0x...>
    """

    def __init__(
        self,
        every_n_steps: int = 100,
        histogram_every_n_steps: int = 0,
        input_histograms: bool = False,
        module: str | None = None,
    ) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Expected `every_n_steps` to be at least 1, but got {every_n_steps}.")
        if histogram_every_n_steps < 0:
            raise ValueError(
                "Expected `histogram_every_n_steps` to be at least 0, but got "
                f"{histogram_every_n_steps}."
            )
        self.every_n_steps, self.module = every_n_steps, module
        self.histogram_every_n_steps = histogram_every_n_steps
        self.input_histograms = input_histograms
        self._charts = Charts()
        self._findings = Findings(self._charts)
        self._watch = QuantizerWatch()
        self._has_begun = False

    @property
    def state_key(self) -> str:
        """One for each module that is watched."""
        return self._generate_state_key(module=self.module)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Tell the loggers how a module is quantized that is measured as it is."""
        target = target_module(pl_module, self.module)
        self._findings.begin(trainer.loggers)
        self._watch = QuantizerWatch()
        if stage != "fit":
            log_settings(trainer, pl_module, target)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tell the loggers how the module is quantized, and what curves will come."""
        target = target_module(pl_module, self.module)
        self._has_begun = False
        log_settings(trainer, pl_module, target)
        self._findings.show(trainer, target)
        found = quantizers(target)
        curves = ["sqnr_db", "clip_rate", "amax", "drift", "dead_channels"]
        curves += ["scale_gradient"] if any(q.spec.learns_range for q in found.values()) else []
        curves += ["oscillation"] if _control(trainer) is not None else []
        self._charts.layout(trainer, list(found), curves)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the quantizers during a measured step."""
        draws = _is_due(trainer, self.histogram_every_n_steps)
        measures = draws or _is_due(trainer, self.every_n_steps) or not self._has_begun
        last = batch_idx + 1 == trainer.num_training_batches
        steps = last or (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not (measures and steps and trainer.loggers and trainer.is_global_zero):
            return
        target = target_module(pl_module, self.module)
        self._findings.listen(trainer, target)
        show = partial(self._show, trainer) if draws else None
        self._has_begun |= self._watch.start(target, show)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure the gradients of learned ranges."""
        self._watch.note_gradients(_loss_scale(trainer, optimizer))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Log what was measured."""
        if not self._watch.is_on:
            return
        found = self._watch.finish()
        control = _control(trainer)
        for layer, share in ({} if control is None else control.layer_shares()).items():
            found[f"{layer}.weight_quantizer/oscillation"] = share
        figures = {f"quantizer/{name}": value for name, value in found.items()}
        for logger in trainer.loggers:
            logger.log_metrics(figures, trainer.global_step)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Show what other callbacks found."""
        self._watch.abort()  # of a batch that was skipped
        self._findings.show(trainer, target_module(pl_module, self.module))

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """See what a batch is, in a validation on its own."""
        if trainer.state.fn == "validate":
            self._findings.listen(trainer, target_module(pl_module, self.module))

    def on_test_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """See what a batch is."""
        self._findings.listen(trainer, target_module(pl_module, self.module))

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Show what other callbacks found at the end."""
        self._watch.abort()
        self._findings.show(trainer, target_module(pl_module, self.module))
        self._findings.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Stop watching."""
        self._watch.abort()
        self._findings.stop()

    def state_dict(self) -> dict[str, Any]:
        """Keep the ranges that drift is measured from."""
        return {"first": self._watch.first}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them up again."""
        self._watch.first = state_dict["first"]

    def _show(self, trainer: L.Trainer, name: str, values: Tensor) -> None:
        if self.input_histograms or name.endswith("weight_quantizer"):
            self._charts.histogram(trainer, f"quantizer/{name}", values)


def _loss_scale(trainer: L.Trainer, optimizer: Optimizer) -> float:
    """Return what gradients are still multiplied by: a fused optimizer divides them itself."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    divides = getattr(optimizer, "_step_supports_amp_scaling", False)
    return scaler.get_scale() if scaler is not None and divides else 1.0


def _is_due(trainer: L.Trainer, every: int) -> bool:
    return every > 0 and trainer.global_step % every == 0


def _control(trainer: L.Trainer) -> OscillationControl | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((c for c in callbacks if isinstance(c, OscillationControl)), None)
