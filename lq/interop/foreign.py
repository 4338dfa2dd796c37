"""A quantizer of another toolkit, in our words."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from lq.tensor_spec import QuantSpec


@dataclass(frozen=True, eq=False)
class Foreign:
    """How another toolkit quantizes one tensor.

    Attributes:
        spec: The same in our words.
        amax: Its range, in the toolkit's own shape; ``None`` where it has none.
    """

    spec: QuantSpec
    amax: Tensor | None


def foreign(
    num_bits: int | tuple[int, ...],
    amax: Tensor | None,
    unsigned: bool = False,
    narrow: bool = False,
    learns: bool = False,
    per_channel: bool = False,
) -> Foreign | str:
    """Return a quantizer as pytorch-quantization and modelopt describe it, or why it cannot be.

    Args:
        num_bits: Bits of an integer, or those of exponent and mantissa.
        amax: Its range.
        unsigned: Whether codes begin at 0.
        narrow: Whether the lowest code is not used.
        learns: Whether the range trains, by what is clipped.
        per_channel: Whether output channels have ranges of their own.
    """
    if tuple(num_bits if isinstance(num_bits, (tuple, list)) else ()) == (4, 3):
        format = "fp8_e4m3"
    elif isinstance(num_bits, int) and 2 <= num_bits <= 8:
        format = f"int{num_bits}"
    else:
        return f"there is no format of {num_bits} bits"
    if amax is not None:
        amax = amax.detach().float()
        if not bool(amax.isfinite().all()):
            amax = None
        elif bool((amax < 0).any()):
            return "its range is negative"
    if unsigned and format.startswith("fp"):
        return "floating point has a sign"
    axis = 0 if per_channel else None
    spec = QuantSpec(format, not unsigned, axis, True, narrow, "pact" if learns else "frozen")
    return Foreign(spec, amax)
