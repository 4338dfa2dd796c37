"""Which layer each node of a graph works for, so that an engine's times can be told by layer."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from lq.export.graph import WEIGHTED
from lq.export.linter.placement_rules import ACTIVATIONS
from lq.export.plan import layer_of

FUSED = ("BatchNormalization", *ACTIVATIONS)
"""What engines compute together with the layer before it."""


def node_owners(graph: ir.Graph) -> dict[str, str]:
    """Return the layer that nodes work for, by the names of nodes and of their outputs.

    A layer's own nodes are its product, its quantizers and casts, and what is fused with it:
    BatchNorm and activation. Other nodes work for none.
    """
    products = {node: layer_of(node) for node in graph if node.op_type in WEIGHTED}
    layers = {layer for layer in products.values() if layer is not None}
    found: dict[ir.Node, str | None] = {}
    for node in graph:
        source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        owner = products.get(node) or owner_by_name(str(node.name), layers)
        if owner is None and node.op_type in FUSED and source is not None:
            owner = found.get(source)
        found[node] = owner
    names = {
        name: owner
        for node, owner in found.items()
        for name in (str(node.name), *(str(value.name) for value in node.outputs))
    }
    return {name: owner for name, owner in names.items() if owner is not None}


def owner_by_name(name: str, layers: Iterable[str]) -> str | None:
    """Return the layer whose name a node's name begins with, the longest of them.

    Example:
        >>> owner_by_name("conv.1.input_quantizer/DequantizeLinear", ["conv", "conv.1", "conv.10"])
        'conv.1'
    """
    found = [n for n in layers if name == n or name.startswith((f"{n}.", f"{n}/", f"{n}@"))]
    return max(found, key=len, default=None)
