"""The processes that train together, where training is distributed."""

from __future__ import annotations

from typing import TypeVar

import torch

ValueT = TypeVar("ValueT")


def world_size() -> int:
    """Return how many processes take part; 1 where training is not distributed.

    Example:
        >>> world_size()
        1
    """
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """Return which of them this process is, from 0.

    Example:
        >>> rank()
        0
    """
    return torch.distributed.get_rank() if world_size() > 1 else 0


def gathered(value: ValueT) -> list[ValueT]:
    """Return the values of all processes, in the order of their ranks; each waits for the others.

    Example:
        >>> gathered("mine")
        ['mine']
    """
    if world_size() == 1:
        return [value]
    values: list[ValueT | None] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values  # type: ignore[return-value]
