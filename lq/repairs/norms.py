"""Find a model's BatchNorm layers, and the layers they follow."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lq.repairs.running import hooks, outputs
from lq.surgery import quantized_layers


def live_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorm layers of a model that keep statistics, by qualified name."""
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm)}
    return {n: m for n, m in norms.items() if m.running_mean is not None}


def following_norms(model: nn.Module, batch: Any) -> tuple[dict[str, _BatchNorm], dict[str, str]]:
    """Return the BatchNorm that takes each layer's output, and which layers have none to correct.

    Found by running the model once, without tracing.
    """
    layers = quantized_layers(model)
    calls: Counter[Any] = Counter()
    made: list[tuple[str, Any]] = []  # keeps the outputs, so that none is taken for another
    norms: dict[str, _BatchNorm] = {}

    def note(name: str, _layer: nn.Module, _args: Any, output: Any) -> None:
        calls[name] += 1
        made.append((name, output))

    def look(norm: Any, args: tuple[Any, ...]) -> None:
        calls[norm] += 1
        norms.update({name: norm for name, output in made if args and args[0] is output})

    with hooks(
        [
            *(layer.register_forward_hook(partial(note, n)) for n, layer in layers.items()),
            *(norm.register_forward_pre_hook(look) for norm in live_norms(model).values()),
        ]
    ):
        outputs(model, batch)
    norms = {name: norm for name, norm in norms.items() if calls[norm] == 1}
    left = {}
    for name, layer in layers.items():
        if calls[name] != 1:
            left[name] = "it is used several times" if calls[name] else "no data reaches it"
        elif layer.bias is None and name not in norms:
            left[name] = "it has no bias, and no BatchNorm follows"
    return norms, left
