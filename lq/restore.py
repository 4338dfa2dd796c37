"""Networks out of checkpoints, in processes without Lightning."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from lq.checkpoint import read_checkpoint, read_weights
from lq.models import create_model
from lq.state import RECIPE, decode_recipe
from lq.surgery import quantize

_PREFIX = "model."


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
    """
    weights = read_weights(path)
    made_of = read_checkpoint(path).get("hyper_parameters", {})
    if model is None:
        if not isinstance(made_of.get("model"), str):
            raise ValueError(
                f"Expected {str(path)!r} to name the factory of its network, but it names none; "
                "pass the float network as `model`, or use lq.load_from_checkpoint with a class."
            )
        model = create_model(made_of["model"], **(made_of.get("model_args") or {}))
    stored = weights.get(_PREFIX + RECIPE)
    if stored is not None:
        quantize(model, decode_recipe(stored))
    model.load_state_dict(
        {k.removeprefix(_PREFIX): v for k, v in weights.items() if k.startswith(_PREFIX)}
    )
    return model
