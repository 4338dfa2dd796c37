"""Models of nvidia-modelopt, there and back."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lq.checkpoint import read_checkpoint
from lq.functional import along_axis, amax_to_scale
from lq.interop.converting import Found, convert
from lq.interop.factors import multiply, norms_before
from lq.interop.foreign import foreign
from lq.layers import QuantLayer
from lq.quantizer import Mode, Quantizer
from lq.sites import QuantSites
from lq.surgery import dequantize, quantized_layers

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_LEFT_BEHIND = (
    *("_parallel_state", "_hparams_for_scoring", "_backward_hook_handle"),
    *("output_diff_dict", "quant_recipe"),
)
_SLOTS = ("input_quantizer", "weight_quantizer", "output_quantizer")


def from_modelopt(model: ModuleT, state: str | Path | Mapping[str, Any] | None = None) -> ModuleT:
    """Bring along a model that nvidia-modelopt quantized: live, or as ``mto.save`` saved it.

    Every layer and pooling that it quantizes to integers of 2 to 8 bits or float8 E4M3 is quantized
    so here, with the same ranges, in place; the rest stays float. Outputs are the same, but for
    rounding ties and weights with the lowest code, -128, which is not used here. What has no
    counterpart is logged, and named by ``lq.interop.not_converted``.

    Args:
        model: The live model; or the float model, for a saved one.
        state: What ``mto.save`` wrote, or the path of it.

    Returns:
        The same `model`, float layers of torch with quantizers of lq.

    Raises:
        ImportError: If nvidia-modelopt is not installed.
        ValueError: If the model is not quantized by it, or multiplies inputs before it quantizes
            them (SmoothQuant, AWQ) where no normalization before them can do so.
    """
    mto = _import()
    if state is not None:
        saved = read_checkpoint(state) if isinstance(state, (str, Path)) else state
        if not {"modelopt_state", "model_state_dict"} <= saved.keys():
            raise ValueError(
                "Expected `state` to be what modelopt.torch.opt.save wrote, but it has the keys "
                f"{', '.join(list(saved)[:5])}."
            )
        model = mto.restore_from_modelopt_state(model, saved["modelopt_state"])
        model.load_state_dict(saved["model_state_dict"])
    found = _read(model)
    norms = _foldable(model)
    _take_out(model)
    multiply(model, norms)
    convert(model, found)
    return model


def _import() -> Any:
    try:
        import modelopt.torch.opt as mto
        import modelopt.torch.quantization  # noqa: F401 - registers what restoring needs
    except ImportError:
        raise ImportError(
            "nvidia-modelopt is not installed; install it: pip install nvidia-modelopt requests "
            "(the extra modelopt)."
        ) from None
    return mto


def _read(model: nn.Module) -> Found:
    """Return what the quantizers of a live model say."""
    from modelopt.torch.quantization.nn import SequentialQuantizer, TensorQuantizer

    found, any_there = Found(), False
    for name, module in model.named_modules():
        if isinstance(module, SequentialQuantizer):
            found.lost[name] = "several quantizers in a row; left float"
        if not isinstance(module, TensorQuantizer):
            continue
        any_there = True
        owner, _, slot = name.rpartition(".")
        if not module.is_enabled or not module._if_quant or owner in found.lost:
            continue
        _add(found, name, owner, slot, module)
    if not any_there:
        raise ValueError(
            f"Expected {type(model).__name__} to be quantized by nvidia-modelopt, but it has no "
            "quantizers of it; call modelopt.torch.quantization.quantize first."
        )
    return found


def _add(found: Found, name: str, owner: str, slot: str, quantizer: Any) -> None:
    if slot not in _SLOTS:
        found.lost[name] = "quantizers of attention, and others by hand, have no counterpart"
        return
    reason = _unlike(quantizer)
    amax = None if reason else quantizer.amax
    made = reason or foreign(
        quantizer.num_bits,
        amax,
        bool(quantizer.unsigned),
        bool(quantizer.narrow_range),
        per_channel=slot == "weight_quantizer" and quantizer.axis is not None,
    )
    if isinstance(made, str):
        found.lost[name] = f"{made}; left float"
        return
    kinds = (found.inputs, found.weights, found.outputs)
    dict(zip(_SLOTS, kinds, strict=True))[slot][owner] = made


def _unlike(quantizer: Any) -> str | None:
    """Return why a quantizer has no counterpart, whatever its format."""
    if quantizer.block_sizes:
        return "it has a range for every block"
    if quantizer._dynamic:
        return "its range is computed anew for every batch"
    if not quantizer.fake_quant:
        return "its weight is compressed already"
    if quantizer.bias is not None:
        return "a bias is taken from what it quantizes"
    if quantizer.rotate_is_enabled:
        return "what it quantizes is rotated first"
    if getattr(quantizer, "backend", None) is not None:
        return f"it computes by a backend of its own, {quantizer.backend!r}"
    return None


def _foldable(model: nn.Module) -> dict[str, Tensor]:
    """Return the normalizations before layers whose input is multiplied first, with the factors."""
    from modelopt.torch.quantization.nn import TensorQuantizer

    factors = {
        name.rpartition(".")[0]: module.pre_quant_scale.detach().clone()
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer) and module.pre_quant_scale is not None
    }
    if not factors:
        return {}
    probe = copy.deepcopy(model)  # the model itself stays as it is where this is refused
    _take_out(probe)
    return norms_before(probe, factors)


def _take_out(model: nn.Module) -> None:
    """Make a live model the float model again, in place."""
    from modelopt.torch.opt.conversion import ModeloptStateManager
    from modelopt.torch.quantization.nn import QuantModule

    for module in list(model.modules()):
        if isinstance(module, QuantModule):
            module.export()
            _tidy(module)
    if ModeloptStateManager.is_converted(model):
        ModeloptStateManager.remove_state(model)


def _tidy(module: nn.Module) -> None:
    """Remove what nvidia-modelopt leaves on a module that it has let go, its searches above all."""
    own = vars(module)
    for name in _LEFT_BEHIND:
        own.pop(name, None)
    forward = getattr(own.get("forward"), "__func__", None)
    if forward is not None and forward.__module__.startswith("modelopt."):
        del own["forward"]


def to_modelopt(model: ModuleT) -> ModuleT:
    """Give a model that lq quantized to nvidia-modelopt: its modules, formats and ranges.

    Ranges that train or follow the data here stay as they are there.

    Args:
        model: A model that ``lq.quantize`` quantized, in place.

    Returns:
        The same `model`, quantized by nvidia-modelopt, which can save, train and export it.

    Raises:
        ImportError: If nvidia-modelopt is not installed.
        ValueError: If the model has quantizers that it has not: on additions (recipe: ``residual:
            null``), learned offsets, or 16-bit formats.
    """
    _import()
    import modelopt.torch.quantization as mtq

    layers = quantized_layers(model)
    if not layers:
        raise ValueError(
            f"Expected {type(model).__name__} to be quantized by lq, but found no quantized layer."
        )
    placed = _placed(model, layers)
    entries: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    entries += [
        {"quantizer_name": name, "cfg": _config(q), "enable": q.mode is not Mode.BYPASS}
        for name, q in placed.items()
    ]
    ranges = {name: _amax(q) for name, q in placed.items() if q.is_calibrated}
    dequantize(model)
    mtq.quantize(model, {"quant_cfg": entries, "algorithm": None})
    for name, amax in ranges.items():
        axis = placed[name].spec.axis
        if axis is not None:
            weight: Any = model.get_submodule(name.rpartition(".")[0]).weight
            amax = along_axis(amax, axis, weight.dim())
        model.get_submodule(name).amax = amax
    return model


def _amax(quantizer: Quantizer) -> Tensor:
    """Return a range that gives the quantizer's own scale back exactly, as ``amax / qmax``."""
    scale, qmax = quantizer.positive_scale, quantizer.spec.qmax
    product = scale * qmax
    infinity = torch.full_like(product, torch.inf)
    amax = product
    for candidate in (product.nextafter(-infinity), product.nextafter(infinity), product):
        amax = torch.where(amax_to_scale(candidate, qmax) == scale, candidate, amax)
    return amax


