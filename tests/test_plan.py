"""Precision plans: to a recipe and to YAML, and read back from model and exported graph."""

import random

import pytest
import torch
import torchvision
import yaml
from torch import Tensor, nn

import lq
from lq.export.plan import read_layers
from lq.export.to_onnx import trace
from lq.models import digits_cnn
from lq.plan import PrecisionPlan
from tests.test_export_formats import Branches

FORMATS = ("int8", "int4", "fp16", "bf16", "fp32", "fp8_e4m3", "int8/fp32", "int8/fp16")


def transformer() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=4)


class Sums(nn.Module):
    """Adds what two layers make of a tensor to it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return self.b(x) + self.c(x) + x


def random_plan(model: nn.Module, seed: int) -> PrecisionPlan:
    chosen = random.Random(seed)
    plan = {name: chosen.choice(FORMATS) for name in PrecisionPlan.of(model)}
    # A float attention does not call its output projection, which is therefore float too.
    alone = {n: "fp32" for n in plan if plan.get(n.removesuffix(".out_proj")) == "fp32"}
    return PrecisionPlan(plan | alone)


@pytest.mark.parametrize(
    ("factory", "shape", "seed"),
    [
        *(pytest.param(digits_cnn, (1, 8, 8), seed, id=f"digits_cnn-{seed}") for seed in range(2)),
        *(pytest.param(Branches, (3, 16, 16), seed, id=f"branches-{seed}") for seed in range(2)),
        *(pytest.param(transformer, (3, 16, 16), s, id=f"transformer-{s}") for s in range(2)),
        pytest.param(
            torchvision.models.resnet18, (3, 64, 64), 0, id="resnet18", marks=pytest.mark.slow
        ),
        pytest.param(
            torchvision.models.mobilenet_v2, (3, 64, 64), 0, id="mobilenet", marks=pytest.mark.slow
        ),
    ],
)
def test_read_back_from_model_and_graph_it_is_the_same_plan(factory, shape, seed) -> None:
    torch.manual_seed(seed)
    model = factory().eval()
    plan, batch = random_plan(model, seed), torch.randn(4, *shape)
    lq.calibrate(lq.quantize(model, lq.Recipe.from_plan(plan)), [batch], progress=False)
    assert PrecisionPlan.of(model) == plan
    assert PrecisionPlan(read_layers(trace(model, batch))) == plan


@pytest.mark.parametrize("format", ["int8/fp16", "int8/bf16", "int8/fp32", "fp16"])
def test_weights_that_are_cast_are_what_is_stored(format: str) -> None:
    torch.manual_seed(0)
    model, batch = digits_cnn().eval(), torch.randn(4, 1, 8, 8)
    plan = PrecisionPlan.of(model).changed({"3.conv1": format, "9": format})
    lq.calibrate(lq.quantize(model, lq.Recipe.from_plan(plan)), [batch], progress=False)
    assert PrecisionPlan(read_layers(trace(model, batch))) == plan


def test_read_back_from_a_file(tmp_path) -> None:
    torch.manual_seed(0)
    model, batch = digits_cnn().eval(), torch.randn(4, 1, 8, 8)
    plan = PrecisionPlan({"0": "fp16", "3.conv1": "int8", "3.conv2": "int4", "4": "int8"})
    lq.quantize(model, lq.Recipe.from_plan({**plan, "9": "fp32"}))
    lq.export_onnx(lq.calibrate(model, [batch]), batch, tmp_path / "m.onnx")
    assert PrecisionPlan.of(tmp_path / "m.onnx") == plan.changed({"9": "fp32"})


def test_calls_of_one_layer_are_one_layer() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(torch.relu(self.fc(x)))

    model, x = Twice(), torch.randn(4, 8)
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)
    graph = trace(model, x)
    assert read_layers(graph) == {"fc": "int8"}
    second = next(node for node in graph.graph if node.name == "fc@1")
    second.replace_input_with(0, graph.graph.inputs[0])
    with pytest.raises(ValueError, match=r"'fc'.*one format.*int8 and int8/fp32"):
        read_layers(graph)


def test_formats_of_weights_and_inputs() -> None:
    plan = {"0": "int4", "3.conv1": "int8/fp32", "3.conv2": "fp16", "4": "int8", "9": "fp32"}
    model = lq.quantize(digits_cnn(), lq.Recipe.from_plan(plan))
    found = {
        name: (layer.layer_spec.weights.format, layer.layer_spec.inputs.format)
        for name, layer in lq.surgery.quantized_layers(model).items()
    }
    assert found == {
        "0": ("int4", "fp32"),
        "3.conv1": ("int8", "fp32"),
        "3.conv2": ("fp16", "fp16"),
        "4": ("int8", "int8"),
    }
    assert PrecisionPlan.of(model) == plan


def test_weights_keep_what_the_base_says() -> None:
    base = lq.Recipe(weights=lq.QuantSpec("int8", axis=None), unsigned=True)
    recipe = lq.Recipe.from_plan({"0": "int4", "9": "int8"}, base)
    assert recipe.layer_spec("0", nn.Linear(2, 2)).weights.axis is None
    assert recipe.unsigned
    assert recipe.layer_spec("another", nn.Linear(2, 2)).weights.format == "int8"


def test_additions_have_a_format_of_the_plan() -> None:
    layers = PrecisionPlan.of(digits_cnn())
    for format in ("int8", "fp8_e4m3", "int6"):
        recipe = lq.Recipe.from_plan(dict.fromkeys(layers, format))
        model = lq.quantize(digits_cnn(), recipe)
        assert {q.spec.format for q in lq.surgery.quantizers(model).values()} == {format}
    weights_alone = lq.quantize(digits_cnn(), lq.Recipe.from_plan(dict.fromkeys(layers, "int4")))
    inputs = {n: q for n, q in lq.surgery.quantizers(weights_alone).items() if "weight" not in n}
    assert not any(q.spec.needs_scale for q in inputs.values())


def test_an_addition_that_a_plan_names_has_that_format() -> None:
    layers = dict.fromkeys(PrecisionPlan.of(digits_cnn()), "fp8_e4m3")
    for format, expected in (("int8", "int8"), ("fp8_e4m3", "fp8_e4m3"), ("fp16", None)):
        model = lq.quantize(digits_cnn(), lq.Recipe.from_plan({**layers, "3": format}))
        found = getattr(model[3], "x_quantizer", None)
        assert (found and found.spec.format) == expected


def test_layers_that_disagree_leave_an_addition_to_the_base() -> None:
    plan = {"0.a": "fp32", "0.b": "int8", "0.c": "fp8_e4m3"}
    model = lq.quantize(nn.Sequential(Sums()), lq.Recipe.from_plan(plan))
    quantizer = model[0].a.output_quantizer
    assert quantizer is model[0].b.input_quantizer
    assert quantizer is not model[0].c.input_quantizer


def test_pooling_has_a_format_of_the_plan() -> None:
    model = nn.Sequential(nn.Conv2d(1, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plan = {"0": "fp8_e4m3"}
    lq.quantize(model, lq.Recipe.from_plan(plan, "onnxruntime_int8"))
    assert {q.spec.format for q in lq.surgery.quantizers(model).values()} == {"fp8_e4m3"}


def test_names_are_no_globs() -> None:
    model = nn.ModuleDict({"a[0]": nn.Linear(16, 16), "a0": nn.Linear(16, 16)})
    lq.quantize(model, lq.Recipe.from_plan({"a[0]": "fp16", "a0": "int8"}))
    assert PrecisionPlan.of(model) == {"a[0]": "fp16", "a0": "int8"}


def test_a_plan_is_a_mapping_that_stays() -> None:
    plan = PrecisionPlan({"a": "int8", "b": "int4/fp32"})
    assert plan == PrecisionPlan({"b": "int4", "a": "int8"})
    assert hash(plan) == hash(PrecisionPlan({"b": "int4", "a": "int8"}))
    assert plan != PrecisionPlan({"a": "int8"})
    assert dict(plan.changed({"a": "fp16"})) == {"a": "fp16", "b": "int4"}
    with pytest.raises(TypeError):
        plan["a"] = "fp16"


def test_yaml_stands_wherever_a_recipe_does(tmp_path) -> None:
    path = tmp_path / "plan.yaml"
    plan = PrecisionPlan({"0": "fp16", "3.conv1": "int8", "3.conv2": "int4", "4": "int8"})
    plan = plan.changed({"9": "fp32"})
    plan.to_yaml(path, "onnxruntime_int8")
    assert PrecisionPlan.from_yaml(path) == plan
    recipe = lq.Recipe.parse(path)
    assert recipe == lq.Recipe.from_plan(plan, "onnxruntime_int8")
    assert recipe.residual == "both"
    for given in (path, str(path), yaml.safe_load(path.read_text()), recipe, recipe.to_dict()):
        assert PrecisionPlan.of(lq.quantize(digits_cnn(), given)) == plan
    module = lq.QuantModule("lq.models.digits_cnn", recipe=str(path))
    module.configure_model()
    assert PrecisionPlan.of(module.model) == plan
    restored = lq.quantize(digits_cnn(), recipe)
    assert PrecisionPlan.of(restored) == plan


def test_layers_of_a_sequence_may_be_numbers_in_yaml() -> None:
    recipe = lq.Recipe.from_dict(yaml.safe_load("plan: {0: fp16, 9: int8}"))
    assert recipe.layer_spec("0", nn.Linear(2, 2)).weights.format == "fp16"


@pytest.mark.parametrize(
    ("plan", "match"),
    [
        pytest.param({"0": "int9"}, "'int9'", id="format"),
        pytest.param({"0": "int8/fp23"}, "'fp32'", id="format of inputs"),
        pytest.param({"0": 8}, "layer '0' a format, but got 8", id="number"),
        pytest.param(["0"], "to map layers to formats", id="list"),
    ],
)
def test_what_is_no_plan(plan, match) -> None:
    with pytest.raises(ValueError, match=match):
        lq.Recipe.from_dict({"plan": plan})


def test_a_layer_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"'3.conv3' matches none; did you mean '3.conv"):
        lq.quantize(digits_cnn(), {"plan": {"3.conv3": "int8"}})


def test_a_recipe_is_no_plan(tmp_path) -> None:
    lq.Recipe().to_yaml(tmp_path / "recipe.yaml")
    with pytest.raises(ValueError, match="another recipe"):
        PrecisionPlan.from_yaml(tmp_path / "recipe.yaml")
    with pytest.raises(FileNotFoundError, match="no such file"):
        PrecisionPlan.from_yaml(tmp_path / "none.yaml")
    (tmp_path / "m.onnx").write_bytes(b"no graph")
    with pytest.raises(ValueError, match="to be an ONNX model"):
        PrecisionPlan.of(tmp_path / "m.onnx")


def test_float_weights_that_read_integers_are_float() -> None:
    """A layer without quantizers behind an addition that has one multiplies in float."""
    model, x = Sums(), torch.randn(4, 8)
    plan = PrecisionPlan({"a": "int8", "b": "int8", "c": "fp32"})
    lq.calibrate(lq.quantize(model, lq.Recipe.from_plan(plan)), [x], progress=False)
    graph = trace(model, x)
    product = next(node for node in graph.graph if node.name == "c")
    assert product.inputs[0].producer().op_type == "DequantizeLinear"
    assert PrecisionPlan(read_layers(graph)) == plan
