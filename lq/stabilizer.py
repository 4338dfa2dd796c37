"""Keeps the low-bit weights of a model from oscillating while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lq.functional import encode
from lq.latent import latent_layers, latent_weight, masked_weight, weight_mask
from lq.layers import QuantLayer
from lq.oscillation import OSCILLATING, OscillationTracker, dampening_gradient
from lq.quantizer import Mode
from lq.spec import QuantSpec


class Stabilizer:
    """Tracks the weights of a model, and freezes or dampens those that oscillate.

    A layer is tracked while its weights are quantized to integers of at most `max_bits`; another
    format begins anew.

    Args:
        model: A quantized model.
        freezes: Whether weights will be frozen.
        momentum: Of the moving averages.
        max_bits: Weights of more bits are left alone.

    Attributes:
        others: Names of layers that are left alone because their weight is computed.

    Example:
        >>> from lq import calibrate, quantize
        >>> model = quantize(nn.Linear(16, 4), {"weights": "int4"})
        >>> model = calibrate(model, [torch.ones(1, 16)], progress=False)
        >>> stabilizer = Stabilizer(model, freezes=True)
        >>> stabilizer.step(model.parameters(), threshold=0.1)
        >>> stabilizer.shares()
        {'share': 0.0, '/share': 0.0, 'frozen': 0.0}
    """

    def __init__(
        self, model: nn.Module, freezes: bool, momentum: float = 0.001, max_bits: int = 4
    ) -> None:
        self.freezes, self.momentum, self.max_bits = freezes, momentum, max_bits
        self._layers, self.others = latent_layers(model)
        self._trackers: dict[str, OscillationTracker] = {}
        self._formats: dict[str, str] = {}

    @property
    def has_layers(self) -> bool:
        """Whether any layer has weights of so few bits in the end."""
        specs = [layer.weight_quantizer.spec for layer in self._layers.values()]
        return any(is_low_bit(spec, self.max_bits) for spec in specs)

    def step(self, parameters: Iterable[Tensor], threshold: float) -> None:
        """Take note of these parameters after an optimizer's step, and hold what is frozen.

        Weights whose frequency is above the threshold are frozen from now on.
        """
        with torch.no_grad():
            for name, layer in self._trained(parameters).items():
                self._tracker(name, layer).follow(layer, threshold)

    def mask_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Take the gradients of frozen weights away."""
        for name, layer in self._trained(parameters).items():
            gradient = getattr(latent_weight(layer), "grad", None)
            frozen = self._trackers[name].frozen if name in self._trackers else None
            if gradient is not None and frozen is not None:
                gradient.masked_fill_(frozen.to(gradient.device), 0)

    def dampen(
        self,
        parameters: Iterable[Tensor],
        weight: float,
        scale: Callable[[Tensor], Tensor] = lambda gradient: gradient,
    ) -> None:
        """Add `weight` times the gradient of the dampening loss; `scale` is a loss scaler's."""
        for layer in self._trained(parameters).values():
            gradient = getattr(latent_weight(layer), "grad", None)
            if gradient is not None:
                gradient.add_(scale(weight * _dampening(layer)))

    def shares(self) -> dict[str, float]:
        """Return the share of weights that oscillate, in all and by layer, and of the frozen."""
        trackers = self._trackers
        if not trackers:
            return {}
        counts = {n: int((t.frequency > OSCILLATING).sum()) for n, t in trackers.items()}
        sizes = {name: tracker.frequency.numel() for name, tracker in trackers.items()}
        found = {"share": sum(counts.values()) / sum(sizes.values())}
        found |= {f"{name}/share": count / sizes[name] for name, count in counts.items()}
        frozen = [int(t.frozen.sum()) for t in trackers.values() if t.frozen is not None]
        return found | ({"frozen": sum(frozen) / sum(sizes.values())} if frozen else {})

    def state_dict(self) -> dict[str, Any]:
        """Return what is known of every weight."""
        trackers = {name: tracker.state() for name, tracker in self._trackers.items()}
        return {"trackers": trackers, "formats": dict(self._formats), "freezes": self.freezes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what was known.

        Raises:
            RuntimeError: If weights were frozen then and would not be now, or the other way.
        """
        if state["freezes"] is not self.freezes:
            raise RuntimeError(
                f"Expected the state of a training that {_says(self.freezes)}, but it is of one "
                f"that {_says(not self.freezes)}; go on with its method, or begin anew."
            )
        self._formats = dict(state["formats"])
        self._trackers = {
            name: OscillationTracker.restored(tracker, self.momentum)
            for name, tracker in state["trackers"].items()
        }

    def _trained(self, parameters: Iterable[Tensor]) -> dict[str, QuantLayer]:
        """Return the layers whose weights are among the parameters, and quantized now."""
        present = {id(parameter) for parameter in parameters}
        return {
            name: layer
            for name, layer in self._layers.items()
            if id(latent_weight(layer)) in present
            and is_low_bit(layer.weight_quantizer.grid, self.max_bits)
            and layer.weight_quantizer.mode is Mode.QUANTIZE
            and layer.weight_quantizer.is_calibrated
        }

    def _tracker(self, name: str, layer: QuantLayer) -> OscillationTracker:
        """Return a layer's tracker: a new one where its weights have another format now."""
        weight, spec = masked_weight(layer), layer.weight_quantizer.grid
        if self._formats.get(name) != spec.format:
            scale = layer.weight_quantizer.grid_scale
            codes = encode(weight.float(), scale, spec.qmin, spec.qmax, spec.axis)
            self._trackers[name] = OscillationTracker(codes, self.momentum, self.freezes)
            self._formats[name] = spec.format
        return self._trackers[name].to(weight.device)


def _dampening(layer: QuantLayer) -> Tensor:
    """Return the gradient of the dampening loss with respect to a layer's latent weight."""
    weight, mask, quantizer = masked_weight(layer), weight_mask(layer), layer.weight_quantizer
    spec, scale = quantizer.grid, quantizer.grid_scale
    gradient = dampening_gradient(weight, scale, spec.qmin, spec.qmax, spec.axis)
    return gradient if mask is None else gradient * mask


def _says(freezes: bool) -> str:
    return "freezes weights" if freezes else "freezes none"


def is_low_bit(spec: QuantSpec, max_bits: int) -> bool:
    """Return whether a spec has integers of at most so many bits.

    Example:
        >>> is_low_bit(QuantSpec("int4"), 4), is_low_bit(QuantSpec("int8"), 4)
        (True, False)
    """
    return spec.number_format.is_integer and spec.number_format.bits <= max_bits
