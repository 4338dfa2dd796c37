"""How a quantized model is saved and restored: its recipe travels in the state_dict."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from lq.layers import is_quantizable
from lq.quantizer import Quantizer
from lq.spec import FLOAT_LAYER, LayerSpec, Recipe

RECIPE = "lq_recipe"
"""Attribute of a quantized model that holds its recipe, and the state_dict key it travels under."""
_LEFT = "_lq_left"
_HOOKS = "_lq_hooks"
_RANGE = ("_quantizer.scale", "_quantizer.offset")


def attach_recipe(model: nn.Module, recipe: Recipe, left: Mapping[str, str]) -> None:
    """Let `model` save its recipe with its weights and check it when loading.

    `left` is what could not be quantized as the recipe says, and why.
    """
    detach_recipe(model)
    setattr(model, RECIPE, recipe)
    setattr(model, _LEFT, dict(left))
    untyped: Any = model
    hooks = [
        untyped.register_state_dict_post_hook(_save_recipe),
        untyped.register_load_state_dict_pre_hook(_check_before_loading),
    ]
    setattr(model, _HOOKS, hooks)


def detach_recipe(model: nn.Module) -> None:
    """Undo ``attach_recipe``, where it was done."""
    if RECIPE in vars(model):
        for hook in getattr(model, _HOOKS):
            hook.remove()
        for name in (RECIPE, _LEFT, _HOOKS):
            delattr(model, name)


def recipe_of(model: nn.Module) -> Recipe | None:
    """Return the recipe a model was quantized with."""
    recipe: Recipe | None = vars(model).get(RECIPE)
    return recipe


def left_of(model: nn.Module) -> dict[str, str]:
    """Return what the recipe's layers were left float, and why."""
    left: dict[str, str] = vars(model).get(_LEFT, {})
    return left


def encode_recipe(recipe: Recipe) -> Tensor:
    """Return a recipe as a uint8 tensor of JSON, the one kind of value every saver keeps."""
    return torch.frombuffer(bytearray(recipe.to_json().encode()), dtype=torch.uint8)


def decode_recipe(stored: Tensor) -> Recipe:
    """Return the recipe in a tensor made by ``encode_recipe``."""
    try:
        values = json.loads(bytes(stored.cpu().tolist()))
        if not isinstance(values, dict):
            raise ValueError(f"it holds {values!r}")
        # What was saved before recipes said so has no quantizers on residual additions.
        return Recipe.from_dict({"residual": None, **values})
    except (TypeError, ValueError) as error:
        raise ValueError(f"The recipe in the state_dict is damaged: {error}.") from None


def _save_recipe(
    model: nn.Module, state_dict: MutableMapping[str, Any], prefix: str, _metadata: Any
) -> None:
    recipe = recipe_of(model)
    if recipe is not None:
        state_dict[prefix + RECIPE] = encode_recipe(recipe)


def _check_before_loading(
    model: nn.Module,
    state_dict: MutableMapping[str, Any],
    prefix: str,
    _metadata: Any,
    _strict: bool,
    _missing: list[str],
    _unexpected: list[str],
    errors: list[str],
) -> None:
    """Accept a float state_dict as uncalibrated, and a quantized one only if it is complete."""
    stored = state_dict.pop(prefix + RECIPE, None)
    scales = {
        f"{prefix}{name}.{part}": tensor
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Quantizer)
        for part, tensor in module.range_tensors().items()
    }
    _name_shared(scales, state_dict)
    given = {key for key in state_dict if key.startswith(prefix) and key.endswith(_RANGE)}
    missing, extra = scales.keys() - given, given - scales.keys()
    if given and (missing or extra):
        errors.append(
            f"The state_dict was quantized by another recipe: {_count(missing, 'missing')}, "
            f"{_count(extra, 'not in the model')}. Quantize the model with the recipe it was "
            "saved with (lq.load_from_checkpoint does), or load float weights."
        )
    elif stored is not None:
        errors.extend(_other_specs(model, decode_recipe(stored)))
    for key in missing:
        state_dict[key] = torch.full_like(scales[key], torch.nan)
    for key in extra:
        del state_dict[key]


def _name_shared(scales: Mapping[str, Tensor], state_dict: MutableMapping[str, Any]) -> None:
    """Give a scale that several quantizers share under each of its names, if it is under one."""
    given = {id(scale): state_dict[key] for key, scale in scales.items() if key in state_dict}
    for key, scale in scales.items():
        if id(scale) in given:
            state_dict.setdefault(key, given[id(scale)])


def _count(keys: Iterable[str], what: str) -> str:
    names = sorted({key.rpartition(".")[0] for key in keys})
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what}" + (f" ({shown})" if names else "")


def _other_specs(model: nn.Module, stored: Recipe) -> list[str]:
    """Return an error where the stored recipe gives a layer another spec than it has."""
    mine = recipe_of(model)
    if mine is not None and mine.unsigned != stored.unsigned:
        return [
            "The state_dict was quantized by another recipe: `unsigned` is "
            f"{stored.unsigned} there, but {mine.unsigned} here."
        ]
    left = left_of(model)
    nested = tuple(f"{n}." for n, m in model.named_modules() if n and recipe_of(m) is not None)
    for name, layer in model.named_modules():
        if not is_quantizable(layer) or name in left or f"{name}.".startswith(nested):
            continue
        spec: LayerSpec = getattr(layer, "layer_spec", FLOAT_LAYER)
        theirs = stored.layer_spec(name, layer)
        if theirs != spec and not (theirs.is_float and spec.is_float):
            return [
                f"The state_dict was quantized by another recipe: layer {name!r} has weights in "
                f"{theirs.weights.format} and inputs in {theirs.inputs.format} there, but "
                f"{spec.weights.format} and {spec.inputs.format} here."
            ]
    return []
