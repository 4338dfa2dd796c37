"""``nn.MultiheadAttention`` with quantized projections, against torch's own."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lq
from lq.functional import fake_quantize
from lq.surgery import is_calibrated, left_float, quantized_layers, quantizers

LENGTH, SOURCE = 5, 7
FLOAT_OUTPUT = {"rules": [{"name": "0.out_proj", "format": "skip"}]}


class Attention(nn.Sequential):
    """Passes on the arguments that a Sequential does not."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self[0](*args, **kwargs)


def make(**kwargs: Any) -> Attention:
    torch.manual_seed(0)
    return Attention(nn.MultiheadAttention(8, 2, **kwargs)).eval()


def inputs(batch_first: bool = False, batched: bool = True, cross: bool = False) -> list[Tensor]:
    torch.manual_seed(1)
    lengths = (LENGTH, SOURCE, SOURCE) if cross else (LENGTH,) * 3
    shapes = [(n, 8) if not batched else (3, n, 8) if batch_first else (n, 3, 8) for n in lengths]
    query, key, value = (torch.randn(shape) for shape in shapes)
    return [query, key, value] if cross else [query] * 3


def calibrated(model: nn.Module, x: list[Tensor], recipe: Any) -> nn.Module:
    lq.quantize(model, recipe)
    return lq.calibrate(model, [(*x, None)], progress=False)


def reference(model: nn.Module) -> nn.MultiheadAttention:
    """The float module with the quantized weight, to be called with quantized inputs."""
    attention = lq.dequantize(copy.deepcopy(model))[0]
    quantizer = model[0].weight_quantizer
    weight = fake_quantize(attention.in_proj_weight, quantizer.scale, -127, 127, 0)
    attention.in_proj_weight = nn.Parameter(weight.detach())
    return attention


CAUSAL = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)
PADDING = torch.arange(LENGTH)[None] >= torch.tensor([[5], [4], [2]])


@pytest.mark.parametrize(
    ("options", "layout", "kwargs"),
    [
        pytest.param({}, {}, {}, id="plain"),
        pytest.param({"bias": False}, {}, {}, id="no-bias"),
        pytest.param({"batch_first": True}, {"batch_first": True}, {}, id="batch-first"),
        pytest.param({}, {"batched": False}, {}, id="unbatched"),
        pytest.param({}, {"cross": True}, {}, id="cross"),
        pytest.param({}, {}, {"need_weights": False}, id="no-weights"),
        pytest.param({}, {}, {"average_attn_weights": False}, id="weights-per-head"),
        pytest.param({}, {}, {"attn_mask": CAUSAL}, id="boolean-mask"),
        pytest.param({}, {}, {"attn_mask": CAUSAL.float(), "need_weights": False}, id="added-mask"),
        pytest.param({}, {}, {"attn_mask": CAUSAL.expand(6, -1, -1)}, id="mask-per-head"),
        pytest.param({}, {}, {"key_padding_mask": PADDING}, id="padding"),
        pytest.param(
            {},
            {},
            {"key_padding_mask": PADDING, "attn_mask": CAUSAL, "need_weights": False},
            id="both-masks",
        ),
        pytest.param(
            {},
            {},
            {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
            id="causal",
        ),
    ],
)
def test_output_is_torchs_on_quantized_tensors(options: Any, layout: Any, kwargs: Any) -> None:
    x = inputs(**layout)
    model = calibrated(make(**options), x, FLOAT_OUTPUT)
    quantize = model[0].input_quantizer
    quantized = [quantize(x[0])] * 3 if x[0] is x[1] else [quantize(t) for t in x]

    output, weights = model(*x, **kwargs)

    expected, expected_weights = reference(model)(*quantized, **kwargs)
    torch.testing.assert_close(output, expected)
    if expected_weights is None:
        assert weights is None
    else:
        torch.testing.assert_close(weights, expected_weights)


def test_is_still_the_float_class() -> None:
    model = make()
    attention, names = model[0], [n for n, _ in model.named_parameters()]

    lq.quantize(model, "tensorrt_int8")

    assert model[0] is attention
    assert isinstance(attention, nn.MultiheadAttention)
    assert [n for n, _ in model.named_parameters()] == names
    assert list(quantized_layers(model)) == ["0", "0.out_proj"]
    assert attention.weight_quantizer.scale.shape == (24,)
    lq.dequantize(model)
    assert type(attention) is nn.MultiheadAttention
    assert type(attention.out_proj) is type(nn.MultiheadAttention(8, 2).out_proj)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_give_equal_outputs(clone: Any) -> None:
    x = inputs()
    model = calibrated(make(), x, "tensorrt_int8")

    assert torch.equal(clone(model)(*x)[0], model(*x)[0])


def test_trains() -> None:
    x = inputs()
    model = calibrated(make(dropout=0.5), x, "tensorrt_int8").train()

    model(*x)[0].square().sum().backward()

    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "weight" in n)


def test_a_causal_hint_needs_its_mask() -> None:
    x = inputs()
    with pytest.raises(RuntimeError, match="attn_mask"):
        calibrated(make(), x, "tensorrt_int8")(*x, is_causal=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param({"kdim": 4, "vdim": 4}, "another size", id="sizes"),
        pytest.param({"add_bias_kv": True}, "a key and a value of its own", id="bias-kv"),
        pytest.param({"add_zero_attn": True}, "a key and a value of its own", id="zero"),
    ],
)
def test_what_cannot_be_quantized_is_named_with_its_output_projection(
    options: Any, reason: str
) -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 2, **options), nn.Linear(2, 2)])

    lq.quantize(model, "tensorrt_int8")

    assert list(quantized_layers(model)) == ["1"]
    assert set(left_float(model)) == {"0", "0.out_proj"}
    assert reason in left_float(model)["0"]


def test_a_float_attention_has_a_float_output_projection() -> None:
    def quantized() -> nn.Module:
        model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
        return lq.quantize(model, {"rules": [{"name": "0", "format": "skip"}]})

    model = quantized()

    assert list(quantized_layers(model)) == ["1"]
    assert list(left_float(model)) == ["0.out_proj"]
    quantized().load_state_dict(model.state_dict())


@pytest.mark.parametrize("norm_first", [False, True])
def test_transformer_layers_run_the_quantized_attention(norm_first: bool) -> None:
    """``nn.TransformerEncoderLayer`` has a fused path in eval mode that calls no submodule."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = layer(x)

    lq.calibrate(lq.quantize(layer, "tensorrt_int8"), [x], progress=False)

    names = ["self_attn", "self_attn.out_proj", "linear1", "linear2"]
    assert list(quantized_layers(layer)) == names
    assert all(q.is_calibrated for q in quantizers(layer).values())
    with torch.no_grad():
        y = layer(x)
    assert not torch.allclose(y, expected, atol=1e-5)
    torch.testing.assert_close(y, expected, atol=0.1, rtol=0.1)


def test_exports_its_projections_as_integers(tmp_path: Path) -> None:
    import onnx

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x, need_weights=False)[0]

    torch.manual_seed(0)
    model, x = SelfAttention().eval(), torch.randn(2, 5, 16)
    lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)
    assert is_calibrated(model)

    report = lq.export_onnx(model, x, tmp_path / "m.onnx")

    assert report.max_code_difference <= 1
    stored = onnx.load(tmp_path / "m.onnx").graph.initializer
    integers = [t.dims for t in stored if t.data_type == onnx.TensorProto.INT8 and len(t.dims) == 2]
    assert sorted(map(sorted, integers)) == [[16, 16], [16, 48]]
