"""Looks at the quantizers of a model during a step of its training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from lq.quantizer import Mode, Quantizer
from lq.quantizer_health import channel_axis, drift, gradient_norm, quantizer_health
from lq.surgery import quantizers

Show = Callable[[str, Tensor], None]


class QuantizerWatch:
    """Measures the quantizers of a model during single steps of its training.

    Call ``start`` before a step, ``note_gradients`` before the optimizer's, and ``finish`` after
    it. In between steps nothing is hooked.

    Attributes:
        first: Quantizer -> the range it had when it was first looked at, which drift is measured
            from.

    Example:
        >>> import torch
        >>> from lq import calibrate, quantize
        >>> model = quantize(nn.Linear(4, 2), "tensorrt_int8")
        >>> model = calibrate(model, [torch.ones(1, 4)], progress=False)
        >>> watch = QuantizerWatch()
        >>> watch.start(model)
        True
        >>> _ = model(torch.full((1, 4), 1.5))
        >>> found = watch.finish()
        >>> found["input_quantizer/clip_rate"], found["input_quantizer/drift"]
        (1.0, 0.0)
    """

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}
        self._found: dict[str, float] = {}
        self._working: dict[str, Quantizer] = {}
        self._hooks: list[Any] = []

    @property
    def is_on(self) -> bool:
        """Whether a step is being looked at."""
        return bool(self._hooks)

    def start(self, model: nn.Module, show: Show | None = None) -> bool:
        """Look at the next step of a model, and return whether any quantizer works yet.

        Args:
            model: A quantized model.
            show: Is given the name of each quantizer and what it is given.
        """
        self.abort()
        for name, quantizer in quantizers(model).items():
            if quantizer.mode is Mode.QUANTIZE and quantizer.is_calibrated:
                self._working[name] = quantizer
                if quantizer.amax is not None:
                    self.first.setdefault(name, quantizer.amax.clone())
                owner = model.get_submodule(name.rpartition(".")[0])
                self._hooks.append(quantizer.register_forward_hook(self._look(name, owner, show)))
        return self.is_on

    def note_gradients(self, loss_scale: float = 1.0) -> None:
        """Measure the gradients of learned ranges, which the loss was scaled by a factor for."""
        for name, quantizer in self._working.items():
            norm = gradient_norm(quantizer)
            if norm is not None:
                self._found[f"{name}/scale_gradient"] = norm / loss_scale

    def finish(self) -> dict[str, float]:
        """Return what was measured: ``<quantizer>/<figure>`` -> value."""
        found = self._found
        self.abort()
        return found

    def abort(self) -> None:
        """Look no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._working, self._found = [], {}, {}

    def _look(self, name: str, owner: nn.Module, show: Show | None) -> Callable[..., None]:
        def hook(quantizer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            # An addition's next input is quantized already; an empty batch tells nothing, and
            # integers pass as they are.
            given = args[0].numel() and args[0].is_floating_point()
            if f"{name}/sqnr_db" in self._found or not given:
                return
            assert isinstance(quantizer, Quantizer)
            axis = channel_axis(quantizer, owner, args[0])
            figures = quantizer_health(quantizer, args[0], output, axis)
            amax = quantizer.amax
            if amax is not None:
                figures["drift"] = drift(self.first[name].to(amax.device), amax)
            self._found |= {f"{name}/{figure}": value for figure, value in figures.items()}
            if show is not None:
                show(name, args[0])

        return hook
