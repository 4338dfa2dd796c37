"""What a report holds, whatever it is written as."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from matplotlib.figure import Figure

from lq.comparison import Comparison
from lq.plots import (
    plot_accuracy,
    plot_drop_against_compression,
    plot_histogram,
    plot_history,
    plot_plan,
    plot_ranges,
    plot_sensitivity,
    plot_sensitivity_distribution,
    plot_sensitivity_heatmap,
    plot_sizes,
    plot_speedups,
    plot_weight_error,
)
from lq.report.advice import recommend

Draw = Callable[..., Figure]
HEADER = ("method", "top-1", "points lost (95%)", "agreement", "MB", "smaller", "ms", "faster")


@dataclass(frozen=True)
class Picture:
    """A figure of a report.

    Attributes:
        name: Of its files.
        caption: What it shows, and how to read it.
        draw: Draws it, in a theme.
    """

    name: str
    caption: str
    draw: Draw


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: Its heading.
        text: Paragraphs.
        points: A list.
        table: The header and the rows.
        pictures: Figures.
    """

    title: str
    text: Sequence[str] = ()
    points: Sequence[str] = ()
    table: Sequence[Sequence[str]] = ()
    pictures: Sequence[Picture] = field(default_factory=tuple)


def sections(comparison: Comparison, use: str) -> Iterator[Section]:
    """Yield the parts of a report, those alone that something was measured for.

    Args:
        comparison: What ``lq.compare`` found.
        use: As for ``recommend``.
    """
    yield Section("Recommendations", points=recommend(comparison, use))
    rows = [comparison.cells(row) for row in comparison.measured]
    yield Section("Methods", _measured_how(comparison), _remarks(comparison), [HEADER, *rows])
    yield Section("Accuracy", pictures=list(_accuracy(comparison)))
    yield Section("Size and speed", pictures=list(_size_and_speed(comparison)))
    if comparison.sensitivity is not None:
        yield Section("Which layer hurts", pictures=list(_sensitivity(comparison)))
    for title, pictures in (
        ("Formats of the layers", _plans(comparison)),
        ("Ranges", _ranges(comparison)),
        ("What rounding does", _weights(comparison)),
        ("Training", _training(comparison)),
    ):
        if found := list(pictures):
            yield Section(title, pictures=found)


def _measured_how(comparison: Comparison) -> list[str]:
    times = "Times are of files run in turn, round by round. " if _timed(comparison) else ""
    return [
        f"All on the same {comparison.n} test samples of {comparison.data or 'the data'}, in "
        f"{comparison.hardware}. Repairs and mixes of formats were chosen on {comparison.held_out} "
        f"other samples. Points lost are against float, sample by sample, with the 95% interval of "
        f"Agresti and Min. {times}Agreement is the share of samples that float predicts the same."
    ]


def _remarks(comparison: Comparison) -> list[str]:
    notes = [f"{row.name}: {row.note}" for row in comparison.rows if row.note]
    return notes + [f"{row.name} came to nothing: {row.failed}" for row in comparison if row.failed]


def _accuracy(comparison: Comparison) -> Iterator[Picture]:
    if len(comparison.measured) < 2:
        return
    yield Picture(
        "accuracy",
        "Points of top-1 that each method loses. An interval across the line shows no difference "
        "to float.",
        partial(plot_accuracy, comparison),
    )
    yield Picture(
        "drop_against_compression",
        "Points lost against how much smaller the file is: right and low is best.",
        partial(plot_drop_against_compression, comparison),
    )


def _timed(comparison: Comparison) -> bool:
    return any(row.speedups for row in comparison.measured)


def _size_and_speed(comparison: Comparison) -> Iterator[Picture]:
    yield Picture("sizes", "Size of each file.", partial(plot_sizes, comparison))
    if _timed(comparison):
        yield Picture(
            "speedups",
            f"How many times as fast as float each file is in {comparison.hardware}.",
            partial(plot_speedups, comparison),
        )


def _sensitivity(comparison: Comparison) -> Iterator[Picture]:
    found = comparison.sensitivity
    assert found is not None
    for format in found.formats:
        yield Picture(
            f"sensitivity_{format}",
            f"What each layer costs when it alone is in {format}, the worst first, with 95% "
            "intervals.",
            partial(plot_sensitivity, found, format),
        )
    yield Picture(
        "sensitivity_distribution",
        "How unequal layers are: the share of them that costs no more than so much.",
        partial(plot_sensitivity_distribution, found),
    )
    if len(found.formats) > 1:
        yield Picture(
            "sensitivity_heatmap",
            "Every layer in every format, in the order of the model.",
            partial(plot_sensitivity_heatmap, found),
        )


def _ranges(comparison: Comparison) -> Iterator[Picture]:
    explanation = comparison.explanation
    if not explanation.ranges:
        return
    yield Picture(
        "ranges",
        "Range of every quantizer: of inputs a point, of weights the span of the channels.",
        partial(plot_ranges, explanation.ranges),
    )
    for i, histogram in enumerate(explanation.histograms):
        yield Picture(
            f"histogram_{i}",
            f"What {histogram.name} sees, and where each calibrator clips.",
            partial(plot_histogram, histogram),
        )


def _weights(comparison: Comparison) -> Iterator[Picture]:
    for i, error in enumerate(comparison.explanation.weights):
        yield Picture(
            f"weights_{i}",
            f"Weights of {error.name} before and after quantization, their error, and the SQNR of "
            "each channel.",
            partial(plot_weight_error, error),
        )


def _training(comparison: Comparison) -> Iterator[Picture]:
    for i, row in enumerate(comparison.measured):
        if len(row.history) > 1:
            yield Picture(
                f"training_{i}", f"Training of {row.name}.", partial(plot_history, row.history)
            )


def _plans(comparison: Comparison) -> Iterator[Picture]:
    """Yield the plans of methods that mix formats."""
    for i, row in enumerate(comparison.measured):
        if len(set(row.plan.values())) > 1:
            yield Picture(
                f"plan_{i}",
                f"{row.name}: the format of each layer, and its share of parameters and compute.",
                partial(plot_plan, row.plan, comparison.costs),
            )
