"""Quantizers on the inputs and outputs of modules that are no layers.

Like a quantized layer, such a module is the same object with its class changed to a subclass, so
that names, hooks, children and references stay.
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lq.layers import Quantized, QuantLayer, change_class, float_class, quantized_class
from lq.quantizer import Quantizer

OUTPUT = "output_quantizer"


@dataclass(frozen=True)
class Site:
    """A place for a quantizer.

    Attributes:
        module: Qualified name of the module.
        slot: Name of the quantizer in it: ``input_quantizer`` of a layer, ``x_quantizer`` for
            the argument ``x`` of another module, ``output_quantizer`` for what it returns.
    """

    module: str
    slot: str


def argument_slot(argument: str) -> str:
    """Return the name of the quantizer of a module's argument."""
    return f"{argument}_quantizer"


class QuantSites(Quantized):
    """A module with quantizers on arguments or output; a mixin before the module's own class.

    Attributes:
        quantizer_slots: Names of the quantizers.
    """

    quantizer_slots: tuple[str, ...]

    def quantized(self, slot: str, value: Any) -> Any:
        """Return a value, quantized if there is a quantizer for it."""
        return getattr(self, slot)(value) if slot in self.quantizer_slots else value

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class has no importable name; pickle what it is made of instead.
        reduced: Any = super().__reduce_ex__(protocol)
        return (_new, (float_class(self), isinstance(self, QuantLayer)), *reduced[2:])


def _new(cls: type[nn.Module], is_layer: bool) -> nn.Module:
    below: Any = quantized_class(cls) if is_layer else cls  # type: ignore[arg-type]
    made: type[QuantSites] = _class_with_sites(below)
    return made.__new__(made)


@functools.cache
def _class_with_sites(cls: type[nn.Module]) -> type[QuantSites]:
    """Return the subclass of a class that quantizes its arguments and its output."""
    names = list(inspect.signature(cls.forward).parameters)[1:]

    @functools.wraps(cls.forward)
    def forward(self: QuantSites, *args: Any, **kwargs: Any) -> Any:
        given = [
            self.quantized(argument_slot(name), value)
            for name, value in zip(names, args, strict=False)
        ]
        named = {k: self.quantized(argument_slot(k), v) for k, v in kwargs.items()}
        output = cls.forward(self, *given, *args[len(given) :], **named)
        return self.quantized(OUTPUT, output)

    name = f"Quant{cls.__name__.removeprefix('Quant')}"
    return type(name, (QuantSites, cls), {"forward": forward, "__doc__": cls.__doc__})


def attach(module: nn.Module, slot: str, quantizer: Quantizer) -> None:
    """Put a quantizer into its slot; a layer has its ``input_quantizer`` already."""
    if not (isinstance(module, QuantLayer) and slot == "input_quantizer"):
        sited: Any = module
        if not isinstance(module, QuantSites):
            change_class(module, _class_with_sites(type_before_parametrizations(module)))
            sited.quantizer_slots = ()
        sited.quantizer_slots = (*sited.quantizer_slots, slot)
    setattr(module, slot, quantizer)


def detach(module: nn.Module) -> dict[str, Quantizer]:
    """Take the quantizers of a module that is no layer out again, and return them by slot."""
    if not isinstance(module, QuantSites):
        return {}
    taken = {slot: getattr(module, slot) for slot in module.quantizer_slots}
    for slot in (*taken, "quantizer_slots"):
        delattr(module, slot)
    _, below = type_before_parametrizations(module).__bases__
    change_class(module, below)
    return taken
