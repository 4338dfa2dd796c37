"""Export at the end of a fit, validation or test."""

from __future__ import annotations

import inspect
import logging
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor, nn

from lq.callbacks.target import target_module
from lq.export import build_engine, export_onnx
from lq.export.engine import INSTALL, find_builder
from lq.export.targets import TARGETS, check_target
from lq.files import check_file_path
from lq.parity import ParityReport

log = logging.getLogger(__name__)


class Export(L.Callback):
    """Writes the trained model, or a part of it, as ONNX and as a TensorRT engine.

    The sample and the batches for the parity check are the first inputs that the part received
    while the trainer ran. The engine lies beside the ONNX file; where no builder is installed the
    ONNX file is kept and a log message names the extras.

    Args:
        path: ONNX file to write.
        module: Submodule to export; a QuantModule's model, or the whole module, if not given.
        target: What will run it: ``tensorrt``, ``onnxruntime`` or ``openvino``.
        engine: For ``tensorrt``, build an engine too.
        batches: How many batches the parity check compares.
    """

    def __init__(
        self,
        path: str | Path,
        module: str | None = None,
        target: str = "tensorrt",
        engine: bool = True,
        batches: int = 4,
    ) -> None:
        if target not in TARGETS:
            raise ValueError(
                f"Expected `target` to be one of {', '.join(TARGETS)}, but got {target!r}."
            )
        if batches < 1:
            raise ValueError(f"Expected `batches` to be at least 1, but got {batches}.")
        check_file_path(path)
        self.path, self.module, self.target = Path(path), module, target
        self.engine, self.batches = engine, batches
        self.report: ParityReport | None = None
        self.engine_path: Path | None = None
        self._seen: list[Any] = []
        self._hook: Any = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Wait for the first inputs."""
        self._seen = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Refuse what the target cannot run before anything is trained, and listen."""
        check_target(self._part(pl_module), self.target)
        self._listen(pl_module)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen."""
        self._listen(pl_module)

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Listen."""
        self._listen(pl_module)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export what was trained."""
        self._export(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export after a validation on its own."""
        if trainer.state.fn == "validate":
            self._export(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export what was tested."""
        self._export(trainer, pl_module)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        """Stop listening."""
        self._stop()

    def _part(self, pl_module: L.LightningModule) -> nn.Module:
        target = target_module(pl_module, self.module)
        if isinstance(target, L.LightningModule):
            raise ValueError(
                f"Expected `module` to name a part of {type(target).__name__}, but got "
                f"{self.module!r}: a LightningModule as a whole holds its trainer."
            )
        return target

    def _listen(self, pl_module: L.LightningModule) -> None:
        if self._hook is None and len(self._seen) < self.batches:
            target = self._part(pl_module)
            self._hook = target.register_forward_pre_hook(self._keep, with_kwargs=True)

    def _keep(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._seen.append(detached(as_batch(module, args, kwargs)))
        if len(self._seen) >= self.batches:
            self._stop()

    def _stop(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _export(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()
        if not trainer.is_global_zero:
            return
        if not self._seen:
            raise RuntimeError(
                f"Expected the forward of {self.module or type(pl_module).__name__!r} to be "
                "called, but it never was; name the `module` whose forward runs."
            )
        self.report = export_onnx(
            self._part(pl_module), self._seen[0], self.path, target=self.target, batches=self._seen
        )
        log.info("Wrote %s", self.path)
        if self.engine and self.target == "tensorrt":
            self._build()

    def _build(self) -> None:
        if find_builder() is None:
            log.warning("Kept %s without an engine: %s", self.path, INSTALL)
            return
        engine = self.path.with_suffix(".engine")
        build_engine(self.path, engine)
        self.engine_path = engine
        log.info("Wrote %s", engine)


def as_batch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return a call's arguments as a batch: all by name where any was."""
    if not kwargs:
        return (args,)
    return dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)


def detached(value: Any) -> Any:
    """Return a copy of the tensors in a batch, on the CPU."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {k: detached(v) for k, v in value.items()}
    return tuple(detached(v) for v in value) if isinstance(value, (list, tuple)) else value
