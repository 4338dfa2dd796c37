"""Pictures of plans show what is in which format."""

import random

import numpy as np
import pytest

from lq.plan import PrecisionPlan
from lq.plots import plot_plan
from lq.plots.plan import format_look
from tests.plots.looking import bars, overlapping
from tests.plots.zoo import costs_of


def plan_of(costs, seed: int = 0) -> PrecisionPlan:
    rng = random.Random(seed)
    return PrecisionPlan({n: rng.choice(["int8", "int8", "fp16", "fp32"]) for n in costs.layers})


def test_shares_are_those_of_the_costs() -> None:
    costs = costs_of("digits")
    plan = plan_of(costs)
    above, _, left, right = plot_plan(plan, costs).axes
    layers = list(costs.layers.values())
    weights = np.array([layer.weights for layer in layers]) / sum(c.weights for c in layers)
    macs = np.array([layer.macs for layer in layers]) / sum(c.macs for c in layers)
    np.testing.assert_allclose([bars(left)[i] for i in range(len(layers))], weights)
    np.testing.assert_allclose([bars(right)[i] for i in range(len(layers))], macs)
    for container in above.containers:
        format = container.get_label()
        inside = np.array([plan[name] == format for name in costs.layers])
        shown = [bar.get_width() for bar in container]
        np.testing.assert_allclose(shown, [weights[inside].sum(), macs[inside].sum()])


def test_layers_that_are_not_in_the_plan_are_float() -> None:
    costs = costs_of("digits")
    first = next(iter(costs.layers))
    above = plot_plan({first: "int8"}, costs).axes[0]
    assert [c.get_label() for c in above.containers] == ["int8", "fp32"]


def test_formats_look_different() -> None:
    formats = ["int8", "fp16", "fp32", "bf16", "fp8_e4m3", "int4", "int5"]
    for theme in ("light", "dark"):
        assert len({format_look(f, theme) for f in formats}) == len(formats)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["digits", "resnet101"])
def test_no_labels_overlap(name: str, theme: str) -> None:
    costs = costs_of(name)
    assert not overlapping(plot_plan(plan_of(costs), costs, theme=theme))
