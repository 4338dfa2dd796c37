"""Oscillating weights in quantization-aware training: watched, dampened or frozen."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lq.callbacks.target import target_module
from lq.functional import encode
from lq.layers import QuantLayer
from lq.messages import suggest
from lq.oscillation import (
    OSCILLATING,
    OscillationTracker,
    annealed,
    dampening_gradient,
    is_low_bit,
    latent_layers,
    latent_weight,
    masked_weight,
    weight_mask,
)
from lq.quantizer import Mode

METHODS = ("freeze", "dampen", "track")


class OscillationControl(L.Callback):
    """Keeps low-bit weights from jumping to and fro between two codes.

    ``freeze`` holds weights that oscillate more often than a threshold, which sinks during the
    training, at the code where they have been most, for good. ``dampen`` pulls weights to the
    middle of their bins, ever harder. ``track`` only looks. Every epoch logs
    ``oscillation/share``, the share of weights whose frequency is above 0.005,
    ``oscillation/<layer>/share``, and ``oscillation/frozen``. The state is in the checkpoint: 6
    bytes a weight, 11 with ``freeze``.

    Source: Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training", section 4,
    and the values of its experiments.

    Args:
        method: ``freeze``, ``dampen`` or ``track``.
        threshold: Frequency above which weights are frozen at the start of the training.
        final_threshold: The same at its end.
        dampening: Weight of the dampening loss at the end of the training; 0 at its start.
        momentum: Of the moving averages; at most half of the thresholds.
        max_bits: Weights of more bits are left alone: their steps are too small to matter.
        module: Submodule to control; a QuantModule's model, or the whole module, if not given.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> L.Trainer(callbacks=OscillationControl("dampen"), logger=False)
        <lightning.pytorch.trainer.trainer.Trainer object at 0x...>
    """

    def __init__(
        self,
        method: str = "freeze",
        threshold: float = 0.1,
        final_threshold: float = 0.01,
        dampening: float = 1e-3,
        momentum: float = 0.001,
        max_bits: int = 4,
        module: str | None = None,
    ) -> None:
        if method not in METHODS:
            raise ValueError(
                f"Expected `method` to be known, but got {method!r}; {suggest(method, METHODS)}"
            )
        if not 0 < momentum < 1:
            raise ValueError(f"Expected `momentum` to be between 0 and 1, but got {momentum}.")
        if method == "freeze" and not 2 * momentum <= final_threshold <= threshold:
            raise ValueError(
                "Expected `final_threshold` to be between twice the `momentum` and `threshold`, "
                f"but got {final_threshold} with {momentum} and {threshold}: a single oscillation "
                "would freeze a weight."
            )
        if dampening < 0:
            raise ValueError(f"Expected `dampening` to be at least 0, but got {dampening}.")
        self.method, self.momentum = method, momentum
        self.threshold, self.final_threshold = threshold, final_threshold
        self.dampening, self.max_bits, self.module = dampening, max_bits, module
        self._candidates: dict[str, QuantLayer] = {}
        self._trackers: dict[str, OscillationTracker] = {}
        self._formats: dict[str, str] = {}
        self._handles: list[Any] = []
        self._progress = 0.0

    @property
    def state_key(self) -> str:
        """One for each module that is controlled."""
        return self._generate_state_key(module=self.module)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget what was known of another fit."""
        if stage == "fit":
            self._trackers, self._formats = {}, {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look on after every step of an optimizer."""
        self._candidates, others = latent_layers(target_module(pl_module, self.module))
        if others:
            rank_zero_warn(f"Oscillations left alone where weights are computed: {others}.")
        quantizers = [layer.weight_quantizer for layer in self._candidates.values()]
        if not any(is_low_bit(quantizer, self.max_bits) for quantizer in quantizers):
            rank_zero_warn(
                f"No layer has integer weights of at most `max_bits`, {self.max_bits}, bits: "
                "oscillations are not controlled while that is so."
            )
        self._check_method()
        self._handles = [o.register_step_post_hook(self._after_step()) for o in trainer.optimizers]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note how far the training is."""
        self._progress = _progress(trainer, batch_idx)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer
    ) -> None:
        """Change the gradients: of frozen weights, or to dampen."""
        for name, layer in self._layers(optimizer).items():
            gradient = getattr(latent_weight(layer), "grad", None)
            if gradient is None:
                continue
            if self.method == "dampen":
                gradient.add_(self._dampening(trainer, optimizer, layer))
            elif name in self._trackers and self._trackers[name].frozen is not None:
                gradient.masked_fill_(self._trackers[name].frozen, 0)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the shares."""
        if self._trackers:
            pl_module.log_dict(shares(self._trackers))

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look no longer."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Look no longer."""
        self._stop()

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of every weight."""
        trackers = {name: tracker.state() for name, tracker in self._trackers.items()}
        return {"trackers": trackers, "formats": self._formats}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was known."""
        self._formats = state_dict["formats"]
        self._trackers = {
            name: OscillationTracker.restored(state, self.momentum)
            for name, state in state_dict["trackers"].items()
        }

    def _layers(self, optimizer: Optimizer) -> dict[str, QuantLayer]:
        """Return the layers that an optimizer trains with their weights quantized."""
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return {
            name: layer
            for name, layer in self._candidates.items()
            if id(latent_weight(layer)) in trained
            and is_low_bit(layer.weight_quantizer, self.max_bits)
            and layer.weight_quantizer.mode is Mode.QUANTIZE
            and layer.weight_quantizer.is_calibrated
        }

    # A function, not a method: a copy of the optimizer must not copy the trackers.
    def _after_step(self) -> Any:
        def hook(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            threshold = annealed(self.threshold, self.final_threshold, self._progress)
            with torch.no_grad():
                for name, layer in self._layers(optimizer).items():
                    self._tracker(name, layer).follow(layer, threshold)

        return hook

    def _tracker(self, name: str, layer: QuantLayer) -> OscillationTracker:
        """Return a layer's tracker: a new one where its weights have another format now."""
        quantizer, weight = layer.weight_quantizer, masked_weight(layer)
        assert quantizer.scale is not None
        spec, scale = quantizer.spec, quantizer.scale.detach()
        if self._formats.get(name) != spec.format:
            codes = encode(weight.float(), scale, spec.qmin, spec.qmax, spec.axis)
            self._trackers[name] = OscillationTracker(codes, self.momentum, self._freezes)
            self._formats[name] = spec.format
        return self._trackers[name].to(weight.device)

    def _dampening(self, trainer: L.Trainer, optimizer: Optimizer, layer: QuantLayer) -> Tensor:
        spec, scale = layer.weight_quantizer.spec, layer.weight_quantizer.scale
        assert scale is not None
        weight = masked_weight(layer)
        gradient = dampening_gradient(weight, scale, spec.qmin, spec.qmax, spec.axis)
        mask = weight_mask(layer)
        gradient = gradient if mask is None else gradient * mask
        gradient *= annealed(0.0, self.dampening, self._progress)
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # Fused optimizers take the loss scale out of the gradients themselves.
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            gradient = gradient if scaler is None else scaler.scale(gradient)
        return gradient

    @property
    def _freezes(self) -> bool:
        return self.method == "freeze"

    def _check_method(self) -> None:
        if any((t.frozen is None) is self._freezes for t in self._trackers.values()):
            raise RuntimeError(
                f"Expected a checkpoint of a fit with method {self.method!r}, but it is of one "
                f"that {'did not freeze' if self._freezes else 'froze'} weights; go on with its "
                "method, or begin anew with its weights."
            )

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def shares(trackers: dict[str, OscillationTracker]) -> dict[str, float]:
    """Return the shares of weights that oscillate and that are frozen, by the names of logs."""
    counts = {n: int((t.frequency > OSCILLATING).sum()) for n, t in trackers.items()}
    total = sum(tracker.frequency.numel() for tracker in trackers.values())
    logged = {"oscillation/share": sum(counts.values()) / total}
    for name, count in counts.items():
        logged[f"oscillation/{name}/share"] = count / trackers[name].frequency.numel()
    frozen = [int(t.frozen.sum()) for t in trackers.values() if t.frozen is not None]
    return logged | ({"oscillation/frozen": sum(frozen) / total} if frozen else {})


def _progress(trainer: L.Trainer, batch_idx: int) -> float:
    """Return how much of the training is done, from 0 to 1; 0 if it has no end."""
    done = [0.0]
    if trainer.max_steps > 0:
        done.append(trainer.global_step / trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        epoch = trainer.current_epoch + batch_idx / max(1, trainer.num_training_batches)
        done.append(epoch / trainer.max_epochs)
    return min(1.0, max(done))
