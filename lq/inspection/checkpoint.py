"""Formats and ranges in a checkpoint, from its tensors alone: no model is built or run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lq.checkpoint import read_checkpoint
from lq.formats import layer_format
from lq.functional import learned_scale
from lq.inspection.result import Inspection, size_of
from lq.spec import FLOAT_LAYER, Recipe
from lq.state import RECIPE, decode_recipe
from lq.tensor_spec import QuantSpec

_SCALE, _OFFSET = ".scale", ".offset"
_QUANTIZER = "_quantizer"
_INPUT, _WEIGHT = ".input_quantizer", ".weight_quantizer"
_FLOATS = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_CONVS: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_TRANSPOSED: dict[int, Any] = {3: nn.ConvTranspose1d, 4: nn.ConvTranspose2d, 5: nn.ConvTranspose3d}


def inspect_checkpoint(path: Path) -> Inspection:
    """Return what a ``.ckpt``, ``.pth``, ``.pt`` or ``.safetensors`` file holds."""
    values = read_checkpoint(path)
    state = values.get("state_dict", values)
    if not _is_state(state):
        raise ValueError(f"Expected {str(path)!r} to hold a state_dict, but found other values.")
    recipes = {k.removesuffix(RECIPE): decode_recipe(state[k]) for k in state if k.endswith(RECIPE)}
    reader = _Reader(state, recipes)
    rows = [*reader.layers(), *reader.others()]
    formats = Counter(row["format"] for row in rows if row["kind"] == "layer")
    facts: dict[str, Any] = {"size": size_of(path)}
    counts = {k: values.get(k) for k in ("epoch", "global_step")}
    facts |= {name: count for name, count in counts.items() if isinstance(count, int)}
    facts |= {
        "parameters": sum(t.numel() for k, t in state.items() if _is_parameter(k, t)),
        "layers": dict(formats.most_common()),
        "quantizers": len(reader.quantizers),
        "recipe": "; ".join(r.to_json() for r in recipes.values()) or None,
    }
    kind = "checkpoint" if "state_dict" in values else "weights"
    return Inspection(str(path), kind, facts, rows, reader.not_calibrated())


def _is_state(values: Any) -> bool:
    return isinstance(values, dict) and all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in values.items()
    )


def _is_parameter(name: str, value: Tensor) -> bool:
    """Return whether a tensor trains: no statistics of BatchNorm, and no range."""
    ranges = (_QUANTIZER + _SCALE, _QUANTIZER + _OFFSET)
    kept = name.endswith(("running_mean", "running_var", *ranges))
    return value.is_floating_point() and not kept


class _Reader:
    def __init__(self, state: Mapping[str, Tensor], recipes: Mapping[str, Recipe]) -> None:
        self.state, self.recipes = state, recipes
        self.quantizers = [
            key.removesuffix(_SCALE) for key in state if key.endswith(_QUANTIZER + _SCALE)
        ]
        self.weights = {
            key.removesuffix(".weight"): weight
            for key, weight in state.items()
            if key.endswith(".weight") and weight.dim() >= 2 and weight.is_floating_point()
        }

    def layers(self) -> list[dict[str, Any]]:
        """Return a row for every weight that is multiplied."""
        return [self._layer(name, weight) for name, weight in self.weights.items()]

    def others(self) -> list[dict[str, Any]]:
        """Return a row for every quantizer that is no layer's, such as those of additions."""
        found = []
        for name in self.quantizers:
            if name.endswith((_INPUT, _WEIGHT)) and name.rpartition(".")[0] in self.weights:
                continue
            recipe, _ = self._recipe(name)
            range = self._range(name, recipe.inputs, recipe)
            found.append(_row(name, "tensor", recipe.inputs.format, input_range=range))
        return found

    def not_calibrated(self) -> list[str]:
        """Return the quantizers whose scale is not known."""
        return [n for n in self.quantizers if not self.state[n + _SCALE].isfinite().all()]

    def _layer(self, name: str, weight: Tensor) -> dict[str, Any]:
        recipe, short = self._recipe(name)
        spec = recipe.layer_spec(short, self._stand_in(name, weight))
        is_quantized = any(name + part + _SCALE in self.state for part in (_INPUT, _WEIGHT))
        if spec.is_float or (spec.weights.needs_scale and not is_quantized):
            spec = FLOAT_LAYER
        format = layer_format(spec.weights.format, spec.inputs.format)
        return _row(
            name,
            "layer",
            _FLOATS.get(weight.dtype, "float") if spec.is_float else format,
            list(weight.shape),
            self._range(name + _INPUT, spec.inputs, recipe),
            self._amax(name + _WEIGHT, spec.weights),
            weight.numel() * weight.element_size() / 1e3,
        )

    def _recipe(self, name: str) -> tuple[Recipe, str]:
        """Return the recipe of the innermost module that has one, and the name in that module."""
        prefix = max((p for p in self.recipes if name.startswith(p)), key=len, default=None)
        if prefix is None:
            return Recipe(), name
        return self.recipes[prefix], name.removeprefix(prefix)

    def _stand_in(self, name: str, weight: Tensor) -> nn.Module:
        """Return a layer of the shape that a weight tells, for the recipe's rules to look at."""
        shape, dims = weight.shape, weight.dim()
        with torch.device("meta"):
            if dims not in _CONVS:
                return nn.Linear(shape[1], shape[0])
            kernel, scale = tuple(shape[2:]), self.state.get(name + _WEIGHT + _SCALE)
            if scale is not None and scale.numel() not in (1, shape[0]):
                made: nn.Module = _TRANSPOSED[dims](shape[0], shape[1], kernel)
                return made
            groups = shape[0] if shape[1] == 1 else 1  # depthwise, where each has one channel
            made = _CONVS[dims](shape[1] * groups, shape[0], kernel, groups=groups)
            return made

    def _amax(self, name: str, spec: QuantSpec) -> list[float] | float | str | None:
        """Return the largest magnitude of a weight: the least and the greatest of its channels."""
        scale = self._scale(name, spec)
        if not isinstance(scale, Tensor):
            return scale
        amax = scale * spec.qmax
        return [float(amax.min()), float(amax.max())] if amax.numel() > 1 else float(amax)

    def _range(self, name: str, spec: QuantSpec, recipe: Recipe) -> list[float] | str | None:
        """Return the smallest and largest value that an input's codes stand for."""
        scale, offset = self._scale(name, spec), self.state.get(name + _OFFSET)
        if not isinstance(scale, Tensor):
            return scale
        if offset is not None:
            return [float(offset.min()), float((offset + scale * spec.qmax).max())]
        if recipe.unsigned and spec.number_format.is_integer:
            return f"{float(scale.max()):.3g} a code"  # whether it has a sign, the model decides
        return [float(scale.max() * spec.qmin), float(scale.max() * spec.qmax)]

    def _scale(self, name: str, spec: QuantSpec) -> Tensor | str | None:
        scale = self.state.get(name + _SCALE)
        if scale is None or not spec.needs_scale:
            return None
        if not bool(scale.isfinite().all()):
            return "not calibrated"
        return learned_scale(scale) if spec.learns_range else scale


def _row(
    name: str,
    kind: str,
    format: str,
    shape: list[int] | None = None,
    input_range: list[float] | str | None = None,
    weight_amax: list[float] | float | str | None = None,
    kilobytes: float | None = None,
) -> dict[str, Any]:
    return {
        "name": name,
        "kind": kind,
        "format": format,
        "shape": shape,
        "input range": input_range,
        "weight amax": weight_amax,
        "kB": kilobytes,
    }
