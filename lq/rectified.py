"""Tensors that are never negative, and those among them that average pooling reads."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx, nn
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd

from lq.dataflow import Dataflow, Flow, function_name

_RECTIFIERS = (nn.ReLU, nn.ReLU6)
_FUNCTIONS = ("relu", "relu_", "relu6")
_CONCATENATIONS = ("cat", "concat")
_POOLS = tuple(f"{kind}avg_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3))


def is_rectified(dataflow: Dataflow, flow: Flow, tensor: fx.Node) -> bool:
    """Return whether a tensor of a forward is what a ReLU returns, or several of such joined."""
    origin = dataflow.origin(flow, tensor)
    if origin.op != "call_module":
        name, parts = function_name(origin), origin.all_input_nodes
        joins = name in _CONCATENATIONS and all(is_rectified(dataflow, flow, x) for x in parts)
        return name in _FUNCTIONS or joins
    child = dataflow.child(flow, origin)
    inner = dataflow.flows.get(child)
    if inner is None:
        return isinstance(dataflow.modules[child], _RECTIFIERS)
    returned = next(n for n in inner.graph.nodes if n.op == "output").args[0]
    return isinstance(returned, fx.Node) and is_rectified(dataflow, inner, returned)


def rectified_pools(dataflow: Dataflow, flow: Flow) -> Iterator[fx.Node]:
    """Yield the average poolings in a forward that alone read what a ReLU returns."""
    for node in flow.graph.nodes:
        if not node.args or not isinstance(node.args[0], fx.Node):
            continue
        by_module = node.op == "call_module" and is_average_pool(
            dataflow.modules[dataflow.child(flow, node)]
        )
        pools = by_module or function_name(node) in _POOLS
        alone = len(node.args[0].users) == 1
        if pools and alone and is_rectified(dataflow, flow, node.args[0]):
            yield node


def is_average_pool(module: nn.Module) -> bool:
    """Return whether a module is average pooling."""
    return isinstance(module, (_AvgPoolNd, _AdaptiveAvgPoolNd))
