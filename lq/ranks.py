"""The processes that train together, where training is distributed."""

from __future__ import annotations

import torch


def world_size() -> int:
    """Return how many processes take part; 1 where training is not distributed.

    Example:
        >>> world_size()
        1
    """
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_initialized() else 1
