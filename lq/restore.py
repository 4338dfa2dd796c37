"""Networks out of checkpoints, in processes without Lightning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from lq.checkpoint import read_checkpoint, weights_below
from lq.models import create_model
from lq.state import RECIPE, decode_recipe
from lq.surgery import quantize

_MODEL = "model"
"""Name of the network in a QuantModule."""


def load_model(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Rebuild the network of a QuantModule from its checkpoint alone; Lightning is not needed.

    ``lq.load_from_checkpoint`` does so for somebody else's class, also one of plain torch that has
    the same parts by the same names as the LightningModule that was trained.

    Args:
        path: The checkpoint.
        model: The float network, where the QuantModule was made with an object and not with the
            dotted name of a factory.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is no checkpoint of a QuantModule, or does not say how its network
            is made.

    Example:
        >>> import tempfile, torch
        >>> network = quantize(create_model("lq.models.digits_cnn"), "tensorrt_int8")
        >>> weights = {f"model.{name}": value for name, value in network.state_dict().items()}
        >>> made_of = {"model": "lq.models.digits_cnn"}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = f"{folder}/last.ckpt"
        ...     torch.save({"state_dict": weights, "hyper_parameters": made_of}, path)
        ...     load_model(path)[9]
        QuantLinear(
          in_features=64, out_features=10, bias=True
          (input_quantizer): Quantizer(int8, uncalibrated)
          (weight_quantizer): Quantizer(int8, axis=0, uncalibrated)
        )
    """
    checkpoint = read_checkpoint(path)
    weights = weights_below(checkpoint.get("state_dict", {}), _MODEL)
    if not weights:
        raise ValueError(
            f"Expected {str(path)!r} to be the checkpoint of a QuantModule, but it has no weights "
            f"of a {_MODEL!r}; use lq.load_from_checkpoint with the class it is of."
        )
    if model is None:
        model = _made(path, checkpoint.get("hyper_parameters", {}))
    if RECIPE in weights:
        quantize(model, decode_recipe(weights[RECIPE]))
    model.load_state_dict(weights)
    return model


def _made(path: str | Path, made_of: dict[str, Any]) -> nn.Module:
    """Return the float network that saved hyperparameters describe."""
    if not isinstance(made_of.get("model"), str):
        raise ValueError(
            f"Expected {str(path)!r} to name the factory of its network, but it names none; "
            "pass the float network as `model`."
        )
    return create_model(made_of["model"], **(made_of.get("model_args") or {}))
