"""Put quantizers into a model, and take them out again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from lq import state
from lq.dataflow import Dataflow
from lq.layers import (
    QuantLayer,
    attach_quantizers,
    detach_quantizers,
    is_quantizable,
    unsupported,
)
from lq.placement import Placement, nameable, place
from lq.quantizer import Quantizer
from lq.sites import Site, attach, detach
from lq.spec import FLOAT_LAYER, LayerSpec, Recipe
from lq.toolkits import toolkit_of

log = logging.getLogger(__name__)
ModuleT = TypeVar("ModuleT", bound=nn.Module)


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """Return the quantized layers of a model by qualified name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantLayer)}


def quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Return the quantizers of a model by qualified name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, Quantizer)}


def weight_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Return the quantizers of weights by qualified name."""
    return {n: q for n, q in quantizers(model).items() if n.endswith("weight_quantizer")}


def input_quantizers(model: nn.Module) -> dict[str, Quantizer]:
    """Return the quantizers of what passes through a model by qualified name."""
    return {n: q for n, q in quantizers(model).items() if not n.endswith("weight_quantizer")}


def is_calibrated(model: nn.Module) -> bool:
    """Return whether a model's calibration has run, or needs not.

    Ranges are set all together, so one known range tells it; quantizers that no data reached stay
    uncalibrated for good, and refuse to run.
    """
    return any_calibrated(quantizers(model))


def any_calibrated(found: Mapping[str, Quantizer]) -> bool:
    """Return whether one of several quantizers knows its range, or none needs one."""
    need = [q for q in found.values() if q.spec.needs_scale]
    return not need or any(q.is_calibrated for q in need)


def quantizable_layers(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers that can be quantized, and why the others of their kind cannot."""
    return _sort_layers(Dataflow(model))


def _sort_layers(dataflow: Dataflow) -> tuple[dict[str, nn.Module], dict[str, str]]:
    layers: dict[str, nn.Module] = {}
    left = dataflow.read_uncalled()
    for name, module in dataflow.modules.items():
        toolkit = toolkit_of(module)
        if toolkit is not None:
            left[name] = f"quantized by {toolkit}"
        if not is_quantizable(module) or name in left:
            continue
        reason = unsupported(module)
        if reason is None:
            layers[name] = module
            continue
        left[name] = reason
        left |= _output_projection(name, module)
    return layers, left


def _output_projection(name: str, module: nn.Module) -> dict[str, str]:
    """Return the layer that a float ``nn.MultiheadAttention`` does not call, with the reason."""
    if not isinstance(module, nn.MultiheadAttention):
        return {}
    return {f"{name}.out_proj".lstrip("."): "nn.MultiheadAttention is float, and calls it not"}


def left_float(model: nn.Module) -> dict[str, str]:
    """Return what ``quantize`` left float against the recipe, by name, and why.

    Example:
        >>> model = quantize(nn.Sequential(nn.Linear(3, 2), nn.LazyLinear(2)), "tensorrt_int8")
        >>> left_float(model)
        {'1': 'lazy layers have no weight yet; run one forward pass first'}
    """
    return state.left_of(model)


def quantize(model: ModuleT, recipe: Recipe | str | Path | Mapping[str, Any]) -> ModuleT:
    """Put quantizers on a model's layers and residual additions, in place.

    Layers are Conv, ConvTranspose, Linear and ``nn.MultiheadAttention``. Layers and additions that
    see the same tensor share one quantizer. Every module object stays: its class becomes a
    subclass of its float class, the names of its parameters do not change, and a module used
    twice is quantized once. Quantizing again with the same recipe changes nothing; with another,
    layers whose specs stay keep their ranges. What cannot be quantized is left as it is, named in
    a log warning, and returned by ``left_float``.

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
    dataflow = Dataflow(model)
    layers, left = _sort_layers(dataflow)
    if not layers:
        raise ValueError(
            "Expected the model to have Conv, ConvTranspose or Linear layers that can be "
            f"quantized, but found none in {type(model).__name__}"
            + (f" ({_describe(left)})." if left else ".")
        )
    recipe = recipe.of_layers(list(layers))
    recipe.check_rules(layers, nameable(dataflow))
    specs = {name: recipe.layer_spec(name, layer) for name, layer in layers.items()}
    for name, layer in layers.items():
        uncalled = _output_projection(name, layer) if specs[name].is_float else {}
        specs |= dict.fromkeys(uncalled, FLOAT_LAYER)
        left |= uncalled
    placement = place(dataflow, recipe, specs)
    previous = _take_sites(model)
    for name, spec in specs.items():
        _set_layer(name, layers[name], spec)
    _share(model, placement, previous)
    for name, quantizer in quantizers(model).items():
        quantizer.name = name
    leave_fast_path(model)
    left |= placement.left
    if left:
        log.warning("Left float: %s.", _describe(left))
    for module in model.modules():
        state.detach_recipe(module)
    state.attach_recipe(model, recipe, left)
    return model


def _set_layer(name: str, layer: nn.Module, spec: LayerSpec) -> None:
    if isinstance(layer, QuantLayer):
        if layer.layer_spec == spec:
            return
        detach_quantizers(layer)
    if not spec.is_float:
        attach_quantizers(layer, spec, f"{name}." if name else "")


def _take_sites(model: nn.Module) -> dict[Site, Quantizer]:
    """Take the quantizers that are no layer's out, and return them."""
    return {
        Site(name, slot): quantizer
        for name, module in list(model.named_modules())
        for slot, quantizer in detach(module).items()
    }


def _share(model: nn.Module, placement: Placement, previous: Mapping[Site, Quantizer]) -> None:
    """Give every group of places one quantizer: one that is there, so that it keeps its range."""
    modules = dict(model.named_modules())
    taken: set[Quantizer] = set()
    for sites in placement.groups:
        spec = placement.specs[sites[0]]
        there = [getattr(modules[s.module], s.slot, previous.get(s)) for s in sites]
        fitting = (q for q in there if q is not None and q.spec == spec and q not in taken)
        quantizer = next(fitting, None) or Quantizer(spec, device=_device(model))
        taken.add(quantizer)
        for site in sites:
            attach(modules[site.module], site.slot, quantizer)


def _device(model: nn.Module) -> torch.device | None:
    return next((parameter.device for parameter in model.parameters()), None)


def dequantize(model: ModuleT) -> ModuleT:
    """Take all quantizers out of a model again, in place.

    The float model is as it was before ``quantize``: same objects, same classes, weights
    untouched.

    Example:
        >>> dequantize(quantize(nn.Linear(16, 4), "tensorrt_int8"))
        Linear(in_features=16, out_features=4, bias=True)
    """
    _take_sites(model)
    for layer in quantized_layers(model).values():
        detach_quantizers(layer)
    for module in model.modules():
        state.detach_recipe(module)
    return model


def _describe(left: Mapping[str, str]) -> str:
    return "; ".join(f"{name} ({reason})" for name, reason in left.items())


def leave_fast_path(model: nn.Module) -> None:
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
