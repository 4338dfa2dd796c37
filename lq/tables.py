"""Tables of text."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(lines: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> str:
    """Return lines of cells with their columns under each other.

    Args:
        lines: The header and the rows, all of one length.
        left: Columns that are aligned at the left; the others are at the right.

    Example:
        >>> print(aligned([["", "top-1"], ["float", "98%"]]))
               top-1
        float    98%
    """
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
