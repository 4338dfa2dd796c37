"""The linter: every rule on a graph that breaks it and one that does not, and other toolkits."""

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import parser
from torch import Tensor, nn

import lq
from lq import cli
from lq.export import linter
from lq.export.linter import RULES, Finding
from lq.export.linter.command import main
from lq.export.to_onnx import trace

ROOT = Path(__file__).parent.parent


def pair(x: str, y: str, scale: str = "s", zero: str = "zero") -> str:
    """Q/DQ from x to y, the quantizer named after y."""
    return f"""
      {y}_q = QuantizeLinear ({x}, {scale}, {zero})
      {y} = DequantizeLinear ({y}_q, {scale}, {zero})
    """


def weight(name: str, shape: str = "16, 16, 1, 1", axis: int = 0) -> str:
    """A weight of stored int8 codes with a scale per channel."""
    count = int(np.prod([int(size) for size in shape.split(",")]))
    codes = ", ".join(str(i % 7 - 3) for i in range(count))
    return f"""
      {name}_codes = Constant <value = int8[{shape}] {{{codes}}}> ()
      {name} = DequantizeLinear <axis = {axis}> ({name}_codes, scales, zeros)
    """


def conv(x: str, y: str, **kwargs: object) -> str:
    """A quantized convolution."""
    return pair(x, f"{y}_in") + weight(f"{y}_w", **kwargs) + f"{y} = Conv ({y}_in, {y}_w)\n"


def model(body: str) -> onnx.ModelProto:
    scales = ", ".join(["0.02"] * 16)
    zeros = ", ".join(["0"] * 16)
    return parser.parse_model(f"""
      <ir_version: 8, opset_import: ["" : 18]>
      example (float[n, 16, 8, 8] x) => (float[n, c, h, w] y)
      <float s = {{0.05}}, float t = {{0.11}}, int8 zero = {{0}}, int8 three = {{3}},
       uint8 unsigned = {{0}}, float[16] scales = {{{scales}}}, int8[16] zeros = {{{zeros}}},
       int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}}>
      {{ {body} }}""")


