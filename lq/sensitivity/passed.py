"""Which outputs of modules only go into the next module, so that a recording can do without."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from lq.dataflow import Dataflow, Flow
from lq.sensitivity.replay import around


def passed_on(dataflow: Dataflow, changeable: Iterable[str]) -> set[str]:
    """Return the modules whose output is read by nothing but one module in which nothing changes.

    Where that module's output is given again, what it was given does not matter. Only forwards
    that could be traced tell; hooks of others may look at what a module is given, so modules with
    hooks do not count.

    Args:
        dataflow: The model.
        changeable: Names of the modules that may change.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> passed_on(Dataflow(model), ["0", "2"])
        {'0'}
    """
    inside = {part for name in changeable for part in around(name)}
    return {
        name
        for flow in dataflow.flows.values()
        for name, reader in _single_readers(dataflow, flow)
        if reader not in inside and not _is_hooked(dataflow, reader)
    }


def _single_readers(dataflow: Dataflow, flow: Flow) -> Iterable[tuple[str, str]]:
    """Yield the children whose output goes into the next child alone, both being called once.

    The next that is called: no other can change between them, and have one computed again but
    not the other.
    """
    calls = [node for node in flow.graph.nodes if node.op == "call_module"]
    for node, user in itertools.pairwise(calls):
        if list(node.users) == [user]:
            name, reader = dataflow.child(flow, node), dataflow.child(flow, user)
            if flow.calls[name] == flow.calls[reader] == 1:
                yield name, reader


def _is_hooked(dataflow: Dataflow, name: str) -> bool:
    module = dataflow.modules[name]
    return bool(module._forward_hooks or module._forward_pre_hooks)
