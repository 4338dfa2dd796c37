"""Models and checkpoints of pytorch-quantization, which need not be installed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lq.checkpoint import read_weights, weights_below
from lq.interop.converting import Found, convert
from lq.interop.foreign import foreign
from lq.messages import check_keys
from lq.surgery import quantizable_layers

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_STATE = re.compile(r"^(?P<name>.*?)\.?(?P<part>_amax|clip\.clip_value_(?:min|max))$")
_DESCRIPTOR = ("num_bits", "unsigned", "narrow_range", "disabled")
_INPUT, _WEIGHT = "_input_quantizer", "_weight_quantizer"
_LAYERS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d")
_POOLS = tuple(f"{kind}Pool{n}d" for kind in ("Max", "Avg", "AdaptiveAvg") for n in (1, 2, 3))
FLOAT_CLASSES = {f"Quant{name}": getattr(nn, name) for name in (*_LAYERS, *_POOLS, "Linear")}
"""Class name there -> the float class that it stands for."""


def from_pytorch_quantization(
    model: ModuleT,
    state: Mapping[str, Tensor] | str | Path | None = None,
    descriptors: Mapping[str, Mapping[str, Any]] | None = None,
) -> ModuleT:
    """Bring along a model of pytorch-quantization: from its checkpoint, or as it lives.

    A checkpoint is loaded into your float model, and the package need not be installed. It holds
    weights and ranges, but neither ``num_bits`` nor ``unsigned`` nor ``narrow_range``: they are the
    package's defaults (8, signed, all 256 codes) unless `descriptors` says otherwise. A layer
    without ranges is float. A live model (`state` not given) says all of that itself; its layers
    become the float classes they stand for, and quantizers that a forward calls become
    ``nn.Identity``, while the addition behind them is quantized.

    Integers are the same, but for rounding ties and weights with the lowest code, -128, which is
    not used here. What has no counterpart is logged, and named by ``lq.interop.not_converted``.

    Args:
        model: The float model, or the live model.
        state: state_dict, or the path of one or of a Lightning checkpoint.
        descriptors: Glob on a quantizer's name -> ``num_bits``, ``unsigned``, ``narrow_range`` or
            ``disabled``, such as ``{"fc._*_quantizer": {"disabled": True}}``.

    Returns:
        The same `model`, quantized.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the weights do not fit the model, or nothing in it is quantized.

    Example:
        >>> state = {"weight": torch.eye(2), "bias": torch.zeros(2),
        ...          "_input_quantizer._amax": torch.tensor(12.7),
        ...          "_weight_quantizer._amax": torch.ones(2, 1)}
        >>> model = from_pytorch_quantization(nn.Linear(2, 2), state)
        >>> model(torch.tensor([[0.26, 99.0]]))
        tensor([[ 0.3000, 12.7000]], grad_fn=<AddmmBackward0>)
    """
    if state is None:
        found = _take(model)
        if not (found.inputs or found.weights):
            raise ValueError(
                f"Expected {type(model).__name__} to have quantizers of pytorch-quantization, but "
                "found none; pass a `state` with a float model."
            )
    else:
        state = read_weights(state) if isinstance(state, (str, Path)) else state
        found = _load(model, state, descriptors or {})
    convert(model, found)
    return model


def _load(
    model: nn.Module, state: Mapping[str, Tensor], descriptors: Mapping[str, Mapping[str, Any]]
) -> Found:
    """Load the weights of a checkpoint, and return what it says of quantizers."""
    ranges: dict[str, dict[str, Tensor]] = {}
    weights: dict[str, Tensor] = {}
    for key, value in state.items():
        match = _STATE.match(key)
        if match is None:
            weights[key] = value
        else:
            ranges.setdefault(match["name"], {})[match["part"]] = value
    if not ranges:
        raise ValueError(
            "Expected the state_dict of a model of pytorch-quantization, but it has no key that "
            "ends in '_amax'."
        )
    prefix = _prefix(model, weights)
    named = {name.removeprefix(prefix): parts for name, parts in ranges.items()}
    found = _described(model, named, descriptors)
    others = [key for key in weights if not key.startswith(prefix)]
    found.lost |= dict.fromkeys(others, f"it is no weight of {type(model).__name__}")
    _load_weights(model, weights_below(weights, prefix[:-1]) if prefix else weights)
    return found


def _prefix(model: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """Return what wrappers put before the names of a model's weights."""
    own = model.state_dict().keys()
    first = next(iter(own), "")
    prefixes = [k.removesuffix(first) for k in weights if k == first or k.endswith(f".{first}")]
    found = (p for p in sorted(prefixes, key=len) if own <= {k.removeprefix(p) for k in weights})
    return next(found, "")


def _load_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        misfit = (str(error).strip().splitlines()[1:] or [str(error)])[0]
        raise ValueError(
            f"Expected the weights to fit {type(model).__name__}, but: {misfit.strip()[:300]}"
        ) from None


