"""How many images, chosen how? ResNet-20 on CIFAR-10: curves of three strategies.

python benchmarks/calibration_data.py [--size 1024] [--held-out 1000]
"""

import argparse
import time

from shared import batches, cifar10, require_data
from torch.utils.data import Subset

import lq
from lq.checkpoint import read_weights
from lq.data import calibration_subset
from lq.models import resnet20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="calibration images")
    parser.add_argument("--held-out", type=int, default=1000, help="test images")
    arguments = parser.parse_args()
    model = resnet20()
    model.load_state_dict(read_weights(require_data() / "weights" / "resnet20_cifar10.safetensors"))
    lq.quantize(model.eval(), "tensorrt_int8")
    train, test = cifar10("train"), cifar10("test")
    held_out = batches(Subset(test, range(arguments.held_out)))
    for strategy in ("random", "stratified", "coverage"):
        started = time.perf_counter()
        images = calibration_subset(train, arguments.size, strategy, exclude=test)
        print(f"\n{images.report()}\nchosen in {time.perf_counter() - started:.1f} s\n")
        for calibrator in ("max", "percentile"):
            print(lq.calibration_curve(model, batches(images), held_out, calibrator))


if __name__ == "__main__":
    main()
