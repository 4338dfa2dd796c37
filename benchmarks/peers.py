"""Other toolkits at the scheme of ptq_accuracy.py: pip install -e '.[benchmark]'."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lq.engines import open_engine

Predict = Callable[[Tensor], Tensor]


def run_all(model: Callable[[Tensor], Any], images: list[Tensor]) -> None:
    with torch.no_grad():
        for x in images:
            model(x)


def modelopt(
    model: nn.Module, images: list[Tensor], _folder: Path
) -> Iterator[tuple[str, Predict]]:
    """Give the model quantized by nvidia-modelopt."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.quantization import model_calib

    def quantized(calibrator: str, algorithm: str | None) -> nn.Module:
        config: Any = copy.deepcopy(mtq.INT8_DEFAULT_CFG)
        for entry in config["quant_cfg"]:
            if entry["quantizer_name"] == "*input_quantizer":
                entry["cfg"]["calibrator"] = calibrator
        config["algorithm"] = algorithm
        return mtq.quantize(copy.deepcopy(model), config, lambda net: run_all(net, images))

    for algorithm in ("max", "mse"):
        yield f"modelopt {algorithm}", quantized("max", algorithm)
    for method in ("entropy", "percentile", "mse"):
        net = quantized("histogram", None)
        model_calib.enable_stats_collection(net)
        run_all(net, images)
        for module in net.modules():
            calibrator = getattr(module, "_calibrator", None)
            if calibrator is not None and not module._disabled:
                keywords = {"method": method} if hasattr(calibrator, "_calib_hist") else {}
                module.load_calib_amax(**keywords)  # weights have no histogram
                module.enable_quant()
                module.disable_calib()
        yield f"modelopt histogram {method}", net


def onnxruntime(
    model: nn.Module, images: list[Tensor], folder: Path
) -> Iterator[tuple[str, Predict]]:
    """Give the file quantized by onnxruntime.quantization, inputs of Conv and Gemm only."""
    import onnxruntime as ort
    from onnxruntime import quantization as ortq
    from onnxruntime.quantization.shape_inference import quant_pre_process

    torch.onnx.export(
        model,
        (images[0],),
        folder / "float.onnx",
        dynamo=True,
        verbose=False,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
    )
    quant_pre_process(folder / "float.onnx", folder / "folded.onnx")

    name = ort.InferenceSession(folder / "folded.onnx").get_inputs()[0].name

    class Reader(ortq.CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            x = next(self.images, None)
            return None if x is None else {name: x.numpy()}

    for method in ("MinMax", "Entropy", "Percentile"):
        path = folder / f"ort_{method}.onnx"
        ortq.quantize_static(
            folder / "folded.onnx",
            path,
            Reader(),
            op_types_to_quantize=["Conv", "Gemm"],
            per_channel=True,
            calibrate_method=getattr(ortq.CalibrationMethod, method),
            extra_options={
                "ActivationSymmetric": True,
                "OpTypesToExcludeOutputQuantization": ["Conv", "Gemm"],
            },
        )
        runner = open_engine(path)
        yield f"onnxruntime {method.lower()}", lambda x, runner=runner: runner.run(x)[0]


def nncf(model: nn.Module, images: list[Tensor], _folder: Path) -> Iterator[tuple[str, Predict]]:
    """Give the model quantized by NNCF, which quantizes more operators, with bias correction."""
    import nncf

    schemes = {
        "symmetric": (nncf.QuantizationPreset.PERFORMANCE, True),
        "asymmetric activations": (nncf.QuantizationPreset.MIXED, True),
        "asymmetric, full bias correction": (nncf.QuantizationPreset.MIXED, False),
    }
    for name, (preset, fast) in schemes.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            net = nncf.quantize(
                copy.deepcopy(model),
                nncf.Dataset(images),
                preset=preset,
                fast_bias_correction=fast,
                subset_size=len(images),
            )
        yield f"nncf {name}", net


PEERS = (modelopt, onnxruntime, nncf)
