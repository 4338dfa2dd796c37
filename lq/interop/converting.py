"""Give a float model the quantizers that another toolkit had on it."""

from __future__ import annotations

import glob
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lq.dataflow import Dataflow
from lq.functional import amax_along_axis, encode
from lq.interop.foreign import Foreign
from lq.placement import nameable, place
from lq.quantizer import Quantizer
from lq.sites import OUTPUT, Site
from lq.spec import FLOAT_LAYER, LayerSpec, Recipe, Rule
from lq.surgery import left_float, quantizable_layers, quantize, quantizers
from lq.tensor_spec import QuantSpec

log = logging.getLogger(__name__)
_LOST = "_lq_not_converted"


@dataclass
class Found:
    """What another toolkit quantizes in a model.

    Attributes:
        inputs: Module -> quantizer of its input; of layers and pooling.
        weights: Layer -> quantizer of its weight.
        outputs: Module -> quantizer of what it returns.
        additions: Quantizer called by a forward itself -> the module whose forward that is, and
            the quantizer.
        lost: What has no counterpart: name -> reason.
    """

    inputs: dict[str, Foreign] = field(default_factory=dict)
    weights: dict[str, Foreign] = field(default_factory=dict)
    outputs: dict[str, Foreign] = field(default_factory=dict)
    additions: dict[str, tuple[str, Foreign]] = field(default_factory=dict)
    lost: dict[str, str] = field(default_factory=dict)


def not_converted(model: nn.Module) -> dict[str, str]:
    """Return what a conversion could not bring along, by name, and what became of it."""
    lost: dict[str, str] = vars(model).get(_LOST, {})
    return lost


def convert(model: nn.Module, found: Found) -> None:
    """Quantize a float model as another toolkit had it, in place, and give it the ranges."""
    converter = _Converter(model, found)
    quantize(model, converter.recipe())
    converter.set_ranges()
    for name, quantizer in quantizers(model).items():
        if not quantizer.is_calibrated:
            found.lost.setdefault(name, "it has no range; calibrate the model")
    setattr(model, _LOST, found.lost)
    if found.lost:
        told = "; ".join(f"{name} ({reason})" for name, reason in found.lost.items())
        log.warning("Not brought along as it was: %s.", told)


