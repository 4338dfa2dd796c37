"""The sweep: which layers hurt, and how much, in each format."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from lq.costs import count_costs
from lq.digest import DataDigest, model_digest
from lq.formats import FORMATS, layer_formats
from lq.modes import eval_mode, same_buffers
from lq.sensitivity.adaptive import BUDGET, Halving
from lq.sensitivity.checks import check_arguments, first_batch, metric_for
from lq.sensitivity.exact import Exact, Variant
from lq.sensitivity.gradient import Gradient
from lq.sensitivity.journal import Journal
from lq.sensitivity.replay import copied
from lq.sensitivity.result import Sensitivity
from lq.sensitivity.rows import assemble
from lq.sensitivity.states import States
from lq.sensitivity.units import Units, find_units
from lq.spec import Recipe

log = logging.getLogger(__name__)
CALIBRATION = 16
"""Batches that ranges are found from, of those that are swept, unless others are given."""
VERSION = 1


def sweep(
    model: nn.Module,
    batches: Iterable[Any],
    formats: Sequence[str] = ("int8",),
    method: str = "exact",
    metric: str | None = None,
    recipe: Recipe | str | Path | Mapping[str, Any] = "tensorrt_int8",
    units: str | Mapping[str, str | Sequence[str]] = "layers",
    parts: Sequence[str] = ("both",),
    left_float: bool = False,
    calibration: Iterable[Any] | None = None,
    calibrator: str = "max",
    top: int = 10,
    journal: str | Path | None = None,
    progress: bool = True,
) -> Sensitivity:
    """Measure what each layer of a float model costs in each number format.

    Of every unit: the change in top-1, top-5 and loss, the KL divergence and the SQNR of the
    outputs, when only that unit is in the format, each with its bootstrap interval.

    ``"exact"`` records each batch once and, for each unit, runs again only what comes after it;
    the numbers are those of running the whole model each time. ``"adaptive"`` does the same on
    fewer batches for units that are clearly among the `top` most sensitive or clearly not; batches
    should be in random order. ``"gradient"`` estimates the KL divergence of all units from one
    backward pass a batch (see ``lq.sensitivity.gradient``).

    The model is left as it was. Where training is distributed, every process passes the same
    batches and measures its share.

    Args:
        model: A float model that returns ``[N, classes, ...]``, or that first.
        batches: (input, target) pairs, or what ``calibrate`` takes, where class numbers are not
            needed; a list or a loader that gives the same order again.
        formats: ``int8``, ``fp8_e4m3``, ``fp16``, ``bf16``, ``int4`` (weights alone), ...
        method: ``"exact"``, ``"adaptive"`` or ``"gradient"``.
        metric: What units are ranked by: ``"top1"``, ``"top5"``, ``"loss"``, ``"kl"`` or
            ``"sqnr"``. If not given, ``"top1"`` where batches have class numbers and the method
            measures, else ``"kl"``.
        recipe: What else is quantized where a layer is, such as residual additions; layers that
            it skips, and others with their weights, are not swept.
        units: ``"layers"``, ``"inputs"`` (layers that read one tensor), ``"blocks"``, or name ->
            globs on layer names.
        parts: Which of ``"both"``, ``"weights"`` and ``"inputs"`` of the layers to quantize.
        left_float: Also measure each unit left float in a model that is all in the format.
        calibration: Batches to find ranges from; the first 16 of `batches`, if not given.
        calibrator: How: ``"max"``, ``"percentile"``, ``"entropy"`` or ``"mse"``.
        top: How many of the most sensitive units ``"adaptive"`` is to tell from the rest; at most
            half of them.
        journal: File that keeps what was measured; a killed sweep goes on from it.
        progress: Show progress bars.

    Raises:
        ValueError: If the model is quantized, or an argument is not as above.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
        >>> found = sweep(model, [torch.randn(64, 4)], ["int8", "int4"], progress=False)
        >>> [(row.layer, row.format) for row in found]
        [('0', 'int8'), ('0', 'int4'), ('2', 'int8'), ('2', 'int4')]
        >>> found.score("0", "int4") > found.score("0", "int8")
        True
    """
    recipe = Recipe.parse(recipe)
    check_arguments(model, batches, formats, method, parts, left_float, calibrator)
    first = first_batch(batches)
    # Lightning validates in inference mode, whose tensors do not tell when they are changed.
    with torch.inference_mode(False), eval_mode(model), same_buffers(model):
        own = model_digest(model)
        metric = metric_for(model, first, method, metric)
        calibration = FirstBatches(batches) if calibration is None else calibration
        states = States(model, recipe, formats, calibration, calibrator, progress)
        found = find_units(states.dataflow, states.layers, units)
        notes = Journal(journal, _header(states, found, own, method))
        meter = (Gradient if method == "gradient" else Exact)(
            states, found, _variants(found, formats, parts, left_float), notes
        )
        with meter:
            meter.probe(first)
            halving = None
            if method == "adaptive" and isinstance(meter, Exact):
                halving = _halving(meter, batches, metric, top)
            data, seen = _go_through(meter, batches, halving, progress)
        costs = count_costs(model, copied(first))
    passes = meter.passes() / (len(batches) if isinstance(batches, Sized) else seen)
    rows, whole, n, top1 = assemble(meter.until, notes, metric)
    return Sensitivity(
        found=rows,
        units=found,
        formats=tuple(formats),
        method=method,
        metric=metric,
        n=n,
        top1=top1,
        recipe=recipe.to_dict(),
        whole=whole,
        model_hash=own,
        data_hash=data,
        passes=passes,
        fallback=meter.fallback,
        costs=costs,
    )


class FirstBatches(Iterable[Any]):
    """The first batches, which can be gone through again."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), CALIBRATION)


