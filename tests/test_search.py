"""Searches against brute force, and what they say of limits that cannot be kept."""

import dataclasses
import itertools
import math

import numpy as np
import pytest

import lq
from lq.costs import Costs, LayerCost
from lq.mixed_precision import PrecisionConstraints, pareto_front, search
from lq.mixed_precision.constraints import Limit
from lq.mixed_precision.problem import build_problem
from lq.mixed_precision.solver import solve_exactly, solve_greedily
from lq.sensitivity import LayerSensitivity, Sensitivity

FORMATS = ("int8", "fp16")


def swept(
    count: int, seed: int = 0, metric: str = "top1", formats=FORMATS, **changes
) -> Sensitivity:
    """A made-up sweep: wider formats cost less, some scores are negative, as noise is."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        for narrow, format in enumerate(reversed(formats)):
            drop = rng.normal(0.002, 0.004) * (1 + 3 * narrow)
            rows.append(
                LayerSensitivity(
                    layer=f"u{i}", format=format, top1_drop=drop, kl=abs(drop) * rng.uniform(1, 3)
                )
            )
    named = {f"u{i}": (f"u{i}",) for i in range(count)}
    found = Sensitivity(
        found=rows, units=named, formats=formats, method="exact", metric=metric, n=1000
    )
    return dataclasses.replace(found, **changes)


def costs_of(units: int, seed: int = 0, timed: bool = False) -> Costs:
    rng = np.random.default_rng(seed + 100)
    layers = {
        f"u{i}": LayerCost(int(rng.integers(50, 5000)), 16, 16, int(rng.integers(1000, 100000)))
        for i in range(units)
    }
    latency = {
        n: {f: float(rng.uniform(0.1, 1)) * s for f, s in (("fp32", 4), ("fp16", 2), ("int8", 1))}
        for n in layers
    }
    return Costs(layers, 0.001, latency if timed else {}, 0.5)


def all_plans(found: Sensitivity, costs: Costs) -> list[tuple[dict[str, str], dict[str, float]]]:
    """Every plan, with its score and its costs added up in the plainest way."""
    plans = []
    for chosen in itertools.product(("fp32", *found.formats), repeat=len(found.units)):
        plan = dict(zip(found.units, chosen, strict=True))
        score = sum(max(found.score(*pair), 0.0) for pair in plan.items())
        values = {"drop": score, "size_mb": costs.total("size_mb", plan)}
        values["bitops"] = costs.total("bitops", plan)
        if costs.latency:
            values["latency_ms"] = costs.total("latency_ms", plan)
        plans.append((plan, values))
    return plans


@pytest.mark.parametrize("seed", range(6))
def test_the_smallest_drop_within_limits_is_that_of_brute_force(seed: int) -> None:
    found, costs = swept(7, seed), costs_of(7, seed, timed=True)
    plans = all_plans(found, costs)
    middle = {q: float(np.quantile([v[q] for _, v in plans], 0.3)) for q in plans[0][1]}
    limits = {
        "max_size_mb": middle["size_mb"],
        "max_bitops": middle["bitops"],
        "max_latency_ms": middle["latency_ms"],
    }
    fitting = [
        v for _, v in plans if all(v[k.removeprefix("max_")] <= b for k, b in limits.items())
    ]
    plan = search(found, PrecisionConstraints(**limits), costs)
    assert plan.predicted.drop == pytest.approx(min(v["drop"] for v in fitting), abs=1e-9)
    assert plan.predicted.size_mb <= limits["max_size_mb"]
    assert plan.predicted.size_mb == pytest.approx(costs.total("size_mb", plan))
    assert plan.predicted.bitops == pytest.approx(costs.total("bitops", plan))
    assert plan.predicted.latency_ms == pytest.approx(costs.total("latency_ms", plan))
    assert plan.greedy is None or plan.greedy.drop >= plan.predicted.drop - 1e-9


@pytest.mark.parametrize("minimize", [None, "size_mb", "bitops", "latency_ms"])
def test_the_smallest_cost_at_a_drop_is_that_of_brute_force(minimize) -> None:
    found, costs = swept(6, 3), costs_of(6, 3, timed=True)
    quantity = minimize or "size_mb"
    fitting = [v for _, v in all_plans(found, costs) if v["drop"] <= 0.01]
    plan = search(found, PrecisionConstraints(max_accuracy_drop=0.01), costs, minimize)
    assert getattr(plan.predicted, quantity) == pytest.approx(min(v[quantity] for v in fitting))
    assert plan.predicted.drop <= 0.01


def test_greedy_comes_near() -> None:
    behind = []
    for seed in range(8):
        found, costs = swept(30, seed), costs_of(30, seed)
        limit = 0.4 * costs.total("size_mb", {})
        plan = search(found, PrecisionConstraints(max_size_mb=limit), costs)
        assert plan.greedy is not None
        assert plan.greedy.size_mb <= limit
        behind.append(plan.greedy.drop - plan.predicted.drop)
    assert min(behind) >= -1e-9
    assert float(np.mean(behind)) < 0.01


def test_the_same_arguments_give_the_same_plan() -> None:
    found, costs = swept(40, 5), costs_of(40, 5)
    limits = PrecisionConstraints(max_size_mb=0.35 * costs.total("size_mb", {}))
    first = search(found, limits, costs)
    assert all(list(search(found, limits, costs).items()) == list(first.items()) for _ in range(3))


def test_units_go_together() -> None:
    units = {"block": ("u0", "u1"), "u2": ("u2",)}
    rows = [
        LayerSensitivity(layer=n, format="int8", top1_drop=d)
        for n, d in (("block", 0.1), ("u2", 0))
    ]
    found = swept(3, found=rows, units=units, formats=("int8",))
    costs = costs_of(4)
    plan = search(found, PrecisionConstraints(max_accuracy_drop=0.05), costs)
    assert plan == {"u0": "fp32", "u1": "fp32", "u2": "int8", "u3": "fp32"}  # u3 was not swept
    assert plan.units == {"block": "fp32", "u2": "int8"}
    assert plan.predicted.size_mb == pytest.approx(costs.total("size_mb", plan))


def test_equal_accuracy_is_decided_by_divergence_and_then_by_size() -> None:
    rows = [
        LayerSensitivity(layer=f"u{i}", format="int8", top1_drop=0.0, kl=kl)
        for i, kl in enumerate((0.5, 0.1, 0.3))
    ]
    found = swept(3, found=rows, formats=("int8",))
    layers = {f"u{i}": LayerCost(1000, 1, 0, 1) for i in range(3)}
    costs = Costs(layers, 0.0)
    one_float = costs.total("size_mb", {"u0": "int8", "u1": "int8"})
    plan = search(found, PrecisionConstraints(max_size_mb=one_float), costs)
    assert plan == {"u0": "fp32", "u1": "int8", "u2": "int8"}
    same = [dataclasses.replace(row, kl=0.0) for row in rows]
    plan = search(
        swept(3, found=same, formats=("int8",)), PrecisionConstraints(max_size_mb=1), costs
    )
    assert set(plan.values()) == {"int8"}


def test_formats_and_pins() -> None:
    found, costs = swept(5), costs_of(5)
    limits = {"max_size_mb": 1.0}
    assert set(search(found, PrecisionConstraints(**limits, formats=["int8"]), costs).values()) == {
        "int8"
    }
    pinned = {"u*": "int8", "u[34]": "fp16"}
    plan = search(found, PrecisionConstraints(**limits, pinned=pinned), costs)
    assert plan == {"u0": "int8", "u1": "int8", "u2": "int8", "u3": "fp16", "u4": "fp16"}


def test_the_sweeps_own_costs_are_taken() -> None:
    found = swept(4, costs=costs_of(4))
    limits = PrecisionConstraints(max_accuracy_drop=0.01)
    assert search(found, limits) == search(found, limits, costs_of(4))


def test_what_stands_for_accuracy() -> None:
    """Other metrics are turned into accuracy by what the sweep measured of both."""
    rows = [
        LayerSensitivity(layer=f"u{i}", format="int8", kl=kl, top1_drop=0.1 * kl)
        for i, kl in enumerate((0.1, 0.2, 0.4))
    ]
    found, costs = swept(3, found=rows, formats=("int8",), metric="kl"), costs_of(3)
    plan = search(found, PrecisionConstraints(max_size_mb=1, formats=["int8"]), costs)
    assert plan.predicted.score == pytest.approx(0.7)
    assert plan.predicted.drop == pytest.approx(0.07)
    unknown = [dataclasses.replace(row, top1_drop=math.nan) for row in rows]
    found = swept(3, found=unknown, formats=("int8",), metric="kl")
    plan = search(found, PrecisionConstraints(max_size_mb=1, formats=["int8"]), costs)
    assert plan.predicted.drop == plan.predicted.score


LIMITS = {
    "max_size_mb": "size_mb",
    "min_compression": "size_mb",
    "max_bitops": "bitops",
    "max_latency_ms": "latency_ms",
    "min_speedup": "latency_ms",
}


@pytest.mark.parametrize("name", LIMITS)
def test_an_unreachable_limit_and_its_nearest_value(name: str) -> None:
    found, costs = swept(6, 1), costs_of(6, 1, timed=True)
    impossible = 1e6 if name.startswith("min_") else 1e-9
    with pytest.raises(ValueError, match=rf"Expected `{name}` to be reachable, but got") as error:
        search(found, PrecisionConstraints(**{name: impossible}), costs)
    assert "\n" not in str(error.value)
    nearest = float(str(error.value).rstrip(".").rpartition(" ")[2])
    plan = search(found, PrecisionConstraints(**{name: nearest}), costs)
    best = min(v[LIMITS[name]] for _, v in all_plans(found, costs))
    assert getattr(plan.predicted, LIMITS[name]) == pytest.approx(best, rel=2e-3)


def test_an_unreachable_drop() -> None:
    found, costs = swept(4), costs_of(4)
    limits = PrecisionConstraints(max_accuracy_drop=0.0, formats=["int8"])
    with pytest.raises(
        ValueError, match="`max_accuracy_drop` to be reachable, but got 0;"
    ) as error:
        search(found, limits, costs)
    nearest = float(str(error.value).rstrip(".").rpartition(" ")[2])
    again = PrecisionConstraints(max_accuracy_drop=nearest, formats=["int8"])
    assert set(search(found, again, costs).values()) == {"int8"}


def test_limits_that_contradict_each_other() -> None:
    found, costs = swept(6, 2), costs_of(6, 2)
    size = 1.02 * costs.total("size_mb", dict.fromkeys(costs.layers, "int8"))
    fitting = [v["drop"] for _, v in all_plans(found, costs) if v["size_mb"] <= size]
    limits = PrecisionConstraints(max_accuracy_drop=0.001, max_size_mb=size)
    with pytest.raises(
        ValueError,
        match=rf"`max_size_mb` to be reachable beside max_accuracy_drop=0.001, but got {size:g}",
    ) as error:
        search(found, limits, costs)
    nearest = float(str(error.value).rstrip(".").rpartition(" ")[2])
    plan = search(found, dataclasses.replace(limits, max_size_mb=nearest), costs)
    assert plan.predicted.drop <= 0.001 < min(fitting)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param({}, "at least one limit", id="none"),
        pytest.param({"max_accuracy_drop": 1.5}, "point is 0.01", id="percent"),
        pytest.param({"max_accuracy_drop": -0.1}, "fraction from 0", id="negative"),
        pytest.param({"max_size_mb": 0}, "`max_size_mb` to be above 0", id="no size"),
        pytest.param({"max_size_mb": math.inf}, "finite, but got inf", id="infinite"),
        pytest.param({"max_size_mb": float("nan")}, "`max_size_mb` to be above 0", id="nan"),
        pytest.param({"max_size_mb": 1, "formats": ["int9"]}, "'int9'", id="format"),
        pytest.param({"max_size_mb": 1, "formats": ["int3"]}, "which no engine runs", id="int3"),
        pytest.param({"max_size_mb": 1, "formats": []}, "at least one format", id="no formats"),
        pytest.param({"max_size_mb": 1, "pinned": {"a": "fp61"}}, "'fp61'", id="pin"),
    ],
)
def test_limits_that_cannot_be_meant(arguments, match) -> None:
    with pytest.raises(ValueError, match=match):
        PrecisionConstraints(**arguments)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        pytest.param({"formats": ["bf16"]}, "'bf16' is not among fp32, int8, fp16", id="not swept"),
        pytest.param({"pinned": {"v0": "int8"}}, "'v0' matches none; did you mean 'u0'", id="pin"),
        pytest.param({"pinned": {"u0": "bf16"}}, "'bf16' is not among", id="pinned format"),
    ],
)
def test_limits_that_do_not_fit_the_sweep(arguments, match) -> None:
    with pytest.raises(ValueError, match=match):
        search(swept(3), PrecisionConstraints(max_size_mb=1, **arguments), costs_of(3))


def test_a_pin_on_a_part_of_a_unit() -> None:
    found = swept(2, units={"u0": ("a", "b"), "u1": ("c",)})
    with pytest.raises(ValueError, match="one pinned format for all layers of unit 'u0'"):
        search(
            found, PrecisionConstraints(max_accuracy_drop=0.5, pinned={"a": "int8"}), costs_of(2)
        )


@pytest.mark.parametrize("swept_layer", ["u0", "u1"])
def test_a_weight_that_a_float_layer_shares_is_stored_twice(swept_layer: str) -> None:
    layers = {"u0": LayerCost(4000, 16, 16, 1000), "u1": LayerCost(0, 16, 16, 1000, tied="u0")}
    costs = Costs({**layers, "u2": LayerCost(1000, 16, 16, 1000)}, 0.001)
    found = swept(3, units={swept_layer: (swept_layer,), "u2": ("u2",)})
    for share in (0.9, 1.2, 2.0):
        limits = PrecisionConstraints(max_size_mb=share * costs.total("size_mb", {}))
        plan = search(found, limits, costs)
        assert plan.predicted.size_mb == pytest.approx(costs.total("size_mb", plan))
        assert costs.total("size_mb", plan) <= limits.max_size_mb


def test_pins_of_layers_that_were_not_swept() -> None:
    found, costs = swept(2), costs_of(3)
    limits = PrecisionConstraints(max_size_mb=1, pinned={"u2": "fp32"})
    assert search(found, limits, costs)["u2"] == "fp32"
    with pytest.raises(ValueError, match=r"swept, but 'u2' was not"):
        search(found, dataclasses.replace(limits, pinned={"u2": "int8"}), costs)
    with pytest.raises(ValueError, match=r"'zz' matches none; choose from u0, u1, u2.$"):
        search(found, dataclasses.replace(limits, pinned={"zz": "int8"}), costs)


def test_pins_of_units_are_those_of_their_layers() -> None:
    limits = PrecisionConstraints(
        max_size_mb=1, pinned={"a": "int8", "block*": "fp16", "b": "fp32"}
    )
    by_layer = limits.by_layer({"block1": ("a", "b[0]", "b")})
    assert [by_layer.pin(name) for name in ("a", "b[0]", "b", "c")] == [
        "fp16", "fp16", "fp32", None,
    ]  # fmt: skip


def test_the_last_pin_wins_over_units_and_layers() -> None:
    found = swept(2, units={"u0": ("a", "b"), "u1": ("c",)})
    for pinned, expected in (
        ({"u0": "fp16", "[ab]": "int8"}, "int8"),
        ({"[ab]": "int8", "u0": "fp16"}, "fp16"),
    ):
        limits = PrecisionConstraints(max_accuracy_drop=0.9, pinned=pinned)
        problem = build_problem(found, limits, None)
        assert problem.formats[0] == expected


def test_a_drop_that_a_sweep_cannot_tell(caplog) -> None:
    found = swept(2, metric="kl")
    search(found, PrecisionConstraints(max_accuracy_drop=0.5), costs_of(2))
    assert "measured no top-1" in caplog.text
    caplog.clear()
    search(
        dataclasses.replace(found, top1=0.9),
        PrecisionConstraints(max_accuracy_drop=0.5),
        costs_of(2),
    )
    assert "measured no top-1" not in caplog.text


def test_costs_that_are_missing() -> None:
    for name in ("max_size_mb", "max_bitops"):
        with pytest.raises(ValueError, match=f"where `{name}` is limited.*lq.count_costs"):
            search(swept(2), PrecisionConstraints(**{name: 1}))
    with pytest.raises(ValueError, match=r"`size_mb`, but got none; give lq.count_costs"):
        search(swept(2), PrecisionConstraints(max_accuracy_drop=0.1))
    with pytest.raises(ValueError, match=r"`max_latency_ms` is limited.*lq.measure_latency"):
        search(swept(2), PrecisionConstraints(max_latency_ms=1), costs_of(2))
    with pytest.raises(ValueError, match="did you mean 'size_mb'"):
        search(swept(2), PrecisionConstraints(max_accuracy_drop=0.1), costs_of(2), "size")
    with pytest.raises(ValueError, match="did you mean 'bitops'"):
        pareto_front(swept(2), costs_of(2), "bitop")


@pytest.mark.parametrize("against", ["size_mb", "bitops", "latency_ms"])
def test_no_plan_beats_the_front(against: str) -> None:
    found, costs = swept(6, 4), costs_of(6, 4, timed=True)
    front = pareto_front(found, costs, against, points=12)
    plans = [(v["drop"], v[against]) for _, v in all_plans(found, costs)]
    assert len(front) > 2
    points = [(p.predicted.drop, getattr(p.predicted, against)) for p in front]
    assert points == sorted(points, key=lambda point: point[1])
    for drop, cost in points:
        assert not any(d < drop - 1e-9 and c <= cost for d, c in plans)
        assert not any(d <= drop and c < cost - 1e-5 for d, c in plans)
    assert points[0][1] == pytest.approx(min(c for _, c in plans))
    assert points[-1][0] == pytest.approx(min(d for d, _ in plans), abs=1e-9)


def test_plans_that_are_left_out() -> None:
    found, costs = swept(4, 6), costs_of(4, 6)
    problem = build_problem(found, PrecisionConstraints(max_size_mb=1), costs)
    tried: list[np.ndarray] = []
    for _ in range(6):
        chosen = solve_exactly(problem, problem.values["drop"], [], None, tried)
        assert chosen is not None
        tried.append(chosen)
    drops = [problem.total("drop", chosen) for chosen in tried]
    every = sorted(v["drop"] for _, v in all_plans(found, costs))
    np.testing.assert_allclose(drops, every[:6], atol=1e-9)


def test_greedy_may_find_no_way() -> None:
    problem = build_problem(swept(2), PrecisionConstraints(max_size_mb=1), costs_of(2))
    nothing = Limit("max_size_mb", 1e-9, "size_mb", 1e-9)
    assert solve_greedily(problem, problem.values["drop"], [nothing]) is None
    assert solve_exactly(problem, problem.values["drop"], [nothing]) is None


def test_names_at_the_top() -> None:
    assert lq.search is search
    assert lq.PrecisionConstraints is PrecisionConstraints


def made_of(scores: dict[str, dict[str, float]], weights: dict[str, int]) -> Sensitivity:
    """A made-up sweep by KL of layers with so many weights."""
    layers = {name: LayerCost(count, 10, 0, 1000) for name, count in weights.items()}
    rows = [
        LayerSensitivity(layer=name, format=format, kl=kl, top1_drop=0.0, sqnr_db=10.0)
        for name, found in scores.items()
        for format, kl in found.items()
    ]
    return Sensitivity(
        found=rows,
        units={name: (name,) for name in scores},
        formats=tuple(next(iter(scores.values()))),
        method="exact",
        metric="kl",
        n=1000,
        costs=Costs(layers, 0.0),
    )


@pytest.mark.parametrize("seed", range(8))
def test_scores_of_any_magnitude_are_searched_exactly(seed: int, caplog) -> None:
    rng = np.random.default_rng(seed)
    names = [f"l{i}" for i in range(5)]
    exponents = {"int8": (-8, -2), "fp16": (-12, -6), "int4": (-4, 1)}
    scores = {
        name: {f: 10 ** rng.uniform(*ends) for f, ends in exponents.items()} for name in names
    }
    found = made_of(scores, {name: int(rng.integers(10, 5000)) for name in names})
    sizes = sorted(v["size_mb"] for _, v in all_plans(found, found.costs))
    for share in (0.1, 0.3, 0.6):
        limit = sizes[int(share * len(sizes))]  # exactly the size of a plan
        fitting = [v for _, v in all_plans(found, found.costs) if v["size_mb"] <= limit]
        plan = search(found, PrecisionConstraints(max_size_mb=limit))
        assert plan.predicted.score == pytest.approx(min(v["drop"] for v in fitting), rel=1e-6)
    assert not caplog.records


@pytest.mark.parametrize("spread", [1, 3], ids=["equal", "near"])
@pytest.mark.parametrize("below", [0, 1e-8, 1e-6], ids=["at", "just below", "below"])
def test_limits_at_the_size_of_plans_of_equal_layers(below: float, spread: int, caplog) -> None:
    rng = np.random.default_rng(0)
    names = [f"l{i:02}" for i in range(12)]
    scores = {name: {"int8": 1e-3 + 1e-5 * i} for i, name in enumerate(names)}
    found = made_of(scores, {name: 100000 + int(rng.integers(spread)) for name in names})
    limit = found.costs.total("size_mb", dict.fromkeys(names[:6], "int8")) * (1 - below)
    plans = all_plans(found, found.costs)
    best = min(v["drop"] for _, v in plans if v["size_mb"] <= limit * (1 + 1e-12))
    plan = search(found, PrecisionConstraints(max_size_mb=limit))
    assert plan.predicted.score == pytest.approx(best, rel=1e-9)
    assert not caplog.records


def test_formats_that_overflow_are_no_choices() -> None:
    scores = {name: {"int8": 0.01 * (1 + i), "fp16": 1e-6} for i, name in enumerate("abc")}
    scores["b"]["fp16"] = math.inf
    found = made_of(scores, dict.fromkeys("abc", 1000))
    fp16 = found.costs.total("size_mb", dict.fromkeys("abc", "fp16"))
    plan = search(found, PrecisionConstraints(max_size_mb=fp16))
    assert plan == {"a": "fp16", "b": "int8", "c": "fp16"}
    assert all(p["b"] != "fp16" and math.isfinite(p.predicted.score) for p in pareto_front(found))
    with pytest.raises(ValueError, match=r"'b'.*overflows in fp16; allow or pin another"):
        search(found, PrecisionConstraints(max_size_mb=fp16, pinned={"b": "fp16"}))
