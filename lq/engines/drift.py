"""Live data that are no longer like those a model was calibrated with."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lq.engines import open_engine
from lq.engines.base import Runner, bind_inputs
from lq.engines.clipping import (
    Counts,
    calibrated_inputs,
    clip_counts,
    counting,
    working_quantizers,
)
from lq.engines.torch_runner import TorchRunner
from lq.engines.window import Window
from lq.samples import count_samples

log = logging.getLogger(__name__)
AGREEMENT = "agreement"


@dataclass(frozen=True)
class Drift:
    """A figure that has crossed its threshold.

    Attributes:
        figure: ``"clip_rate"``, the share of values beyond the range, or ``"agreement"``, the share
            of samples for which the float model says the same.
        name: Whose: an input or a quantizer; the float model's engine.
        value: What it is, 0..1.
        threshold: What it should not cross.
    """

    figure: str
    name: str
    value: float
    threshold: float

    def __str__(self) -> str:
        if self.figure == AGREEMENT:
            return f"{self.value:.1%} of samples agree with {self.name}, under {self.threshold:.1%}"
        return (
            f"{self.value:.2%} of the values of {self.name!r} are beyond the calibrated range, "
            f"over {self.threshold:.2%}"
        )


@dataclass(frozen=True)
class DriftReport:
    """What a monitor saw last.

    Attributes:
        batches: Batches run since it began.
        clip_rates: Input or quantizer -> share of values beyond its calibrated range, 0..1.
        agreement: Share of samples for which the float model says the same, 0..1; ``None`` before
            the first comparison.
    """

    batches: int
    clip_rates: Mapping[str, float]
    agreement: float | None


class DriftMonitor(Runner):
    """Runs a model as its runner does, and looks whether the data are still those it was made for.

    Calibrated ranges are those of the first quantizer of each input of the ONNX file itself; of a
    torch model, those of all its quantizers but of weights, looked at in the sampled batches. Both
    figures are of the last samples, and judged once there are enough. Each crossing of a threshold
    is told once. Runs may be started from several threads, as far as the runner allows it.

    Args:
        model: What ``lq.open_engine`` takes.
        engine: What runs an ``.onnx`` file.
        ranges: ONNX file with the ranges, where the model is none: that of an engine.
        shadow: The float model, or a runner of it, that sampled batches are also run with.
        every: Sample one batch in so many.
        samples: How many samples a figure is of.
        max_clip_rate: Share of values beyond the range that is too much, 0..1.
        min_agreement: Share of samples with the same class that is too little, 0..1.
        on_drift: Is called with a ``Drift``; without it a warning is logged.

    Raises:
        ValueError: If an argument is out of its range, or there is nothing to look at.

    Example:
        >>> import lq, torch
        >>> model = lq.quantize(nn.Linear(4, 2), "tensorrt_int8")
        >>> model = lq.calibrate(model, [torch.ones(1, 4)], progress=False)
        >>> monitor = DriftMonitor(model, every=1, samples=2, on_drift=print)
        >>> for brightness in (1.0, 1.0, 1.5):
        ...     _ = monitor.run(torch.full((1, 4), brightness))
        50.00% of the values of 'input_quantizer' are beyond the calibrated range, over 1.00%
        >>> monitor.report()
        DriftReport(batches=3, clip_rates={'input_quantizer': 0.5}, agreement=None)
    """

    def __init__(
        self,
        model: nn.Module | str | Path | Runner,
        engine: str | None = None,
        ranges: str | Path | None = None,
        shadow: nn.Module | str | Path | Runner | None = None,
        every: int = 10,
        samples: int = 256,
        max_clip_rate: float = 0.01,
        min_agreement: float = 0.95,
        on_drift: Callable[[Drift], None] | None = None,
    ) -> None:
        _check(every, samples, max_clip_rate, min_agreement)
        self.runner = open_engine(model, engine)
        self.shadow = None if shadow is None else open_engine(shadow)
        self.every, self.samples = every, samples
        self.max_clip_rate, self.min_agreement = max_clip_rate, min_agreement
        self.on_drift = on_drift or _warn
        if ranges is None and isinstance(model, (str, Path)) and Path(model).suffix == ".onnx":
            ranges = model
        self._grids = {} if ranges is None else calibrated_inputs(ranges)
        torch_model = self.runner.model if isinstance(self.runner, TorchRunner) else nn.Module()
        self._quantizers = working_quantizers(torch_model)
        if not (any(self._grids.values()) or self._quantizers or self.shadow):
            raise ValueError(
                "Expected a model whose input is quantized, or a `shadow` to compare with, but got "
                f"neither with {self.runner.name}; name the ONNX file of an engine with `ranges`."
            )
        self.name, self.simulates = self.runner.name, self.runner.simulates
        self.size_mb, self.weights_mb = self.runner.size_mb, self.runner.weights_mb
        self._clips: dict[str, Window] = {}
        self._disagreed = Window(samples)
        self._beyond: set[tuple[str, str]] = set()
        self._numbers, self._batches = itertools.count(), 0
        self._lock, self._shadow_lock = threading.Lock(), threading.Lock()

    def many_runs(self) -> AbstractContextManager[None]:
        """Return the runner's own context for many runs."""
        return self.runner.many_runs()

    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return all outputs for one batch."""
        sampled = next(self._numbers) % self.every == 0
        if sampled and self._quantizers:
            with counting(self._quantizers) as counts:
                outputs = self.runner.run(*args, **kwargs)
        else:
            counts, outputs = {}, self.runner.run(*args, **kwargs)
        if self._grids:
            counts = counts | clip_counts(bind_inputs(list(self._grids), args, kwargs), self._grids)
        self._note_clips(count_samples([*args, *kwargs.values()]), counts)
        if sampled and self.shadow is not None:
            try:
                self._compare(self.shadow, outputs[0], args, kwargs)
            except Exception:  # what runs must not fail because what looks on does
                log.exception("Cannot compare with %s.", self.shadow.name)
        return outputs

    def report(self) -> DriftReport:
        """Return what was seen last."""
        with self._lock:
            rates = {name: window.share for name, window in self._clips.items()}
            compared = self._disagreed.total > 0
            agreement = 1 - self._disagreed.share if compared else None
            return DriftReport(self._batches, rates, agreement)

    def _note_clips(self, samples: int, counts: Counts) -> None:
        crossed: list[Drift] = []
        with self._lock:
            self._batches += 1
            for name, (beyond, total) in counts.items():
                window = self._clips.setdefault(name, Window(self.samples))
                window.add(samples, beyond, total)
                drift = Drift("clip_rate", name, window.share, self.max_clip_rate)
                if self._crosses(drift, window, drift.value > drift.threshold):
                    crossed.append(drift)
        self._tell(crossed)

    def _compare(
        self, shadow: Runner, output: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        with self._shadow_lock:  # a torch model is put into eval mode and back
            expected = shadow.run(*args, **kwargs)[0]
        if expected.shape != output.shape or output.dim() < 2 or output.shape[1] < 2:
            raise ValueError(
                "Expected outputs [N, classes, ...] of one shape to compare, but got "
                f"{list(output.shape)} and {list(expected.shape)}; leave `shadow` out."
            )
        differ = output.cpu().argmax(1) != expected.cpu().argmax(1)
        crossed = []
        with self._lock:
            window = self._disagreed
            window.add(len(output), int(differ.sum()), differ.numel())
            drift = Drift(AGREEMENT, shadow.name, 1 - window.share, self.min_agreement)
            if self._crosses(drift, window, drift.value < drift.threshold):
                crossed.append(drift)
        self._tell(crossed)

    def _crosses(self, drift: Drift, window: Window, beyond: bool) -> bool:
        """Return whether a figure is beyond its threshold now and was not before."""
        key = drift.figure, drift.name
        if not beyond or not window.is_full:
            self._beyond.discard(key)
            return False
        new = key not in self._beyond
        self._beyond.add(key)
        return new

    def _tell(self, crossed: list[Drift]) -> None:
        for drift in crossed:  # outside the lock: it may ask for a report
            try:
                self.on_drift(drift)
            except Exception:  # what runs must not fail because a message did
                log.exception("Cannot tell of drift: %s", drift)


def _warn(drift: Drift) -> None:
    log.warning("The data have drifted: %s.", drift)


def _check(every: int, samples: int, max_clip_rate: float, min_agreement: float) -> None:
    for name, count in (("every", every), ("samples", samples)):
        if count < 1:
            raise ValueError(f"Expected `{name}` to be at least 1, but got {count}.")
    for name, share in (("max_clip_rate", max_clip_rate), ("min_agreement", min_agreement)):
        if not 0 <= share <= 1:
            raise ValueError(f"Expected `{name}` to be between 0 and 1, but got {share}.")
