"""Refuses what a sweep cannot do, before any work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from lq.batches import check_batches, check_repeatable, class_targets, model_inputs
from lq.calibrators import parse_calibrators
from lq.formats import layer_formats
from lq.messages import suggest
from lq.samples import first_samples
from lq.sensitivity.exact import output_of
from lq.sensitivity.measures import PARTS, check_metric
from lq.surgery import quantizers

METHODS = ("exact", "gradient", "adaptive")


def check_arguments(
    model: nn.Module,
    batches: Iterable[Any],
    formats: Sequence[str],
    method: str,
    parts: Sequence[str],
    left_float: bool,
    calibrator: str,
) -> None:
    """Raise a ``ValueError`` for the first argument of ``sweep`` that is wrong."""
    check_batches(batches)
    check_repeatable(batches, "batches")
    if quantizers(model):
        raise ValueError(
            "Expected a float model, but this one is quantized; call lq.dequantize(model) first, "
            "and pass its recipe as `recipe`."
        )
    _check_words("method", [method], METHODS)
    _check_words("parts", parts, PARTS)
    _check_formats(formats)
    if len(parse_calibrators(calibrator)) > 1:
        raise ValueError(
            "Expected one calibrator for all units, but got 'auto', which chooses by the whole "
            "model; give max, percentile, entropy or mse."
        )
    if left_float and method != "exact":
        raise ValueError(f"Expected method 'exact' with `left_float`, but got {method!r}.")


def _check_words(name: str, given: Sequence[str], valid: Sequence[str]) -> None:
    if isinstance(given, str) or not given:
        raise ValueError(
            f"Expected `{name}` to be a list of {', '.join(valid)}, but got {given!r}."
        )
    for word in given:
        if word not in valid:
            raise ValueError(
                f"Expected `{name}` to be of {', '.join(valid)}, but got {word!r}; "
                f"{suggest(word, valid)}"
            )


def _check_formats(formats: Sequence[str]) -> None:
    if isinstance(formats, str) or not formats or len({*formats}) < len(formats):
        raise ValueError(
            f"Expected `formats` to be a list of formats, each once, but got {formats!r}."
        )
    for format in formats:
        if layer_formats(format) == ("fp32", "fp32"):
            raise ValueError(
                "Expected `formats` to be compared with fp32, but got 'fp32' itself; leave it out."
            )


def first_batch(batches: Iterable[Any]) -> Any:
    """Return the first batch.

    Raises:
        ValueError: If there is none.
    """
    for batch in batches:
        return batch
    raise ValueError("Expected `batches` to hold at least one batch, but got none.")


def metric_for(model: nn.Module, batch: Any, method: str, metric: str | None) -> str:
    """Return the metric that units are ranked by.

    Raises:
        ValueError: If it is none, or cannot be had from the method or the batches.
    """
    if metric is not None:
        check_metric(metric)
    if method == "gradient":
        if metric not in (None, "kl"):
            raise ValueError(
                f"Expected metric 'kl', which 'gradient' estimates, but got {metric!r}; leave it "
                "out, or take 'exact'."
            )
        return "kl"
    one = first_samples(batch, 1)
    args, kwargs = model_inputs(model, one)
    if class_targets(one, output_of(model(*args, **kwargs))) is not None:
        return metric or "top1"
    if metric in ("top1", "top5", "loss"):
        raise ValueError(
            f"Expected batches with class numbers for {metric!r}, but found none that go with the "
            "output; give (input, target) pairs, or take 'kl' or 'sqnr'."
        )
    return metric or "kl"