def _variants(
    units: Units, formats: Sequence[str], parts: Sequence[str], left_float: bool
) -> list[Variant]:
    """Return what to measure; 16-bit layers compute in one format, so they have no parts."""
    found = [Variant(format) for format in formats if left_float]
    for unit in units:
        for format in formats:
            apart = FORMATS[layer_formats(format)[0]].needs_scale
            found += [Variant(format, part, unit) for part in parts if apart or part == "both"]
            found += [Variant(format, "both", unit, True)] * left_float
    return found


def _header(states: States, units: Units, model: str, method: str) -> dict[str, Any]:
    """Return what a journal is of; what ``"adaptive"`` measures is as good for ``"exact"``."""
    return {
        "version": VERSION,
        "method": "gradient" if method == "gradient" else "exact",
        "model": model,
        "recipe": states.recipe.to_dict(),
        "ranges": {format: states.digest(format) for format in states.recipes},
        "units": units,
    }


def _halving(meter: Exact, batches: Iterable[Any], metric: str, top: int) -> Halving:
    if not isinstance(batches, Sized):
        raise ValueError(
            "Expected `batches` of known length for 'adaptive', but got "
            f"{type(batches).__name__}; pass list(batches)."
        )
    return Halving(meter.variants, meter.costs, metric, top, len(batches))


def _go_through(
    meter: Exact | Gradient, batches: Iterable[Any], halving: Halving | None, progress: bool
) -> tuple[str, int]:
    """Measure batch by batch; return the hash of the batches and how many there were."""
    data, seen, journal = DataDigest(), 0, meter.journal
    share = 1.0 if halving is None else BUDGET
    total = meter.work() * len(batches) * share if isinstance(batches, Sized) else None
    with _bar(total, progress) as bar:
        meter.progress = bar.update
        for index, batch in enumerate(batches):
            if halving is not None and not halving.open:
                break
            journal.check_batch(index, _digest(batch, data))
            meter.measure(index, batch, meter.variants if halving is None else halving.open)
            if halving is not None:
                journal.exchange()
                halving.decide(journal, index)
            seen = index + 1
        journal.exchange()
    if halving is not None and halving.undecided:
        names = ", ".join(dict.fromkeys(v.unit for v in halving.undecided))
        log.warning("Still open when the work was spent: whether %s are in the top.", names)
    return data.own, seen


def _digest(batch: Any, data: DataDigest) -> str:
    """Take a batch, class numbers and all, into the hash of all, and return its own."""
    own = DataDigest()
    for digest in (own, data):
        digest.add([batch], {})
    return own.own


def _bar(total: float | None, progress: bool) -> Any:
    shown = "{n:.1f}" if total is None else "{n:.1f}/{total:.1f}"
    return tqdm(
        total=total,
        desc="Sweeping",
        disable=not progress,
        leave=False,
        bar_format="{l_bar}{bar}| " + shown + " passes [{elapsed}<{remaining}]",
    )
