"""Quantizers on residual additions, and one quantizer for one tensor."""

from __future__ import annotations

import copy
import inspect
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torchvision.ops import SqueezeExcitation, StochasticDepth

import lq
from lq.models import digits_cnn
from lq.qat import copy_scales
from lq.quantizer import Quantizer
from lq.state import RECIPE
from lq.surgery import left_float, quantizers


class Block(nn.Module):
    """Two convolutions around a shortcut; how it is added is the subclass's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.conv2(self.bn(self.conv1(x)).relu())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        identity = x
        y = self.body(x)
        y += identity
        return F.relu_(y)


class TorchAdd(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.body(x), x)


class MethodAdd(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).add_(x)


class Functional(Block):
    def __init__(self) -> None:
        super().__init__()
        self.plus = nn.quantized.FloatFunctional()

    def forward(self, x: Tensor) -> Tensor:
        return self.plus.add(self.body(x), x)


class Dropped(Block):
    def __init__(self) -> None:
        super().__init__()
        self.drop = StochasticDepth(0.5, "row")

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.body(x)) + x


class KeywordArgument(Block):
    def forward(self, x: Tensor, gain: float | None = None) -> Tensor:
        y = x + self.body(x)
        return y if gain is None else y * gain


class OptionA(Block):
    """The shortcut of CIFAR ResNets: every value of it is one of the input, or zero."""

    def forward(self, x: Tensor) -> Tensor:
        y = F.avg_pool2d(self.body(x), 2)
        return y + F.pad(x[:, :2, ::2, ::2], (0, 0, 0, 0, 1, 1))


SHARING = [Block, InPlace, TorchAdd, MethodAdd, Functional, Dropped, KeywordArgument, OptionA]


class Down(nn.Module):
    """A block with a downsample."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 1)
        self.bn2 = nn.BatchNorm2d(8)
        self.downsample = nn.Sequential(nn.Conv2d(4, 8, 1, stride=2), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.downsample(x)).relu()


def calibrated(model: nn.Module, recipe: Any = "tensorrt_int8") -> tuple[nn.Module, Tensor]:
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return lq.calibrate(lq.quantize(model.eval(), recipe), [x], progress=False), x


