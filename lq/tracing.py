"""What one module's own forward does, found by tracing it with its children as black boxes."""

from __future__ import annotations

import ast
import copy
import inspect
import textwrap
import warnings
from typing import Any

import torch
from torch import fx, nn


class _OwnForward(fx.Tracer):
    """Traces a module's own code and looks into no child."""

    def __init__(self) -> None:
        super().__init__()
        # Buffers as nodes, so that a forward that changes one in place changes nothing now.
        self.proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def trace_forward(module: nn.Module, cls: type[nn.Module]) -> fx.Graph | None:
    """Return the graph of a module's own forward in eval mode, ``None`` where it has no one graph.

    The module is not touched: a shallow copy of it is traced, so what its forward keeps in
    attributes is kept there.

    Args:
        module: The module, whose children become one node each time they are called.
        cls: Its class without quantizers, whose forward is traced.

    Example:
        >>> graph = trace_forward(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Sequential)
        >>> [node.op for node in graph.nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
    """
    twin = _shallow(module, cls)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            return _OwnForward().trace(twin, _defaults(cls))
    except Exception:  # whatever a forward does that depends on its data
        return None


def _shallow(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    twin = cls.__new__(cls)
    twin.__dict__.update(
        {k: copy.copy(v) if isinstance(v, dict) else v for k, v in vars(module).items()}
    )
    twin.training = False
    return twin


def _defaults(cls: type[nn.Module]) -> dict[str, Any]:
    """Return the arguments that have plain defaults, which a forward may branch on."""
    plain = (type(None), bool, int, float, str)
    parameters = inspect.signature(cls.forward).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, plain)}


def may_add(cls: type[nn.Module]) -> bool:
    """Return whether a class's forward contains an addition, as far as its source tells.

    Example:
        >>> may_add(nn.Sequential)
        False
    """
    try:
        source = ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))
    except (OSError, TypeError, SyntaxError):
        return True
    return any(_is_addition(node) for node in ast.walk(source))


def _is_addition(node: ast.AST) -> bool:
    if isinstance(node, (ast.BinOp, ast.AugAssign)):
        return isinstance(node.op, ast.Add)
    return isinstance(node, ast.Attribute) and node.attr in ("add", "add_", "add_relu")
