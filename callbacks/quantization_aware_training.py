"""Quantization-aware training of somebody's own LightningModule."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lq.calibration import RangeCollector, set_mode
from lq.calibrators import parse_calibrator
from lq.callbacks.target import check_nothing_was_added, quantize_target, target_module
from lq.quantizer import Mode
from lq.surgery import calibrated_share, quantizable_layers, quantizers


class QuantizationAwareTraining(L.Callback):
    """Trains a module with quantizers in it; the module needs to know nothing of them.

    The quantizers are put in when the trainer is set up. They are idle at first, so the sanity
    check runs in float. From `start_epoch` on, ranges are collected while the module's own
    training step runs on the first `calibration_batches`; then the quantizers quantize. A fit
    resumed from a calibrated checkpoint goes on where it was.

    Args:
        recipe: Preset, path of a YAML file, or a mapping; a module that quantizes itself
            (QuantModule) keeps its own.
        module: Submodule to quantize, such as ``encoder``; a QuantModule's model, or the whole
            module, if not given.
        calibrator: ``max``, ``percentile`` or ``percentile(99.9)``.
        calibration_batches: How many training batches ranges are collected from.
        start_epoch: First epoch with quantization; the ones before train in float.
        freeze_scales_epoch: Epoch from which learned scales stay as they are.
        freeze_batchnorm_epoch: Epoch from which BatchNorm uses, and keeps, its running statistics.

    Raises:
        ValueError: If there is nothing to quantize.
        RuntimeError: If an averaging callback comes first: it would copy the float model.
    """

    def __init__(
        self,
        recipe: str | dict[str, Any] = "tensorrt_int8",
        module: str | None = None,
        calibrator: str = "max",
        calibration_batches: int = 16,
        start_epoch: int = 0,
        freeze_scales_epoch: int | None = None,
        freeze_batchnorm_epoch: int | None = None,
    ) -> None:
        if calibration_batches < 1:
            raise ValueError(
                f"Expected `calibration_batches` to be at least 1, but got {calibration_batches}."
            )
        parse_calibrator(calibrator)
        self.recipe, self.module, self.calibrator = recipe, module, calibrator
        self.calibration_batches, self.start_epoch = calibration_batches, start_epoch
        self.freeze_scales_epoch = freeze_scales_epoch
        self.freeze_batchnorm_epoch = freeze_batchnorm_epoch
        self._collector: RangeCollector | None = None
        self._batches = 0
        self._layers: set[str] = set()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the quantizers in."""
        if stage == "fit":
            self._check_order(trainer)
        target = quantize_target(pl_module, self.module, self.recipe)
        self._layers = set(quantizable_layers(target)[0])

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the quantizers idle until they know their ranges."""
        target = target_module(pl_module, self.module)
        check_nothing_was_added(target, self._layers)
        set_mode(target, Mode.QUANTIZE if calibrated_share(target) == 1 else Mode.BYPASS)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to collect ranges, and freeze what is to be frozen from this epoch on."""
        target, epoch = target_module(pl_module, self.module), trainer.current_epoch
        waiting = self._collector is None and calibrated_share(target) < 1
        if waiting and epoch >= self.start_epoch:
            self._collector, self._batches = RangeCollector(target, self.calibrator), 0
            self._collector.start()
        if self.freeze_scales_epoch is not None and epoch >= self.freeze_scales_epoch:
            freeze_scales(target)
        if self.freeze_batchnorm_epoch is not None and epoch >= self.freeze_batchnorm_epoch:
            freeze_batchnorm(target)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Count the batch, and quantize once there are enough."""
        if self._collector is None:
            return
        self._collector.next_batch()
        self._batches += 1
        if self._batches >= self.calibration_batches:
            self._finish(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep validation data out of the ranges."""
        if self._collector is not None:
            self._collector.pause()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on collecting."""
        if self._collector is not None:
            self._collector.resume()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make do with fewer batches than asked for, where training was shorter."""
        if self._collector is not None and self._batches:
            self._finish(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Leave no observers behind."""
        if self._collector is not None:
            self._collector.abort()
            self._collector = None

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._collector is not None
        self._collector.finish()
        self._collector = None
        target = target_module(pl_module, self.module)
        for callback in _averaging(trainer):
            average = getattr(callback, "_average_model", None)
            if average is not None:
                root = getattr(average, "module", average)
                copy_scales(target, target_module(root, self.module))

    def _check_order(self, trainer: L.Trainer) -> None:
        before = trainer.callbacks[: trainer.callbacks.index(self)]  # type: ignore[attr-defined]
        for callback in _averaging(trainer):
            if callback in before:
                raise RuntimeError(
                    f"{type(callback).__name__} copies the model before the quantizers are in it; "
                    "list it after QuantizationAwareTraining."
                )


def _averaging(trainer: L.Trainer) -> list[L.Callback]:
    kinds = (WeightAveraging, StochasticWeightAveraging)
    return [c for c in trainer.callbacks if isinstance(c, kinds)]  # type: ignore[attr-defined]


def copy_scales(source: nn.Module, copy: nn.Module) -> None:
    """Give a copy of a quantized model, such as its moving average, the ranges of the original."""
    found = quantizers(copy)
    for name, quantizer in quantizers(source).items():
        if quantizer.is_calibrated and quantizer.scale is not None:
            found[name].amax = quantizer.amax  # type: ignore[assignment]


def freeze_scales(model: nn.Module) -> None:
    """Train learned scales no further."""
    for quantizer in quantizers(model).values():
        if quantizer.scale is not None:
            quantizer.scale.requires_grad_(False)


def freeze_batchnorm(model: nn.Module) -> None:
    """Let BatchNorm layers use and keep their running statistics."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