RESIDUAL = conv("x", "a") + "r = Relu (a)" + conv("r", "b")
CASES = [
    pytest.param("residual", RESIDUAL + "m = Add (b, r)" + conv("m", "y"), "m", id="residual"),
    pytest.param(
        "residual", RESIDUAL + "m = Add (b, b_in)" + conv("m", "y"), None, id="shortcut quantized"
    ),
    pytest.param(
        "concat",
        RESIDUAL + "m = Concat <axis = 1> (b, b_in) y = Relu (m)",
        "m",
        id="concat in part",
    ),
    pytest.param(
        "concat",
        RESIDUAL + "m = Concat <axis = 1> (b, r)" + pair("m", "y"),
        "m",
        id="concat behind",
    ),
    pytest.param(
        "concat",
        RESIDUAL + pair("b", "k") + "m = Concat <axis = 1> (k, b_in) y = Relu (m)",
        None,
        id="concat quantized",
    ),
    pytest.param(
        "concat-scale",
        RESIDUAL + pair("b", "k", "t") + "m = Concat <axis = 1> (k, b_in) y = Relu (m)",
        "m",
        id="concat of two scales",
    ),
    pytest.param(
        "concat-scale",
        RESIDUAL + pair("b", "k") + "m = Concat <axis = 1> (k, b_in) y = Relu (m)",
        None,
        id="concat of one scale",
    ),
    pytest.param(
        "extra-pair",
        pair("x", "a") + "m = Relu (a)" + pair("m", "y"),
        "y_q",
        id="quantized twice in a row",
    ),
    pytest.param(
        "extra-pair", pair("x", "a") + pair("x", "b") + "y = Add (a, b)", "b_q", id="doubled"
    ),
    pytest.param("extra-pair", pair("x", "a") + "m = Exp (a)" + pair("m", "y"), None, id="needed"),
    pytest.param("requantized", pair("x", "a") + pair("a", "y", "t"), "y_q", id="requantized"),
    pytest.param("requantized", pair("x", "a") + pair("a", "y"), None, id="not requantized"),
    pytest.param(
        "two-scales", pair("x", "a") + pair("x", "b", "t") + "y = Add (a, b)", "b_q", id="two"
    ),
    pytest.param(
        "two-scales", pair("x", "a") + pair("x", "b") + "y = Add (a, b)", None, id="one scale"
    ),
    pytest.param(
        "before-activation", conv("x", "a") + pair("a", "b") + "y = Relu (b)", "b_q", id="relu"
    ),
    pytest.param(
        "before-activation",
        conv("x", "a") + pair("a", "b") + "y = Sigmoid (b)",
        "b_q",
        id="sigmoid",
    ),
    pytest.param(
        "before-activation", conv("x", "a") + "b = Relu (a)" + pair("b", "y"), None, id="behind"
    ),
    pytest.param("after-pad", "p = Pad (x, pads)" + conv("p", "y"), "y_in_q", id="pad, pair"),
    pytest.param(
        "after-pad",
        pair("x", "a") + "p = Pad (a, pads)" + weight("w") + "y = Conv (p, w)",
        None,
        id="pair, pad",
    ),
    pytest.param(
        "weight-axis",
        pair("x", "a") + weight("w", axis=0) + "y = ConvTranspose (a, w)",
        "w",
        id="transposed, axis 0",
    ),
    pytest.param(
        "weight-axis",
        pair("x", "a") + weight("w", axis=1) + "y = ConvTranspose (a, w)",
        None,
        id="transposed, axis 1",
    ),
    pytest.param("weight-axis", conv("x", "y", axis=1), "y_w", id="axis 1"),
    pytest.param(
        "per-tensor-weights", conv("x", "y").replace("scales, zeros", "s, zero"), "y_w", id="one"
    ),
    pytest.param("per-tensor-weights", conv("x", "y"), None, id="per channel"),
    pytest.param(
        "float-weights",
        pair("x", "a")
        + "w = Constant <value = float[1, 16, 1, 1] {"
        + ", ".join(["0.1"] * 16)
        + "}> ()"
        + pair("w", "wd")
        + "y = Conv (a, wd)",
        "wd_q",
        id="float weights",
    ),
    pytest.param("float-weights", conv("x", "y"), None, id="integer weights"),
    pytest.param(
        "quantized-bias",
        pair("x", "a")
        + weight("w")
        + f"cb = Constant <value = int32[16] {{{', '.join(['5'] * 16)}}}> ()"
        + "b = DequantizeLinear (cb, s) y = Conv (a, w, b)",
        "b",
        id="integer bias",
    ),
    pytest.param("quantized-bias", conv("x", "y"), None, id="no bias"),
    pytest.param(
        "small-gemm",
        pair("x", "a") + weight("w", "16, 1, 1, 1") + "y = Conv <group = 16> (a, w)",
        "y",
        id="depthwise",
    ),
    pytest.param("small-gemm", conv("x", "y"), None, id="large enough"),
    pytest.param("zero-point", pair("x", "y", zero="three"), "y_q", id="zero-point 3"),
    pytest.param("zero-point", pair("x", "y"), None, id="zero-point 0"),
    pytest.param("format", pair("x", "y", zero="unsigned"), "y_q", id="uint8"),
    pytest.param("format", pair("x", "y"), None, id="int8"),
    pytest.param(
        "float-island",
        f"f = Constant <value = float[16, 16, 1, 1] {{{', '.join(['0.1'] * 256)}}}> ()"
        + "a = Conv (x, f)"
        + conv("a", "b")
        + "y = Conv (b, f)",
        "b",
        id="island",
    ),
    pytest.param("float-island", conv("x", "a") + conv("a", "y"), None, id="no island"),
]


