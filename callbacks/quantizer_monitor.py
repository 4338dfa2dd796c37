"""What the quantizers do, as curves."""

from __future__ import annotations

from typing import Any

import lightning as L
from torch import Tensor, nn

from lq.callbacks.target import target_module
from lq.functional import sqnr_db
from lq.quantizer import Mode, Quantizer
from lq.surgery import quantizers


class QuantizerMonitor(L.Callback):
    """Logs the scale, the clip rate and the SQNR of every quantizer at an interval.

    ``quantizer/<name>/scale`` is the scale (its mean over channels), ``.../clip_rate`` the share
    of values beyond the range, ``.../sqnr_db`` the signal-to-quantization-noise ratio, each of
    one training batch. Between the measured steps nothing runs.

    Args:
        every_n_steps: Measure one step in so many.
        module: Submodule to watch; a QuantModule's model, or the whole module, if not given.
    """

    def __init__(self, every_n_steps: int = 100, module: str | None = None) -> None:
        if every_n_steps < 1:
            raise ValueError(f"Expected `every_n_steps` to be at least 1, but got {every_n_steps}.")
        self.every_n_steps, self.module = every_n_steps, module
        self._hooks: list[Any] = []
        self._measured: dict[str, float] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Watch the quantizers during a measured step."""
        if not trainer.loggers or trainer.global_step % self.every_n_steps:
            return
        for name, quantizer in quantizers(target_module(pl_module, self.module)).items():
            if quantizer.mode is Mode.QUANTIZE and quantizer.is_calibrated:
                self._hooks.append(quantizer.register_forward_hook(self._measure(name)))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Log what was measured."""
        if not self._hooks:
            return
        self._stop()
        for logger in trainer.loggers:
            logger.log_metrics(self._measured, trainer.global_step)
        self._measured = {}

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Stop watching."""
        self._stop()

    def _stop(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _measure(self, name: str) -> Any:
        def hook(quantizer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            assert isinstance(quantizer, Quantizer)
            figures = quantizer_figures(quantizer, args[0], output)
            self._measured |= {f"quantizer/{name}/{k}": v for k, v in figures.items()}

        return hook


def quantizer_figures(quantizer: Quantizer, x: Tensor, quantized: Tensor) -> dict[str, float]:
    """Return what is worth watching of one quantizer on one tensor."""
    figures = {"sqnr_db": sqnr_db(x, quantized)}
    if quantizer.scale is not None:
        figures["scale"] = float(quantizer.scale.detach().mean())
        figures["clip_rate"] = float(quantizer.clipped(x).float().mean())
    return figures
