"""The ``lq`` command: Lightning's CLI with quantization in it."""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from torch import nn

import lq
from lq.calibration import find_ranges
from lq.callbacks.calibration import calibration_batches
from lq.callbacks.fine_tuning import fine_tune, training_of
from lq.callbacks.target import target_module
from lq.checkpoint import read_checkpoint
from lq.comparison import compare, parse_methods
from lq.costs import count_costs
from lq.data import ImageDataModule
from lq.export import build_engine, export_onnx, triton_repository
from lq.export.engine import INSTALL, find_builder
from lq.export.linter import command as lint_command
from lq.inspection import command as inspect_command
from lq.messages import one_line
from lq.mixed_precision import PrecisionConstraints, pareto_front, verified_search
from lq.module import QuantModule
from lq.sensitivity import Sensitivity, sweep
from lq.sensitivity.run import FirstBatches
from lq.sensitivity.validation import shuffled
from lq.spec import Recipe
from lq.surgery import dequantize, quantized_layers

LINT = "\nAnd lq lint model.onnx and lq inspect FILE, which need no config: see their --help."
KEYWORDS = ("best", "last", "hpc")
"""What ``--ckpt_path`` may say instead of a path."""


class Trainer(L.Trainer):
    """Lightning's Trainer, which can also calibrate, compare, sweep, search and export."""

    def export(
        self,
        model: QuantModule,
        datamodule: L.LightningDataModule,
        ckpt_path: str | None = None,
        path: str = "model.onnx",
        target: str = "tensorrt",
        engine: bool = True,
        batches: int = 4,
        serve: str | None = None,
    ) -> None:
        """Export a checkpoint to ONNX and, where a builder is installed, to a TensorRT engine.

        Args:
            model: The module to export.
            datamodule: Gives the sample and the batches for the parity check.
            ckpt_path: Checkpoint to export.
            path: ONNX file to write; the engine lies beside it.
            target: What will run it: tensorrt, onnxruntime or openvino.
            engine: For tensorrt, build an engine too.
            batches: How many batches the parity check compares.
            serve: triton writes a model repository for Triton Inference Server beside the file: of
                the TensorRT engine, or else of the ONNX file.
        """
        if serve not in (None, "triton"):
            raise ValueError(f"Expected `serve` to be triton, but got {serve!r}.")
        if ckpt_path is None:
            raise ValueError("Expected a checkpoint to export; give one with --ckpt_path.")
        samples = list(islice(self._prepared(model, datamodule, ckpt_path), max(batches, 0)))
        if not samples:
            raise ValueError(
                "Expected `batches` to be at least 1, but got none; give another --batches or "
                "other data."
            )
        report = export_onnx(
            target_module(model, None), samples[0], path, target=target, batches=samples
        )
        print(f"Wrote {path}: {report.summary()}")
        if not quantized_layers(model):
            print("Nothing in it is quantized: the checkpoint is that of a model without a recipe.")
        served = Path(path)
        if target == "tensorrt" and engine:
            served = self._build_engine(served)
        if serve is not None:
            folder = triton_repository(served, Path(path).with_name("triton"))
            print(f"Serve it: tritonserver --model-repository={folder.parent}")

    @staticmethod
    def _build_engine(path: Path) -> Path:
        """Build an engine where a builder is installed; return what a server of NVIDIA's runs."""
        builder, built = find_builder(), path.with_suffix(".engine")
        if builder is None:
            print(f"Kept {path} without an engine: {INSTALL}")
            return path
        info = build_engine(path, built)
        print(f"Wrote {built}: {info.summary()}")
        return built if builder.__name__ == "tensorrt" else path  # not one of TensorRT-RTX

    def calibrate(
        self,
        model: QuantModule,
        datamodule: L.LightningDataModule,
        ckpt_path: str | None = None,
        calibrator: str = "auto",
        batches: int = 16,
        cache: str = "ranges.json",
    ) -> None:
        """Find the ranges of a model, print how they were chosen, and keep them in a JSON file.

        The Calibration callback takes them from there (`cache`), as long as model and data are the
        same.

        Args:
            model: The module to calibrate.
            datamodule: Gives the batches.
            ckpt_path: Checkpoint with the weights; without it, those of --model.weights.
            calibrator: max, percentile, percentile(99.9), entropy, mse, or auto: all of them are
                tried, and the best is taken for each quantizer or, if that is better, for all.
            batches: How many batches to look at.
            cache: File of the ranges. Used if it is of the same model and data, refused if of
                others.
        """
        samples = islice(self._prepared(model, datamodule, ckpt_path), max(batches, 0))
        if isinstance(datamodule, ImageDataModule):
            print(datamodule.calibration_dataset().report())
        print(find_ranges(target_module(model, None), samples, calibrator, cache=cache).table())
        print(f"Ranges: {cache}")

    def sensitivity(
        self,
        model: QuantModule,
        datamodule: L.LightningDataModule,
        ckpt_path: str | None = None,
        path: str = "sensitivity.json",
        formats: list[str] = ["int8"],  # noqa: B006
        method: str = "exact",
        metric: str | None = None,
        units: str = "layers",
        parts: list[str] = ["both"],  # noqa: B006
        left_float: bool = False,
        batches: int = 16,
        calibrator: str = "max",
    ) -> None:
        """Measure what each layer costs in each number format, and print the worst first.

        A sweep that was killed goes on where it stopped, from the journal beside `path`.

        Args:
            model: The module to sweep; its recipe says what else is quantized where a layer is.
            datamodule: Gives the validation data to measure on, and the batches to calibrate with.
            ckpt_path: Checkpoint with the weights; without it, those of --model.weights.
            path: JSON file to write; a CSV file and the journal lie beside it.
            formats: int8, fp8_e4m3, fp16, bf16, int4 (weights alone), ...
            method: exact, adaptive (exact, on few batches for clear cases), or gradient (an
                estimate from one backward pass a batch).
            metric: What layers are ranked by: top1, top5, loss, kl or sqnr; top1 where there are
                class numbers, unless given.
            units: layers, inputs (layers that read one tensor), or blocks.
            parts: Which of both, weights and inputs of the layers to quantize.
            left_float: Also measure each unit left float in a model that is all in the format.
            batches: How many batches of validation data to measure on, in a fixed random order.
            calibrator: How ranges are found: max, percentile, entropy or mse.
        """
        calibration = FirstBatches(self._prepared(model, datamodule, ckpt_path))
        found = sweep(
            dequantize(target_module(model, None)),
            shuffled(datamodule.val_dataloader(), batches),
            formats,
            method,
            metric,
            model.recipe or "tensorrt_int8",
            units,
            parts,
            left_float,
            calibration=calibration,
            calibrator=calibrator,
            journal=Path(path).with_suffix(".jsonl"),
        )
        found.save(path)
        print(f"{found.table()}\nSensitivity: {path}")

    def search(
        self,
        model: QuantModule,
        datamodule: L.LightningDataModule,
        constraints: PrecisionConstraints,
        ckpt_path: str | None = None,
        plan: str = "plan.yaml",
        sensitivity: str | None = None,
        formats: tuple[str, ...] = ("int8", "fp16"),
        metric: str = "kl",
        batches: int = 16,
        latency_cache: str = "latency.json",
    ) -> None:
        """Search the best mix of formats under limits, verify it by measuring, and write the plan.

        The plan is searched for the float model; the module's recipe says what additions get. It
        stands wherever a recipe does: --model.recipe=plan.yaml. A search whose sweep was killed
        goes on from the journal beside it.

        Args:
            model: The module to search for.
            datamodule: Gives calibration batches, and validation data to measure on.
            constraints: The limits, such as --constraints.max_accuracy_drop=0.01.
            ckpt_path: Checkpoint with the weights; without it, those of --model.weights.
            plan: YAML file to write.
            sensitivity: JSON file of a sweep of the same model; without it the layers are swept.
            formats: Formats for layers, besides fp32.
            metric: What the sweep ranks by: kl, loss, top1, top5 or sqnr.
            batches: How many calibration batches to look at.
            latency_cache: JSON file of latencies by hardware, where a latency is limited.
        """
        samples = list(islice(self._prepared(model, datamodule, ckpt_path), max(batches, 0)))
        if not samples:
            raise ValueError(f"Expected `batches` to be at least 1, but got {batches}.")
        recipe, journal = model.recipe or Recipe(), Path(plan).with_suffix(".jsonl")
        net = dequantize(model.model).eval()
        found = (
            sweep(net, samples, formats, metric=metric, recipe=recipe, journal=journal)
            if sensitivity is None
            else Sensitivity.from_json(sensitivity)
        )
        costs = found.costs or count_costs(net, samples[0])
        if constraints.is_timed:
            from lq.latency import measure_latency  # which imports every engine

            costs = measure_latency(net, samples[0], found.formats, latency_cache, recipe, costs)
        print("Predicted, for limits on the size:")
        for point in pareto_front(found, costs):
            print(f"  {point.predicted}: {point}")
        datamodule.setup("validate")
        held_out = datamodule.val_dataloader()
        verified = verified_search(net, found, constraints, samples, held_out, costs, recipe)
        print(verified)
        verified.plan.to_yaml(plan, recipe)
        journal.unlink(missing_ok=True)
        print(f"Plan: {plan}")

    def compare(
        self,
        model: QuantModule,
        datamodule: L.LightningDataModule,
        methods: dict[Any, Any] | None = None,
        folder: str = "comparison",
        ckpt_path: str | None = None,
        target: str = "onnxruntime",
        use: str = "server",
        batches: int = 16,
        batch_sizes: list[int] = [1],  # noqa: B006
        threads: list[int] = [0],  # noqa: B006
    ) -> None:
        """Quantize by several methods, measure each on the test data, and write a report.

        Calibration batches find ranges, validation data choose (repairs, mixes of formats), and
        test data measure. Each row is kept as soon as it is there, so a killed comparison goes on
        where it stopped.

        Args:
            model: The module; its recipe is that of methods that name none.
            datamodule: Gives calibration batches, validation data and test data.
            methods: Name -> method: kind ptq, qat, mixed or file, with its settings: recipe,
                calibrator, repair (ptq), epochs (qat), constraints and formats (mixed), path
                (file). If not given, FP16, every calibrator, repair, QAT and mixed precision.
            folder: Where models, rows and the report are kept.
            ckpt_path: Checkpoint with the weights; without it, those of --model.weights.
            target: What will run the models: onnxruntime, openvino or tensorrt.
            use: What the recommendation is for: edge (size), server (throughput) or real_time
                (time of one sample).
            batches: How many calibration batches to look at.
            batch_sizes: Sizes of the batches that are timed.
            threads: Numbers of threads they are timed with; 0 is the engine's own choice.
        """
        from lq.report import check_use, recommend, write_report  # which imports matplotlib

        check_use(use)
        parsed = None if methods is None else parse_methods(methods)
        samples = list(islice(self._prepared(model, datamodule, ckpt_path), max(batches, 0)))
        if not samples:
            raise ValueError(f"Expected `batches` to be at least 1, but got {batches}.")
        datamodule.setup("test")

        def train(net: nn.Module, epochs: int, folder: Path) -> list[dict[str, float]]:
            kind = self.strategy.root_device.type
            return fine_tune(model, net, epochs, datamodule, kind, None, folder, validate=True)

        found = compare(
            dequantize(copy.deepcopy(model.model)),
            samples,
            datamodule.val_dataloader(),
            datamodule.test_dataloader(),
            parsed,
            folder,
            model.recipe,
            target,
            train,
            training_of(model, datamodule),
            batch_sizes,
            threads,
            getattr(datamodule, "name", type(datamodule).__name__),
            str(model.hparams.get("model", "")).rsplit(".")[-1],
        )
        page = write_report(found, folder, use)
        print(found.table())
        print("\n".join(f"- {advice}" for advice in recommend(found, use)))
        print(f"Report: {page}")

    def _prepared(
        self,
        model: QuantModule,
        datamodule: L.LightningDataModule,
        ckpt_path: str | None,
    ) -> Iterable[Any]:
        """Configure a module, give it a checkpoint's weights, and return calibration batches."""
        model.configure_model()
        if ckpt_path is not None:
            model.load_state_dict(read_checkpoint(ckpt_path)["state_dict"])
        datamodule.prepare_data()
        datamodule.setup("fit")
        self.datamodule = datamodule
        return calibration_batches(self)


