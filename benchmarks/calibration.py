"""What calibration costs, as ratios to plain forward passes over the same batches, beside peers.

Interleaved in one run, medians; peak memory in processes of their own.
python benchmarks/calibration.py [--model resnet18] [--rounds 5] [--no-peers]
"""

import argparse
import copy
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

import lq
from lq.calibrators import CALIBRATORS
from lq.collector import RangeCollector, weight_candidates
from lq.modes import eval_mode, quantizer_mode
from lq.surgery import quantized_layers, quantizers

BATCHES, SIZE = 10, 32
ONCE = "(one run)"
"""What takes minutes is timed once."""


def passes(model: torch.nn.Module, batches: list[torch.Tensor]) -> None:
    with eval_mode(model):
        for x in batches:
            model(x)


def collected(
    model: torch.nn.Module, batches: list[torch.Tensor], calibrator: str, subsample: bool = True
) -> RangeCollector:
    """Collect what a calibrator needs; ``entropy`` needs what all four do."""
    collector = RangeCollector(model, calibrator, subsample)
    collector.start()
    passes(model, batches)
    collector.abort()
    return collector


def ranges(collector: RangeCollector, name: str) -> dict[str, float]:
    found, calibrator = quantizers(collector.model), CALIBRATORS[name]
    return {
        q: float(calibrator.amax(observer, found[q].spec))
        for q, observer in collector.observers.items()
    }


def compute(collector: RangeCollector) -> None:
    """Find the ranges of all quantizers, weights too, by all four calibrators."""
    for name in CALIBRATORS:
        ranges(collector, name)
    weight_candidates(collector.model, ["max", "mse"])


def modelopt_runs(
    model: torch.nn.Module, batches: list[torch.Tensor]
) -> dict[str, Callable[[], None]]:
    """Return modelopt's collecting for max and for histograms, and its entropy search."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization import model_calib

    def quantized(calibrator: str) -> torch.nn.Module:
        config: Any = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
        for entry in config["quant_cfg"]:
            if entry["quantizer_name"] == "*input_quantizer":
                entry["cfg"]["calibrator"] = calibrator
        config["algorithm"] = None
        return mtq.quantize(copy.deepcopy(model), config)

    def collecting(net: torch.nn.Module) -> Callable[[], None]:
        def run() -> None:
            model_calib.enable_stats_collection(net)
            passes(net, batches)

        return run

    def entropy() -> None:
        for name, module in nets["histogram"].named_modules():
            if name.endswith("input_quantizer") and getattr(module, "_calibrator", None):
                module._calibrator.compute_amax("entropy")

    nets = {calibrator: quantized(calibrator) for calibrator in ("max", "histogram")}
    runs = {f"modelopt {c}: collect": collecting(net) for c, net in nets.items()}
    return runs | {f"modelopt entropy: ranges {ONCE}": entropy}


def onnxruntime_runs(
    model: torch.nn.Module, batches: list[torch.Tensor]
) -> dict[str, Callable[[], None]]:
    """Return plain runs of ONNX Runtime, and its min-max and entropy calibration."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, calibrate

    folder = Path(tempfile.mkdtemp())
    lq.export_onnx(model, batches[0][:2], folder / "model.onnx", dynamic_batch=True)
    session = ort.InferenceSession(folder / "model.onnx")
    name = session.get_inputs()[0].name

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, np.ndarray] | None:
            x = next(self.batches, None)
            return None if x is None else {name: x.numpy()}

    def run() -> None:
        for x in batches:
            session.run(None, {name: x.numpy()})

    def calibrating(method: Any) -> Callable[[], None]:
        def run() -> None:
            calibrator = calibrate.create_calibrator(
                folder / "model.onnx", ["Conv", "Gemm"], str(folder / "x.onnx"), method
            )
            calibrator.collect_data(Reader())
            calibrator.compute_data()

        return run

    return {
        "onnxruntime: plain": run,
        "onnxruntime minmax: all": calibrating(CalibrationMethod.MinMax),
    }


