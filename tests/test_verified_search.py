"""Plans that are measured: against all plans of a small net, and what is learnt from a failure."""

import copy
import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lq
from lq.costs import count_costs
from lq.data import DigitsDataModule
from lq.mixed_precision import (
    PrecisionConstraints,
    accuracy_guard,
    paired_drop,
    search,
    verified_search,
)
from lq.mixed_precision.measured import rightness
from lq.plan import PrecisionPlan

Batches = list[tuple[Tensor, Tensor]]
NO_RESIDUAL = lq.Recipe(residual=None)


def small_net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10),
    )


def train(model: nn.Module, batches: Batches, epochs: int, rate: float) -> None:
    optimizer = torch.optim.Adam(model.parameters(), rate)
    model.train()
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
    model.eval()


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Batches, Batches, Batches]:
    """A trained net; training, calibration and held-out batches."""
    torch.manual_seed(0)
    data, model = DigitsDataModule(batch_size=64), small_net()
    training = list(data.train_dataloader())
    train(model, training, 6, 3e-3)
    held_out = [*data.val_dataloader(), *data.test_dataloader()]
    return model, training, list(data.calibration_dataloader()), held_out


@pytest.fixture(scope="module")
def swept(digits):
    model, _, calibration, _ = digits
    formats = ["int8", "int4"]
    return lq.sweep(model, calibration, formats, metric="kl", recipe=NO_RESIDUAL, progress=False)


def quantized(model: nn.Module, plan: PrecisionPlan, calibration: Batches) -> nn.Module:
    net = lq.quantize(copy.deepcopy(model), lq.Recipe.from_plan(plan, NO_RESIDUAL))
    return net if set(plan.values()) == {"fp32"} else lq.calibrate(net, calibration, progress=False)


def test_the_search_finds_the_best_of_all_measured_plans(digits, swept) -> None:
    """Of all 3^3 plans within a size, none is measurably more accurate; few diverge less."""
    model, _, calibration, held_out = digits
    layers = list(swept.costs.layers)
    plans = [
        PrecisionPlan(dict(zip(layers, formats, strict=True)))
        for formats in itertools.product(("fp32", "int8", "int4"), repeat=3)
    ]
    x, y = (torch.cat(part) for part in zip(*held_out, strict=True))
    with torch.no_grad():
        wanted = model(x).double().log_softmax(1)
        got = {p: quantized(model, p, calibration)(x).double().log_softmax(1) for p in plans}
    right = {plan: found.argmax(1) == y for plan, found in got.items()}
    kl = {p: float((wanted.exp() * (wanted - found)).sum(1).mean()) for p, found in got.items()}
    sizes = {plan: swept.costs.total("size_mb", plan) for plan in plans}
    places = []
    for limit in sorted(sizes.values())[::3]:
        fitting = [plan for plan in plans if sizes[plan] <= limit]
        ours = PrecisionPlan(search(swept, PrecisionConstraints(max_size_mb=limit)))
        assert ours in fitting
        assert all(paired_drop(right[other], right[ours]).low <= 0 for other in fitting)
        places.append(sum(kl[other] < kl[ours] for other in fitting))
    assert np.mean(np.array(places) == 0) >= 0.7
    assert max(places) <= 2


def test_predicted_and_measured_side_by_side(digits, swept) -> None:
    model, _, calibration, held_out = digits
    before = {name: value.clone() for name, value in model.state_dict().items()}
    limits = PrecisionConstraints(max_accuracy_drop=0.02)
    found = verified_search(model, swept, limits, calibration, held_out, recipe=NO_RESIDUAL)
    best = next(trial for trial in found.trials if trial.plan is found.plan)
    assert best.kept
    assert best.drop.high <= 0.02
    again = paired_drop(rightness(model, held_out), rightness(found.model, held_out))
    assert again == best.drop
    assert PrecisionPlan.of(found.model) == found.plan
    cheaper = [t for t in found.trials if t.plan.predicted.size_mb < found.plan.predicted.size_mb]
    assert not any(trial.kept for trial in cheaper)
    for trial in found.trials:
        assert f"predicted drop {trial.plan.predicted.drop:.2%}" in str(found)
        assert f"measured {trial.drop}" in str(found)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)