@pytest.mark.parametrize(("rule", "body", "node"), CASES)
def test_rule(rule: str, body: str, node: str | None) -> None:
    graph = ir.from_proto(model(body))
    for n in graph.graph:
        n.name = n.outputs[0].name
    found = [finding.node for finding in lq.lint(graph) if finding.rule == rule]
    assert found == ([] if node is None else [node])


def test_every_rule_has_a_case_and_a_line_of_documentation() -> None:
    cases = {case.values[0] for case in CASES if case.values[2] is not None}
    clean = {case.values[0] for case in CASES if case.values[2] is None}
    assert cases == clean == set(RULES)
    page = (ROOT / "docs" / "lint.md").read_text()
    for name, rule in RULES.items():
        assert f"| `{name}` |" in page
        assert rule.fix in page


def test_targets_differ() -> None:
    signed, unsigned = model(pair("x", "y", zero="three")), model(pair("x", "y", zero="unsigned"))
    for target in ("onnxruntime", "openvino"):
        assert lq.lint(signed, target) == lq.lint(unsigned, target) == []
    shortcut = model(RESIDUAL + "m = Add (b, b_in)" + conv("m", "y"))
    assert [f.rule for f in lq.lint(shortcut, "openvino")] == ["residual"]
    with pytest.raises(ValueError, match="tensorflow"):
        lq.lint(signed, "tensorflow")


def test_pairs_behind_max_pooling_stay_for_onnxruntime(tmp_path) -> None:
    pooled = pair("x", "a") + "m = MaxPool <kernel_shape = [1, 1]> (a)" + pair("m", "k")
    body, path = pooled + pair("k", "l") + "y = Neg (l)", tmp_path / "m.onnx"
    onnx.save(model(body), path)
    found = {t: [f.node for f in lq.lint(path, t)] for t in ("onnxruntime", "openvino")}
    assert [len(nodes) for nodes in found.values()] == [1, 2]  # k doubles in both, m in OpenVINO
    assert linter.fix(path, tmp_path / "fixed.onnx", "onnxruntime") == []
    kept = ir.load(tmp_path / "fixed.onnx").graph
    behind = [n.inputs[0].producer() for n in kept if n.op_type == "QuantizeLinear"]
    assert "MaxPool" in [node.op_type for node in behind if node is not None]


SAFE = [
    pytest.param(
        RESIDUAL + "m = Concat <axis = 1> (b, r)" + pair("m", "k") + "y = Neg (k)", id="concat"
    ),
    pytest.param(pair("x", "a") + "m = Relu (a)" + pair("m", "k") + "y = Neg (k)", id="extra"),
    pytest.param(pair("x", "a") + pair("x", "b") + "y = Add (a, b)", id="doubled"),
    pytest.param(conv("x", "a") + pair("a", "b") + "r = Relu (b) y = Neg (r)", id="relu"),
    pytest.param("r = Relu (x) p = Pad (r, pads)" + conv("p", "y"), id="pad"),
]


@pytest.mark.parametrize("body", SAFE)
def test_safe_fixes_leave_nothing_to_find(body: str, tmp_path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model(body), path)
    repaired = {name for name, rule in RULES.items() if rule.rewrite is not None}
    assert repaired & {finding.rule for finding in lq.lint(path)}
    before = path.read_bytes()
    left = linter.fix(path, tmp_path / "fixed.onnx")
    assert not repaired & {finding.rule for finding in left}
    assert path.read_bytes() == before
    onnx.checker.check_model(str(tmp_path / "fixed.onnx"), full_check=True)


def test_a_fix_that_changes_outputs_writes_nothing(tmp_path, monkeypatch) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model(conv("x", "a") + pair("a", "b") + "r = Relu (b) y = Neg (r)"), path)

    def wrong(graph: ir.Model, target: str) -> None:
        graph.graph.initializers["s"].const_value = ir.tensor(np.float32(0.07), name="s")

    monkeypatch.setattr(linter.fixing, "rewrite", wrong)
    with pytest.raises(RuntimeError, match=r"something else than .*m\.onnx"):
        linter.fix(path, tmp_path / "fixed.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize(
    ("body", "code"), [(pair("x", "y"), 0), (pair("x", "y", zero="three"), 1)], ids=["clean", "not"]
)
def test_exit_code(body: str, code: int, tmp_path, capsys) -> None:
    onnx.save(model(body), tmp_path / "m.onnx")
    assert main([str(tmp_path / "m.onnx")]) == code
    assert f"{code} findings for tensorrt" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, b"not a model", b""], ids=["missing", "text", "empty"])
