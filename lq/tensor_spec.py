"""How one tensor, and how one layer, is quantized."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lq.formats import FORMATS, Format, check_format
from lq.functional import FP8_MAX
from lq.messages import check_keys, suggest

RANGES = ("frozen", "moving_average", "lsq", "pact")
"""What can become of a range while a model trains."""


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized: ``scale = amax / qmax``, zero-point 0 unless asymmetric.

    Per tensor (``axis=None``) the scale has shape ``[]``; per channel a tensor of shape
    ``[.., C, ..]`` with ``C`` at `axis` has a scale of shape ``[C]``.

    Attributes:
        format: Name of a number format.
        signed: ``False`` for codes 0 ... 2^b - 1 of tensors that are never negative.
        axis: Channel axis, or ``None`` per tensor. In a recipe's weights any axis stands for the
            output channels, which each kind of layer has in its own place.
        symmetric: ``False`` gives an input of integer format codes 0 ... 2^b - 1 and a learned
            offset (LSQ+, Bhalgat et al. 2020), for targets that have zero-points.
        narrow: Drop the lowest code, so that the range is symmetric: [-127, 127]. Recipes set it
            for weights.
        range: What becomes of the calibrated range in training. ``"frozen"`` keeps it;
            ``"moving_average"`` follows the largest magnitudes of the batches (Jacob et al.
            2018); ``"lsq"`` trains the scale (Esser et al. 2020); ``"pact"`` trains it by what
            is clipped alone (Choi et al. 2018).

    Raises:
        ValueError: For an unknown format or a combination that no engine has.

    Example:
        >>> spec = QuantSpec("int8", axis=0, narrow=True)
        >>> spec.qmin, spec.qmax
        (-127, 127)
    """

    format: str = "int8"
    signed: bool = True
    axis: int | None = None
    symmetric: bool = True
    narrow: bool = False
    range: str = "frozen"

    def __post_init__(self) -> None:
        check_format(self.format)
        for name in ("signed", "symmetric", "narrow"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"Expected `{name}` to be true or false, but got {getattr(self, name)!r}."
                )
        if self.range not in RANGES:
            raise ValueError(
                f"Expected `range` to be one of {', '.join(RANGES)}, but got {self.range!r}; "
                f"{suggest(self.range, RANGES)}"
            )
        if not self.symmetric:
            self._check_asymmetric()
        if not self.signed and not self.number_format.is_integer:
            raise ValueError(
                f"Expected `signed` to be True for format {self.format!r}, but got False: "
                "only integer formats can be unsigned."
            )
        if self.axis is not None and (
            isinstance(self.axis, bool) or not isinstance(self.axis, int)
        ):
            raise ValueError(f"Expected `axis` to be an int or None, but got {self.axis!r}.")

    def _check_asymmetric(self) -> None:
        learned_input = self.range == "lsq" and self.axis is None and not self.narrow
        if not learned_input or not self.number_format.is_integer:
            raise ValueError(
                "Expected `symmetric` to be True except for inputs of an integer format with "
                f"range: lsq, which learns the offset, but got False with {self.format} and "
                f"range: {self.range}."
            )

    @property
    def number_format(self) -> Format:
        """The format's description."""
        return FORMATS[self.format]

    @property
    def needs_scale(self) -> bool:
        """Whether the tensor has a scale to calibrate."""
        return self.number_format.needs_scale

    @property
    def learns_range(self) -> bool:
        """Whether the scale is a parameter."""
        return self.needs_scale and self.range in ("lsq", "pact")

    @property
    def _counts_from_zero(self) -> bool:
        return not (self.signed and self.symmetric)

    @property
    def qmax(self) -> float:
        """Largest code."""
        if self.format == "fp8_e4m3":
            return FP8_MAX
        bits = self.number_format.bits
        return (1 << bits) - 1 if self._counts_from_zero else (1 << (bits - 1)) - 1

    @property
    def qmin(self) -> float:
        """Smallest code."""
        if self._counts_from_zero:
            return 0
        return -self.qmax if self.narrow or self.format == "fp8_e4m3" else -self.qmax - 1

    @classmethod
    def parse(cls, value: Any, where: str = "a spec", **defaults: Any) -> QuantSpec:
        """Return the spec that a format name, a mapping or a spec stands for."""
        if isinstance(value, QuantSpec):
            return value
        if isinstance(value, str):
            return cls(value, **defaults)
        if isinstance(value, Mapping):
            check_keys(value, [f.name for f in dataclasses.fields(cls)], where)
            return cls(**{**defaults, **value})
        raise ValueError(f"Expected {where} to be a format name or a mapping, but got {value!r}.")


@dataclass(frozen=True)
class LayerSpec:
    """The specs of one layer's weights and input."""

    weights: QuantSpec
    inputs: QuantSpec

    def __post_init__(self) -> None:
        weights, inputs = self.weights, self.inputs
        if not weights.needs_scale and weights.format != inputs.format:
            raise ValueError(
                f"Expected weights in {weights.format!r} to meet inputs of the same format, but "
                f"got inputs in {inputs.format!r}: a layer computes in one format."
            )

    @property
    def is_float(self) -> bool:
        """Whether the layer stays as it is."""
        return self.weights.format == self.inputs.format == "fp32"


FLOAT_LAYER = LayerSpec(QuantSpec("fp32"), QuantSpec("fp32"))
