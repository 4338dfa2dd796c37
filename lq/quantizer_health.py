"""How well a quantizer serves the tensors it is given, in figures to watch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lq.functional import other_axes, sqnr_db
from lq.quantizer import Quantizer


def quantizer_health(
    quantizer: Quantizer, x: Tensor, quantized: Tensor, axis: int = 1
) -> dict[str, float]:
    """Return what is worth watching of one quantizer on one tensor.

    ``sqnr_db`` is the signal-to-quantization-noise ratio; ``dead_channels`` the share of channels
    all of whose codes stand for 0, 1 of a quantizer that lets nothing through; ``scale`` and
    ``amax`` are means over channels, and ``clip_rate`` is the share of values beyond the range.
    Formats without a scale have the first two alone.

    Args:
        quantizer: The quantizer, calibrated.
        x: What it was given.
        quantized: What it returned.
        axis: Channel axis of `x`.

    Example:
        >>> from lq import QuantSpec
        >>> quantizer = Quantizer(QuantSpec("int8"))
        >>> quantizer.amax = torch.tensor(1.27)
        >>> x = torch.tensor([[0.5, 2.0, 0.001, -3.0]])
        >>> found = quantizer_health(quantizer, x, quantizer(x))
        >>> found["clip_rate"], found["dead_channels"]
        (0.5, 0.25)
    """
    x, quantized = x.detach(), quantized.detach()
    found = {"sqnr_db": sqnr_db(x, quantized), "dead_channels": dead_channels(quantized, axis)}
    amax = quantizer.amax
    if amax is not None:
        found["scale"] = float(quantizer.positive_scale.mean())
        found["amax"] = float(amax.mean())
        found["clip_rate"] = int(quantizer.clipped(x).sum()) / max(x.numel(), 1)
    return found


def dead_channels(quantized: Tensor, axis: int = 1) -> float:
    """Return the share of channels that are 0 everywhere.

    Example:
        >>> dead_channels(torch.tensor([[0.0, 1.0], [0.0, 0.0]]))
        0.5
    """
    others = other_axes(axis, quantized.dim())
    largest = quantized.abs().amax(others) if others else quantized.abs()
    return float((largest == 0).float().mean())


def drift(first: Tensor, now: Tensor) -> float:
    """Return by how much a range has grown: 0.1 for a tenth, negative where it shrank.

    Of a range by channel, that of the channel which moved furthest.

    Args:
        first: Range to compare with, ``[]`` or ``[C]``, positive.
        now: Range of the same shape.

    Example:
        >>> drift(torch.tensor([1.0, 2.0]), torch.tensor([1.25, 1.0]))
        -0.5
    """
    change = (now.detach() / first - 1).flatten()
    return float(change[change.abs().argmax()])


def gradient_norm(quantizer: Quantizer) -> float | None:
    """Return the norm of the gradient of a learned range, ``None`` where there is none.

    Example:
        >>> from lq import QuantSpec
        >>> quantizer = Quantizer(QuantSpec("int8", range="lsq"))
        >>> quantizer.amax = torch.tensor(1.27)
        >>> gradient_norm(quantizer) is None
        True
        >>> quantizer(torch.tensor([[5.0]])).sum().backward()
        >>> gradient_norm(quantizer) > 0
        True
    """
    gradients = [t.grad for t in quantizer.range_tensors().values() if t.grad is not None]
    if not gradients:
        return None
    return float(torch.stack([gradient.norm() for gradient in gradients]).norm())


def channel_axis(quantizer: Quantizer, owner: nn.Module, x: Tensor) -> int:
    """Return where the channels of a tensor are, by what the quantizer belongs to.

    Images and what convolutions are given have them second, everything else last.

    Args:
        quantizer: The quantizer; one by channel knows its axis.
        owner: The module that it is an attribute of.
        x: What the quantizer is given.

    Example:
        >>> from lq import QuantSpec
        >>> quantizer, tokens = Quantizer(QuantSpec("int8")), torch.zeros(2, 7, 7, 16)
        >>> channel_axis(quantizer, nn.Linear(16, 4), tokens)
        -1
    """
    if quantizer.spec.axis is not None:
        return quantizer.spec.axis
    convolves = hasattr(owner, "kernel_size")
    image = x.dim() == 4 and not isinstance(owner, nn.Linear)
    return 1 if convolves or image else -1


def layer_groups(names: list[str], largest: int = 12) -> dict[str, list[str]]:
    """Return names by what they begin with, in groups small enough to be shown in one chart.

    Args:
        names: Qualified names of quantizers or layers.
        largest: Names in a group; only those that cannot be told apart further exceed it.

    Example:
        >>> layer_groups(["stem.conv", "stage.0.conv", "stage.0.fc", "stage.1.conv"], largest=2)
        {'stem': ['stem.conv'], 'stage.0': ['stage.0.conv', 'stage.0.fc'],
         'stage.1': ['stage.1.conv']}
    """
    return _split(names, 1, largest)


def _split(names: list[str], depth: int, largest: int) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(".".join(name.split(".")[:depth]), []).append(name)
    found: dict[str, list[str]] = {}
    for start, group in groups.items():
        deeper = any(name.count(".") >= depth for name in group)
        if len(group) > largest and deeper:
            found |= _split(group, depth + 1, largest)
        else:
            found[start] = group
    return found
