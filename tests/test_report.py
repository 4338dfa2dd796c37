"""Reports say what was measured, each sentence with its numbers, and show themselves everywhere."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from itertools import combinations

import pytest
import torch
from markdown_it import MarkdownIt
from matplotlib.text import Text

import lq
from lq.comparison import CalibrationSize, Comparison, Explanation, Row, Speedup
from lq.comparison.row import pack
from lq.costs import Costs, LayerCost
from lq.evaluation import Evaluation, Versus
from lq.paired import paired_drop
from lq.plots import (
    plot_accuracy,
    plot_drop_against_compression,
    plot_sizes,
    plot_speedups,
)
from lq.report import recommend, write_report
from lq.report.choosing import TOLERANCE
from lq.report.content import Section
from lq.report.markdown import to_markdown
from lq.rounding import weight_error
from lq.sensitivity import LayerSensitivity, Sensitivity
from lq.timing import Latency
from tests.plots.looking import bars, drawn, overlapping
from tests.plots.zoo import costs_of

N = 1000
LAYERS = ("stem", "body", "head")
NAMES = list(costs_of("resnet101").layers)


def right(lost: int) -> torch.Tensor:
    """Float is right on 900 of 1,000 samples; a method loses the first so many of them."""
    found = torch.zeros(N, dtype=torch.bool)
    found[lost:900] = True
    return found


def row(
    name: str,
    kind: str = "ptq",
    lost: int = 0,
    size: float = 1.0,
    speed: tuple[float, float] | None = (2.0, 0.05),
    formats: tuple[str, ...] = ("int8",) * 3,
    **more,
) -> Row:
    own, reference = right(lost), right(0)
    versus = Versus(1 - lost / N, paired_drop(reference, own), {})
    evaluation = Evaluation(
        "ONNX Runtime", float(own.float().mean()), 1.0, N, 1.0, size, False, versus=versus,
        latencies=() if speed is None else (Latency(1, 0, 1.0, 1.0, 1.0, 20),),
    )  # fmt: skip
    settings = {"kind": kind, **more.pop("method", {})}
    return Row(
        name=name,
        method={} if kind == "float" else settings,
        evaluation=dataclasses.replace(evaluation, versus=None) if kind == "float" else evaluation,
        right=pack(own),
        plan=dict(zip(LAYERS, formats, strict=True)),
        file=f"methods/{name}/model.onnx",
        speedups=()
        if speed is None
        else (Speedup(1, 0, speed[0], speed[0] - speed[1], sum(speed)),),
        **more,
    )


FLOAT = row("float", "float", size=4.0, speed=(1.0, 0.0), formats=("fp32",) * 3)
HALF = row("FP16", size=2.0, speed=(0.8, 0.02), formats=("fp16",) * 3)


def comparison(*rows: Row, **more) -> Comparison:
    layers = {name: LayerCost(1000, 10, 10, 5000) for name in LAYERS}
    return Comparison(
        model="Net", parameters=3030, data="digits", n=N, held_out=200, target="onnxruntime",
        hardware="a processor", rows=[FLOAT, *rows], costs=Costs(layers, 0.0), **more,
    )  # fmt: skip


def sweep(**kl: float) -> Sensitivity:
    rows = [
        LayerSensitivity(layer=n, format="int8", kl=v, low=v / 2, high=v * 2) for n, v in kl.items()
    ]
    units = {name: (name,) for name in kl}
    return Sensitivity(
        found=rows, units=units, formats=("int8",), method="exact", metric="kl", n=64
    )


def said(found: Comparison, use: str = "server") -> str:
    return "\n".join(recommend(found, use))


def test_takes_the_fastest_that_is_good_enough() -> None:
    found = comparison(
        row("fast", lost=50, speed=(3.0, 0.05)), row("good", lost=2), row("slow", speed=(1.1, 0.05))
    )
    text = said(found)
    assert text.startswith("For server take good: it loses 0.20 points (95%: -0.14 .. +0.54)")
    assert "of float's 90.00% on 1000 samples" in text
    assert "4.00 times as small (1.000 MB)" in text
    assert "2.00 times as fast for 1 sample at a time (95%: 1.95 .. 2.05)" in text
    assert "fast is measurably less accurate than good, by 4.80 points" in text


def test_takes_the_smallest_at_the_edge() -> None:
    found = comparison(row("fast", speed=(3.0, 0.05)), row("small", size=0.5))
    assert said(found).startswith("For server take fast")
    assert said(found, "edge").startswith("For edge take small")
    assert said(found, "real_time").startswith("For real time take fast")


def test_of_equals_takes_the_simplest_unless_another_is_measurably_better() -> None:
    trained, mixed, theirs = row("q", "qat"), row("m", "mixed"), row("t", "file")
    repaired, simple = row("r", method={"repair": True}), row("p", lost=1)
    order = [simple, repaired, mixed, trained, theirs]
    for i, first in enumerate(order):
        assert said(comparison(*order[i:][::-1])).startswith(f"For server take {first.name}:")
    enough = dataclasses.replace(row("p", lost=6), method={"kind": "ptq"})
    assert enough.lost.low > 0
    assert enough.lost.high > TOLERANCE
    assert said(comparison(enough, trained)).startswith("For server take q")


def test_keeps_float_where_nothing_is_gained() -> None:
    slow = comparison(row("a", speed=(0.6, 0.05)))
    assert said(slow).startswith("For server keep float: the best, a, is not measurably faster.")
    assert said(slow, "edge").startswith("For edge take a")
    large = comparison(row("a", size=8.0))
    assert said(large, "edge").startswith("For edge keep float: the best, a, is not measurably sm")


def test_a_gain_is_no_loss() -> None:
    better = dataclasses.replace(row("a"), right=pack(right(-0)))
    gained = paired_drop(right(20), right(0))
    versus = dataclasses.replace(better.evaluation.versus, drop=gained)
    found = dataclasses.replace(
        better, evaluation=dataclasses.replace(better.evaluation, versus=versus)
    )
    text = said(comparison(found))
    assert "it gains 2.00 points (95%: +1.11 .. +2.88) of float's" in text


def test_what_the_target_does_not_run_is_not_recommended() -> None:
    simulated = dataclasses.replace(row("int3", size=0.1, speed=None), file="")
    found = comparison(simulated, row("a"))
    assert said(found, "edge").startswith("For edge take a")
    assert found.cells(simulated)[4:6] == ["-", "-"]
    assert recommend(comparison(simulated)) == []


def test_says_what_is_within_noise() -> None:
    text = said(comparison(row("a", lost=1), row("b", lost=2)))
    assert "As accurate as a within the noise of 1000 samples: b (differences of at most" in text
    assert (
        "With 1000 samples 2 of 2 methods cannot be told from float: intervals reach up to" in text
    )


def test_says_when_none_is_good_enough() -> None:
    text = said(comparison(row("worse", lost=80), row("bad", lost=40)))
    assert text.startswith("No method is shown to lose at most 1 point; the nearest is bad")
    assert (
        "Try repair, which takes no training: the best without training or a mix of formats, bad"
        in text
    )


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        pytest.param([row("a", lost=40, method={"repair": True})], "mixed precision", id="mixed"),
        pytest.param(
            [row("a", lost=40, method={"repair": True}), row("m", "mixed", lost=30)],
            "QAT",
            id="qat",
        ),
    ],
)
def test_says_what_to_try_next(rows, wanted) -> None:
    told = f"Try {wanted}: the best without training or a mix of formats, a, loses 4.00 points"
    assert told in said(comparison(*rows))
    assert "Try " not in said(comparison(*rows, row("good")))


def test_says_when_integers_are_slow() -> None:
    slow = row("int8", speed=(0.7, 0.1))
    assert "INT8 is slower than float on a processor: the fastest, int8, is 0.70" in said(
        comparison(slow, HALF)
    )
    half = dataclasses.replace(HALF, speedups=(Speedup(1, 0, 3.0, 2.9, 3.1),))
    text = said(comparison(row("int8"), half))
    assert "INT8 is slower than 16 bits on a processor: the fastest, int8, is 2.00" in text
    assert "; in 16 bits FP16 is 3.00x" in text
    unclear = said(comparison(row("int8", speed=(1.05, 0.1))))
    assert "INT8 is no faster than float within noise: the fastest, int8, is 1.05" in unclear
    assert "INT8 is faster than float: the fastest, int8" in said(comparison(row("int8"), HALF))


@pytest.mark.parametrize("format", ["fp32", "fp8_e4m3", "int4"])
def test_other_formats_are_not_called_int8(format) -> None:
    others = comparison(row("other", "mixed", formats=(format,) * 3, speed=(3.0, 0.1)))
    assert "INT8" not in said(others)
    beside = said(comparison(row("int8", speed=(0.7, 0.1)), *others.rows[1:]))
    assert "the fastest, int8, is 0.70 times as fast" in beside
    assert "other is" not in beside


def test_says_when_calibration_is_too_small() -> None:
    small = CalibrationSize(32, None, "Not settled: ranges move by 9%; calibrate with more.")
    text = said(comparison(row("a"), explanation=Explanation(calibration=small)))
    assert "Calibration had 32 samples: not settled: ranges move by 9%" in text


def test_says_which_layer_to_leave_float() -> None:
    lossy = row("a", lost=40)
    text = said(comparison(lossy, sensitivity=sweep(stem=0.06, body=0.02, head=0.02)))
    assert "Leave stem float first: alone in int8 it has 60% of all 3 units' kl (0.06" in text
    assert "for 0.003 MB more" in text  # 1,000 weights of 3 bytes more, less 11 scales of 4
    even = comparison(lossy, sensitivity=sweep(**{f"l{i}": 0.01 for i in range(9)}))
    assert "float first" not in said(even)
    good = comparison(row("a"), sensitivity=sweep(stem=0.06, body=0.02, head=0.02))
    assert "float first" not in said(good)


def test_says_when_training_was_too_short() -> None:
    history = [{"epoch": float(i), "train/loss": v} for i, v in enumerate((0.8, 0.5, 0.4))]
    text = said(comparison(row("QAT", "qat", history=history)))
    assert "the training loss still fell from 0.5 to 0.4 in epoch 3; train longer" in text
    settled = [*history, {"epoch": 3.0, "train/loss": 0.39}]
    assert "train longer" not in said(comparison(row("QAT", "qat", history=settled)))


def test_every_sentence_has_its_numbers() -> None:
    small = CalibrationSize(32, None, "Not settled: ranges move by 9%; calibrate with more.")
    found = comparison(
        row("a", lost=40),
        row("b", lost=60),
        HALF,
        explanation=Explanation(calibration=small),
        sensitivity=sweep(stem=0.06, body=0.02, head=0.02),
    )
    sentences = recommend(found)
    assert len(sentences) >= 6
    assert all(re.search(r"\d", sentence) for sentence in sentences)


def test_without_times_nothing_is_said_of_speed() -> None:
    untimed = row("float", "float", size=4.0, speed=None, formats=("fp32",) * 3)
    found = comparison(row("a", speed=None), row("b", lost=1, speed=None))
    text = said(dataclasses.replace(found, rows=[untimed, *found.rows[1:]]))
    assert "times as fast" not in text
    assert "INT8 is" not in text


def test_a_use_is_checked() -> None:
    with pytest.raises(ValueError, match="did you mean 'server'"):
        recommend(comparison(row("a")), "servers")


class Page(HTMLParser):
    """What a page refers to, and the identifiers in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.identifiers: list[str] = []
        self.references: set[str] = set()
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.identifiers += [values["id"]] if "id" in values else []
        for name in ("href", "xlink:href", "src"):
            if values.get(name):
                self.references.add(values[name])
        for value in values.values():
            self.references |= {f"#{x}" for x in re.findall(r"url\(#([^)]+)\)", value or "")}


