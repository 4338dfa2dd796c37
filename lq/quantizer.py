"""The fake-quant node."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lq.functional import (
    along_axis,
    amax_along_axis,
    amax_to_scale,
    fake_quantize,
    is_exporting,
    is_in_backward,
    learned_scale,
    offset_to_zero_point,
    round_to_dtype,
)
from lq.ranks import world_size
from lq.tensor_spec import QuantSpec

MOMENTUM = 0.99
"""Share of a moving-average range that stays at each training batch."""


class Mode(enum.Enum):
    """What a quantizer does with its input."""

    BYPASS = "bypass"
    """Return it as it is."""
    OBSERVE = "observe"
    """Show it to the observer and return it as it is."""
    QUANTIZE = "quantize"
    """Quantize it."""


class Observer(Protocol):
    """What a quantizer in observe mode shows its inputs to."""

    def observe(self, x: Tensor) -> None:
        """Take note of one tensor."""


class Quantizer(nn.Module):
    """Rounds one tensor to the numbers its spec allows.

    The scale is a buffer, or a parameter when learned, of its final shape from the start:
    ``[]`` per tensor, ``[channels]`` per channel, NaN until calibrated; float32 whatever type the
    model is cast to. Formats without a scale (fp16, bf16, fp32) have ``scale = None``. Asymmetric
    specs have a learned ``offset`` besides, the value of the smallest code; others have ``None``.

    Ranges move only in training mode: learned ones by the optimizer, moving averages in
    ``forward``, which follows ``amax`` of each tensor over all ranks,
    ``amax <- 0.99 amax + 0.01 max |x|`` (Jacob et al. 2018, section 3.1); a forward pass that is
    done again for the backward pass (checkpointing) moves nothing.

    Args:
        spec: How to quantize.
        channels: Length of the channel axis, for a per-channel spec.
        name: Qualified name, for messages.
        device: Where the scale lives.

    Example:
        >>> quantizer = Quantizer(QuantSpec("int8"), name="conv.input_quantizer")
        >>> quantizer
        Quantizer(int8, uncalibrated)
        >>> quantizer.amax = torch.tensor(12.7)
        >>> quantizer(torch.tensor([0.26, 99.0]))
        tensor([ 0.3000, 12.7000])
    """

    scale: Tensor | None
    offset: Tensor | None

    def __init__(
        self,
        spec: QuantSpec,
        channels: int | None = None,
        name: str = "quantizer",
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.name = name
        self.mode = Mode.QUANTIZE
        self.observer: Observer | None = None
        self.bits: int | None = None
        """Bits the codes have for now, where that is more than the format's."""
        self.memory_efficient = False
        """Whether the backward pass quantizes again instead of saving what was quantized."""
        self.is_frozen = False
        """Whether a range that learns or follows stays where it is."""
        # Cached, so that a calibrated quantizer never waits for the device to look at its scale.
        self._calibrated = not spec.needs_scale
        self.register_buffer("offset", None)
        if not spec.needs_scale:
            self.register_buffer("scale", None)
            return
        if (spec.axis is None) is not (channels is None):
            raise ValueError(
                f"Expected `channels` for a per-channel spec and none otherwise, "
                f"but got axis={spec.axis} with channels={channels}."
            )
        shape = () if channels is None else (channels,)
        scale = torch.full(shape, torch.nan, device=device, dtype=torch.float32)
        if spec.learns_range:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
        if not spec.symmetric:
            self.offset = nn.Parameter(scale.clone())

    @property
    def is_calibrated(self) -> bool:
        """Whether the scale is known: finite and positive everywhere."""
        if not self._calibrated and self.scale is not None:
            scale = self.scale.detach()
            # A learned scale may step over zero; it is used as a small positive one then.
            known = scale.isfinite() if self.spec.learns_range else scale.isfinite() & (scale > 0)
            self._calibrated = bool(known.all())
        return self._calibrated

    @property
    def amax(self) -> Tensor | None:
        """The magnitude that maps to the largest code; setting it sets the scale.

        Of an asymmetric quantizer, the larger magnitude of the two ends of its range.
        """
        if self.scale is None:
            return None
        width = self.positive_scale * self.spec.qmax
        if self.offset is None:
            return width
        low = self.offset.detach()
        return torch.maximum(-low, low + width)

    @amax.setter
    def amax(self, amax: Tensor) -> None:
        if self.scale is None:
            raise ValueError(f"{self.name!r} is {self.spec.format} and has no range to set.")
        amax = torch.as_tensor(amax, device=self.scale.device)
        if not bool((amax.isfinite() & (amax >= 0)).all()):
            raise ValueError(
                f"Expected the range of {self.name!r} to be finite and not negative, "
                f"but got {amax.tolist() if amax.numel() < 5 else amax}."
            )
        if amax.shape != self.scale.shape:
            raise ValueError(
                f"Expected the range of {self.name!r} to have shape {list(self.scale.shape)}, "
                f"but got {list(amax.shape)}."
            )
        if self.offset is not None:
            self.set_bounds(-amax, amax)
            return
        with torch.no_grad():
            self.scale.copy_(amax_to_scale(amax, self.spec.qmax))
        self._calibrated = True

    @property
    def positive_scale(self) -> Tensor:
        """The scale as it is used: one that learned its way below zero as a small positive one."""
        assert self.scale is not None
        scale = self.scale.detach()
        return learned_scale(scale) if self.spec.learns_range else scale

    @property
    def grid_scale(self) -> Tensor:
        """The same of the codes there are for now, which may be more."""
        return self._on_grid(self.positive_scale)

    def set_bounds(self, low: Tensor, high: Tensor) -> None:
        """Set the range of an asymmetric quantizer; it always takes in 0."""
        assert self.scale is not None
        assert self.offset is not None
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        with torch.no_grad():
            self.offset.copy_(low)
            self.scale.copy_(amax_to_scale(high - low, self.spec.qmax))
        self._calibrated = True

    @property
    def zero_point(self) -> Tensor:
        """The code of 0, a whole number ``[]``; 0 unless asymmetric."""
        if self.scale is None or self.offset is None:
            return torch.zeros(())
        spec = self.spec
        return offset_to_zero_point(self.offset.detach(), self.positive_scale, spec.qmin, spec.qmax)

    def saved(self) -> tuple[Tensor, ...]:
        """Return copies of what says the range, for ``restore``."""
        return tuple(t.detach().clone() for t in self.range_tensors().values())

    def restore(self, *saved: Tensor | float) -> None:
        """Set the range as it was before, NaN where it was not known."""
        for tensor, value in zip(self.range_tensors().values(), saved, strict=True):
            tensor.data.copy_(torch.as_tensor(value))
        self._calibrated = not self.spec.needs_scale  # as far as is known; looked at when needed

    def reset_parameters(self) -> None:
        """Forget the range; called by name where modules made on the meta device come to life."""
        self.restore(*(torch.nan for _ in self.range_tensors()))

    @property
    def compute_dtype(self) -> torch.dtype | None:
        """The 16-bit type that the layer computes in now, if any."""
        dtype = self.spec.number_format.dtype
        return dtype if dtype is not torch.float32 and self.mode is Mode.QUANTIZE else None

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` as the mode says; integer tensors pass through.

        Raises:
            RuntimeError: In quantize mode before the range is known.
        """
        if self.mode is Mode.BYPASS or not x.is_floating_point():
            return x
        if self.mode is Mode.OBSERVE:
            if self.observer is not None:
                self.observer.observe(x)
            return x
        if self.scale is None:
            return x if self.compute_dtype is None else round_to_dtype(x, self.compute_dtype)
        if not self.is_calibrated:
            raise RuntimeError(
                f"Quantizer {self.name!r} is not calibrated: run lq.calibrate(model, batches), add "
                "a Calibration or QuantizationAwareTraining callback, load a calibrated "
                "checkpoint, or leave the layer float with a recipe rule (format: skip)."
            )
        moves = self.training and not self.is_frozen and not is_in_backward()
        follows = self.spec.range == "moving_average" and moves
        return self._quantize(x, self._follow(x) if follows else self.scale)

    def as_now(self) -> Callable[[Tensor], Tensor]:
        """Return a function that quantizes as this does now, whatever becomes of the range."""
        dtype = self.compute_dtype
        if self.scale is None or self.mode is not Mode.QUANTIZE:
            return lambda x: x if dtype is None else round_to_dtype(x, dtype)
        spec, offset = self.grid, None if self.offset is None else self.offset.detach().clone()
        # One that learns requires a gradient, which decides between kernels.
        learns = spec.learns_range and not self.is_frozen
        scale = self.grid_scale.clone().requires_grad_(learns)
        return lambda x: fake_quantize(x, scale, spec.qmin, spec.qmax, spec.axis, offset)

    def _quantize(self, x: Tensor, scale: Tensor) -> Tensor:
        """Return `x` rounded with a scale, that of the quantizer's own format."""
        spec, offset = self.grid, self.offset
        if self.is_frozen:
            scale, offset = scale.detach(), None if offset is None else offset.detach()
        if spec.learns_range:
            # Without a gradient while exporting, whose batch a look at its size would fix.
            scale = learned_scale(scale, 1.0 if is_exporting() else self._gradient_scale(x))
        scale = self._on_grid(scale)
        low, high, axis = spec.qmin, spec.qmax, spec.axis
        if is_exporting():
            exported: Tensor = torch.ops.lq.fake_quantize(x, scale, low, high, axis, offset)
            return exported
        clipped_only, again = spec.range == "pact", self.memory_efficient
        return fake_quantize(x, scale, low, high, axis, offset, clipped_only, again)

    @property
    def grid(self) -> QuantSpec:
        """The spec as it is for now, with more bits where there are."""
        if self.bits is None or self.bits <= self.spec.number_format.bits:
            return self.spec
        return dataclasses.replace(self.spec, format=f"int{self.bits}")

    def _on_grid(self, scale: Tensor) -> Tensor:
        """Return a scale of the own format as that of the codes for now, which reach as far."""
        grid = self.grid
        return scale if grid is self.spec else scale * (self.spec.qmax / grid.qmax)

    def _follow(self, x: Tensor) -> Tensor:
        """Move the range towards the largest magnitudes of a batch, those of all ranks."""
        assert self.scale is not None
        amax = amax_along_axis(x.detach(), self.spec.axis).float()
        if world_size() > 1:
            torch.distributed.all_reduce(amax, torch.distributed.ReduceOp.MAX)
        self.scale.lerp_(amax_to_scale(amax, self.spec.qmax), 1 - MOMENTUM)
        # A copy, as a layer used twice moves the range again before the backward pass.
        return self.scale.clone()

    def _gradient_scale(self, x: Tensor) -> float:
        """Return what the gradient of a learned scale is multiplied by.

        ``1 / sqrt(N qmax)`` with `N` the weights or, of one sample, the features that share the
        scale (Esser et al. 2020, section 2.2); for PACT ``1 / qmax^2``, with which gradient descent
        moves ``amax = scale * qmax`` as if that were the parameter. With more bits for now, their
        scale moves as if it were the parameter.
        """
        spec = self.spec
        if spec.range == "pact":
            return spec.qmax**-2
        assert self.scale is not None
        is_weight = spec.narrow or spec.axis is not None
        shared = x.numel() / (self.scale.numel() if is_weight else max(len(x), 1))
        qmax = self.grid.qmax
        return (qmax / spec.qmax) ** 2 / math.sqrt(max(shared, 1) * qmax)

    def clipped(self, x: Tensor) -> Tensor:
        """Return where `x` lies beyond the range, NaN included, as a mask."""
        codes = x.detach() / along_axis(self.positive_scale, self.spec.axis, x.dim())
        codes = codes + self.zero_point
        return ~((codes >= self.spec.qmin - 0.5) & (codes <= self.spec.qmax + 0.5))

    def extra_repr(self) -> str:
        """Return format, axis and scale in a few words."""
        spec = self.spec
        parts = [spec.format if spec.qmin else f"u{spec.format}"]
        if self.scale is None:
            return parts[0]
        if spec.axis is not None:
            parts.append(f"axis={spec.axis}")
        if spec.range != "frozen":
            parts.append(spec.range if spec.symmetric else f"{spec.range}+")
        if not self.is_calibrated:
            parts.append("uncalibrated")
        elif self.scale.dim() == 0:
            parts.append(f"scale={self.scale.item():.3g}")
        else:
            parts.append(f"scale={self.scale.min().item():.3g}..{self.scale.max().item():.3g}")
        if self.offset is not None and self.is_calibrated:
            parts.append(f"offset={self.offset.item():.3g}")
        if self.grid is not spec:
            parts.append(f"{self.bits} bits for now")
        if self.mode is not Mode.QUANTIZE:
            parts.append(self.mode.value)
        return ", ".join(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        # Moves with the model, but stays float32: a rounded scale would change the integers.
        before = {name: t.data for name, t in self.range_tensors().items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in self.range_tensors().items():
            if tensor.dtype != torch.float32:
                tensor.data = before[name].to(tensor.device)
        return self

    def range_tensors(self) -> dict[str, Tensor]:
        """Return the buffers or parameters that say the range, by name."""
        named = {"scale": self.scale, "offset": self.offset}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._calibrated = not self.spec.needs_scale
        if self.scale is not None and not self.scale.is_meta:
            _ = self.is_calibrated  # looks now, so that nothing has to while compiled or exported
