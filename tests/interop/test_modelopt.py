"""Models of the real nvidia-modelopt, there and back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

import lq
from lq.interop import from_modelopt, not_converted, to_modelopt
from lq.surgery import quantized_layers, quantizers

mtq = pytest.importorskip("modelopt.torch.quantization")
mto = pytest.importorskip("modelopt.torch.opt")
pytestmark = pytest.mark.filterwarnings("ignore")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.bn = nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn(self.conv(x)))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        Block(),
        nn.ConvTranspose2d(16, 8, 2, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 5),
    ).eval()


def images() -> Tensor:
    return torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def config(weights: dict[str, Any], inputs: dict[str, Any]) -> dict[str, Any]:
    entries = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": weights},
        {"quantizer_name": "*input_quantizer", "cfg": inputs},
        {"parent_class": "nn.BatchNorm2d", "quantizer_name": "*", "enable": False},
    ]
    return {"quant_cfg": entries, "algorithm": "max"}


FLOAT8 = {"num_bits": (4, 3)}
CONFIGS = {
    "int8": config({"num_bits": 8, "axis": 0}, {"num_bits": 8}),
    "int8-per-tensor": config({"num_bits": 8}, {"num_bits": 8}),
    "int4-weights": config({"num_bits": 4, "axis": 0}, {"num_bits": 8, "narrow_range": True}),
    "weights-alone": config({"num_bits": 8, "axis": 0}, {"enable": False}),
    "fp8": config(FLOAT8, FLOAT8),
    "fp8-per-channel": config({**FLOAT8, "axis": 0}, FLOAT8),
}


def quantized(name: str, model: nn.Module | None = None) -> nn.Module:
    model = net() if model is None else model
    x = images()
    made = copy.deepcopy(CONFIGS[name])
    # Their default for transposed convolutions are input channels, which no engine has.
    made["quant_cfg"].append(
        {"quantizer_name": "4.weight_quantizer", "cfg": {"num_bits": 8, "axis": 1}}
        if "axis" in made["quant_cfg"][1]["cfg"] and name != "fp8-per-channel"
        else {"quantizer_name": "4.*", "enable": False}
    )
    return mtq.quantize(model, made, lambda m: m(x))


def enabled(model: nn.Module) -> dict[str, Any]:
    quantizer = mtq.nn.TensorQuantizer
    return {n: q for n, q in model.named_modules() if isinstance(q, quantizer) and q.is_enabled}


def assert_equal_but_for_ties(theirs: Any, mine: Any, x: Tensor, narrow: bool) -> None:
    expected, actual = theirs(x), mine(x)
    if mine.spec.format == "fp8_e4m3":
        torch.testing.assert_close(actual, expected, rtol=0.13, atol=1e-9)  # a step of three bits
        assert (~actual.isclose(expected, rtol=1e-5, atol=1e-9)).float().mean() < 2e-3
        return
    shape = [-1 if i == mine.spec.axis else 1 for i in range(x.dim())] if mine.spec.axis else []
    scale = mine.scale.reshape(shape) if mine.spec.axis else mine.scale
    if mine.spec.axis == 0:
        scale = mine.scale.reshape([-1] + [1] * (x.dim() - 1))
    position = (x / scale) % 1
    tie = (position - 0.5).abs() < 1e-3
    if narrow:
        tie |= x / scale < -mine.spec.qmax - 0.4
    torch.testing.assert_close(actual[~tie], expected[~tie], rtol=1e-6, atol=1e-7)
    assert ((actual - expected).abs() / scale).max() < 1.01


@pytest.mark.parametrize("name", CONFIGS)
def test_brought_along(name: str) -> None:
    model, x = quantized(name), images()
    kept, theirs = copy.deepcopy(model), enabled(copy.deepcopy(model))
    expected = model(x).detach()
    held = model[0]

    assert from_modelopt(model) is model

    assert model[0] is held
    assert not enabled(model)
    assert isinstance(model[0], nn.Conv2d)
    assert not_converted(model) == {}
    mine = dict(model.named_modules(remove_duplicate=False))
    quantizer: Any
    for full, quantizer in theirs.items():
        amax = mine[full].amax
        torch.testing.assert_close(amax, quantizer.amax.reshape(amax.shape), rtol=2e-7, atol=0)
        owner = full.rpartition(".")[0]
        is_weight = full.endswith("weight_quantizer")
        value = kept.get_submodule(owner).weight.detach() if is_weight else torch.randn(1000) * 3
        assert_equal_but_for_ties(quantizer, mine[full], value, narrow=is_weight)
    assert (model(x) - expected).abs().max() < 0.05 * expected.abs().max()
    assert quantized_layers(model)


@pytest.mark.parametrize("name", CONFIGS)
def test_there_and_back(name: str) -> None:
    model = quantized(name)
    theirs = {n: q.amax.clone() for n, q in enabled(model).items()}
    from_modelopt(model)
    scales = {n: q.scale.clone() for n, q in quantizers(model).items() if q.scale is not None}
    x = images()
    expected = model(x)

    assert to_modelopt(model) is model

    again = enabled(model)
    shared = {"3.conv.input_quantizer"}  # one with that of the pooling before it, here
    assert again.keys() | shared >= theirs.keys()
    for full, amax in again.items():
        assert amax.amax.shape == theirs[full].shape
        torch.testing.assert_close(amax.amax, theirs[full], rtol=1.2e-7, atol=0)
    from_modelopt(model)
    back = {n: q.scale for n, q in quantizers(model).items() if q.scale is not None}
    assert back.keys() == scales.keys()
    assert all(torch.equal(back[n], scales[n]) for n in scales)
    assert torch.equal(model(x), expected)


def test_ours_there_and_back() -> None:
    model, x = lq.quantize(net(), {"residual": None}), images()
    lq.calibrate(model, [x], progress=False)
    expected, state = model(x), copy.deepcopy(model.state_dict())
    to_modelopt(model)
    assert torch.allclose(model(x), expected, atol=0.05 * float(expected.abs().max()))
    from_modelopt(model)
    now = model.state_dict()
    assert all(torch.equal(now[key], value) for key, value in state.items() if key != "lq_recipe")
    assert torch.equal(model(x), expected)


def test_saved_state(tmp_path) -> None:
    model, x = quantized("int8"), images()
    mto.save(model, tmp_path / "m.pth")
    expected = from_modelopt(model)(x)
    loaded = from_modelopt(net(), tmp_path / "m.pth")
    assert torch.equal(loaded(x), expected)
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="to be what modelopt"):
        from_modelopt(net(), tmp_path / "other.pth")


class Lit(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_through_a_lightning_checkpoint(name: str, tmp_path: Path) -> None:
    module, x = Lit(), images()
    from_modelopt(quantized(name, module.net))
    expected = module.net(x)
    trainer = L.Trainer(logger=False, enable_checkpointing=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    loaded = lq.load_from_checkpoint(Lit, tmp_path / "m.ckpt")
    assert torch.equal(loaded.net.eval()(x), expected)
    back = to_modelopt(loaded.net)
    assert torch.equal(from_modelopt(back)(x), expected)


def test_exports(tmp_path) -> None:
    model, x = quantized("int8"), images()
    from_modelopt(model)
    report = lq.export_onnx(model, x, tmp_path / "m.onnx")
    assert report.max_code_difference <= 1
    assert set(lq.interop.read_onnx(tmp_path / "m.onnx").plan.values()) == {"int8"}


def test_a_mix_of_formats_of_auto_quantize() -> None:
    model, x = (
        nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32), nn.Linear(32, 4)),
        None,
    )
    x = torch.randn(16, 32)
    model, _ = mtq.auto_quantize(
        model,
        constraints={"effective_bits": 10.0},
        quantization_formats=[mtq.INT8_DEFAULT_CFG, mtq.FP8_DEFAULT_CFG],
        data_loader=[x],
        forward_step=lambda m, batch: m(batch),
        loss_func=lambda output, batch: output.square().mean(),
        verbose=False,
    )
    expected = model(x)
    formats = {n.rpartition(".")[0]: q.num_bits for n, q in enabled(model).items()}
    from_modelopt(model)
    plan = {8: "int8", (4, 3): "fp8_e4m3"}
    for name, layer in quantized_layers(model).items():
        assert layer.layer_spec.weights.format == plan[formats[name]]
    assert (model(x) - expected).abs().max() < 0.1 * expected.abs().max()


def test_what_has_no_counterpart_is_named(caplog) -> None:
    made = copy.deepcopy(CONFIGS["int8"])
    made["quant_cfg"] += [
        {"quantizer_name": "0.weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 3}}},
        {"quantizer_name": "8.output_quantizer", "cfg": {"num_bits": 8}},
        {"quantizer_name": "3.bn.input_quantizer", "cfg": {"num_bits": 8}},
        {"quantizer_name": "3.conv.input_quantizer", "cfg": {"num_bits": 12}},
    ]
    model, x = net(), images()
    mtq.quantize(model, made, lambda m: m(x))
    from_modelopt(model)
    lost = not_converted(model)
    assert "a range for every block" in lost["0.weight_quantizer"]
    assert "inputs of BatchNorm2d" in lost["3.bn.input_quantizer"]
    assert "by its readers" in lost["8.output_quantizer"]
    assert "12 bits" in lost["3.conv.input_quantizer"]
    assert "not those of output channels" in lost["4.weight_quantizer"]
    assert all(name in caplog.text for name in lost)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(16), Attention()
        self.norm2 = nn.LayerNorm(16)
        self.fc1, self.fc2 = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, width).unbind(2)
        return self.proj((q @ k.transpose(1, 2) / 4).softmax(-1) @ v)


def smoothed(*apart: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Transformer().eval(), torch.randn(4, 7, 16) * torch.logspace(-1, 1, 16)
    made = copy.deepcopy(mtq.INT8_SMOOTHQUANT_CFG)
    made["quant_cfg"] += [{"quantizer_name": f"*{name}*", "enable": False} for name in apart]
    return mtq.quantize(model, made, lambda m: m(x)), x


def test_smoothing_goes_into_the_normalization_before(tmp_path) -> None:
    model, x = smoothed("proj", "fc2")
    factors = model.fc1.input_quantizer.pre_quant_scale.clone()
    norm, amax = model.norm2.weight.detach().clone(), model.fc1.input_quantizer.amax.clone()
    expected = model(x)
    from_modelopt(model)
    assert not_converted(model) == {}
    assert factors.std() > 0
    assert torch.equal(model.norm2.weight, norm * factors)
    torch.testing.assert_close(model.fc1.input_quantizer.amax, amax.squeeze(), rtol=2e-7, atol=0)
    assert (model(x) - expected).abs().max() < 0.01 * expected.abs().max()
    assert lq.export_onnx(model, x, tmp_path / "m.onnx").max_code_difference <= 1


def test_smoothing_that_no_normalization_can_do_is_refused() -> None:
    model, x = smoothed("proj")
    expected = model(x)
    with pytest.raises(ValueError, match="Expected 'fc2' to quantize its input as it is"):
        from_modelopt(model)
    assert torch.equal(model(x), expected)


def test_refusals() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4))
    with pytest.raises(ValueError, match="quantized by nvidia-modelopt, but it has no"):
        from_modelopt(model)
    with pytest.raises(ValueError, match="quantized by lq, but found no"):
        to_modelopt(model)
    x = torch.randn(8, 16)
    mtq.quantize(model, mtq.INT8_SMOOTHQUANT_CFG, lambda m: m(x))
    with pytest.raises(ValueError, match="each channel is multiplied"):
        from_modelopt(model)
    with pytest.raises(
        ValueError, match=r"no counterpart of '3.x_quantizer': it is on an addition"
    ):
        to_modelopt(lq.quantize(net(), "tensorrt_int8"))
    with pytest.raises(ValueError, match="it is fp16"):
        to_modelopt(lq.quantize(nn.Linear(4, 4), {"weights": "fp16", "inputs": "fp16"}))


def linears(inputs: dict[str, Any]) -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8)).eval()
    x = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    weights = {"num_bits": 8, "axis": 0}
    return mtq.quantize(model, config(weights, inputs), lambda net: net(x))


def test_a_bias_of_a_quantizer_is_named() -> None:
    bias = {-1: None, "type": "static", "method": "mean"}
    model = from_modelopt(linears({"num_bits": 8, "bias": bias}))
    assert "a bias is taken" in not_converted(model)["0.input_quantizer"]


def test_a_backend_of_a_quantizer_is_named() -> None:
    from modelopt.torch.quantization.nn.modules import tensor_quantizer

    tensor_quantizer.register_quant_backend("mine", lambda x, quantizer: x.round())
    try:
        model = from_modelopt(linears({"num_bits": 8, "backend": "mine"}))
    finally:
        tensor_quantizer.unregister_quant_backend("mine")
    assert "a backend of its own, 'mine'" in not_converted(model)["0.input_quantizer"]


def test_ranges_of_inputs_by_channel_become_the_largest_and_are_named() -> None:
    live = linears({"num_bits": 8, "axis": -1})
    amax = live[0].input_quantizer.amax.max().clone()
    model = from_modelopt(live)
    assert torch.equal(model[0].input_quantizer.amax, amax)
    assert "its range was per channel" in not_converted(model)["0.input_quantizer"]


def test_what_was_switched_off_stays_off() -> None:
    live, x = linears({"num_bits": 8}), torch.randn(4, 16)
    live[2].input_quantizer.disable_quant()
    expected = live(x)
    model = from_modelopt(live)
    torch.testing.assert_close(model(x), expected)
    assert not hasattr(model[2], "input_quantizer") or model[2].input_quantizer.scale is None


def test_a_quantizer_that_is_bypassed_is_not_enabled_there() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 16)).eval(), torch.randn(32, 16)
    lq.calibrate(lq.quantize(model, {"residual": None}), [x], progress=False)
    model[0].input_quantizer.mode = lq.Mode.BYPASS
    expected = model(x)
    torch.testing.assert_close(to_modelopt(model)(x), expected)
