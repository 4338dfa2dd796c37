"""Ranges that follow or learn, against the papers' own formulas written with autograd and numpy."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.utils import parametrize

import lq
from lq.functional import fake_quantize
from lq.qat import freeze_scales, save_memory, set_bits
from lq.quantizer import Quantizer
from lq.spec import QuantSpec
from lq.tensor_spec import RANGES

UNSIGNED = QuantSpec("int4", signed=False, range="lsq")
LSQ = QuantSpec("int4", range="lsq")
LSQ_PLUS = QuantSpec("int8", range="lsq", symmetric=False)


def round_pass(x: Tensor) -> Tensor:
    return (x.round() - x).detach() + x


def clamped_codes(x: Tensor, low: int, high: int) -> Tensor:
    codes = x.detach().round()
    return torch.where((codes < low) | (codes > high), codes.clamp(low, high), round_pass(x))


def grad_scale(x: Tensor, factor: float) -> Tensor:
    return (x - x * factor).detach() + x * factor


def lsq_of_the_paper(v: Tensor, s: Tensor, low: int, high: int, features: int) -> Tensor:
    """Appendix B of Esser et al. 2020, line by line, but for which values count as clipped.

    There a value within half a step of the last code is, as it is clamped before it is rounded;
    here it is not, as for torch's own operators.
    """
    s = grad_scale(s, 1 / math.sqrt(features * high))
    return clamped_codes(v / s, low, high) * s


def pact_of_the_paper(x: Tensor, alpha: Tensor, levels: int) -> Tensor:
    """Equations 1 and 2 of Choi et al. 2018: clip to [0, alpha], then round linearly."""
    step = alpha.detach() / levels
    rounded = round_pass(x / step).clamp(min=0) * step
    return torch.where((x / step).round() > levels, alpha, rounded)


def lsq_plus_of_the_paper(x: Tensor, s: Tensor, beta: Tensor, high: int, features: int) -> Tensor:
    """Equation 3 of Bhalgat et al. 2020, the offset rounded to a code as engines hold it."""
    factor = 1 / math.sqrt(features * high)
    s = grad_scale(s, factor)
    beta = (beta / s).detach().round() * s.detach() + beta - beta.detach()
    return clamped_codes((x - beta) / s, 0, high) * s + beta


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=1e-5)


def learner(spec: QuantSpec, amax: float) -> Quantizer:
    quantizer = Quantizer(spec)
    quantizer.amax = torch.tensor(amax)
    return quantizer.train()


@pytest.mark.parametrize("spec", [LSQ, UNSIGNED], ids=["signed", "unsigned"])
def test_lsq_is_the_papers(spec: QuantSpec) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 10, 10, generator=generator)
    weights = torch.randn(x.shape, generator=generator)
    quantizer = learner(spec, 1.5)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    scale = quantizer.scale.detach().clone().requires_grad_()

    found = quantizer(ours)
    expected = lsq_of_the_paper(theirs, scale, spec.qmin, spec.qmax, x[0].numel())
    (found * weights).sum().backward()
    (expected * weights).sum().backward()

    torch.testing.assert_close(found, expected)
    close(ours.grad, theirs.grad)
    close(quantizer.scale.grad, scale.grad)


def test_lsq_of_weights_counts_the_weights_of_a_channel() -> None:
    spec = QuantSpec("int3", axis=0, narrow=True, range="lsq")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 6, 3, 3, generator=generator)
    slopes = torch.randn(weight.shape, generator=generator)
    quantizer = Quantizer(spec, 4)
    quantizer.amax = weight.abs().amax((1, 2, 3)) * 0.6
    scale = quantizer.scale.detach().clone().requires_grad_()

    (quantizer(weight) * slopes).sum().backward()
    broadcast = scale.view(4, 1, 1, 1)
    (lsq_of_the_paper(weight, broadcast, -3, 3, 54) * slopes).sum().backward()

    close(quantizer.scale.grad, scale.grad)


def test_pact_descends_as_the_paper_does() -> None:
    """A step of SGD moves amax as it moves the paper's alpha, weight decay included."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 50, generator=generator) * 2
    weights = torch.randn(x.shape, generator=generator)
    spec = QuantSpec("int4", signed=False, range="pact")
    quantizer, alpha = learner(spec, 1.5), torch.tensor(1.5, requires_grad=True)
    optimizers = [torch.optim.SGD([p], lr=0.01, weight_decay=0.1) for p in (quantizer.scale, alpha)]

    found, expected = quantizer(x), pact_of_the_paper(x, alpha, 15)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    for optimizer in optimizers:
        optimizer.step()

    torch.testing.assert_close(found, expected)
    assert alpha.item() != 1.5
    close(quantizer.amax, alpha.detach())


