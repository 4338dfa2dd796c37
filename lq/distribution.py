"""How the tensors that pass a model's quantizers are distributed, and where calibrators clip."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lq.batches import check_batches, model_inputs
from lq.calibrators import AUTO
from lq.collector import RangeCollector
from lq.messages import suggest
from lq.modes import eval_mode
from lq.observers import HistogramObserver

BINS = 128


@dataclass(frozen=True)
class TensorHistogram:
    """The magnitudes of one tensor, and the range that each calibrator makes of them.

    Attributes:
        name: The quantizer's.
        edges: Of the bins, which are equally wide, from 0 to the largest magnitude.
        counts: Magnitudes in each bin.
        clips: Calibrator -> amax; what is larger, it clips.

    Example:
        >>> found = TensorHistogram("fc", (0.0, 1.0, 2.0), (9.0, 1.0), {"max": 2.0})
        >>> TensorHistogram.from_dict(found.to_dict()) == found
        True
    """

    name: str
    edges: tuple[float, ...]
    counts: tuple[float, ...]
    clips: Mapping[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Return the histogram as plain values."""
        return {**dataclasses.asdict(self), "edges": list(self.edges), "counts": list(self.counts)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> TensorHistogram:
        """Return the histogram that ``to_dict`` describes."""
        edges, counts = tuple(plain["edges"]), tuple(plain["counts"])
        return cls(plain["name"], edges, counts, dict(plain["clips"]))


def tensor_histograms(
    model: nn.Module, batches: Iterable[Any], names: Sequence[str] | None = None
) -> dict[str, TensorHistogram]:
    """Measure the distributions of the tensors that quantizers see, in one pass in float.

    The model's ranges stay as they are, known or not. Magnitudes are counted finely while the
    model runs (see ``lq.histogram``) and put into equal bins afterwards.

    Args:
        model: A quantized model.
        batches: As ``lq.calibrate`` takes them.
        names: Quantizers; those of all inputs, if not given.

    Returns:
        Quantizer -> histogram; quantizers that no data reached are missing.

    Raises:
        ValueError: If a name is not that of a quantizer with a range for inputs.

    Example:
        >>> from lq import quantize
        >>> model = quantize(nn.Sequential(nn.Linear(2, 2)), "tensorrt_int8")
        >>> found = tensor_histograms(model, [torch.tensor([[0.5, -2.0]])])["0.input_quantizer"]
        >>> sum(found.counts), found.clips["max"]
        (2.0, 2.0)
    """
    check_batches(batches)
    collector = RangeCollector(model, AUTO)
    try:
        collector.start()
        wanted = list(collector.observers) if names is None else list(names)
        for name in wanted:
            _check_name(name, collector)
        with eval_mode(model):
            for batch in batches:
                args, kwargs = model_inputs(model, batch)
                model(*args, **kwargs)
                collector.next_batch()
        found = {name: _histogram(name, collector) for name in wanted}
    finally:
        collector.abort()
    return {name: histogram for name, histogram in found.items() if histogram is not None}


def _check_name(name: str, collector: RangeCollector) -> None:
    if name not in collector.observers:
        raise ValueError(
            f"Expected `names` of quantizers of inputs, but got {name!r}; "
            f"{suggest(name, collector.observers)}"
        )


def _histogram(name: str, collector: RangeCollector) -> TensorHistogram | None:
    clips = {c: float(amax) for c, amax in collector.candidates_of(name).items()}
    if not clips:
        return None
    observer = collector.observers[name]
    assert isinstance(observer, HistogramObserver)
    histogram = observer.histogram
    limit = float(histogram.amax) or 1.0
    edges = torch.linspace(0, limit, BINS + 1, dtype=torch.float64)
    counts = histogram.linear(BINS, limit)
    return TensorHistogram(name, tuple(edges.tolist()), tuple(counts.tolist()), clips)
