"""What rounding does to a weight: before, after, and the error, channel by channel."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lq.calibrators.weights import weight_max_amax
from lq.functional import along_axis, amax_to_scale, encode, other_axes, sqnr_db
from lq.sensitivity.plain import to_plain
from lq.tensor_spec import QuantSpec

BINS = 101
"""Bins of the weights and of the errors; odd, so that 0 is in the middle of one."""
_SEQUENCES = ("edges", "before", "codes", "code_counts", "error_edges", "errors")


@dataclass(frozen=True)
class WeightError:
    """A weight as float and as codes, and how they differ.

    Attributes:
        name: The layer's.
        format: The number format of the codes.
        edges: Of bins for the float weights.
        before: Float weights in each bin.
        codes: The codes that occur, in order.
        code_counts: How often each does.
        error_edges: Of bins for the errors ``w - code * scale``, in steps of the grid (one scale).
        errors: Errors in each bin.
        channel_sqnr_db: SQNR of each channel; infinite where nothing is lost.
        sqnr_db: SQNR of the whole.
    """

    name: str
    format: str
    edges: tuple[float, ...]
    before: tuple[float, ...]
    codes: tuple[float, ...]
    code_counts: tuple[int, ...]
    error_edges: tuple[float, ...]
    errors: tuple[float, ...]
    channel_sqnr_db: tuple[float, ...]
    sqnr_db: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, which strict JSON can hold."""
        plain: dict[str, Any] = to_plain(dataclasses.asdict(self))
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> WeightError:
        """Return what ``to_dict`` describes."""
        sequences = {name: tuple(plain[name]) for name in _SEQUENCES}
        channels = tuple(float(value) for value in plain["channel_sqnr_db"])
        numbers = {"channel_sqnr_db": channels, "sqnr_db": float(plain["sqnr_db"])}
        return cls(plain["name"], plain["format"], **sequences, **numbers)  # type: ignore[arg-type]


def weight_error(
    weight: nn.Module | Tensor, spec: QuantSpec | None = None, name: str = ""
) -> WeightError:
    """Measure what quantizing a weight does to it.

    Args:
        weight: A quantized layer, calibrated; or a tensor, whose ranges are its largest magnitudes.
        spec: How a tensor is quantized: by default int8 per channel, as layers are.
        name: For titles.

    Raises:
        ValueError: If the layer has no codes: it is not quantized, or its format is a float's.
        RuntimeError: If the layer is not calibrated.

    Example:
        >>> found = weight_error(torch.tensor([[1.0, 0.3], [0.5, 0.24]]))
        >>> found.codes, found.code_counts
        ((38.0, 61.0, 127.0), (1, 1, 2))
    """
    if isinstance(weight, Tensor):
        spec = spec or QuantSpec("int8", axis=0, narrow=True)
        if not spec.needs_scale:
            raise ValueError(f"Expected `spec` to be of a format with a scale, but got {spec}.")
        values = weight.detach().float()
        return _measured(
            values, amax_to_scale(weight_max_amax(values, spec), spec.qmax), spec, name
        )
    return _of_layer(weight, name)


def _of_layer(layer: nn.Module, name: str) -> WeightError:
    quantizer = getattr(layer, "weight_quantizer", None)
    stored = getattr(layer, "weight", None)
    if quantizer is None or not isinstance(stored, Tensor) or not quantizer.spec.needs_scale:
        raise ValueError(
            "Expected a quantized layer whose weights have codes, but got "
            f"{type(layer).__name__}; call lq.quantize first, or pass a tensor and a `spec`."
        )
    if not quantizer.is_calibrated:
        raise RuntimeError(f"{quantizer.name!r} is not calibrated: run lq.calibrate first.")
    name = name or quantizer.name.removesuffix("weight_quantizer").rstrip(".")
    return _measured(stored.detach().float(), quantizer.grid_scale, quantizer.grid, name)


def _measured(weight: Tensor, scale: Tensor, spec: QuantSpec, name: str) -> WeightError:
    codes = encode(weight, scale, spec.qmin, spec.qmax, spec.axis)
    step = along_axis(scale, spec.axis, weight.dim())
    error = weight - codes * step
    limit = float(weight.abs().max()) or 1.0
    farthest = max(0.5, float((error / step).abs().max()))
    found, counts = torch.unique(codes, return_counts=True)
    edges, before = _histogram(weight, limit)
    error_edges, errors = _histogram(error / step, farthest)
    return WeightError(
        name=name,
        format=spec.format,
        edges=edges,
        before=before,
        codes=tuple(found.tolist()),
        code_counts=tuple(counts.tolist()),
        error_edges=error_edges,
        errors=errors,
        channel_sqnr_db=_by_channel(weight, error, spec.axis or 0),
        sqnr_db=sqnr_db(weight, weight - error),
    )


def _histogram(values: Tensor, limit: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    counts, edges = torch.histogram(values.cpu().flatten(), BINS, range=(-limit, limit))
    return tuple(edges.tolist()), tuple(counts.tolist())


def _by_channel(weight: Tensor, error: Tensor, axis: int) -> tuple[float, ...]:
    others = other_axes(axis, weight.dim())
    signal, noise = (x.double().square().sum(others) for x in (weight, error))
    found: list[float] = (10 * torch.log10(signal / noise)).tolist()
    return tuple(float("inf") if n == 0 else v for v, n in zip(found, noise.tolist(), strict=True))
