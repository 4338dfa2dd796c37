"""Names of modules on nodes and values, so that an engine's profile can be mapped back."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from lq.export.graph import WEIGHTED

OUTPUT_OF = "lq.output_of"
"""Metadata of a node: the module whose output is the node's."""
QUANTIZED_BY = "lq.quantized_by"
"""Metadata of a node: the quantizer that its output has already been through."""
PART = "lq.part"
"""Metadata of a QuantizeLinear that was moved: which of several inputs it stands on now."""
SCOPES = "pkg.torch.onnx.name_scopes"
_NO_SCOPE = "_empty_nn_module_stack"
"""What the exporter calls the module of shape computations."""
_CALL = "lq.call"


def scope(node: ir.Node) -> str:
    """Return the qualified name of the torch module a node comes from."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "['']"))
    name = str(scopes[-2]) if len(scopes) > 1 else ""
    return "" if name.startswith(_NO_SCOPE) else name


def number_calls(graph: ir.Graph) -> None:
    """Number the calls of every quantizer, before equal ones are merged and unused removed."""
    calls: Counter[str] = Counter()
    for node in graph:
        if node.op_type == "QuantizeLinear":
            node.metadata_props[_CALL] = str(calls[scope(node)])
            calls[scope(node)] += 1


def quantizer_call(node: ir.Node) -> str:
    """Return the name of a QuantizeLinear: its quantizer, and which call if not the first."""
    count = int(node.metadata_props.get(_CALL, 0))
    name = scope(node) or str(node.name)  # a file read back has the names and no scopes
    return name if count == 0 else f"{name}@{count}"


def mark_outputs(graph: ir.Graph) -> None:
    """Mark the nodes whose output is that of a module with a weight: the last of its nodes."""
    last = {scope(node): node for node in graph if len(node.outputs) == 1}
    weighted = {scope(node) for node in graph if node.op_type in WEIGHTED}
    for name in weighted:
        if not any(inner.startswith(f"{name}.") for inner in weighted):  # as an attention has
            last[name].metadata_props.setdefault(OUTPUT_OF, name)


def name_after_modules(graph: ir.Graph) -> None:
    """Name nodes and values after the torch modules they come from.

    A layer's own operator has the layer's qualified name, so that an engine's profile can be
    mapped back; QuantizeLinear and DequantizeLinear have their quantizer's.
    """
    if len(graph.outputs) == 1 and graph.outputs[0].producer() is not None:
        graph.outputs[0].name = "output"
    for name, value in list(graph.initializers.items()):
        base = name.removesuffix(".1")
        if base not in graph.initializers:
            value.name = base
    outputs = set(graph.outputs)
    taken: Counter[str] = Counter()
    for node, wanted in _wanted_names(graph):
        count = int(node.metadata_props.get(_CALL, taken[wanted]))
        taken[wanted] += 1
        part = node.metadata_props.get(PART, "")
        node.name = (wanted if count == 0 else f"{wanted}@{count}") + part
        for i, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = f"{node.name}/out{i or ''}"


def _wanted_names(graph: ir.Graph) -> Iterator[tuple[ir.Node, str]]:
    per_scope = Counter(scope(node) for node in graph)
    for node in graph:
        name = scope(node)
        quantizes = node.op_type == "QuantizeLinear"
        if not name or not (node.op_type in WEIGHTED or quantizes or per_scope[name] == 1):
            name = f"{name}/{node.op_type}" if name else node.op_type
        yield node, name


def clear_metadata(graph: ir.Graph) -> None:
    """Drop what the exporter noted of each node, stack traces with paths of the machine too."""
    for node in graph:
        node.doc_string = None
        kept = {k: v for k, v in node.metadata_props.items() if k in (OUTPUT_OF, QUANTIZED_BY)}
        node.metadata_props.clear()
        node.metadata_props.update(kept)
        for value in node.outputs:
            value.metadata_props.clear()
    for value in [*graph.inputs, *graph.initializers.values()]:
        value.metadata_props.clear()
