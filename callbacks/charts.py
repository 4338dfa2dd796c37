"""Figures, texts and histograms, for those of a trainer's loggers that show them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lq.quantizer_health import layer_groups

_SAMPLE = 1 << 16
"""Values that a histogram is made of at most."""


class Charts:
    """Gives a trainer's loggers what is more than a number.

    Loggers are asked for the methods that TensorBoard's writer has; those without one are left
    alone, and where none has it a message says so: one, whatever is missing.
    """

    def __init__(self) -> None:
        self._told = False

    def figure(self, trainer: L.Trainer, tag: str, draw: Callable[[], Any]) -> None:
        """Show a matplotlib figure, which is drawn only if a logger can show it."""
        for add in self._able(trainer, "add_figure"):
            add(tag, draw(), trainer.global_step)

    def table(self, trainer: L.Trainer, tag: str, text: str) -> None:
        """Show a table of text as it is."""
        indented = "\n".join(f"    {line}" for line in text.splitlines())
        for add in self._able(trainer, "add_text"):
            add(tag, indented, trainer.global_step)

    def histogram(self, trainer: L.Trainer, tag: str, values: Tensor) -> None:
        """Show how values are distributed, those of a sample at equal distances if many."""
        for add in self._able(trainer, "add_histogram"):
            flat = values.detach().flatten()
            add(tag, flat[:: -(-len(flat) // _SAMPLE) or 1].float(), trainer.global_step)

    def layout(self, trainer: L.Trainer, names: Sequence[str], curves: Sequence[str]) -> None:
        """Arrange these curves of the quantizers of these names."""
        for add in self._able(trainer, "add_custom_scalars"):
            add(quantizer_layout(names, curves))

    def _able(self, trainer: L.Trainer, method: str) -> list[Callable[..., Any]]:
        experiments = [getattr(logger, "experiment", None) for logger in trainer.loggers]
        found = [getattr(experiment, method, None) for experiment in experiments]
        able = [add for add in found if callable(add)]
        if not able and trainer.loggers and not self._told:
            self._told = True
            kinds = ", ".join(type(logger).__name__ for logger in trainer.loggers)
            rank_zero_info(
                "%s shows numbers alone; TensorBoardLogger also tables, figures and histograms.",
                kinds,
            )
        return able


def quantizer_layout(
    names: Sequence[str], curves: Sequence[str]
) -> dict[str, dict[str, list[Any]]]:
    r"""Return TensorBoard's layout of custom scalars: a section a curve, in it groups of layers.

    Example:
        >>> quantizer_layout(["conv.input_quantizer", "fc.input_quantizer"], ["amax"])["amax"]["fc"]
        ['Multiline', ['quantizer/fc\\.input_quantizer/amax']]
    """
    groups = layer_groups(list(names))
    return {
        curve: {
            group: ["Multiline", [f"quantizer/{re.escape(name)}/{curve}" for name in members]]
            for group, members in groups.items()
        }
        for curve in curves
    }
