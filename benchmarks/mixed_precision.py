"""Accuracy drop against size: the search's plans beside random ones, heuristics and modelopt.

python benchmarks/mixed_precision.py [--case efficientnet_lite0 ...] [--images 500] [--no-peers]

Without the data, or with --digits, on handwritten digits: there all 3^5 plans of a small net are
measured too, and the search's plan is compared with the best of them.
Weights per channel, inputs per tensor, symmetric, ranges by max from 256 training images; the
sweep sees training images alone. On test images: the paired drop of top-1 with its 95% interval,
the share of predictions that stay, and the KL divergence from the float model's.
"""

import argparse
import copy
import dataclasses
import itertools
import random
import time
from collections.abc import Iterator, Mapping

import torch
from shared import CASES, FOLDER, batches, trained_digits
from torch import Tensor, nn
from torch.utils.data import Subset

import lq
from lq.costs import Costs, count_costs
from lq.data import DigitsDataModule
from lq.mixed_precision import (
    Drop,
    PrecisionConstraints,
    paired_drop,
    pareto_front,
    search,
    verified_search,
)
from lq.plan import PrecisionPlan
from lq.sensitivity import Sensitivity

RECIPE = lq.Recipe(residual=None)  # as the other toolkit is asked to
FORMATS = ("int8", "fp16")
CALIBRATION, RANDOM = 256, 5
Batches = list[tuple[Tensor, Tensor]]


class Bench:
    """A float model with its data, and what plans make of it.

    Args:
        model: The float model.
        calibration: Batches of training images, to find ranges from.
        test: Batches to measure on.
    """

    def __init__(self, model: nn.Module, calibration: Batches, test: Batches) -> None:
        self.model, self.calibration, self.test = model, calibration, test
        self.costs = count_costs(model, calibration[0])
        self.labels = torch.cat([labels for _, labels in test])
        self.logits = self.predictions(model)

    def predictions(self, model: nn.Module) -> Tensor:
        """Return the logits of all test images."""
        with torch.no_grad():
            return torch.cat([model(images) for images, _ in self.test]).double()

    def applied(self, plan: Mapping[str, str]) -> nn.Module:
        """Return the model with a plan, calibrated."""
        model = lq.quantize(copy.deepcopy(self.model), lq.Recipe.from_plan(plan, RECIPE))
        if any(format != "fp32" for format in plan.values()):
            lq.calibrate(model, self.calibration, progress=False)
        return model

    def right(self, logits: Tensor) -> Tensor:
        """Return which images are predicted right."""
        return logits.argmax(1) == self.labels

    def divergences(self, logits: Tensor) -> Tensor:
        """Return ``KL(float || changed)`` of each image."""
        wanted, got = (x.log_softmax(1) for x in (self.logits, logits))
        return (wanted.exp() * (wanted - got)).sum(1)

    def row(self, name: str, plan: Mapping[str, str], predicted: float | None = None) -> Drop:
        """Print and return what a plan costs and loses."""
        return self.show(name, plan, self.predictions(self.applied(plan)), predicted)

    def show(
        self, name: str, plan: Mapping[str, str], logits: Tensor, predicted: float | None = None
    ) -> Drop:
        """Print and return what a model that follows a plan loses."""
        size = self.costs.total("size_mb", plan)
        full = self.costs.total("size_mb", dict.fromkeys(self.costs.layers, "int8"))
        drop = paired_drop(self.right(self.logits), self.right(logits))
        same = (logits.argmax(1) == self.logits.argmax(1)).double().mean()
        cells = [
            f"{name:38s} {size:7.3f} {size / full - 1:+7.1%}",
            f"{effective_bits(self.costs, plan):6.2f}",
            f"{self.costs.total('bitops', plan) / 1e9:8.2f}",
            " " * 8 if predicted is None else f"{100 * predicted:8.2f}",
            f"{100 * drop.mean:+7.2f} [{100 * drop.low:+6.2f}, {100 * drop.high:+6.2f}]",
            f"{same:7.2%} {float(self.divergences(logits).mean()):8.5f}",
        ]
        print(*cells, flush=True)
        return drop


HEADER = (
    f"{'':38s} {'MB':>7s} {'to int8':>7s} {'bits':>6s} {'G bitops':>8s} {'foreseen':>8s} "
    f"{'drop':>7s} {'95%, points':>16s} {'agree':>7s} {'KL':>8s}"
)


