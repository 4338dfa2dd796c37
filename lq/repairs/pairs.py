"""Find the layers between which, or after which, channels can be rescaled exactly."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lq.layers import QUANT_CLASSES, QuantLayer, float_class, is_quantizable
from lq.quantizer import Quantizer

_ELEMENTWISE = (nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.Identity, nn.Dropout)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
_FUNCTIONS = {torch.relu, F.relu, F.leaky_relu, F.dropout}
_POOL_FUNCTIONS = {F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d}
_METHODS = {"relu", "relu_", "contiguous"}
"""What lets a positive factor per channel through: f(s * x) = s * f(x)."""


@dataclass(frozen=True)
class Pair:
    """Two layers with nothing between them that minds a positive factor per channel.

    Attributes:
        first: Name of the layer whose output channels are scaled down.
        norm: Name of the BatchNorm right behind it, or ``None``.
        second: Name of the layer whose input channels are scaled up.
    """

    first: str
    norm: str | None
    second: str


@dataclass(frozen=True)
class Found:
    """What can be rescaled in a model.

    Attributes:
        pairs: Layers that can be equalized, in the order they run.
        norms: BatchNorm by the name of the layer whose output it alone takes.
        left: Blocks that could not be traced, and why.
    """

    pairs: tuple[Pair, ...]
    norms: dict[str, str]
    left: dict[str, str]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, (QuantLayer, Quantizer)):
            return True
        cls = float_class(m)  # one of torch's own modules may have a quantizer on its output
        return cls.__module__.startswith("torch.nn") and not issubclass(cls, nn.Sequential)


def find_pairs(model: nn.Module) -> Found:
    """Trace a model, or where that fails its blocks, for channels that can be rescaled.

    A layer takes part if it is a plain Conv or Linear that is called once, shares its parameters
    with nobody, and whose output nothing else reads (a residual add forbids it).

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.ReLU6())
        >>> find_pairs(model).pairs
        (Pair(first='0', norm=None, second='2'),)
    """
    left: dict[str, str] = {}
    graphs = [*_graphs(model, "", left)]
    own = _Ownership(model, graphs)
    pairs, norms = list[Pair](), dict[str, str]()
    for prefix, graph in graphs:
        for node in graph.nodes:
            name = _name(prefix, node)
            if not own.is_layer(name):
                continue
            norm = _next(node)
            if norm is not None and own.is_norm(_name(prefix, norm), name):
                norms[name] = _name(prefix, norm)
            last = norm if name in norms and norm is not None else node
            second = own.reached(prefix, last, pools=isinstance(own.modules[name], _ConvNd))
            if second is not None and own.match(name, second):
                pairs.append(Pair(name, norms.get(name), second))
    return Found(tuple(pairs), norms, left)


def _graphs(module: nn.Module, prefix: str, left: dict[str, str]) -> Iterator[tuple[str, fx.Graph]]:
    """Yield the graph of a module, or of its largest blocks that can be traced."""
    if _Tracer().is_leaf_module(module, prefix) and prefix:
        return
    try:
        yield prefix, _Tracer().trace(module)
    except Exception as error:  # tracing runs the user's code on proxies: anything may happen
        left[prefix or "the model"] = f"cannot be traced: {str(error).splitlines()[0]}"
        for name, child in module.named_children():
            yield from _graphs(child, f"{prefix}.{name}".lstrip("."), left)


def _name(prefix: str, node: fx.Node) -> str:
    return f"{prefix}.{node.target}".lstrip(".") if node.op == "call_module" else ""


def _next(node: fx.Node) -> fx.Node | None:
    """Return the one node that reads another's output as its first argument."""
    users = list(node.users)
    if len(users) != 1 or users[0].op == "output" or users[0].args[:1] != (node,):
        return None
    return users[0] if users[0].all_input_nodes == [node] else None


class _Ownership:
    """Which modules of a model may be changed without anybody else noticing."""

    def __init__(self, model: nn.Module, graphs: list[tuple[str, fx.Graph]]) -> None:
        named = [*model.named_modules(remove_duplicate=False)]
        self.modules = dict(named)
        parameters = [p for _, p in model.named_parameters(remove_duplicate=False)]
        self.holders = Counter(map(id, parameters))
        nodes = [(prefix, node) for prefix, graph in graphs for node in graph.nodes]
        names = [_name(prefix, node) for prefix, node in nodes]
        self.calls = Counter(id(self.modules[name]) for name in names if name)
        self.registered = Counter(id(module) for _, module in named)
        self.read = {
            f"{prefix}.{node.target}".lstrip(".").rpartition(".")[0]
            for prefix, node in nodes
            if node.op == "get_attr"
        }

    def _is_free(self, name: str) -> bool:
        module = self.modules.get(name)
        if module is None or name in self.read or hasattr(module, "parametrizations"):
            return False
        parameters = [*module.parameters(recurse=False)]
        return (
            self.calls[id(module)] == 1
            and self.registered[id(module)] == 1
            and all(self.holders[id(p)] == 1 for p in parameters)
        )

    def is_layer(self, name: str) -> bool:
        """Return whether a module is a plain Conv or Linear that is free to change."""
        module = self.modules.get(name)
        if module is None or not name or not is_quantizable(module) or not self._is_free(name):
            return False
        weight = module._parameters.get("weight")
        plain = float_class(module) in QUANT_CLASSES and not isinstance(module, _ConvTransposeNd)
        return plain and weight is not None and weight.is_floating_point()

    def is_norm(self, name: str, layer: str) -> bool:
        """Return whether a module is a BatchNorm whose channels are a convolution's."""
        norm = self.modules.get(name)
        return (
            isinstance(norm, _BatchNorm)
            and isinstance(self.modules[layer], _ConvNd)
            and norm.affine
            and norm.running_mean is not None
            and self._is_free(name)
        )

    def reached(self, prefix: str, node: fx.Node, pools: bool) -> str | None:
        """Return the layer that is reached through operations that let factors through.

        Pooling is one behind a Conv; behind a Linear it would mix channels.
        """
        following = _next(node)
        while following is not None and self._passes(prefix, following, pools):
            following = _next(following)
        name = _name(prefix, following) if following is not None else ""
        return name if self.is_layer(name) else None

    def _passes(self, prefix: str, node: fx.Node, pools: bool) -> bool:
        if node.op == "call_module":
            module: Any = self.modules[_name(prefix, node)]
            return type(module) in _ELEMENTWISE or (pools and type(module) in _POOLS)
        if node.op == "call_function":
            return node.target in _FUNCTIONS or (pools and node.target in _POOL_FUNCTIONS)
        return node.op == "call_method" and node.target in _METHODS

    def match(self, first: str, second: str) -> bool:
        """Return whether the output channels of one layer are the input channels of another."""
        a: Any = self.modules[first]
        b: Any = self.modules[second]
        if isinstance(a, nn.Linear) or isinstance(b, nn.Linear):
            both = isinstance(a, nn.Linear) and isinstance(b, nn.Linear)
            return both and bool(a.out_features == b.in_features)
        return bool(a.out_channels == b.in_channels)
