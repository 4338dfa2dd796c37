"""Repair a quantized model, keeping only what helps."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from lq.batches import check_repeatable
from lq.calibration import calibrate
from lq.messages import suggest
from lq.repairs.batchnorm import reestimate_batchnorm
from lq.repairs.bias import correct_biases
from lq.repairs.blame import layer_sqnr
from lq.repairs.equalization import equalize
from lq.repairs.norms import live_norms
from lq.repairs.report import Judge, RepairReport, RepairStep
from lq.repairs.running import bypassed_copy, check_ready

log = logging.getLogger(__name__)
METHODS = ("equalize", "batchnorm", "bias")
"""Names of the repairs, in the order in which they are done."""


def repair(
    model: nn.Module,
    batches: Iterable[Any],
    held_out: Iterable[Any],
    methods: Sequence[str] = METHODS,
    calibrator: str = "max",
    progress: bool = True,
) -> RepairReport:
    """Win back accuracy that quantization cost, without training, in place.

    Each repair is measured on `held_out` against the float model and undone where the SQNR of the
    outputs does not rise. Equalization comes first, since it changes weights, and ranges are
    found again after it; then come the repairs that follow the quantized model. Weights change in
    place, so ``dequantize`` afterwards gives the repaired float model, not the one before.

    Args:
        model: A calibrated model that returns a tensor, classes along axis 1, or that first.
        batches: Calibration batches as ``calibrate`` takes them, gone through several times.
        held_out: Other batches, to judge by.
        methods: Which of ``"equalize"``, ``"batchnorm"``, ``"bias"`` to try.
        calibrator: How ranges are found again after equalization.
        progress: Show progress bars.

    Returns:
        Which layers caused the loss, and what each repair brought.

    Raises:
        ValueError: For an unknown method, or batches that are empty or can be read only once.
        RuntimeError: If the model is not calibrated.

    Example:
        >>> import lq, torch
        >>> from lq.models import digits_cnn
        >>> _ = torch.manual_seed(0)
        >>> batches = [torch.randn(16, 1, 8, 8) for _ in range(3)]
        >>> model = lq.quantize(digits_cnn(), "tensorrt_int8")
        >>> _ = lq.calibrate(model, batches[:2], progress=False)
        >>> report = repair(model, batches[:2], batches[2:], methods=["bias"], progress=False)
        >>> [step.method for step in report.steps]
        ['bias']
    """
    _check(model, batches, held_out, methods)
    judge = Judge(bypassed_copy(model), held_out)
    blame = layer_sqnr(model, next(iter(held_out)), progress)
    runs: dict[str, Callable[[], dict[str, str]]] = {
        "equalize": lambda: _equalize_and_calibrate(model, batches, calibrator, progress),
        "batchnorm": lambda: reestimate_batchnorm(model, batches, progress),
        "bias": lambda: correct_biases(model, batches, judge.reference, progress),
    }
    steps = []
    fidelity = judge.measure(model)
    for method in (m for m in METHODS if m in methods):
        if method == "batchnorm" and not live_norms(model):
            log.warning("Left batchnorm out: the model has no BatchNorm with statistics.")
            continue
        before = {k: v.clone() for k, v in model.state_dict().items()}
        try:
            left = runs[method]()
            after = judge.measure(model)
        except BaseException:
            model.load_state_dict(before)
            raise
        kept = after.sqnr_db > fidelity.sqnr_db
        steps.append(RepairStep(method, fidelity, after, kept, left))
        if not kept:
            model.load_state_dict(before)
        elif method == "equalize":
            judge.reference = bypassed_copy(model)  # its layers' outputs were scaled as well
        fidelity = after if kept else fidelity
    return RepairReport(blame, steps)


def _equalize_and_calibrate(
    model: nn.Module, batches: Iterable[Any], calibrator: str, progress: bool
) -> dict[str, str]:
    left = equalize(model)
    calibrate(model, batches, calibrator, progress)
    return left


def _check(
    model: nn.Module, batches: Iterable[Any], held_out: Iterable[Any], methods: Sequence[str]
) -> None:
    for method in methods:
        if method not in METHODS:
            raise ValueError(
                f"Expected `methods` to be of {', '.join(METHODS)}, but got {method!r}; "
                f"{suggest(method, METHODS)}"
            )
    check_repeatable(batches, "batches")
    check_repeatable(held_out, "held_out")
    check_ready(model)
