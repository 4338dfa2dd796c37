"""Train a quantized copy of a module's network, inside another run of the trainer."""

from __future__ import annotations

import copy
import inspect
import logging
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lq.callbacks.quantization_aware_training import QuantizationAwareTraining
from lq.callbacks.target import target_module
from lq.checkpoint import read_checkpoint
from lq.module import QuantModule
from lq.spec import Recipe
from lq.state import recipe_of
from lq.surgery import dequantize, quantize

log = logging.getLogger(__name__)


class History(L.Callback):
    """Keeps what is logged for each epoch, also through a resumed fit.

    Attributes:
        rows: For each epoch its number as ``epoch``, each metric, and the mean of the batches'
            losses as ``train/loss``.
    """

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self._losses: list[Tensor] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, *args: Any
    ) -> None:
        """Take note of a loss: what is logged by step is at the end that of the last batch."""
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor):
            self._losses.append(loss.detach())

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take note of an epoch, after its validation."""
        found = {k: float(v) for k, v in trainer.callback_metrics.items()}
        if self._losses:
            found["train/loss"] = float(torch.stack(self._losses).mean())
        self._losses = []
        self.rows.append({"epoch": float(trainer.current_epoch), **found})

    def state_dict(self) -> dict[str, Any]:
        """Return the epochs so far."""
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the epochs before."""
        self.rows = list(state_dict["rows"])


def fine_tune(
    pl_module: L.LightningModule,
    model: nn.Module,
    epochs: int,
    data: Any,
    accelerator: str = "auto",
    module: str | None = None,
    folder: Path | None = None,
    validate: bool = False,
) -> list[dict[str, float]]:
    """Train a quantized model as a module would train it, in place.

    Args:
        pl_module: Says how: its loss and its optimizer. It stays as it is.
        model: A quantized and calibrated copy of the part of the module that `module` names.
        epochs: How long.
        data: The data module.
        accelerator: As for Lightning's Trainer.
        module: Name of the part; a QuantModule's model, or the whole module, if not given.
        folder: Where a checkpoint lies after each epoch, from which a killed training goes on.
        validate: Whether to measure on the validation data after each epoch.

    Returns:
        A row of what was logged for each epoch.
    """
    trained = copy.deepcopy(pl_module, {id(pl_module._trainer): None})
    if is_overridden("configure_model", trained):
        trained.configure_model()  # which quantizes a QuantModule as its own recipe says
    target = target_module(trained, module)
    follow(target, model)
    history = History()
    callbacks: list[L.Callback] = [QuantizationAwareTraining(module=module), history]
    last = None if folder is None else folder / "last.ckpt"
    if last is not None:
        callbacks.append(
            ModelCheckpoint(
                last.parent,
                "last",
                save_on_train_epoch_end=True,  # when History has seen the validation
                enable_version_counter=False,
            )
        )
    trained.train()  # a validation, or whoever measured the module, has set it to eval
    tuner = L.Trainer(
        max_epochs=epochs,
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=last is not None,
        enable_model_summary=False,
        limit_val_batches=None if validate else 0,
        num_sanity_val_steps=0,
        callbacks=callbacks,
    )
    before = getattr(data, "trainer", None)
    resumed = None if last is None else _whole(last)
    with torch.enable_grad():
        tuner.fit(trained, datamodule=data, ckpt_path=resumed, weights_only=True)
    if data is not None:
        data.trainer = before
    model.load_state_dict(target.state_dict())
    return history.rows


def _whole(checkpoint: Path) -> str | None:
    """Return the checkpoint of a killed training, ``None`` where there is none that can be read."""
    if not checkpoint.is_file():
        return None
    try:
        read_checkpoint(checkpoint)
    except (OSError, ValueError) as error:
        log.warning("Training begins again, for %s cannot be read: %s", checkpoint, error)
        return None
    return str(checkpoint)


def training_of(module: QuantModule, data: Any) -> str:
    """Return in words how a module would be trained."""
    module = copy.deepcopy(module, {id(module._trainer): None})
    module.zero_grad()  # so that steps, which move the schedule, change nothing
    found = module.configure_optimizers()
    optimizer, schedule = (
        (found["optimizer"], found["lr_scheduler"]["scheduler"])
        if isinstance(found, dict)
        else (found, None)
    )
    told = [repr(optimizer), _source(type(module)), getattr(data, "hparams", "")]
    if schedule is not None:
        told += [type(schedule).__name__, _rates(optimizer, schedule)]
    return " ".join(map(str, told))


def _source(cls: type) -> str:
    """Return the code of a class, or its name where that cannot be read."""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return f"{cls.__module__}.{cls.__qualname__}"


def _rates(optimizer: torch.optim.Optimizer, schedule: Any) -> list[float]:
    """Return the learning rates of the first epochs, which any schedule can be told by."""
    rates = []
    for _ in range(10):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if not isinstance(schedule, torch.optim.lr_scheduler.ReduceLROnPlateau):
            schedule.step()
    return rates


def follow(target: nn.Module, model: nn.Module) -> None:
    """Give a module the quantizers, ranges and weights of a model of the same structure."""
    recipe: Recipe | None = recipe_of(model)
    assert recipe is not None
    quantize(dequantize(target), recipe)
    target.load_state_dict(model.state_dict())
