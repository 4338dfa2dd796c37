"""Ranges as results: the choice between calibrators, the table, and the file they are kept in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lq
from lq.calibrators import COMPETITORS
from lq.functional import fake_quantize
from lq.ranges import Range, Ranges
from lq.surgery import quantizers


class Net(nn.Module):
    """Two layers whose inputs want different ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, bias=False)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.conv(x).relu().square().mean((2, 3)))


def net(inputs: str = "int8") -> Net:
    torch.manual_seed(0)
    return lq.quantize(Net(), {"inputs": inputs})


def images(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = [torch.randn(6, 3, 9, 9, generator=generator) for _ in range(3)]
    found[1][0, 0, 0, 0] = 6.0  # an outlier that no range should be wasted on
    return found


def relative_error(layer: nn.Module, amax: Tensor, inputs: list[Tensor], qmax: int = 127) -> float:
    """The relative squared error of a layer's output, in plain torch."""
    with torch.no_grad():
        quantized = [layer(fake_quantize(x, amax / qmax, -qmax - 1, qmax)) for x in inputs]
        plain = [layer(x) for x in inputs]
    noise = sum((q - y).double().square().sum() for q, y in zip(quantized, plain, strict=True))
    return float(noise / sum(y.double().square().sum() for y in plain))


def layer_inputs(model: nn.Module, batches: list[Tensor]) -> dict[str, list[Tensor]]:
    model, seen = lq.dequantize(model).eval(), {"conv": [], "fc": []}
    for name, found in seen.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda _module, args, found=found: found.append(args[0].detach())
        )
    with torch.no_grad():
        for x in batches:
            model(x)
    return seen


def test_auto_takes_the_range_with_the_smallest_error_at_the_layers_output() -> None:
    alone = {
        name: lq.find_ranges(net("int4"), images(), name, progress=False).found
        for name in COMPETITORS
    }

    ranges = lq.find_ranges(net("int4"), images(), "auto", progress=False)
    found = ranges.found

    model = lq.dequantize(net("int4"))
    for layer, inputs in layer_inputs(net("int4"), images()).items():
        module = model.get_submodule(layer)
        for rival in COMPETITORS:
            amax = alone[rival][f"{layer}.input_quantizer"].amax
            error = found[f"{layer}.input_quantizer"].errors[rival]
            assert error == pytest.approx(relative_error(module, amax, inputs, 7), rel=1e-4)
    best = min(ranges.outputs, key=ranges.outputs.__getitem__)
    for name, chosen in found.items():
        each = min(chosen.errors, key=chosen.errors.__getitem__)
        assert chosen.calibrator == (each if best == "each" else best) or "weight" in name
        assert torch.equal(chosen.amax, alone[chosen.calibrator][name].amax)
    assert len({min(r.errors, key=r.errors.__getitem__) for r in found.values()}) > 1


def test_auto_is_at_least_as_good_as_any_calibrator_at_the_models_outputs() -> None:
    expected = lq.dequantize(net("int4")).eval()(torch.cat(images())).detach()
    model = net("int4").eval()

    def noise() -> float:
        return float((model(torch.cat(images())) - expected).double().square().sum().detach())

    measured = {}
    for name in COMPETITORS:
        lq.find_ranges(model, images(), name, progress=False)
        measured[name] = noise() / float(expected.double().square().sum())
    ranges = lq.find_ranges(model, images(), "auto", progress=False)

    assert noise() / float(expected.double().square().sum()) == pytest.approx(
        min(ranges.outputs.values()), rel=1e-4
    )
    for name, error in measured.items():
        assert ranges.outputs[name] == pytest.approx(error, rel=1e-4)
        assert min(ranges.outputs.values()) <= error * (1 + 1e-6)


def test_weights_compete_too() -> None:
    found = lq.find_ranges(net(), images(), "auto", progress=False).found

    assert set(found["conv.weight_quantizer"].errors) == {"max", "mse"}
    assert (
        lq.find_ranges(net(), images(), "mse", progress=False)
        .found["conv.weight_quantizer"]
        .calibrator
        == "mse"
    )
    for other in ("max", "percentile", "entropy"):
        ranges = lq.find_ranges(net(), images(), other, progress=False).found
        assert ranges["conv.weight_quantizer"].calibrator == "max"
        assert ranges["conv.input_quantizer"].calibrator == other


def test_a_shared_layer_is_scored_over_all_its_calls() -> None:
    class Twice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.fc(x).repeat(1, 2) * 5)

    torch.manual_seed(0)
    model = lq.quantize(Twice(), {"rules": [{"name": "conv", "format": "skip"}]})
    batches = [torch.randn(5, 8)]

    found = lq.find_ranges(model, batches, "auto", progress=False).found["fc.input_quantizer"]

    fc = lq.dequantize(model).fc
    inputs = [batches[0], fc(batches[0]).detach().repeat(1, 2) * 5]
    expected = relative_error(fc, found.amax, inputs)
    assert found.errors[found.calibrator] == pytest.approx(expected, rel=1e-4)


