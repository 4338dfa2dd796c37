"""The calibration curve, against calibrating and predicting by hand."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lq
from lq.curve import CalibrationCurve, CurvePoint, relative_change
from lq.data import DigitsDataModule
from lq.functional import sqnr_db
from lq.models import digits_cnn
from lq.samples import FirstSamples


def blobs(count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (count,), generator=generator)
    return torch.randn(count, 6, generator=generator) + labels.unsqueeze(1), labels


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


def batches_of(x, y, size: int):
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.mark.parametrize("calibrator", ["max", "percentile(99)"])
def test_equals_calibrating_with_each_size_by_hand(calibrator) -> None:
    x, y = blobs(50, 0)
    held_x, held_y = blobs(90, 1)
    reference = network()
    model = lq.quantize(copy.deepcopy(reference), "tensorrt_int8")
    held_out = batches_of(held_x, held_y, 40)
    curve = lq.calibration_curve(
        model, batches_of(x, y, 12), held_out, calibrator=calibrator, progress=False
    )
    assert [point.samples for point in curve.points] == [8, 16, 32, 50]
    expected = reference(held_x)
    assert curve.float_top1 == pytest.approx(float((expected.argmax(1) == held_y).float().mean()))
    assert curve.held_out == 90
    for point in curve.points:
        by_hand = lq.quantize(copy.deepcopy(reference), "tensorrt_int8")
        lq.calibrate(by_hand, [x[: point.samples]], calibrator, progress=False)
        outputs = by_hand(held_x)
        ranges = {f"{i}.input_quantizer": by_hand[i].input_quantizer.amax for i in (0, 2)}
        assert point.ranges.keys() == ranges.keys()
        for name, amax in ranges.items():
            torch.testing.assert_close(point.ranges[name], amax)
        assert point.sqnr_db == pytest.approx(sqnr_db(expected, outputs), abs=1e-3)
        same = (outputs.argmax(1) == expected.argmax(1)).float().mean()
        assert point.agreement == pytest.approx(float(same))
        assert point.top1 == pytest.approx(float((outputs.argmax(1) == held_y).float().mean()))


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(calibrated, fails) -> None:
    x, y = blobs(40, 0)
    model = lq.quantize(network(), "tensorrt_int8").train()
    if calibrated:
        lq.calibrate(model, [x * 3], progress=False)
    model[0].input_quantizer.mode = lq.Mode.BYPASS
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [q.mode for q in model.modules() if isinstance(q, lq.Quantizer)]
    if fails:
        x[35] = torch.nan  # first seen with 40 samples, when three sizes are done
        with pytest.raises(RuntimeError, match="NaN"):
            lq.calibration_curve(model, [(x, y)], [(x[:9], y[:9])], progress=False)
    else:
        lq.calibration_curve(model, [(x, y)], [(x, y)], progress=False)
    after = model.state_dict()
    assert all(torch.equal(before[n].nan_to_num(-1), after[n].nan_to_num(-1)) for n in before)
    assert modes == [q.mode for q in model.modules() if isinstance(q, lq.Quantizer)]
    assert model[2].input_quantizer.is_calibrated is calibrated
    assert model.training
    assert all(q.observer is None for q in model.modules() if isinstance(q, lq.Quantizer))


def test_learned_scales_stay_the_same_parameters() -> None:
    x, _ = blobs(32, 0)
    recipe = {"inputs": {"format": "int8", "range": "lsq"}}
    model = lq.quantize(network(), recipe)
    lq.calibrate(model, [x], progress=False)
    scales = [q.scale for q in model.modules() if isinstance(q, lq.Quantizer)]
    values = [scale.detach().clone() for scale in scales]
    lq.calibration_curve(model, [x * 2], [x], progress=False)
    after = [q.scale for q in model.modules() if isinstance(q, lq.Quantizer)]
    assert all(a is b for a, b in zip(scales, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values, after, strict=True))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, a, b):
        return {"out": self.layer(a) + self.layer(b)}


@pytest.mark.parametrize(
    "batch",
    [
        lambda a, b: (a, b, torch.zeros(len(a), 2)),
        lambda a, b: {"a": a, "b": b, "labels": torch.zeros(len(a))},
        lambda a, b: [(a, b), torch.zeros(len(a), 1)],
    ],
    ids=["tuple", "mapping", "nested"],
)
def test_any_batches_that_calibrate_takes(batch) -> None:
    torch.manual_seed(0)
    model = lq.quantize(TwoInputs(), "tensorrt_int8")
    batches = [batch(torch.randn(5, 6), torch.randn(5, 6)) for _ in range(5)]
    curve = lq.calibration_curve(model, batches, batches, sizes=[3, 25], progress=False)
    assert [point.samples for point in curve.points] == [3, 25]
    assert curve.float_top1 is None
    assert curve.points[0].top1 is None
    assert "top-1 " not in str(curve).splitlines()[0]


def test_first_samples_are_cut_and_read_again() -> None:
    x = torch.arange(10)
    first = FirstSamples([{"x": part, "k": 3} for part in x.split(4)], 6)
    for _ in range(2):
        parts = list(first)
        assert torch.equal(torch.cat([part["x"] for part in parts]), x[:6])
        assert [part["k"] for part in parts] == [3, 3]
    assert [len(part) for part in FirstSamples([x, x], 10)] == [10]


def points(sqnr, ranges=None, agreement=None) -> list[CurvePoint]:
    count = len(sqnr)
    ranges, agreement = ranges or [1.0] * count, agreement or [1.0] * count
    return [
        CurvePoint(8 << i, s, a, None, {"a": torch.tensor(float(r)), "b": torch.tensor(float(r))})
        for i, (s, r, a) in enumerate(zip(sqnr, ranges, agreement, strict=True))
    ]


@pytest.mark.parametrize(
    ("points", "enough"),
    [
        pytest.param(points([20, 30, 30.4, 30.2, 30.1]), 16, id="SQNR settles"),
        pytest.param(points([20, 30, 30.4, 30.2, 30.6]), 32, id="SQNR drifts"),
        pytest.param(points([20, 22, 24, 26, 28]), None, id="SQNR grows"),
        pytest.param(points([30] * 5, ranges=[1, 2, 2.1, 2.1, 2.1]), 16, id="ranges settle"),
        pytest.param(points([30] * 5, ranges=[1, 1.04, 1.08, 1.12, 1.16]), None, id="slow drift"),
        pytest.param(points([30] * 5, ranges=[1, 1, 1, 1, 2]), None, id="late jump"),
        pytest.param(points([30] * 5, agreement=[0.9, 0.99, 0.992, 0.993, 0.995]), 16, id="votes"),
        pytest.param(points([math.inf] * 4), 8, id="exact"),
        pytest.param(points([math.inf, math.inf, 80, 80, 80]), 32, id="not exact"),
        pytest.param(points([30, 30]), None, id="too short to tell"),
        pytest.param(points([30]), None, id="one size"),
    ],
)
def test_enough_means_settled(points, enough) -> None:
    curve = CalibrationCurve(points, "max", 100, None)
    assert curve.enough == enough
    sizes = [point.samples for point in points]
    if enough is None:
        assert curve.verdict.startswith("Not settled: ")
        assert f"more than {sizes[-1]} samples, or with a calibrator that clips" in curve.verdict
    else:
        assert curve.verdict.startswith(f"{enough} samples are enough: up to {sizes[-1]}")
    assert str(curve).endswith(curve.verdict)


def test_the_verdict_says_what_moved_and_where() -> None:
    moving = points([30, 31, 31, 31], ranges=[1, 1.25, 1.25, 1.25], agreement=[0.9, 1, 1, 1])
    verdict = CalibrationCurve(moving[:3], "mse", 100, 0.5).verdict
    assert verdict == (
        "Not settled: from 8 to 16 samples ranges move by 20.0% (median), agreement by 10.00 "
        "points, SQNR by 1.00 dB; calibrate with more than 32 samples."
    )
    assert "no size has 4 times as many" in CalibrationCurve(moving[:2], "mse", 9, None).verdict


def test_relative_change() -> None:
    change = relative_change(torch.tensor([0.0, 2.0, 4.0]), torch.tensor([0.0, 4.0, 3.0]))
    assert change == 0.5
    assert relative_change(torch.tensor(0.0), torch.tensor(1.0)) == 1.0


def test_table_names_the_range_that_moves_most() -> None:
    ranges = [{"a": torch.tensor(a), "b": torch.tensor(b)} for a, b in ((1.0, 1.0), (2.0, 1.0))]
    two = [CurvePoint(8 << i, 30.0, 0.99, 0.9, r) for i, r in enumerate(ranges)]
    lines = str(CalibrationCurve(two, "max", 100, 0.91)).splitlines()
    assert lines[0] == "calibrator max, 100 held-out samples, float top-1 91.00%"
    assert lines[2].split() == ["8", "30.00", "99.00%", "90.00%"]
    assert lines[3].split() == ["16", "30.00", "99.00%", "90.00%", "25.0%", "50.0%", "a"]


X = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batches": iter([X])}, r"`batches` to be readable again.*pass list\(batches\)"),
        ({"held_out": (X for _ in range(1))}, r"`held_out` to be readable again.*got generator"),
        ({"batches": []}, "`batches` to hold at least one sample, but got none"),
        ({"batches": [torch.tensor(1.0)]}, "a batch to hold a tensor of samples, but got Tensor"),
        ({"held_out": []}, "`held_out` to give outputs .*, but got no batch"),
        ({"sizes": []}, r"`sizes` to increase .* but got \[\]"),
        ({"sizes": [8, 4]}, r"`sizes` to increase .* but got \[8, 4\]"),
        ({"sizes": [0, 4]}, "`sizes` to increase from at least 1"),
        ({"sizes": [8, 16]}, "at most the 9 samples of `batches`"),
        ({"calibrator": "maxx"}, "did you mean 'max'"),
        ({"model": nn.Linear(6, 3)}, "a quantized model"),
    ],
)
def test_refusals(arguments, message) -> None:
    model = lq.quantize(nn.Linear(6, 3), "tensorrt_int8")
    given = {"model": model, "batches": [X], "held_out": [X], "progress": False, **arguments}
    with pytest.raises(ValueError, match=f"Expected .*{message}"):
        lq.calibration_curve(**given)


def test_models_without_ranges_of_activations_are_refused() -> None:
    model = lq.quantize(nn.Linear(6, 3), {"inputs": "fp32"})
    with pytest.raises(ValueError, match="calibration needs no data"):
        lq.calibration_curve(model, [X], [X], progress=False)


def test_outputs_without_classes_are_refused() -> None:
    model = lq.quantize(nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), "tensorrt_int8")
    with pytest.raises(ValueError, match=r"outputs \[samples, classes, ...\], but got outputs of"):
        lq.calibration_curve(model, [X], [X], progress=False)


def test_real_digits_settle(capsys) -> None:
    module = DigitsDataModule(batch_size=64, calibration_size=1197)
    torch.manual_seed(0)
    model = digits_cnn()
    optimizer = torch.optim.Adam(model.parameters(), 0.005)
    for _ in range(5):
        for x, y in DataLoader(module.dataset("train"), 64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    lq.quantize(model.eval(), "tensorrt_int8")
    data = module.calibration_dataloader(), module.val_dataloader()
    curve = lq.calibration_curve(model, *data, "percentile(99.9)")
    assert "Calibration curve" in capsys.readouterr().err
    assert [point.samples for point in curve.points] == [*(8 << i for i in range(8)), 1197]
    assert curve.float_top1 > 0.9
    assert curve.points[-1].agreement > 0.95
    assert curve.points[0].sqnr_db < curve.points[-1].sqnr_db - 1  # eight digits are too few
    assert curve.enough is not None
    assert 16 <= curve.enough <= 256
    few = lq.calibration_curve(model, *data, "percentile(99.9)", sizes=[8, 16, 32], progress=False)
    assert few.enough is None
    assert capsys.readouterr().err == ""
