"""What passes, plan and linter ask of a graph."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that multiply by a weight."""


def load_graph(path: str | Path) -> ir.Model:
    """Return the graph in an ONNX file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not an ONNX model.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected an ONNX file at {str(path)!r}, but there is none.")
    try:
        return ir.load(path)
    except Exception as error:
        raise ValueError(
            f"Expected {str(path)!r} to be an ONNX model, but it cannot be read: "
            f"{type(error).__name__}."
        ) from None


def weights_mb(model: ir.Model) -> float:
    """Return the size of the constants that a graph has, in 10^6 bytes."""
    held = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in held if tensor is not None) / 1e6


def constant(value: ir.Value | None) -> np.ndarray | None:
    """Return what an initializer or constant holds, ``None`` for a computed value."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else np.asarray(tensor.numpy())


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """Return the node that computes a value, if it is of one of the types."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type in op_types else None


def users(value: ir.Value) -> list[ir.Node]:
    """Return the nodes that read a value."""
    return [node for node, _ in value.uses()]


def only_feeds(value: ir.Value, node: ir.Node) -> bool:
    """Return whether a value is read by one node and by nothing else."""
    return users(value) == [node] and not value.is_graph_output()


def input_at(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input, ``None`` where an optional one is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def along(scale: np.ndarray, axis: int | None, ndim: int) -> np.ndarray:
    """Return a view of a per-channel scale ``[C]`` that broadcasts along `axis` of `ndim` axes."""
    if axis is None:
        return scale
    return scale.reshape([-1 if i == axis % ndim else 1 for i in range(ndim)])


def quantization_axis(node: ir.Node) -> int | None:
    """Return the channel axis of a QuantizeLinear or DequantizeLinear, ``None`` per tensor."""
    scale = constant(node.inputs[1])
    return None if scale is None or scale.size == 1 else node.attributes.get_int("axis", 1)


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Add a constant to a graph, under a name like `name` that is free."""
    unique, count = name, 1
    while unique in graph.initializers:
        unique, count = f"{name}.{count}", count + 1
    tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=unique)
    value = ir.Value(
        name=unique,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(array.shape),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def insert_after(graph: ir.Graph, value: ir.Value, nodes: list[ir.Node]) -> None:
    """Put a chain of nodes that starts from `value` between it and all that read it."""
    readers = [(node, index) for node, index in value.uses() if node not in nodes]
    source = value.producer()
    assert source is not None
    graph.insert_after(source, nodes)
    for node, index in readers:
        node.replace_input_with(index, nodes[-1].outputs[0])
