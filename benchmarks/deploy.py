"""Speed and accuracy of exported files, beside what other toolkits make of the same float file.

Ours in ONNX Runtime beside onnxruntime.quantization's fastest scheme, ours in OpenVINO beside
NNCF's, each with its engine's own float; FP16 beside INT8 in TensorRT where there is a GPU. What
runs in one engine is timed in turn, and ratios are of medians; beside ours to the peer's stand the
quartiles of the ratios in each round. Needs the extra: pip install -e '.[benchmark]'.

python benchmarks/deploy.py [--models resnet18 mobilenet_v2] [--batches 1 16] [--rounds 15]
                            [--threads 0]

MobileNetV2 has published ImageNet weights, where the shared data are there, and is measured for
accuracy on 500 photographs. There are none for ResNet-18: its weights are random, and of it only
the speed means anything.
"""

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import nncf
import numpy as np
import openvino
import torch
import torchvision
from onnxruntime import quantization
from onnxruntime.quantization.shape_inference import quant_pre_process
from qat_step import timed
from shared import CASES, FOLDER, batches
from torch import Tensor, nn

import lq
from lq.engines import Runner, cpu
from lq.engines.onnxruntime_runner import OnnxRuntimeRunner
from lq.engines.openvino_runner import OpenVINORunner
from lq.export.engine import find_builder

CALIBRATION_IMAGES = 64
Runners = dict[str, Runner]


class Images(quantization.CalibrationDataReader):
    """Calibration images, one at a time, as onnxruntime.quantization takes them."""

    def __init__(self, images: list[Tensor], name: str) -> None:
        self.feeds = iter([{name: image.numpy()} for image in images])

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next image, ``None`` after the last."""
        return next(self.feeds, None)


def subject(name: str) -> tuple[nn.Module, list[Tensor], object]:
    """Return a float model, images to calibrate it on, and labelled batches or ``None``."""
    case = CASES.get(f"{name}_imagenet")
    if case is not None and (FOLDER / "weights" / case.weights).is_file():
        data = batches(case.data("train", CALIBRATION_IMAGES), 1)
        return case.model(), [x for x, _ in data], batches(case.data("test"), 50)
    print(f"{name}: there are no real weights, so they are random and only the speed counts.")
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)()
    images = [torch.randn(1, 3, 224, 224) for _ in range(CALIBRATION_IMAGES)]
    with torch.no_grad():
        model.train()(torch.cat(images[:16]))  # statistics that go with the weights
    return model.eval(), images, None


def quantized(model: nn.Module, recipe: object, images: list[Tensor]) -> nn.Module:
    """Return a calibrated copy of a float model."""
    copied = lq.quantize(copy.deepcopy(model), recipe)
    return lq.calibrate(copied, images, progress=False)


def by_onnxruntime(source: Path, images: list[Tensor], folder: Path) -> Path:
    """Quantize a float file by onnxruntime.quantization, with uint8 activations: its fastest."""
    prepared, path = folder / "prepared.onnx", folder / "onnxruntime_quantization.onnx"
    quant_pre_process(source, prepared)
    name = OnnxRuntimeRunner(source).session.get_inputs()[0].name
    quantization.quantize_static(
        prepared,
        path,
        Images(images, name),
        per_channel=True,
        activation_type=quantization.QuantType.QUInt8,
        weight_type=quantization.QuantType.QInt8,
    )
    return path


def by_nncf(source: Path, images: list[Tensor], folder: Path) -> Path:
    """Quantize a float file by NNCF, for OpenVINO."""
    data = nncf.Dataset([image.numpy() for image in images])
    model = nncf.quantize(
        openvino.Core().read_model(source), data, subset_size=len(images), fast_bias_correction=True
    )
    path = folder / "nncf.xml"
    openvino.save_model(model, path, compress_to_fp16=False)
    return path


class IRRunner(OpenVINORunner):
    """A file in OpenVINO's own format, which NNCF writes."""

    def __init__(self, path: Path, threads: int) -> None:
        self.size_mb = path.with_suffix(".bin").stat().st_size / 1e6
        self._compile(path, "latency", threads, "fp32")


