"""What DriftMonitor costs a run, as ratios to the runner alone, taken in turn in one process.

A shadow costs its own time in the batches that are sampled: one in `every`.
python benchmarks/drift.py [--rounds 200] [--batch 1] [--engine openvino]
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
import torchvision
from qat_step import timed

import lq

EVERY = 100


def fastest(times: list[float]) -> float:
    """Return the longest of the shortest tenth, which a busy machine moves least."""
    return statistics.quantiles(times, n=10)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--engine", default="openvino", choices=["openvino", "onnxruntime"])
    given = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(given.batch, 3, 224, 224).clamp(-2.1, 2.6)
    model = torchvision.models.resnet18().eval()
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in ("int8", "float")}
        lq.export_onnx(model, x, paths["float"])
        quantized = lq.calibrate(lq.quantize(model, "tensorrt_int8"), [x], progress=False)
        lq.export_onnx(quantized, x, paths["int8"], target=given.engine)
        runner = lq.open_engine(paths["int8"], given.engine)
        shadow = lq.open_engine(paths["float"], given.engine)
        silent = {"engine": given.engine, "on_drift": lambda drift: None}
        monitor = lq.DriftMonitor(paths["int8"], **silent)
        compares = lq.DriftMonitor(paths["int8"], **silent, shadow=shadow, every=1)
        bright = x * 1.5
        times = timed(
            {
                "alone": lambda: runner.run(x),
                "monitored": lambda: monitor.run(x),
                "alone, brighter": lambda: runner.run(bright),
                "monitored, brighter": lambda: monitor.run(bright),
                "with shadow": lambda: compares.run(x),
            },
            given.rounds,
        )
    pairs = {
        "data within the range": ("monitored", "alone"),
        "data beyond the range": ("monitored, brighter", "alone, brighter"),
        "a sampled batch, with a float shadow": ("with shadow", "alone"),
    }
    alone = 1000 * statistics.median(times["alone"])
    print(f"resnet18, batch {given.batch} at 224, {runner.name}: {alone:.2f} ms")
    for title, (name, base) in pairs.items():
        each = [t / b for t, b in zip(times[name], times[base], strict=True)]
        low, middle, high = statistics.quantiles(each, n=4)
        quick = fastest(times[name]) / fastest(times[base])
        print(f"  {title:38s} {middle:.3f}x ({low:.3f}-{high:.3f}), fastest tenth {quick:.3f}x")
    sampled = fastest(times["with shadow"]) / fastest(times["monitored"]) - 1
    print(f"  a shadow of one batch in {EVERY}: {sampled / EVERY:+.2%} on average")


if __name__ == "__main__":
    main()
