"""What QuantizerMonitor costs a training step, as ratios to steps of the same fit without it.

The steps of one fit take turns: "off" without the monitor, "idle" with it between two measured
steps, "measured", and "drawn" with histograms too. Of N steps one is measured, so the cost on
average is that of idle ones plus an Nth of the excess of a measured one.
python benchmarks/monitor.py [--model resnet18] [--rounds 12] [--device cuda]
"""

import argparse
import inspect
import statistics
import tempfile
import time
from typing import Any

import lightning as L
import torch
import torchvision
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lq.callbacks import QuantizationAwareTraining, QuantizerMonitor

PHASES = {"off": (0, 0), "idle": (0, 0), "measured": (1, 0), "drawn": (1, 1)}
"""Name -> whether the step is measured, and whether histograms are drawn."""
NEVER = 10**9
EVERY = inspect.signature(QuantizerMonitor).parameters["every_n_steps"].default
LEARNED = {
    "weights": {"format": "int8", "range": "lsq"},
    "inputs": {"format": "int8", "range": "lsq"},
}


class Classifier(L.LightningModule):
    """A classifier, trained by SGD."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=1e-4)


class Turns(L.Callback):
    """Lets a monitor take part in some steps, and notes how long each took."""

    def __init__(self) -> None:
        self.monitor = QuantizerMonitor(NEVER, NEVER, module="model")
        self.times: dict[str, list[float]] = {name: [] for name in PHASES}
        self.phase, self._started = "off", 0.0

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any) -> None:
        """Start the clock, and the monitor if it is its turn."""
        self.phase = list(PHASES)[args[-1] % len(PHASES)]
        measured, drawn = PHASES[self.phase]
        self.monitor.every_n_steps = 1 if measured else NEVER
        self.monitor.histogram_every_n_steps = 1 if drawn else NEVER
        self.monitor._has_begun = True
        self._started = now()
        if self.phase != "off":
            self.monitor.on_train_batch_start(trainer, *args)

    def on_before_optimizer_step(self, *args: Any) -> None:
        """Let the monitor see the gradients."""
        if self.phase != "off":
            self.monitor.on_before_optimizer_step(*args)

    def on_train_batch_end(self, *args: Any) -> None:
        """Stop the clock."""
        if self.phase != "off":
            self.monitor.on_train_batch_end(*args)
        self.times[self.phase].append(now() - self._started)


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(name: str, recipe: Any, rounds: int, device: str) -> dict[str, list[float]]:
    """Return the seconds of the steps by phase, without those of the first two rounds."""
    torch.manual_seed(0)
    turns, count = Turns(), 16 * len(PHASES) * (rounds + 2)
    images, targets = torch.randn(16, 3, 112, 112), torch.randint(0, 1000, (16,))
    data = TensorDataset(images.repeat(count // 16, 1, 1, 1), targets.repeat(count // 16))
    qat = QuantizationAwareTraining(recipe, module="model", calibration_batches=1)
    with tempfile.TemporaryDirectory() as folder:
        L.Trainer(
            accelerator="gpu" if device == "cuda" else "cpu",
            devices=1,
            max_epochs=1,
            logger=TensorBoardLogger(folder),
            callbacks=[qat, turns],
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
        ).fit(Classifier(getattr(torchvision.models, name)()), DataLoader(data, 16))
    return {phase: times[2:] for phase, times in turns.times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet18", choices=["resnet18", "mobilenet_v2"])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    given = parser.parse_args()
    for title, recipe in (("frozen ranges", "tensorrt_int8"), ("learned ranges", LEARNED)):
        times = seconds(given.model, recipe, given.rounds, given.device)
        off = times["off"]
        each = {
            phase: [t / o for t, o in zip(found, off, strict=True)]
            for phase, found in times.items()
            if phase != "off"
        }
        ratio = {phase: statistics.median(found) for phase, found in each.items()}
        step = 1000 * statistics.median(off)
        print(f"{given.model}, batch 16 at 112, {given.device}, {title}: a step {step:.1f} ms")
        for phase, found in each.items():
            low, _, high = statistics.quantiles(found, n=4)
            print(f"  {phase:9s} {ratio[phase]:.3f}x ({low:.3f}-{high:.3f})")
        print(f"  on average, one in {EVERY}: {(ratio['measured'] - 1) / EVERY:+.2%} of a step")


if __name__ == "__main__":
    main()