def _placed(model: nn.Module, layers: Mapping[str, QuantLayer]) -> dict[str, Quantizer]:
    """Return the quantizers by the names that they have in nvidia-modelopt.

    Raises:
        ValueError: Naming the first that it has not.
    """
    placed: dict[str, Quantizer] = {}
    for name, module in model.named_modules():
        slots = list(module.quantizer_slots) if isinstance(module, QuantSites) else []
        if name in layers:
            slots += ["input_quantizer", "weight_quantizer"]
        for slot in slots:
            quantizer = getattr(module, slot)
            full = f"{name}.{slot}".lstrip(".")
            reason = _not_there(slot, quantizer)
            if reason:
                raise ValueError(f"nvidia-modelopt has no counterpart of {full!r}: {reason}.")
            if quantizer.spec.needs_scale:
                placed[full] = quantizer
    return placed


def _not_there(slot: str, quantizer: Quantizer) -> str | None:
    if slot not in _SLOTS[:2]:
        return "it is on an addition; quantize with `residual: null`"
    if quantizer.offset is not None:
        return "it has an offset"
    if quantizer.spec.number_format.dtype is not None and quantizer.spec.format != "fp32":
        return f"it is {quantizer.spec.format}, to which nvidia-modelopt does not round"
    return None


def _config(quantizer: Quantizer) -> dict[str, Any]:
    spec = quantizer.spec
    is_integer = spec.number_format.is_integer
    return {
        "num_bits": spec.number_format.bits if is_integer else (4, 3),
        "axis": spec.axis,
        "unsigned": not spec.signed,
        "narrow_range": spec.narrow and is_integer,
    }
