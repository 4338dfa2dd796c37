"""What fake quantization costs a training step and an evaluation, as ratios to fp32.

Interleaved in one run, medians. python benchmarks/qat_step.py [--model resnet18] [--rounds 12]
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import nn

import lq


def native(x, scale, qmin, qmax, axis=None):
    """Torch's own operators, which the library uses on CUDA."""
    return lq.functional._native(x, scale, int(qmin), int(qmax), axis)


def step(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> Callable[[], None]:
    """Return a training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    return run


def evaluation(model: nn.Module, x: torch.Tensor) -> Callable[[], None]:
    """Return a forward pass in eval mode."""
    model = copy.deepcopy(model).eval()

    def run() -> None:
        with torch.no_grad():
            model(x)

    return run


def medians(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each run, taken in turn."""
    return {name: statistics.median(seconds) for name, seconds in timed(runs, rounds).items()}


def timed(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each run in every round, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 2):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if i >= 2:
                times[name].append(time.perf_counter() - started)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18", choices=["resnet18", "mobilenet_v2"])
    parser.add_argument("--rounds", type=int, default=12)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    x, target = torch.randn(16, 3, 112, 112), torch.randint(0, 1000, (16,))
    model = getattr(torchvision.models, arguments.model)().train()
    quantized = lq.quantize(copy.deepcopy(model), "tensorrt_int8")
    lq.calibrate(quantized, [x], progress=False)
    for name, runs in (
        ("training step", {"fp32": step(model, x, target), "lq": step(quantized, x, target)}),
        ("evaluation", {"fp32": evaluation(model, x), "lq": evaluation(quantized, x)}),
    ):
        found = medians(runs, arguments.rounds)
        ratio = found["lq"] / found["fp32"]
        print(f"{arguments.model} {name}: fp32 {found['fp32']:.3f} s, lq {ratio:.2f}x")
    codes = torch.randn(16, 64, 56, 56, requires_grad=True)
    scale = torch.tensor(0.02)

    def both_ways(function: Callable) -> Callable[[], None]:
        return lambda: function(codes, scale, -128, 127).sum().backward()

    runs = {"lq": both_ways(lq.functional.fake_quantize), "torch": both_ways(native)}
    found = medians(runs, arguments.rounds)
    print(f"one activation, forward and backward: torch {found['torch'] / found['lq']:.2f}x of lq")


if __name__ == "__main__":
    main()