def test_subsampling_can_be_switched_off() -> None:
    x = [torch.randn(40, 3, 60, 60, generator=torch.Generator().manual_seed(1))]
    model = lq.quantize(nn.Sequential(nn.Conv2d(3, 2, 1)), "tensorrt_int8")

    whole = lq.find_ranges(model, x, "percentile(90)", progress=False, subsample=False)
    sampled = lq.find_ranges(model, x, "percentile(90)", progress=False)

    exact = x[0].abs().flatten().kthvalue(int(0.9 * x[0].numel())).values.item()
    found = [float(r.found["0.input_quantizer"].amax) for r in (whole, sampled)]
    assert exact * (1 - 1 / 128) <= found[0] <= exact
    assert found[1] == pytest.approx(found[0], rel=1 / 64)


# ----------------------------------------------------------------------------------- the file


def test_ranges_from_the_file_are_bit_equal(tmp_path: Path) -> None:
    first, second = net(), net()
    path = tmp_path / "ranges.json"

    made = lq.find_ranges(first, images(), "auto", progress=False, cache=path)
    again = lq.find_ranges(second, (x for x in images()), "auto", progress=False, cache=path)

    assert again.found.keys() == made.found.keys()
    for name, quantizer in quantizers(first).items():
        assert torch.equal(quantizer.scale, quantizers(second)[name].scale)
    assert all(q.mode is lq.Mode.QUANTIZE for q in quantizers(second).values())
    assert torch.equal(first(images()[0]), second(images()[0]))
    plain = json.loads(path.read_text())
    assert plain["ranges"]["fc.input_quantizer"]["calibrator"] in COMPETITORS
    assert len(plain["data_sha256"]) == len(plain["model_sha256"]) == 64


def test_ranges_counted_in_full_are_others(tmp_path: Path) -> None:
    lq.calibrate(net(), images(), progress=False, cache=tmp_path / "r.json")

    with pytest.raises(ValueError, match=r"same calibrator.*max, all counted now"):
        lq.find_ranges(net(), images(), progress=False, cache=tmp_path / "r.json", subsample=False)


def other_weights() -> Net:
    model = net()
    with torch.no_grad():
        model.fc.weight[0, 0] += 1e-6
    return model


def other_recipe() -> Net:
    return lq.quantize(net(), {"rules": [{"name": "fc", "weights": "int4"}]})


@pytest.mark.parametrize(
    ("model", "seed", "calibrator", "what"),
    [
        pytest.param(other_weights, 0, "max", "same model", id="weights"),
        pytest.param(other_recipe, 0, "max", "same model", id="recipe"),
        pytest.param(net, 1, "max", "same data", id="data"),
        pytest.param(net, 0, "mse", "same calibrator.*max and is mse", id="calibrator"),
    ],
)
def test_ranges_of_something_else_are_refused(
    model: type[Net], seed: int, calibrator: str, what: str, tmp_path: Path
) -> None:
    path = tmp_path / "ranges.json"
    lq.calibrate(net(), images(), progress=False, cache=path)
    written, changed = path.read_text(), model()

    with pytest.raises(ValueError, match=f"{what}.*delete the file"):
        lq.calibrate(changed, images(seed), calibrator, progress=False, cache=path)

    assert path.read_text() == written
    assert not changed.conv.input_quantizer.is_calibrated


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 7}', '{"version": 1, "ranges": {"a": 1}}'], ids=str
)
def test_files_that_hold_no_ranges(text: str, tmp_path: Path) -> None:
    path = tmp_path / "ranges.json"
    path.write_text(text)

    with pytest.raises(ValueError, match=r"ranges that lq saved.*delete it"):
        lq.calibrate(net(), images(), progress=False, cache=path)


def test_no_file_is_left_by_a_calibration_that_breaks(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="finite"):
        lq.calibrate(net(), [images()[0] * torch.nan], progress=False, cache=tmp_path / "r.json")

    assert list(tmp_path.iterdir()) == []


def test_ranges_for_another_model() -> None:
    ranges = Ranges({"gone.input_quantizer": Range(torch.tensor(1.0), "max")})

    with pytest.raises(ValueError, match=r"no quantizer 'gone\.input_quantizer'"):
        ranges.apply(net())


def test_the_table_marks_what_was_chosen() -> None:
    ranges = lq.find_ranges(net(), images(), "auto", progress=False)

    lines = ranges.table().splitlines()

    assert lines[0].split()[:3] == ["quantizer", "range", "calibrator"]
    assert len(lines) == 1 + len(ranges.found) + 1
    assert lines[-1].startswith("model outputs")
    assert all(line.count("*") <= 1 for line in lines[1:])