def make(cls: type[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(cls())


def rounded(x: Tensor, quantizer: Quantizer) -> Tensor:
    """Quantize with torch's operator."""
    return torch.fake_quantize_per_tensor_affine(x, quantizer.scale.item(), 0, -128, 127)


@pytest.mark.parametrize("cls", SHARING)
def test_the_shortcut_shares_the_quantizer_of_the_first_layer(cls: type[nn.Module]) -> None:
    model, _ = calibrated(make(cls))

    assert model[0].x_quantizer is model[0].conv1.input_quantizer
    assert list(quantizers(model)) == [
        f"0.{layer}.{kind}_quantizer"
        for layer in ("conv1", "conv2")
        for kind in ("input", "weight")
    ]
    assert not left_float(model)


@pytest.mark.parametrize("cls", [Block, InPlace, TorchAdd, MethodAdd, Functional, Dropped])
def test_the_sum_is_that_of_the_quantized_shortcut(cls: type[nn.Module]) -> None:
    model, x = calibrated(make(cls))
    block = model[0]

    y = model(x)

    quantized = rounded(x, block.x_quantizer)
    expected = quantized + block.body(quantized)
    assert torch.equal(y, expected.relu() if cls is InPlace else expected)


@pytest.mark.parametrize("cls", [*SHARING, Down])
@pytest.mark.parametrize("recipe", ["tensorrt_int8", "onnxruntime_int8"])
def test_dequantize_gives_the_float_model_back(cls: type[nn.Module], recipe: str) -> None:
    model, x = make(cls).eval(), torch.randn(2, 4, 8, 8)
    expected, before = model(x), {n: (type(m), sorted(vars(m))) for n, m in model.named_modules()}

    lq.dequantize(calibrated(model, recipe)[0])

    assert torch.equal(model(x), expected)
    assert {n: (type(m), sorted(vars(m))) for n, m in model.named_modules()} == before


@pytest.mark.parametrize("cls", [*SHARING, Down])
def test_objects_classes_and_signature_are_kept(cls: type[nn.Module]) -> None:
    model = make(cls)
    modules, signature = dict(model.named_modules()), inspect.signature(model[0].forward)

    lq.quantize(model, "openvino_int8")

    now = dict(model.named_modules())
    assert all(now[name] is module for name, module in modules.items())
    assert all(isinstance(now[n], type(m)) for n, m in make(cls).named_modules())
    assert inspect.signature(model[0].forward) == signature


def test_a_downsample_has_its_own_quantizer() -> None:
    model, x = calibrated(make(Down))
    block = model[0]
    last = block.downsample[1]

    assert isinstance(last, nn.BatchNorm2d)
    assert len(block.downsample) == 2
    assert block.conv1.input_quantizer is block.downsample[0].input_quantizer
    assert not hasattr(block.bn2, "output_quantizer")
    seen = []
    last.output_quantizer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert torch.equal(block.downsample(x), rounded(seen[0], last.output_quantizer))


def test_both_inputs_where_the_target_wants_it() -> None:
    model, _ = calibrated(make(Down), "onnxruntime_int8")

    assert model[0].bn2.output_quantizer is not model[0].downsample[1].output_quantizer
    assert isinstance(
        calibrated(make(Block), "openvino_int8")[0][0].conv2.output_quantizer, Quantizer
    )


def test_no_residual_quantizers_on_demand() -> None:
    model, x = calibrated(make(Block), {"residual": None})

    assert not hasattr(model[0], "x_quantizer")
    assert torch.equal(model(x), x + model[0].body(x))


@pytest.mark.parametrize(
    ("rule", "format"),
    [
        pytest.param({"name": "0", "format": "skip"}, None, id="skip-by-name"),
        pytest.param({"type": "Block", "format": "fp16"}, None, id="fp16-by-type"),
        pytest.param({"name": "0", "inputs": "int4"}, "int4", id="other-format"),
        pytest.param({"name": "0.conv1", "format": "int4"}, "int8", id="other-layer"),
        pytest.param({"name": "0.conv1", "format": "fp16"}, None, id="follows-the-layer"),
    ],
)
def test_rules_reach_the_addition(rule: dict[str, str], format: str | None) -> None:
    model, _ = calibrated(make(Block), {"rules": [rule]})

    quantizer = getattr(model[0], "x_quantizer", None)
    assert (quantizer and quantizer.spec.format) == format
    if format is not None:
        assert quantizer is not model[0].conv1.input_quantizer


def test_quantizing_again_keeps_ranges_and_restores_what_a_rule_took() -> None:
    model, x = calibrated(make(Down))
    expected, modules = model(x), list(model.modules())

    lq.quantize(model, "tensorrt_int8")
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert torch.equal(model(x), expected)

    lq.quantize(model, {"rules": [{"name": "0", "format": "skip"}]})
    assert not hasattr(model[0].downsample[1], "output_quantizer")
    calibrated(lq.quantize(model, "tensorrt_int8"))
    assert torch.equal(model(x), expected)


def test_norms_that_were_replaced_are_quantized_again() -> None:
    model, x = calibrated(make(Down))
    expected = model(x)
    quantizer = model[0].downsample[1].output_quantizer

    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    lq.quantize(model, "tensorrt_int8")

    assert isinstance(model[0].downsample[1], nn.SyncBatchNorm)
    assert model[0].downsample[1].output_quantizer is quantizer
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    "clone",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: AveragedModel(m).module],
    ids=["deepcopy", "pickle", "AveragedModel"],
)
@pytest.mark.parametrize("recipe", ["tensorrt_int8", "onnxruntime_int8"])
def test_copies_share_among_themselves(clone: Any, recipe: str) -> None:
    model, x = calibrated(nn.Sequential(Block(), Down()), recipe)

    other = clone(model)

    assert torch.equal(other(x), model(x))
    assert other[0].x_quantizer is other[0].conv1.input_quantizer
    assert other[0].x_quantizer is not model[0].x_quantizer
    assert list(quantizers(other)) == list(quantizers(model))


class TestState:
    def test_a_shared_scale_is_saved_under_each_name_and_loads(self) -> None:
        model, x = calibrated(make(Down))
        state = model.state_dict()
        names = ["0.conv1.input_quantizer.scale", "0.downsample.0.input_quantizer.scale"]
        assert state[names[0]].equal(state[names[1]])

        other = lq.quantize(make(Down).eval(), "tensorrt_int8")
        other.load_state_dict(state)
        assert torch.equal(other(x), model(x))

    def test_one_of_its_names_is_enough(self) -> None:
        model, x = calibrated(make(Down))
        state = model.state_dict()
        del state["0.downsample.0.input_quantizer.scale"]  # as savers do that keep a tensor once

        other = lq.quantize(make(Down).eval(), "tensorrt_int8")
        other.load_state_dict(state)
        assert torch.equal(other(x), model(x))

    def test_without_any_of_its_names_it_is_missing(self) -> None:
        state = calibrated(make(Down))[0].state_dict()
        del state["0.downsample.1.output_quantizer.scale"]

        with pytest.raises(RuntimeError, match=r"1 missing \(0\.downsample\.1\.output_quantizer\)"):
            lq.quantize(make(Down), "tensorrt_int8").load_state_dict(state)

    def test_recipes_saved_before_there_were_residual_quantizers(self) -> None:
        model, x = calibrated(make(Block), {"residual": None})
        state = model.state_dict()
        old = lq.Recipe().to_json().replace(', "residual": "shortcut"', "")
        state[RECIPE] = torch.frombuffer(bytearray(old.encode()), dtype=torch.uint8)

        from lq.state import decode_recipe

        assert decode_recipe(state[RECIPE]) == lq.Recipe(residual=None)
        other = lq.quantize(make(Block).eval(), decode_recipe(state[RECIPE]))
        other.load_state_dict(state)
        assert torch.equal(other(x), model(x))

    def test_float_weights_load_strictly(self) -> None:
        model = lq.quantize(make(Down), "onnxruntime_int8")
        model.load_state_dict(make(Down).state_dict())
        assert not any(q.is_calibrated for q in quantizers(model).values())

    def test_moving_averages_get_the_ranges(self) -> None:
        model = lq.quantize(make(Down).eval(), "tensorrt_int8")
        average = AveragedModel(model)
        _, x = calibrated(model)
        copy_scales(model, average.module)
        assert torch.equal(average(x), model(x))