def _described(
    model: nn.Module,
    ranges: Mapping[str, Mapping[str, Tensor]],
    descriptors: Mapping[str, Mapping[str, Any]],
) -> Found:
    found, used = Found(), set()
    for name, parts in ranges.items():
        settings: dict[str, Any] = {}
        for pattern, values in descriptors.items():
            check_keys(values, _DESCRIPTOR, f"descriptors[{pattern!r}]")
            if fnmatchcase(name, pattern):
                settings |= values
                used.add(pattern)
        if settings.get("disabled"):
            continue
        learns = "clip.clip_value_max" in parts
        amax = parts.get("_amax")
        if learns:
            ends = parts.get("clip.clip_value_min"), parts["clip.clip_value_max"]
            amax = _learned(found, name, *ends)
        _add(found, name, amax, settings, learns)
    unused = sorted(descriptors.keys() - used)
    if unused:
        raise ValueError(
            f"Expected every pattern of `descriptors` to match a quantizer with a range, but "
            f"{unused[0]!r} matches none."
        )
    for name in quantizable_layers(model)[0]:
        if name not in found.weights and name not in found.inputs:
            disabled = any(n.startswith(f"{name}._") for n in ranges)
            if not disabled:
                found.lost.setdefault(name, "no range in the checkpoint; left float")
    return found


def _learned(found: Found, name: str, low: Tensor | None, high: Tensor) -> Tensor:
    """Return the range between ends that were learned each by itself."""
    high = high.detach()
    if low is None:
        found.lost[name] = "its lower end is not in the checkpoint; the range has the upper one"
        return high
    low = low.detach()
    if bool((-low != high).any()):
        ends = f"{float(low.min()):.4g} and {float(high.max()):.4g}"
        found.lost[name] = f"its ends {ends} were learned apart; the range has the larger for both"
    return torch.maximum(-low, high)


def _add(
    found: Found, name: str, amax: Tensor | None, settings: Mapping[str, Any], learns: bool
) -> None:
    """Note a quantizer under what it quantizes."""
    owner, _, slot = name.rpartition(".")
    per_channel = slot == _WEIGHT and amax is not None and amax.numel() > 1
    quantizer = foreign(
        settings.get("num_bits", 8),
        amax,
        settings.get("unsigned", False),
        settings.get("narrow_range", False),
        learns,
        per_channel,
    )
    if isinstance(quantizer, str):
        found.lost[name] = f"{quantizer}; left float"
    elif slot == _INPUT:
        found.inputs[owner] = quantizer
    elif slot == _WEIGHT:
        found.weights[owner] = quantizer
    elif "_quantizers." in name:
        found.lost[name] = "recurrent layers are left float"
    else:
        found.additions[name] = (owner, quantizer)


def _take(model: nn.Module) -> Found:
    """Take the quantizers out of a live model, and return what they say."""
    found = Found()
    modules: dict[str, Any] = dict(model.named_modules())
    by_hand = []
    for name, module in modules.items():
        if not _is_quantizer(module):
            continue
        _take_quantizer(found, name, module)
        if name.rpartition(".")[2] not in (_INPUT, _WEIGHT) and "_quantizers." not in name:
            by_hand.append(name)
    for name, module in modules.items():
        if hasattr(module, _INPUT):
            _make_float(found, name, module)
    for name in by_hand:
        owner, _, child = name.rpartition(".")
        setattr(modules[owner], child, nn.Identity())
    return found


def _make_float(found: Found, name: str, module: Any) -> None:
    """Turn a layer or pooling into the float class it stands for, in place."""
    kind = type(module).__name__
    if kind not in FLOAT_CLASSES:
        for part, there in ((_INPUT, found.inputs), (_WEIGHT, found.weights)):
            if there.pop(name, None) is not None:
                found.lost[f"{name}.{part}"] = f"{kind} is a class of its own; it stays as it is"
        return
    if getattr(module, "padding_mode", "zeros") != "zeros":
        found.lost[name] = f"it pads otherwise than torch where padding is {module.padding_mode}"
    for part in (_INPUT, _WEIGHT):
        if part in module._modules:
            delattr(module, part)
    module.__class__ = FLOAT_CLASSES[kind]


def _take_quantizer(found: Found, name: str, quantizer: Any) -> None:
    slot = name.rpartition(".")[2]
    if quantizer._disabled or not quantizer._if_quant:
        return
    learns = bool(quantizer._learn_amax)
    amax = getattr(quantizer, "_amax", None)
    if learns:
        clip = quantizer.clip
        amax = _learned(found, name, clip.clip_value_min, clip.clip_value_max)
    elif amax is not None and quantizer._scale_amax is not None:
        amax = amax * quantizer._scale_amax
    if amax is None and slot == _INPUT:
        found.lost[name] = "its range was computed anew for every batch; calibrate the model"
    settings = {
        "num_bits": quantizer._num_bits,
        "unsigned": quantizer._unsigned,
        "narrow_range": quantizer._narrow_range,
    }
    _add(found, name, amax, settings, learns)
    if amax is None and slot == _WEIGHT and quantizer._axis is not None:
        owner = name.rpartition(".")[0]
        remade = foreign(settings["num_bits"], None, per_channel=True)
        if owner in found.weights and not isinstance(remade, str):
            found.weights[owner] = remade


def _is_quantizer(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "TensorQuantizer" and not kind.__module__.startswith("modelopt")
