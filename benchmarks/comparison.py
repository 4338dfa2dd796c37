"""Methods of lq and files of other toolkits, compared on real images; writes the report.

python benchmarks/comparison.py [--model resnet20|mobilenet_v2_cifar|efficientnet_lite0|...]
    [--images 5000] [--epochs 1] [--target onnxruntime|openvino] [--folder comparison]

Times are ratios to the float file, run in turn. A run that was killed goes on. The files of ONNX
Runtime's and NNCF's own quantization are at their best scheme for CPUs; they are left out where
these are not installed: pip install -e '.[benchmark]'.
"""

import argparse
from pathlib import Path

import lightning as L
import torch
from deploy import by_onnxruntime
from shared import CASES, batches
from torch import nn
from torch.utils.data import Subset

import lq
from lq.callbacks.fine_tuning import fine_tune
from lq.comparison import default_methods
from lq.report import recommend, write_report

CALIBRATION, HELD_OUT, TRAINING = 256, 1000, 20_000
"""Training images for ranges, for choices, and for QAT."""
OPTIMIZER = {"lr": 1e-3, "momentum": 0.9}


class Images(L.LightningDataModule):
    """Training images for QAT."""

    def __init__(self, images: object) -> None:
        super().__init__()
        self.images = images

    def train_dataloader(self) -> object:
        """Return them in random order."""
        return batches(self.images, shuffle=True)


def by_nncf(source: Path, images: list, folder: Path) -> Path:
    """Quantize a float file by NNCF, for ONNX Runtime."""
    import nncf
    import onnx

    name = lq.open_engine(source).session.get_inputs()[0].name
    data = nncf.Dataset(images, lambda x: {name: x.numpy()})
    path = folder / "nncf.onnx"
    onnx.save(nncf.quantize(onnx.load(source), data, subset_size=len(images)), path)
    return path


def theirs(model: nn.Module, images: list, folder: Path) -> dict[str, lq.Method]:
    """Return the files of other toolkits, as methods."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "float.onnx"
    lq.export_onnx(model, images[0], source, "onnxruntime")
    found = {}
    for name, make in (("ONNX Runtime's own", by_onnxruntime), ("NNCF", by_nncf)):
        try:
            found[name] = lq.Method("file", path=str(make(source, images, folder)))
        except ImportError as error:
            print(f"{name} left out: {error}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=CASES, default="resnet20")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--target", choices=["onnxruntime", "openvino"], default="onnxruntime")
    parser.add_argument("--folder", type=Path, default=Path("comparison"))
    given = parser.parse_args()
    case = CASES[given.model]
    model, train = case.model(), case.data("train")
    test = case.data("test")
    test = batches(Subset(test, range(min(given.images, len(test)))))
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = order[CALIBRATION : CALIBRATION + HELD_OUT]
    calibration = list(batches(Subset(train, order[:CALIBRATION]), 32))

    def tune(net: nn.Module, epochs: int, folder: Path) -> list[dict[str, float]]:
        L.seed_everything(0)
        module = lq.QuantModule(
            case.model(), optimizer=lambda parameters: torch.optim.SGD(parameters, **OPTIMIZER)
        )
        images = Images(Subset(train, order[CALIBRATION + HELD_OUT :][:TRAINING]))
        return fine_tune(module, net, epochs, images, "cpu", folder=folder)

    methods = default_methods(given.target, trains=True)
    methods["QAT"] = lq.Method("qat", calibrator="auto", epochs=given.epochs)
    images = [x for x, _ in calibration]
    found = lq.compare(
        model,
        calibration,
        batches(Subset(train, held_out)),
        test,
        {**methods, **theirs(model, images, given.folder / "theirs")},
        given.folder,
        target=given.target,
        train=tune,
        training=str(OPTIMIZER),
        batch_sizes=(1, 16),
        threads=(1,),
        data=f"{case.images.__name__} images",
        name=given.model,
    )
    print(found.table())
    print("\n".join(f"- {advice}" for advice in recommend(found)))
    print(f"Report: {write_report(found, given.folder)}")


if __name__ == "__main__":
    main()
