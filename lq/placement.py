"""Where a recipe puts the quantizers of inputs, and which places share one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

from torch import fx, nn
from torch.nn.modules.pooling import _MaxPoolNd

from lq.dataflow import Dataflow, Flow, Reader
from lq.rectified import is_average_pool, is_rectified, rectified_pools
from lq.residual import product_operands, residual_operands
from lq.sites import OUTPUT, Site, argument_slot
from lq.spec import LayerSpec, QuantSpec, Recipe

INPUT = "input_quantizer"
_NORMS = ("LayerNorm", "RMSNorm")


@dataclass
class Placement:
    """Where quantizers of inputs go.

    Attributes:
        specs: Every place, and how it is quantized.
        groups: Places that share one quantizer, because they see the same tensor.
        left: Modules with an addition that stays float against the recipe, and why.
    """

    specs: dict[Site, QuantSpec]
    groups: list[list[Site]] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def place(dataflow: Dataflow, recipe: Recipe, layers: Mapping[str, LayerSpec]) -> Placement:
    """Return where a recipe puts quantizers in a model.

    Args:
        dataflow: The model's forwards.
        recipe: What is quantized.
        layers: The specs of all layers by name.
    """
    placer = _Placer(dataflow, recipe, layers)
    for flow in dataflow.flows.values():
        placer.place_operands(flow)
        if recipe.pooling:
            placer.place_pools(flow)
    placer.place_named_modules()
    if recipe.unsigned:
        placer.drop_signs()
    placement = placer.placement
    if recipe.residual is not None:
        placement.left |= placer.untraced()
    placement.groups = _joined(placement.specs, placer.same_tensor())
    return placement


def nameable(dataflow: Dataflow) -> dict[str, nn.Module]:
    """Return the modules besides layers that a rule may name, by qualified name.

    They are those whose forward adds or multiplies tensors, or may do so; pooling and
    normalization.
    """
    return {
        name: module
        for name, module in dataflow.modules.items()
        if _is_named_only(module)
        or name in dataflow.untraced
        or (name in dataflow.flows and _combines(dataflow, dataflow.flows[name]))
    }


def _combines(dataflow: Dataflow, flow: Flow) -> bool:
    found = chain(residual_operands(dataflow, flow, both=False), product_operands(dataflow, flow))
    return any(True for _ in found)


class _Placer:
    def __init__(self, dataflow: Dataflow, recipe: Recipe, layers: Mapping[str, LayerSpec]) -> None:
        self.dataflow, self.recipe, self.layers = dataflow, recipe, layers
        self.placement = Placement(
            {Site(n, INPUT): spec.inputs for n, spec in layers.items() if not spec.is_float}
        )

    def place_operands(self, flow: Flow) -> None:
        """Place quantizers on the operands of a forward's additions and products."""
        module = self.dataflow.modules[flow.name]
        spec = self.recipe.layer_spec(flow.name, module).inputs
        if not spec.needs_scale:
            return
        by_type, residual = self.recipe.names_type(flow.name, module), self.recipe.residual
        wanted = list(product_operands(self.dataflow, flow)) if by_type else []
        if residual is not None:
            wanted += residual_operands(self.dataflow, flow, both=residual == "both")
        for tensor in {self.dataflow.origin(flow, node): None for node in wanted}:
            if by_type or self._follows(flow, tensor):
                self._place(flow, tensor, self._as_around(flow, tensor, flow.name, spec))

    def _as_around(self, flow: Flow, tensor: fx.Node, name: str, spec: QuantSpec) -> QuantSpec:
        """Return a spec in the format of the layers that read a tensor, or else make it.

        Where the recipe wants it, they agree, and no rule names the module that reads it besides.
        """
        named = any(r.matches(name, self.dataflow.modules[name]) for r in self.recipe.rules)
        around = self._layers_behind(flow, tensor) or self._layers_before(flow, tensor)
        formats = {s.inputs.format for s in around if s.inputs.needs_scale}
        if named or not self.recipe.additions_follow or len(formats) != 1:
            return spec
        return replace(spec, format=formats.pop())

    def _follows(self, flow: Flow, tensor: fx.Node) -> bool:
        """Return whether an addition quantizes a tensor, going by the modules at its ends."""
        readers = list(self.dataflow.readers_of(flow, tensor))
        around = self._layers_behind(flow, tensor)
        if around:
            return any(spec.inputs.needs_scale for spec in around)
        if any(_is_norm(self.dataflow.modules[reader.name]) for reader in readers):
            return False
        made_by = self._layers_before(flow, tensor)
        return not made_by or any(spec.inputs.needs_scale for spec in made_by)

    def _layers_behind(self, flow: Flow, tensor: fx.Node) -> list[LayerSpec]:
        readers = self.dataflow.readers_of(flow, tensor)
        return [self.layers[r.name] for r in readers if r.name in self.layers]

    def _layers_before(self, flow: Flow, tensor: fx.Node) -> list[LayerSpec]:
        """Return the layers in the module that makes a tensor, or in the ones before it."""
        while tensor.op == "call_module":
            child = self.dataflow.child(flow, tensor)
            found = [s for n, s in self.layers.items() if f"{n}.".startswith(f"{child}.")]
            if found or not tensor.all_input_nodes:
                return found
            tensor = tensor.all_input_nodes[0]
        return []

    def _place(self, flow: Flow, tensor: fx.Node, spec: QuantSpec) -> None:
        site = self._source(flow, tensor)
        if site is None or _runs_all_children(self.dataflow.modules[site.module]):
            self.placement.left[flow.name] = (
                "what its addition or pooling reads is neither an input nor the output of a module"
            )
            return
        # What a layer without activation returns has both signs.
        signed = site.slot == OUTPUT or spec.signed
        self.placement.specs[site] = replace(spec, signed=signed)

    def _source(self, flow: Flow, tensor: fx.Node) -> Site | None:
        """Return where a tensor of a forward can be quantized."""
        if tensor.op == "placeholder":
            return Site(flow.name, argument_slot(str(tensor.target)))
        maker = self.dataflow.maker(flow, tensor)
        return None if maker is None else Site(maker, OUTPUT)

    def place_pools(self, flow: Flow) -> None:
        """Quantize what average pooling reads, so that the layer before it computes in integers."""
        for pool in rectified_pools(self.dataflow, flow):
            tensor = self.dataflow.origin(flow, pool.all_input_nodes[0])
            by_module = pool.op == "call_module"
            name = self.dataflow.child(flow, pool) if by_module else flow.name
            spec = self.recipe.layer_spec(name, self.dataflow.modules[name]).inputs
            if not spec.needs_scale or not self._follows(flow, tensor):
                continue
            spec = self._as_around(flow, tensor, name, spec)
            if by_module:
                self.placement.specs[Site(name, INPUT)] = spec
            else:
                self._place(flow, tensor, spec)

    def drop_signs(self) -> None:
        """Give tensors that are never negative codes without a sign."""
        for flow, tensor in self._tensors():
            if is_rectified(self.dataflow, flow, tensor):
                for site in self._places(flow, tensor):
                    spec = self.placement.specs[site]
                    if spec.number_format.is_integer:
                        self.placement.specs[site] = replace(spec, signed=False)

    def place_named_modules(self) -> None:
        """Quantize the inputs of pooling and normalization that a rule names by type."""
        for name, module in self.dataflow.modules.items():
            spec = self.recipe.layer_spec(name, module).inputs
            named = self.recipe.names_type(name, module)
            if named and spec.needs_scale and _is_named_only(module):
                self.placement.specs[Site(name, INPUT)] = spec

    def untraced(self) -> dict[str, str]:
        """Return the modules that may add and cannot be looked into, unless a rule skips them."""
        return {
            name: reason
            for name, reason in self.dataflow.untraced.items()
            if self.recipe.layer_spec(name, self.dataflow.modules[name]).inputs.needs_scale
        }

    def same_tensor(self) -> Iterator[list[Site]]:
        """Yield the places that see one tensor, for every tensor of every forward."""
        for flow, tensor in self._tensors():
            yield self._places(flow, tensor)

    def _tensors(self) -> Iterator[tuple[Flow, fx.Node]]:
        for flow in self.dataflow.flows.values():
            for node in flow.graph.nodes:
                if node.op != "output" and self.dataflow.origin(flow, node) is node:
                    yield flow, node

    def _places(self, flow: Flow, tensor: fx.Node) -> list[Site]:
        return [site for site in self._sites(flow, tensor) if site in self.placement.specs]

    def _sites(self, flow: Flow, tensor: fx.Node) -> Iterator[Site]:
        source = self._source(flow, tensor)
        if source is not None:
            yield source
        for reader in self.dataflow.readers_of(flow, tensor):
            yield self._site(reader)

    def _site(self, reader: Reader) -> Site:
        is_layer = reader.name in self.layers
        return Site(reader.name, INPUT if is_layer else argument_slot(reader.argument))


def _is_named_only(module: nn.Module) -> bool:
    """Return whether a module is of a kind whose input is quantized where a rule names its type."""
    return is_average_pool(module) or isinstance(module, _MaxPoolNd) or _is_norm(module)


def _is_norm(module: nn.Module) -> bool:
    return any(name in c.__name__ for c in type(module).__mro__ for name in _NORMS)


def _runs_all_children(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential)


def _joined(specs: Mapping[Site, QuantSpec], same: Iterable[list[Site]]) -> list[list[Site]]:
    """Return the groups of sites that are joined by tensors and agree in their specs."""
    group = {site: [site] for site in specs}
    for sites in same:
        for spec in {specs[site]: None for site in sites if specs[site].needs_scale}:
            first, *others = [site for site in sites if specs[site] == spec]
            for other in others:
                if group[other] is not group[first]:
                    group[first] += group[other]
                    group |= {site: group[first] for site in group[other]}
    return list({id(sites): sites for sites in group.values()}.values())
