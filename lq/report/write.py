"""Write a comparison as a folder that can be handed on."""

from __future__ import annotations

from pathlib import Path

from lq.comparison import Comparison
from lq.files import write_text
from lq.plots import save_figure
from lq.report.choosing import check_use
from lq.report.content import sections
from lq.report.html import to_html
from lq.report.markdown import to_markdown


def write_report(
    comparison: Comparison, folder: str | Path = "comparison", use: str = "server"
) -> Path:
    """Write a report as HTML, Markdown and JSON, and its pictures as PNG and SVG.

    ``report.html`` is one file that needs nothing else; ``report.md`` shows ``plots/*.png``;
    ``comparison.json`` gives the comparison back with ``lq.Comparison.load``.

    Args:
        comparison: What ``lq.compare`` found.
        folder: Where to write.
        use: What the recommendations are for: ``edge``, ``server`` or ``real_time``.

    Returns:
        The path of the HTML file.

    Raises:
        ValueError: For another use.
    """
    check_use(use)
    folder, parts = Path(folder), list(sections(comparison, use))
    title = f"{comparison.model} quantized"
    lead = (
        f"{comparison.parameters:,} parameters, on {comparison.data or 'data'}, for "
        f"{comparison.target}."
    )
    for picture in (picture for part in parts for picture in part.pictures):
        figure = picture.draw(theme="light")
        for ending in ("png", "svg"):
            save_figure(figure, folder / "plots" / f"{picture.name}.{ending}")
    write_text(folder / "report.md", to_markdown(title, parts))
    write_text(folder / "report.html", to_html(title, lead, parts))
    comparison.save(folder / "comparison.json")
    return folder / "report.html"