class _Converter:
    def __init__(self, model: nn.Module, found: Found) -> None:
        self.model, self.found = model, found
        self.layers = quantizable_layers(model)[0]
        self.dataflow = Dataflow(model)
        self.modules = dict(model.named_modules())
        self.sites: dict[str, Site] = {}

    def recipe(self) -> Recipe:
        """Return the recipe that puts quantizers where the other toolkit had them."""
        specs = {name: self._layer_spec(name) for name in self.layers}
        for name in [*self.found.inputs, *self.found.weights]:
            if name not in self.modules:
                self.found.lost.setdefault(name, "the model has no such module")
        for name in self.found.outputs:
            self.found.lost[f"{name}.{OUTPUT}"] = "what layers return is quantized by its readers"
        quantized = [spec for spec in specs.values() if not spec.is_float]
        common = Counter(quantized).most_common(1)[0][0] if quantized else FLOAT_LAYER
        rules = [self._rule(name, spec) for name, spec in specs.items() if spec != common]
        rules += list(self._pools())
        recipe = Recipe(common.weights, common.inputs, tuple(rules), residual=None)
        return self._with_additions(recipe, specs)

    @staticmethod
    def _rule(name: str, spec: LayerSpec) -> Rule:
        name = glob.escape(name)
        if spec.is_float:
            return Rule(name=name, format="skip")
        return Rule(name=name, weights=spec.weights, inputs=spec.inputs)

    def _layer_spec(self, name: str) -> LayerSpec:
        inputs, weights = self.found.inputs.get(name), self.found.weights.get(name)
        if inputs is None and weights is None:
            return FLOAT_LAYER
        input_spec = QuantSpec("fp32") if inputs is None else inputs.spec
        if weights is None:
            self.found.lost[f"{name}.input_quantizer"] = (
                "its weight is float, and a layer computes in one format; the layer is left float"
            )
            self.found.inputs.pop(name)
            return FLOAT_LAYER
        weight_spec = weights.spec
        return LayerSpec(weight_spec, input_spec)

    def _pools(self) -> Iterable[Rule]:
        for name, quantizer in list(self.found.inputs.items()):
            module = self.modules.get(name)
            if name in self.layers or module is None:
                continue
            kind = type(module).__name__
            rule = Rule(name=glob.escape(name), type=kind, inputs=quantizer.spec)
            placed = place(self.dataflow, Recipe(rules=(rule,), residual=None), {}).specs
            if Site(name, "input_quantizer") in placed:
                yield rule
            else:
                self.found.lost[f"{name}.input_quantizer"] = f"inputs of {kind} are not quantized"
                del self.found.inputs[name]

    def _with_additions(self, recipe: Recipe, specs: Mapping[str, LayerSpec]) -> Recipe:
        """Return the recipe with the additions that the other toolkit quantizes, and no others."""
        owners: dict[str, list[str]] = {}
        for name, (owner, _) in self.found.additions.items():
            owners.setdefault(owner, []).append(name)
        if not owners:
            return recipe
        residual = "both" if any(len(names) > 1 for names in owners.values()) else "shortcut"
        rules = []
        for owner, names in owners.items():
            spec = self.found.additions[names[0]][1].spec
            rule = Rule(name=glob.escape(owner), weights=QuantSpec(axis=0), inputs=spec)
            alone = Recipe(rules=(Rule(name="*", format="skip"), rule), residual=residual)
            placed = place(self.dataflow, alone, specs).specs
            sites = [site for site in placed if site.module not in self.layers]
            sites += [s for s in placed if s.module in self.layers and s.slot == OUTPUT]
            same = len({self.found.additions[n][1] for n in names}) == 1
            if not sites or (len(sites) != len(names)) or (len(names) > 1 and not same):
                reason = f"{len(names)} quantizers cannot be told apart on {len(sites)} additions"
                self.found.lost |= dict.fromkeys(names, reason)
                continue
            self.sites |= dict(zip(names, sites, strict=True))
            rules.append(Rule(name=glob.escape(owner), inputs=spec))
        if not rules:
            return recipe
        return Recipe(
            recipe.weights, recipe.inputs, (*self._others(owners), *recipe.rules, *rules),
            residual=residual,
        )  # fmt: skip

    def _others(self, owners: Mapping[str, list[str]]) -> Iterable[Rule]:
        """Return rules that leave the additions of other modules float."""
        forwards = self.dataflow.flows.keys() | self.dataflow.untraced.keys()
        for name in nameable(self.dataflow):
            if name in forwards and name not in owners:
                yield Rule(name=glob.escape(name), format="skip")

    def set_ranges(self) -> None:
        """Give every quantizer its range; where places share one, the largest."""
        wanted: dict[Quantizer, dict[str, Foreign]] = {}
        modules = dict(self.model.named_modules())
        pairs = [(f"{n}.input_quantizer", q) for n, q in self.found.inputs.items()]
        pairs += [(f"{n}.weight_quantizer", q) for n, q in self.found.weights.items()]
        for name, (_, quantizer) in self.found.additions.items():
            if name in self.sites:
                site = self.sites[name]
                pairs.append((f"{site.module}.{site.slot}".lstrip("."), quantizer))
        by_alias = dict(self.model.named_modules(remove_duplicate=False))
        for name, quantizer in pairs:
            mine = by_alias.get(name.lstrip("."))
            if isinstance(mine, Quantizer):
                wanted.setdefault(mine, {})[name] = quantizer
            elif name not in self.found.lost:
                reason = left_float(self.model).get(name.rpartition(".")[0], "it has no place here")
                self.found.lost[name] = f"left float: {reason}"
        for mine, sources in wanted.items():
            self._set(mine, sources, modules)

    def _set(
        self, mine: Quantizer, sources: Mapping[str, Foreign], modules: Mapping[str, nn.Module]
    ) -> None:
        known = {name: q.amax for name, q in sources.items() if q.amax is not None}
        if mine.name.endswith("weight_quantizer"):
            layer = modules[mine.name.rpartition(".")[0]]
            self._set_weight(mine, layer, next(iter(known.values()), None))
            return
        if not known:
            return
        amax = torch.stack([value.max() for value in known.values()]).max()
        if any(value.max() != amax for value in known.values()):
            told = ", ".join(f"{name}: {value.max():.4g}" for name, value in known.items())
            self.found.lost[mine.name] = f"several places share one range, the largest of {told}"
        elif any(value.numel() > 1 for value in known.values()):
            self.found.lost[mine.name] = "its range was per channel; inputs have one, the largest"
        mine.amax = amax

    def _set_weight(self, mine: Quantizer, layer: Any, amax: Tensor | None) -> None:
        weight: Tensor = layer.weight.detach()
        axis = mine.spec.axis
        fitted = None if amax is None else fit_amax(amax, weight, axis)
        if fitted is None:
            fitted = amax_along_axis(weight, axis)
            self.found.lost[mine.name] = (
                "its range was computed anew for every batch; it is that of the weight now"
                if amax is None
                else f"its ranges of shape {list(amax.shape)} are not those of output channels; "
                "they are those of the weight now"
            )
        mine.amax = fitted.float()
        self._check_lowest_code(mine, weight)

    def _check_lowest_code(self, mine: Quantizer, weight: Tensor) -> None:
        """Tell of weights with the code -128, which the narrow range of weights has not."""
        spec, low = mine.spec, mine.spec.qmin - 1
        if not spec.number_format.is_integer:
            return
        codes = encode(weight.float(), mine.positive_scale, low, spec.qmax, spec.axis)
        clipped = int((codes == low).sum())
        if clipped:
            self.found.lost[mine.name] = f"{clipped} weights had the lowest code, now the next"


def fit_amax(amax: Tensor, weight: Tensor, axis: int | None) -> Tensor | None:
    """Return a range in the shape that a quantizer of a weight has it, ``None`` if it is another.

    Args:
        amax: ``[]``, ``[1]``, or with one axis longer than 1, as in ``[C, 1, 1, 1]``.
        weight: The weight.
        axis: Its axis of output channels; ``None`` per tensor.
    """
    if axis is None:
        return amax.reshape(()) if amax.numel() == 1 else None
    channels = weight.shape[axis]
    if amax.numel() == 1:
        return amax.reshape(1).expand(channels).clone()
    if amax.dim() == 1:
        return amax if len(amax) == channels else None
    fits = amax.dim() == weight.dim() and amax.shape[axis] == channels == amax.numel()
    return amax.reshape(channels) if fits else None
