"""What a sweep found: the sensitivity of every unit in every format; readable, and reusable."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from lq.costs import Costs
from lq.digest import model_digest
from lq.files import read_saved, write_text, written_whole
from lq.messages import suggest
from lq.sensitivity.measures import PARTS, Measures
from lq.sensitivity.plain import csv_line, measures_from, to_plain
from lq.surgery import quantizable_layers
from lq.tables import aligned

log = logging.getLogger(__name__)
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity(Measures):
    """What it costs when only one unit is in a format and the rest of the model is float.

    Attributes:
        layer: Qualified name of the layer, or the name of the unit.
        format: Number format.
        part: What of the layers is in it: ``both``, ``weights`` or ``inputs``.
        n: Samples it was measured on.
        low: Lower end of the interval of the sweep's metric.
        high: Upper end.
        noise: Whether the sweep's metric shows no difference to float: its interval has 0 in it.
        left_float: The same measures, against the float model too, when only this unit is left
            float and all else is in the format; ``None`` where that was not asked for.
    """

    layer: str
    format: str
    part: str = "both"
    n: int = 0
    low: float = math.nan
    high: float = math.nan
    noise: bool = False
    left_float: Measures | None = None


@dataclass(frozen=True, kw_only=True)
class Sensitivity:
    """The sensitivities of a model, by unit and format.

    Attributes:
        found: One row for each unit, format and part, in the order of the model.
        units: Name of a unit -> the layers in it.
        formats: The formats.
        method: ``exact``, ``gradient`` (an estimate) or ``adaptive``.
        metric: What units are ranked by.
        n: Samples that were looked at.
        top1: Top-1 of the float model; NaN where batches have no class numbers.
        recipe: The recipe that formats were put into, as plain values.
        whole: Format -> measures with all units in that format, where that was asked for.
        model_hash: Hash of the float model.
        data_hash: Hash of the batches.
        passes: Work done, in forward passes of the float model over all samples, by
            multiply-accumulates.
        fallback: Why whole passes were run instead of replays; empty where they were not.
        costs: Parameters and multiply-accumulates of the layers, which a search weighs.

    Example:
        >>> rows = [LayerSensitivity(layer="conv", format="int8", kl=0.02)]
        >>> found = Sensitivity(found=rows, units={"conv": ("conv",)}, formats=("int8",),
        ...                     method="exact", metric="kl", n=64)
        >>> found.score("conv", "int8"), found.score("conv", "fp32")
        (0.02, 0.0)
    """

    found: Sequence[LayerSensitivity]
    units: Mapping[str, tuple[str, ...]]
    formats: tuple[str, ...]
    method: str
    metric: str
    n: int
    top1: float = math.nan
    recipe: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Measures] = field(default_factory=dict)
    model_hash: str = ""
    data_hash: str = ""
    passes: float = math.nan
    fallback: str = ""
    costs: Costs | None = None

    def __iter__(self) -> Iterator[LayerSensitivity]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the units, in the order of the model."""
        return tuple(self.units)

    @property
    def recipe_hash(self) -> str:
        """Hash of the recipe that formats were put into."""
        return hashlib.sha256(_text(self.recipe).encode()).hexdigest()

    def check_model(self, model: nn.Module) -> None:
        """Look whether the sweep is of this model; of other weights is told in a log message.

        Raises:
            ValueError: If a swept layer is not in the model.
        """
        layers = quantizable_layers(model)[0]
        missing = [n for names in self.units.values() for n in names if n not in layers]
        if missing:
            raise ValueError(
                f"Expected a sweep of this model, but it has no layer {missing[0]!r}; sweep it "
                "anew."
            )
        if self.model_hash and self.model_hash != model_digest(model):
            log.warning("The sweep is of other weights than the model has; sweep it anew.")

    def row(self, layer: str, format: str, part: str = "both") -> LayerSensitivity:
        """Return what was found of one unit in one format.

        Raises:
            ValueError: If that was not swept, naming the nearest that was.
        """
        for row in self.found:
            if (row.layer, row.format, row.part) == (layer, format, part):
                return row
        given, valid = (layer, self.units) if layer not in self.units else (format, self.formats)
        raise ValueError(
            f"Expected a unit and a format of the sweep, but got {layer!r} in {format!r} ({part}); "
            f"{suggest(given, valid)}"
        )

    def score(self, layer: str, format: str) -> float:
        """Return the cost of a unit in a format, which adds up over units; 0 in fp32."""
        return 0.0 if format == "fp32" else self.row(layer, format).cost(self.metric)

    def ranked(self, format: str | None = None, part: str = "both") -> list[LayerSensitivity]:
        """Return the rows of a format, the most sensitive first; of the first format, if none."""
        format = self.formats[0] if format is None else format
        rows = [r for r in self.found if r.format == format and r.part == part]
        return sorted(rows, key=lambda row: -row.cost(self.metric))

    def rank_correlation(self, other: Sensitivity, format: str, part: str = "both") -> float:
        """Return Spearman's rank correlation of two sweeps' costs, each by its own metric.

        Args:
            other: A sweep of the same units, such as an estimate.
            format: The format that both swept.
            part: What of the layers was in it.
        """
        from scipy.stats import spearmanr  # which takes a second to import

        mine, others = (
            [s.row(unit, format, part).cost(s.metric) for unit in self.units] for s in (self, other)
        )
        return float(spearmanr(mine, others).statistic)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; ``from_dict`` gives it back."""
        values = to_plain(dataclasses.asdict(self))
        return {"version": VERSION, **values, "recipe_hash": self.recipe_hash}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Sensitivity:
        """Return the sensitivities that ``to_dict`` wrote, also by way of JSON.

        Raises:
            ValueError: If they are of another version.
            KeyError, TypeError, AttributeError: If they are something else.
        """
        plain = dict(values)
        if plain.pop("version") != VERSION:
            raise ValueError(f"its version is not {VERSION}")
        plain.pop("recipe_hash", None)
        plain["found"] = [measures_from(row, LayerSensitivity) for row in plain["found"]]
        plain["units"] = {name: tuple(layers) for name, layers in plain["units"].items()}
        plain["formats"] = tuple(plain["formats"])
        plain["whole"] = {k: measures_from(v, Measures) for k, v in plain["whole"].items()}
        if plain.get("costs") is not None:
            plain["costs"] = Costs.from_dict(plain["costs"])
        numbers = {name: float(plain[name]) for name in ("top1", "passes")}
        return cls(**{**plain, **numbers})

    def to_json(self, path: str | Path) -> None:
        """Write everything to a JSON file that ``from_json`` reads back."""
        write_text(path, json.dumps(self.to_dict(), indent=1))

    def save(self, path: str | Path) -> None:
        """Write a JSON file, and a CSV file beside it."""
        self.to_json(path)
        self.to_csv(Path(path).with_suffix(".csv"))

    @classmethod
    def from_json(cls, path: str | Path) -> Sensitivity:
        """Return the sensitivities in a file that ``to_json`` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not such a file.
        """
        return read_saved(path, "a sweep", cls.from_dict, "sweep again")

    def to_csv(self, path: str | Path) -> None:
        """Write one line for each unit, format and part, with recipe and hashes in each."""
        names = ("model_hash", "data_hash", "recipe_hash")
        hashes = {name: getattr(self, name) for name in names} | {"recipe": _text(self.recipe)}
        lines = [csv_line(row) | hashes for row in self.found]
        columns = list(dict.fromkeys(name for line in lines for name in line))
        with (
            written_whole(path) as temporary,
            open(temporary, "w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(lines)

    def table(self, rows: int | None = None) -> str:
        """Return the most sensitive units as text, format by format.

        Example:
            >>> row = LayerSensitivity(layer="fc", format="int8", top1_drop=0.012, kl=0.02,
            ...                        loss_increase=0.1, sqnr_db=21.0, low=0.002, high=0.021)
            >>> print(Sensitivity(found=[row], units={"fc": ("fc",)}, formats=("int8",),
            ...                   method="exact", metric="top1", n=500).table())
            unit  format  part  top-1 drop  top-5 drop     loss       kl  SQNR dB  95% of top1
            fc    int8    both      +1.20%           -  +0.1000  0.02000     21.0  0.002 .. 0.021
        """
        header = ["unit", "format", "part", "top-1 drop", "top-5 drop", "loss", "kl", "SQNR dB"]
        lines = [[*header, f"95% of {self.metric}"]]
        for format in self.formats:
            for part in PARTS:
                lines += [_cells(row) for row in self.ranked(format, part)[:rows]]
        return aligned(lines, left=(0, 1, 2, len(header)))


def _text(recipe: Mapping[str, Any]) -> str:
    return json.dumps(to_plain(recipe), sort_keys=True)


def _cells(row: LayerSensitivity) -> list[str]:
    shown = [
        _shown(row.top1_drop, "+.2%"),
        _shown(row.top5_drop, "+.2%"),
        _shown(row.loss_increase, "+.4f"),
        _shown(row.kl, ".5f"),
        _shown(row.sqnr_db, ".1f"),
    ]
    interval = "" if math.isnan(row.low) else f"{row.low:.3g} .. {row.high:.3g}"
    return [row.layer, row.format, row.part, *shown, interval + ", noise" * row.noise]


def _shown(value: float, form: str) -> str:
    return "-" if math.isnan(value) else format(value, form)
