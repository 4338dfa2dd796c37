"""Put quantizers into a model, and take them out again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from lq import state
from lq.layers import (
    QuantLayer,
    attach_quantizers,
    detach_quantizers,
    is_quantizable,
    unsupported,
)
from lq.quantizer import Quantizer
from lq.spec import Recipe

log = logging.getLogger(__name__)
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Return the quantized layers of a model by qualified name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Return the quantizers of a model by qualified name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}


def is_calibrated(model: nn.Module) -> bool:
    """Return whether a model's calibration has run, or needs not.

    Ranges are set all together, so one known range tells it; quantizers that no data reached stay
    uncalibrated for good, and refuse to run.
    """
    need = [q for q in quantizers(model).values() if q.spec.needs_scale]
    return not need or any(q.is_calibrated for q in need)


def quantizable_layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers that can be quantized, and why the others of their kind cannot."""
    layers: dict[str, nn.Module] = {}
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if is_quantizable(module):
            reason = unsupported(module)
            if reason is None:
                layers[name] = module
            else:
                left[name] = reason
        elif isinstance(module, nn.MultiheadAttention):
            left[f"{name}.in_proj".lstrip(".")] = "nn.MultiheadAttention has no layer for it"
    return layers, left


def quantize(model: ModuleT, recipe: Recipe | str | Path | Mapping[str, Any]) -> ModuleT:
    """Put quantizers on a model's Conv, ConvTranspose and Linear layers, in place.

    Every module object stays: a layer's class becomes a subclass of its float class, the names
    of its parameters do not change, and a module used twice is quantized once. Quantizing again
    with the same recipe changes nothing; with another, layers whose specs stay keep their ranges.
    Layers that cannot be quantized are left as they are and named in a log warning.

    Args:
        model: Any module.
        recipe: Preset name, ``Recipe``, mapping, or path of a YAML file.

    Returns:
        The same `model`.

    Raises:
        ValueError: If a rule matches no layer, or the model has none to quantize.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
        >>> quantize(model, "tensorrt_int8")
        Sequential(
          (0): QuantConv2d(
            3, 8, kernel_size=(3, 3), stride=(1, 1)
            (input_quantizer): Quantizer(int8, uncalibrated)
            (weight_quantizer): Quantizer(int8, axis=0, uncalibrated)
          )
          (1): ReLU()
        )
    """
    recipe = Recipe.parse(recipe)
    layers, left = quantizable_layers(model)
    if not layers:
        raise ValueError(
            "Expected the model to have Conv, ConvTranspose or Linear layers that can be "
            f"quantized, but found none in {type(model).__name__}"
            + (f" ({_describe(left)})." if left else ".")
        )
    recipe.check_rules(layers)
    specs = {name: recipe.layer_spec(name, layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        spec = specs[name]
        if isinstance(layer, QuantLayer):
            if layer.layer_spec == spec:
                continue
            detach_quantizers(layer)
        if not spec.is_float:
            attach_quantizers(layer, spec, f"{name}." if name else "")
    _leave_fast_path(model)
    if left:
        log.warning("Left float: %s.", _describe(left))
    for module in model.modules():
        state.detach_recipe(module)
    state.attach_recipe(model, recipe)
    return model


def dequantize(model: ModuleT) -> ModuleT:
    """Take all quantizers out of a model again, in place.

    The float model is as it was before ``quantize``: same objects, same classes, weights
    untouched.

    Example:
        >>> dequantize(quantize(nn.Linear(16, 4), "tensorrt_int8"))
        Linear(in_features=16, out_features=4, bias=True)
    """
    for layer in quantized_layers(model).values():
        detach_quantizers(layer)
    for module in model.modules():
        state.detach_recipe(module)
    return model


def _describe(left: Mapping[str, str]) -> str:
    return "; ".join(f"{name} ({reason})" for name, reason in left.items())


def _leave_fast_path(model: nn.Module) -> None:
    """Make transformer layers call their Linears.

    In eval mode ``nn.TransformerEncoderLayer`` reads the weights of its Linears and calls a fused
    operator instead, unless a module in it has a hook.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            for quantizer in quantizers(module).values():
                if not quantizer._forward_pre_hooks:
                    quantizer.register_forward_pre_hook(_no_op)


def _no_op(_module: nn.Module, _args: Any) -> None:
    """Do nothing; being there is enough."""