@pytest.fixture(scope="module")
def large() -> Comparison:
    """A comparison of a model of more than a hundred layers."""
    torch.manual_seed(0)
    kl = {name: float(v) for name, v in zip(NAMES, torch.rand(len(NAMES)) / 100, strict=True)}
    plan = {name: ("int8", "fp16", "fp32")[i % 3] for i, name in enumerate(NAMES)}
    mixed = dataclasses.replace(row("mixed <b>", "mixed", lost=3), plan=plan, note="a | b")
    layers = {name: LayerCost(1000 + i, 10, 10, 5000) for i, name in enumerate(NAMES)}
    history = [{"epoch": float(i), "train/loss": 1 / (i + 1), "val/top1": 0.9} for i in range(3)]
    explanation = Explanation(
        ranges={f"{name}.input_quantizer": [1.0 + i] for i, name in enumerate(NAMES)},
        weights=[weight_error(torch.randn(8, 16), name=NAMES[0])],
    )
    methods = [
        row(f"method {i} of a name that goes on and on", lost=i % 5, size=1 + i / 200)
        for i in range(12)
    ]
    found = comparison(
        mixed, row("QAT", "qat", history=history), *methods,
        Row(name="gone", method={"kind": "file"}, failed="Expected a file, but there is none."),
        sensitivity=sweep(**kl), explanation=explanation,
    )  # fmt: skip
    return dataclasses.replace(found, costs=Costs(layers, 0.0))


