"""A sensitivity sweep as a callback of ``validate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from lq.callbacks.calibration import calibration_batches
from lq.callbacks.target import target_module
from lq.files import check_file_path
from lq.sensitivity import METRICS, Sensitivity, sweep
from lq.sensitivity.run import FirstBatches
from lq.sensitivity.validation import shuffled
from lq.spec import Recipe
from lq.surgery import quantizers


class SensitivitySweep(L.Callback):
    """Measures what each layer costs in each format, at the end of a validation on its own.

    The batches are of the validation data, in a fixed random order; ranges are found from
    calibration data. The module must be float (``recipe: null``). Where training is distributed
    the layers are shared out over the ranks, each of which sees all batches. Beside the JSON file
    lie a CSV file and the journal, from which a killed sweep goes on.

    Args:
        path: JSON file to write.
        formats: Number formats.
        method: ``exact``, ``adaptive`` or ``gradient``.
        metric: What layers are ranked by; see ``lq.sweep``.
        recipe: What else is quantized where a layer is.
        units: ``layers``, ``inputs``, ``blocks``, or name -> globs on layer names.
        parts: Which of ``both``, ``weights`` and ``inputs`` of the layers to quantize.
        left_float: Also measure each unit left float in a model that is all in the format.
        batches: How many batches to measure on; all, if not given.
        calibrator: How ranges are found.
        module: Submodule to sweep; a QuantModule's model, or the whole module, if not given.

    Attributes:
        result: What was found.
    """

    def __init__(
        self,
        path: str | Path = "sensitivity.json",
        formats: Sequence[str] = ("int8",),
        method: str = "exact",
        metric: str | None = None,
        recipe: str | dict[str, Any] = "tensorrt_int8",
        units: str | dict[str, Any] = "layers",
        parts: Sequence[str] = ("both",),
        left_float: bool = False,
        batches: int | None = 16,
        calibrator: str = "max",
        module: str | None = None,
    ) -> None:
        check_file_path(path)
        Recipe.parse(recipe)
        self.path, self.module, self.batches = Path(path), module, batches
        self.arguments: dict[str, Any] = {
            "formats": list(formats),
            "method": method,
            "metric": metric,
            "recipe": recipe,
            "units": units,
            "parts": list(parts),
            "left_float": left_float,
            "calibrator": calibrator,
        }
        self.result: Sensitivity | None = None

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a quantized module before anything is measured."""
        if trainer.state.fn == "validate" and quantizers(target_module(pl_module, self.module)):
            raise ValueError(
                f"Expected a float module to sweep, but {type(pl_module).__name__} is quantized; "
                "give it `recipe: null`, and SensitivitySweep the recipe."
            )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Sweep, unless this is a validation within a fit."""
        if trainer.state.fn != "validate":
            return
        self.result = sweep(
            target_module(pl_module, self.module),
            shuffled(trainer.val_dataloaders, self.batches),
            calibration=FirstBatches(calibration_batches(trainer)),
            journal=self.path.with_suffix(".jsonl"),
            progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
            **self.arguments,
        )
        if trainer.is_global_zero:
            self.result.save(self.path)
            log_scores(self.result, trainer)
        rank_zero_info("%s\nSensitivity: %s", self.result.table(), self.path)


def log_scores(found: Sensitivity, trainer: L.Trainer) -> None:
    """Give the loggers what each unit costs."""
    name = METRICS[found.metric]
    scores = {f"sensitivity/{r.layer}/{r.format}/{name}": r.value(found.metric) for r in found}
    for logger in trainer.loggers:
        logger.log_metrics(scores, trainer.global_step)
