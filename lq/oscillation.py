"""Weights that oscillate between two codes in low-bit training: found, frozen or dampened.

Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training", sections 4.1 to 4.3.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from lq.functional import along_axis, encode
from lq.latent import latent_weight, masked_weight, weight_mask
from lq.layers import QuantLayer
from lq.spec import QuantSpec

_PART = 1 << 15
"""Weights to work on at a time: they stay in the cache, and one thread is quickest."""
OSCILLATING = 0.005
"""Frequency above which a weight is said to oscillate (the paper's tables)."""


def oscillation(codes: Tensor, previous: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Return where weights oscillated, as 1 and 0, and the direction of each one's last change.

    A weight oscillates in a step that changes its code the other way than the code's last change
    did, however long ago (section 4.1). The first change of all has none before it.

    Args:
        codes: Codes after the step, int8.
        previous: Codes before it, int8.
        direction: -1, 0 or 1: the sign of the last change before, 0 if there was none; int8.

    Example:
        >>> before, after = torch.tensor([3, 3, 3]).char(), torch.tensor([4, 4, 3]).char()
        >>> oscillated, direction = oscillation(after, before, torch.tensor([-1, 1, -1]).char())
        >>> oscillated.tolist(), direction.tolist()
        ([1, 0, 0], [1, 1, -1])
    """
    # Bytes throughout, also for what is true or false: on CPU other types take ten times as long.
    change = (codes > previous).view(torch.int8) - (codes < previous).view(torch.int8)
    oscillated = (change * direction).clamp_(max=0).neg_()
    return oscillated, direction.add(change, alpha=2).clamp_(-1, 1)


def dampening_loss(
    weight: Tensor, scale: Tensor, qmin: float, qmax: float, axis: int | None = None
) -> Tensor:
    """Return how far weights are from the middle of their bins.

    ``loss = sum((scale * code - clip(weight, scale * qmin, scale * qmax))^2)``

    Only the weight has a gradient; where it is out of range there is none (section 4.2).

    Args:
        weight: Weight of any shape.
        scale: ``[]`` per tensor or ``[C]`` per channel.
        qmin: Smallest code.
        qmax: Largest code.
        axis: Channel axis; ``None`` per tensor.

    Example:
        >>> float(dampening_loss(torch.tensor([0.25, 0.0, 9.0]), torch.tensor(1.0), -3, 3))
        0.0625
    """
    return _offset(weight, scale, qmin, qmax, axis).square().sum()


def dampening_gradient(
    weight: Tensor, scale: Tensor, qmin: float, qmax: float, axis: int | None = None
) -> Tensor:
    """Return the gradient of ``dampening_loss``: twice the distance from the middle of the bin.

    Example:
        >>> dampening_gradient(torch.tensor([0.25, 0.0, 9.0]), torch.tensor(1.0), -3, 3)
        tensor([0.5000, 0.0000, 0.0000])
    """
    return _offset(weight.detach(), scale, qmin, qmax, axis).mul_(2)


def _offset(weight: Tensor, scale: Tensor, qmin: float, qmax: float, axis: int | None) -> Tensor:
    """Return the distance of clipped weights from the middle of their bins."""
    scale = scale.detach()
    codes = encode(weight.detach(), scale, qmin, qmax, axis)
    steps = along_axis(scale, axis, weight.dim())
    return torch.clamp(weight / steps, qmin, qmax).sub(codes).mul(steps)


def annealed(start: float, end: float, progress: float) -> float:
    """Return a value between two, on half a cosine wave.

    ``end + (start - end) (1 + cos(pi progress)) / 2``

    Example:
        >>> [round(annealed(0.1, 0.01, progress), 3) for progress in (0, 0.5, 1)]
        [0.1, 0.055, 0.01]
    """
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


class OscillationTracker:
    """What is known of the oscillations of one layer's weights.

    Frequency and average code are moving averages (sections 4.1 and 4.3, algorithm 1):

    ``frequency = m oscillated + (1 - m) frequency``, ``average = m code + (1 - m) average``

    Takes 6 bytes a weight, or 11 where weights are frozen.

    Args:
        codes: Codes to begin with, of any shape.
        momentum: ``m``.
        freezes: Whether weights will be frozen.

    Example:
        >>> tracker = OscillationTracker(torch.tensor([0.0, 0.0]), momentum=0.5, freezes=True)
        >>> for codes in ([1.0, 0.0], [0.0, 0.0], [1.0, 0.0]):
        ...     _ = tracker.update(torch.tensor(codes), threshold=0.7)
        >>> tracker.frequency
        tensor([0.7500, 0.0000])
        >>> tracker.frozen, tracker.codes
        (tensor([ True, False]), tensor([1, 0], dtype=torch.int8))
    """

    def __init__(self, codes: Tensor, momentum: float = 0.001, freezes: bool = False) -> None:
        self.momentum = momentum
        self.codes = codes.to(torch.int8)
        self.direction = torch.zeros_like(self.codes)
        self.frequency = torch.zeros_like(codes, dtype=torch.float32)
        self.average = codes.float() if freezes else None
        self.frozen = torch.zeros_like(codes, dtype=torch.bool) if freezes else None

    def update(self, codes: Tensor, threshold: float = math.inf) -> bool:
        """Take note of the codes after a step, and return whether weights may have been frozen.

        That is those whose frequency is now above the threshold, where they have been most.
        """
        found = codes.to(torch.int8)
        oscillated, direction = oscillation(found, self.codes, self.direction)
        self.codes.copy_(found)
        self.direction.copy_(direction)
        self.frequency.mul_(1 - self.momentum).add_(oscillated.float(), alpha=self.momentum)
        if self.average is None:
            return False
        self.average.lerp_(codes, self.momentum)
        return self._freeze(threshold)

    def _freeze(self, threshold: float) -> bool:
        assert self.frozen is not None
        assert self.average is not None
        # Looking first is quicker, but on another device would mean waiting for it.
        if self.frequency.device.type == "cpu" and float(self.frequency.max()) <= threshold:
            return False
        new = (self.frequency > threshold) & ~self.frozen
        self.codes.copy_(torch.where(new, self.average.round().to(torch.int8), self.codes))
        self.frozen.logical_or_(new)
        return True

    def step(
        self, weight: Tensor, scale: Tensor, spec: QuantSpec, threshold: float = math.inf
    ) -> None:
        """Take note of a weight after an optimizer's step, and hold what is frozen of it.

        Frozen weights are set to their codes times the scale, which may be one that learns.
        """
        for part, piece, steps in _parts(self, weight, scale, spec.axis):
            part._hold(piece, steps)  # momentum, decay and a learned scale move them
            if part.update(encode(piece.float(), steps, spec.qmin, spec.qmax), threshold):
                part._hold(piece, steps)

    def follow(self, layer: QuantLayer, threshold: float = math.inf) -> None:
        """Do a ``step`` with the weight of a layer, where it is pruned with what is left of it."""
        latent, weight, mask = latent_weight(layer), masked_weight(layer), weight_mask(layer)
        assert latent is not None
        quantizer = layer.weight_quantizer
        self.step(weight, quantizer.grid_scale, quantizer.grid, threshold)
        if self.frozen is not None and mask is not None:
            latent.copy_(torch.where(mask != 0, weight, latent))

    def _hold(self, weight: Tensor, steps: Tensor) -> None:
        frozen = self.frozen
        if frozen is None or (frozen.device.type == "cpu" and not frozen.view(torch.int8).max()):
            return
        weight.copy_(torch.where(frozen, (self.codes * steps).to(weight.dtype), weight))

    def __getitem__(self, index: tuple[slice, ...]) -> OscillationTracker:
        """Return a view of a part of the weights."""
        part = copy.copy(self)
        for name, value in self.state().items():
            setattr(part, name, value[index])
        return part

    def state(self) -> dict[str, Tensor]:
        """Return all there is to save."""
        kept = ("codes", "direction", "frequency", "average", "frozen")
        return {name: getattr(self, name) for name in kept if getattr(self, name) is not None}

    @classmethod
    def restored(cls, state: dict[str, Tensor], momentum: float) -> OscillationTracker:
        """Return a tracker in a saved state."""
        tracker = cls(state["codes"], momentum)
        for name, value in state.items():
            setattr(tracker, name, value)
        return tracker

    def to(self, device: torch.device) -> OscillationTracker:
        """Move to where the weights are, and return itself."""
        if self.codes.device != device:
            for name, value in self.state().items():
                setattr(self, name, value.to(device))
        return self


def _parts(
    tracker: OscillationTracker, weight: Tensor, scale: Tensor, axis: int | None
) -> Iterator[tuple[OscillationTracker, Tensor, Tensor]]:
    """Yield views of trackers, weights and scales, of a size that stays in a CPU's cache."""
    steps = along_axis(scale, axis, weight.dim())
    along = axis or 0
    size = weight.shape[along]
    rows = size if weight.is_cuda else max(1, _PART * size // max(1, weight.numel()))
    for start in range(0, size, rows):
        index = (*[slice(None)] * along, slice(start, start + rows))
        yield tracker[index], weight[index], steps if axis is None else steps[index]
