"""What each repair brought, measured on held-out batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lq.functional import sqnr_db
from lq.repairs.running import outputs


@dataclass(frozen=True)
class Fidelity:
    """How near a quantized model is to the float one on the same samples.

    Attributes:
        sqnr_db: Signal-to-quantization-noise ratio of the outputs, in decibels.
        agreement: Share of samples with the same largest output, 0..1.
    """

    sqnr_db: float
    agreement: float

    def __str__(self) -> str:
        return f"{self.sqnr_db:.2f} dB, {self.agreement:.2%}"


@dataclass(frozen=True)
class RepairStep:
    """What one repair brought on held-out samples.

    Attributes:
        method: Name of the repair.
        before: Before it.
        after: With it.
        kept: Whether it was kept, because the SQNR rose.
        left: Layers it left alone, and why.
    """

    method: str
    before: Fidelity
    after: Fidelity
    kept: bool
    left: Mapping[str, str]


@dataclass(frozen=True)
class RepairReport:
    """What a repair did.

    Attributes:
        layers: SQNR of the output in dB where only that layer is quantized, the worst first:
            which layers caused the loss, before any repair.
        steps: Each repair, in the order they were done.
    """

    layers: Mapping[str, float]
    steps: Sequence[RepairStep]

    def __str__(self) -> str:
        lines = ["Layers that cause the loss (SQNR of the output, only that layer quantized):"]
        lines += [f"  {sqnr:6.2f} dB  {name}" for name, sqnr in [*self.layers.items()][:5]]
        for step in self.steps:
            end = "kept" if step.kept else "undone: no gain"
            lines.append(f"{step.method}: {step.before} -> {step.after}, {end}")
            lines += [f"  left {name}: {reason}" for name, reason in step.left.items()]
        return "\n".join(lines)


class Judge:
    """Measures a quantized model against the float one on held-out batches."""

    def __init__(self, reference: nn.Module, held_out: Iterable[Any]) -> None:
        self.reference, self.held_out = reference, held_out
        self.wanted = self._outputs(reference)

    def _outputs(self, model: nn.Module) -> Tensor:
        found = [outputs(model, batch).float().cpu() for batch in self.held_out]
        if not found:
            raise ValueError("Expected `held_out` to hold at least one batch, but got none.")
        return torch.cat(found)

    def measure(self, model: nn.Module) -> Fidelity:
        """Return how near a model is."""
        got = self._outputs(model)
        same = got.argmax(1) == self.wanted.argmax(1)
        return Fidelity(sqnr_db(self.wanted, got), float(same.float().mean()))
