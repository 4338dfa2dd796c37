"""What a comparison found, readable again without running anything."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from lq.comparison.explained import Explanation
from lq.comparison.row import Row, unpack
from lq.comparison.speed import Setting
from lq.costs import Costs
from lq.files import read_saved, write_text
from lq.paired import Drop, paired_drop
from lq.sensitivity import Sensitivity
from lq.tables import aligned

VERSION = 1
"""Of the JSON file; a change that older readers would misread raises it."""
FLOAT = "float"
"""Name of the float model's row."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Methods of quantizing, measured on the same samples and in the same engine.

    Attributes:
        model: Name of the model.
        parameters: Numbers in it.
        data: Name of the data.
        n: Test samples.
        places: Of dense outputs, how many predictions each sample has; empty where it is one.
        held_out: Samples that repairs and searches chose by.
        target: What the models were exported for.
        hardware: What ran them, with its version.
        rows: One for each method, the float model first.
        costs: What the layers cost.
        explanation: Ranges, tensors and weights, and how many samples calibration needs.
        sensitivity: What a sweep found, where a method swept.

    Example:
        >>> comparison = Comparison(model="Net", parameters=10, data="digits", n=2, held_out=2,
        ...                         target="onnxruntime", hardware="cpu", rows=[Row(name="float")],
        ...                         costs=Costs({}, 0.0))
        >>> comparison["float"].kind
        'float'
    """

    model: str
    parameters: int
    data: str
    n: int
    held_out: int
    target: str
    hardware: str
    rows: Sequence[Row]
    costs: Costs
    explanation: Explanation = field(default_factory=Explanation)
    sensitivity: Sensitivity | None = None
    places: Sequence[int] = ()

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        names = [row.name for row in self.rows]
        raise KeyError(
            f"Expected a method of the comparison, but got {name!r}; choose from {names}."
        )

    @property
    def measured(self) -> list[Row]:
        """The rows that came to something."""
        return [row for row in self.rows if row.evaluation is not None]

    @property
    def deployed(self) -> list[Row]:
        """The rows that have a file, which the target runs."""
        return [row for row in self.measured if row.file]

    def compression(self, row: Row) -> float:
        """Return how many times as small as the float model's file a row's is."""
        return self.rows[0].size_mb / row.size_mb

    def difference(self, row: Row, other: Row) -> Drop:
        """Return how much less often `row` is right than `other`, on the same samples."""
        places = torch.tensor(self.places) if self.places else None
        bits = sum(self.places) or self.n
        return paired_drop(unpack(other.right, bits), unpack(row.right, bits), places)

    @property
    def settings(self) -> list[Setting]:
        """Batch sizes and threads that were timed."""
        return [speedup.setting for speedup in self.rows[0].speedups]

    def table(self) -> str:
        """Return the rows as text."""
        lines = [self.header(), *(self.cells(row) for row in self.measured)]
        failed = [f"{row.name}: {row.failed}" for row in self.rows if row.failed]
        return "\n".join([aligned(lines), *failed])

    def header(self) -> list[str]:
        """Return what a table shows of each row; times are of the first setting."""
        size = f", batch {self.settings[0][0]}" if self.settings else ""
        header = ["method", "top-1", "points lost (95%)", "agreement", "MB", "smaller"]
        return [*header, f"ms{size}", "faster"]

    def cells(self, row: Row) -> list[str]:
        """Return what a table shows of a row that was measured; ``-`` is what was not."""
        found = row.evaluation
        assert found is not None
        time, faster = "-", "-"
        speedup = row.speedup(self.settings[0]) if self.settings else None
        if speedup is not None:
            latency = found.latencies[row.speedups.index(speedup)]
            time, faster = f"{latency.p50_ms:.2f}", f"{speedup.ratio:.2f}x"
        drop, agreement = "-", "-"
        if found.versus is not None:
            lost = row.lost
            drop = f"{100 * lost.mean:+.2f} ({100 * lost.low:+.2f} .. {100 * lost.high:+.2f})"
            agreement = f"{found.versus.agreement:.2%}"
        size, smaller = "-", "-"
        if row.file:
            size, smaller = f"{row.size_mb:.3f}", f"{self.compression(row):.2f}x"
        return [row.name, f"{found.top1:.2%}", drop, agreement, size, smaller, time, faster]

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; ``from_dict`` gives it back."""
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {
            "version": VERSION,
            **own,
            "rows": [row.to_dict() for row in self.rows],
            "costs": self.costs.to_dict(),
            "explanation": self.explanation.to_dict(),
            "sensitivity": self.sensitivity and self.sensitivity.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """Return the comparison that ``to_dict`` wrote, also by way of JSON."""
        if values["version"] != VERSION:
            raise ValueError(f"its version is not {VERSION}")
        plain = {f.name: values[f.name] for f in dataclasses.fields(cls)}
        found = plain["sensitivity"]
        return cls(
            **{
                **plain,
                "rows": [Row.from_dict(row) for row in plain["rows"]],
                "costs": Costs.from_dict(plain["costs"]),
                "explanation": Explanation.from_dict(plain["explanation"]),
                "sensitivity": None if found is None else Sensitivity.from_dict(found),
            }
        )

    def save(self, path: str | Path) -> None:
        """Write everything to a JSON file."""
        write_text(path, json.dumps(self.to_dict(), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Return the comparison in a JSON file, or in the folder of one.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If it is not such a file.
        """
        path = Path(path) / "comparison.json" if Path(path).is_dir() else Path(path)
        return read_saved(path, "a comparison", cls.from_dict, "compare again")
