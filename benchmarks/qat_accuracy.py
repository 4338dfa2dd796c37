"""Quantization-aware training on real images: float, PTQ and QAT, row by row.

Each row trains from the published float weights with its own float model as teacher, and is
measured on images it has not seen, paired with the float model: difference of top-1 with its 95 %
interval.
Rows that are done are read from the folder; a row that was interrupted goes on at its last epoch.
python benchmarks/qat_accuracy.py [--rows resnet20-w4a4 ...] [--folder qat_accuracy] [--quick]
"""

import argparse
import copy
import json
import time
from dataclasses import dataclass
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from shared import CASES, Case, Prepare, Tiles, batches, paired_difference, right
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset

import lq
from lq.callbacks import Distillation, QuantizationAwareTraining
from lq.files import written_whole

CALIBRATION = 512
"""Training images that PTQ calibrates with, and QAT before it trains."""


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        case: Name of a model in shared.py.
        recipe: What it is quantized with.
        epochs: Epochs of QAT.
        lr: Learning rate at the start, of a cosine to 0.
        batch: Batch size.
        images: Training images used; ``None`` for all.
        precision: Lightning's.
        published: What the literature reports, if anything.
        freeze_batchnorm: Whether BatchNorm keeps its statistics, as few images must not change
            them, and where they are folded into the weights already.
    """

    case: str
    recipe: str
    epochs: int
    lr: float
    batch: int = 64
    images: int | None = None
    precision: str = "32-true"
    published: str = ""
    freeze_batchnorm: bool = False


APOT = "APoT (Li et al. 2020): {} % from 92.96 % float, 300 epochs"
ROWS = {
    "resnet20-w8a8": Row("resnet20", "tensorrt_int8", 1, 1e-3),
    "resnet20-w4a4": Row(
        "resnet20", "w4a4", 3, 0.01, precision="bf16-mixed", published=APOT.format(92.45)
    ),
    "resnet20-w3a3": Row(
        "resnet20", "w3a3", 6, 0.01, precision="bf16-mixed", published=APOT.format(92.49)
    ),
    "resnet20-w2a2": Row(
        "resnet20", "w2a2", 11, 0.02, precision="bf16-mixed", published=APOT.format(90.96)
    ),
    "mobilenet_v2_cifar-w8a8": Row("mobilenet_v2_cifar", "tensorrt_int8", 1, 2e-3, images=12_800),
    "mobilenet_v2_imagenet-w8a8": Row(
        "mobilenet_v2_imagenet", "tensorrt_int8", 3, 1e-4, 16, freeze_batchnorm=True
    ),
    "efficientnet_lite0-w8a8": Row(
        "efficientnet_lite0", "tensorrt_int8", 3, 1e-4, 16, freeze_batchnorm=True
    ),
}


def augmented(prepare: Prepare) -> Prepare:
    """Return a preparation of small images that shifts by up to 4 pixels and mirrors first."""

    def changed(image: Tensor) -> Tensor:
        left, top, mirror = torch.randint(9, (3,)).tolist()
        height, width = image.shape[1:]
        padded = nn.functional.pad(image, (4, 4, 4, 4))[:, top : top + height, left : left + width]
        return prepare(padded.flip(2) if mirror % 2 else padded)

    return changed


def training_data(case: Case, count: int | None) -> Dataset:
    """Return training images, small ones augmented; only `count` of them if given."""
    data = case.data("train")
    if isinstance(data, Tiles):
        data = Tiles(data.images, data.labels, augmented(case.prepare))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return data if count is None else Subset(data, order[:count].tolist())


class Classifier(L.LightningModule):
    """A classifier with stochastic gradient descent along a cosine, each step."""

    def __init__(self, model: nn.Module, lr: float) -> None:
        super().__init__()
        self.model, self.lr = model.to(memory_format=torch.channels_last), lr

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        """Return the loss of a batch."""
        x, target = batch
        logits = self.model(x.contiguous(memory_format=torch.channels_last))
        return nn.functional.cross_entropy(logits, target)

    def configure_optimizers(self) -> dict[str, object]:
        """Decay what multiplies, and nothing else."""
        named = list(self.model.named_parameters())
        matrices = [p for name, p in named if p.dim() > 1]
        others = [p for name, p in named if p.dim() <= 1]  # norms, biases and scales
        groups = [{"params": matrices, "weight_decay": 1e-4}, {"params": others}]
        optimizer = torch.optim.SGD(groups, self.lr, momentum=0.9, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Clock(L.Callback):
    """Counts the processor time of a fit, over interruptions."""

    seconds = 0.0

    def on_train_epoch_start(self, *_: object) -> None:
        """Begin to count."""
        self._started = time.process_time()

    def on_train_epoch_end(self, *_: object) -> None:
        """Add the epoch."""
        self.seconds += time.process_time() - self._started

    def state_dict(self) -> dict[str, float]:
        """Return what was counted."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Go on counting."""
        self.seconds = state_dict["seconds"]


