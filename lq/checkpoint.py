"""Read checkpoints without executing anything in them, and rebuild modules from them."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lq.state import RECIPE, decode_recipe
from lq.surgery import quantize

_PICKLED = ("Unsupported global", "Unsupported class", "GLOBAL")
"""What torch's reader says of a file that would have to be unpickled."""


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what a ``.ckpt``, ``.pth``, ``.pt`` or ``.safetensors`` file holds.

    Nothing in the file is executed: only tensors and plain values are read.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged or needs unpickling.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a checkpoint at {str(path)!r}, but there is no file.")
    try:
        if path.suffix == ".safetensors":
            values = load_file(path)
        else:
            values = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # readers fail in a dozen ways on bytes that are no checkpoint
        if any(word in str(error) for word in _PICKLED):
            raise ValueError(
                f"Expected {str(path)!r} to hold tensors and plain values only, but it holds "
                "pickled objects; save model.state_dict() instead of the model."
            ) from None
        raise ValueError(_damaged(path, error)) from None
    if not isinstance(values, dict):
        raise ValueError(
            f"Expected {str(path)!r} to hold a dict of tensors, but got {type(values).__name__}."
        )
    return values


def _damaged(path: Path, error: Exception) -> str:
    if isinstance(error, (pickle.UnpicklingError, EOFError)):
        reason = "nothing that torch.save wrote"  # torch itself advises to unpickle it after all
    else:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return f"Expected {str(path)!r} to be a checkpoint, but it cannot be read: {reason}"


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state_dict in a weights file or a Lightning checkpoint."""
    values = read_checkpoint(path)
    weights = values.get("state_dict", values)
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ValueError(f"Expected {str(path)!r} to hold a state_dict, but found other values.")
    return weights


def weights_below(weights: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """Return the weights of a submodule, by their names in it.

    Example:
        >>> weights_below({"model.bias": torch.zeros(1), "steps": torch.ones(1)}, "model")
        {'bias': tensor([0.])}
    """
    prefix = f"{name}."
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def load_from_checkpoint(cls: type[Any], path: str | Path, **init_kwargs: Any) -> Any:
    """Rebuild a Lightning module that a callback quantized, from its checkpoint.

    Builds the class, quantizes what was quantized with the recipe that the checkpoint carries,
    and loads the weights and ranges.

    Args:
        cls: The class that was trained.
        path: The checkpoint.
        init_kwargs: Arguments of the class that its saved hyperparameters do not hold.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint of a quantized module.
    """
    checkpoint = read_checkpoint(path)
    weights = checkpoint.get("state_dict")
    if not isinstance(weights, dict):
        raise ValueError(f"Expected {str(path)!r} to be a Lightning checkpoint (no `state_dict`).")
    model = cls(**_init_arguments(cls, checkpoint.get("hyper_parameters", {})) | init_kwargs)
    if hasattr(model, "configure_model"):
        model.configure_model()
    recipes = {k.removesuffix(RECIPE): v for k, v in weights.items() if k.endswith(RECIPE)}
    if not recipes:
        raise ValueError(
            f"Expected {str(path)!r} to be the checkpoint of a quantized module, but it holds no "
            f"recipe; load it with {cls.__name__}.load_from_checkpoint."
        )
    for prefix in sorted(recipes, key=len):  # a part quantized by itself after the whole it is in
        quantize(model.get_submodule(prefix.removesuffix(".")), decode_recipe(recipes[prefix]))
    if hasattr(model, "on_load_checkpoint"):
        model.on_load_checkpoint(checkpoint)
    model.load_state_dict(weights)
    return model


def _init_arguments(cls: type[Any], saved: dict[str, Any]) -> dict[str, Any]:
    """Return the saved hyperparameters that a class takes."""
    parameters = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return dict(saved)
    return {name: value for name, value in saved.items() if name in parameters}
