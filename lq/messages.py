"""Words for errors."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_LONGEST = 400
_ATTEMPT = re.compile(r"^( *)- (.*(?:\n\1 .*)*)", re.MULTILINE)
"""An item of a list, with the lines that are indented deeper."""
_NO_REASON = ("<class", "Expected a path", "Not a valid subclass")
"""What attempts say that failed because the value was meant for another."""
_RAISED = re.compile(r"^[\w.]+: ", re.MULTILINE)
"""Where a traceback says what was raised."""


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


def one_line(error: BaseException) -> str:
    r"""Return what an error says in one line.

    Of the traceback of a data loader's worker that is its end; of a list of attempts, as the
    parser of the command line makes them, the one that failed for a reason.

    Example:
        >>> one_line(ValueError("Parser key 'k':\n  - Expected a <class 'int'>\n  - No\n    x"))
        "Parser key 'k': No x"
    """
    text = str(error).strip() or type(error).__name__
    if "Original Traceback" in text:
        text = _RAISED.split(text)[-1]
    attempts = [match[2] for match in _ATTEMPT.finditer(text)]
    reasons = [attempt for attempt in attempts if not any(n in attempt for n in _NO_REASON)]
    if reasons:
        text = f"{text.splitlines()[0]} {reasons[0]}"
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."
