"""What a batch of data means to a model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_TARGETS = {"label", "labels", "target", "targets"}


def check_batches(batches: Any) -> None:
    """Raise a ``ValueError`` unless `batches` can be gone through batch by batch.

    Example:
        >>> check_batches(torch.zeros(8, 3, 4, 4))
        Traceback (most recent call last):
        ValueError: Expected `batches` to be an iterable of batches, such as a list or a DataLoader,
        but got Tensor; pass [batch] for a single one.
    """
    if isinstance(batches, (Tensor, Mapping)) or not isinstance(batches, Iterable):
        raise ValueError(
            "Expected `batches` to be an iterable of batches, such as a list or a DataLoader, but "
            f"got {type(batches).__name__}; pass [batch] for a single one."
        )


def check_repeatable(batches: Iterable[Any], name: str) -> None:
    """Raise a ``ValueError`` for batches that can be gone through only once."""
    if iter(batches) is batches:
        raise ValueError(
            f"Expected `{name}` to be a list or a loader that can be gone through again, "
            f"but got {type(batches).__name__}; pass list({name})."
        )


def model_inputs(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with which a batch calls a model, copied to the model's device.

    A tensor is the input; a sequence is inputs followed by the target, which is dropped; a
    mapping gives keyword arguments, less labels that ``forward`` does not need. They are copies,
    for a model may change its inputs in place.

    Example:
        >>> model_inputs(nn.Identity(), (torch.ones(2), torch.zeros(2)))[0]
        (tensor([1., 1.]),)
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        taken = inspect.signature(model.forward).parameters
        needed = {name for name, p in taken.items() if p.default is p.empty}
        named = {k: v for k, v in batch.items() if k not in _TARGETS or k in needed}
        return (), {k: _to(v, device) for k, v in named.items()}
    if isinstance(batch, (list, tuple)):
        if not batch:
            raise ValueError("Expected a batch to hold an input, but got an empty sequence.")
        inputs = batch[0] if len(batch) <= 2 else batch[:-1]
        inputs = tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,)
    else:
        inputs = (batch,)
    return tuple(_to(x, device) for x in inputs), {}


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors in a model's output, in order.

    Example:
        >>> len(tensors({"out": torch.ones(1), "aux": [torch.ones(1)]}))
        2
    """
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        return [tensor for part in output for tensor in tensors(part)]
    return []


def class_targets(batch: Any, output: Tensor) -> Tensor | None:
    """Return the class numbers in a batch that go with an output, classes along axis 1.

    ``None`` where the last part of a sequence, or what a mapping calls its labels, is no such.

    Example:
        >>> class_targets((torch.zeros(2, 4), torch.tensor([0, 2])), torch.zeros(2, 3))
        tensor([0, 2])
    """
    if isinstance(batch, Mapping):
        target = next((v for k, v in batch.items() if k in _TARGETS), None)
    else:
        target = batch[-1] if isinstance(batch, (list, tuple)) and len(batch) > 1 else None
    if not isinstance(target, Tensor) or target.is_floating_point() or output.dim() < 2:
        return None
    fits = target.shape == (output.shape[0], *output.shape[2:])
    return target.to(output.device) if fits else None
