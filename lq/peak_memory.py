"""How much memory a part of a program takes at most."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


class PeakMemory:
    """What was found: ``mb``, in 10^6 bytes, once the part is over; ``None`` where unknown."""

    mb: float | None = None


@contextmanager
def peak_memory() -> Iterator[PeakMemory]:
    """Measure by how much memory grows at most until the context ends.

    That of the process, as Linux counts it, and what torch takes of a GPU besides. Memory that the
    process had freed and kept counts as not taken, so the first part that is measured shows most;
    other systems do not tell.

    Example:
        >>> with peak_memory() as peak:
        ...     x = torch.ones(40_000_000)
        >>> peak.mb is None or peak.mb > 100
        True
    """
    found, before = PeakMemory(), _status("VmRSS") if _forget_peak() else None
    cuda = torch.cuda.is_available()
    on_gpu = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    yield found
    after = _status("VmHWM")
    if before is not None and after is not None:
        taken = torch.cuda.max_memory_allocated() - on_gpu if cuda else 0
        found.mb = (after - before + taken) / 1e6


def _forget_peak() -> bool:
    """Set VmHWM back, see proc(5), and return whether the system lets us."""
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(name: str) -> int | None:
    """Return a number of bytes that Linux tells of this process."""
    path = _PROCESS / "status"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [line.split()[1] for line in lines if line.startswith(f"{name}:")]
    return int(found[0]) * 1024 if found else None
