"""What repair wins back: MobileNetV2 in INT8 with 256 calibration images and nothing trained.

python benchmarks/ptq_repair.py [--count 1000]
"""

import argparse
import copy

import torch
from shared import CASES, Case, batches, paired_difference
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import lq
from lq.functional import sqnr_db

CALIBRATION, HELD_OUT = 256, 500
SETTINGS = {
    "mobilenet_v2_cifar": lq.Recipe(residual=None),
    "mobilenet_v2_imagenet": lq.Recipe(weights=lq.QuantSpec(axis=None), residual=None),
}
"""Weights per channel, and per tensor; inputs always per tensor, symmetric."""


def tuning(case: Case) -> tuple[DataLoader, DataLoader]:
    """Return calibration and held-out batches, both of training images."""
    images = case.data("train", CALIBRATION + HELD_OUT)
    held_out = Subset(images, range(CALIBRATION, len(images)))
    return batches(Subset(images, range(CALIBRATION)), 64), batches(held_out, 32)


def logits(model: nn.Module, data: DataLoader) -> tuple[Tensor, Tensor]:
    """Return a model's outputs and the targets."""
    with torch.no_grad():
        found = [(model(x), target) for x, target in data]
    return torch.cat([y for y, _ in found]), torch.cat([target for _, target in found])


def compared(reference: Tensor, got: Tensor, target: Tensor) -> str:
    """Return top-1, its paired difference to float with its 95% interval, agreement and SQNR."""
    before, after = (y.argmax(1) == target for y in (reference, got))
    difference, margin = paired_difference(before, after)
    agreement = (reference.argmax(1) == got.argmax(1)).double().mean()
    return (
        f"top-1 {after.double().mean():.2%} ({100 * difference:+.2f} "
        f"+- {100 * margin:.2f} points), agreement {agreement:.2%}, "
        f"{sqnr_db(reference, got):.2f} dB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=None, help="test images; all if not given")
    count = parser.parse_args().count
    for name, recipe in SETTINGS.items():
        case = CASES[name]
        reference, test = case.model(), batches(case.data("test", count), 64)
        wanted, target = logits(reference, test)
        top1 = (wanted.argmax(1) == target).double().mean()
        print(f"{name}, {len(target)} test images: float {top1:.2%}")
        calibration, held_out = tuning(case)
        model = lq.quantize(copy.deepcopy(reference), recipe)
        lq.calibrate(model, calibration, progress=False)
        print("naive:", compared(wanted, logits(model, test)[0], target))
        print(lq.repair(model, calibration, held_out))
        print("repaired:", compared(wanted, logits(model, test)[0], target), flush=True)


if __name__ == "__main__":
    main()