def on_cpu(model: nn.Module, images: list[Tensor], folder: Path, threads: int) -> Iterator[Runners]:
    """Yield what runs in ONNX Runtime and in OpenVINO: float first, then ours, then the peer's."""
    source = folder / "float.onnx"
    lq.export_onnx(model, images[0], source)
    for target in ("onnxruntime", "openvino"):
        ours = quantized(model, f"{target}_int8", images)
        report = lq.export_onnx(
            ours, images[0], folder / f"{target}.onnx", target, batches=images[:8]
        )
        print(f"lq for {target}: {report.summary()}")
    yield {
        name: OnnxRuntimeRunner(path, threads=threads)
        for name, path in (
            ("ONNX Runtime float", source),
            ("ONNX Runtime, lq", folder / "onnxruntime.onnx"),
            ("ONNX Runtime, its own", by_onnxruntime(source, images, folder)),
        )
    }
    runners: Runners = {
        "OpenVINO float": OpenVINORunner(source, threads=threads),
        "OpenVINO, lq": OpenVINORunner(folder / "openvino.onnx", threads=threads),
        "OpenVINO, NNCF": IRRunner(by_nncf(source, images, folder), threads),
    }
    if cpu.cpu_flags() & {"avx512_bf16", "amx_bf16"}:
        runners["OpenVINO bf16"] = OpenVINORunner(source, threads=threads, precision="bf16")
    yield runners


def on_gpu(model: nn.Module, images: list[Tensor], folder: Path) -> Iterator[Runners]:
    """Yield float, FP16 and INT8 engines, where there is a GPU and a builder."""
    if not torch.cuda.is_available() or find_builder() is None:
        print("There is no GPU or no TensorRT here: no engines.")
        return
    recipes = {"fp16": {"weights": "fp16", "inputs": "fp16"}, "int8": "tensorrt_int8"}
    models = {"float": model}
    models |= {name: quantized(model, recipe, images) for name, recipe in recipes.items()}
    runners: Runners = {}
    for name, each in models.items():
        lq.export_onnx(each, images[0], folder / f"{name}.onnx")
        info = lq.build_engine(folder / f"{name}.onnx", folder / f"{name}.engine")
        print(f"TensorRT {name}: {info.summary()}")
        runners[f"TensorRT {name}"] = lq.open_engine(folder / f"{name}.engine")
    yield runners


def once(runner: Runner, x: Tensor) -> Callable[[], None]:
    """Return one run, to the end."""

    def run() -> None:
        runner.run(x)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    return run


def measure(name: str, groups: list[Runners], sizes: list[int], rounds: int) -> None:
    """Print every runner's time beside its engine's float, each engine's timed in turn."""
    for size in sizes:
        x = torch.randn(size, 3, 224, 224)
        seconds: dict[str, list[float]] = {}
        for group in groups:  # apart, so that no engine's idle threads can slow another
            seconds |= timed({k: once(r, x) for k, r in group.items()}, rounds)
        times = {label: statistics.median(each) for label, each in seconds.items()}
        for group in groups:
            base = next(iter(group))
            for label in group:
                ratio = times[label] / times[base]
                print(f"{name} batch {size}: {label} {1e3 * times[label]:.2f} ms, {ratio:.3f}x")
        for ours, theirs in PAIRS.items():
            if ours in times:
                ratios = [a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
                low, _, high = statistics.quantiles(ratios)
                ratio = f"{times[ours] / times[theirs]:.3f} ({low:.3f} to {high:.3f})"
                print(f"{name} batch {size}: {ours} / {theirs} {ratio}")
        for label, faster in (
            ("TensorRT int8", "TensorRT fp16"),
            ("TensorRT int8", "TensorRT float"),
        ):
            if label in times and times[label] > times[faster]:
                print(f"WARNING: {label} loses to {faster} at batch {size}.")


PAIRS = {
    "ONNX Runtime, lq": "ONNX Runtime, its own",
    "OpenVINO, lq": "OpenVINO, NNCF",
    "TensorRT int8": "TensorRT fp16",
}
"""Ours and what it is to be no slower than."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet18", "mobilenet_v2"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0, help="0 leaves it to the engine")
    arguments = parser.parse_args()
    for name in arguments.models:
        model, images, test = subject(name)
        folder = Path(tempfile.mkdtemp())
        groups = [*on_cpu(model, images, folder, arguments.threads), *on_gpu(model, images, folder)]
        measure(name, groups, arguments.batches, arguments.rounds)
        for label, runner in (item for group in groups for item in group.items() if test):
            result = lq.evaluate(runner, test)
            print(f"{name}: {label} top-1 {result.top1:.1%} of {result.n}, {result.size_mb:.2f} MB")


if __name__ == "__main__":
    main()
