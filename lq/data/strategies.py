"""Which images to choose: random, stratified by class, farthest apart. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor


def seeded_order(count: int, seed: int) -> Tensor:
    """Return ``0 ... count - 1`` in an order that `seed` alone fixes."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


def shares(class_sizes: Tensor, size: int, seed: int) -> Tensor:
    """Return how many of `size` samples each class gets: its share, rounded.

    ``n_c = floor(size N_c / N)``, and one more for the largest remainders until they add up to
    `size` (Hamilton's method); `seed` breaks ties, so that no class is favoured for its number.

    Args:
        class_sizes: Samples of each class, int64 ``[classes]``.
        size: At most their sum.
        seed: Breaks ties.

    Example:
        >>> shares(torch.tensor([70, 20, 10]), 4, seed=0)
        tensor([3, 1, 0])
    """
    total = int(class_sizes.sum())
    counts = class_sizes * size // total
    remainders = class_sizes * size % total
    order = seeded_order(len(class_sizes), seed)
    order = order[remainders[order].argsort(descending=True, stable=True)]
    counts[order[: size - int(counts.sum())]] += 1
    return counts


def stratified(labels: Tensor, size: int, seed: int) -> Tensor:
    """Return the indices of `size` samples with each class in its share.

    The classes are mixed in that proportion from the beginning on, so that the first samples are
    stratified too.

    Example:
        >>> labels = torch.tensor([0, 0, 1, 1, 1, 1])
        >>> labels[stratified(labels, 3, seed=0)].sort().values
        tensor([0, 1, 1])
    """
    order = seeded_order(len(labels), seed)
    member = torch.unique(labels[order], return_inverse=True)[1]
    class_sizes = member.bincount()
    counts = shares(class_sizes, size, seed)
    starts = class_sizes.cumsum(0) - class_sizes
    by_class = member.argsort(stable=True)
    rank = torch.empty_like(member)  # among the samples of its class
    rank[by_class] = torch.arange(len(labels)) - starts[member[by_class]]
    taken = (rank < counts[member]).nonzero().flatten()
    progress = (rank[taken] + 0.5) / counts[member[taken]]
    return order[taken[progress.argsort(stable=True)]]


def farthest_points(features: Tensor, size: int) -> Tensor:
    """Return the indices of points that cover all others, each the farthest from those before it.

    ``c_1 = 0;  c_{k+1} = argmax_i min_{j <= k} ||f_i - f_{c_j}||``

    No choice of `size` points can more than halve the distance of the farthest point from its
    nearest chosen one (Gonzalez 1985, "Clustering to minimize the maximum intercluster distance";
    Sener & Savarese 2018, "Active learning for CNNs: a core-set approach"). Ties go to the first.

    Args:
        features: ``[N, D]``.
        size: At most N.

    Returns:
        int64 ``[size]``; every prefix is the choice for a smaller size.

    Example:
        >>> farthest_points(torch.tensor([[0.0], [1.0], [10.0], [4.0]]), 3)
        tensor([0, 2, 3])
    """
    chosen = [0]
    nearest = torch.full((len(features),), torch.inf, dtype=features.dtype)
    while len(chosen) < size:
        distance = (features - features[chosen[-1]]).square().sum(1)
        nearest = torch.minimum(nearest, distance)
        nearest[chosen[-1]] = -1  # Even where all that are left are copies of it.
        chosen.append(int(nearest.argmax()))
    return torch.tensor(chosen)
