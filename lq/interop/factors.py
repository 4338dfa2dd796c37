"""Factors that multiply the channels of an input before it is quantized, as in SmoothQuant."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lq.dataflow import Dataflow, Flow, function_name

_NORMS = (nn.LayerNorm, nn.RMSNorm, _BatchNorm)
_PASSES = (nn.Identity, nn.Dropout)
_ASKS = ("getattr", "size", "dim", "numel")
"""What says something of a tensor and does not read its numbers."""


def norms_before(model: nn.Module, factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the normalizations that can multiply in the layers' stead, and by what.

    Such a one has weights, and its output is read by layers with these factors alone.

    Args:
        model: The float model.
        factors: Layer -> factor of each channel of its input.

    Raises:
        ValueError: Naming the first layer whose input no such normalization makes.
    """
    dataflow = Dataflow(model)
    found: dict[str, Tensor] = {}
    left = set(factors)
    for flow in dataflow.flows.values():
        for node in flow.graph.nodes:
            name = dataflow.child(flow, node) if node.op == "call_module" else None
            if name is None or not _multiplies(dataflow.modules[name]) or flow.calls[name] != 1:
                continue
            readers = _readers(dataflow, flow, node, factors)
            if not readers or any(
                not torch.equal(factors[r], factors[readers[0]]) for r in readers
            ):
                continue
            found[name] = factors[readers[0]]
            left -= set(readers)
    if left:
        raise ValueError(
            f"Expected {min(left)!r} to quantize its input as it is, or to be alone in reading a "
            "normalization, but each channel is multiplied by a factor first (SmoothQuant, AWQ); "
            "disable its quantizers."
        )
    return found


def _multiplies(module: nn.Module) -> bool:
    return isinstance(module, _NORMS) and module.weight is not None


def _readers(
    dataflow: Dataflow, flow: Flow, tensor: fx.Node, factors: Mapping[str, Tensor]
) -> list[str]:
    """Return the layers that read a tensor; none where anything else reads it, too."""
    found: list[str] = []
    for user in tensor.users:
        if function_name(user) in _ASKS:
            continue
        if user.op != "call_module":
            return []
        child = dataflow.child(flow, user)
        inner: Flow | None = flow if isinstance(dataflow.modules[child], _PASSES) else None
        value: Any = user
        if child in factors and flow.calls[child] == 1:
            found.append(child)
            continue
        if inner is None:
            inner = dataflow.flows.get(child)
            value = _argument(inner, user, tensor)
        below = [] if inner is None or value is None else _readers(dataflow, inner, value, factors)
        if not below:
            return []
        found += below
    return found


def _argument(flow: Flow | None, call: fx.Node, tensor: fx.Node) -> fx.Node | None:
    """Return what a positional argument of a call is called within the forward."""
    if flow is None or tensor not in call.args:
        return None
    arguments: list[fx.Node] = [node for node in flow.graph.nodes if node.op == "placeholder"]
    return arguments[call.args.index(tensor)]


def multiply(model: nn.Module, norms: Mapping[str, Tensor]) -> None:
    """Let normalizations multiply the channels of their outputs by factors."""
    for name, factor in norms.items():
        norm: Any = model.get_submodule(name)
        with torch.no_grad():
            norm.weight.mul_(factor.to(norm.weight))
            if getattr(norm, "bias", None) is not None:
                norm.bias.mul_(factor.to(norm.bias))
