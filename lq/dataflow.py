"""Which modules read a tensor and which one makes it, across the modules of a model."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.pooling import _MaxPoolNd

from lq.layers import float_class, is_quantizable
from lq.quantizer import Quantizer
from lq.tracing import may_add, trace_forward

_TRANSPARENT = {
    *("reshape", "view", "flatten", "unflatten", "squeeze", "unsqueeze", "contiguous", "clone"),
    *("transpose", "permute", "movedim", "swapaxes", "chunk", "split", "unbind", "getitem"),
    *("dropout", "max_pool1d", "max_pool2d", "max_pool3d"),
}
"""Functions and methods that quantizing commutes with: they move numbers and make no new ones."""
_TRANSPARENT_MODULES = (nn.Identity, nn.Flatten, nn.Unflatten, _DropoutNd, _MaxPoolNd)
_TRANSPARENT_NAMES = ("StochasticDepth", "DropPath", "Permute")


@dataclass(frozen=True)
class Reader:
    """A module that is given a tensor, and the argument it is given as."""

    name: str
    argument: str


@dataclass
class Flow:
    """One module's own forward as a graph.

    Attributes:
        name: Qualified name of the module.
        graph: What its forward does.
        calls: How often it calls each child, by the child's qualified name.
    """

    name: str
    graph: fx.Graph
    calls: Counter[str] = field(default_factory=Counter)


class Dataflow:
    """The forwards of a model's modules, each traced by itself.

    Attributes:
        modules: All modules by qualified name, each once.
        flows: Those with children whose forward could be traced.
        untraced: Why the others, where their forward adds, are left alone.

    Example:
        >>> flow = Dataflow(nn.Sequential(nn.Dropout(), nn.Linear(2, 2)))
        >>> [reader.name for reader in flow.readers(Reader("", "input"))]
        ['', '0', '1']
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self._names = {id(module): name for name, module in self.modules.items()}
        places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
        self._shared = {n for n, m in self.modules.items() if places[id(m)] > 1}
        self.flows: dict[str, Flow] = {}
        self.untraced: dict[str, str] = {}
        for name, module in self.modules.items():
            if _has_own_forward(module):
                self._trace(name, module)

    def _trace(self, name: str, module: nn.Module) -> None:
        cls = float_class(module)
        graph = trace_forward(module, cls)
        if graph is not None:
            flow = self.flows[name] = Flow(name, graph)
            flow.calls.update(self.child(flow, n) for n in graph.nodes if n.op == "call_module")
        elif may_add(cls):
            self.untraced[name] = "its forward cannot be traced, so its additions are left float"

    def child(self, flow: Flow, call: fx.Node) -> str:
        """Return the qualified name of the module that a node calls."""
        name: str = self._names[id(self.modules[flow.name].get_submodule(str(call.target)))]
        return name

    def origin(self, flow: Flow, node: fx.Node) -> fx.Node:
        """Return the node that computes a tensor, before it was moved, cut or dropped."""
        while node.args and isinstance(node.args[0], fx.Node) and self._passes(flow, node):
            node = node.args[0]
        return node

    def _passes(self, flow: Flow, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.modules[self.child(flow, node)]
            named = float_class(module).__name__ in _TRANSPARENT_NAMES
            return named or isinstance(module, _TRANSPARENT_MODULES)
        name = function_name(node)
        if name == "pad":  # zeros are on every grid
            mode, value = (node.kwargs.get(key) for key in ("mode", "value"))
            return len(node.args) == 2 and mode in (None, "constant") and not value
        if name == "getitem" and isinstance(node.args[1], int):
            return not _calls(node.args[0])  # one of several outputs
        return name in _TRANSPARENT

    def readers(self, reader: Reader) -> Iterator[Reader]:
        """Yield a module and all those within it that are given its argument as it is."""
        yield reader
        flow = self.flows.get(reader.name)
        if flow is None:
            return
        for node in flow.graph.nodes:
            if node.op == "placeholder" and node.target == reader.argument:
                yield from self.readers_of(flow, node)

    def readers_of(self, flow: Flow, tensor: fx.Node) -> Iterator[Reader]:
        """Yield the modules that read a tensor of a forward, outer ones before inner ones."""
        for node in flow.graph.nodes:
            if node.op != "call_module":
                continue
            child = self.child(flow, node)
            for argument in self._arguments(flow, node, tensor):
                if flow.calls[child] == 1 and child not in self._shared:
                    yield from self.readers(Reader(child, argument))

    def _arguments(self, flow: Flow, call: fx.Node, tensor: fx.Node) -> list[str]:
        """Return the arguments of a call that are a tensor, after what moves it."""
        module = self.modules[self.child(flow, call)]
        given = {
            name: self.origin(flow, value) if isinstance(value, fx.Node) else None
            for name, value in _bound(module, call).items()
        }
        if isinstance(module, nn.MultiheadAttention):  # has one quantizer for all three
            query, *others = (given.get(name) for name in ("query", "key", "value"))
            given = {"query": query} if others == [query, query] else {}
        return [name for name, value in given.items() if value is tensor]

    def maker(self, flow: Flow, tensor: fx.Node) -> str | None:
        """Return the innermost module whose output a tensor is, if that is all it ever makes."""
        if not _calls(tensor):
            return None
        name = self.child(flow, tensor)
        if flow.calls[name] != 1 or name in self._shared:
            return None
        inner = self.flows.get(name)
        if inner is None:
            return name
        returned = next(n for n in inner.graph.nodes if n.op == "output").args[0]
        if not isinstance(returned, fx.Node):
            return None
        origin = self.origin(inner, returned)
        return self.maker(inner, origin) if _calls(origin) else name

    def read_uncalled(self) -> dict[str, str]:
        """Return the layers whose weight a forward reads, and calls them not, with the reason."""
        found = {}
        for flow in self.flows.values():
            for node in flow.graph.nodes:
                owner, _, parameter = str(node.target).rpartition(".")
                if node.op != "get_attr" or parameter != "weight" or not owner:
                    continue
                name = self._names[id(self.modules[flow.name].get_submodule(owner))]
                if is_quantizable(self.modules[name]) and not flow.calls[name]:
                    kind = float_class(self.modules[flow.name]).__name__
                    found[name] = f"{kind} reads its weight without calling it"
        return found


def function_name(node: fx.Node) -> str:
    """Return the bare name of the function or method that a node calls, or nothing."""
    if node.op == "call_method":
        return str(node.target)
    if node.op == "call_function":
        return getattr(node.target, "__name__", "")
    return ""


def _calls(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_module"


def _bound(module: nn.Module, call: fx.Node) -> dict[str, Any]:
    signature = inspect.signature(float_class(module).forward)
    try:
        return dict(list(signature.bind(None, *call.args, **call.kwargs).arguments.items())[1:])
    except TypeError:
        return {}


def _has_own_forward(module: nn.Module) -> bool:
    """Return whether to look into a forward: not a layer's, nor one that torch implements.

    A module without children is looked into where it may add the two tensors it takes.
    """
    cls = float_class(module)
    if is_quantizable(module) or cls.forward is nn.Module.forward:
        return False
    if cls.__module__.startswith("torch."):
        return any(is_quantizable(m) for m in module.modules())
    has_children = any(not isinstance(child, Quantizer) for child in module.children())
    return has_children or len(_required(cls)) > 1


def _required(cls: type[nn.Module]) -> list[str]:
    parameters = list(inspect.signature(cls.forward).parameters.values())[1:]
    return [p.name for p in parameters if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
