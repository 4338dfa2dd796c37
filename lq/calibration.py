"""Find the ranges of a quantized model from a few batches, without Lightning."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn
from tqdm.auto import tqdm

from lq.batches import check_batches, model_inputs
from lq.collector import RangeCollector, weight_candidates
from lq.digest import DataDigest, model_digest
from lq.files import check_file_path
from lq.modes import eval_mode, set_mode
from lq.quantizer import Mode
from lq.ranges import EACH, Range, Ranges
from lq.samples import count_samples, first_samples
from lq.scoring import Call, output_errors

log = logging.getLogger(__name__)
ModuleT = TypeVar("ModuleT", bound=nn.Module)
TRIED, TRIED_PER_BATCH = 64, 16
"""Samples that competing calibrators are tried on, and how many of a batch."""


def calibrate(
    model: ModuleT,
    batches: Iterable[Any],
    calibrator: str = "max",
    progress: bool = True,
    cache: str | Path | None = None,
    subsample: bool = True,
) -> ModuleT:
    """Find the ranges of a quantized model from a few batches.

    The model runs in float, in eval mode, without gradients; afterwards every module is in the
    mode it was and the quantizers quantize. Ranges are those of all ranks where training is
    distributed. With ``"auto"`` the ranges of all calibrators are tried, quantizer by quantizer,
    and the one with the smallest error at the layer's output is chosen; if one calibrator for all
    is better at the model's outputs, that one is taken. The table of errors is logged
    (``find_ranges`` returns it).

    Args:
        model: A model that ``quantize`` has prepared.
        batches: Iterable of tensors, (input, target) pairs, or mappings of keyword arguments.
        calibrator: ``"max"``, ``"percentile"`` or ``"percentile(99.9)"``, ``"entropy"``,
            ``"mse"``, or ``"auto"``.
        progress: Show a progress bar.
        cache: JSON file of ranges: used if it was made with the same model, data and calibrator,
            refused if with others, written if it is not there.
        subsample: Of tensors of more than 2^18 elements, count the tail and an even sample.

    Returns:
        The same `model`.

    Raises:
        ValueError: If `batches` is empty, the calibrator unknown, or the cache of something else.
        RuntimeError: If an activation or a weight is not finite, naming the layer.

    Example:
        >>> import torch
        >>> from lq import quantize
        >>> model = quantize(nn.Sequential(nn.Linear(2, 2)), "tensorrt_int8")
        >>> _ = calibrate(model, [torch.tensor([[0.5, -1.27]])], progress=False)
        >>> model[0].input_quantizer
        Quantizer(int8, scale=0.01)
    """
    ranges = find_ranges(model, batches, calibrator, progress, cache, subsample)
    log.info("Ranges found with %r:\n%s", calibrator, ranges.table())
    return model


def find_ranges(
    model: nn.Module,
    batches: Iterable[Any],
    calibrator: str = "max",
    progress: bool = True,
    cache: str | Path | None = None,
    subsample: bool = True,
) -> Ranges:
    """Do what ``calibrate`` does, and return the ranges with the error of every calibrator.

    Example:
        >>> import torch
        >>> from lq import quantize
        >>> model = quantize(nn.Sequential(nn.Linear(2, 2)), "tensorrt_int8")
        >>> ranges = find_ranges(model, [torch.tensor([[0.5, -1.27]])], "auto", progress=False)
        >>> round(float(ranges.found["0.input_quantizer"].amax), 2)
        1.27
    """
    check_batches(batches)
    collector, digest = RangeCollector(model, calibrator, subsample), DataDigest()
    asked = calibrator if subsample else f"{calibrator}, all counted"
    if cache is not None:
        check_file_path(cache)
        if Path(cache).is_file():
            return _from_cache(model, batches, asked, progress, cache)
    bar = tqdm(batches, "Calibrating", disable=not progress, leave=False)
    tried: list[Call] = []
    count = samples = 0
    try:
        collector.start()
        with eval_mode(model):
            for batch in bar:
                args, kwargs = call = model_inputs(model, batch)
                if cache is not None:
                    digest.add(args, kwargs)
                if collector.must_score and samples < TRIED:
                    tried.append(first_samples(call, TRIED_PER_BATCH))
                    samples += count_samples(tried[-1])
                model(*args, **kwargs)  # which may change its inputs in place
                collector.next_batch()
                count += 1
            if count == 0:
                raise ValueError("Expected `batches` to hold at least one batch, but got none.")
            if collector.must_score:
                collector.start_scoring()
                for args, kwargs in tqdm(tried, "Comparing", disable=not progress, leave=False):
                    model(*args, **kwargs)
            ranges = collector.finish()
            if tried:
                ranges = _best_for_the_whole(model, {EACH: ranges} | collector.rivals(), tried)
    except BaseException:
        collector.abort()
        raise
    if cache is not None:
        ranges = dataclasses.replace(
            ranges, model=model_digest(model), data=digest.hexdigest(), calibrator=asked
        )
        ranges.save(cache)
    return ranges


def _best_for_the_whole(model: nn.Module, rivals: dict[str, Ranges], tried: list[Call]) -> Ranges:
    """Return the ranges with the smallest error at the model's outputs, and set them.

    What is best for each layer alone is not always best together: clipping errors add up.
    """
    outputs = output_errors(model, rivals, tried)
    best, each = rivals[min(outputs, key=outputs.__getitem__)], rivals[EACH]
    found = {
        name: dataclasses.replace(r, errors=each.found[name].errors)
        for name, r in best.found.items()
    }
    ranges = dataclasses.replace(each, found=found, outputs=outputs)
    ranges.apply(model)
    return ranges


def _from_cache(
    model: nn.Module, batches: Iterable[Any], asked: str, progress: bool, cache: str | Path
) -> Ranges:
    """Return the ranges in a file, after making sure that they are of this model and these data."""
    ranges, digest = Ranges.load(cache), DataDigest()
    for batch in tqdm(batches, "Comparing data", disable=not progress, leave=False):
        digest.add(*model_inputs(model, batch))
    ranges.check(cache, model_digest(model), digest.hexdigest(), asked)
    ranges.apply(model)
    set_mode(model, Mode.QUANTIZE)
    return ranges


def calibrate_weights(model: nn.Module, calibrator: str = "max") -> Ranges:
    """Set the ranges of all weights, which takes no data, and return them.

    Args:
        model: A quantized model.
        calibrator: ``"mse"``; any other means their largest magnitudes.

    Raises:
        RuntimeError: If a weight holds NaN or infinity, naming its layer.
    """
    candidates = weight_candidates(model, [calibrator])
    chosen = {name: next(iter(by.items())) for name, by in candidates.items()}
    found = {name: Range(amax, method) for name, (method, amax) in chosen.items()}
    ranges = Ranges(found)
    ranges.apply(model)
    return ranges