def test_it_learns_from_plans_that_break_the_limit(digits, swept) -> None:
    """A sweep that promises too much of int4 is corrected by what is measured."""
    model, _, calibration, held_out = digits
    rows = [
        dataclasses.replace(
            row, top1_drop=0.0, kl=row.kl * 1e-3 if row.format == "int4" else row.kl
        )
        for row in swept
    ]
    lying = dataclasses.replace(swept, found=rows, metric="top1")
    limits = PrecisionConstraints(max_accuracy_drop=0.008, formats=["int4", "fp32"])
    found = verified_search(model, lying, limits, calibration, held_out, recipe=NO_RESIDUAL)
    first = found.trials[0]
    assert set(first.plan.values()) == {"int4"}
    assert first.plan.predicted.drop == 0.0
    assert not first.kept
    assert len({trial.plan for trial in found.trials}) == len(found.trials)
    assert found.plan != first.plan
    assert "int4" in found.plan.values()


def test_a_drop_that_no_plan_of_the_size_has(digits, swept) -> None:
    model, _, calibration, held_out = digits
    size = 1.001 * swept.costs.total("size_mb", dict.fromkeys(swept.costs.layers, "int4"))
    limits = PrecisionConstraints(max_accuracy_drop=0.004, max_size_mb=size)
    with pytest.raises(
        ValueError, match="`max_accuracy_drop` to be reachable beside max_size"
    ) as e:
        verified_search(model, swept, limits, calibration, held_out, recipe=NO_RESIDUAL)
    assert "\n" not in str(e.value)
    nearest = float(str(e.value).partition(" measured is ")[2].partition(" ")[0])
    limits = dataclasses.replace(limits, max_accuracy_drop=nearest)
    assert verified_search(model, swept, limits, calibration, held_out, recipe=NO_RESIDUAL)


def test_a_size_that_no_plan_has(digits, swept) -> None:
    model, _, calibration, held_out = digits
    limits = PrecisionConstraints(max_size_mb=1e-6)
    with pytest.raises(
        ValueError, match="`max_size_mb` to be reachable, but got 1e-06; the nearest"
    ):
        verified_search(model, swept, limits, calibration, held_out)


def test_too_few_samples_to_show_it(digits, swept) -> None:
    model, _, calibration, held_out = digits
    limits = PrecisionConstraints(max_accuracy_drop=0.001)
    with pytest.raises(ValueError, match=r"enough samples.*of 0.001, but got 600.*0.0033"):
        verified_search(model, swept, limits, calibration, held_out)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        pytest.param([], "at least one batch", id="none"),
        pytest.param([torch.zeros(2, 1, 8, 8)], "class numbers,.*but got Tensor", id="no targets"),
        pytest.param(iter([]), r"pass list\(held_out\)", id="once"),
    ],
)
def test_what_cannot_be_measured_on(data, match, digits, swept) -> None:
    model, _, calibration, _ = digits
    with pytest.raises(ValueError, match=match):
        verified_search(model, swept, PrecisionConstraints(max_size_mb=1), calibration, data)


def test_latency_is_measured_and_learnt_from(digits, swept, monkeypatch) -> None:
    """Changing formats costs time that no layer's profile shows."""
    model, _, calibration, held_out = digits
    times = {"fp32": 2.0, "int8": 1.0, "int4": 3.0}
    costs = dataclasses.replace(
        swept.costs,
        latency=dict.fromkeys(swept.costs.layers, times),
        rest_ms=0.5,
        engine="onnxruntime",
    )

    def measured(net: nn.Module, sample: object, engine: str) -> float:
        formats = list(PrecisionPlan.of(net).values())
        changes = sum(a != b for a, b in itertools.pairwise(formats))
        return 0.5 + sum(times[f] for f in formats) + changes

    monkeypatch.setattr("lq.latency.file_latency", measured)
    limits = PrecisionConstraints(max_latency_ms=5.5)
    found = verified_search(model, swept, limits, calibration, held_out, costs, recipe=NO_RESIDUAL)
    first = found.trials[0]
    assert first.plan.predicted.latency_ms <= 5.5 < first.latency_ms
    assert not first.kept
    assert found.trials[-1].latency_ms <= 5.5
    with pytest.raises(ValueError, match="`max_latency_ms` to be reachable, but got 3"):
        verified_search(
            model, swept, PrecisionConstraints(max_latency_ms=3), calibration, held_out, costs
        )


def test_a_latency_that_one_plan_breaks_is_not_every_plans(digits, swept, monkeypatch) -> None:
    """The fastest plan by prediction is slow as a whole, and others are not."""
    model, _, calibration, held_out = digits
    times = {"fp32": 4.0, "int8": 1.0, "int4": 9.0}
    costs = dataclasses.replace(
        swept.costs, latency=dict.fromkeys(swept.costs.layers, times), engine="onnxruntime"
    )

    def measured(net: nn.Module, sample: object, engine: str) -> float:
        formats = list(PrecisionPlan.of(net).values())
        return 20.0 if set(formats) == {"int8"} else sum(times[f] for f in formats)

    monkeypatch.setattr("lq.latency.file_latency", measured)
    limits = PrecisionConstraints(max_latency_ms=6.5, formats=["int8", "fp32"])
    found = verified_search(
        model, swept, limits, calibration, held_out, costs, NO_RESIDUAL, minimize="latency_ms"
    )
    assert found.trials[0].latency_ms == 20.0
    assert sorted(found.plan.values()) == ["fp32", "int8", "int8"]


