"""A report as one HTML file that needs nothing else: no network, no script."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape

import matplotlib
from matplotlib.figure import Figure

from lq.plots.style import THEMES, Theme
from lq.report.content import Picture, Section

_STYLE = """
:root {color-scheme: light dark; %(light)s}
@media screen and (prefers-color-scheme: dark) {:root {%(dark)s}}
* {box-sizing: border-box}
body {font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--background);
  max-width: 60rem; margin: 0 auto; padding: 1rem}
h1 {line-height: 1.2; margin: 1rem 0 .25rem} h2 {margin: 2.5rem 0 .5rem}
nav a {margin-right: 1rem} a {color: inherit} li {margin: .4rem 0}
.scroll {overflow-x: auto} table {border-collapse: collapse; font-variant-numeric: tabular-nums}
th, td {padding: .35rem .7rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--muted)}
th:first-child, td:first-child {text-align: left}
figure {margin: 1.5rem 0; break-inside: avoid} figure svg {width: 100%%; height: auto;
  max-width: 46rem} figcaption {font-size: .9rem}
@media print {body {max-width: none; font-size: 11px; padding: 0} nav {display: none}
  h2 {margin: 1rem 0 0; break-after: avoid} figure svg {max-height: 22cm}
  figure {display: inline-block; vertical-align: top; width: 48%%; margin: .5rem .5%%}}
"""


def to_html(title: str, lead: str, sections: Iterable[Section]) -> str:
    """Return a report as a page that shows itself in light and dark, on a phone and on paper.

    Args:
        title: Its heading.
        lead: A sentence below it.
        sections: Its parts.

    Example:
        >>> page = to_html("Net", "a < b", [Section("Methods", ["One."])])
        >>> "<h2 id='methods'>Methods</h2>" in page, "a &lt; b" in page
        (True, True)
    """
    parts = list(sections)
    links = "".join(f"<a href='#{_anchor(s)}'>{escape(s.title)}</a>" for s in parts)
    style = _STYLE % {name: _variables(theme) for name, theme in THEMES.items()}
    body = "\n".join(line for section in parts for line in _section(section))
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body>"
        f"<h1>{escape(title)}</h1><p>{escape(lead)}</p><nav>{links}</nav>\n{body}\n</body></html>\n"
    )


def _section(section: Section) -> Iterator[str]:
    yield f"<h2 id='{_anchor(section)}'>{escape(section.title)}</h2>"
    yield from (f"<p>{escape(paragraph)}</p>" for paragraph in section.text)
    if section.table:
        yield from _table(section.table)
    if section.points:
        items = "".join(f"<li>{escape(point)}</li>" for point in section.points)
        yield f"<ul>{items}</ul>"
    yield from (_figure(picture) for picture in section.pictures)


def _anchor(section: Section) -> str:
    return re.sub(r"\W+", "-", section.title.lower())


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    header, *rest = rows
    yield "<div class='scroll'><table><thead>" + _row(header, "th") + "</thead><tbody>"
    yield from (_row(row, "td") for row in rest)
    yield "</tbody></table></div>"


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _figure(picture: Picture) -> str:
    svg = to_svg(picture.draw(theme="light"), picture.name)
    label = f"<svg role='img' aria-label='{escape(picture.caption)}' "
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
    return f"<figure>{svg.replace('<svg ', label, 1)}{caption}</figure>"


def to_svg(figure: Figure, name: str) -> str:
    """Return a figure of the light theme as SVG whose colours follow those of the page.

    Args:
        figure: The figure.
        name: Makes the identifiers in it differ from those of the page's other figures.
    """
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for number, colour in enumerate(_colours(THEMES["light"])):
        svg = svg.replace(colour, f"var(--{_NAMES[number]})")
    return svg


_NAMES = ("background", "text", "muted", *(f"data{i}" for i in range(8)))


def _colours(theme: Theme) -> list[str]:
    return [c.lower() for c in (theme.background, theme.text, theme.muted, *theme.colours)]


def _variables(theme: Theme) -> str:
    return " ".join(f"--{n}: {c};" for n, c in zip(_NAMES, _colours(theme), strict=True))
