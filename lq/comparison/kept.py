"""Results that are kept in a file, so that a killed run does not measure them again."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lq.files import write_text

Plain = dict[str, Any]
BEGUN = "begun.json"
"""Says on which terms a folder was begun."""


def kept(
    path: Path, terms: Any, make: Callable[[], Plain], lasts: Callable[[Plain], bool]
) -> Plain:
    """Return what a file keeps from before on the same terms; else make it, and keep it.

    Args:
        path: JSON file.
        terms: Plain values that the result depends on.
        make: Makes the result, as plain values.
        lasts: Whether a result from before is still good.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "kept.json")
        >>> [kept(path, t, lambda: {"made for": t}, bool) for t in (1, 2)]
        [{'made for': 1}, {'made for': 2}]
        >>> kept(path, 2, lambda: {}, bool)
        {'made for': 2}
    """
    key, stored = _key(terms), _read(path)
    if stored.get("key") == key and lasts(stored["kept"]):
        return dict(stored["kept"])
    made = make()
    write_text(path, json.dumps({"key": key, "kept": made}))
    return made


def check_own(folder: Path) -> None:
    """Raise a ``ValueError`` if a folder holds what no comparison has put there."""
    files = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if BEGUN not in files and any(not name.startswith(".") for name in files):
        raise ValueError(
            f"Expected {str(folder)!r} to be empty or of a comparison, but it holds other files; "
            "name another `folder`."
        )


def fresh_folder(folder: Path, terms: Any) -> None:
    """Empty a folder that was begun on other terms; a killed run goes on with what is in it."""
    if _read(folder / BEGUN).get("key") != _key(terms):
        if folder.is_dir():
            old = folder.with_name(f".{folder.name}.{os.getpid()}")
            folder.rename(old)  # at once, so that no kill leaves a part of it
            shutil.rmtree(old, ignore_errors=True)
        kept(folder / BEGUN, terms, dict, bool)


def _key(terms: Any) -> str:
    return hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> Plain:
    """Return what is in a file; nothing, where it is not there or not whole."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stored if isinstance(stored, dict) and isinstance(stored.get("kept"), dict) else {}