def test_a_latency_that_nothing_measures_is_the_predicted_one(digits) -> None:
    model, _, calibration, held_out = digits
    counted = count_costs(model, calibration[0])
    times = {name: {"fp32": 4.0, "int8": 2.0, "fp16": 3.0} for name in counted.layers}
    costs = dataclasses.replace(counted, latency=times)
    limits = PrecisionConstraints(max_latency_ms=5.9)
    report = accuracy_guard(
        model, calibration, held_out, limits, calibrator="max", costs=costs, progress=False
    )
    assert not report.kept


def test_outputs_that_overflow_are_right_nowhere() -> None:
    batches = [(torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.long))]
    assert not rightness(nn.Identity(), batches).any()


def test_intervals_of_paired_drops() -> None:
    """The interval of Agresti and Min, and that it holds the truth about as often as it says."""
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(400):
        before = rng.random(300) < 0.9
        flips = rng.random(300) < np.where(before, 0.06, 0.2)
        drop = paired_drop(torch.from_numpy(before), torch.from_numpy(before ^ flips))
        inside.append(drop.low <= 0.9 * 0.06 - 0.1 * 0.2 <= drop.high)
    assert 0.92 <= np.mean(inside) <= 0.99
    before, after = torch.tensor([1, 1, 1, 0, 0]).bool(), torch.tensor([0, 0, 1, 1, 0]).bool()
    drop = paired_drop(before, after)
    margin = 1.959964 * math.sqrt(3 + 1 - 1 / 7) / 7
    assert (drop.mean, drop.top1, drop.n) == (0.2, 0.4, 5)
    assert (drop.low, drop.high) == pytest.approx((1 / 7 - margin, 1 / 7 + margin))


def test_the_ladder_stops_at_calibration_where_that_is_enough(digits) -> None:
    model, _, calibration, held_out = digits
    limits = PrecisionConstraints(max_accuracy_drop=0.05, min_compression=2)
    report = accuracy_guard(model, calibration, held_out, limits, calibrator="max", progress=False)
    assert report.kept
    assert [rung.name for rung in report.rungs] == ["ptq"]
    assert set(report.plan.values()) == {"int8"}
    assert not lq.surgery.quantizers(model)


def test_the_ladder_to_its_end(digits) -> None:
    """A size that only int4 has, and a drop that int4 has only when it is trained."""
    model, training, calibration, held_out = digits
    costs = count_costs(model, calibration[0])
    size = 1.001 * costs.total("size_mb", dict.fromkeys(costs.layers, "int4"))
    limits = PrecisionConstraints(max_accuracy_drop=0.007, max_size_mb=size)
    given = []

    def finetune(net: nn.Module) -> None:
        given.append(PrecisionPlan.of(net))
        assert lq.surgery.is_calibrated(net)
        torch.manual_seed(0)
        train(net, training, 4, 1e-3)

    report = accuracy_guard(
        model,
        calibration,
        held_out,
        limits,
        finetune,
        NO_RESIDUAL,
        formats=("int8", "int4"),
        calibrator="max",
        progress=False,
    )
    assert [rung.name for rung in report.rungs] == ["ptq", "repair", "mixed precision", "qat"]
    assert [rung.kept for rung in report.rungs] == [False, False, False, True]
    assert given == [PrecisionPlan(dict.fromkeys(costs.layers, "int4"))]
    assert report.kept
    assert report.plan == given[0] == PrecisionPlan.of(report.model)
    assert report.rungs[3].drop == paired_drop(
        rightness(model, held_out), rightness(report.model, held_out)
    )
    assert report.rungs[3].gain == pytest.approx(
        report.rungs[2].drop.mean - report.rungs[3].drop.mean
    )
    assert "max_accuracy_drop" in report.rungs[2].note
    assert all(rung.seconds > 0 for rung in report.rungs)
    assert str(report).count("\n") == 3


