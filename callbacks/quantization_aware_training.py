"""Quantization-aware training of somebody's own LightningModule."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import Unpack

from lq.callbacks.former_arguments import FormerArguments, Settings, check_fused, translate
from lq.callbacks.target import check_still_quantized, quantize_target, target_module
from lq.qat import copy_scales, learns_scales, save_memory
from lq.quantized_training import QuantizedTraining, check_batch_count, idle_until_calibrated
from lq.ranges import Ranges
from lq.schedule import Schedule
from lq.state import RECIPE, recipe_of
from lq.surgery import quantize, quantized_layers


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
        start_step: First optimizer step with quantization, where that is later.
        inputs_start_epoch: First epoch in which inputs are quantized; null with the weights.
        inputs_start_step: First optimizer step in which inputs are, where that is later.
        progressive_bits: Epoch -> bits that integer formats of fewer have from there on, such as
            ``{0: 8, 2: 6, 4: 4}``; the last must be those of the recipe.
        freeze_scales_epoch: Epoch from which learned and moving ranges stay as they are.
        freeze_batchnorm_epoch: Epoch from which BatchNorm uses, and keeps, its running statistics.
        save_memory: Let the backward pass quantize again instead of saving quantized copies.
        former: Arguments that this callback had in Lightning 1.9; each tells how it is said now.

    Attributes:
        ranges: What was found last, once it is.

    Raises:
        ValueError: If there is nothing to quantize, training is over before it all is, or the
            trainer's other settings exclude it.
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
        start_step: int = 0,
        inputs_start_epoch: int | None = None,
        inputs_start_step: int | None = None,
        progressive_bits: dict[int, int] | None = None,
        freeze_scales_epoch: int | None = None,
        freeze_batchnorm_epoch: int | None = None,
        save_memory: bool = False,
        **former: Unpack[FormerArguments],
    ) -> None:
        settings = translate(former, Settings(recipe, calibrator, calibration_batches))
        check_batch_count(settings.calibrator, settings.calibration_batches)
        self.recipe, self.module, self.calibrator = settings.recipe, module, settings.calibrator
        self.calibration_batches = settings.calibration_batches
        self.fused = settings.fused
        self.schedule = Schedule(
            start_epoch,
            start_step,
            inputs_start_epoch,
            inputs_start_step,
            freeze_scales_epoch,
            freeze_batchnorm_epoch,
            progressive_bits or {},
        )
        self.save_memory = save_memory
        self._layers: dict[str, nn.Module] = {}
        self._training: QuantizedTraining | None = None
        self.ranges: Ranges | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the quantizers in."""
        target = quantize_target(pl_module, self.module, self.recipe)
        check_fused(pl_module, self.fused)
        self._layers = dict(quantized_layers(target))
        save_memory(target, self.save_memory)
        if stage == "fit":
            self._check_order(trainer)
            self._check_averages(trainer)
            self.schedule.check_bits(target)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                steps = trainer.max_steps if trainer.max_steps >= 0 else None
                self.schedule.check_reached(trainer.max_epochs, steps)
            _check_strategy(trainer, target)
            idle_until_calibrated(target)  # a LearningRateFinder trains before on_fit_start

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
        self._training = QuantizedTraining(
            target, self.calibrator, self.calibration_batches, self.schedule
        )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Begin what begins with this batch."""
        if self._training is not None:
            ranges = self._training.before_batch(trainer.current_epoch, trainer.global_step)
            self._found(ranges, trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Count the batch, and quantize once there are enough."""
        if self._training is not None:
            self._found(self._training.after_batch(), trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep validation data out of the ranges, and give a resumed model its bits."""
        if self._training is not None:
            self._training.pause(trainer.current_epoch)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Go on collecting."""
        if self._training is not None:
            self._training.resume()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make do with fewer batches than asked for, where training was shorter."""
        if self._training is not None:
            self._found(self._training.end(), trainer, pl_module)
            self._training = None

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Leave nothing behind that is for training alone."""
        if self._training is not None:
            self._training.abort()
            self._training = None

    def _found(
        self, ranges: Ranges | None, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> None:
        if ranges is None:
            return
        self.ranges = ranges
        rank_zero_info("Ranges found with %r:\n%s", self.calibrator, ranges.table())
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

    def _check_averages(self, trainer: L.Trainer) -> None:
        averages = any(isinstance(c, StochasticWeightAveraging) for c in _averaging(trainer))
        if averages and self.schedule.freeze_batchnorm_epoch is not None:
            raise ValueError(
                "Expected no `freeze_batchnorm_epoch` with StochasticWeightAveraging, which finds "
                "the statistics of BatchNorm anew after the last epoch; leave one of them out."
            )


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