def effective_bits(costs: Costs, plan: Mapping[str, str]) -> float:
    """Return the mean bits of a weight."""
    bits = {"int8": 8, "fp16": 16, "fp32": 32, "int4": 4}
    weights = {name: counted.weights for name, counted in costs.layers.items()}
    total = sum(n * bits[plan.get(name, "fp32")] for name, n in weights.items())
    return total / sum(weights.values())


def heuristics(costs: Costs, limit_mb: float) -> Iterator[tuple[str, dict[str, str]]]:
    """Give int8 plans with some layers in fp16, most of them up to a limit on the size."""
    layers = list(costs.layers)
    int8 = dict.fromkeys(layers, "int8")
    yield "first layer fp16", int8 | {layers[0]: "fp16"}
    yield "first and last layer fp16", int8 | {layers[0]: "fp16", layers[-1]: "fp16"}
    order = sorted(layers, key=lambda name: costs.layers[name].weights)
    yield "smallest layers fp16, up to the limit", filled(costs, int8, order, limit_mb)
    yield "first layers fp16, up to the limit", filled(costs, int8, layers, limit_mb)
    for seed in range(RANDOM):
        shuffled = random.Random(seed).sample(layers, len(layers))
        yield f"random, up to the limit, seed {seed}", filled(costs, int8, shuffled, limit_mb)


def filled(costs: Costs, plan: dict[str, str], order: list[str], limit_mb: float) -> dict[str, str]:
    """Return a plan with layers in fp16 in some order, as long as they fit."""
    for name in order:
        more = plan | {name: "fp16"}
        plan = more if costs.total("size_mb", more) <= limit_mb else plan
    return plan


def modelopt_plan(bench: Bench, bits: float) -> tuple[dict[str, str], nn.Module]:
    """Return what nvidia-modelopt's search chooses at so many effective bits, and its model."""
    import modelopt.torch.quantization as mtq

    model, _ = mtq.auto_quantize(
        copy.deepcopy(bench.model),
        constraints={"effective_bits": bits},
        quantization_formats=[mtq.INT8_DEFAULT_CFG],
        data_loader=bench.calibration,
        forward_step=lambda net, batch: net(batch[0]),
        loss_func=lambda output, batch: nn.functional.cross_entropy(output, batch[1]),
        num_calib_steps=len(bench.calibration),
        num_score_steps=len(bench.calibration),
    )
    modules = dict(model.named_modules())
    # It has no quantizers for classes that derive from torch's, such as timm's padded convolution.
    found = {name: getattr(modules[name], "weight_quantizer", None) for name in bench.costs.layers}
    plan = {name: "int8" if q is not None and q.is_enabled else "fp16" for name, q in found.items()}
    return plan, model


def compare(bench: Bench, found: Sensitivity, peers: bool) -> None:
    """Print the table of one model."""
    costs, layers = bench.costs, list(bench.costs.layers)
    right = bench.right(bench.logits)
    print(f"float top-1 {right.double().mean():.2%} of {len(right)} images\n{HEADER}")
    int8 = bench.row("all int8", dict.fromkeys(layers, "int8"))
    limit = 1.1 * costs.total("size_mb", dict.fromkeys(layers, "int8"))
    bench.row("all fp16", dict.fromkeys(layers, "fp16"))
    plan = search(found, PrecisionConstraints(max_size_mb=limit), costs)
    ours = bench.row("search, int8 size + 10%", plan, plan.predicted.drop)
    by_top1 = dataclasses.replace(found, metric="top1")
    other = search(by_top1, PrecisionConstraints(max_size_mb=limit), costs)
    bench.row("  by the sweep's top-1, not its KL", other, other.predicted.drop)
    if peers:
        bits = effective_bits(costs, plan)
        started = time.perf_counter()
        theirs, model = modelopt_plan(bench, bits)
        took = time.perf_counter() - started
        bench.show(f"modelopt auto_quantize at {bits:.2f} bits", theirs, bench.predictions(model))
        bench.row("  its plan, by lq", theirs)
    for name, other in heuristics(costs, limit):
        bench.row(name, other)
    for point in pareto_front(found, costs, points=6, formats=FORMATS):
        bench.row("Pareto front", point, point.predicted.drop)
    if peers:
        print(f"modelopt took {took:.0f} s, its calibration included")
    share = f"{ours.mean / int8.mean:.0%}" if int8.mean > 0 else "no part"
    print(f"the search's plan has {share} of the drop of full int8\n")


