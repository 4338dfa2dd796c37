"""Distillation from the float model, for somebody's own LightningModule."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from lq.callbacks.target import target_module
from lq.checkpoint import read_weights, weights_below
from lq.digest import model_digest
from lq.distillation import float_copy
from lq.distiller import Distiller
from lq.surgery import quantizers

SELF = "self"
_IDLE = 100
"""So many batches may train something else before it is an error that nothing is distilled."""


class Distillation(L.Callback):
    """Lets a module learn from a float teacher beside its own loss, which it need not know of.

    Each training forward of the target runs the teacher once on the same arguments. The gradient
    of ``weight * T^2 KL(teacher || student)``, and of the normalised distance of `features`, is
    added to that of the module's own loss: divided where batches are accumulated, scaled where
    the loss is, and logged as ``distillation/loss``. The teacher is in no checkpoint, no optimizer
    and no module. May stand before or after QuantizationAwareTraining.

    Args:
        teacher: ``self``: the float weights that the fit begins with, from the module or from
            `ckpt_path`; or a file of weights (.safetensors, .pth, .ckpt); or a module, of which
            a copy is used.
        temperature: Softens both distributions.
        weight: Of the logits' loss; 0 where the target does not return logits.
        features: Names of submodules of the target whose outputs are matched as well; an empty
            name is the target's own output.
        feature_weight: Of the loss of each feature.
        module: Submodule that learns; a QuantModule's model, or the whole module, if not given.
        class_axis: Axis of the classes in the logits.

    Raises:
        ValueError: If a name or the teacher's weights do not fit.
        RuntimeError: If a resumed fit has another teacher than it began with.

    Example:
        >>> L.Trainer(callbacks=Distillation(temperature=2.0), logger=False)
        <lightning.pytorch.trainer.trainer.Trainer object at 0x...>
    """

    def __init__(
        self,
        teacher: str | Path | nn.Module = SELF,
        temperature: float = 1.0,
        weight: float = 1.0,
        features: Sequence[str] = (),
        feature_weight: float = 1.0,
        module: str | None = None,
        class_axis: int = 1,
    ) -> None:
        if temperature <= 0:
            raise ValueError(f"Expected `temperature` to be above 0, but got {temperature}.")
        if min(weight, feature_weight) < 0 or not (weight or (features and feature_weight)):
            raise ValueError(
                "Expected `weight`, or `features` and their `feature_weight`, to be above 0, but "
                f"got {weight}, {list(features)} and {feature_weight}: nothing would be distilled."
            )
        if isinstance(features, str):
            raise ValueError(f"Expected `features` to be a list of names, but got {features!r}.")
        self.teacher, self.temperature, self.weight = teacher, temperature, weight
        self.features, self.feature_weight = list(features), feature_weight
        self.module, self.class_axis = module, class_axis
        self._distiller: Distiller | None = None
        self._digest: str | None = None
        self._digest_before: str | None = None
        self._idle: int | None = 0

    @property
    def state_key(self) -> str:
        """One for each module that learns."""
        return self._generate_state_key(module=self.module)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Take the teacher while the weights are as the user gave them."""
        if stage != "fit":
            return
        if is_overridden("configure_model", pl_module):
            pl_module.configure_model()
        self._digest_before, self._idle = None, 0
        target = target_module(pl_module, self.module)
        known = self._distiller is not None and self._distiller.student is target
        if not known or self.teacher != SELF or not _has_ranges(target):
            self._take(self._make_teacher(pl_module, target), target)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take the teacher anew where the checkpoint holds the float weights to begin with."""
        if trainer.state.fn != "fit" or self.teacher != SELF:
            return
        if self.state_key in checkpoint["callbacks"]:
            return  # a fit goes on: its teacher is what the module was before
        target = target_module(pl_module, self.module)
        if _has_ranges(target):
            raise RuntimeError(
                "Expected a checkpoint of float weights, or of a fit with Distillation, but it is "
                "of quantized training without; name the float weights: teacher=<path>."
            )
        self._take(float_copy(target), target)

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the teacher where the student is."""
        assert self._distiller is not None
        if self._digest_before not in (None, self._digest):
            raise RuntimeError(
                "Expected the teacher that this fit began with, but its weights are others now: "
                "give the module the float weights it began with before the fit is resumed, or "
                "name them: teacher=<path>."
            )
        teacher = trainer.precision_plugin.convert_module(self._distiller.teacher)
        self._distiller.teacher = teacher.to(pl_module.device)
        target = target_module(pl_module, self.module)
        self._distiller.skip_outermost = (
            target is pl_module and trainer.strategy.model is not pl_module
        )
        self._distiller.scale = lambda loss: _as_trained(loss, trainer, pl_module)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Watch the student."""
        assert self._distiller is not None
        self._distiller.start()

    def on_before_backward(
        self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor
    ) -> None:
        """Add to the gradients of the module's loss."""
        assert self._distiller is not None
        self._distiller.begin_backward()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Add to no others."""
        assert self._distiller is not None
        self._distiller.end_backward()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Log the loss."""
        assert self._distiller is not None
        self._distiller.stop()
        loss = self._distiller.take_loss()
        if loss is not None:
            self._idle = None
            pl_module.log("distillation/loss", loss)
        elif self._idle is not None:
            self._idle += 1
            if self._idle >= _IDLE or trainer.is_last_batch:
                self._refuse(pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Stop watching."""
        if self._distiller is not None:
            self._distiller.stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the device to others."""
        if self._distiller is not None:
            self._distiller.teacher.cpu()

    def state_dict(self) -> dict[str, Any]:
        """Return what tells this teacher from others."""
        digest = self._digest or self._digest_before
        return {"teacher": digest} if digest else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take note of the teacher that the fit began with."""
        self._digest_before = state_dict["teacher"]

    def _make_teacher(self, pl_module: L.LightningModule, target: nn.Module) -> nn.Module:
        if isinstance(self.teacher, nn.Module):
            return copy.deepcopy(self.teacher)
        if self.teacher == SELF:
            return float_copy(target)
        weights = read_weights(self.teacher)
        name = next(name for name, module in pl_module.named_modules() if module is target)
        try:
            return float_copy(target, weights_below(weights, name) or weights)
        except ValueError as error:
            raise ValueError(f"Expected `teacher` {str(self.teacher)!r} to fit. {error}") from None

    def _take(self, teacher: nn.Module, target: nn.Module) -> None:
        settings = (self.temperature, self.weight, self.features, self.feature_weight)
        self._digest = model_digest(teacher)
        self._distiller = Distiller(target, teacher, *settings, self.class_axis)

    def _refuse(self, pl_module: L.LightningModule) -> None:
        raise RuntimeError(
            f"Expected the training step to call {self.module or type(pl_module).__name__!r} and "
            "to go back through what it returns, with the loss it returns or manual_backward, but "
            f"it did not in {self._idle} batches; name another `module`."
        )


def _as_trained(loss: Tensor, trainer: L.Trainer, pl_module: L.LightningModule) -> Tensor:
    """Return the loss as the trainer would hand it to the backward pass."""
    if pl_module.automatic_optimization:
        loss = loss / trainer.accumulate_grad_batches
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return loss if scaler is None else scaler.scale(loss)


def _has_ranges(target: nn.Module) -> bool:
    """Return whether a model has been quantized and calibrated."""
    need = [q for q in quantizers(target).values() if q.spec.needs_scale]
    return any(q.is_calibrated for q in need)
