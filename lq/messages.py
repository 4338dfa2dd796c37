"""Words for errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(given: object, valid: Iterable[str]) -> str:
    """Return the end of an error message: the nearest valid spelling, or all of them.

    Example:
        >>> suggest("max_", ["max", "percentile"])
        "did you mean 'max'?"
        >>> suggest("7", ["max", "percentile"])
        'choose from max, percentile.'
    """
    valid = list(valid)
    longer = [name for name in valid if name.startswith(str(given))] if given else []
    close = longer or difflib.get_close_matches(str(given), valid, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    shown = ", ".join(valid[:12]) + (", ..." if len(valid) > 12 else "")
    return f"choose from {shown}."


def check_keys(given: Iterable[str], valid: Iterable[str], where: str) -> None:
    """Raise a ``ValueError`` for the first key of a mapping that is not valid."""
    valid = list(valid)
    for key in given:
        if key not in valid:
            raise ValueError(
                f"Expected known keys in {where}, but got {key!r}; {suggest(key, valid)}"
            )
