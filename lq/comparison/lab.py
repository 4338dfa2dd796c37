"""What all methods of a comparison share: the data, the engine, and what was measured before."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import quote

from torch import nn
from tqdm.auto import tqdm

from lq.comparison.deployment import Deployment
from lq.comparison.explained import Explanation, explain
from lq.comparison.kept import fresh_folder, kept
from lq.comparison.making import Made, Maker
from lq.comparison.method import Method
from lq.comparison.result import FLOAT, VERSION, Comparison
from lq.comparison.row import Row, pack
from lq.comparison.speed import measure_speed
from lq.costs import count_costs
from lq.digest import DataDigest, model_digest
from lq.evaluation import evaluate_outcome
from lq.files import sha256
from lq.interop import read_onnx
from lq.messages import one_line
from lq.outcome import Outcome
from lq.plan import PrecisionPlan
from lq.samples import count_samples
from lq.sensitivity import Sensitivity
from lq.surgery import quantizers

log = logging.getLogger(__name__)
CHECKED = 2
"""Batches that each export is compared with the model on."""
INTEGER_PRODUCTS = ("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger")
SHOWN = 4
"""Layers whose tensors and weights are looked at."""


class Lab:
    """What all methods of a comparison share."""

    def __init__(self, maker: Maker, test: Iterable[Any], folder: Path, training: str) -> None:
        self.maker, self.test, self.folder, self.training = maker, test, folder, training
        self.checked = list(islice(test, CHECKED))
        self.deployment = Deployment(maker.target, max(map(count_samples, self.checked)))
        self.costs = count_costs(maker.model, self.checked[0])
        self.outcome: Outcome | None = None
        self.sensitivity: Sensitivity | None = None
        data = [_digest(part, maker.progress) for part in (maker.batches, maker.held_out, test)]
        self.identity = [
            VERSION,
            repr(maker.model),
            model_digest(maker.model),
            maker.recipe.to_json(),
            maker.target,
            self.deployment.hardware,
            *data,
        ]

    def float_row(self) -> Row:
        """Measure the float model, which all others are compared with."""
        folder = self.folder_of(FLOAT)
        fresh_folder(folder, self.identity)
        row = self._judged(Row(name=FLOAT), Made(self.maker.model), folder)
        self.identity.append(row.right)  # what the code of its forward computes
        log.info("%s: %s", FLOAT, row.evaluation)
        return row

    def row(self, name: str, method: Method) -> Row:
        """Return the row of a method: measured now, or before on the same terms."""
        folder, terms = self.folder_of(name), [*self.identity, method.identity()]
        terms += [self.training] * (method.kind == "qat")
        fresh_folder(folder, terms)
        plain = kept(
            folder / "row.json",
            terms,
            lambda: self._row(name, method, folder).to_dict(),
            self._lasts,
        )
        row = Row.from_dict(plain)
        if (folder / "sensitivity.json").is_file():
            self._take(Sensitivity.from_json(folder / "sensitivity.json"))
        log.info("%s: %s", name, row.failed or row.evaluation)
        return row

    def _take(self, found: Sensitivity) -> None:
        """Explain by the first sweep, or the first with int8 in it."""
        before = self.sensitivity
        if before is None or ("int8" in found.formats and "int8" not in before.formats):
            self.sensitivity = found

    def folder_of(self, name: str) -> Path:
        """Return where a method keeps its files."""
        return self.folder / "methods" / quote(name, safe=" ")

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
            run, self.test, (), engine, self.outcome, self.maker.progress
        )
        if self.outcome is None:
            self.outcome = outcome
        return dataclasses.replace(
            row,
            evaluation=evaluation,
            right=pack(outcome.right),
            plan=_plan(run),
            history=[dict(line) for line in made.history],
            file="" if file is None else self._told(file),
            sha256="" if file is None else sha256(file),
            note=" ".join(filter(None, (made.note, note))),
        )

    def _told(self, file: Path) -> str:
        """Return the path of a file as it is told: of own ones within the folder."""
        own, path = self.folder.resolve(), file.resolve()
        return str(path.relative_to(own) if path.is_relative_to(own) else path)

    def _lasts(self, plain: Mapping[str, Any]) -> bool:
        """Return whether a row came to something, and its file is still what it was."""
        try:
            row = Row.from_dict(plain)
        except (KeyError, TypeError, ValueError):  # of another version
            return False
        file = self.folder / row.file
        return not row.failed and (not row.file or (file.is_file() and sha256(file) == row.sha256))

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
        files = {row.name: self.folder / row.file for row in rows if row.file}
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
        places = self.outcome.places
        return Comparison(
            model=model,
            parameters=sum(p.numel() for p in self.maker.model.parameters()),
            data=data,
            n=len(self.outcome.target if places is None else places),
            places=() if places is None else places.tolist(),
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
    """Return layer -> format as a model or a graph has it; nothing for an engine alone.

    Operators that compute with integers without Q/DQ are int8.
    """
    if isinstance(model, nn.Module):
        return dict(PrecisionPlan.of(model))
    graph = model.with_suffix(".onnx")
    if not graph.is_file():
        return {}
    found = read_onnx(graph)
    products = {n: "int8" for n, op in found.integer_operators.items() if op in INTEGER_PRODUCTS}
    return {**found.plan, **products}
