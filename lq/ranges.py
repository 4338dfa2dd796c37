"""What a calibration found: the range of every quantizer, and why; readable, and reusable."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lq.files import read_saved, write_text
from lq.quantizer import Quantizer
from lq.surgery import quantizers
from lq.tables import aligned

VERSION = 1
EACH = "each"
"""The choice of the best calibrator for each quantizer."""


@dataclass(frozen=True)
class Range:
    """The range of one quantizer.

    Attributes:
        amax: Largest magnitude, float32 ``[]`` or ``[C]``.
        calibrator: Which calibrator it is from.
        errors: Calibrator -> relative squared error that its range causes at the layer's output
            (see ``lq.scoring``); empty where there was nothing to choose.
        ends: Of an asymmetric quantizer, how far the data reach below and above 0, ``[2]``.
    """

    amax: Tensor
    calibrator: str
    errors: Mapping[str, float] = field(default_factory=dict)
    ends: Tensor | None = None

    def apply(self, quantizer: Quantizer) -> None:
        """Give a quantizer its range."""
        if self.ends is None:
            quantizer.amax = self.amax
        else:
            below, above = torch.minimum(self.ends, self.amax)
            quantizer.set_bounds(-below, above)

    def to_dict(self) -> dict[str, Any]:
        """Return the range as plain values."""
        ends = {} if self.ends is None else {"ends": self.ends.tolist()}
        errors = dict(self.errors)
        return {"amax": self.amax.tolist(), "calibrator": self.calibrator, "errors": errors, **ends}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Range:
        """Return the range that ``to_dict`` describes."""
        ends = torch.tensor(plain["ends"]) if "ends" in plain else None
        return cls(torch.tensor(plain["amax"]), plain["calibrator"], plain["errors"], ends)


@dataclass(frozen=True)
class Ranges:
    """The ranges of a model by the names of its quantizers.

    Attributes:
        found: Quantizer -> range.
        model: Hash of the model they belong to.
        data: Hash of the batches they were found from.
        calibrator: What was asked for.
        outputs: Who chose -> relative squared error at the model's outputs: each quantizer's best
            (``"each"``), or one calibrator for all; the smallest was taken. Empty where there was
            nothing to choose.
    """

    found: Mapping[str, Range]
    model: str = ""
    data: str = ""
    calibrator: str = ""
    outputs: Mapping[str, float] = field(default_factory=dict)

    def apply(self, model: nn.Module) -> None:
        """Give a model's quantizers their ranges.

        Raises:
            ValueError: If the model has not the quantizers that have ranges here.
        """
        present = quantizers(model)
        missing = sorted(self.found.keys() - present.keys())
        if missing:
            raise ValueError(
                f"Expected the ranges of this model, but it has no quantizer {missing[0]!r}; "
                "quantize it with the recipe they were found with."
            )
        for name, found in self.found.items():
            found.apply(present[name])

    def table(self) -> str:
        """Return the ranges as text, with the SQNR of every calibrator that competed.

        Example:
            >>> found = Range(torch.tensor(2.5), "mse", {"max": 1e-3, "mse": 1e-4})
            >>> print(Ranges({"conv.input_quantizer": found}).table())
            quantizer             range  calibrator  dB: max    mse
            conv.input_quantizer    2.5  mse            30.0  40.0*
        """
        rivals = list(dict.fromkeys(c for r in self.found.values() for c in r.errors))
        header = ["quantizer", "range", "calibrator"]
        header += [f"{'dB: ' * (i == 0)}{name}" for i, name in enumerate(rivals)]
        lines = [header, *(_row(name, r, rivals) for name, r in self.found.items())]
        if self.outputs:
            lines.append(_output_row(self.outputs, rivals))
        return aligned(lines, left=(0, 2))

    def save(self, path: str | Path) -> None:
        """Write the ranges as JSON."""
        plain = {
            "version": VERSION,
            "calibrator": self.calibrator,
            "model_sha256": self.model,
            "data_sha256": self.data,
            "outputs": self.outputs,
            "ranges": {name: found.to_dict() for name, found in self.found.items()},
        }
        write_text(path, json.dumps(plain, indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Ranges:
        """Return the ranges in a file that ``save`` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not such a file.
        """
        return read_saved(path, "ranges", cls._from_dict, "delete it to calibrate again")

    @classmethod
    def _from_dict(cls, plain: dict[str, Any]) -> Ranges:
        if plain["version"] != VERSION:
            raise ValueError(f"its version is {plain['version']}, not {VERSION}")
        found = {name: Range.from_dict(r) for name, r in plain["ranges"].items()}
        keys = ("model_sha256", "data_sha256", "calibrator", "outputs")
        return cls(found, *(plain[key] for key in keys))

    def check(self, path: str | Path, model: str, data: str, calibrator: str) -> None:
        """Raise a ``ValueError`` unless the ranges are of this model, these data, this calibrator.

        The message says which of them is another.
        """
        for what, mine, theirs in (
            ("model", self.model, model),
            ("data", self.data, data),
            ("calibrator", self.calibrator, calibrator),
        ):
            if mine != theirs:
                raise ValueError(
                    f"Expected the ranges in {str(path)!r} to be found with the same {what}, but "
                    f"that was {mine[:16]} and is {theirs[:16]} now; delete the file to calibrate "
                    "again, or name another."
                )


def _row(name: str, found: Range, rivals: list[str]) -> list[str]:
    low, high = float(found.amax.min()), float(found.amax.max())
    shown = f"{high:.4g}" if found.amax.dim() == 0 else f"{low:.3g}..{high:.3g}"
    cells = [_decibels(found.errors, rival, found.calibrator) for rival in rivals]
    return [name, shown, found.calibrator, *cells]


def _output_row(errors: Mapping[str, float], rivals: list[str]) -> list[str]:
    """Return what all ranges together do at the model's outputs."""
    best = min(errors, key=errors.__getitem__)
    each = _decibels(errors, EACH, best)
    return ["model outputs", "", f"each: {each}", *(_decibels(errors, r, best) for r in rivals)]


def _decibels(errors: Mapping[str, float], name: str, taken: str) -> str:
    """Return an error as SQNR, with a star if it was taken."""
    if name not in errors:
        return ""
    ratio = f"{-10 * math.log10(errors[name]):.1f}" if errors[name] else "inf"
    return ratio + "*" * (name == taken)
