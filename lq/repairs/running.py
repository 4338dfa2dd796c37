"""Run models for repair: in float beside quantized, with hooks for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lq.batches import model_inputs, tensors
from lq.modes import eval_mode, set_mode
from lq.quantizer import Mode
from lq.surgery import is_calibrated, quantized_layers

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def check_ready(model: nn.Module) -> None:
    """Raise an error unless a model is quantized and calibrated."""
    if not quantized_layers(model):
        raise ValueError(
            "Expected a quantized model, but found no quantizers; call lq.quantize first."
        )
    if not is_calibrated(model):
        raise RuntimeError(
            "Expected a calibrated model, but no range is known; call lq.calibrate first."
        )


def bypassed_copy(model: ModuleT) -> ModuleT:
    """Return a copy of a quantized model that runs in float, layer names and all."""
    reference = copy.deepcopy(model)
    set_mode(reference, Mode.BYPASS)
    return reference


def outputs(model: nn.Module, batch: Any) -> Tensor:
    """Return what a model makes of a batch, the first tensor of it, in eval mode without gradients.

    Raises:
        ValueError: If there is no tensor in it.
    """
    args, kwargs = model_inputs(model, batch)
    with eval_mode(model):
        output = model(*args, **kwargs)
    found = tensors(output)
    if not found:
        raise ValueError(
            f"Expected the model to return a tensor, but got {type(output).__name__}; "
            "wrap it in a module that returns its logits."
        )
    return found[0]


@contextmanager
def hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end."""
    handles = list(handles)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
