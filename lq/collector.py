"""Finds the ranges of a model's quantizers while somebody else runs the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from lq.calibrators import parse_calibrators
from lq.calibrators.weights import WEIGHT_CALIBRATORS
from lq.modes import QuantizerStates
from lq.observers import HistogramObserver, RangeObserver
from lq.quantizer import Mode
from lq.ranges import Range, Ranges
from lq.scoring import RangeScorer
from lq.surgery import input_quantizers, quantized_layers, quantizers

log = logging.getLogger(__name__)
Candidates = dict[str, dict[str, Tensor]]
"""Quantizer -> calibrator -> range."""


class RangeCollector:
    """Collects the statistics of a model's quantizers while somebody else runs it.

    ``start``, run some batches, ``finish``; where calibrators compete (``"auto"``), run some more
    between ``start_scoring`` and ``finish``. Between ``pause`` and ``resume`` nothing is collected
    (validation). Ranges are set only by ``finish``, all together, so a run that is interrupted
    leaves the model as it was.

    Args:
        model: A quantized model.
        calibrator: ``"max"``, ``"percentile(p)"``, ``"entropy"``, ``"mse"`` or ``"auto"``.
        subsample: Count a part of each large tensor only (see ``HistogramObserver``).
        weights: Find the ranges of weights too; those of inputs alone leave weights as they are,
            quantizing or not.
    """

    def __init__(
        self,
        model: nn.Module,
        calibrator: str = "max",
        subsample: bool = True,
        weights: bool = True,
    ) -> None:
        self.model = model
        self.weights = weights
        self.calibrators = parse_calibrators(calibrator)
        self.subsample = subsample
        self.observers: dict[str, RangeObserver] = {}
        self._candidates: Candidates = {}
        self._scorer: RangeScorer | None = None
        self._own = quantizers(model) if weights else input_quantizers(model)
        self._before = QuantizerStates(self._own.values())
        if not quantizers(model):
            raise ValueError(
                "Expected a quantized model, but found no quantizers; call lq.quantize first."
            )

    @property
    def must_score(self) -> bool:
        """Whether calibrators compete and none has been tried yet."""
        return len(self.calibrators) > 1 and self._scorer is None

    def start(self) -> None:
        """Begin to observe the inputs of all layers, the model running in float."""
        for name, quantizer in input_quantizers(self.model).items():
            if quantizer.spec.needs_scale:
                self.observers[name] = quantizer.observer = self._observer(quantizer.name)
        self.resume()

    def _observer(self, name: str) -> RangeObserver:
        if all(calibrator.observer is RangeObserver for calibrator in self.calibrators):
            return RangeObserver(name)
        return HistogramObserver(name) if self.subsample else HistogramObserver(name, sample=None)

    def resume(self) -> None:
        """Go on collecting."""
        observing = self.observers if self._scorer is None else {}
        for name, quantizer in self._own.items():
            quantizer.mode = Mode.OBSERVE if name in observing else Mode.BYPASS
        if self._scorer is not None:
            self._scorer.active = True

    def pause(self) -> None:
        """Stop collecting for a while, without quantizing what is collected."""
        self._set_mode(Mode.BYPASS)
        if self._scorer is not None:
            self._scorer.active = False

    def next_batch(self) -> None:
        """Count a batch, for messages."""
        for observer in self.observers.values():
            observer.batch += 1

    def start_scoring(self) -> None:
        """Go over from collecting to trying what the calibrators make of it."""
        self._candidates = self._all_candidates()
        self._scorer = RangeScorer(self.model, self._candidates)
        self.resume()

    def abort(self) -> None:
        """Stop collecting, and give the quantizers the modes and the scales they had."""
        if self._scorer is not None:
            self._scorer.stop()
        for quantizer in self._own.values():
            quantizer.observer = None
        self._before.restore()

    def finish(self) -> Ranges:
        """Set the ranges of all quantizers that saw data, and quantize from here on.

        Returns:
            The ranges, and how they were chosen.

        Raises:
            RuntimeError: If no quantizer saw data, or a weight is not finite; the model is left
                as it was before ``start``.
        """
        try:
            if self.must_score:
                log.warning("No batch was left to try the calibrators on; ranges are those of mse.")
            candidates = self._candidates if self._scorer else self._all_candidates()
            errors = self._scorer.errors() if self._scorer else {}
            ranges = self._chosen(candidates, errors, self.calibrators[-1].name)
        finally:
            self.abort()
        ranges.apply(self.model)
        self._set_mode(Mode.QUANTIZE)
        return ranges

    def _set_mode(self, mode: Mode) -> None:
        for quantizer in self._own.values():
            quantizer.mode = mode

    def rivals(self) -> dict[str, Ranges]:
        """Return the ranges of each calibrator alone, for the whole model."""
        names = [calibrator.name for calibrator in self.calibrators]
        return {name: self._chosen(self._candidates, {}, name) for name in names}

    def _chosen(
        self, candidates: Candidates, errors: Mapping[str, Mapping[str, float]], otherwise: str
    ) -> Ranges:
        """Return of every quantizer the range with the smallest error, or of one calibrator."""
        found = quantizers(self.model)
        chosen = {}
        for name, ranges in candidates.items():
            scores = errors.get(name, {})
            best = min(scores, key=scores.__getitem__) if scores else otherwise
            best = best if best in ranges else "max"  # weights have no percentile
            ends = None if found[name].spec.symmetric else self.observers[name].ends
            chosen[name] = Range(ranges[best], best, scores, ends)
        return Ranges(chosen)

    def _all_candidates(self) -> Candidates:
        candidates = self._input_candidates()
        if self.weights:
            candidates |= weight_candidates(self.model, [c.name for c in self.calibrators])
        return candidates

    def candidates_of(self, name: str) -> dict[str, Tensor]:
        """Return the range that each calibrator makes of what one quantizer saw; none of nothing.

        Statistics are those of all ranks where training is distributed.
        """
        quantizer, observer = self._own[name], self.observers[name]
        assert quantizer.scale is not None
        observer.synchronize(quantizer.scale.device)
        if observer.amax is None:
            return {}
        return {c.name: c.amax(observer, quantizer.spec) for c in self.calibrators}

    def _input_candidates(self) -> Candidates:
        found = {name: self.candidates_of(name) for name in self.observers}
        candidates = {name: ranges for name, ranges in found.items() if ranges}
        if self.observers and not candidates:
            raise RuntimeError(
                "Expected the batches to reach the quantized layers, but no quantizer saw data."
            )
        unseen = sorted(self.observers.keys() - candidates.keys())
        if unseen:
            log.warning("No calibration data reached %s; they stay uncalibrated.", unseen)
        return candidates


def weight_candidates(model: nn.Module, calibrators: Iterable[str] = ("max",)) -> Candidates:
    """Return the ranges of all quantized weights by calibrator, which takes no data.

    Raises:
        RuntimeError: If a weight holds NaN or infinity, naming its layer.
    """
    chosen = [name for name in calibrators if name in WEIGHT_CALIBRATORS] or ["max"]
    candidates = {}
    for name, layer in quantized_layers(model).items():
        spec, weight = layer.weight_quantizer.spec, layer.weight
        if spec.needs_scale and isinstance(weight, Tensor):
            if not bool(weight.isfinite().all()):
                raise RuntimeError(f"Expected finite weights, but {name!r} has NaN or infinity.")
            ranges = {c: WEIGHT_CALIBRATORS[c](weight, spec) for c in chosen}
            candidates[f"{name}.weight_quantizer" if name else "weight_quantizer"] = ranges
    return candidates