def test_lsq_plus_is_the_papers() -> None:
    generator = torch.Generator().manual_seed(0)
    x = nn.functional.silu(torch.randn(8, 100, generator=generator) * 2)
    weights = torch.randn(x.shape, generator=generator)
    quantizer = Quantizer(LSQ_PLUS)
    quantizer.set_bounds(torch.tensor(-0.2), torch.tensor(3.0))
    scale = quantizer.scale.detach().clone().requires_grad_()
    beta = quantizer.offset.detach().clone().requires_grad_()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()

    found = quantizer(ours)
    expected = lsq_plus_of_the_paper(theirs, scale, beta, 255, 100)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()

    torch.testing.assert_close(found, expected)
    assert quantizer(torch.zeros(3)).eq(0).all(), "padding must stay exactly 0"
    close(ours.grad, theirs.grad)
    close(quantizer.scale.grad, scale.grad)
    close(quantizer.offset.grad, beta.grad)


def test_lsq_plus_starts_from_both_ends_of_the_data() -> None:
    model = lq.quantize(
        nn.Sequential(nn.Linear(16, 4)),
        {"inputs": {"format": "int8", "range": "lsq", "symmetric": False}},
    )
    x = torch.linspace(-0.25, 4.75, 32).view(2, 16)

    lq.calibrate(model, [x], progress=False)

    quantizer = model[0].input_quantizer
    assert quantizer.offset.item() == pytest.approx(-0.25)
    assert quantizer.scale.item() == pytest.approx(5 / 255)
    assert float(quantizer.zero_point) == round(0.25 / (5 / 255))
    assert "uint8" in repr(quantizer)


def test_moving_average_is_numpys() -> None:
    quantizer = learner(QuantSpec("int8", range="moving_average"), 1.0)
    generator = torch.Generator().manual_seed(0)
    amax = 1.0
    for _ in range(20):
        x = torch.randn(4, 9, generator=generator)
        amax = 0.99 * amax + 0.01 * float(np.abs(x.numpy()).max())
        quantizer(x)
        assert float(quantizer.amax) == pytest.approx(amax, rel=1e-5)


def test_moving_average_rests_in_evaluation_and_when_frozen() -> None:
    quantizer = learner(QuantSpec("int8", range="moving_average"), 1.0)
    before = quantizer.scale.clone()

    quantizer.eval()(torch.full((3,), 50.0))
    assert torch.equal(quantizer.scale, before)
    freeze_scales(quantizer.train())
    quantizer(torch.full((3,), 50.0))
    assert torch.equal(quantizer.scale, before)


@pytest.mark.parametrize("kind", ["frozen", "lsq"])
def test_more_bits_for_now_are_those_of_that_format(kind: str) -> None:
    """int4 with 8 bits for now rounds as int8 of the same range does, and is saved as int4."""
    x = torch.randn(5, 7) * 2
    four, eight = (Quantizer(QuantSpec(f"int{bits}", range=kind)) for bits in (4, 8))
    four.amax = eight.amax = torch.tensor(1.4)
    saved = copy.deepcopy(four.state_dict())

    set_bits(four, 8)

    torch.testing.assert_close(four(x), eight(x))
    assert "8 bits for now" in repr(four)
    assert all(torch.equal(four.state_dict()[key], value) for key, value in saved.items())
    set_bits(four, 3)  # never fewer than its own
    torch.testing.assert_close(four(x), fake_quantize(x, four.scale, -8, 7))


@pytest.mark.parametrize("kind", ["lsq", "pact"])
@pytest.mark.parametrize("optimizer", ["weights", "inputs"])
def test_ranges_of_more_bits_for_now_learn_as_in_that_format(kind: str, optimizer: str) -> None:
    """A step of SGD moves the range of int4 with 8 bits for now as it moves that of int8."""
    torch.manual_seed(0)
    x, slopes = torch.randn(32, 32), torch.randn(32, 32)
    narrow = optimizer == "weights"
    specs = [QuantSpec(f"int{bits}", range=kind, narrow=narrow) for bits in (4, 8)]
    four, eight = (learner(spec, 1.4) for spec in specs)
    set_bits(four, 8)
    for quantizer in (four, eight):
        (quantizer(x) * slopes).sum().backward()
        torch.optim.SGD(quantizer.parameters(), 1e-3).step()

    assert abs(float(eight.amax) - 1.4) > 1e-6
    torch.testing.assert_close(four.amax, eight.amax, rtol=1e-6, atol=0)


