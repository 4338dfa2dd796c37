"""A LightningModule that trains, calibrates and evaluates any classifier with quantizers in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.functional.classification import multiclass_accuracy

from lq.checkpoint import read_weights, weights_below
from lq.models import create_model
from lq.spec import Recipe
from lq.surgery import quantize

STAGES = ("train", "val", "test")


class QuantModule(L.LightningModule):
    """Classifier with quantizers, ready for the Lightning CLI.

    Logs ``{train,val,test}/{loss,top1,top5}``. The quantizers are put in before weights are
    restored and before optimizers exist; a Calibration or QuantizationAwareTraining callback (or
    ``lq.calibrate``) finds their ranges.

    Args:
        model: Dotted name of a factory, such as ``torchvision.models.resnet18``, or a module. A
            checkpoint rebuilds the model by itself only from a dotted name.
        model_args: Arguments of the factory.
        recipe: Preset (tensorrt_int8, int8_fp16_fallback, weight_only_int8, onnxruntime_int8,
            openvino_int8), path of a YAML file, or a mapping; null trains the float model.
        weights: Starting weights: .safetensors, .pth, or a .ckpt of this class.
        optimizer: Makes the optimizer from the parameters.
        lr_scheduler: Makes the schedule from the optimizer, stepped every epoch.

    Raises:
        ValueError: If model or recipe cannot be made, or the weights do not fit.
        FileNotFoundError: If there is no weights file.

    Example:
        >>> module = QuantModule("lq.models.digits_cnn", recipe="tensorrt_int8")
        >>> module.configure_model()
        >>> sum("Quantizer" in type(m).__name__ for m in module.modules()) > 0
        True
    """

    def __init__(
        self,
        model: str | nn.Module,
        model_args: dict[str, Any] | None = None,
        recipe: str | Path | dict[str, Any] | Recipe | None = "tensorrt_int8",
        weights: str | Path | None = None,
        optimizer: OptimizerCallable = torch.optim.Adam,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.recipe = None if recipe is None else Recipe.parse(recipe)
        # The checkpoint holds the recipe itself: its file may be gone when it is loaded.
        recipe = None if self.recipe is None else self.recipe.to_dict()
        kept = ["model", "model_args", "recipe"] if isinstance(model, str) else ["recipe"]
        self.save_hyperparameters(*kept)
        self.model = create_model(model, **(model_args or {}))
        self.weights = weights
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.averages = nn.ModuleDict(
            {f"{stage}_{name}": MeanMetric() for stage in STAGES for name in ("top1", "top5")}
        )
        self._configured = False

    def configure_model(self) -> None:
        """Put the quantizers in and load the starting weights, once."""
        if self._configured:
            return
        if self.recipe is not None:
            quantize(self.model, self.recipe)
        if self.weights is not None:
            load_weights(self.model, self.weights)
        self._configured = True

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits ``[N, classes]`` of a batch of images."""
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        return self._step(batch, "train")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure a batch."""
        self._step(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Measure a batch."""
        self._step(batch, "test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the class numbers of a batch of images, with or without targets."""
        images = batch[0] if isinstance(batch, (list, tuple)) else batch
        classes: Tensor = self(images).argmax(1)
        return classes

    def _step(self, batch: Any, stage: str) -> Tensor:
        images, target = batch
        if not len(target):
            raise ValueError("Expected a batch of images, but got an empty one.")
        logits = self(images)
        loss = F.cross_entropy(logits, target)
        training = stage == "train"
        if not training and not loss.isfinite():
            raise ValueError(
                f"Expected a finite loss, but the {stage} images give {loss:.3g}; look at them "
                "and at the starting weights."
            )
        self.log(
            f"{stage}/loss",
            loss,
            batch_size=len(target),
            prog_bar=training,
            sync_dist=not training,
        )
        classes = logits.shape[1]
        for name, k in (("top1", 1), ("top5", min(5, classes))):
            share = multiclass_accuracy(logits, target, classes, top_k=k, average="micro")
            average: Any = self.averages[f"{stage}_{name}"]
            average.update(share, weight=len(target))
            self.log(
                f"{stage}/{name}",
                average,
                on_step=False,
                on_epoch=True,
                prog_bar=name == "top1" and not training,
            )
        return loss

    def configure_optimizers(self) -> Any:
        """Return the optimizer, with its schedule if there is one."""
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.lr_scheduler(optimizer), "monitor": "val/loss"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def load_weights(model: nn.Module, path: str | Path) -> None:
    """Load weights into a model from its own state_dict or from a checkpoint of ``QuantModule``.

    Float weights leave the quantizers of a quantized model uncalibrated.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged or does not fit the model, naming the first misfit.
    """
    weights: Mapping[str, Tensor] = read_weights(path)
    own = weights_below(weights, "model")
    weights = own if len(own) == len(weights) else weights
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        misfit = str(error).strip().splitlines()[1:] or [str(error)]
        raise ValueError(
            f"Expected the weights in {str(path)!r} to fit {type(model).__name__}, but: "
            f"{misfit[0].strip()[:300]}"
        ) from None
