"""How a run quantizes, and what came of it: what runs are sorted by."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from torch import nn

from lq.callbacks.calibration import Calibration
from lq.callbacks.engine_comparison import FINAL, EngineComparison
from lq.callbacks.quantization_aware_training import QuantizationAwareTraining
from lq.module import QuantModule
from lq.state import recipe_of


def log_settings(trainer: L.Trainer, pl_module: L.LightningModule, target: nn.Module) -> None:
    """Give the loggers the settings of a run, and TensorBoard the results to sort runs by.

    TensorBoard keeps what it is given first of a run, so the module's own hyperparameters, which
    Lightning gives it later, are among them. Results are NaN until they are known.
    """
    settings = run_settings(trainer, pl_module, target)
    compares = any(isinstance(c, EngineComparison) for c in _callbacks(trainer))
    results = dict.fromkeys(FINAL if compares else (), float("nan"))
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            own = _hyperparameters(trainer, pl_module)
            logger.log_hyperparams({**own, **settings}, results or None, 0)
        else:
            logger.log_hyperparams(dict(settings))


def run_settings(
    trainer: L.Trainer, pl_module: L.LightningModule, target: nn.Module
) -> dict[str, Any]:
    """Return how a run quantizes, in a few plain values."""
    found: dict[str, Any] = {}
    planned = pl_module.recipe if isinstance(pl_module, QuantModule) else None
    recipe = recipe_of(target) or planned  # before a test it is not yet configured
    if recipe is not None:
        found |= {"weights": recipe.weights.format, "inputs": recipe.inputs.format}
        found |= {"range": recipe.inputs.range, "rules": len(recipe.rules)}
    for callback in _callbacks(trainer):
        if isinstance(callback, (Calibration, QuantizationAwareTraining)):
            found |= {"method": "QAT" if not isinstance(callback, Calibration) else "PTQ"}
            found |= {"calibrator": callback.calibrator}
    return {f"quantization/{name}": value for name, value in found.items()}


def _hyperparameters(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
    """Return what Lightning gives the loggers: not what was saved with ``logger=False``."""
    found: dict[str, Any] = {}
    for part in (getattr(trainer, "datamodule", None), pl_module):
        if part is not None and part._log_hyperparams:
            found |= part.hparams_initial
    return found


def _callbacks(trainer: L.Trainer) -> list[L.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]
