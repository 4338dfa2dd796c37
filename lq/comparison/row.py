"""What was measured of one method."""

from __future__ import annotations

import base64
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lq.comparison.speed import Setting, Speedup
from lq.evaluation import Evaluation
from lq.paired import Drop


@dataclass(frozen=True, kw_only=True)
class Row:
    """What was measured of one method.

    Attributes:
        name: Its name.
        method: Its settings; empty for the float model.
        evaluation: Accuracy, size and latency; ``None`` if the method came to nothing.
        right: Which test samples it is right on, as ``pack`` writes them.
        plan: Layer -> format, read from the file; empty if it cannot be told.
        speedups: How many times as fast as the float model it is.
        history: Of training, a row of figures for each epoch.
        seconds: How long it took to make.
        file: The file that was measured, by its path from the folder of the comparison; empty if
            there is none.
        sha256: Of that file.
        note: What else there is to say of it.
        failed: Why it came to nothing, in one line.
    """

    name: str
    method: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    right: str = ""
    plan: Mapping[str, str] = field(default_factory=dict)
    speedups: tuple[Speedup, ...] = ()
    history: Sequence[Mapping[str, float]] = ()
    seconds: float = 0.0
    file: str = ""
    sha256: str = ""
    note: str = ""
    failed: str = ""

    @property
    def kind(self) -> str:
        """Kind of the method; ``float`` for the float model."""
        return str(self.method.get("kind", "float"))

    @property
    def drop(self) -> Drop | None:
        """What it loses against float; ``None`` for float itself, and where nothing came of it."""
        found = self.evaluation
        return None if found is None or found.versus is None else found.versus.drop

    @property
    def lost(self) -> Drop:
        """What it loses against float.

        Raises:
            ValueError: If it was not compared.
        """
        if self.drop is None:
            raise ValueError(
                f"Expected a method that was compared with float, but got {self.name}."
            )
        return self.drop

    @property
    def size_mb(self) -> float:
        """Size of its file, in 10^6 bytes; NaN where there is none."""
        return math.nan if self.evaluation is None or not self.file else self.evaluation.size_mb

    def speedup(self, setting: Setting) -> Speedup | None:
        """Return the speed-up for a batch size and number of threads, if it was timed."""
        return next((s for s in self.speedups if s.setting == setting), None)

    @property
    def is_integer(self) -> bool:
        """Whether any of its layers computes in a format other than 16 or 32 bit floats."""
        return any(f not in ("fp32", "fp16", "bf16") for f in self.plan.values())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain values; ``from_dict`` gives it back."""
        own = self.evaluation
        return {**dataclasses.asdict(self), "evaluation": None if own is None else own.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Row:
        """Return the row that ``to_dict`` wrote, also by way of JSON."""
        found = values["evaluation"]
        evaluation = None if found is None else Evaluation.from_dict(found)
        speedups = tuple(Speedup(**speedup) for speedup in values["speedups"])
        own = {f.name: values[f.name] for f in dataclasses.fields(cls)}
        return cls(**{**own, "evaluation": evaluation, "speedups": speedups})


def pack(right: Tensor) -> str:
    """Return a bool tensor ``[N]`` as text, eight samples a byte.

    Example:
        >>> unpack(pack(torch.tensor([True, False, True])), 3)
        tensor([ True, False,  True])
    """
    return base64.b64encode(np.packbits(right.numpy()).tobytes()).decode()


def unpack(text: str, n: int) -> Tensor:
    """Return the bool tensor ``[n]`` that ``pack`` wrote."""
    raw = np.frombuffer(base64.b64decode(text), np.uint8)
    return torch.from_numpy(np.unpackbits(raw, count=n).astype(bool))
