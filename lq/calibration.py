"""Find the ranges of a quantized model from a few batches, without Lightning."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lq.calibrators import parse_calibrator, weight_amax
from lq.observers import RangeObserver
from lq.quantizer import Mode
from lq.surgery import quantized_layers, quantizers

log = logging.getLogger(__name__)
ModuleT = TypeVar("ModuleT", bound=nn.Module)
_TARGETS = {"label", "labels", "target", "targets"}


class RangeCollector:
    """Collects the statistics of a model's quantizers while somebody else runs it.

    ``start``, run some batches, ``finish``. Between ``pause`` and ``resume`` nothing is collected
    (validation). Ranges are set only by ``finish``, all together, so a run that is interrupted
    leaves the model as it was.

    Args:
        model: A quantized model.
        calibrator: ``"max"`` or ``"percentile(p)"``.
    """

    def __init__(self, model: nn.Module, calibrator: str = "max") -> None:
        self.model = model
        self.calibrator = parse_calibrator(calibrator)
        self.observers: dict[str, RangeObserver] = {}
        self._modes = {name: q.mode for name, q in quantizers(model).items()}
        if not self._modes:
            raise ValueError(
                "Expected a quantized model, but found no quantizers; call lq.quantize first."
            )

    def start(self) -> None:
        """Begin to observe the inputs of all layers, the model running in float."""
        for name, quantizer in quantizers(self.model).items():
            if quantizer.spec.needs_scale and not name.endswith("weight_quantizer"):
                self.observers[name] = self.calibrator.observer(quantizer.name)
                quantizer.observer = self.observers[name]
        self.resume()

    def resume(self) -> None:
        """Go on collecting."""
        for name, quantizer in quantizers(self.model).items():
            quantizer.mode = Mode.OBSERVE if name in self.observers else Mode.BYPASS

    def pause(self) -> None:
        """Stop collecting for a while; the model runs in float."""
        set_mode(self.model, Mode.BYPASS)

    def next_batch(self) -> None:
        """Count a batch, for messages."""
        for observer in self.observers.values():
            observer.batch += 1

    def abort(self) -> None:
        """Stop collecting and put every quantizer into the mode it had."""
        for name, quantizer in quantizers(self.model).items():
            quantizer.observer = None
            quantizer.mode = self._modes[name]

    def finish(self) -> None:
        """Set the ranges of all quantizers that saw data, and quantize from here on.

        Raises:
            RuntimeError: If no quantizer saw data, or a weight is not finite; the model is left
                as it was before ``start``.
        """
        try:
            ranges = self._input_ranges() | weight_ranges(self.model)
        finally:
            self.abort()
        set_ranges(self.model, ranges)
        set_mode(self.model, Mode.QUANTIZE)

    def _input_ranges(self) -> dict[str, Tensor]:
        found = quantizers(self.model)
        ranges = {}
        for name, observer in self.observers.items():
            scale = found[name].scale
            assert scale is not None
            observer.synchronize(scale.device)
            if observer.amax is not None:
                ranges[name] = self.calibrator.amax(observer)
        if self.observers and not ranges:
            raise RuntimeError(
                "Expected the batches to reach the quantized layers, but no quantizer saw data."
            )
        unseen = sorted(self.observers.keys() - ranges.keys())
        if unseen:
            log.warning("No calibration data reached %s; they stay uncalibrated.", unseen)
        return ranges


def set_mode(model: nn.Module, mode: Mode) -> None:
    """Put all quantizers of a model into one mode."""
    for quantizer in quantizers(model).values():
        quantizer.mode = mode


@contextmanager
def quantizer_mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Put all quantizers of a model into one mode for a while, then each as it was."""
    modes = {q: q.mode for q in quantizers(model).values()}
    set_mode(model, mode)
    try:
        yield
    finally:
        for quantizer, before in modes.items():
            quantizer.mode = before


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode without gradients for a while, then each module as it was."""
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in training.items():
            module.training = mode


def set_ranges(model: nn.Module, ranges: Mapping[str, Tensor]) -> None:
    """Set the largest magnitudes of quantizers by their qualified names."""
    found = quantizers(model)
    for name, amax in ranges.items():
        found[name].amax = amax


def calibrate_weights(model: nn.Module) -> None:
    """Set the ranges of all weights, which takes no data.

    Raises:
        RuntimeError: If a weight holds NaN or infinity, naming its layer.
    """
    set_ranges(model, weight_ranges(model))


def weight_ranges(model: nn.Module) -> dict[str, Tensor]:
    """Return the largest magnitudes of all quantized weights, by their quantizers' names.

    Raises:
        RuntimeError: If a weight holds NaN or infinity, naming its layer.
    """
    ranges = {}
    for name, layer in quantized_layers(model).items():
        quantizer, weight = layer.weight_quantizer, layer.weight
        if quantizer.spec.needs_scale and isinstance(weight, Tensor):
            amax = weight_amax(weight, quantizer.spec.axis)
            if not bool(amax.isfinite().all()):
                raise RuntimeError(f"Expected finite weights, but {name!r} has NaN or infinity.")
            ranges[f"{name}.weight_quantizer" if name else "weight_quantizer"] = amax
    return ranges


def model_inputs(model: nn.Module, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments with which a batch calls a model, on the model's device.

    A tensor is the input; a sequence is inputs followed by the target, which is dropped; a
    mapping gives keyword arguments, less labels that ``forward`` does not take.

    Example:
        >>> model_inputs(nn.Identity(), (torch.ones(2), torch.zeros(2)))[0]
        (tensor([1., 1.]),)
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    if isinstance(batch, Mapping):
        taken = inspect.signature(model.forward).parameters
        named = {k: v for k, v in batch.items() if k not in _TARGETS or k in taken}
        return (), {k: _to(v, device) for k, v in named.items()}
    if isinstance(batch, (list, tuple)):
        if not batch:
            raise ValueError("Expected a batch to hold an input, but got an empty sequence.")
        inputs = batch[0] if len(batch) <= 2 else batch[:-1]
        inputs = tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,)
    else:
        inputs = (batch,)
    return tuple(_to(x, device) for x in inputs), {}


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def calibrate(
    model: ModuleT, batches: Iterable[Any], calibrator: str = "max", progress: bool = True
) -> ModuleT:
    """Find the ranges of a quantized model from a few batches.

    The model runs in float, in eval mode, without gradients; afterwards every module is in the
    mode it was and the quantizers quantize. Ranges are those of all ranks where training is
    distributed.

    Args:
        model: A model that ``quantize`` has prepared.
        batches: Iterable of tensors, (input, target) pairs, or mappings of keyword arguments.
        calibrator: ``"max"``, ``"percentile"`` or ``"percentile(99.9)"``.
        progress: Show a progress bar.

    Returns:
        The same `model`.

    Raises:
        ValueError: If `batches` is empty or the calibrator unknown.
        RuntimeError: If an activation or a weight is not finite, naming the layer.

    Example:
        >>> from lq import quantize
        >>> model = quantize(nn.Sequential(nn.Linear(2, 2)), "tensorrt_int8")
        >>> _ = calibrate(model, [torch.tensor([[0.5, -1.27]])], progress=False)
        >>> model[0].input_quantizer
        Quantizer(int8, scale=0.01)
    """
    collector = RangeCollector(model, calibrator)
    count = 0
    try:
        collector.start()
        with eval_mode(model):
            for batch in tqdm(batches, "Calibrating", disable=not progress, leave=False):
                args, kwargs = model_inputs(model, batch)
                model(*args, **kwargs)
                collector.next_batch()
                count += 1
        if count == 0:
            raise ValueError("Expected `batches` to hold at least one batch, but got none.")
    except BaseException:
        collector.abort()
        raise
    collector.finish()
    return model
