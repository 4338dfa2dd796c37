"""Which part of a LightningModule a callback works on, and the surgery on it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from lq.messages import suggest
from lq.module import QuantModule
from lq.spec import Recipe
from lq.state import recipe_of
from lq.surgery import left_float, quantizable_layers, quantize, quantized_layers


def target_module(pl_module: L.LightningModule, name: str | None) -> nn.Module:
    """Return the submodule of that name; without one, a QuantModule's model or the whole module.

    Raises:
        ValueError: If there is no such submodule, naming the nearest.
    """
    if name is None:
        return pl_module.model if isinstance(pl_module, QuantModule) else pl_module
    try:
        return pl_module.get_submodule(name)
    except AttributeError:
        names = [n for n, _ in pl_module.named_modules() if n]
        raise ValueError(
            f"Expected `module` to be a submodule of {type(pl_module).__name__}, but got {name!r}; "
            f"{suggest(name, names)}"
        ) from None


def quantize_target(
    pl_module: L.LightningModule,
    name: str | None,
    recipe: Recipe | str | Path | Mapping[str, Any],
) -> nn.Module:
    """Put quantizers on the target before weights are restored and optimizers made.

    Callbacks are set up before the module configures itself, so that is done here first; a module
    that quantizes itself keeps its own recipe.

    Raises:
        ValueError: If there is nothing to quantize.
    """
    if is_overridden("configure_model", pl_module):
        pl_module.configure_model()
    target = target_module(pl_module, name)
    if recipe_of(target) is not None:
        return target
    if not quantizable_layers(target)[0]:
        raise ValueError(
            f"Expected {name or type(pl_module).__name__!r} to have layers to quantize, but found "
            "none; build them in __init__ or configure_model (setup comes too late), or name "
            "another `module`."
        )
    return quantize(target, recipe)


def check_still_quantized(target: nn.Module, planned: Mapping[str, nn.Module]) -> None:
    """Raise a ``RuntimeError`` if layers were built or replaced after the surgery."""
    present = quantized_layers(target)
    floats = {n for n in quantizable_layers(target)[0] if n not in present} - _left_float(target)
    replaced = {name for name, layer in planned.items() if present.get(name) is not layer}
    late = sorted(floats | replaced)
    if late:
        raise RuntimeError(
            f"Expected layers to be built before the quantizers are put in, but {late[:3]} came "
            "later; build them in __init__, or in a configure_model that builds them only once."
        )


def _left_float(target: nn.Module) -> set[str]:
    """Return the layers that are float by the recipe or because of what they are."""
    recipe = recipe_of(target)
    layers = quantizable_layers(target)[0]
    chosen = {n for n, layer in layers.items() if recipe and recipe.layer_spec(n, layer).is_float}
    return chosen | left_float(target).keys()
