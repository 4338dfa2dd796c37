"""Puts any layers of a float model into any format and back, quickly and with known ranges."""

from __future__ import annotations

import copy
import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from lq.calibration import find_ranges
from lq.collector import weight_candidates
from lq.dataflow import Dataflow
from lq.digest import DataDigest
from lq.formats import FORMATS, layer_formats
from lq.gemm import weight_of
from lq.layers import QuantLayer, attach_quantizers, detach_quantizers
from lq.placement import INPUT, place
from lq.quantizer import Mode, Quantizer
from lq.ranges import Range, Ranges
from lq.sensitivity.recorded import forget, record
from lq.sensitivity.replay import copied
from lq.sites import QuantSites, Site, attach, detach
from lq.spec import FLOAT_LAYER, SKIP, LayerSpec, Recipe
from lq.surgery import dequantize, leave_fast_path, quantizable_layers, quantize, quantized_layers

WEIGHT = "weight_quantizer"
State = Mapping[str, Mapping[str, Quantizer]]
"""Module -> slot -> quantizer; modules that are not in it are float."""
FLOAT: State = {}


def in_format(recipe: Recipe, format: str) -> Recipe:
    """Return a recipe with all that it quantizes in one format, and what it skips skipped.

    Weights alone are in a format that only weights have (``int4``, ``int8/fp32``), or where the
    recipe leaves inputs float.

    Example:
        >>> in_format(Recipe(), "int4").inputs.format, in_format(Recipe(), "fp16").inputs.format
        ('fp32', 'fp16')
    """
    weights, inputs = layer_formats(format)
    if recipe.inputs.format == "fp32" and FORMATS[weights].needs_scale:
        inputs = "fp32"
    return dataclasses.replace(
        recipe,
        weights=dataclasses.replace(recipe.weights, format=weights),
        inputs=dataclasses.replace(recipe.inputs, format=inputs),
        rules=tuple(rule for rule in recipe.rules if rule.format == SKIP),
        fallback=None,
    )


