"""Compare methods of quantizing on the same samples, and go on where a killed run stopped."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from torch import nn
from tqdm.auto import tqdm

from lq.batches import check_batches, check_repeatable
from lq.comparison.deployment import Deployment
from lq.comparison.explained import Explanation, explain
from lq.comparison.kept import fresh_folder, kept
from lq.comparison.making import Made, Maker, TrainFunction
from lq.comparison.method import Method, default_methods
from lq.comparison.result import FLOAT, VERSION, Comparison
from lq.comparison.row import Row, pack
from lq.comparison.speed import measure_speed
from lq.costs import count_costs
from lq.digest import DataDigest, model_digest
from lq.evaluation import evaluate_outcome
from lq.export.targets import TARGETS
from lq.messages import one_line, suggest
from lq.outcome import Outcome
from lq.plan import PrecisionPlan
from lq.samples import count_samples
from lq.sensitivity import Sensitivity
from lq.spec import Recipe
from lq.surgery import quantizers
from lq.timing import check_sizes

log = logging.getLogger(__name__)
CHECKED = 2
"""Batches that each export is compared with the model on."""
SHOWN = 4
"""Layers whose tensors and weights are looked at."""


def compare(
    model: nn.Module,
    batches: Iterable[Any],
    held_out: Iterable[Any],
    test: Iterable[Any],
    methods: Mapping[str, Method] | None = None,
    folder: str | Path = "comparison",
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    target: str = "onnxruntime",
    train: TrainFunction | None = None,
    training: str = "",
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (0,),
    data: str = "",
    name: str = "",
    progress: bool = True,
) -> Comparison:
    """Quantize a model by several methods, and measure each on the same test samples.

    Every method's model is exported, proved to compute what torch computes, and measured in the
    engine; at the end all files are timed in turn, so that what else goes on in the machine comes
    upon all of them. A method that comes to nothing is a row that says why. Each row is kept in
    `folder` as soon as it is measured; of the same model, data and settings it is not done again.

    Args:
        model: The float model; it stays as it is.
        batches: Calibration batches, in an order that does not change.
        held_out: (input, target) pairs that repairs are judged by and searches choose by.
        test: (input, target) pairs to measure on, which nothing was chosen by.
        methods: Name -> method; ``default_methods`` of the target, if not given.
        folder: Where models, rows and the result are kept.
        recipe: The recipe of methods that name none; that of the target, if not given.
        target: What will run the models: ``onnxruntime``, ``openvino`` or ``tensorrt``.
        train: Trains a quantized model in place for some epochs (for methods of kind ``qat``), and
            returns a row of figures for each: ``train(model, epochs, folder)``.
        training: How `train` trains, in any words: others than before make it train again.
        batch_sizes: Sizes of the batches that are timed.
        threads: Numbers of threads they are timed with; 0 is the engine's own choice.
        data: Name of the data, for reports.
        name: Name of the model, for reports; its class's, if not given.
        progress: Show progress bars.

    Raises:
        ValueError: For an unknown target, a method named ``float``, or data that are empty or can
            be gone through only once.

    Example:
        >>> import tempfile
        >>> from lq.models import digits_cnn
        >>> _ = torch.manual_seed(0)
        >>> x = [(torch.randn(32, 1, 8, 8), torch.randint(10, (32,))) for _ in range(3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = compare(digits_cnn(), x[:1], x[1:2], x[2:], {"max": Method("ptq")}, folder,
        ...                     progress=False)
        >>> [row.name for row in found], found["max"].plan["0"]
        (['float', 'max'], 'int8')
    """
    if target not in TARGETS:
        raise ValueError(
            f"Expected `target` to be one of {', '.join(TARGETS)}, but got {target!r}; "
            f"{suggest(target, TARGETS)}"
        )
    check_sizes(batch_sizes, threads)
    for what, part in ("batches", batches), ("held_out", held_out), ("test", test):
        check_batches(part)
        check_repeatable(part, what)
        if next(iter(part), None) is None:
            raise ValueError(f"Expected `{what}` to hold at least one batch, but got none.")
    methods = default_methods(target, train is not None) if methods is None else methods
    for given in methods:
        if given == FLOAT or not given.strip("."):
            raise ValueError(f"Expected another name for a method than {given!r}; rename it.")
    if quantizers(model):
        raise ValueError("Expected a float model, but it has quantizers; call lq.dequantize.")
    folder = Path(folder)
    with torch.inference_mode(False):
        maker = Maker(model, batches, held_out, recipe or f"{target}_int8", train, progress)
        lab = _Lab(maker, test, target, folder, training)
        rows = [lab.float_row()]
        for pair in tqdm(methods.items(), "Methods", leave=False, disable=not progress):
            rows.append(lab.row(*pair))
        if lab.deployment.is_timed:
            rows = lab.timed(rows, batch_sizes, threads)
        found = lab.result(rows, data, name or type(model).__name__)
    found.save(folder / "comparison.json")
    return found


class _Lab:
    """What all methods of a comparison share."""

    def __init__(
        self, maker: Maker, test: Iterable[Any], target: str, folder: Path, training: str
    ) -> None:
        self.maker, self.test, self.folder, self.training = maker, test, folder, training
        self.checked = list(islice(test, CHECKED))
        self.deployment = Deployment(target, max(map(count_samples, self.checked)))
        self.costs = count_costs(maker.model, self.checked[0])
        self.outcome: Outcome | None = None
        self.sensitivity: Sensitivity | None = None
        parts = [_digest(part, maker.progress) for part in (maker.batches, maker.held_out, test)]
        self.identity = [VERSION, model_digest(maker.model), maker.recipe.to_json(), target, *parts]

    def float_row(self) -> Row:
        """Measure the float model, which all others are compared with."""
        folder = self.folder_of(FLOAT)
        row = self._judged(Row(name=FLOAT), Made(self.maker.model), folder)
        log.info("%s: %s", FLOAT, row.evaluation)
        return row

    def row(self, name: str, method: Method) -> Row:
        """Return the row of a method: measured now, or before on the same terms."""
        folder, terms = self.folder_of(name), [*self.identity, method.identity()]
        terms += [self.training] * (method.kind == "qat")
        fresh_folder(folder, terms)
        plain = kept(
            folder / "row.json", terms, lambda: self._row(name, method, folder).to_dict(), _lasts
        )
        row = Row.from_dict(plain)
        if (folder / "sensitivity.json").is_file():
            self.sensitivity = Sensitivity.from_json(folder / "sensitivity.json")
        log.info("%s: %s", name, row.failed or row.evaluation)
        return row

    def folder_of(self, name: str) -> Path:
        """Return where a method keeps its files."""
        return self.folder / quote(name, safe=" ")

    def _row(self, name: str, method: Method, folder: Path) -> Row:
        row, started = Row(name=name, method=method.to_dict()), time.perf_counter()
        try:
            made = self.maker.make(method, folder)
            seconds = time.perf_counter() - started
            return self._judged(dataclasses.replace(row, seconds=seconds), made, folder)
        except (ValueError, RuntimeError, OSError) as error:
            return dataclasses.replace(row, failed=one_line(error))

    def _judged(self, row: Row, made: Made, folder: Path) -> Row:
        """Return a row with what was measured of a model."""
        file, note = self._file(made.model, folder)
        run = made.model if file is None else file
        engine = None if file is None else self.deployment.engine_of(file)
        evaluation, outcome = evaluate_outcome(
            run, self.test, engine, self.outcome, progress=self.maker.progress
        )
        if self.outcome is None:
            self.outcome = outcome
        return dataclasses.replace(
            row,
            evaluation=dataclasses.replace(evaluation, latencies=()),
            right=pack(outcome.right),
            plan=_plan(run),
            history=[dict(line) for line in made.history],
            file="" if file is None else str(file),
            note=" ".join(filter(None, (made.note, note))),
        )

    def _file(self, model: nn.Module | Path, folder: Path) -> tuple[Path | None, str]:
        """Return the file of a model, or why there is none."""
        if not isinstance(model, nn.Module):
            return model, ""
        try:
            path = folder / "model.onnx"
            return self.deployment.export(model, self.checked[0], path, self.checked), ""
        except ValueError as error:  # the target does not run a format: torch simulates it
            if not quantizers(model):
                raise
            return None, f"Measured in torch: {one_line(error)}"

    def timed(
        self, rows: Sequence[Row], batch_sizes: Sequence[int], threads: Sequence[int]
    ) -> list[Row]:
        """Return the rows with latencies and speed-ups."""
        files = {row.name: Path(row.file) for row in rows if row.file}
        engine = self.deployment.engine
        speeds = measure_speed(
            files, self.checked[0], engine, batch_sizes, threads, self.maker.progress
        )
        found = []
        for row in rows:
            latencies, speedups = speeds.get(row.name, ((), ()))
            evaluation = row.evaluation
            if evaluation is not None and latencies:
                evaluation = dataclasses.replace(
                    evaluation, latencies=latencies, latency_ms=latencies[0].p50_ms
                )
            found.append(dataclasses.replace(row, evaluation=evaluation, speedups=speedups))
        return found

    def result(self, rows: Sequence[Row], data: str, model: str) -> Comparison:
        """Return the comparison, with what explains it."""
        assert self.outcome is not None
        return Comparison(
            model=model,
            parameters=sum(p.numel() for p in self.maker.model.parameters()),
            data=data,
            n=len(self.outcome.target),
            held_out=sum(map(count_samples, self.maker.held_out)),
            target=self.deployment.target,
            hardware=self.deployment.hardware,
            rows=rows,
            costs=self.costs,
            explanation=self._explained(),
            sensitivity=self.sensitivity,
        )

    def _explained(self) -> Explanation:
        """Look at the layers that hurt most, or where nothing was swept at the largest ones."""
        macs = {name: layer.macs for name, layer in self.costs.layers.items()}
        found = self.sensitivity
        layers = sorted(macs, key=lambda name: -macs[name])
        if found is not None:
            layers = [name for row in found.ranked() for name in found.units[row.layer]]
        layers, maker = layers[:SHOWN], self.maker

        def make() -> dict[str, Any]:
            found = explain(
                maker.model, maker.batches, maker.held_out, maker.recipe, layers, maker.progress
            )
            return found.to_dict()

        terms = [*self.identity, layers]
        return Explanation.from_dict(kept(self.folder / "explanation.json", terms, make, bool))


def _digest(batches: Iterable[Any], progress: bool) -> str:
    digest = DataDigest()
    for batch in tqdm(batches, "Looking at the data", leave=False, disable=not progress):
        digest.add([batch], {})
    return digest.own


def _plan(model: nn.Module | Path) -> dict[str, str]:
    """Return layer -> format as a model or a graph has it; nothing for an engine."""
    if isinstance(model, Path) and model.suffix != ".onnx":
        model = model.with_suffix(".onnx")
        if not model.is_file():
            return {}
    return dict(PrecisionPlan.of(model))


def _lasts(row: Mapping[str, Any]) -> bool:
    """Return whether a row came to something, and its file is still there."""
    return not row["failed"] and (not row["file"] or Path(row["file"]).is_file())
