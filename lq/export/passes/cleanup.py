"""Constants folded and shared, and nothing left that nothing uses."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants

from lq.export.graph import add_initializer


def tidy(model: ir.Model) -> None:
    """Fold constants, share what is equal, drop what is unused."""
    fold_constants(model)
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
    )(model)
    share_equal(model)


def share_equal(model: ir.Model) -> None:
    """Share equal constants, and nodes that compute the same of the same.

    Two quantizers of equal scale on one tensor become one.
    """
    ir.passes.Sequential(
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)


def fix_reshapes(graph: ir.Graph) -> None:
    """Give reshapes of which at most one size varies a constant shape, with -1 for that size."""
    for node in [n for n in graph if n.op_type == "Reshape"]:
        shape = node.outputs[0].shape
        sizes = [size if isinstance(size, int) else -1 for size in shape] if shape else []
        if not sizes or sizes.count(-1) > 1 or 0 in sizes:
            continue
        wanted = np.array(sizes, np.int64)
        node.replace_input_with(1, add_initializer(graph, f"{node.outputs[0].name}.shape", wanted))


def remove_unused(graph: ir.Graph) -> None:
    """Remove nodes and initializers that nothing uses."""
    for node in reversed(list(graph)):
        if not any(o.uses() or o.is_graph_output() for o in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del graph.initializers[name]
