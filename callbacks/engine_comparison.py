"""The same data through float, fake-quant and exported engine, side by side."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lq.callbacks.export import Export
from lq.callbacks.quantization_aware_training import QuantizationAwareTraining
from lq.callbacks.target import target_module
from lq.evaluation import Evaluation, comparison_table, evaluate_outcome
from lq.export import export_onnx
from lq.files import write_text
from lq.modes import quantizer_mode
from lq.outcome import Outcome
from lq.quantizer import Mode
from lq.surgery import dequantize, quantizers

ORDER = ("float", "float file", "PTQ", "QAT", "fake-quant", "INT8 file", "INT8 engine")
FINAL = ("final/top1", "final/drop", "final/size_mb", "final/latency_ms")
"""Names under which the last of them is logged, to sort runs by."""
ONE_SAMPLE = ((1, 0),)
"""What is timed: a batch of one, with the engine's own choice of threads."""


class EngineComparison(L.Callback):
    """Measures every stage of a quantization on the same data and prints one table.

    In a fit ``float`` and ``PTQ`` are measured at the moment the quantizers begin to quantize,
    without and with them, and ``QAT`` when it ends; in a test, or a validation on its own,
    ``float`` and ``fake-quant`` are the same weights without and with the quantizers. Then come the
    files that the Export callback, listed before this one, wrote. Each is compared with float,
    sample by sample.

    The data are the data module's test set, or else its validation set; without a data module the
    trainer's own. The table is printed, logged as ``comparison/<stage>/...``, and saved as JSON
    beside the exported file; the last stage is logged as ``final/...`` too.

    Args:
        module: Submodule to measure; a QuantModule's model, or the whole module, if not given.

    Attributes:
        rows: Stage -> what was measured.
    """

    def __init__(self, module: str | None = None) -> None:
        self.module = module
        self.rows: dict[str, Evaluation] = {}
        self._float: Outcome | None = None

    @property
    def state_key(self) -> str:
        """One for each module that is measured."""
        return self._generate_state_key(module=self.module)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what would fail after the training."""
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        exported = self._exported(trainer)
        if exported is not None and callbacks.index(exported) > callbacks.index(self):
            raise RuntimeError(
                "Expected Export before EngineComparison, which measures the exported file, but "
                "got it after; list it first."
            )
        training = next((c for c in callbacks if isinstance(c, QuantizationAwareTraining)), self)
        if callbacks.index(training) > callbacks.index(self):
            raise RuntimeError(
                "Expected QuantizationAwareTraining before EngineComparison, which measures when "
                "the quantizers begin to quantize, but got it after; list it first."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse a fit without data to measure on."""
        _batches(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Measure float and PTQ, once the quantizers know their ranges."""
        target = target_module(pl_module, self.module)
        if self.rows or not trainer.is_global_zero or not _quantizes(target):
            return
        self._add_float(target, trainer)
        self._add("PTQ", target, trainer)
        exported = self._exported(trainer)
        if exported is not None:
            self._export_float(target, exported.path, trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure what was trained and what was exported, and tell."""
        self._finish("QAT", trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure after a validation on its own, and tell."""
        if trainer.state.fn == "validate":
            self._restart(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure what was tested, and tell."""
        self._restart(trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Keep what was measured, for a resumed fit."""
        rows = {name: row.to_dict() for name, row in self.rows.items()}
        return {"rows": rows, "float": None if self._float is None else self._float.to_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was measured before."""
        rows, outcome = state_dict["rows"], state_dict["float"]
        self.rows = {name: Evaluation.from_dict(row) for name, row in rows.items()}
        self._float = None if outcome is None else Outcome.from_dict(outcome)

    def _restart(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure anew, whatever a fit or a checkpoint left: the data may be others."""
        self.rows, self._float = {}, None
        if trainer.is_global_zero:
            self._add_float(target_module(pl_module, self.module), trainer)
        self._finish("fake-quant", trainer, pl_module)

    def _finish(self, name: str, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        target, exported = target_module(pl_module, self.module), self._exported(trainer)
        if _quantizes(target):
            self._add(name, target, trainer)
        else:
            self._add_float(target, trainer)
        if exported is not None and exported.report is not None:
            self._add("INT8 file", exported.path, trainer)
            if exported.engine_path is not None and torch.cuda.is_available():
                self._add("INT8 engine", exported.engine_path, trainer)
        self._tell(trainer, exported)

    def _export_float(self, target: nn.Module, path: Path, trainer: L.Trainer) -> None:
        path = path.with_stem(f"{path.stem}_float")
        batch = next(iter(_batches(trainer)))
        export_onnx(dequantize(copy.deepcopy(target)), batch, path)
        self._add("float file", path, trainer)

    def _add_float(self, target: nn.Module, trainer: L.Trainer) -> None:
        self._float = None
        with quantizer_mode(target, Mode.BYPASS):
            self._float = self._add("float", target, trainer)

    def _add(self, name: str, model: nn.Module | Path, trainer: L.Trainer) -> Outcome:
        with torch.random.fork_rng(devices=[]):  # measuring must not change the training
            row, outcome = evaluate_outcome(
                model, _batches(trainer), ONE_SAMPLE, reference=self._float, progress=False
            )
        self.rows[name] = row
        _log(trainer, f"comparison/{name}", row)
        return outcome

    @staticmethod
    def _exported(trainer: L.Trainer) -> Export | None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return next((c for c in callbacks if isinstance(c, Export)), None)

    def _tell(self, trainer: L.Trainer, exported: Export | None) -> None:
        rows = {name: self.rows[name] for name in ORDER if name in self.rows}
        last = list(rows.values())[-1]
        _log(trainer, "final", last)
        data = getattr(getattr(trainer, "datamodule", None), "name", "the data")
        print(f"\nOn {data}, {last.n} images:\n{comparison_table(rows)}")
        print(_slower_than_float(rows), end="")
        if exported is not None:
            plain = {name: row.to_dict() for name, row in rows.items()}
            write_text(
                exported.path.with_suffix(".json"),
                json.dumps({"data": data, "rows": plain}, indent=2),
            )
            print(f"ONNX:        {exported.path}")
            print(f"Engine:      {exported.engine_path or 'none'}")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                print(f"TensorBoard: tensorboard --logdir {logger.root_dir}")


def _log(trainer: L.Trainer, name: str, row: Evaluation) -> None:
    """Log what was measured; the time of a simulation is not that of its format."""
    figures = {"top1": row.top1, "top5": row.top5, "loss": row.loss, "size_mb": row.size_mb}
    if not row.simulated:
        figures["latency_ms"] = row.latency_ms
    if row.versus is not None:
        figures |= {"drop": row.versus.drop.mean, "agreement": row.versus.agreement}
    for logger in trainer.loggers:
        logger.log_metrics({f"{name}/{k}": v for k, v in figures.items()}, trainer.global_step)


def _quantizes(target: nn.Module) -> bool:
    return any(q.mode is Mode.QUANTIZE and q.is_calibrated for q in quantizers(target).values())


def _slower_than_float(rows: dict[str, Evaluation]) -> str:
    """Return a line that warns where the integers bring no speed."""
    quantized, float_file = rows.get("INT8 file"), rows.get("float file")
    if quantized is None or float_file is None or quantized.latency_ms < float_file.latency_ms:
        return ""
    return (
        f"Note: INT8 is not faster than float in {quantized.engine} for one image "
        f"({quantized.latency_ms:.2f} against {float_file.latency_ms:.2f} ms); the graph is "
        "written for TensorRT.\n"
    )


def _batches(trainer: L.Trainer) -> Any:
    """Return the data to measure on: of a data module, or else those of the trainer.

    Raises:
        RuntimeError: If there are none.
    """
    data: Any = getattr(trainer, "datamodule", None)
    loaders: Any
    if data is not None and is_overridden("test_dataloader", data, L.LightningDataModule):
        data.setup("test")
        loaders = data.test_dataloader()
    elif data is not None:
        loaders = data.val_dataloader()
    elif trainer.state.fn == "test":
        loaders = trainer.test_dataloaders
    else:
        trainer.fit_loop.epoch_loop.val_loop.setup_data()  # not yet done without a sanity check
        loaders = trainer.val_dataloaders
    loaders = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
    if loaders is None:
        raise RuntimeError(
            "Expected data for EngineComparison to measure, but there is no data module and no "
            "loader of validation data; pass one of them to the trainer."
        )
    return loaders
