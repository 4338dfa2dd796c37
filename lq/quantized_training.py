"""Quantization-aware training inside a training loop that somebody else runs."""

from __future__ import annotations

from torch import nn

from lq.calibration import calibrate_weights
from lq.calibrators import parse_calibrators
from lq.collector import RangeCollector
from lq.modes import set_mode
from lq.qat import freeze_batchnorm, freeze_scales, set_bits
from lq.quantizer import Mode
from lq.ranges import Ranges
from lq.schedule import Schedule
from lq.surgery import any_calibrated, input_quantizers, weight_quantizers


class QuantizedTraining:
    """Calibrates a model during the first batches of its training, then lets it train quantized.

    Call ``before_batch`` and ``after_batch`` around each batch, and ``end`` after the last. A model
    that is calibrated already, as one from a checkpoint, goes on where it was.

    Args:
        model: A quantized model.
        calibrator: As for ``lq.calibrate``; ``"auto"`` tries the calibrators on the last batch.
        calibration_batches: How many batches ranges are collected from.
        schedule: What begins when.

    Raises:
        ValueError: If there are too few batches for the calibrator, or the bits of the schedule do
            not end with those of the model.

    Example:
        >>> import torch
        >>> from lq import quantize
        >>> model = quantize(nn.Linear(16, 4), "tensorrt_int8")
        >>> training = QuantizedTraining(model, calibration_batches=2)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> for step in range(4):
        ...     _ = training.before_batch(epoch=0, step=step)
        ...     model(torch.ones(8, 16)).square().sum().backward()
        ...     optimizer.step()
        ...     _ = training.after_batch()
        >>> training.end()
        >>> model.input_quantizer
        Quantizer(int8, scale=0.00787)
    """

    def __init__(
        self,
        model: nn.Module,
        calibrator: str = "max",
        calibration_batches: int = 16,
        schedule: Schedule | None = None,
    ) -> None:
        check_batch_count(calibrator, calibration_batches)
        self.model, self.calibrator = model, calibrator
        self.calibration_batches = calibration_batches
        self.schedule = schedule or Schedule()
        self.schedule.check_bits(model)
        self._weights, self._inputs = weight_quantizers(model), input_quantizers(model)
        self._collector: RangeCollector | None = None
        self._batches = 0
        self._epoch = -1
        self._frozen_norms: set[nn.Module] = set()
        idle_until_calibrated(model)

    def before_batch(self, epoch: int, step: int) -> Ranges | None:
        """Begin what begins with this batch, also where training is resumed behind that point.

        Args:
            epoch: Epochs completed.
            step: Optimizer steps taken.

        Returns:
            The ranges of weights, where they begin to be quantized before inputs.
        """
        if epoch != self._epoch:
            self._epoch = epoch
            set_bits(self.model, self.schedule.bits_at(epoch))
            if self.schedule.freezes_scales(epoch):
                freeze_scales(self.model)
        if self.schedule.freezes_batchnorm(epoch):  # each batch, as ``model.train()`` undoes it
            self._frozen_norms |= freeze_batchnorm(self.model)
        return None if self._collector is not None else self._begin_quantizing(epoch, step)

    def after_batch(self) -> Ranges | None:
        """Count the batch; return the ranges when there are enough, from when on it quantizes."""
        if self._collector is None:
            return None
        self._collector.next_batch()
        self._batches += 1
        if self._batches >= self.calibration_batches:
            return self._finish()
        if self._batches == self.calibration_batches - 1 and self._collector.must_score:
            self._collector.start_scoring()
        return None

    def pause(self, epoch: int) -> None:
        """Keep data out of the ranges for a while, and give the model the bits of this epoch.

        That is for validation, which a resumed training may begin with.
        """
        set_bits(self.model, self.schedule.bits_at(epoch))
        if self._collector is not None:
            self._collector.pause()

    def resume(self) -> None:
        """Go on collecting."""
        if self._collector is not None:
            self._collector.resume()

    def end(self) -> Ranges | None:
        """Make do with fewer batches than asked for, where training was shorter."""
        ranges = self._finish() if self._collector is not None and self._batches else None
        self.abort()
        return ranges

    def abort(self) -> None:
        """Leave nothing behind that is for training alone: observers, bits, what is frozen."""
        if self._collector is not None:
            self._collector.abort()
            self._collector = None
        set_bits(self.model, None)
        if self.schedule.freezes_scales(self._epoch):
            freeze_scales(self.model, frozen=False)
        for norm in self._frozen_norms:
            norm.train(self.model.training)
        # Whatever has no range by now refuses to run, rather than running in float unnoticed.
        set_mode(self.model, Mode.QUANTIZE)

    def _begin_quantizing(self, epoch: int, step: int) -> Ranges | None:
        schedule, weights, ranges = self.schedule, self._weights, None
        later = schedule.inputs_start_later
        if later and schedule.quantizes_weights(epoch, step) and not any_calibrated(weights):
            ranges = calibrate_weights(self.model, self.calibrator)
            for quantizer in weights.values():
                quantizer.mode = Mode.QUANTIZE
        waiting = self._inputs if later else self._weights | self._inputs
        if schedule.quantizes_inputs(epoch, step) and not any_calibrated(waiting):
            collector = RangeCollector(self.model, self.calibrator, weights=not later)
            self._collector, self._batches = collector, 0
            collector.start()
        return ranges

    def _finish(self) -> Ranges:
        assert self._collector is not None
        ranges = self._collector.finish()
        self._collector = None
        return ranges


def idle_until_calibrated(model: nn.Module) -> None:
    """Let weights and inputs, each kind by itself, pass as they are until they have ranges."""
    for kind in (weight_quantizers(model), input_quantizers(model)):
        for quantizer in kind.values():
            quantizer.mode = Mode.QUANTIZE if any_calibrated(kind) else Mode.BYPASS


def check_batch_count(calibrator: str, batches: int) -> None:
    """Raise a ``ValueError`` if that many batches are too few for a calibrator."""
    if batches < 1:
        raise ValueError(f"Expected `calibration_batches` to be at least 1, but got {batches}.")
    if len(parse_calibrators(calibrator)) > 1 and batches < 2:
        raise ValueError(
            f"Expected `calibration_batches` to be at least 2 for {calibrator!r}, which tries "
            f"the calibrators on the last of them, but got {batches}."
        )
