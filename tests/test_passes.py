"""Graph passes, each on a small graph of its own: what it rewrites, and that no bit changes."""

from collections import Counter
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import parser
from onnx.reference import ReferenceEvaluator

from lq.export import passes
from lq.export.grid import grid_of

PAIR = """
  {q} = QuantizeLinear ({x}, {s}, zero)
  {y} = DequantizeLinear ({q}, {s}, zero)
"""


def pair(x: str, y: str, scale: str = "s") -> str:
    return PAIR.format(x=x, y=y, s=scale, q=f"{y}_codes")


def model(body: str, out: str = "float[n, c, h, w] y", opset: int = 18) -> ir.Model:
    """A graph from `x` to `y`, with scales s = 0.05 and t = 0.11 and some constants."""
    text = f"""
    <ir_version: 8, opset_import: ["" : {opset}]>
    example (float[n, 4, 8, 8] x) => ({out})
    <float s = {{0.05}}, float t = {{0.11}}, int8 zero = {{0}}, float low = {{0.0}},
     float six = {{6.0}}, float on_grid = {{0.55}}, int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}},
     int64[2] flat = {{0, -1}}, float one = {{1.0}}>
    {{ {body} }}"""
    return ir.from_proto(parser.parse_model(text))


def run(graph: ir.Model, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).normal(0, 3, (2, 4, 8, 8)).astype(np.float32)
    if any(node.op_type == "Cast" for node in graph.graph):
        # ONNX Runtime has no fp16 kernels on the CPU and drops casts around what it runs instead.
        return ReferenceEvaluator(ir.to_proto(graph)).run(None, {"x": x})[0]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString(), options)
    return session.run(None, {"x": x})[0]


def count(graph: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph)


def order(graph: ir.Model) -> list[str]:
    return [node.op_type for node in graph.graph]


def check_exact(graph: ir.Model, rewrite: Callable[[ir.Graph], object]) -> ir.Model:
    """Apply a pass and compare outputs bit for bit."""
    before = run(graph)
    rewrite(graph.graph)
    passes.remove_unused(graph.graph)
    np.testing.assert_array_equal(run(graph), before)
    return graph


THROUGH = [
    pytest.param("m = MaxPool <kernel_shape = [2, 2]> (a)", id="MaxPool"),
    pytest.param("m = Transpose <perm = [0, 2, 3, 1]> (a)", id="Transpose"),
    pytest.param("m = Relu (a)", id="Relu"),
    pytest.param("m = Clip (a, low, on_grid)", id="Clip on grid"),
    pytest.param("m = Concat <axis = 1> (a, a)", id="Concat"),
    pytest.param("m = Pad (a, pads)", id="Pad"),
    pytest.param("i = Identity (a) m = Dropout (i)", id="Identity, Dropout"),
]


@pytest.mark.parametrize("body", THROUGH)
def test_quantized_tensors_pass_without_a_second_pair(body: str) -> None:
    graph = model(pair("x", "a") + body + pair("m", "b") + "y = Neg (b)")
    check_exact(graph, passes.remove_requantization)
    assert count(graph)["QuantizeLinear"] == 1


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("m = Clip (a, low, one) " + pair("m", "b", "t"), id="another scale"),
        pytest.param("m = AveragePool <kernel_shape = [2, 2]> (a)" + pair("m", "b"), id="average"),
        pytest.param("c = Add (a, t) m = Identity (c)" + pair("m", "b"), id="computed"),
        pytest.param("m = Clip (a, t, six)" + pair("m", "b"), id="clip off the grid"),
    ],
)
def test_a_pair_that_rounds_stays(body: str) -> None:
    graph = model(pair("x", "a") + body + "y = Neg (b)")
    check_exact(graph, passes.remove_requantization)
    assert count(graph)["QuantizeLinear"] == 2


@pytest.mark.parametrize(("bound", "stays"), [("6.35", True), ("6.3", True), ("6.31", False)])
def test_clip_keeps_the_grid_where_its_bound_is_on_it(bound: str, stays: bool) -> None:
    body = f"b = Constant <value_float = {bound}> ()"
    graph = model(pair("x", "a") + body + "y = Clip (a, low, b)")
    assert (grid_of(graph.graph.outputs[0]) is not None) is stays