def test_a_scale_below_zero_is_the_same_small_one_everywhere() -> None:
    quantizer = learner(QuantSpec("int8", range="lsq"), 1.0)
    with torch.no_grad():
        quantizer.scale.fill_(-0.5)
    x = torch.tensor([-1.0, 0.0, 1e-11, 1.0])

    step = float(quantizer.positive_scale)
    assert 0 < step < 1e-9
    assert torch.equal(quantizer(x), fake_quantize(x, torch.tensor(step), -128, 127))
    assert float(quantizer.amax) == pytest.approx(127 * step)
    assert quantizer.clipped(x).tolist() == [True, False, False, True]
    assert torch.equal(quantizer.grid_scale, quantizer.positive_scale)


def test_frozen_ranges_have_no_gradient() -> None:
    quantizer = Quantizer(LSQ_PLUS)
    quantizer.set_bounds(torch.tensor(-1.0), torch.tensor(1.0))
    freeze_scales(quantizer.train())
    x = torch.randn(9, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad is not None
    assert quantizer.scale.grad is None
    assert quantizer.offset.grad is None

    freeze_scales(quantizer, frozen=False)
    quantizer(x).sum().backward()
    assert quantizer.scale.grad is not None
    assert quantizer.offset.grad is not None


def test_a_forward_pass_done_again_moves_no_average() -> None:
    spec = {"format": "int8", "range": "moving_average"}
    plain = lq.quantize(
        nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), {"inputs": spec}
    )
    lq.calibrate(plain, [torch.randn(4, 6)], progress=False)
    again = copy.deepcopy(plain)
    x = torch.randn(4, 6, requires_grad=True)

    plain.train()(x).square().sum().backward()
    expected, x.grad = x.grad, None
    torch.utils.checkpoint.checkpoint(
        again.train(), x, use_reentrant=False
    ).square().sum().backward()

    assert torch.equal(x.grad, expected)
    assert torch.equal(again[0].input_quantizer.scale, plain[0].input_quantizer.scale)


class ChangesItsInput(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.mul_(2) if self.weight.requires_grad else input)


class Noisy(nn.Module):
    """A parametrization that gives another weight at every reading."""

    def forward(self, weight: Tensor) -> Tensor:
        return nn.functional.dropout(weight, 0.5)


def noisy() -> nn.Module:
    return parametrize.register_parametrization(nn.Linear(16, 16), "weight", Noisy())


@pytest.mark.parametrize(
    ("make", "recipe"),
    [
        pytest.param(
            lambda: nn.Linear(16, 16), {"weights": "int8", "inputs": "fp16"}, id="weights-only"
        ),
        pytest.param(lambda: ChangesItsInput(16, 16), "tensorrt_int8", id="changes-its-input"),
        pytest.param(noisy, "tensorrt_int8", id="random-weight"),
    ],
)
def test_saving_memory_makes_again_what_was_used(make, recipe) -> None:
    torch.manual_seed(0)
    plain = lq.quantize(nn.Sequential(make(), nn.Linear(16, 4)), recipe)
    x = torch.randn(8, 16)
    lq.calibrate(plain, [x.clone()], progress=False)
    saving = copy.deepcopy(plain)
    save_memory(saving)
    gradients = []
    for model in (plain.train(), saving.train()):
        torch.manual_seed(1)
        leaf = x.clone().requires_grad_()
        model(leaf * 1).square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in model.parameters())])

    for ours, theirs in zip(*gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_saving_memory_before_calibration() -> None:
    """Weights that pass as they are meet inputs that are rounded to 16 bits."""
    model = lq.quantize(nn.Sequential(nn.Linear(16, 16)), {"weights": "int8", "inputs": "fp16"})
    model[0].weight_quantizer.mode = lq.Mode.BYPASS
    gradients = []
    for saving in (False, True):
        save_memory(model, saving)
        x = torch.linspace(-1, 1, 32).view(2, 16).requires_grad_()
        model.train()(x).square().sum().backward()
        gradients.append(x.grad)
    assert gradients[0].isfinite().all()
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", RANGES)
def test_saving_memory_changes_no_gradient(kind: str) -> None:
    torch.manual_seed(0)
    spec = {"format": "int8", "range": kind}
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.Linear(196, 5)
    )
    plain = lq.quantize(net, {"weights": spec, "inputs": spec})
    x = torch.randn(4, 3, 8, 8)
    lq.calibrate(plain, [x * 0.7], progress=False)
    saving = copy.deepcopy(plain)
    save_memory(saving)
    for model in (plain.train(), saving.train()):
        model(x).square().sum().backward()

    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_saving_memory_notices_an_input_that_changed() -> None:
    model = lq.quantize(nn.Sequential(nn.Linear(16, 16)), {"inputs": "int8"})
    x = torch.randn(2, 16)
    lq.calibrate(model, [x], progress=False)
    save_memory(model)
    loss = model(x).square().sum()
    x.mul_(2)
    with pytest.raises(RuntimeError, match=r"'0.input_quantizer'.*changed in place"):
        loss.backward()


