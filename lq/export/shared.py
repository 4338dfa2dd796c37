"""Quantizers that several modules share go by one name in the graph."""

from __future__ import annotations

import ast

import onnx_ir as ir
from torch import nn

from lq.export.passes.naming import SCOPES, scope
from lq.quantizer import Quantizer
from lq.surgery import quantizers


def name_shared_quantizers(graph: ir.Graph, model: nn.Module) -> None:
    """Give the nodes of a shared quantizer its first name, whichever it was called by."""
    first = {quantizer: name for name, quantizer in quantizers(model).items()}
    names = {
        alias: first[module]
        for alias, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Quantizer)
    }
    for node in graph:
        name = scope(node)
        if names.get(name, name) != name:
            scopes = ast.literal_eval(node.metadata_props[SCOPES])
            scopes[-2] = names[name]
            node.metadata_props[SCOPES] = str(scopes)