@pytest.mark.parametrize(
    ("body", "moved"),
    [
        pytest.param("m = MaxPool <kernel_shape = [2, 2]> (r)", 1, id="MaxPool"),
        pytest.param("m = Transpose <perm = [0, 2, 3, 1]> (r)", 1, id="Transpose"),
        pytest.param("f = Reshape (r, flat) m = Unsqueeze (f, axis)", 1, id="Reshape, Unsqueeze"),
        pytest.param("m = Pad (r, pads)", 1, id="Pad"),
        pytest.param("n = Neg (r) m = Concat <axis = 1> (r, n)", 2, id="Concat"),
    ],
)
def test_quantize_moves_up(body: str, moved: int) -> None:
    axis = "axis = Constant <value_ints = [1]> ()"
    graph = model(axis + " r = Relu (x)" + body + pair("m", "b") + "y = Abs (b)", "float[n] y")
    check_exact(graph, passes.move_quantize_up)
    quantize = [node for node in graph.graph if node.op_type == "QuantizeLinear"]
    assert len(quantize) == moved
    assert {node.inputs[0].producer().op_type for node in quantize} <= {"Relu", "Neg"}


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("m = AveragePool <kernel_shape = [2, 2]> (r)", id="average"),
        pytest.param("m = Pad (r, pads, one)", id="Pad with ones"),
        pytest.param("m = Relu (r)", id="activation"),
    ],
)
def test_quantize_stays_behind_what_computes(body: str) -> None:
    graph = model("r = Neg (x)" + body + pair("m", "b") + "y = Neg (b)")
    before = order(graph)
    check_exact(graph, passes.move_quantize_up)
    assert order(graph) == before


def test_quantize_stays_where_its_input_is_read_in_float_too() -> None:
    body = "r = Relu (x) m = MaxPool <kernel_shape = [2, 2]> (r)" + pair("m", "b")
    graph = model(body + "y = Add (b, m)")
    assert passes.move_quantize_up(graph.graph) == []


def test_pairs_of_concat_inputs_share_one_that_is_there() -> None:
    body = "r = Relu (x)" + pair("r", "a") + "n = Neg (a) m = Concat <axis = 1> (r, n)"
    graph = model(body + pair("m", "b") + "k = Neg (b) j = Concat <axis = 1> (a, k) y = Abs (j)")
    check_exact(graph, passes.move_quantize_up)
    assert count(graph)["QuantizeLinear"] == 2
    (concat, _) = (node for node in graph.graph if node.op_type == "Concat")
    assert len({grid_of(value) for value in concat.inputs}) == 1


def test_relu_moves_before_the_pair() -> None:
    graph = model("n = Neg (x)" + pair("n", "a") + "r = Relu (a) y = Neg (r)")
    check_exact(graph, passes.move_activations_before_quantize)
    assert order(graph) == ["Neg", "Relu", "QuantizeLinear", "DequantizeLinear", "Neg"]


def test_equal_pairs_are_shared() -> None:
    graph = model(pair("x", "a") + pair("x", "b") + "c = Neg (b) y = Sub (a, c)")
    before = run(graph)
    passes.share_equal(graph)
    assert count(graph)["QuantizeLinear"] == 1
    np.testing.assert_array_equal(run(graph), before)


def test_reshapes_to_one_varying_size_are_constant() -> None:
    body = (
        "k = Shape <end = 2> (x) m = Constant <value_ints = [64]> () z = Concat <axis = 0> (k, m)"
    )
    graph = model(body + "r = Reshape (x, z) y = Neg (r)", "float[n, 4, 64] y")
    ir.passes.common.ShapeInferencePass()(graph)
    check_exact(graph, passes.fix_reshapes)
    assert order(graph) == ["Reshape", "Neg"]
    assert passes.constant(graph.graph[0].inputs[1]).tolist() == [-1, 4, 64]


def test_reshapes_to_two_varying_sizes_stay() -> None:
    graph = model("k = Shape (x) r = Reshape (x, k) y = Neg (r)")
    graph.graph[1].outputs[0].shape = ir.Shape(["n", 4, "h", 8])
    check_exact(graph, passes.fix_reshapes)
    assert order(graph) == ["Shape", "Reshape", "Neg"]


def test_a_pair_moves_over_several_nodes() -> None:
    body = "r = Relu (x) n = Neg (r) c = Concat <axis = 1> (r, n)"
    body += "m = MaxPool <kernel_shape = [2, 2]> (c)" + pair("m", "b") + "y = Abs (b)"
    graph = model(body)
    check_exact(graph, passes.move_quantize_up)
    marked = [n.op_type for n in graph.graph if passes.QUANTIZED_BY in n.metadata_props]
    assert marked == ["MaxPool"]  # where it stood
    sources = [n.inputs[0].producer() for n in graph.graph if n.op_type == "QuantizeLinear"]
    assert [s.op_type for s in sources] == ["Relu", "Neg"]


CAST = "{y} = Cast <to = {to}> ({x})\n"
F32, F16 = 1, 10


def narrow(body: str) -> str:
    """Cast x to fp16 and up again, compute, and cast down as the next fp16 layer does."""
    return (
        CAST.format(y="h", x="x", to=F16)
        + CAST.format(y="a", x="h", to=F32)
        + body
        + CAST.format(y="d", x="m", to=F16)
        + CAST.format(y="y", x="d", to=F32)
    )


