"""What tests of pictures look at: where text stands, and how bars are long."""

from itertools import combinations, pairwise

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox


def drawn(figure):
    """Draw a figure, and return what it was drawn with."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def overlapping(figure) -> list[tuple[str, str]]:
    """Return pairs of labels of one figure whose boxes have points in common."""
    renderer = drawn(figure)
    bad = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in tick_labels(axis)]
            boxes.sort(key=lambda pair: (pair[1].y0, pair[1].x0))
            bad += [(a, b) for (a, x), (b, y) in pairwise(boxes) if _touch(x, y)]
        texts = [(t.get_text(), t.get_window_extent(renderer)) for t in axes.texts]
        texts.sort(key=lambda pair: (round(pair[1].y0), pair[1].x0))
        bad += [(a, b) for (a, x), (b, y) in pairwise(texts) if _touch(x, y)]
    titles = [t for a in figure.axes for t in (a.title, a.xaxis.label, a.yaxis.label)]
    titles += [text for legend in figure.legends for text in legend.get_texts()]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in titles if t.get_text()]
    bad += [(a, b) for (a, x), (b, y) in combinations(boxes, 2) if _touch(x, y)]
    return bad + outside(figure, renderer)


def tick_labels(axis) -> list:
    """Return the labels of the ticks that are drawn, which those beyond the ends are not."""
    low, high = sorted(axis.get_view_interval())
    ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
    ticks = [t for t in ticks if low <= t.get_loc() <= high]
    return [t.label1 for t in ticks if t.label1.get_text() and t.label1.get_visible()]


def outside(figure, renderer) -> list[tuple[str, str]]:
    """Return titles and labels that the edge of the figure cuts."""
    texts = [t for a in figure.axes for t in (a.title, a.xaxis.label, a.yaxis.label)]
    texts += [t for a in figure.axes for t in (*tick_labels(a.yaxis), *a.texts)]
    edge = figure.bbox.padded(1)
    found = []
    for text in texts:
        box = text.get_window_extent(renderer)
        if text.get_text() and text.get_visible() and not _within(box, edge):
            found.append((text.get_text(), "the edge"))
    return found


def _touch(a: Bbox, b: Bbox) -> bool:
    common = Bbox.intersection(a, b)
    return common is not None and common.width > 0.5 and common.height > 0.5


def _within(box: Bbox, edge: Bbox) -> bool:
    return edge.x0 <= box.x0 and edge.y0 <= box.y0 and box.x1 <= edge.x1 and box.y1 <= edge.y1


def bars(axes) -> dict[float, float]:
    """Return row -> length of the horizontal bars of axes."""
    return {
        round(bar.get_y() + bar.get_height() / 2, 6): bar.get_width()
        for container in axes.containers
        for bar in container
    }
