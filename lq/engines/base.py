"""What every engine looks like from outside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor


class Runner(ABC):
    """Runs a model, whatever it is stored as.

    Attributes:
        name: The engine, for tables: ``torch``, ``ONNX Runtime``, ``TensorRT``.
        size_mb: Size of the weights or the file, in 10^6 bytes.
        weights_mb: Size of the weights alone; ``None`` where the engine does not tell.
    """

    name: str
    size_mb: float
    weights_mb: float | None = None
    simulates = False
    """Whether formats are simulated in float32, so that speed says nothing about them."""

    def many_runs(self) -> AbstractContextManager[None]:
        """Return a context in which many runs share what each would prepare."""
        return nullcontext()

    @abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return all outputs for one batch of inputs, on the CPU or where the engine left them."""


def bind_inputs(
    names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Return an engine's inputs by name, from positional and keyword arguments.

    Raises:
        ValueError: If they are not those that the engine takes.
    """
    named = dict(zip(names, args, strict=False)) | kwargs
    if len(args) > len(names) or set(named) != set(names):
        given = [f"{len(args)} positional", *kwargs]
        raise ValueError(f"Expected the inputs {names}, but got {', '.join(given)}.")
    return named


def check_shape(name: str, given: tuple[int, ...], expected: list[Any]) -> None:
    """Raise a ``ValueError`` unless a shape fits an expected one, in which non-sizes vary."""
    fits = len(given) == len(expected) and all(
        g == e or not isinstance(e, int) or e < 0 for g, e in zip(given, expected, strict=True)
    )
    if not fits:
        shown = ", ".join(str(e) if isinstance(e, int) and e >= 0 else "?" for e in expected)
        raise ValueError(f"Expected input {name!r} to have shape [{shown}], but got {list(given)}.")
