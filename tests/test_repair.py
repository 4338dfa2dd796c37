import copy
import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import lq
from lq.models import digits_cnn
from lq.quantizer import Mode
from lq.repairs import correct_biases, layer_sqnr, reestimate_batchnorm
from lq.repairs.bias import channel_mean
from lq.surgery import quantized_layers


def calibrated(recipe: object = "tensorrt_int8", seed: int = 0) -> tuple[nn.Module, list]:
    torch.manual_seed(seed)
    data = [torch.randn(32, 1, 8, 8) + 1 for _ in range(4)]
    model = digits_cnn()
    model.train()
    for _ in range(50):
        model(data[0])  # statistics as after training
    lq.quantize(model.eval(), recipe)
    lq.calibrate(model, data[:2], progress=False)
    return model, data


def means(model: nn.Module, x: torch.Tensor, names: list[str]) -> dict[str, torch.Tensor]:
    """Mean of each channel after each layer's BatchNorm, or after the layer."""
    found: dict[str, torch.Tensor] = {}
    modules = dict(model.named_modules())
    handles = [
        modules[n].register_forward_hook(
            lambda m, _a, y, n=n: (
                found.update({n: channel_mean(nn.Conv2d(1, 1, 1), y)})
                if y.dim() == 4
                else found.update({n: y.mean(0)})
            )
        )
        for n in names
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return found


FEW_BITS = lq.Recipe.from_dict({"weights": "int3", "inputs": "int8"})


def test_biases_give_every_channel_its_float_mean() -> None:
    model, data = calibrated(FEW_BITS)
    reference = copy.deepcopy(lq.dequantize(copy.deepcopy(model)))
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)]
    names = [*norms, list(quantized_layers(model))[-1]]
    wanted, before = means(reference, data[0], names), means(model, data[0], names)
    assert correct_biases(model, data[:1], progress=False) == {}
    after = means(model, data[0], names)
    for name in names:
        assert (before[name] - wanted[name]).abs().max() > 1e-3
        torch.testing.assert_close(after[name], wanted[name], atol=1e-4, rtol=1e-4)


def test_bias_correction_is_the_layerwise_definition() -> None:
    """On one batch: each layer in turn, corrected by the error that is left when it is reached."""
    model, data = calibrated(FEW_BITS)
    brute, x = copy.deepcopy(model), data[0]
    reference = lq.dequantize(copy.deepcopy(model))
    correct_biases(model, [x], progress=False)
    layers = list(quantized_layers(brute))
    followers = dict(
        itertools.pairwise(n for n, m in brute.named_modules() if "quantizer" not in n)
    )
    modules = dict(brute.named_modules())
    for name in layers:
        error = means(brute, x, [name])[name] - means(reference, x, [name])[name]
        if modules[name].bias is not None:
            modules[name].bias.data -= error
        else:
            modules[followers[name]].running_mean += error
    for key, value in brute.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, atol=1e-5, rtol=1e-4)


def test_a_layer_without_bias_and_norm_is_named() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.ReLU(), nn.Conv2d(2, 2, 1))
    lq.quantize(model, "tensorrt_int8")
    data = [torch.randn(4, 1, 4, 4)]
    lq.calibrate(model, data, progress=False)
    weight = model[0].weight.clone()
    assert correct_biases(model, data, progress=False) == {
        "0": "it has no bias, and no BatchNorm follows"
    }
    assert torch.equal(model[0].weight, weight)


def test_batchnorm_statistics_are_those_under_quantization() -> None:
    model, data = calibrated(FEW_BITS)
    first = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    given: list[torch.Tensor] = []
    handle = first.register_forward_pre_hook(lambda _m, args: given.append(args[0].clone()))
    training = [m.training for m in model.modules()]
    count, momentum = first.num_batches_tracked.clone(), first.momentum
    reestimate_batchnorm(model, data[:2], progress=False)
    handle.remove()
    mean = torch.stack([x.mean((0, 2, 3)) for x in given]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in given]).mean(0)
    torch.testing.assert_close(first.running_mean, mean)
    torch.testing.assert_close(first.running_var, variance)
    assert (first.num_batches_tracked, first.momentum) == (count, momentum)
    assert [m.training for m in model.modules()] == training


def test_batchnorm_is_as_before_when_a_batch_fails() -> None:
    model, data = calibrated()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="channels"):
        reestimate_batchnorm(model, [data[0], torch.randn(4, 3, 8, 8)], progress=False)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_blame_is_one_layer_at_a_time() -> None:
    model, data = calibrated()
    found = layer_sqnr(model, data[0], progress=False)
    assert list(found.values()) == sorted(found.values())
    reference = lq.dequantize(copy.deepcopy(model))
    for name, layer in quantized_layers(copy.deepcopy(model)).items():
        alone = copy.deepcopy(model)
        for other, module in quantized_layers(alone).items():
            if other != name:
                module.input_quantizer.mode = module.weight_quantizer.mode = Mode.BYPASS
        with torch.no_grad():
            wanted = lq.functional.sqnr_db(reference(data[0]), alone(data[0]))
        assert found[name] == pytest.approx(wanted), layer


