"""Post-training quantization as a callback."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lq.calibration import find_ranges
from lq.calibrators import parse_calibrators
from lq.callbacks.target import quantize_target, target_module
from lq.modes import set_mode
from lq.quantizer import Mode
from lq.ranges import Ranges
from lq.surgery import is_calibrated


class Calibration(L.Callback):
    """Finds the ranges of a model's quantizers before it is validated, tested or trained.

    Runs once: a model that a restored checkpoint has calibrated is left as it is. The batches
    come from the data module's ``calibration_dataloader``, or else from its training data, and go
    through the target's ``forward`` in eval mode. Until then a fit's sanity check runs in float.

    Args:
        batches: How many batches to look at.
        calibrator: ``max``, ``percentile`` or ``percentile(99.9)``, ``entropy``, ``mse``, or
            ``auto``: the best of them for each quantizer.
        recipe: What to quantize, for a module that does not quantize itself.
        module: Submodule to quantize; a QuantModule's model, or the whole module, if not given.
        checkpoint: Where to save the calibrated module, for a later test or export.
        cache: JSON file of ranges: used if it is of the same model and data, refused if of others,
            written if it is not there.

    Attributes:
        ranges: What was found, once it is.
    """

    def __init__(
        self,
        batches: int = 16,
        calibrator: str = "max",
        recipe: str | dict[str, Any] = "tensorrt_int8",
        module: str | None = None,
        checkpoint: str | None = None,
        cache: str | None = None,
    ) -> None:
        if batches < 1:
            raise ValueError(f"Expected `batches` to be at least 1, but got {batches}.")
        parse_calibrators(calibrator)
        self.batches, self.calibrator = batches, calibrator
        self.recipe, self.module = recipe, module
        self.checkpoint, self.cache = checkpoint, cache
        self.ranges: Ranges | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Put the quantizers in."""
        quantize_target(pl_module, self.module, self.recipe)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Run the sanity check in float."""
        target = target_module(pl_module, self.module)
        if not is_calibrated(target):
            set_mode(target, Mode.BYPASS)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Calibrate before training."""
        self._calibrate(trainer, pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Calibrate before a validation on its own."""
        if trainer.state.fn == "validate":
            self._calibrate(trainer, pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Calibrate before a test."""
        self._calibrate(trainer, pl_module)

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Calibrate before a prediction."""
        self._calibrate(trainer, pl_module)

    def _calibrate(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        target = target_module(pl_module, self.module)
        if is_calibrated(target):
            set_mode(target, Mode.QUANTIZE)
            return
        self._check_forward(target)
        batches = islice(calibration_batches(trainer), self.batches)
        shows = trainer.is_global_zero
        self.ranges = find_ranges(target, batches, self.calibrator, shows, self.cache)
        rank_zero_info("Ranges found with %r:\n%s", self.calibrator, self.ranges.table())
        if self.checkpoint is not None:
            trainer.save_checkpoint(self.checkpoint)

    @staticmethod
    def _check_forward(target: nn.Module) -> None:
        if type(target).forward is L.LightningModule.forward:
            raise ValueError(
                f"Expected {type(target).__name__} to have a `forward` for calibration; name a "
                "`module`, or use QuantizationAwareTraining, which runs the training step."
            )


def calibration_batches(trainer: L.Trainer) -> Iterable[Any]:
    """Return batches of data that calibration may look at: never those of validation or test.

    Raises:
        RuntimeError: If there are none.
    """
    data: Any = getattr(trainer, "datamodule", None)
    if hasattr(data, "calibration_dataloader"):
        return data.calibration_dataloader()  # type: ignore[no-any-return]
    if trainer.train_dataloader is not None:
        return trainer.train_dataloader  # type: ignore[no-any-return]
    if data is not None:
        data.setup("fit")
        return data.train_dataloader()  # type: ignore[no-any-return]
    raise RuntimeError(
        "Calibration needs training data, but there is none here: pass a data module, or calibrate "
        "with lq.calibrate(model, batches) beforehand."
    )
