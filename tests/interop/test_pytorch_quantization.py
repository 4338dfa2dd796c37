"""Models and checkpoints of pytorch-quantization, by stand-ins that follow its published source."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lq
from lq.interop import from_pytorch_quantization, not_converted
from lq.surgery import quantized_layers, quantizers
from tests.interop.pytorch_quantization_like import QUANT, TensorQuantizer, collect

FLOAT = {name: getattr(nn, name) for name in QUANT}


class Block(nn.Module):
    """A residual block as their examples have it: a quantizer by hand on the shortcut."""

    def __init__(self, kinds: dict[str, Any], by_hand: bool) -> None:
        super().__init__()
        self.conv1 = kinds["Conv2d"](8, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = kinds["Conv2d"](8, 8, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.residual_quantizer = TensorQuantizer() if by_hand else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.residual_quantizer(x)
        return torch.relu(y)


class Net(nn.Module):
    def __init__(self, kinds: dict[str, Any], by_hand: bool = False) -> None:
        super().__init__()
        self.stem = kinds["Conv2d"](3, 8, 3)
        self.pool = kinds["MaxPool2d"](2)
        self.block = Block(kinds, by_hand)
        self.plain = Block(kinds, False)
        self.average = kinds["AdaptiveAvgPool2d"](2)
        self.fc = kinds["Linear"](32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.plain(self.block(self.pool(torch.relu(self.stem(x)))))
        return self.fc(self.average(x).flatten(1))


def theirs(**changes: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = Net(QUANT, by_hand=True), torch.randn(8, 3, 12, 12)
    for name, values in changes.items():
        for key, value in values.items():
            setattr(model.get_submodule(name), key, value)
    collect(model.eval(), x)
    return model, x


def floats() -> nn.Module:
    torch.manual_seed(1)  # other weights, which the checkpoint replaces
    return Net(FLOAT).eval()


def ranges(model: nn.Module) -> dict[str, Tensor]:
    return {n: m._amax for n, m in model.named_modules() if isinstance(m, TensorQuantizer)}


def assert_same_ranges(theirs: dict[str, Tensor], model: nn.Module) -> None:
    mine = dict(model.named_modules(remove_duplicate=False))
    for name, amax in theirs.items():
        owner, _, slot = name.rpartition(".")
        named = {"residual_quantizer": f"{owner}.x_quantizer"}
        found = mine[named.get(slot, f"{owner}.{slot.removeprefix('_')}")].amax
        torch.testing.assert_close(found, amax.reshape(found.shape), rtol=2e-7, atol=0)


@pytest.mark.parametrize("source", ["live", "state", "file", "ddp", "lightning"])
def test_a_residual_network(source, tmp_path) -> None:
    model, x = theirs()
    expected, amax = model(x).detach(), ranges(model)
    state = copy.deepcopy(model.state_dict())
    if source == "live":
        held = model.stem
        converted = from_pytorch_quantization(model)
        assert converted is model
        assert converted.stem is held
        assert not any(isinstance(m, TensorQuantizer) for m in model.modules())
        assert isinstance(model.block.residual_quantizer, nn.Identity)
    else:
        given: Any = state
        if source == "ddp":
            given = {f"module.{key}": value for key, value in state.items()}
        if source == "file":
            given = tmp_path / "m.pth"
            torch.save(state, given)
        if source == "lightning":
            given = tmp_path / "m.ckpt"
            torch.save({"state_dict": {f"model.{k}": v for k, v in state.items()}}, given)
        converted = from_pytorch_quantization(floats(), given)
    assert not_converted(converted) == {}
    assert set(quantized_layers(converted)) == {
        *("stem", "fc"),
        *(f"{block}.conv{i}" for block in ("block", "plain") for i in (1, 2)),
    }
    assert isinstance(converted.stem, nn.Conv2d)
    assert_same_ranges(amax, converted)
    # Rounding differs where a tie is one only before scales are inverted.
    assert (converted(x) - expected).abs().max() < 0.03 * expected.abs().max()
    # The other block's addition was float there, and is here.
    assert "plain.x_quantizer" not in dict(converted.named_modules(remove_duplicate=False))


def test_it_can_be_saved_loaded_and_exported(tmp_path) -> None:
    model, x = theirs()
    converted = from_pytorch_quantization(floats(), model.state_dict())
    again = lq.quantize(floats(), lq.state.recipe_of(converted))
    again.load_state_dict(converted.state_dict())
    assert torch.equal(again(x), converted(x))
    report = lq.export_onnx(converted, x, tmp_path / "m.onnx")
    assert report.max_code_difference <= 1


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kind", ["Conv", "ConvTranspose", "AvgPool", "AdaptiveAvgPool", "MaxPool"])
def test_every_kind_of_layer(kind: str, dims: int) -> None:
    torch.manual_seed(0)
    name, pools = f"{kind}{dims}d", "Pool" in kind
    args = (2,) if pools else (4, 6, 2)
    descriptor = {} if pools else {"quant_desc_weight": {"axis": 1 if "Trans" in kind else 0}}
    last = QUANT[f"Conv{dims}d"](4 if pools else 6, 3, 1)
    model = nn.Sequential(QUANT[name](*args, **descriptor), last).eval()
    x = torch.randn(2, 4, *[6] * dims)
    collect(model, x)
    expected, amax, state = model(x).detach(), ranges(model), model.state_dict()
    plain = FLOAT[f"Conv{dims}d"](4 if pools else 6, 3, 1)
    made = from_pytorch_quantization(nn.Sequential(FLOAT[name](*args), plain).eval(), state)
    live = from_pytorch_quantization(model)
    for converted in (made, live):
        assert not_converted(converted) == {}
        assert_same_ranges(amax, converted)
        step = converted[1].input_quantizer.scale * converted[1].weight.abs().sum()
        assert (converted(x) - expected).abs().max() <= step
    assert isinstance(live[0], FLOAT[name])
    assert torch.equal(made(x), live(x))


def test_equal_where_there_are_no_ties() -> None:
    """Powers of two divide and multiply exactly, so that outputs are equal to the last bit."""
    model = nn.Sequential(QUANT["Conv2d"](3, 4, 3)).eval()
    torch.manual_seed(0)
    model[0]._input_quantizer.register_buffer("_amax", torch.tensor(127.0 / 32))
    shape = (4, 1, 1, 1)
    model[0]._weight_quantizer.register_buffer("_amax", torch.full(shape, 127.0 / 512))
    x = torch.randn(2, 3, 6, 6)
    expected = model(x)
    converted = from_pytorch_quantization(
        nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), model.state_dict()
    )
    assert torch.equal(converted(x), expected)


def test_settings_of_a_live_model() -> None:
    model, x = theirs(
        **{
            "stem._weight_quantizer": {"_num_bits": 4, "_narrow_range": True},
            "block.conv2._input_quantizer": {"_unsigned": True},
            "plain.conv1._input_quantizer": {"_scale_amax": 0.5},
            "fc._input_quantizer": {"_disabled": True},
            "plain.conv2._input_quantizer": {"_disabled": True},
            "plain.conv2._weight_quantizer": {"_disabled": True},
        }
    )
    expected = model(x).detach()
    amax = model.plain.conv1._input_quantizer._amax * 0.5
    from_pytorch_quantization(model)
    assert model.stem.weight_quantizer.spec.format == "int4"
    assert model.block.conv2.input_quantizer.spec.qmax == 255
    assert model.plain.conv1.input_quantizer.amax == amax
    assert model.fc.layer_spec.inputs.format == "fp32"
    assert model.fc.layer_spec.weights.format == "int8"
    assert type(model.plain.conv2) is nn.Conv2d
    assert (model(x) - expected).abs().max() < 0.05 * expected.abs().max()


def test_settings_that_a_checkpoint_does_not_hold() -> None:
    changes = {
        "stem._weight_quantizer": {"_num_bits": 4},
        "block.conv2._input_quantizer": {"_unsigned": True},
    }
    model, _ = theirs(**changes)
    descriptors = {
        "stem._w*": {"num_bits": 4},
        "block.conv2._input_quantizer": {"unsigned": True},
        "fc._*": {"disabled": True},
    }
    converted = from_pytorch_quantization(floats(), model.state_dict(), descriptors)
    assert converted.stem.weight_quantizer.spec.format == "int4"
    assert converted.block.conv2.input_quantizer.spec.qmax == 255
    assert type(converted.fc) is nn.Linear
    with pytest.raises(ValueError, match="matches none"):
        from_pytorch_quantization(floats(), model.state_dict(), {"nothing": {"num_bits": 4}})
    with pytest.raises(ValueError, match="did you mean 'num_bits'"):
        from_pytorch_quantization(floats(), model.state_dict(), {"fc*": {"numbits": 4}})


@pytest.mark.parametrize("live", [False, True])
def test_learned_ranges(live: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(QUANT["Linear"](8, 4, quant_desc_input={"learn_amax": True}))
    x = torch.randn(16, 8)
    collect(model, x)
    expected = model(x).detach()
    clip = model[0]._input_quantizer.clip
    amax = torch.maximum(-clip.clip_value_min, clip.clip_value_max).item()
    made = nn.Sequential(nn.Linear(8, 4))
    made = from_pytorch_quantization(*((model,) if live else (made, model.state_dict())))
    quantizer = made[0].input_quantizer
    assert quantizer.spec.range == "pact"  # there, too, the range gets what is clipped
    assert quantizer.scale.requires_grad
    assert quantizer.amax.item() == pytest.approx(amax, rel=1e-6)
    assert "learned apart" in not_converted(made)["0._input_quantizer"]
    inside = ((x >= clip.clip_value_min) & (x <= clip.clip_value_max)).all(1)
    assert inside.sum() > 5
    torch.testing.assert_close(made(x)[inside], expected[inside], atol=1e-5, rtol=0)


def test_what_has_no_counterpart_is_named(caplog) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        QUANT["ConvTranspose2d"](4, 4, 2),  # ranges of input channels, their default
        QUANT["Conv2d"](4, 4, 1, quant_desc_input={"axis": 1}),
        QUANT["Conv2d"](4, 4, 1, quant_desc_weight={"num_bits": 16}),
        QUANT["Conv2d"](4, 4, 1),
        QUANT["Conv2d"](4, 4, 1),
    )
    collect(model, torch.randn(2, 4, 5, 5))
    state = model.state_dict()
    state["3._weight_quantizer._amax"] /= 2  # now some weights have the lowest code
    state["4._input_quantizer._amax"].fill_(torch.nan)
    state["5._aggregate_quantizer._amax"] = torch.tensor(1.0)
    plain = [nn.ConvTranspose2d(4, 4, 2), *(nn.Conv2d(4, 4, 1) for _ in range(4))]
    converted = from_pytorch_quantization(
        nn.Sequential(*plain), state, {"2._weight*": {"num_bits": 16}}
    )
    lost = not_converted(converted)
    assert "not those of output channels" in lost["0.weight_quantizer"]
    assert "its range was per channel" in lost["1.input_quantizer"]
    assert "16 bits" in lost["2._weight_quantizer"]
    assert "had the lowest code" in lost["3.weight_quantizer"]
    assert "it has no range" in lost["4.input_quantizer"]
    assert "5._aggregate_quantizer" in lost
    assert all(name in caplog.text for name in lost)
    weights = converted[0].weight.detach().abs().amax((0, 2, 3))
    torch.testing.assert_close(converted[0].weight_quantizer.amax, weights)
    assert type(converted[2]) is nn.Conv2d


def test_layers_without_a_range_are_named() -> None:
    model, _ = theirs()
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("fc._")}
    converted = from_pytorch_quantization(floats(), state)
    assert not_converted(converted) == {"fc": "no range in the checkpoint; left float"}


def test_a_hand_placed_quantizer_that_no_addition_reads() -> None:
    model, _ = theirs()
    state = model.state_dict()
    state["block.other_quantizer._amax"] = torch.tensor(1.0)
    lost = not_converted(from_pytorch_quantization(floats(), state))
    assert "block.other_quantizer" in lost


def test_ranges_that_a_tensor_has_twice() -> None:
    model, _ = theirs()
    state = model.state_dict()
    state["block.residual_quantizer._amax"] *= 2
    converted = from_pytorch_quantization(floats(), state)
    (reason,) = not_converted(converted).values()
    assert "share one range" in reason
    expected = state["block.residual_quantizer._amax"]
    torch.testing.assert_close(converted.block.conv1.input_quantizer.amax, expected)


def test_refusals(tmp_path) -> None:
    model, _ = theirs()
    with pytest.raises(FileNotFoundError, match="Expected a checkpoint"):
        from_pytorch_quantization(floats(), tmp_path / "none.pth")
    torch.save({"model": nn.Linear(1, 1)}, tmp_path / "pickled.pth")
    with pytest.raises(ValueError, match="pickled objects"):
        from_pytorch_quantization(floats(), tmp_path / "pickled.pth")
    with pytest.raises(ValueError, match="no key that ends in '_amax'"):
        from_pytorch_quantization(floats(), floats().state_dict())
    state = {k: v for k, v in model.state_dict().items() if k != "fc.weight"}
    with pytest.raises(ValueError, match="the weights to fit Net, but"):
        from_pytorch_quantization(floats(), state)
    with pytest.raises(ValueError, match="to have quantizers of pytorch-quantization"):
        from_pytorch_quantization(floats())
    assert quantizers(model) == {}


def small(**more: Tensor) -> dict[str, Tensor]:
    return {
        "weight": torch.eye(2),
        "bias": torch.zeros(2),
        "_input_quantizer._amax": torch.tensor(1.27),
        "_weight_quantizer._amax": torch.ones(2, 1),
        **more,
    }


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "_orig_mod."])
def test_what_wrappers_put_before_names(prefix: str) -> None:
    state = {f"{prefix}{name}": value for name, value in small().items()}
    model = from_pytorch_quantization(nn.Linear(2, 2), state)
    assert torch.equal(model.weight, torch.eye(2))
    assert not_converted(model) == {}


def test_weights_that_are_not_the_models_are_named() -> None:
    state = {f"model.{name}": value for name, value in small().items()}
    model = from_pytorch_quantization(nn.Linear(2, 2), {**state, "head.weight": torch.ones(3)})
    assert not_converted(model) == {"head.weight": "it is no weight of Linear"}


def test_a_refusal_leaves_the_weights_as_they_were() -> None:
    model = nn.Linear(2, 2)
    before = model.weight.clone()
    with pytest.raises(ValueError, match="'nope' matches none"):
        from_pytorch_quantization(model, small(), {"nope": {"disabled": True}})
    assert torch.equal(model.weight, before)


def test_ends_that_were_learned_by_channel_or_alone() -> None:
    ends = {
        "_weight_quantizer.clip.clip_value_min": torch.tensor([[-0.5], [-2.0]]),
        "_weight_quantizer.clip.clip_value_max": torch.ones(2, 1),
    }
    state = {k: v for k, v in small(**ends).items() if k != "_weight_quantizer._amax"}
    model = from_pytorch_quantization(nn.Linear(2, 2), state)
    assert model.weight_quantizer.amax.tolist() == [1.0, 2.0]
    assert "learned apart" in not_converted(model)["_weight_quantizer"]
    del state["_weight_quantizer.clip.clip_value_min"]
    model = from_pytorch_quantization(nn.Linear(2, 2), state)
    assert "its lower end is not in the checkpoint" in not_converted(model)["_weight_quantizer"]
