"""What a mixed-precision plan must keep to."""

from __future__ import annotations

import dataclasses
import glob
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from lq.costs import Costs
from lq.formats import layer_formats
from lq.messages import suggest

FORMATS_IN_PLAY = ("fp32", "bf16", "fp16", "fp8_e4m3", "int8", "int4")
"""What a plan may give a layer; int4 to weights alone. Or two of them as ``weights/inputs``."""


class UnreachableError(ValueError):
    """No plan keeps to the limits.

    Attributes:
        nearest: The model of the plan that came nearest, where plans were measured.
    """

    nearest: nn.Module | None = None


@dataclass(frozen=True)
class Limit:
    """One limit, as the user wrote it and as the search takes it.

    Attributes:
        name: Name of the argument.
        given: Its value.
        quantity: What it limits: ``drop``, ``size_mb``, ``bitops`` or ``latency_ms``.
        bound: Largest value of that quantity.
    """

    name: str
    given: float
    quantity: str
    bound: float

    def allows(self, value: float) -> bool:
        """Return whether a quantity is within the limit, to rounding."""
        return value <= self.bound * (1 + 1e-9)

    def nearest(self, least: float) -> float:
        """Return the least reachable quantity in the terms of the argument, in four digits that do.

        Example:
            >>> Limit("min_compression", 4.0, "size_mb", 2.5).nearest(5.00001)
            1.999
        """
        lower = self.name.startswith("min_")
        value = self.given * self.bound / least if lower else least
        if not 0 < value < math.inf:
            return value
        digit = 10.0 ** (math.floor(math.log10(value)) - 3)
        whole = math.floor(value / digit) if lower else math.ceil(value / digit * (1 - 1e-12))
        return whole * digit


def keeps_to(limits: Iterable[Limit], values: Mapping[str, float]) -> bool:
    """Return whether quantities are within all limits."""
    return all(limit.allows(values[limit.quantity]) for limit in limits)


@dataclass(frozen=True)
class PrecisionConstraints:
    """Limits of a plan, in any combination; at least one.

    Attributes:
        max_accuracy_drop: Largest drop of top-1 against the float model, 0..1.
        max_size_mb: Largest size of the weights, in 10^6 bytes.
        min_compression: Smallest ratio of the float32 size to the plan's.
        max_bitops: Most bit operations for one sample: sum of ``macs * bits * bits``.
        max_latency_ms: Longest time of one sample, by measured latencies of layers.
        min_speedup: Smallest ratio of the float32 latency to the plan's.
        formats: Formats that layers may have; all that were swept, and fp32, if not given.
        pinned: Glob on layers' names -> format that they must have; the last match wins.

    Raises:
        ValueError: For a limit that cannot be meant, or an unknown format.

    Example:
        >>> PrecisionConstraints(max_accuracy_drop=0.01, pinned={"classifier.*": "fp16"}).limited
        ('max_accuracy_drop',)
        >>> PrecisionConstraints(max_accuracy_drop=1)
        Traceback (most recent call last):
        ValueError: Expected `max_accuracy_drop` to be a fraction from 0 to below 1, but got 1; ...
    """

    max_accuracy_drop: float | None = None
    max_size_mb: float | None = None
    min_compression: float | None = None
    max_bitops: float | None = None
    max_latency_ms: float | None = None
    min_speedup: float | None = None
    formats: Sequence[str] | None = None
    pinned: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        drop = self.max_accuracy_drop
        if drop is not None and not 0 <= drop < 1:
            raise ValueError(
                "Expected `max_accuracy_drop` to be a fraction from 0 to below 1, but got "
                f"{drop!r}; a drop of one point is 0.01."
            )
        if not self.limited:
            raise ValueError(
                "Expected at least one limit, but got none; give one, such as max_size_mb=8."
            )
        for name in self.limited:
            if name != "max_accuracy_drop" and not 0 < getattr(self, name) < math.inf:
                raise ValueError(
                    f"Expected `{name}` to be above 0 and finite, but got {getattr(self, name)!r}."
                )
        object.__setattr__(self, "pinned", dict(self.pinned))
        if self.formats is not None:
            object.__setattr__(self, "formats", tuple(self.formats))
        for format in (*(self.formats or ()), *self.pinned.values()):
            _check_in_play(format)
        if self.formats is not None and not self.formats:
            raise ValueError("Expected `formats` to name at least one format, but got none.")

    @property
    def limited(self) -> tuple[str, ...]:
        """Names of the limits that are set."""
        names = [n for n in self.__dataclass_fields__ if n.startswith(("max_", "min_"))]
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def is_timed(self) -> bool:
        """Whether a latency is limited, which has to be measured."""
        return self.max_latency_ms is not None or self.min_speedup is not None

    def limits(self, costs: Costs | None) -> list[Limit]:
        """Return the limits in the order of the arguments.

        Raises:
            ValueError: If one needs costs and there are none.
        """
        return [self._limit(name, costs) for name in self.limited]

    def _limit(self, name: str, costs: Costs | None) -> Limit:
        given: float = getattr(self, name)
        if name == "max_accuracy_drop":
            return Limit(name, given, "drop", given)
        timed = name in ("max_latency_ms", "min_speedup")
        if costs is None or (timed and not costs.latency):
            source = "measure_latency" if timed else "count_costs"
            raise ValueError(
                f"Expected `costs` where `{name}` is limited, but got none; give "
                f"lq.{source}(model, batch)."
            )
        if name.startswith("max_"):
            return Limit(name, given, name.removeprefix("max_"), given)
        quantity = {"min_compression": "size_mb", "min_speedup": "latency_ms"}[name]
        return Limit(name, given, quantity, costs.total(quantity, {}) / given)

    def allows(self, plan: Mapping[str, str]) -> bool:
        """Return whether a plan has the formats that are allowed and pinned.

        Float32 counts as allowed: layers that cannot be quantized have it.
        """
        pins = {layer: self.pin(layer) for layer in plan}
        return all(
            format == pins[layer]
            if pins[layer] is not None
            else self.formats is None or format in (*self.formats, "fp32")
            for layer, format in plan.items()
        )

    def pin(self, layer: str) -> str | None:
        """Return the format that a layer must have, if there is one."""
        found = [f for pattern, f in self.pinned.items() if fnmatchcase(layer, pattern)]
        return found[-1] if found else None

    def check_pins(self, names: Iterable[str]) -> None:
        """Raise a ``ValueError`` for a pin that matches no layer or unit, naming the nearest."""
        names = list(dict.fromkeys(names))
        for pattern in self.pinned:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(
                    f"Expected every pin to match a layer, but {pattern!r} matches none; "
                    f"{suggest(pattern, names)}"
                )

    def by_layer(self, units: Mapping[str, Sequence[str]]) -> PrecisionConstraints:
        """Return the same with pins of units written as pins of their layers."""
        pinned = dict[str, str]()
        for pattern, format in self.pinned.items():
            matching = (layers for name, layers in units.items() if fnmatchcase(name, pattern))
            for key in (pattern, *(glob.escape(n) for layers in matching for n in layers)):
                pinned.pop(key, None)  # the last match wins
                pinned[key] = format
        return dataclasses.replace(self, pinned=pinned)


def _check_in_play(format: str) -> None:
    for part in layer_formats(format):
        if part not in FORMATS_IN_PLAY:
            raise ValueError(
                f"Expected a plan's format to be of {', '.join(FORMATS_IN_PLAY)}, but got "
                f"{format!r}, which no engine runs."
            )
