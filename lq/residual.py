"""Which operands of a forward's additions and products can be quantized."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn

from lq.dataflow import Dataflow, Flow, function_name
from lq.layers import is_quantizable

_ADDITIONS = ("add", "add_", "iadd")
_PRODUCTS = ("mul", "mul_", "imul", "matmul", "imatmul", "bmm", "scaled_dot_product_attention")
_SIZES = ("getattr", "size", "dim", "numel")
"""What says something of a tensor, and is none."""


def tensor_depths(dataflow: Dataflow, flow: Flow) -> dict[fx.Node, int]:
    """Return how many quantizable layers lie between a forward's inputs and each of its tensors.

    Sizes, and what is made of parameters alone, are not among them.
    """
    depths: dict[fx.Node, int] = {}
    for node in flow.graph.nodes:
        before = [depths[n] for n in node.all_input_nodes if n in depths]
        if node.op == "placeholder":
            depths[node] = 0
        elif before and function_name(node) not in _SIZES:
            depths[node] = max(before)
            if node.op == "call_module":
                depths[node] += _layers_in(dataflow.modules[dataflow.child(flow, node)])
    return depths


def _layers_in(module: nn.Module) -> int:
    return sum(is_quantizable(m) for m in module.modules())


def residual_operands(dataflow: Dataflow, flow: Flow, both: bool) -> Iterator[fx.Node]:
    """Yield the operands of a forward's residual additions that are to be quantized.

    The shortcut is the operand with fewer layers before it. With as many before the one as before
    the other, as in ``proj(x) + conv(x)``, it is the one that is computed first; and where two
    inputs are added, both are quantized, for one cannot know.

    Args:
        dataflow: The model.
        flow: The forward.
        both: Yield both operands.
    """
    depths = tensor_depths(dataflow, flow)  # in the order they are computed
    order = {node: (depth, i) for i, (node, depth) in enumerate(depths.items())}
    for node in flow.graph.nodes:
        operands = [n for n in node.all_input_nodes if n in depths]
        if function_name(node) not in _ADDITIONS or len(operands) != 2:
            continue
        first, second = sorted(operands, key=order.__getitem__)
        inputs = [dataflow.origin(flow, n).op == "placeholder" for n in operands]
        if depths[second] > 0 or all(inputs):
            yield first
            if both or all(inputs):
                yield second


def product_operands(dataflow: Dataflow, flow: Flow) -> Iterator[fx.Node]:
    """Yield the tensors that a forward multiplies with one another."""
    depths = tensor_depths(dataflow, flow)
    for node in flow.graph.nodes:
        operands = [n for n in node.all_input_nodes if n in depths]
        if function_name(node) in _PRODUCTS and len(operands) > 1:
            yield from operands