class TestLeft:
    class DataDependent(Block):
        def forward(self, x: Tensor) -> Tensor:
            return x + self.body(x) if x.sum() > 0 else self.body(x)

    class Pooled(Block):
        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) + F.avg_pool2d(x, 3, 1, 1)

    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    @pytest.mark.parametrize(
        ("block", "reason"),
        [
            pytest.param(DataDependent, "cannot be traced", id="untraceable"),
            pytest.param(Pooled, "neither an input nor the output", id="function"),
            pytest.param(
                lambda: TestLeft.Residual(nn.Conv2d(4, 4, 1)), "neither an input", id="sequential"
            ),
        ],
    )
    def test_is_named_and_runs(
        self, block: Any, reason: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        with caplog.at_level(logging.WARNING, "lq.surgery"):
            model, x = calibrated(nn.Sequential(block()))

        assert list(left_float(model)) == ["0"]
        assert reason in left_float(model)["0"]
        assert reason in caplog.text
        assert model(x).isfinite().all()
        assert not left_float(lq.quantize(model, {"residual": None}))
        skip = {"rules": [{"name": "0", "format": "skip"}]}
        assert not left_float(lq.quantize(model, skip))


def test_tracing_changes_nothing() -> None:
    class Counting(Block):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.last = x
            self.seen.add_(1)
            return x + self.body(x)

    model, state = nn.Sequential(Counting()), torch.get_rng_state()
    names = sorted(vars(model[0]))

    lq.quantize(model, "tensorrt_int8")
    lq.dequantize(model)

    assert model[0].calls == 0
    assert model[0].seen == 0
    assert sorted(vars(model[0])) == names
    assert torch.equal(torch.get_rng_state(), state)


class TestSharing:
    def test_layers_of_one_tensor_through_what_commutes(self) -> None:
        class Branches(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Conv2d(4, 4, 1)
                self.b = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU())
                self.c = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(4, 4, 1))
                self.d = nn.Conv2d(4, 4, 1)
                self.after = nn.Conv2d(12, 4, 1)

            def forward(self, x: Tensor) -> Tensor:
                y = torch.cat([self.a(x), self.b(x), self.c(x)], 1)
                return self.after(y) + self.d(x.relu())

        model, _ = calibrated(nn.Sequential(Branches()))
        branches = model[0]

        shared = branches.a.input_quantizer
        assert branches.b[0].input_quantizer is shared
        assert branches.c[1].input_quantizer is shared
        assert branches.d.input_quantizer is not shared
        assert branches.after.input_quantizer is not shared

    def test_a_layer_called_twice_joins_nothing(self) -> None:
        class Twice(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a, self.b, self.twice = (nn.Conv2d(4, 4, 1) for _ in range(3))

            def forward(self, x: Tensor) -> Tensor:
                y = self.twice(x)
                return torch.cat([self.a(x), self.b(self.twice(y))])

        model, _ = calibrated(nn.Sequential(Twice()))
        assert model[0].a.input_quantizer is not model[0].twice.input_quantizer

    def test_observed_once_listed_once(self) -> None:
        model, x = calibrated(make(Down))
        assert model[0].conv1.input_quantizer.amax.item() == pytest.approx(x.abs().max().item())
        assert "0.downsample.0.input_quantizer" not in quantizers(model)
        assert all(q.name == name for name, q in quantizers(model).items())

    @pytest.mark.parametrize(
        "op",
        [
            pytest.param(lambda x: F.max_pool2d(x, 2), id="max-pool"),
            pytest.param(lambda x: torch.cat([x, x.flip(0)], 1), id="concat"),
            pytest.param(lambda x: x.flatten(1), id="flatten"),
            pytest.param(lambda x: x.transpose(1, 2), id="transpose"),
            pytest.param(lambda x: F.relu(x), id="relu"),
            pytest.param(lambda x: F.pad(x, (1, 1)), id="pad"),
        ],
    )
    def test_quantizing_commutes_exactly(self, op: Any) -> None:
        quantizer, x = Quantizer(lq.QuantSpec()), torch.randn(2, 4, 8, 8)
        quantizer.amax = torch.tensor(2.0)

        assert torch.equal(quantizer(op(x)), op(quantizer(x)))
        assert torch.equal(quantizer(quantizer(x)), quantizer(x)), "one scale twice is exact"


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc(self.norm(x))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v)


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(x).flatten(1))


