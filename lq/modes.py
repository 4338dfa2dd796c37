"""Modes and scales of a whole model's quantizers, for a while or until further notice."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lq.quantizer import Mode, Quantizer
from lq.surgery import quantizers


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Put all quantizers of a model into one mode."""
    for quantizer in quantizers(model).values():
        quantizer.mode = mode


class QuantizerStates:
    """The modes and the scales that quantizers have now, to go back to.

    Args:
        found: The quantizers.

    Example:
        >>> from lq import quantize
        >>> model = quantize(nn.Linear(2, 2), "tensorrt_int8")
        >>> before = QuantizerStates(quantizers(model).values())
        >>> model.input_quantizer.amax = torch.tensor(1.27)
        >>> before.restore()
        >>> model.input_quantizer
        Quantizer(int8, uncalibrated)
    """

    def __init__(self, found: Iterable[Quantizer]) -> None:
        self._states = [(q, q.mode, q.saved()) for q in found]

    def restore(self) -> None:
        """Give every quantizer the mode and the scale it had, known or not."""
        for quantizer, mode, saved in self._states:
            quantizer.mode = mode
            quantizer.restore(*saved)


@contextmanager
def quantizer_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Put all quantizers of a model into one mode for a while, then each as it was."""
    modes = {q: q.mode for q in quantizers(model).values()}
    set_mode(model, mode)
    try:
        yield
    finally:
        for quantizer, before in modes.items():
            quantizer.mode = before


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients for a while, then each module as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """Give a model its buffers' values back after a while, in which its passes may change them."""
    before = [(m, name, b, b.clone()) for m in model.modules() for name, b in _buffers(m)]
    try:
        yield
    finally:
        for module, name, buffer, value in before:
            module._buffers[name] = buffer
            if not torch.equal(buffer, value):
                buffer.copy_(value)


def _buffers(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, b) for name, b in module._buffers.items() if b is not None]