def medians(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each run, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            if i and name.endswith(ONCE):
                continue
            started = time.perf_counter()
            run()
            if i or name.endswith(ONCE):
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def returned_bytes(model: torch.nn.Module, batch: torch.Tensor) -> int:
    """Return the size of everything that the layers return for a batch."""
    sizes = []
    hooks = [
        layer.register_forward_hook(lambda _m, _a, y: sizes.append(y.numel() * y.element_size()))
        for layer in model.modules()
        if not [*layer.children()]
    ]
    passes(model, [batch])
    for hook in hooks:
        hook.remove()
    return sum(sizes)


def peak_mb(arguments: argparse.Namespace, what: str, count: int) -> float:
    """Return the peak memory of a process that runs some batches, collecting or not."""
    command = [sys.executable, __file__, "--peak", what, str(count), "--model", arguments.model]
    command += ["--size", str(arguments.size)]
    # Large blocks go back at once, so that the peak is that of what is in use.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(found.stdout)


def memory(arguments: argparse.Namespace, model: torch.nn.Module, batch: torch.Tensor) -> None:
    activations = returned_bytes(model, batch) / 1e6
    print(f"layers return {activations:.0f} MB for a batch of {SIZE}")
    for count in (2, BATCHES):
        plain, collecting = (peak_mb(arguments, what, count) for what in ("plain", "collect"))
        extra = collecting - plain
        print(f"peak while collecting {count} batches: {extra:+.1f} MB, {extra / activations:.2%}")


def print_peak(net: torch.nn.Module, batches: list[torch.Tensor], what: str) -> None:
    if what == "collect":
        kept = collected(net, batches, "entropy")
        assert kept.observers
    else:
        with quantizer_mode(net, lq.Mode.BYPASS):
            passes(net, batches)
    status = Path("/proc/self/status").read_text()  # getrusage would count the parent process
    print(int(status.split("VmHWM:")[1].split()[0]) / 1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18", choices=["resnet18", "mobilenet_v2"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model = getattr(torchvision.models, arguments.model)().eval()
    generator = torch.Generator().manual_seed(0)
    batches = [
        torch.randn(SIZE, 3, arguments.size, arguments.size, generator=generator)
        for _ in range(int(arguments.peak[1]) if arguments.peak else BATCHES)
    ]
    net = lq.quantize(copy.deepcopy(model), "tensorrt_int8")
    if arguments.peak:
        return print_peak(net, batches, arguments.peak[0])
    ready = collected(net, batches[:2], "entropy")
    runs: dict[str, Callable[[], Any]] = {
        "plain": lambda: passes(model, batches),
        "lq max: collect": lambda: collected(net, batches, "max"),
        "lq all four: collect": lambda: collected(net, batches, "entropy"),
        "lq all four: ranges": lambda: compute(ready),
    }
    if not arguments.no_peers:
        runs |= modelopt_runs(model, batches) | onnxruntime_runs(model, batches)
    found = medians(runs, arguments.rounds)
    print(f"{arguments.model}, {BATCHES} batches of {SIZE}, {len(quantized_layers(net))} layers")
    for name, seconds in found.items():
        unit = "onnxruntime: plain" if name.startswith("onnxruntime") else "plain"
        print(f"{name:36s} {seconds:7.2f} s  {seconds / found[unit]:6.3f} of {unit}")
    memory(arguments, model, batches[0])
    sampled, whole = (collected(net, batches, "entropy", s) for s in (True, False))
    for name in CALIBRATORS:
        pairs = zip(ranges(sampled, name).values(), ranges(whole, name).values(), strict=True)
        worst = max(abs(a / b - 1) for a, b in pairs)
        print(f"{name}: ranges with and without sub-sampling differ by at most {worst:.2%}")


if __name__ == "__main__":
    main()
