"""How many samples does calibration need? It is done with 8, 16, 32 ... of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lq.batches import model_inputs, tensors
from lq.calibration import calibrate
from lq.curve import CalibrationCurve, CurvePoint
from lq.functional import sqnr_db
from lq.modes import QuantizerStates, eval_mode, set_mode
from lq.quantizer import Mode
from lq.samples import FirstSamples, count_samples
from lq.surgery import quantizers

FIRST = 8
"""Samples of the smallest size."""


def calibration_curve(
    model: nn.Module,
    batches: Iterable[Any],
    held_out: Iterable[Any],
    calibrator: str = "max",
    sizes: Sequence[int] | None = None,
    progress: bool = True,
) -> CalibrationCurve:
    """Calibrate with more and more samples, and say how many are enough.

    Each size calibrates with the first samples of `batches` and predicts `held_out`; how the
    result is judged is told by ``CalibrationCurve``. Afterwards the model has the ranges and the
    modes it had. The float and the quantized outputs of `held_out` are held in memory.

    Args:
        model: A model that ``quantize`` has prepared, calibrated or not.
        batches: Batches as for ``calibrate``, in an order that does not change; read once to count
            them, and once for each size.
        held_out: Batches that calibration does not see, with or without class numbers ``[N]``.
        calibrator: As for ``calibrate``.
        sizes: Numbers of samples; 8, 16, 32 ... and all, if not given.
        progress: Show progress bars.

    Raises:
        ValueError: If `batches` or `held_out` are empty or can be read only once, `sizes` do not
            increase or are more than there are, or no activation has a range.

    Example:
        >>> import lq
        >>> model = lq.quantize(nn.Linear(4, 3), "tensorrt_int8")
        >>> x = torch.linspace(-1, 1, 256).view(64, 4)[torch.randperm(64)]
        >>> curve = calibration_curve(model, [x], held_out=[x], progress=False)
        >>> [point.samples for point in curve.points]
        [8, 16, 32, 64]
        >>> model.input_quantizer
        Quantizer(int8, uncalibrated)
    """
    for name, data in ("batches", batches), ("held_out", held_out):
        _check_rereadable(name, data)
    sizes = _sizes(sum(count_samples(batch) for batch in batches), sizes)
    before = QuantizerStates(quantizers(model).values())
    try:
        with eval_mode(model):
            set_mode(model, Mode.BYPASS)
            expected, targets = _predict(model, held_out)
            points = []
            for size in tqdm(sizes, "Calibration curve", disable=not progress, leave=False):
                calibrate(model, FirstSamples(batches, size), calibrator, progress=progress)
                outputs, _ = _predict(model, held_out)
                points.append(_point(size, _ranges(model), expected, outputs, targets))
    finally:
        before.restore()
    float_top1 = None if targets is None else _share(expected.argmax(1), targets)
    return CalibrationCurve(points, calibrator, len(expected), float_top1)


def _predict(model: nn.Module, batches: Iterable[Any]) -> tuple[Tensor, Tensor | None]:
    """Return outputs ``[N, classes, ...]`` and, where there are any, targets ``[N]``."""
    outputs, targets = [], []
    for batch in batches:
        args, kwargs = model_inputs(model, batch)
        outputs.append(tensors(model(*args, **kwargs))[0].float().cpu())
        targets += [t.cpu() for t in (_target(batch),) if t is not None]
    if not outputs or outputs[0].dim() < 2:
        got = f"outputs of shape {list(outputs[0].shape)}" if outputs else "no batch"
        raise ValueError(
            f"Expected `held_out` to give outputs [samples, classes, ...], but got {got}."
        )
    known = len(targets) == len(outputs)
    return torch.cat(outputs), torch.cat(targets) if known else None


def _point(
    size: int,
    ranges: Mapping[str, Tensor],
    expected: Tensor,
    outputs: Tensor,
    targets: Tensor | None,
) -> CurvePoint:
    predictions = outputs.argmax(1)
    return CurvePoint(
        samples=size,
        sqnr_db=sqnr_db(expected, outputs),
        agreement=_share(predictions, expected.argmax(1)),
        top1=None if targets is None else _share(predictions, targets),
        ranges=ranges,
    )


def _share(predictions: Tensor, wanted: Tensor) -> float:
    return float((predictions == wanted).double().mean())


def _ranges(model: nn.Module) -> dict[str, Tensor]:
    """Return the ranges that data gave: those of activations."""
    found = {n: q.amax for n, q in quantizers(model).items() if not n.endswith("weight_quantizer")}
    ranges = {
        n: amax.cpu() for n, amax in found.items() if amax is not None and amax.isfinite().all()
    }
    if not ranges:
        raise ValueError(
            "Expected the model to quantize activations with a range, but it has none: "
            "its calibration needs no data."
        )
    return ranges


def _target(batch: Any) -> Tensor | None:
    """Return the class numbers of an (input, target) pair."""
    if isinstance(batch, (list, tuple)) and len(batch) > 1 and isinstance(batch[-1], Tensor):
        return batch[-1] if batch[-1].dim() == 1 else None
    return None


def _check_rereadable(name: str, data: Iterable[Any]) -> None:
    if isinstance(data, Iterator):
        raise ValueError(
            f"Expected `{name}` to be readable again, as a list or a DataLoader, but got "
            f"{type(data).__name__}; pass list({name})."
        )


def _sizes(total: int, sizes: Sequence[int] | None) -> list[int]:
    """Return the sizes to try: those asked for, or 8, 16, 32 ... and all there are."""
    if total == 0:
        raise ValueError("Expected `batches` to hold at least one sample, but got none.")
    if sizes is None:
        doubling = [FIRST << i for i in range(total.bit_length()) if FIRST << i < total]
        return [*doubling, total]
    chosen = list(sizes)
    if not chosen or chosen[0] < 1 or chosen != sorted(set(chosen)) or chosen[-1] > total:
        raise ValueError(
            f"Expected `sizes` to increase from at least 1 to at most the {total} samples of "
            f"`batches`, but got {chosen}."
        )
    return chosen
