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


WEIGHTS_ONLY = ("int4",)
"""Formats that a plan gives to weights alone: engines store them, and multiply in float."""


def layer_formats(word: str) -> tuple[str, str]:
    """Return the formats of weights and inputs that a plan's word for a layer stands for.

    It is one format for both, two as ``weights/inputs``, or ``int4`` for int4 weights that meet
    float inputs, as engines have it.

    Raises:
        ValueError: For an unknown format, naming the nearest.

    Example:
        >>> layer_formats("int8"), layer_formats("int8/fp32"), layer_formats("int4")
        (('int8', 'int8'), ('int8', 'fp32'), ('int4', 'fp32'))
    """
    if word in WEIGHTS_ONLY:
        return word, "fp32"
    weights, slash, inputs = word.partition("/")
    inputs = inputs if slash else weights
    check_format(weights)
    check_format(inputs)
    return weights, inputs


def layer_format(weights: str, inputs: str) -> str:
    """Return the word of a plan for weights and inputs, as ``layer_formats`` reads it.

    Weights that are plain floats say it alone: a layer computes in one format.

    Example:
        >>> layer_format("int4", "fp32"), layer_format("int8", "fp32"), layer_format("fp16", "int8")
        ('int4', 'int8/fp32', 'fp16')
    """
    if weights in WEIGHTS_ONLY and inputs == "fp32":
        return weights
    alone = weights == inputs or not FORMATS[weights].needs_scale
    return weights if alone else f"{weights}/{inputs}"


def check_format(name: Any, extra: tuple[str, ...] = ()) -> None:
    """Raise a ``ValueError`` with the nearest spelling unless `name` is a format."""
    valid = [*FORMATS, *extra]
    if name not in valid:
        raise ValueError(
            f"Expected `format` to be a known number format, but got {name!r}; "
            f"{suggest(name, valid)}"
        )
