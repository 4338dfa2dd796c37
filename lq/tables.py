"""Tables of text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]], left: Sequence[int] | None = None) -> str:
    """Return lines of cells with their columns under each other.

    Args:
        lines: The header and the rows, all of one length.
        left: Columns that are aligned at the left, the others being at the right; if not given,
            the first and all in which something is no number.

    Example:
        >>> print(aligned([["layer", "size"], ["conv", "12"], ["fc", "3"]]))
        layer  size
        conv     12
        fc        3
    """
    columns = list(zip(*lines, strict=True))
    if left is None:
        left = [i for i, column in enumerate(columns) if i == 0 or not _are_numbers(column[1:])]
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _are_numbers(cells: Sequence[str]) -> bool:
    return all(cell[:1].isdigit() or cell[:1] in ("-", "+") for cell in cells)