def to_16_bits(graph: ir.Graph) -> None:
    passes.delay_upcasts(graph)
    passes.cancel_casts(graph)


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("m = Relu (a)", id="Relu"),
        pytest.param("m = MaxPool <kernel_shape = [2, 2]> (a)", id="MaxPool"),
        pytest.param("r = Relu (a) m = Concat <axis = 1> (r, a)", id="Concat"),
        pytest.param("m = Clip (a, low, six)", id="Clip"),
        pytest.param("s2 = Add (a, a) m = Relu (s2)", id="Add, Relu"),
    ],
)
def test_16_bit_layers_stay_in_16_bits(body: str) -> None:
    graph = model(narrow(body))
    ir.passes.common.ShapeInferencePass()(graph)
    check_exact(graph, to_16_bits)
    assert [c for c in order(graph) if c == "Cast"] == ["Cast", "Cast"]  # in at x, out at y


@pytest.mark.parametrize(
    "body",
    [
        pytest.param("m = Clip (a, low, s)", id="bound that fp16 does not hold"),
        pytest.param("m = Exp (a)", id="computed"),
    ],
)
def test_what_fp16_would_round_stays_in_float32(body: str) -> None:
    graph = model(narrow(body))
    ir.passes.common.ShapeInferencePass()(graph)
    check_exact(graph, to_16_bits)
    assert count(graph)["Cast"] == 4


def test_a_sum_that_is_read_in_float32_stays() -> None:
    body = narrow("sum = Add (a, a) m = Relu (sum)").replace("y = Cast <to = 1> (d)", "")
    graph = model(body + "e = Cast <to = 1> (d) y = Sub (e, sum)")
    ir.passes.common.ShapeInferencePass()(graph)
    check_exact(graph, to_16_bits)
    assert next(n for n in graph.graph if n.op_type == "Add").outputs[0].dtype == F32


def weight_graph(dtype: np.dtype, zero_point: int = 0) -> tuple[ir.Model, np.ndarray, np.ndarray]:
    """A float constant behind QuantizeLinear, per channel."""
    rng = np.random.default_rng(0)
    weight = rng.normal(0, 1, (4, 3)).astype(np.float32)
    scale = (np.abs(weight).max(1) / 5).astype(np.float32)
    zero = np.full(4, zero_point).astype(dtype)
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="g")
    inputs = []
    for name, array in (("w", weight), ("scale", scale), ("zero", zero)):
        tensor = ir.tensor(array, name=name)
        value = ir.Value(
            name=name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape
        )
        graph.register_initializer(value)
        inputs.append(value)
    quantize = ir.node("QuantizeLinear", inputs, {"axis": 0})
    dequantize = ir.node("DequantizeLinear", [quantize.outputs[0], *inputs[1:]], {"axis": 0})
    graph.extend([quantize, dequantize])
    dequantize.outputs[0].name = "y"
    graph.outputs.append(dequantize.outputs[0])
    return ir.Model(graph, ir_version=10), weight, scale


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (np.dtype(np.int8), -127, 127),
        (np.dtype(ml_dtypes.int4), -7, 7),
        (np.dtype(ml_dtypes.float8_e4m3fn), -448, 448),
    ],
    ids=str,
)
def test_weights_are_stored_as_codes(dtype: np.dtype, low: int, high: int) -> None:
    graph, weight, scale = weight_graph(dtype)
    passes.store_integer_weights(graph.graph)
    (stored,) = (v for v in graph.graph.initializers.values() if len(v.shape) == 2 and v.uses())
    assert stored.const_value.dtype.numpy() == dtype
    codes = passes.constant(stored).astype(np.float32)
    expected = weight / scale[:, None]
    if dtype.itemsize and low == -448:
        expected = expected.astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(
        codes, expected.clip(low, high) if low == -448 else np.rint(expected).clip(low, high)
    )


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, ml_dtypes.float8_e4m3fn], ids=str)
def test_stored_weights_are_what_quantize_linear_computes(dtype: type) -> None:
    graph, *_ = weight_graph(np.dtype(dtype), 3 if dtype is np.uint8 else 0)
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString())
    (expected,) = session.run(None, {})
    passes.store_integer_weights(graph.graph, narrow=False)
    session = ort.InferenceSession(ir.to_proto(graph).SerializeToString())
    np.testing.assert_array_equal(session.run(None, {})[0], expected)


def test_integer_biases_become_floats() -> None:
    body = """
      cw = Constant <value = int8[2, 4, 1, 1] {1, -2, 3, 4, 5, 6, -7, 8}> ()
      w = DequantizeLinear (cw, s, zero)
      cb = Constant <value = int32[2] {100, -7}> ()
      b = DequantizeLinear (cb, t)
      y = Conv (x, w, b)
    """
    graph = model(body)
    assert len(passes.fold_biases(graph.graph)) == 1
    reference = run(model(body))
    np.testing.assert_array_equal(run(graph), reference)
    assert count(graph)["DequantizeLinear"] == 2
    passes.remove_unused(graph.graph)
    assert count(graph)["DequantizeLinear"] == 1
