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
    """Return whether a tensor of a forward is what a ReLU returns, also joined or averaged."""
    origin = dataflow.origin(flow, tensor)
    if function_name(origin) in _FUNCTIONS:
        return True
    if function_name(origin) in _CONCATENATIONS or _averages(dataflow, flow, origin):
        return all(is_rectified(dataflow, flow, part) for part in origin.all_input_nodes)
    return origin.op == "call_module" and _returns_rectified(dataflow, flow, origin)


def _returns_rectified(dataflow: Dataflow, flow: Flow, call: fx.Node) -> bool:
    child = dataflow.child(flow, call)
    inner = dataflow.flows.get(child)
    if inner is None:
        return isinstance(dataflow.modules[child], _RECTIFIERS)
    returned = next(node for node in inner.graph.nodes if node.op == "output").args[0]
    return isinstance(returned, fx.Node) and is_rectified(dataflow, inner, returned)


def rectified_pools(dataflow: Dataflow, flow: Flow) -> Iterator[fx.Node]:
    """Yield the average poolings in a forward that alone read what a ReLU returns."""
    for node in flow.graph.nodes:
        if _averages(dataflow, flow, node):
            (read,) = node.all_input_nodes
            if len(read.users) == 1 and is_rectified(dataflow, flow, read):
                yield node


def _averages(dataflow: Dataflow, flow: Flow, node: fx.Node) -> bool:
    if node.op == "call_module":
        return is_average_pool(dataflow.modules[dataflow.child(flow, node)])
    return function_name(node) in _POOLS and len(node.all_input_nodes) == 1


def is_average_pool(module: nn.Module) -> bool:
    """Return whether a module is average pooling."""
    return isinstance(module, (_AvgPoolNd, _AdaptiveAvgPoolNd))
