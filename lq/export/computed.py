"""Weights that pruning and parametrizations compute, stored as what they are."""

from __future__ import annotations

import onnx_ir as ir
from torch import nn

from lq.export.graph import add_initializer
from lq.export.passes.naming import scope
from lq.gemm import weight_of
from lq.surgery import quantized_layers

_QUANTIZER = "weight_quantizer"


def store_computed_weights(graph: ir.Graph, model: nn.Module) -> None:
    """Replace what computes a quantized layer's weight, a mask or a norm, by the weight.

    Folding constants leaves large ones as they are, and need not round as torch does.
    """
    layers = quantized_layers(model)
    for node in graph:
        name, _, slot = scope(node).rpartition(".")
        if node.op_type != "QuantizeLinear" or slot != _QUANTIZER:
            continue
        weight, computed = weight_of(layers[name]), node.inputs[0]
        if weight is None or computed is None or computed.is_initializer():
            continue
        array = weight.detach().cpu().numpy()
        node.replace_input_with(0, add_initializer(graph, f"{name}.weight".lstrip("."), array))