def test_repair_keeps_what_helps_and_undoes_the_rest() -> None:
    model, data = calibrated(FEW_BITS)
    modules, keys = list(model.modules()), list(model.state_dict())
    report = lq.repair(model, data[:2], data[2:], progress=False)
    assert [step.method for step in report.steps] == ["equalize", "batchnorm", "bias"]
    for step, following in itertools.pairwise(report.steps):
        assert following.before == (step.after if step.kept else step.before)
    for step in report.steps:
        assert step.kept is (step.after.sqnr_db > step.before.sqnr_db)
    assert any(step.kept for step in report.steps)
    assert list(model.modules()) == modules
    assert list(model.state_dict()) == keys
    assert "kept" in str(report)


def test_a_repair_that_hurts_is_undone_to_the_bit() -> None:
    model, data = calibrated()
    before = copy.deepcopy(model.state_dict())
    opposite = [-x for x in data[:2]]  # statistics of other data than it is judged by
    report = lq.repair(model, opposite, data[2:], methods=["batchnorm"], progress=False)
    assert not report.steps[0].kept
    assert "undone" in str(report)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_repair_is_deterministic() -> None:
    states = []
    for _ in range(2):
        model, data = calibrated(FEW_BITS)
        lq.repair(model, data[:2], data[2:], progress=False)
        states.append(model.state_dict())
    assert all(torch.equal(states[0][k], v) for k, v in states[1].items())


def test_errors() -> None:
    model, data = calibrated()
    with pytest.raises(ValueError, match="did you mean 'bias'"):
        lq.repair(model, data, data, methods=["bia"], progress=False)
    with pytest.raises(ValueError, match=r"pass list\(batches\)"):
        lq.repair(model, iter(data), data, progress=False)
    with pytest.raises(ValueError, match="at least one batch"):
        lq.repair(model, data, [], progress=False)
    with pytest.raises(ValueError, match=r"lq\.quantize"):
        lq.repair(digits_cnn(), data, data, progress=False)
    with pytest.raises(RuntimeError, match=r"lq\.calibrate"):
        lq.repair(lq.quantize(digits_cnn(), "tensorrt_int8"), data, data, progress=False)
    linear = lq.quantize(nn.Sequential(nn.Linear(2, 2)), "tensorrt_int8")
    lq.calibrate(linear, [torch.ones(1, 2)], progress=False)
    with pytest.raises(ValueError, match="BatchNorm"):
        reestimate_batchnorm(linear, [torch.ones(1, 2)], progress=False)


def test_bias_correction_on_real_weights(shared_data: Path, monkeypatch) -> None:
    monkeypatch.setenv("LQ_DATA", str(shared_data))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    sys.modules.pop("shared", None)
    from shared import CASES, batches

    case = CASES["mobilenet_v2_cifar"]
    model = lq.quantize(case.model(), "tensorrt_int8")
    images = list(batches(case.data("train", 48), 16))
    lq.calibrate(model, images[:2], progress=False)
    report = lq.repair(model, images[:2], images[2:], methods=["bias"], progress=False)
    (step,) = report.steps
    assert step.after.sqnr_db > step.before.sqnr_db + 4
    assert next(iter(report.layers)) == "features.1.conv.0.0"


class InMapping(nn.Module):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.net(image)}


def test_models_that_return_mappings_are_repaired_alike() -> None:
    repaired, steps = [], []
    for wrap in (False, True):
        model, data = calibrated(FEW_BITS)
        lq.dequantize(model)
        model = InMapping(model).eval() if wrap else model
        lq.calibrate(lq.quantize(model, FEW_BITS), data[:2], progress=False)
        report = lq.repair(model, data[:2], data[2:], progress=False)
        repaired.append((model.net if wrap else model).state_dict())
        steps.append([(step.method, step.kept, step.after) for step in report.steps])
    assert steps[0] == steps[1]
    assert all(torch.equal(repaired[0][k], v) for k, v in repaired[1].items() if "recipe" not in k)


def test_what_returns_no_tensor_is_refused() -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> str:
            self.fc(x)
            return "done"

    x = [torch.ones(2, 4)]
    model = lq.calibrate(lq.quantize(Told(), "tensorrt_int8"), x, progress=False)
    with pytest.raises(ValueError, match="to return a tensor, but got str"):
        lq.repair(model, x, x, progress=False)