@pytest.mark.parametrize(
    ("make", "shape", "type", "added"),
    [
        pytest.param(Transformer, (2, 3, 8), "LayerNorm", ["norm.input"], id="norm"),
        pytest.param(Transformer, (2, 3, 8), "Transformer", ["x"], id="stream"),
        pytest.param(Attention, (2, 3, 8), "Attention", ["qkv.output"], id="attention"),
        pytest.param(Pooling, (2, 8, 4, 4), "AdaptiveAvgPool2d", ["pool.input"], id="pool"),
        pytest.param(
            lambda: SqueezeExcitation(8, 4),
            (2, 8, 4, 4),
            "SqueezeExcitation",
            ["input", "scale_activation.output"],
            id="squeeze-excitation",
        ),
    ],
)
def test_policy(make: Any, shape: Any, type: str, added: list[str]) -> None:
    """Float by default; quantized where a rule names the type."""
    model, x = make().eval(), torch.randn(shape)
    plain = set(quantizers(lq.quantize(model, "tensorrt_int8")))

    lq.quantize(model, {"rules": [{"type": type, "format": "int8"}]})
    lq.calibrate(model, [x], progress=False)

    assert set(quantizers(model)) - plain == {f"{name}_quantizer" for name in added}
    assert not left_float(model)
    assert model(x).isfinite().all()
    assert all(q.is_calibrated for q in quantizers(model).values())


def test_a_wrong_residual_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"shortcut, both or null.*did you mean 'both'"):
        lq.quantize(make(Block), {"residual": "bth"})


def test_residual_survives_yaml(tmp_path: Path) -> None:
    for residual in ("shortcut", "both", None):
        recipe = lq.Recipe(residual=residual)
        recipe.to_yaml(tmp_path / "recipe.yaml")
        assert lq.Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
        assert lq.Recipe.from_dict(recipe.to_dict()) == recipe
    assert lq.Recipe.from_dict({"inputs": "int8"}).residual == "shortcut"


@pytest.mark.parametrize("residual", ["shortcut", "both"])
def test_exports_what_is_trained(residual: str, tmp_path: Path) -> None:
    import onnx

    model, x = calibrated(nn.Sequential(Block(), Down()), lq.Recipe(residual=residual))

    report = lq.export_onnx(model, x, tmp_path / "m.onnx")

    assert report.max_code_difference <= 1
    graph = onnx.load(tmp_path / "m.onnx").graph
    made = {output: node for node in graph.node for output in node.output}
    for add in [node for node in graph.node if node.op_type == "Add"]:
        kinds = [made[i].op_type for i in add.input]
        assert kinds.count("DequantizeLinear") == (2 if residual == "both" else 1)


def test_compiles_and_trains() -> None:
    model, x = calibrated(nn.Sequential(Block(), Down()))
    torch.compiler.reset()

    compiled = torch.compile(model, fullgraph=True, backend="eager")

    assert torch.equal(compiled(x), model(x))
    model.train()(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("residual", ["shortcut", "both"])
@pytest.mark.parametrize("format", ["fp32", "fp16"])
def test_additions_of_float_blocks_are_float(residual: str, format: str) -> None:
    """Also where BatchNorm stands between the float layer and the addition."""
    rules = [{"name": name, "format": format} for name in ("0", "3.conv1", "3.conv2", "4")]
    model = lq.quantize(digits_cnn(), {"residual": residual, "rules": rules})
    scaled = {n for n, q in lq.surgery.quantizers(model).items() if q.spec.needs_scale}
    assert scaled == {"9.input_quantizer", "9.weight_quantizer"}


def test_maximum_pooling_that_a_rule_names_shares_with_the_layer_behind() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Conv2d(4, 4, 1))
    lq.quantize(model, {"rules": [{"type": "MaxPool2d", "format": "int8"}]})
    assert model[1].input_quantizer is model[2].input_quantizer
    assert not hasattr(lq.quantize(model, "tensorrt_int8")[1], "input_quantizer")
