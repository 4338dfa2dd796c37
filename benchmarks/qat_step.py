"""What fake quantization costs a training step and an evaluation, as ratios to fp32.

Time: interleaved in one run, medians with quartiles of the ratio in each round. Memory: tensors
alive at most during a step, weights and gradients included, as the profiler of torch counts them.
python benchmarks/qat_step.py [--model resnet18] [--rounds 12] [--no-peers] [--device cuda]
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import Tensor, nn

import lq
from lq.qat import save_memory

LEARNED = {
    "weights": {"format": "int8", "range": "lsq"},
    "inputs": {"format": "int8", "range": "lsq"},
}
LAYERS_ONLY = {"residual": None}
"""What the peers quantize: weights and inputs of layers, no additions."""
Run = Callable[[], None]


def step(model: nn.Module, x: Tensor, target: Tensor, autocast: bool = False) -> Run:
    """Return a training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        finish(x)

    return run


def evaluation(model: nn.Module, x: Tensor) -> Run:
    """Return a forward pass in eval mode."""
    model = copy.deepcopy(model).eval()

    def run() -> None:
        with torch.no_grad():
            model(x)
        finish(x)

    return run


def finish(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


def timed(runs: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each run in every round, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 2):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            if i >= 2:
                times[name].append(time.perf_counter() - started)
    return times


def quantized(model: nn.Module, recipe: object, x: Tensor) -> nn.Module:
    model = lq.quantize(copy.deepcopy(model), recipe)
    return lq.calibrate(model, [x], progress=False)


def by_modelopt(model: nn.Module, x: Tensor) -> nn.Module:
    import modelopt.torch.quantization as mtq

    return mtq.quantize(copy.deepcopy(model), mtq.INT8_DEFAULT_CFG, lambda net: net(x))


def models(model: nn.Module, x: Tensor, peers: bool) -> dict[str, nn.Module]:
    """Return the float model and what quantization makes of it, by name."""
    found = {
        "fp32": model,
        "lq": quantized(model, LAYERS_ONLY, x),
        "lq, with additions": quantized(model, "tensorrt_int8", x),
        "lq, learned scales": quantized(model, LEARNED | LAYERS_ONLY, x),
        "lq, memory saved": quantized(model, LAYERS_ONLY, x),
    }
    save_memory(found["lq, memory saved"])
    if peers:
        found["modelopt"] = by_modelopt(model, x)
    return {name: net.train() for name, net in found.items()}


def inputs(name: str, device: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    x, target = torch.randn(16, 3, 112, 112), torch.randint(0, 1000, (16,))
    model = getattr(torchvision.models, name)().train()
    return model.to(device), x.to(device), target.to(device)


def print_ratios(title: str, runs: dict[str, Run], rounds: int) -> None:
    times = timed(runs, rounds)
    base = times["fp32"]
    print(f"{title}: fp32 {1000 * statistics.median(base):.1f} ms")
    for name in list(times)[1:]:
        ratio = statistics.median(times[name]) / statistics.median(base)
        each = [t / b for t, b in zip(times[name], base, strict=True)]
        low, _, high = statistics.quantiles(each, n=4)
        print(f"  {name:28s} {ratio:.2f}x ({low:.2f}-{high:.2f})")


def peak_mb(model: nn.Module, run: Run) -> float:
    """Return the megabytes of tensors alive at most during a step: weights, gradients, and all."""
    run()  # so that gradients are there, as before any other step
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    level = highest = 0
    for _, change in sorted(changes):
        level += change
        highest = max(highest, level)
    held = [*model.parameters(), *model.buffers()]
    held += [p.grad for p in model.parameters() if p.grad is not None]
    return (highest + sum(t.numel() * t.element_size() for t in held)) / 1e6


def print_memory(title: str, nets: dict[str, nn.Module], steps: dict[str, Run]) -> None:
    found = {name: peak_mb(net, steps[name]) for name, net in nets.items()}
    print(f"{title}, peak memory of a training step: fp32 {found['fp32']:.0f} MB")
    for name in list(found)[1:]:
        print(f"  {name:28s} {found[name] / found['fp32']:.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18", choices=["resnet18", "mobilenet_v2"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    arguments = parser.parse_args()
    model, x, target = inputs(arguments.model, arguments.device)
    nets = models(model, x, arguments.peers)
    title = f"{arguments.model}, batch 16 at 112, {arguments.device}"
    steps = {name: step(net, x, target) for name, net in nets.items()}
    print_ratios(f"{title}, training step", steps, arguments.rounds)
    if arguments.device == "cuda":
        mixed = {name: step(net, x, target, autocast=True) for name, net in nets.items()}
        print_ratios(f"{title}, training step, bf16-mixed", mixed, arguments.rounds)
    evaluations = {name: evaluation(net, x) for name, net in nets.items()}
    print_ratios(f"{title}, evaluation", evaluations, arguments.rounds)
    if arguments.device == "cpu":
        print_memory(title, nets, steps)


if __name__ == "__main__":
    main()