class CLI(LightningCLI):
    """Lightning's CLI for ``QuantModule`` and any data module, and commands of its own."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands, with the arguments that the CLI fills in itself."""
        own = ("calibrate", "compare", "export", "search", "sensitivity")
        filled = {name: {"model", "datamodule"} for name in own}
        return {**LightningCLI.subcommands(), **filled}

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse the arguments, and read the checkpoint before anything is built on it."""
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if path and path not in KEYWORDS:
            if not {"pytorch-lightning_version", "state_dict"} <= read_checkpoint(path).keys():
                raise ValueError(
                    f"Expected {path!r} to be a checkpoint of a fit, but it holds weights only; "
                    "give them with --model.weights."
                )
            config["model"]["weights"] = None  # the checkpoint's take their place
        if "weights_only" in config:
            config["weights_only"] = True


def main(args: list[str] | None = None) -> None:
    """Run the ``lq`` command.

    A mistake in a config or in data ends with one line and exit code 2; ``LQ_TRACEBACK=1`` shows
    where it came from.
    """
    given = sys.argv[1:] if args is None else args
    if given == ["--version"]:
        print(f"lq {lq.__version__}")
        return
    if given[:1] == ["lint"]:  # a file is all it needs, where other commands need model and data
        sys.exit(lint_command.main(given[1:]))
    if given[:1] == ["inspect"]:
        sys.exit(inspect_command.main(given[1:]))
    try:
        CLI(
            QuantModule,
            L.LightningDataModule,
            subclass_mode_data=True,
            trainer_class=Trainer,
            # Not config.yaml, which may be the user's own in the same folder.
            save_config_kwargs={"overwrite": True, "config_filename": "lq_config.yaml"},
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={
                "prog": "lq",
                "description": f"{lq.__doc__}{LINT}",
                "exit_on_error": False,
            },
            args=args,
        )
    except Exception as error:
        if os.environ.get("LQ_TRACEBACK") == "1":
            raise
        print(f"lq: error: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
