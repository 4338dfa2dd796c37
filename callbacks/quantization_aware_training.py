"""Quantization-aware training of somebody's own LightningModule."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lq.calibrators import parse_calibrators
from lq.callbacks.target import check_still_quantized, quantize_target, target_module
from lq.collector import RangeCollector
from lq.modes import set_mode
from lq.qat import copy_scales, freeze_batchnorm, freeze_scales, learns_scales
from lq.quantizer import Mode
from lq.state import RECIPE, recipe_of
from lq.surgery import is_calibrated, quantize, quantized_layers


class QuantizationAwareTraining(L.Callback):
    """Trains a module with quantizers in it; the module needs to know nothing of them.

    The quantizers are put in when the trainer is set up. They are idle at first, so the sanity
    check and a LearningRateFinder run in float. From `start_epoch` on, ranges are collected while
    the module's own training step runs on the first `calibration_batches`; then the quantizers
    quantize. A fit resumed from a calibrated checkpoint goes on where it was.

    Args:
        recipe: Preset, path of a YAML file, or a mapping; a module that quantizes itself
            (QuantModule) keeps its own.
        module: Submodule to quantize, such as ``encoder``; a QuantModule's model, or the whole
            module, if not given.
        calibrator: ``max``, ``percentile`` or ``percentile(99.9)``, ``entropy``, ``mse``, or
            ``auto``: the best of them for each quantizer, tried on the last of the batches.
        calibration_batches: How many training batches ranges are collected from.
        start_epoch: First epoch with quantization; the ones before train in float.
        freeze_scales_epoch: Epoch from which learned scales stay as they are.
        freeze_batchnorm_epoch: Epoch from which BatchNorm uses, and keeps, its running statistics.

    Raises:
        ValueError: If there is nothing to quantize, or the trainer's other settings exclude it.
        RuntimeError: If an averaging callback comes first: it would copy the float model.

    Example:
        >>> L.Trainer(callbacks=QuantizationAwareTraining("int8_fp16_fallback"), logger=False)
        <lightning.pytorch.trainer.trainer.Trainer object at 0x...>
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
        if len(parse_calibrators(calibrator)) > 1 and calibration_batches < 2:
            raise ValueError(
                f"Expected `calibration_batches` to be at least 2 for {calibrator!r}, which tries "
                f"the calibrators on the last of them, but got {calibration_batches}."
            )
        self.recipe, self.module, self.calibrator = recipe, module, calibrator
        self.calibration_batches, self.start_epoch = calibration_batches, start_epoch
        self.freeze_scales_epoch = freeze_scales_epoch
        self.freeze_batchnorm_epoch = freeze_batchnorm_epoch
        self._collector: RangeCollector | None = None
        self._batches = 0
        self._epoch = -1
        self._layers: dict[str, nn.Module] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the quantizers in."""
        target = quantize_target(pl_module, self.module, self.recipe)
        self._layers = dict(quantized_layers(target))
        self._epoch = -1
        if stage == "fit":
            self._check_order(trainer)
            self._check_schedule(trainer)
            _check_strategy(trainer, target)
            _idle_until_calibrated(target)  # a LearningRateFinder trains before on_fit_start

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to go on with a float fit whose optimizer has no learned scales."""
        is_float = not any(key.endswith(RECIPE) for key in checkpoint["state_dict"])
        learned = learns_scales(target_module(pl_module, self.module))
        if is_float and learned and trainer.state.fn == "fit":
            raise ValueError(
                "Expected `ckpt_path` to be the checkpoint of a quantized fit, but it is of a "
                "float one, whose optimizer has no learned scales; start from its weights instead: "
                "module.load_state_dict(torch.load(path, weights_only=True)['state_dict']), then "
                "fit without `ckpt_path`."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leave the quantizers idle until they know their ranges."""
        target = target_module(pl_module, self.module)
        check_still_quantized(target, self._layers)
        _quantize_new_norms(target)
        _idle_until_calibrated(target)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Begin what begins in this epoch, also when a fit is resumed in the middle of it."""
        epoch = trainer.current_epoch
        if epoch == self._epoch:
            return
        self._epoch = epoch
        target = target_module(pl_module, self.module)
        if self._collector is None and epoch >= self.start_epoch and not is_calibrated(target):
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
        elif self._batches == self.calibration_batches - 1 and self._collector.must_score:
            self._collector.start_scoring()

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
        # Whatever has no range by now refuses to run, rather than running in float unnoticed.
        set_mode(target_module(pl_module, self.module), Mode.QUANTIZE)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Leave no observers behind."""
        if self._collector is not None:
            self._collector.abort()
            self._collector = None

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert self._collector is not None
        ranges = self._collector.finish()
        rank_zero_info("Ranges found with %r:\n%s", self.calibrator, ranges.table())
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

    def _check_schedule(self, trainer: L.Trainer) -> None:
        epochs = trainer.max_epochs
        if epochs is not None and 0 <= epochs <= self.start_epoch and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            raise ValueError(
                f"Expected `start_epoch` to be below the trainer's max_epochs, {epochs}, but got "
                f"{self.start_epoch}: nothing would be quantized."
            )
        averages = any(isinstance(c, StochasticWeightAveraging) for c in _averaging(trainer))
        if averages and self.freeze_batchnorm_epoch is not None:
            raise ValueError(
                "Expected no `freeze_batchnorm_epoch` with StochasticWeightAveraging, which finds "
                "the statistics of BatchNorm anew after the last epoch; leave one of them out."
            )


def _idle_until_calibrated(target: nn.Module) -> None:
    set_mode(target, Mode.QUANTIZE if is_calibrated(target) else Mode.BYPASS)


def _quantize_new_norms(target: nn.Module) -> None:
    """Quantize again the outputs of BatchNorm layers that ``sync_batchnorm`` has replaced."""
    recipe = recipe_of(target)
    if recipe is not None and any(isinstance(m, nn.SyncBatchNorm) for m in target.modules()):
        quantize(target, recipe)


def _averaging(trainer: L.Trainer) -> list[L.Callback]:
    kinds = (WeightAveraging, StochasticWeightAveraging)
    return [c for c in trainer.callbacks if isinstance(c, kinds)]  # type: ignore[attr-defined]


def _check_strategy(trainer: L.Trainer, target: nn.Module) -> None:
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy) or not learns_scales(target):
        return
    if not strategy._ddp_kwargs.get("find_unused_parameters"):
        raise ValueError(
            "Learned scales take no part until they are calibrated, which DDP must be told: "
            "use strategy='ddp_find_unused_parameters_true'."
        )
