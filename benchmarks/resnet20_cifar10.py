"""ResNet-20 on CIFAR-10 from float to INT8 file: accuracy, agreement, size.

python benchmarks/resnet20_cifar10.py [--epochs 1]
"""

import argparse
import copy
import tempfile
from pathlib import Path

import lightning as L
import torch
from shared import batches, cifar10, require_data
from torch.utils.data import Subset

import lq
from lq.callbacks import QuantizationAwareTraining
from lq.checkpoint import read_weights
from lq.evaluation import comparison_table
from lq.models import resnet20


def agreement(model: torch.nn.Module, other: torch.nn.Module, data: object) -> float:
    """Return the share of images on which two models predict the same class."""
    with torch.no_grad():
        same = [(model(x).argmax(1) == other(x).argmax(1)).float() for x, _ in data]
    return float(torch.cat(same).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=1, help="epochs of QAT")
    epochs = parser.parse_args().epochs
    weights = read_weights(require_data() / "weights" / "resnet20_cifar10.safetensors")
    train, test = cifar10("train"), batches(cifar10("test"))
    L.seed_everything(0)
    reference = resnet20()
    reference.load_state_dict(weights)
    reference.eval()
    folder = Path(tempfile.mkdtemp())
    rows = {"float": lq.evaluate(reference, test)}
    lq.export_onnx(reference, next(iter(test)), folder / "float.onnx")
    rows["float file"] = lq.evaluate(folder / "float.onnx", test)
    calibration = batches(Subset(train, range(256)))
    agreements = {}
    for calibrator in ("max", "percentile"):
        model = lq.quantize(copy.deepcopy(reference), "tensorrt_int8")
        lq.calibrate(model, calibration, calibrator)
        rows[f"PTQ {calibrator}"] = lq.evaluate(model, test)
        agreements[f"PTQ {calibrator}"] = agreement(reference, model, test)
    module = lq.QuantModule(
        copy.deepcopy(reference),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3, momentum=0.9),
    )
    L.Trainer(
        max_epochs=epochs,
        logger=False,
        enable_checkpointing=False,
        callbacks=[QuantizationAwareTraining(calibration_batches=8, calibrator="percentile")],
    ).fit(module, batches(train, shuffle=True))
    rows["QAT"] = lq.evaluate(module.model, test)
    agreements["QAT"] = agreement(reference, module.model.eval(), test)
    report = lq.export_onnx(
        module.model, next(iter(test)), folder / "qat.onnx", batches=[b for b in test][:8]
    )
    rows["INT8 file"] = lq.evaluate(folder / "qat.onnx", test)
    print(comparison_table(rows))
    for name, share in agreements.items():
        print(f"{name}: agrees with float on {share:.2%} of images")
    print(f"QAT of {epochs} epoch(s), no augmentation; parity: {report.summary()}")


if __name__ == "__main__":
    main()