class States:
    """The states a float model can be put into, and the one it is in.

    Quantizers are made and calibrated once for each format, with the whole model in it; ranges
    come from the float model's tensors, so they are those of every state.

    Args:
        model: A float model.
        recipe: What is quantized besides layers, and how.
        formats: Number formats.
        calibration: Batches to find ranges from.
        calibrator: How.
        progress: Show a progress bar.

    Attributes:
        layers: The layers that are swept, by name.
        left: The layers that cannot be quantized, and why.
        now: The state the model is in.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        formats: Sequence[str],
        calibration: Iterable[Any],
        calibrator: str = "max",
        progress: bool = True,
    ) -> None:
        self.model = model
        self.dataflow = Dataflow(model)
        found, self.left = quantizable_layers(model)
        self.all_layers = found
        self.recipe = recipe = recipe.of_layers(list(found)) if found else recipe
        self.recipes = {format: in_format(recipe, format) for format in formats}
        self.layers = _swept(found, next(iter(self.recipes.values())))
        self.now: State = FLOAT
        self.modules = self.dataflow.modules
        self._transformers = any(isinstance(m, nn.TransformerEncoderLayer) for m in model.modules())
        self._quantizers = {
            format: self._calibrated(format, calibration, calibrator, progress)
            for format in formats
        }
        self._always = {
            f: place(self.dataflow, r, self._specs(f, ())).specs for f, r in self.recipes.items()
        }

    def _calibrated(
        self, format: str, calibration: Iterable[Any], calibrator: str, progress: bool
    ) -> dict[Site, Quantizer]:
        """Return the quantizers of the whole model in one format, taken out again."""
        model = quantize(self.model, self.recipes[format])
        try:
            found = _all_quantizers(model)
            if any(q.spec.needs_scale for site, q in found.items() if site.slot != WEIGHT):
                # A model may change its inputs in place.
                given = (copied(batch) for batch in calibration)
                find_ranges(model, given, calibrator, progress)
            elif any(q.spec.needs_scale for q in found.values()):
                candidates = weight_candidates(model, [calibrator])
                Ranges(
                    {n: Range([*c.values()][-1], calibrator) for n, c in candidates.items()}
                ).apply(model)
        finally:
            dequantize(model)
        return found

    def quantizers(self, format: str) -> Mapping[Site, Quantizer]:
        """Return all quantizers that a format has."""
        return self._quantizers[format]

    def digest(self, format: str) -> str:
        """Return the hash of a format's ranges."""
        digest = DataDigest()
        for site, q in sorted(self._quantizers[format].items(), key=lambda item: str(item[0])):
            digest.add([str(site), repr(q.spec), q.scale], {})
        return digest.own

    def _specs(self, format: str, layers: Iterable[str]) -> dict[str, LayerSpec]:
        recipe, chosen = self.recipes[format], set(layers)
        return {
            name: recipe.layer_spec(name, layer) if name in chosen else FLOAT_LAYER
            for name, layer in self.all_layers.items()
        }

    def state(
        self, format: str, layers: Iterable[str], part: str = "both", alone: bool = True
    ) -> State:
        """Return the state in which some layers are in a format and all else is float.

        With them are the residual additions, pooling and the like that the recipe quantizes where
        these layers are.

        Args:
            format: One of the formats.
            layers: Names of layers.
            part: ``both``, ``weights`` or ``inputs``.
            alone: Leave out the additions that the recipe quantizes whatever the layers are.
        """
        layers, found = list(layers), self._quantizers[format]
        state: dict[str, dict[str, Quantizer]] = defaultdict(dict)
        for name in layers:
            weight, input = found[Site(name, WEIGHT)], found[Site(name, INPUT)]
            state[name][WEIGHT] = _bypassed(weight) if part == "inputs" else weight
            state[name][INPUT] = _bypassed(input) if part == "weights" else input
        if part != "weights":
            specs = self._specs(format, layers)
            for site in place(self.dataflow, self.recipes[format], specs).specs:
                if not alone or site not in self._always[format]:
                    state[site.module][site.slot] = found[site]
        return state

    def groups(self, format: str, layers: Iterable[str]) -> list[list[Site]]:
        """Return the places that see one tensor, with some layers in a format."""
        return place(self.dataflow, self.recipes[format], self._specs(format, layers)).groups

    def go(self, target: State) -> None:
        """Put the model into a state."""
        names = self.changed(target)
        for name in names:
            self.now = {**self.now, name: target.get(name, {})}  # also where it is interrupted
            self._set(name, self.modules[name], target.get(name, {}))
        self.now = target
        if names and self._transformers:
            leave_fast_path(self.model)

    def changed(self, target: State) -> list[str]:
        """Return the modules that differ between the state now and another."""
        return [n for n in {**self.now, **target} if self.now.get(n, {}) != target.get(n, {})]

    def _set(self, name: str, module: nn.Module, slots: Mapping[str, Quantizer]) -> None:
        tape = forget(module)
        detach(module)
        if isinstance(module, QuantLayer):
            detach_quantizers(module)
        if WEIGHT in slots:
            attach_quantizers(module, LayerSpec(slots[WEIGHT].spec, slots[INPUT].spec), "")
            module.weight_quantizer = slots[WEIGHT]
        for slot, quantizer in slots.items():
            if slot != WEIGHT:
                attach(module, slot, quantizer)
        if tape is not None:
            record(module, tape)


def _swept(layers: Mapping[str, nn.Module], recipe: Recipe) -> dict[str, nn.Module]:
    """Return the layers that a recipe does not skip, nor another layer with the same weight."""
    skipped = {id(weight_of(m)) for n, m in layers.items() if recipe.layer_spec(n, m).is_float}
    return {name: layer for name, layer in layers.items() if id(weight_of(layer)) not in skipped}


def _all_quantizers(model: nn.Module) -> dict[Site, Quantizer]:
    found = {
        Site(name, slot): getattr(module, slot)
        for name, module in model.named_modules()
        if isinstance(module, QuantSites)
        for slot in module.quantizer_slots
    }
    for name, layer in quantized_layers(model).items():
        found |= {Site(name, slot): getattr(layer, slot) for slot in (INPUT, WEIGHT)}
    return found


def _bypassed(quantizer: Quantizer) -> Quantizer:
    quantizer = copy.copy(quantizer)
    quantizer.mode = Mode.BYPASS
    return quantizer