def published(case_name: str, count: int, images: int) -> tuple[Bench, Sensitivity]:
    """Return a model of real images, and its sweep on `count` training images."""
    case = CASES[case_name]
    train = case.data("train", max(count, CALIBRATION))
    calibration = list(batches(Subset(train, range(CALIBRATION)), 32))
    swept = list(batches(Subset(train, range(count)), 32))
    bench = Bench(case.model(), calibration, list(batches(case.data("test", images), 50)))
    started = time.perf_counter()
    found = lq.sweep(
        bench.model,
        swept,
        FORMATS,
        metric="kl",
        recipe=RECIPE,
        calibration=calibration,
        progress=False,
    )
    print(f"{case_name}: swept {count} images in {time.perf_counter() - started:.0f} s")
    return bench, found


def digits(formats: tuple[str, ...] = ("int8", "int4")) -> tuple[Bench, Sensitivity]:
    """Return a small net trained on handwritten digits, and its sweep."""
    data = DigitsDataModule(batch_size=64)
    model = trained_digits(data, epochs=4)
    calibration = list(data.calibration_dataloader())
    test = [*data.val_dataloader(), *data.test_dataloader()]
    bench = Bench(model, calibration, test)
    found = lq.sweep(model, calibration, formats, metric="kl", recipe=RECIPE, progress=False)
    return bench, found


def enumerate_plans(bench: Bench, found: Sensitivity) -> None:
    """Measure all plans of a small net, and say where the search's stand among them."""
    formats, layers = ("fp32", *found.formats), list(bench.costs.layers)
    plans = [
        PrecisionPlan(dict(zip(layers, chosen, strict=True)))
        for chosen in itertools.product(formats, repeat=len(layers))
    ]
    logits = {plan: bench.predictions(bench.applied(plan)) for plan in plans}
    sizes = {plan: bench.costs.total("size_mb", plan) for plan in plans}
    least, most = min(sizes.values()), max(sizes.values())
    print(f"\nAll {len(plans)} plans of {', '.join(formats)} for {len(layers)} layers, measured:")
    for share in (0.05, 0.1, 0.2, 0.3, 0.5):
        limit = least + share * (most - least)
        fitting = [plan for plan in plans if sizes[plan] <= limit]
        plan = search(found, PrecisionConstraints(max_size_mb=limit), bench.costs)
        ours = next(p for p in plans if p == plan)
        best = max(fitting, key=lambda p: int(bench.right(logits[p]).sum()))
        behind = paired_drop(bench.right(logits[best]), bench.right(logits[ours]))
        kl = {p: float(bench.divergences(logits[p]).mean()) for p in fitting}
        place = 1 + sum(value < kl[ours] for value in kl.values())
        print(
            f"up to {limit:.4f} MB, {len(fitting)} plans: least KL {min(kl.values()):.6f}, the "
            f"search's {kl[ours]:.6f} (place {place}); top-1 behind the best by {behind.mean:.2%} "
            f"[{behind.low:+.2%}, {behind.high:+.2%}]"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    cases = ["mobilenet_v2_cifar", "efficientnet_lite0"]
    parser.add_argument("--case", nargs="*", default=cases, choices=list(CASES))
    parser.add_argument("--sweep", type=int, default=256, help="training images of the sweep")
    parser.add_argument("--images", type=int, default=500, help="test images")
    parser.add_argument("--digits", action="store_true")
    parser.add_argument("--no-peers", action="store_true")
    arguments = parser.parse_args()
    if arguments.digits or not FOLDER.is_dir():
        bench, found = digits(FORMATS)
        compare(bench, found, not arguments.no_peers)
        constraints = PrecisionConstraints(max_accuracy_drop=0.01)
        print(
            "Verified:",
            verified_search(
                bench.model, found, constraints, bench.calibration, bench.test, bench.costs, RECIPE
            ),
        )
        enumerate_plans(*digits())
        return
    for name in arguments.case:
        compare(*published(name, arguments.sweep, arguments.images), not arguments.no_peers)


if __name__ == "__main__":
    main()
