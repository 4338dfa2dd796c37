"""Figures look alike, change nothing global, and are saved the same each time."""

import matplotlib
import pytest
from matplotlib.colors import to_rgb

from lq.plots.rows import name_rows, rows_size
from lq.plots.style import THEMES, elide, new_figure, save_figure, theme_of
from tests.plots.looking import drawn, overlapping


def luminance(colour: str) -> float:
    """Relative luminance, as WCAG 2.1 defines it."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", THEMES)
def test_text_stands_out(name: str) -> None:
    theme = theme_of(name)
    assert contrast(theme.text, theme.background) > 7  # WCAG AAA
    assert len(set(theme.colours)) == len(theme.colours)


def test_unknown_theme() -> None:
    with pytest.raises(ValueError, match="got 'drak'; did you mean 'dark'"):
        new_figure(theme="drak")


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_saved_bytes_are_the_same(suffix: str, tmp_path) -> None:
    before = dict(matplotlib.rcParams)
    written = []
    for i in range(2):
        figure, (axes,) = new_figure(theme="dark")
        axes.plot([1, 2], [3, 4], label="line")
        axes.barh([1], [2], hatch="///")
        save_figure(figure, tmp_path / f"{i}{suffix}")
        written.append((tmp_path / f"{i}{suffix}").read_bytes())
    assert written[0] == written[1]
    assert len(written[0]) > 1000
    assert dict(matplotlib.rcParams) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"0{suffix}", f"1{suffix}"]


def test_another_kind_of_file(tmp_path) -> None:
    figure, _ = new_figure()
    with pytest.raises(ValueError, match=r"ends in \.png or \.svg, but got .*figure\.gif"):
        save_figure(figure, tmp_path / "figure.gif")


@pytest.mark.parametrize("count", [1, 5, 105, 500])
def test_row_names_do_not_overlap(count: int) -> None:
    names = [f"layers.{i}.block.attention.projection_of_values" for i in range(count)]
    figure, (axes,) = new_figure(size=rows_size(count))
    name_rows(axes, names)
    assert not overlapping(figure)
    labels = [t.get_text() for t in axes.get_yticklabels()]
    assert labels[0] == elide(names[0])
    assert len(labels) == count if count <= 105 else len(labels) < count


def test_elided_names_keep_both_ends() -> None:
    assert elide("short") == "short"
    assert [len(elide("x" * n, 10)) for n in (9, 10, 11, 99)] == [9, 10, 10, 10]
    assert elide("features.17.block.conv1", 12) == "fea…ck.conv1"


def test_drawing_needs_no_pyplot() -> None:
    figure, _ = new_figure(2, 2)
    drawn(figure)
    assert len(figure.axes) == 4
