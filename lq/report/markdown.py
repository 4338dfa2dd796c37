"""A report as Markdown, its pictures beside it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from lq.report.content import Section


def to_markdown(title: str, sections: Iterable[Section]) -> str:
    r"""Return a report as Markdown.

    Args:
        title: Its heading.
        sections: Its parts; pictures are looked for as ``plots/<name>.png``.

    Example:
        >>> print(to_markdown("Net", [Section("Methods", table=[["a", "b"], ["1", "2|3"]])]))
        # Net
        <BLANKLINE>
        ## Methods
        <BLANKLINE>
        | a | b |
        |---|---|
        | 1 | 2\|3 |
        <BLANKLINE>
    """
    return "\n".join([f"# {title}", "", *(line for s in sections for line in _lines(s))])


def _lines(section: Section) -> Iterator[str]:
    yield from (f"## {section.title}", "")
    for paragraph in section.text:
        yield from (escaped(paragraph), "")
    if section.table:
        yield from (*_table(section.table), "")
    if section.points:
        yield from (*(f"- {escaped(point)}" for point in section.points), "")
    for picture in section.pictures:
        caption = escaped(picture.caption)
        yield from (f"![{caption}](plots/{picture.name}.png)", "", f"*{caption}*", "")


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    header, *rest = rows
    yield _row(header)
    yield "|" + "---|" * len(header)
    yield from map(_row, rest)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(escaped, cells)) + " |"


def escaped(text: str) -> str:
    r"""Return text that Markdown shows as it is.

    Example:
        >>> print(escaped("a_b of <class 'int'> | *"))
        a\_b of &lt;class 'int'&gt; \| \*
    """
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", escape(text, quote=False))
