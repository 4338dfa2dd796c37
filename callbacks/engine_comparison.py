"""The same data through float, fake-quant and exported engine, side by side."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lq.callbacks.export import Export
from lq.callbacks.target import target_module
from lq.evaluation import Evaluation, comparison_table, evaluate
from lq.export import export_onnx
from lq.files import written_whole
from lq.modes import quantizer_mode
from lq.quantizer import Mode
from lq.surgery import dequantize, quantizers

ORDER = ("float", "float file", "PTQ", "QAT", "INT8 file")


class EngineComparison(L.Callback):
    """Measures every stage of a quantization on the same data and prints one table.

    ``float`` and ``PTQ`` are measured at the moment the quantizers begin to quantize, without and
    with them; ``QAT`` when the fit ends; then the files that the Export callback, listed before
    this one, wrote. The data are the data module's test set, or else its validation set. The
    table is printed, logged, and saved as JSON beside the exported file.

    Args:
        module: Submodule to measure; a QuantModule's model, or the whole module, if not given.
    """

    def __init__(self, module: str | None = None) -> None:
        self.module = module
        self.rows: dict[str, Evaluation] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse what would fail after the training."""
        if getattr(trainer, "datamodule", None) is None:
            raise RuntimeError(
                "Expected a data module for EngineComparison to measure, but there is none; pass "
                "`datamodule` to the trainer."
            )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        exported = self._exported(trainer)
        if exported is not None and callbacks.index(exported) > callbacks.index(self):
            raise RuntimeError(
                "Expected Export before EngineComparison, which measures the exported file, but "
                "got it after; list it first."
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any
    ) -> None:
        """Measure float and PTQ, once the quantizers know their ranges."""
        target = target_module(pl_module, self.module)
        if self.rows or not trainer.is_global_zero or not _quantizes(target):
            return
        with quantizer_mode(target, Mode.BYPASS):
            self._add("float", target, trainer)
        self._add("PTQ", target, trainer)
        exported = self._exported(trainer)
        if exported is not None:
            self._export_float(target, exported.path, trainer)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Measure what was trained and what was exported, and tell."""
        if not trainer.is_global_zero:
            return
        self._add("QAT", target_module(pl_module, self.module), trainer)
        exported = self._exported(trainer)
        if exported is not None and exported.report is not None:
            self._add("INT8 file", exported.path, trainer)
        self._tell(trainer, exported)

    def state_dict(self) -> dict[str, Any]:
        """Keep what was measured, for a resumed fit."""
        return {name: dataclasses.asdict(row) for name, row in self.rows.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up what was measured before."""
        self.rows = {name: Evaluation.from_dict(row) for name, row in state_dict.items()}

    def _export_float(self, target: nn.Module, path: Path, trainer: L.Trainer) -> None:
        path = path.with_stem(f"{path.stem}_float")
        batch = next(iter(_batches(trainer)))
        export_onnx(dequantize(copy.deepcopy(target)), batch, path)
        self._add("float file", path, trainer)

    def _add(self, name: str, model: nn.Module | Path, trainer: L.Trainer) -> None:
        with torch.random.fork_rng(devices=[]):  # measuring must not change the training
            row = evaluate(model, _batches(trainer), progress=False)
        self.rows[name] = row
        for logger in trainer.loggers:
            figures = {f"comparison/{name}/top1": row.top1, f"comparison/{name}/top5": row.top5}
            logger.log_metrics(figures, trainer.global_step)

    @staticmethod
    def _exported(trainer: L.Trainer) -> Export | None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        return next((c for c in callbacks if isinstance(c, Export)), None)

    def _tell(self, trainer: L.Trainer, exported: Export | None) -> None:
        rows = {name: self.rows[name] for name in ORDER if name in self.rows}
        data = getattr(trainer.datamodule, "name", "the data module")  # type: ignore[attr-defined]
        print(f"\nOn {data}, {self.rows['QAT'].n} images:\n{comparison_table(rows)}")
        print(_slower_than_float(rows), end="")
        if exported is not None:
            plain = {name: dataclasses.asdict(row) for name, row in rows.items()}
            with written_whole(exported.path.with_suffix(".json")) as temporary:
                temporary.write_text(json.dumps({"data": data, "rows": plain}, indent=2))
            print(f"ONNX:        {exported.path}")
            print(
                f"Engine:      {exported.engine_path or 'none: no TensorRT builder is installed'}"
            )
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                print(f"TensorBoard: tensorboard --logdir {logger.root_dir}")


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
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    if is_overridden("test_dataloader", data, L.LightningDataModule):
        data.setup("test")
        return data.test_dataloader()
    return data.val_dataloader()
