"""The fake-quant node."""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lq.functional import (
    along_axis,
    amax_to_scale,
    fake_quantize,
    is_exporting,
    round_to_dtype,
)
from lq.spec import QuantSpec


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
    model is cast to. Formats without a scale (fp16, bf16, fp32) have ``scale = None``.

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
        # Cached, so that a calibrated quantizer never waits for the device to look at its scale.
        self._calibrated = not spec.needs_scale
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
        if spec.learn_scale:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)

    @property
    def is_calibrated(self) -> bool:
        """Whether the scale is known: finite and positive everywhere."""
        if not self._calibrated and self.scale is not None:
            scale = self.scale.detach()
            # A learned scale may step over zero; it is used as a small positive one then.
            known = scale.isfinite() if self.spec.learn_scale else scale.isfinite() & (scale > 0)
            self._calibrated = bool(known.all())
        return self._calibrated

    @property
    def amax(self) -> Tensor | None:
        """The magnitude that maps to the largest code; setting it sets the scale."""
        return None if self.scale is None else self.scale.detach() * self.spec.qmax

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
        with torch.no_grad():
            self.scale.copy_(amax_to_scale(amax, self.spec.qmax))
        self._calibrated = True

    def restore(self, scale: Tensor | float) -> None:
        """Set the scale as it was before, NaN where it was not known."""
        if self.scale is not None:
            self.scale.data.copy_(torch.as_tensor(scale))
            self._calibrated = False  # as far as is known; it is looked at when needed

    def reset_parameters(self) -> None:
        """Forget the range; called by name where modules made on the meta device come to life."""
        self.restore(torch.nan)

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
        spec = self.spec
        scale = _positive(self.scale) if spec.learn_scale else self.scale
        quantize = torch.ops.lq.fake_quantize if is_exporting() else fake_quantize
        y: Tensor = quantize(x, scale, spec.qmin, spec.qmax, spec.axis)
        return y

    def clipped(self, x: Tensor) -> Tensor:
        """Return where `x` lies beyond the range, as a mask."""
        assert self.scale is not None
        codes = x.detach() / along_axis(self.scale.detach(), self.spec.axis, x.dim())
        return (codes < self.spec.qmin - 0.5) | (codes > self.spec.qmax + 0.5)

    def extra_repr(self) -> str:
        """Return format, axis and scale in a few words."""
        spec = self.spec
        parts = [spec.format if spec.signed else f"u{spec.format}"]
        if self.scale is None:
            return parts[0]
        if spec.axis is not None:
            parts.append(f"axis={spec.axis}")
        if spec.learn_scale:
            parts.append("learned")
        if not self.is_calibrated:
            parts.append("uncalibrated")
        elif self.scale.dim() == 0:
            parts.append(f"scale={self.scale.item():.3g}")
        else:
            parts.append(f"scale={self.scale.min().item():.3g}..{self.scale.max().item():.3g}")
        if self.mode is not Mode.QUANTIZE:
            parts.append(self.mode.value)
        return ", ".join(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Quantizer:
        # Moves with the model, but stays float32: a rounded scale would change the integers.
        before = None if self.scale is None else self.scale.data
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before is not None and self.scale is not None and self.scale.dtype != torch.float32:
            self.scale.data = before.to(self.scale.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._calibrated = not self.spec.needs_scale
        if self.scale is not None and not self.scale.is_meta:
            _ = self.is_calibrated  # looks now, so that nothing has to while compiled or exported


def _positive(scale: Tensor) -> Tensor:
    """Keep a learned scale above zero, letting its gradient through so that it can come back."""
    return scale + (scale.clamp_min(1e-12) - scale).detach()
