"""How each kind of method makes its model from the float one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lq.calibration import calibrate
from lq.comparison.method import Method, formats_of
from lq.mixed_precision import PrecisionConstraints, UnreachableError, verified_search
from lq.repairs import repair
from lq.restore import load_model
from lq.sensitivity import sweep
from lq.spec import Recipe
from lq.surgery import quantize, quantizers

History = Sequence[Mapping[str, float]]
TrainFunction = Callable[[nn.Module, int, Path], History]
"""Trains a quantized, calibrated model in place for some epochs, and returns a row of figures for
each. It may keep what it needs to go on after a kill in the folder."""
LIMITS = PrecisionConstraints(max_accuracy_drop=0.01)


@dataclass(frozen=True)
class Made:
    """What a method gave.

    Attributes:
        model: A model, or the path of a file.
        history: Of training, a row of figures for each epoch.
        note: What else there is to say.
    """

    model: nn.Module | Path
    history: History = ()
    note: str = ""


class Maker:
    """Makes the model of each method from the float one.

    Args:
        model: The float model; it stays as it is.
        batches: Calibration batches.
        held_out: (input, target) pairs that repairs are judged by and searches choose by.
        recipe: The recipe of methods that name none.
        target: What will run the models.
        train: What trains a model.
        progress: Show progress bars.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        held_out: Iterable[Any],
        recipe: str | Path | Mapping[str, Any] | Recipe,
        target: str,
        train: TrainFunction | None,
        progress: bool,
    ) -> None:
        self.model, self.batches, self.held_out = model, batches, held_out
        self.recipe, self.target = Recipe.parse(recipe), target
        self.train, self.progress = train, progress

    def make(self, method: Method, folder: Path) -> Made:
        """Return what a method gives.

        Args:
            method: The method.
            folder: Where it may keep what a killed run goes on from.
        """
        return _KINDS[method.kind](self, method, folder)

    def ptq(self, method: Method, folder: Path) -> Made:
        """Quantize and calibrate; repair, where that is asked for."""
        model = self._quantized(method)
        if not quantizers(model):
            return Made(model)
        calibrate(model, self.batches, method.calibrator, self.progress)
        if not method.repair:
            return Made(model)
        report = repair(
            model,
            self.batches,
            self.held_out,
            calibrator=method.calibrator,
            progress=self.progress,
        )
        steps = [f"{s.method} {'kept' if s.kept else 'undone'}" for s in report.steps]
        return Made(model, note=f"Repairs: {', '.join(steps)}.")

    def qat(self, method: Method, folder: Path) -> Made:
        """Quantize, calibrate and train."""
        if self.train is None:
            raise ValueError("Expected `train` for a method of kind 'qat', but got none.")
        model = self._quantized(method)
        calibrate(model, self.batches, method.calibrator, self.progress)
        history = self.train(model, method.epochs, folder)
        return Made(model, history)

    def mixed(self, method: Method, folder: Path) -> Made:
        """Sweep the layers, and search a mix of formats that is measured to keep to the limits."""
        recipe = self._recipe(method)
        swept = sweep(
            self.model,
            self.batches,
            formats_of(method, self.target),
            metric="kl",
            recipe=recipe,
            calibrator="max" if method.calibrator == "auto" else method.calibrator,
            journal=folder / "sweep.jsonl",
            progress=self.progress,
        )
        swept.save(folder / "sensitivity.json")
        try:
            found = verified_search(
                self.model,
                swept,
                method.constraints or LIMITS,
                self.batches,
                self.held_out,
                recipe=recipe,
                prepare=lambda net: calibrate(net, self.batches, method.calibrator, progress=False),
            )
        except UnreachableError as error:
            if error.nearest is None:
                raise
            return Made(error.nearest, note=str(error))
        return Made(found.model, note=f"Plans measured: {len(found.trials)}.")

    def file(self, method: Method, folder: Path) -> Made:
        """Take a file, or the network in a checkpoint."""
        path = Path(method.path or "")
        if not path.is_file():
            raise FileNotFoundError(f"Expected a file at {str(path)!r}, but there is none.")
        if path.suffix in (".onnx", ".engine", ".plan", ".trt"):
            return Made(path)
        return Made(load_model(path, copy.deepcopy(self.model)).eval())

    def _recipe(self, method: Method) -> Recipe:
        return self.recipe if method.recipe is None else Recipe.parse(method.recipe)

    def _quantized(self, method: Method) -> nn.Module:
        return quantize(copy.deepcopy(self.model), self._recipe(method))


_KINDS: Mapping[str, Callable[[Maker, Method, Path], Made]] = {
    "ptq": Maker.ptq,
    "qat": Maker.qat,
    "mixed": Maker.mixed,
    "file": Maker.file,
}
"""Kinds of methods. A new one is a function here and a row in ``lq.comparison.method.TAKES``."""