def test_what_keeps_to_the_costs_already_is_trained(digits) -> None:
    """A size that no format of the search has, but the recipe."""
    model, training, calibration, held_out = digits
    costs = count_costs(model, calibration[0])
    size = 1.001 * costs.total("size_mb", dict.fromkeys(costs.layers, "int2"))
    given = []

    def finetune(net: nn.Module) -> None:
        given.append(PrecisionPlan.of(net))
        torch.manual_seed(0)
        train(net, training, 1, 1e-3)

    report = accuracy_guard(
        model,
        calibration,
        held_out,
        PrecisionConstraints(max_accuracy_drop=0.004, max_size_mb=size),
        finetune,
        lq.Recipe.from_dict({"weights": "int2", "inputs": "int2", "residual": None}),
        formats=("int8",),
        calibrator="max",
        progress=False,
    )
    assert given == [PrecisionPlan(dict.fromkeys(costs.layers, "int2"))]
    assert report.rungs[2].drop is None
    assert report.rungs[3].drop.mean < report.rungs[1].drop.mean


def test_the_nearest_plan_that_was_measured_is_not_lost(digits) -> None:
    model, _, calibration, held_out = digits
    costs = count_costs(model, calibration[0])
    coarse = lq.Recipe.from_dict({"weights": "int2", "inputs": "int8", "residual": None})
    int4 = costs.total("size_mb", dict.fromkeys(costs.layers, "int4"))
    report = accuracy_guard(
        model,
        calibration,
        held_out,
        PrecisionConstraints(max_accuracy_drop=0.0035, max_size_mb=1.001 * int4),
        recipe=coarse,
        formats=("int8", "int4"),
        calibrator="max",
        progress=False,
    )
    mixed = report.rungs[-1]
    assert not report.kept
    assert "plans that were measured" in mixed.note
    assert mixed.drop.high < report.rungs[0].drop.low
    assert report.plan == mixed.plan
    assert paired_drop(rightness(model, held_out), rightness(report.model, held_out)) == mixed.drop


def test_pins_hold_on_every_rung(digits) -> None:
    """Also those of units of a sweep; one that matches nothing is refused before anything runs."""
    model, _, calibration, held_out = digits
    units = {"begin": ("0", "2"), "end": ("5",)}
    found = lq.sweep(model, calibration, ["int8"], units=units, recipe=NO_RESIDUAL, progress=False)
    limits = PrecisionConstraints(max_accuracy_drop=0.05, pinned={"begin": "fp16", "2": "fp32"})
    arguments = {"recipe": NO_RESIDUAL, "calibrator": "max", "progress": False}
    report = accuracy_guard(model, calibration, held_out, limits, sensitivity=found, **arguments)
    assert report.kept
    assert dict(report.plan) == {"0": "fp16", "2": "fp32", "5": "int8"}
    limits = dataclasses.replace(limits, pinned={"zz": "int8"})
    with pytest.raises(ValueError, match=r"'zz' matches none"):
        accuracy_guard(model, calibration, held_out, limits, **arguments)


def test_a_sweep_of_another_model(digits, swept, caplog) -> None:
    model, _, calibration, held_out = digits
    limits = PrecisionConstraints(max_accuracy_drop=0.05)
    with pytest.raises(ValueError, match=r"sweep of this model, but it has no layer '2'"):
        verified_search(nn.Sequential(model[0]), swept, limits, calibration, held_out)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained[0].weight.mul_(0.99)
    verified_search(trained, swept, limits, calibration, held_out, recipe=NO_RESIDUAL)
    assert "sweep is of other weights" in caplog.text
    caplog.clear()
    verified_search(model, swept, limits, calibration, held_out, recipe=NO_RESIDUAL)
    assert "sweep is of other weights" not in caplog.text


def test_batches_may_be_mappings(digits) -> None:
    class Named(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: Tensor) -> Tensor:
            return self.model(image)

    model, _, _, held_out = digits
    named = [{"image": x, "labels": y} for x, y in held_out]
    assert torch.equal(rightness(Named(model), named), rightness(model, held_out))


def test_a_ladder_too_short_gives_the_best_of_its_rungs(digits) -> None:
    model, _, calibration, held_out = digits
    costs = count_costs(model, calibration[0])
    size = 1.001 * costs.total("size_mb", dict.fromkeys(costs.layers, "int4"))
    report = accuracy_guard(
        model,
        calibration,
        held_out,
        PrecisionConstraints(max_accuracy_drop=0.004, max_size_mb=size),
        recipe=NO_RESIDUAL,
        formats=("int8", "int4"),
        calibrator="max",
        progress=False,
    )
    assert not report.kept
    assert [rung.name for rung in report.rungs] == ["ptq", "repair", "mixed precision"]
    best = min((r for r in report.rungs if r.drop is not None), key=lambda r: r.drop.high)
    assert report.plan == best.plan
