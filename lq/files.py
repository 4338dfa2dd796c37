"""Files are written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def check_file_path(path: str | Path) -> None:
    """Raise a ``ValueError`` where no file can be written because a directory is there."""
    if Path(path).is_dir():
        raise ValueError(f"Expected a path to a file, but {str(path)!r} is a directory.")


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, and rename it to `path` if all went well.

    Two processes that write the same file do not mix: each has its own temporary file, and the
    last rename wins. After an error nothing is left behind.

    Example:
        >>> import tempfile
        >>> target = Path(tempfile.mkdtemp()) / "result.txt"
        >>> with written_whole(target) as temporary:
        ...     _ = temporary.write_text("done")
        >>> target.read_text()
        'done'
    """
    path = Path(path)
    check_file_path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write text to a file, whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_saved(path: str | Path, what: str, make: Callable[[Any], T], remedy: str) -> T:
    """Return what is made of a JSON file that was saved before.

    Args:
        path: The file.
        what: What it is said to hold, such as ``a sweep``.
        make: Makes it of the plain values.
        remedy: What to do if it cannot be read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not such a file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected {what} at {str(path)!r}, but there is no file.")
    try:
        return make(json.loads(path.read_text(encoding="utf-8")))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(
            f"Expected {str(path)!r} to hold {what} that lq saved, but it cannot be read: {error}; "
            f"{remedy}."
        ) from None


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
