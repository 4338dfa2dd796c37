"""The least effort that keeps to the limits, as a callback."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lq.callbacks.calibration import calibration_batches
from lq.callbacks.fine_tuning import fine_tune, follow
from lq.callbacks.target import target_module
from lq.files import check_file_path
from lq.mixed_precision import GuardReport, PrecisionConstraints, accuracy_guard
from lq.sensitivity import Sensitivity
from lq.spec import Recipe
from lq.surgery import dequantize, is_calibrated, quantized_layers

log = logging.getLogger(__name__)


class MixedPrecision(L.Callback):
    """Quantizes a trained module before a validation, with the least effort that keeps to limits.

    Climbs ``lq.accuracy_guard``'s ladder: calibration, repair, mixed precision, and, where
    `finetune_epochs` are given, training. Calibration batches are those of the Calibration
    callback; accuracy is measured on the validation data, by the target's ``forward``. The module
    then goes on quantized, the plan is written, and a module that is quantized and calibrated
    already is left as it is. Until then a journal lies beside the plan, from which a sweep that was
    killed goes on.

    Args:
        constraints: The limits.
        plan: YAML file of the plan to write; it stands wherever a recipe does.
        formats: Formats for mixed precision, besides fp32.
        recipe: What calibration alone is tried with, and what additions get.
        module: Submodule to quantize; a QuantModule's model, or the whole module, if not given.
        batches: How many calibration batches to look at.
        calibrator: As for Calibration.
        finetune_epochs: Epochs of training on the last rung; without any the ladder ends before.
        sensitivity: JSON file of a sweep of the same model.
        checkpoint: Where to save the quantized module, for a later test or export.

    Attributes:
        report: How far the ladder was climbed.
    """

    def __init__(
        self,
        constraints: PrecisionConstraints,
        plan: str = "plan.yaml",
        formats: tuple[str, ...] = ("int8", "fp16"),
        recipe: str | dict[str, Any] = "tensorrt_int8",
        module: str | None = None,
        batches: int = 16,
        calibrator: str = "auto",
        finetune_epochs: int = 0,
        sensitivity: str | None = None,
        checkpoint: str | None = None,
    ) -> None:
        if batches < 1:
            raise ValueError(f"Expected `batches` to be at least 1, but got {batches}.")
        check_file_path(plan)
        self.constraints, self.plan, self.formats = constraints, Path(plan), tuple(formats)
        self.recipe, self.module, self.batches = Recipe.parse(recipe), module, batches
        self.calibrator, self.finetune_epochs = calibrator, finetune_epochs
        self.sensitivity, self.checkpoint = sensitivity, checkpoint
        self._journal = self.plan.with_suffix(".jsonl")
        self.report: GuardReport | None = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Quantize before a validation on its own."""
        target = target_module(pl_module, self.module)
        quantized = quantized_layers(target) and is_calibrated(target)
        if trainer.state.fn != "validate" or quantized:
            return
        if trainer.world_size > 1:
            raise ValueError(
                f"Expected one process for MixedPrecision, but got {trainer.world_size}; "
                "use devices=1."
            )
        with torch.inference_mode(False), torch.no_grad():
            self.report = self._climb(trainer, pl_module)
            follow(target, self.report.model)
        rank_zero_info("%s", self.report)
        if not self.report.kept:
            log.warning("No rung keeps to the limits; the module goes on with the best of them.")
        self.report.plan.to_yaml(self.plan, self.recipe)
        self._journal.unlink(missing_ok=True)
        if self.checkpoint is not None:
            trainer.save_checkpoint(self.checkpoint)

    def _climb(self, trainer: L.Trainer, pl_module: L.LightningModule) -> GuardReport:
        target = target_module(pl_module, self.module)
        model = dequantize(copy.deepcopy(target, {id(trainer): None}))
        found = None if self.sensitivity is None else Sensitivity.from_json(self.sensitivity)
        return accuracy_guard(
            model,
            list(islice(calibration_batches(trainer), self.batches)),
            validation_batches(trainer),
            self.constraints,
            self._finetuning(trainer, pl_module) if self.finetune_epochs else None,
            self.recipe,
            self.formats,
            self.calibrator,
            found,
            journal=self._journal,
        )

    def _finetuning(
        self, trainer: L.Trainer, pl_module: L.LightningModule
    ) -> Callable[[nn.Module], None]:
        """Return what trains a quantized model: a fit of a copy of the module with it inside."""

        def finetune(model: nn.Module) -> None:
            fine_tune(
                pl_module,
                model,
                self.finetune_epochs,
                getattr(trainer, "datamodule", None),
                trainer.strategy.root_device.type,
                self.module,
            )

        return finetune


def validation_batches(trainer: L.Trainer) -> Iterable[Any]:
    """Return the validation data, the first of several."""
    loaders = trainer.val_dataloaders
    return loaders[0] if isinstance(loaders, (list, tuple)) else loaders  # type: ignore[return-value]
