"""What there is to say of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lq.tables import aligned


@dataclass(frozen=True)
class Inspection:
    """What a file holds.

    Attributes:
        path: The file.
        kind: What it is: ``checkpoint``, ``weights``, ``ONNX graph``, ``engine``, ``recipe``,
            ``plan``, ``sensitivity``, ``ranges`` or ``comparison``.
        facts: What is said of the whole.
        rows: What is said of each part, column by name. Two numbers are the ends of a range.
        not_calibrated: Names of quantizers without a range.
    """

    path: str
    kind: str
    facts: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]] = ()
    not_calibrated: Sequence[str] = field(default=())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values, as ``lq inspect --json`` prints it."""
        return {
            "path": self.path,
            "kind": self.kind,
            "facts": dict(self.facts),
            "rows": [dict(row) for row in self.rows],
            "not_calibrated": list(self.not_calibrated),
        }

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.kind}"]
        lines += [f"  {name}: {_cell(value)}" for name, value in self.facts.items()]
        if self.rows:
            columns = list(dict.fromkeys(name for row in self.rows for name in row))
            cells = [[_cell(row.get(name)) for name in columns] for row in self.rows]
            lines += ["", aligned([columns, *cells])]
        if self.not_calibrated:
            lines += ["", f"Not calibrated: {', '.join(self.not_calibrated)}"]
        return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{count} {name}" for name, count in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        numbers = len(value) == 2 and all(isinstance(v, float) for v in value)
        return f"{value[0]:.3g}..{value[1]:.3g}" if numbers else "x".join(map(str, value))
    return str(value)


def size_of(path: Path) -> str:
    """Return the size of a file in 10^6 bytes, as text."""
    return f"{path.stat().st_size / 1e6:.3f} MB"
