"""Number formats, by the names they go by in recipes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lq.messages import suggest


@dataclass(frozen=True)
class Format:
    """A number format.

    Attributes:
        name: Its name in recipes.
        bits: Bits a number takes.
        dtype: The torch type a layer computes in, for formats that are casts; ``None`` for those
            that need a scale.
    """

    name: str
    bits: int
    dtype: torch.dtype | None = None

    @property
    def needs_scale(self) -> bool:
        """Whether numbers are codes times a scale (int, fp8) and not plain floats."""
        return self.dtype is None

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers."""
        return self.name.startswith("int")


FORMATS: dict[str, Format] = {
    **{f"int{bits}": Format(f"int{bits}", bits) for bits in range(2, 9)},
    "fp8_e4m3": Format("fp8_e4m3", 8),
    "fp16": Format("fp16", 16, torch.float16),
    "bf16": Format("bf16", 16, torch.bfloat16),
    "fp32": Format("fp32", 32, torch.float32),
}


def check_format(name: Any, extra: tuple[str, ...] = ()) -> None:
    """Raise a ``ValueError`` with the nearest spelling unless `name` is a format."""
    valid = [*FORMATS, *extra]
    if name not in valid:
        raise ValueError(
            f"Expected `format` to be a known number format, but got {name!r}; "
            f"{suggest(name, valid)}"
        )
