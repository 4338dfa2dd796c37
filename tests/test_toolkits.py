"""Layers that other toolkits have quantized: left alone and named, never half converted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lq
from lq.surgery import left_float, quantized_layers


class Int8Params(nn.Parameter):
    """What bitsandbytes keeps the weight of ``Linear8bitLt`` in."""


Int8Params.__module__ = "bitsandbytes.nn.modules"


class Doubling(nn.Linear):
    """Stands for a layer that quantizes its weight itself, from a float one, as it is called."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, (self.weight * 8).round() / 8, self.bias)


def layer_of(module: str, name: str) -> nn.Module:
    """A stand-in: a subclass of ``nn.Linear`` by the name and from the module of the real one."""
    return type(name, (Doubling,), {"__module__": module})(8, 8)


def eight_bits() -> nn.Module:
    layer = nn.Linear(8, 8)
    layer.weight = Int8Params(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize(
    ("layer", "toolkit"),
    [
        pytest.param(layer_of("optimum.quanto.nn.qlinear", "QLinear"), "quanto", id="quanto"),
        pytest.param(
            layer_of("torchao.quantization.qat.linear", "FakeQuantizedLinear"),
            "torchao",
            id="torchao",
        ),
        pytest.param(layer_of("bitsandbytes.nn.modules", "Linear4bit"), "bitsandbytes", id="bnb"),
        pytest.param(eight_bits(), "bitsandbytes", id="bnb-weight"),
        pytest.param(torch.ao.nn.qat.Linear, "torch.ao", id="torch.ao"),
        pytest.param(
            layer_of("pytorch_quantization.nn.modules.quant_linear", "QuantLinear"),
            "lq.interop.from_pytorch_quantization",
            id="pytorch-quantization",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_left_alone_and_named(layer: Any, toolkit: str, caplog) -> None:
    if isinstance(layer, type):
        qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        layer = layer(8, 8, qconfig=qconfig).eval()
        layer.apply(torch.ao.quantization.disable_observer)
    model = nn.Sequential(nn.Linear(8, 8), layer, nn.Linear(8, 2)).eval()
    x, kind = torch.randn(4, 8), type(layer)
    expected = copy.deepcopy(layer)(x)
    lq.quantize(model, "tensorrt_int8")
    assert type(model[1]) is kind
    assert torch.equal(model[1](x), expected)
    assert set(quantized_layers(model)) == {"0", "2"}
    assert toolkit in left_float(model)["1"]
    assert "1 (quantized by" in caplog.text
    lq.dequantize(model)
    assert type(model[1]) is kind


def test_nothing_else_to_quantize() -> None:
    layer = layer_of("optimum.quanto.nn.qlinear", "QLinear")
    with pytest.raises(ValueError, match="quantized by quanto"):
        lq.quantize(nn.Sequential(layer), "tensorrt_int8")


@pytest.mark.filterwarnings("ignore")
def test_modelopt() -> None:
    mtq = pytest.importorskip("modelopt.torch.quantization")
    model, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8)
    mtq.quantize(model, mtq.INT8_DEFAULT_CFG, lambda m: m(x))
    model.append(nn.Linear(8, 2))
    lq.quantize(model, "tensorrt_int8")
    assert set(quantized_layers(model)) == {"1"}
    assert "lq.interop.from_modelopt" in left_float(model)["0"]


@pytest.mark.filterwarnings("ignore")
def test_torchao() -> None:
    quantization = pytest.importorskip("torchao.quantization")
    model, x = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 4)).eval(), torch.randn(4, 32)
    config = quantization.Int8WeightOnlyConfig()
    quantization.quantize_(model, config, filter_fn=lambda m, name: name == "0")
    expected = model[0](x)
    lq.quantize(model, "tensorrt_int8")
    assert set(quantized_layers(model)) == {"1"}
    assert left_float(model) == {"0": "quantized by torchao"}
    assert torch.equal(model[0](x), expected)
