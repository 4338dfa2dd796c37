"""Oscillating weights in quantization-aware training: watched, dampened or frozen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lq.callbacks.target import target_module
from lq.messages import suggest
from lq.oscillation import annealed
from lq.stabilizer import Stabilizer

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
        ValueError: If an argument is out of its range, or there are no such weights.

    Example:
        >>> L.Trainer(callbacks=OscillationControl("dampen"), logger=False)
        <lightning.pytorch.trainer.trainer.Trainer object at 0x...>
    """

    def __init__(
        self,
        method: str = "freeze",
        threshold: float = 0.1,
        final_threshold: float = 0.01,
        dampening: float = 0.1,
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
        self._stabilizer: Stabilizer | None = None
        self._state: dict[str, Any] | None = None
        self._handles: list[Any] = []
        self._progress = 0.0

    @property
    def state_key(self) -> str:
        """One for each module that is controlled."""
        return self._generate_state_key(module=self.module)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Forget what was known of another fit."""
        if stage == "fit":
            self._stabilizer, self._state = None, None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look on after every step of an optimizer."""
        target, freezes = target_module(pl_module, self.module), self.method == "freeze"
        self._stabilizer = Stabilizer(target, freezes, self.momentum, self.max_bits)
        if self._state is not None:
            self._stabilizer.load_state_dict(self._state)
        if self._stabilizer.others:
            others = self._stabilizer.others
            rank_zero_warn(f"Oscillations are left alone where weights are computed: {others}.")
        if not self._stabilizer.has_layers:
            raise ValueError(
                f"Expected layers with integer weights of at most `max_bits`, {self.max_bits}, "
                "bits, but got none whose oscillations could be controlled; give the recipe such "
                "weights, raise max_bits, or leave OscillationControl out."
            )
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
        assert self._stabilizer is not None
        if self.method == "freeze":
            self._stabilizer.mask_gradients(_parameters(optimizer))
        elif self.method == "dampen":
            weight = annealed(0.0, self.dampening, self._progress)
            self._stabilizer.dampen(_parameters(optimizer), weight, _loss_scale(trainer, optimizer))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Log the shares."""
        assert self._stabilizer is not None
        shares = self._stabilizer.shares()
        pl_module.log_dict({f"oscillation/{name}": share for name, share in shares.items()})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Look no longer."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Look no longer."""
        self._stop()

    def layer_shares(self) -> dict[str, float]:
        """Return layer -> share of its weights that oscillate, of the layers that are tracked."""
        shares = {} if self._stabilizer is None else self._stabilizer.shares()
        return {n[: -len("/share")]: share for n, share in shares.items() if n.endswith("/share")}

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of every weight."""
        return (self._state or {}) if self._stabilizer is None else self._stabilizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what was known until the training starts."""
        self._state = state_dict

    # A function, not a method: a copy of the optimizer must not copy the trackers.
    def _after_step(self) -> Callable[..., None]:
        def hook(optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
            assert self._stabilizer is not None
            threshold = annealed(self.threshold, self.final_threshold, self._progress)
            self._stabilizer.step(_parameters(optimizer), threshold)

        return hook

    def _stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


def _parameters(optimizer: Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def _loss_scale(trainer: L.Trainer, optimizer: Optimizer) -> Callable[[Tensor], Tensor]:
    """Return what the gradients are scaled by now: only fused optimizers still have it in them."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False):
        return lambda gradient: gradient
    return scaler.scale  # type: ignore[no-any-return]


def _progress(trainer: L.Trainer, batch_idx: int) -> float:
    """Return how much of the training is done, from 0 to 1; 0 if it has no end."""
    done = [0.0]
    if trainer.max_steps > 0:
        done.append(trainer.global_step / trainer.max_steps)
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        epoch = trainer.current_epoch + batch_idx / max(1, trainer.num_training_batches)
        done.append(epoch / trainer.max_epochs)
    return min(1.0, max(done))