def test_bad_file_is_one_line(content: bytes | None, tmp_path, capsys) -> None:
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    assert main([str(path)]) == 2
    error = capsys.readouterr().err
    assert "bad.onnx" in error
    assert error.count("\n") == 1


def test_command_fixes_into_a_new_file(tmp_path, capsys) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(model(pair("x", "a") + "m = Relu (a)" + pair("m", "k") + "y = Neg (k)"), path)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["lint", str(path), "--fix", "--target=openvino"])
    assert stopped.value.code == 0
    assert "0 findings for openvino" in capsys.readouterr().out
    assert (tmp_path / "m.fixed.onnx").is_file()


def test_help_tells_of_it(capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "lq lint" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main(["lint", "--help"])
    assert "--fix" in capsys.readouterr().out


class Net(nn.Module):
    """A residual block, a concatenation, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.c = nn.Conv2d(32, 16, 1)
        self.fc = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.a(x)))
        y = torch.relu(self.b(x) + x)
        z = torch.relu(self.c(torch.cat([x, y], 1)))
        return self.fc(z.mean((2, 3)))


@pytest.fixture
def net() -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net().eval(), torch.randn(4, 3, 16, 16)


@pytest.fixture
def float_file(net, tmp_path) -> Path:
    model, x = net
    ir.save(trace(model, x), tmp_path / "float.onnx")
    return tmp_path / "float.onnx"


def rules(findings: list[Finding]) -> set[str]:
    return {finding.rule for finding in findings}


def test_float_files_are_clean(float_file) -> None:
    assert lq.lint(float_file) == []


def test_our_own_export(net, tmp_path) -> None:
    model, x = net
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)
    lq.export_onnx(model, x, tmp_path / "m.onnx")
    assert rules(lq.lint(tmp_path / "m.onnx")) <= {"residual", "two-scales"}


def test_onnxruntime_quantization(net, float_file, tmp_path) -> None:
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):
        batches = iter([{"x": net[1].numpy()}])

        def get_next(self) -> dict | None:
            return next(self.batches, None)

    path = tmp_path / "ort.onnx"
    q.quantize_static(float_file, path, Reader(), quant_format=q.QuantFormat.QDQ)
    found = lq.lint(path)
    assert {"zero-point", "per-tensor-weights", "quantized-bias"} <= rules(found)
    assert "zero-point" not in rules(lq.lint(path, "onnxruntime"))
    assert "quantized-bias" not in rules(linter.fix(path, tmp_path / "fixed.onnx"))


@pytest.mark.filterwarnings("ignore")
def test_modelopt(net, tmp_path) -> None:
    mtq = pytest.importorskip("modelopt.torch.quantization")
    model, x = net
    mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda m: m(x))
    path = tmp_path / "modelopt.onnx"
    torch.onnx.export(model, (x,), path, dynamo=False, opset_version=17)
    assert rules(lq.lint(path)) == {"residual", "concat", "float-weights"}
    left = linter.fix(path, tmp_path / "fixed.onnx")
    assert rules(left) == {"residual"}
    assert (tmp_path / "fixed.onnx").stat().st_size < path.stat().st_size


@pytest.mark.filterwarnings("ignore")
def test_nncf(net, float_file) -> None:
    nncf = pytest.importorskip("nncf")
    data = nncf.Dataset([{"x": net[1].numpy()}])
    quantized = nncf.quantize(onnx.load(float_file), data)
    assert lq.lint(quantized, "openvino") == []
    assert rules(lq.lint(quantized)) == {"format"}
