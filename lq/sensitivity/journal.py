"""What was measured so far, in memory and in a file that a killed sweep goes on from."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lq.files import check_file_path
from lq.ranks import gathered, rank

FLOAT = "float"
"""Stands for the float model among the variants."""


class Journal:
    """Values of samples by variant and batch, each written down as soon as it is measured.

    The file has one JSON object a line: first what the sweep is of, then for each batch its hash,
    and for each variant and batch float32 values in base64. A last line that was cut off is
    dropped. Where training is distributed each rank writes a file of its own and reads all.

    Args:
        path: The file; ``None`` keeps values in memory only.
        header: What the sweep is of; a file of another is refused.

    Raises:
        ValueError: If the file is of another model, recipe or the like, naming what differs.

    Example:
        >>> journal = Journal(None, {})
        >>> journal.add("int8:fc", 0, np.zeros((4, 5), np.float32))
        >>> journal.has("int8:fc", 0), journal.has("int8:fc", 1)
        (True, False)
    """

    def __init__(self, path: str | Path | None, header: Mapping[str, Any]) -> None:
        self.path = None if path is None else Path(path)
        self._values: dict[str, dict[int, np.ndarray]] = {}
        self._batches: dict[int, str] = {}
        if self.path is None:
            return
        check_file_path(self.path)
        self._own = _of_rank(self.path, rank())
        for file in _files(self.path):
            self._read(file, header)
        gathered(None)  # nobody writes before everybody has read
        self._begin(header)

    def has(self, variant: str, batch: int) -> bool:
        """Return whether a variant was measured on a batch."""
        return batch in self._values.get(variant, {})

    def add(self, variant: str, batch: int, values: np.ndarray) -> None:
        """Keep the values ``[N, 5]`` of a batch."""
        self._values.setdefault(variant, {})[batch] = values
        text = base64.b64encode(values.astype("<f4").tobytes()).decode()
        self._write({"variant": variant, "batch": batch, "n": len(values), "values": text})

    def check_batch(self, batch: int, digest: str) -> None:
        """Note the hash of a batch, or compare it with the one before.

        Raises:
            ValueError: If it is another batch than it was.
        """
        if batch not in self._batches:
            self._batches[batch] = digest
            self._write({"batch": batch, "sha256": digest})
        elif self._batches[batch] != digest:
            raise ValueError(
                f"Expected the batches that {str(self.path)!r} was begun with, but batch {batch} "
                "is another; give them in the same order (no shuffling), or delete the file to "
                "begin again."
            )

    def values(self, variant: str, until: float = math.inf) -> np.ndarray:
        """Return the values ``[N, 5]`` of a variant over its batches, up to one of them."""
        found = [v for b, v in sorted(self._values.get(variant, {}).items()) if b <= until]
        return np.concatenate(found) if found else np.zeros((0, 5), np.float32)

    def exchange(self) -> None:
        """Give every rank the values of all, where training is distributed."""
        for others in gathered(self._values):
            for variant, found in others.items():
                self._values.setdefault(variant, {}).update(found)

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.path is not None:
            with open(self._own, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _begin(self, header: Mapping[str, Any]) -> None:
        self._own.parent.mkdir(parents=True, exist_ok=True)
        if self._own.is_file():
            whole = _whole_lines(self._own)
            if len(whole) < self._own.stat().st_size:
                with open(self._own, "r+b") as file:
                    file.truncate(len(whole))
        if not self._own.is_file() or not self._own.stat().st_size:
            self._write(header)

    def _read(self, file: Path, header: Mapping[str, Any]) -> None:
        try:
            lines = [json.loads(line) for line in _whole_lines(file).splitlines()]
            if lines:
                self._check(lines[0], header)
            for line in lines[1:]:
                if "sha256" in line:
                    self._batches[line["batch"]] = line["sha256"]
                else:
                    raw = np.frombuffer(base64.b64decode(line["values"]), "<f4")
                    found = self._values.setdefault(line["variant"], {})
                    found[line["batch"]] = raw.reshape(line["n"], -1)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"Expected {str(file)!r} to be the journal of a sweep, but it cannot be read: "
                f"{error}; delete it to begin again."
            ) from None

    def _check(self, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        for key, value in header.items():
            if found[key] != json.loads(json.dumps(value)):
                raise ValueError(
                    f"Expected the journal {str(self.path)!r} to be of this sweep, but its {key} "
                    "is another; name another file, or delete it to begin again."
                )


def _of_rank(path: Path, number: int) -> Path:
    return path if number == 0 else path.with_name(f"{path.name}.{number}")


def _files(path: Path) -> Iterator[Path]:
    """Yield the journals of all ranks that are there."""
    if path.is_file():
        yield path
    if path.parent.is_dir():
        others = (p for p in sorted(path.parent.iterdir()) if p.stem == path.name)
        yield from (p for p in others if p.suffix[1:].isdigit())


def _whole_lines(file: Path) -> bytes:
    content = file.read_bytes()
    return content[: content.rfind(b"\n") + 1]