def ptq(row: Row, reference: nn.Module) -> nn.Module:
    """Return the model calibrated and not trained."""
    model = lq.quantize(copy.deepcopy(reference), row.recipe)
    calibration = CASES[row.case].data("train", CALIBRATION)
    lq.calibrate(model, batches(calibration, row.batch), "mse", progress=False)
    return model


def qat(
    row: Row, reference: nn.Module, folder: Path, images: int | None
) -> tuple[nn.Module, float]:
    """Return the trained model and the processor seconds that training took."""
    L.seed_everything(0, verbose=False)
    module = Classifier(copy.deepcopy(reference).train(), row.lr)
    data = training_data(CASES[row.case], images or row.images)
    clock = Clock()
    trainer = L.Trainer(
        max_epochs=row.epochs,
        precision=row.precision,
        accelerator="cpu",
        logger=False,
        enable_model_summary=False,
        callbacks=[
            QuantizationAwareTraining(
                row.recipe,
                "model",
                "mse",
                calibration_batches=max(1, CALIBRATION // row.batch),
                freeze_batchnorm_epoch=0 if row.freeze_batchnorm else None,
            ),
            Distillation(reference, temperature=4.0, module="model"),
            clock,
            ModelCheckpoint(folder, filename="last", enable_version_counter=False),
        ],
    )
    last = folder / "last.ckpt"
    loader = DataLoader(data, row.batch, shuffle=True, drop_last=True)
    trainer.fit(module, loader, ckpt_path=last if last.is_file() else None, weights_only=True)
    return module.model.eval(), clock.seconds


def measure(name: str, folder: Path, quick: bool) -> dict[str, object]:
    """Train and measure one row."""
    row = ROWS[name]
    case = CASES[row.case]
    test = batches(case.data("test"), 250)
    reference = case.model()
    images = (row.images or len(case.data("train"))) // 20 if quick else None
    trained, seconds = qat(row, reference, folder / name, images)
    models = {"float": reference, "PTQ": ptq(row, reference), "QAT": trained}
    correct = {kind: right(model, test) for kind, model in models.items()}
    return {
        "top1": {kind: float(found.double().mean()) for kind, found in correct.items()},
        "difference": {
            kind: paired_difference(correct["float"], correct[kind]) for kind in ("PTQ", "QAT")
        },
        "n": len(correct["float"]),
        "images": images or row.images or len(case.data("train")),
        "epochs": row.epochs,
        "minutes": seconds / 60,
    }


def line(name: str, found: dict) -> str:
    """Return one row of the table."""
    shown = [f"{name:27s} {found['top1']['float']:7.2%}"]
    for kind in ("PTQ", "QAT"):
        mean, error = found["difference"][kind]
        shown.append(f"{found['top1'][kind]:7.2%} ({100 * mean:+6.2f} +- {100 * error:.2f})")
    budget = f"{found['epochs']} x {found['images']:,} images, {found['minutes']:.0f} CPU min"
    return "  ".join([*shown, f"{found['n']} tested", budget, ROWS[name].published])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--folder", type=Path, default=Path("qat_accuracy"))
    parser.add_argument("--quick", action="store_true", help="a twentieth of the images")
    arguments = parser.parse_args()
    folder = arguments.folder / "quick" if arguments.quick else arguments.folder
    for name in arguments.rows:
        result = folder / f"{name}.json"
        if not result.is_file():
            found = measure(name, folder, arguments.quick)
            with written_whole(result) as temporary:
                temporary.write_text(json.dumps(found, indent=1))
    print(f"{'':27s} {'float':>7s}  PTQ (points of float)      QAT")
    for name in arguments.rows:
        print(line(name, json.loads((folder / f"{name}.json").read_text())))


if __name__ == "__main__":
    main()
