"""How much error a range causes at the output of the layers it feeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lq.batches import tensors
from lq.modes import set_mode
from lq.quantizer import Mode, Quantizer
from lq.ranges import Ranges
from lq.ranks import world_size
from lq.surgery import quantized_layers, quantizers

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Positional and keyword arguments."""


class RangeScorer:
    """Tries candidate ranges while somebody else runs the model in float.

    The error of a range is that of the layer's output when its quantizer alone quantizes,
    ``sum (y_q - y)^2 / sum y^2``, added up over the layers that share the quantizer. A quantizer
    that feeds no layer, such as a residual's, is judged by its own output.

    Args:
        model: A quantized model, its quantizers in bypass.
        candidates: Quantizer -> calibrator -> range.

    Attributes:
        active: Whether the batches that run now count.
    """

    def __init__(self, model: nn.Module, candidates: Mapping[str, Mapping[str, Tensor]]) -> None:
        self.active = True
        self.candidates = candidates
        self._quantizers = quantizers(model)
        self._judged_by = _judges(model, list(candidates))
        self._signal: dict[nn.Module, Tensor] = {}
        self._noise: dict[tuple[nn.Module, str, str], Tensor] = {}
        self._hooks = [
            module.register_forward_hook(self._try_all, with_kwargs=True)
            for module in self._judged_by
        ]

    def stop(self) -> None:
        """Take the hooks out of the model."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def errors(self) -> dict[str, dict[str, float]]:
        """Return quantizer -> calibrator -> error; quantizers that nothing reached are missing.

        Errors are those of all ranks where training is distributed.
        """
        errors: dict[str, dict[str, float]] = {}
        for module, names in self._judged_by.items():
            signal = _summed_over_ranks(self._signal.get(module), module)
            for name in names:
                for calibrator in self.candidates[name]:
                    noise = _summed_over_ranks(self._noise.get((module, name, calibrator)), module)
                    if signal > 0:
                        found = errors.setdefault(name, {})
                        found[calibrator] = found.get(calibrator, 0.0) + noise / signal
        return errors

    @torch.no_grad()
    def _try_all(self, module: nn.Module, args: Any, kwargs: Any, _output: Any) -> None:
        if not self.active:
            return
        self.active = False  # a layer within this one, such as attention's, would count its trials
        with _alone(module) as forward:
            expected = forward(*args, **kwargs)
            self._add(self._signal, module, expected)
            for name in self._judged_by[module]:
                for calibrator, amax in self.candidates[name].items():
                    with _trial(self._quantizers[name], amax):
                        error = forward(*args, **kwargs) - expected
                    self._add(self._noise, (module, name, calibrator), error)
        self.active = True

    @staticmethod
    def _add(sums: dict[Any, Tensor], key: Any, values: Tensor) -> None:
        # In float64, since outliers of 1e30 have squares beyond float32.
        power = torch.linalg.vector_norm(values, dtype=torch.float64).square()
        sums[key] = sums[key] + power if key in sums else power


def output_errors(
    model: nn.Module, rivals: Mapping[str, Ranges], inputs: Sequence[Call]
) -> dict[str, float]:
    """Return the error of the model's outputs with each of several ranges for the whole model.

    ``sum (y_q - y)^2 / sum y^2``, on all ranks where training is distributed. The model is left
    with the last ranges, quantizing.

    Args:
        model: A quantized model.
        rivals: Ranges by name.
        inputs: Arguments of the calls to compare.
    """
    set_mode(model, Mode.BYPASS)
    expected = [tensors(model(*args, **kwargs)) for args, kwargs in inputs]
    signal = _power([y for outputs in expected for y in outputs], model)
    errors = {}
    for name, ranges in rivals.items():
        ranges.apply(model)
        set_mode(model, Mode.QUANTIZE)
        differences = [
            got - y
            for (args, kwargs), outputs in zip(inputs, expected, strict=True)
            for got, y in zip(tensors(model(*args, **kwargs)), outputs, strict=True)
            if y.is_floating_point()
        ]
        errors[name] = _power(differences, model) / signal if signal > 0 else 0.0
    return errors


def _power(values: Sequence[Tensor], module: nn.Module) -> float:
    floats = [y for y in values if y.is_floating_point()]
    total = sum((y.double().square().sum() for y in floats), torch.zeros((), dtype=torch.float64))
    return _summed_over_ranks(total, module)


def _judges(model: nn.Module, names: list[str]) -> dict[nn.Module, list[str]]:
    """Return the modules whose outputs are looked at, with the quantizers each is affected by."""
    found = quantizers(model)
    by_module: dict[nn.Module, list[str]] = {}
    for layer in quantized_layers(model).values():
        own = (layer.input_quantizer, layer.weight_quantizer)
        by_module[layer] = [name for name in names if found[name] in own]
    judged = {name for fed in by_module.values() for name in fed}
    by_module |= {found[name]: [name] for name in names if name not in judged}
    return {module: affecting for module, affecting in by_module.items() if affecting}


@contextmanager
def _alone(module: nn.Module) -> Iterator[Callable[..., Tensor]]:
    """Give what returns a module's first output, without its hooks and, for a while, dropout."""
    training = module.training
    module.training = False
    try:
        yield lambda *args, **kwargs: tensors(type(module).forward(module, *args, **kwargs))[0]
    finally:
        module.training = training


@contextmanager
def _trial(quantizer: Quantizer, amax: Tensor) -> Iterator[None]:
    """Let one quantizer quantize with a range for a while."""
    before, mode = quantizer.saved(), quantizer.mode
    quantizer.amax, quantizer.mode = amax, Mode.QUANTIZE
    try:
        yield
    finally:
        quantizer.restore(*before)
        quantizer.mode = mode


def _summed_over_ranks(value: Tensor | None, module: nn.Module) -> float:
    if world_size() == 1:
        return 0.0 if value is None else float(value)
    held = [*module.parameters(), *module.buffers()]
    total = torch.zeros((), dtype=torch.float64, device=held[0].device) if value is None else value
    total = total.clone()
    torch.distributed.all_reduce(total)
    return float(total)
