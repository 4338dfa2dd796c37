"""INT8 without training, by every calibrator of ours and of other toolkits, on real images.

Weights per channel, inputs of every Conv and Linear per tensor, all symmetric; 256 calibration
images. Against the float model on the same images: paired top-1 difference with its 95 % interval,
agreement (share of equal predictions), and SQNR of the logits.
python benchmarks/ptq_accuracy.py [--case resnet20] [--images 5000] [--no-peers]
"""

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from peers import PEERS
from shared import CASES, batches, paired_difference
from torch import Tensor, nn
from torch.utils.data import Subset

import lq
from lq.calibrators import COMPETITORS

Predict = Callable[[Tensor], Tensor]


def logits(predict: Predict, data: object) -> Tensor:
    """Return the logits of all images, in double precision."""
    with torch.no_grad():
        return torch.cat([predict(x).double() for x, _ in data])


def ours(
    model: nn.Module, calibration: list[Tensor], held_out: list[Tensor], folder: Path
) -> Iterator[tuple[str, Predict]]:
    """Give the model quantized by each calibrator of lq, and repaired."""
    for name in (*COMPETITORS, "auto"):
        net = lq.quantize(copy.deepcopy(model), RECIPE)
        ranges = lq.find_ranges(net, calibration, name, progress=False)
        yield f"lq {name}", net
    report = lq.repair(net, calibration, held_out, calibrator="auto", progress=False)
    (folder / "report.txt").write_text(f"{ranges.table()}\n\n{report}")
    yield "lq auto, repaired", net


def line(name: str, reference: Tensor, found: Tensor, labels: Tensor) -> str:
    """Return one row of the table."""
    right, ours = (x.argmax(1) == labels for x in (reference, found))
    mean, error = paired_difference(right, ours)
    agree = (found.argmax(1) == reference.argmax(1)).double().mean()
    noise = (found - reference).square().sum()
    sqnr = 10 * torch.log10(reference.square().sum() / noise)
    return f"{name:34s} {100 * mean:+6.2f} +-{100 * error:.2f}  {agree:8.2%}  {sqnr:6.2f} dB"


HELD_OUT = 240
HELD = range(256, 256 + HELD_OUT)
"""Training images that repairs are judged by, none of which calibrates."""
RECIPE = lq.Recipe(residual=None)  # as the other toolkits are asked to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", default="resnet20", choices=list(CASES))
    parser.add_argument("--images", type=int, default=None, help="test images; all if not given")
    parser.add_argument("--no-peers", action="store_true")
    arguments = parser.parse_args()
    case = CASES[arguments.case]
    model = case.model()
    test = list(batches(case.data("test", arguments.images), 100))
    calibration = [x for x, _ in batches(case.data("train", 256), 32)]
    labels = torch.cat([y for _, y in test])
    reference = logits(model, test)
    top1 = (reference.argmax(1) == labels).double().mean()
    print(f"{arguments.case}: float {top1:.2%} of {len(labels)} images")
    print(f"{'':34s} {'top-1, points':>14s}  {'agreement':>8s}  {'logits':>9s}")
    folder = Path(tempfile.mkdtemp())
    held_out = [x for x, _ in batches(Subset(case.data("train", 256 + HELD_OUT), HELD), 32)]
    runs = [ours(model, calibration, held_out, folder)]
    if not arguments.no_peers:
        runs += [peer(model, calibration, folder) for peer in PEERS]
    for run in runs:
        for name, predict in run:
            print(line(name, reference, logits(predict, test), labels), flush=True)
    print("\n" + (folder / "report.txt").read_text())


if __name__ == "__main__":
    main()
