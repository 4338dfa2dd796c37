"""The ``lq`` command: Lightning's CLI with quantization in it."""

from __future__ import annotations

import os
import sys
from itertools import islice
from pathlib import Path

import lightning as L
from lightning.pytorch.cli import LightningCLI

import lq
from lq.callbacks.calibration import calibration_batches
from lq.callbacks.target import target_module
from lq.checkpoint import read_checkpoint
from lq.export import build_engine, export_onnx
from lq.export.engine import INSTALL, find_builder
from lq.module import QuantModule


class Trainer(L.Trainer):
    """Lightning's Trainer, which can also export."""

    def export(
        self,
        model: QuantModule,
        datamodule: L.LightningDataModule,
        ckpt_path: str | None = None,
        path: str = "model.onnx",
        target: str = "tensorrt",
        engine: bool = True,
        batches: int = 4,
    ) -> None:
        """Export a checkpoint to ONNX and, where a builder is installed, to a TensorRT engine.

        Args:
            model: The module to export.
            datamodule: Gives the sample and the batches for the parity check.
            ckpt_path: Checkpoint to export.
            path: ONNX file to write; the engine lies beside it.
            target: What will run it: tensorrt.
            engine: Build a TensorRT engine too.
            batches: How many batches the parity check compares.
        """
        if ckpt_path is None:
            raise ValueError("Expected a checkpoint to export; give one with --ckpt_path.")
        model.configure_model()
        model.load_state_dict(read_checkpoint(ckpt_path)["state_dict"])
        datamodule.prepare_data()
        datamodule.setup("fit")
        self.datamodule = datamodule
        samples = list(islice(calibration_batches(self), batches))
        report = export_onnx(
            target_module(model, None), samples[0], path, target=target, batches=samples
        )
        print(f"Wrote {path}: {report.summary()}")
        if engine and find_builder() is None:
            print(f"Kept {path} without an engine: {INSTALL}")
        elif engine:
            info = build_engine(path, Path(path).with_suffix(".engine"))
            print(
                f"Wrote {Path(path).with_suffix('.engine')}: {info.size_mb:.2f} MB for "
                f"{info.compute_capability}, {info.builder}"
            )


class CLI(LightningCLI):
    """Lightning's CLI for ``QuantModule`` and any data module, with ``lq export``."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, with the arguments that the CLI fills in itself."""
        return {**LightningCLI.subcommands(), "export": {"model", "datamodule"}}

    def before_instantiate_classes(self) -> None:
        """Load checkpoints without unpickling."""
        config = self.config[self.subcommand]
        if "weights_only" in config:
            config["weights_only"] = True


def main(args: list[str] | None = None) -> None:
    """Run the ``lq`` command.

    A mistake in a config or in data ends with one line and exit code 2; ``LQ_TRACEBACK=1`` shows
    where it came from.
    """
    arguments = sys.argv[1:] if args is None else args
    if arguments == ["--version"]:
        print(f"lq {lq.__version__}")
        return
    try:
        CLI(
            QuantModule,
            L.LightningDataModule,
            subclass_mode_data=True,
            trainer_class=Trainer,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"prog": "lq", "description": lq.__doc__},
            args=arguments,
        )
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        if os.environ.get("LQ_TRACEBACK") == "1":
            raise
        lines = str(error).strip().splitlines() or [type(error).__name__]
        print(f"lq: error: {' '.join(lines[:2])}", file=sys.stderr)
        sys.exit(2)