@pytest.fixture(scope="module")
def written(large, tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(large, folder)


def test_the_page_needs_nothing_else(written) -> None:
    text = written.read_text(encoding="utf-8")
    page = Page(text)
    assert len(page.identifiers) == len(set(page.identifiers))
    assert page.references
    assert {r for r in page.references if not r.startswith("#")} == set()
    assert {r[1:] for r in page.references} <= set(page.identifiers)
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert "@import" not in text
    assert "mixed &lt;b&gt;" in text
    assert "<b>" not in text


def test_colours_follow_the_page(written) -> None:
    """No colour of the light theme is left in a picture, where it would stay in the dark."""
    text = written.read_text(encoding="utf-8")
    pictures = text[text.index("<figure") :].lower()
    for colour in ("#1f2328", "#0072b2", "#ffffff"):
        assert colour not in pictures
    assert "var(--text)" in pictures
    assert "prefers-color-scheme: dark" in text


def test_markdown_shows_pictures_that_are_there(written) -> None:
    text = written.with_name("report.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(pictures) >= 9
    for picture in pictures:
        assert (written.parent / picture).stat().st_size > 1000
        assert (written.parent / picture).with_suffix(".svg").is_file()
    assert "mixed &lt;b&gt;: a \\| b" in text
    assert "gone came to nothing: Expected a file" in text


def test_markdown_is_shown_as_it_was_meant() -> None:
    parts = [Section("T", ["<none> *x* a_b_c"], ["`y` <class 'int'>"], [["a|b"], ["_c_"]])]
    html = MarkdownIt("commonmark").enable("table").render(to_markdown("Net", parts))
    for text in ("&lt;none&gt; *x* a_b_c", "`y` &lt;class 'int'&gt;", "a|b", "_c_"):
        assert text in html
    assert "<em>" not in html


def test_a_report_of_failures_alone(tmp_path) -> None:
    gone = Row(name="gone", method={"kind": "file"}, failed="Expected a file, but there is none.")
    text = write_report(comparison(gone), tmp_path).with_name("report.md").read_text()
    assert "## Recommendations" not in text
    assert "## Accuracy" not in text
    assert "Repairs and mixes" not in text
    assert "gone came to nothing: Expected a file" in text


def test_the_json_gives_the_comparison_back(written, large) -> None:
    again = lq.Comparison.load(written.parent)
    assert json.dumps(again.to_dict()) == json.dumps(large.to_dict())


def test_the_same_comparison_gives_the_same_bytes(written, large, tmp_path) -> None:
    again = write_report(large, tmp_path)
    for name in ("report.html", "report.md", "plots/accuracy.svg", "plots/sizes.png"):
        assert (again.parent / name).read_bytes() == (written.parent / name).read_bytes()


DRAWN = [plot_accuracy, plot_drop_against_compression, plot_sizes, plot_speedups]


@pytest.mark.parametrize("plot", DRAWN, ids=lambda f: f.__name__)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_labels_overlap(large, plot, theme) -> None:
    assert overlapping(plot(large, theme)) == []


def test_the_legend_is_not_cut(large) -> None:
    figure = plot_drop_against_compression(large)
    renderer, edge = drawn(figure), figure.bbox
    for text in figure.legends[0].get_texts():
        box = text.get_window_extent(renderer)
        assert edge.x0 <= box.x0
        assert box.x1 <= edge.x1
        assert box.y1 <= edge.y1


def test_numbers_belong_to_their_points(large) -> None:
    axes = plot_drop_against_compression(large).axes[0]
    rows = [r for r in large.deployed if r.drop is not None]
    for text in axes.texts:
        found = rows[int(text.get_text()) - 1]
        assert text.xy == (large.compression(found), found.lost.mean)


def test_numbers_of_points_near_each_other_stand_apart(large) -> None:
    figure = plot_drop_against_compression(large)
    renderer, axes = drawn(figure), figure.axes[0]
    boxes = [Text.get_window_extent(text, renderer) for text in axes.texts]  # without the line
    assert sorted(int(text.get_text()) for text in axes.texts) == [*range(1, len(boxes) + 1)]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_bars_are_as_long_as_what_was_measured(large) -> None:
    rows = large.deployed
    sizes = bars(plot_sizes(large).axes[0])
    assert [sizes[i] for i in range(len(rows))] == [r.size_mb for r in rows]
    ratios = bars(plot_speedups(large).axes[0])
    assert [ratios[i] for i in range(len(rows))] == [r.speedups[0].ratio for r in rows]


def test_intervals_are_drawn_from_end_to_end(large) -> None:
    axes = plot_accuracy(large).axes[0]
    drops = [r.lost for r in large.measured[1:]]
    drawn = [tuple(s[:, 0]) for c in axes.collections for s in c.get_segments()]
    assert drawn == [(d.low, d.high) for d in drops]


def test_no_times_no_picture() -> None:
    untimed = dataclasses.replace(comparison(), rows=[row("a", speed=None)])
    with pytest.raises(ValueError, match="none were measured"):
        plot_speedups(untimed)