def test_saving_memory_saves_memory() -> None:
    """Of a chain of layers, the quantized copies are kept by one and not by the other."""
    spec = {"inputs": "int8", "weights": "int8"}
    held = {}
    for saving in (False, True):
        model = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)])
        lq.calibrate(lq.quantize(model, spec), [torch.ones(1, 8, 32, 32)], progress=False)
        save_memory(model, saving)
        held[saving] = _saved_elements(model.train(), torch.randn(1, 8, 32, 32))
    inputs = 4 * 8 * 32 * 32
    assert held[False] - held[True] >= inputs


def _saved_elements(model: nn.Module, x: Tensor) -> int:
    """Return how many elements, of storages apart, the backward pass keeps alive."""
    output = model(x)
    storages: dict[int, int] = {}
    seen, todo = set(), [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        todo += [below for below, _ in node.next_functions]
        saved = [getattr(node, n, None) for n in dir(node) if n.startswith("_raw_saved_")]
        tensors = [s for s in saved if s is not None]
        for raw in tensors:
            kept = getattr(raw, "data", None)
            if isinstance(kept, Tensor):
                storages[kept.untyped_storage().data_ptr()] = kept.numel()
    return sum(storages.values())


def silu_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.SiLU(), nn.Conv2d(16, 16, 3), nn.SiLU(), nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )  # fmt: skip


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_an_offset_is_exported_as_a_zero_point(target: str, tmp_path) -> None:
    recipe = {"inputs": {"format": "int8", "range": "lsq", "symmetric": False}}
    model = lq.quantize(silu_net(), recipe)
    batches = [torch.randn(8, 3, 8, 8) for _ in range(3)]
    lq.calibrate(model, batches, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for x in batches:  # so that offsets are not where calibration put them
        model.train()(x).square().mean().backward()
        optimizer.step()

    report = lq.export_onnx(model.eval(), batches[0], tmp_path / "m.onnx", target, batches)

    assert report.passed, report.summary()
    zero_points = {int(m.input_quantizer.zero_point) for m in model if hasattr(m, "layer_spec")}
    assert zero_points - {0, 128}, "some are not those of symmetric codes"


def test_targets_without_zero_points_refuse_by_name(tmp_path) -> None:
    recipe = {"inputs": {"format": "int8", "range": "lsq", "symmetric": False}}
    model = lq.quantize(silu_net(), recipe)
    lq.calibrate(model, [torch.randn(2, 3, 8, 8)], progress=False)

    with pytest.raises(ValueError, match=r"tensorrt cannot run layer '0'.*asymmetric"):
        lq.export_onnx(model, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx")


@pytest.mark.parametrize("preset", ["w4a4", "w3a3", "w2a2"])
def test_low_bit_presets_keep_the_ends_at_8_bits_and_are_refused_by_name(preset, tmp_path) -> None:
    model = lq.quantize(silu_net(), preset)
    lq.calibrate(model, [torch.randn(2, 3, 8, 8)], "mse", progress=False)

    for part in ("weights", "inputs"):
        formats = [getattr(model[i].layer_spec, part).format for i in (0, 2, 5)]
        assert formats == ["int8", f"int{preset[1]}", "int8"]
    with pytest.raises(ValueError, match="layer '2'"):
        lq.export_onnx(model, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()
