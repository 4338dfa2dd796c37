"""The errors that variants make in their layers, and the products of gradients with them."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lq.batches import tensors
from lq.layers import float_class
from lq.placement import INPUT
from lq.quantizer import Quantizer
from lq.sensitivity.exact import Variant
from lq.sensitivity.states import FLOAT, WEIGHT, State, States
from lq.sites import OUTPUT, Site


class Perturbed:
    """Watches a float pass, computing at each layer what it would return in each format.

    Where a variant also quantizes an addition's operand, the error there counts with the gradient
    there, less what goes through layers of the same variant that read the same tensor: they have
    the error of their input already.

    Args:
        states: The model and its states.
        targets: Variant -> its state.

    Attributes:
        axes: Layer -> the axis of its output that samples are along, if it is not the first.
    """

    def __init__(self, states: States, targets: Mapping[Variant, State]) -> None:
        self.states = states
        self.axes: dict[str, int] = {}
        self._layers: dict[str, dict[Variant, State]] = defaultdict(dict)
        self._sites: dict[Site, dict[Variant, Quantizer]] = defaultdict(dict)
        self._readers: dict[str, list[tuple[Variant, Site]]] = defaultdict(list)
        for variant, state in targets.items():
            self._plan(variant, state)
        self._errors: dict[tuple[Variant, Site], Tensor] = {}
        self._products: dict[Variant, Tensor] = {}
        self._samples = 0

    def _plan(self, variant: Variant, state: State) -> None:
        layers = [name for name, slots in state.items() if WEIGHT in slots]
        for name in layers:
            if not any(name.startswith(f"{other}.") for other in layers):
                inner = {n: s for n, s in state.items() if f"{n}.".startswith(f"{name}.")}
                self._layers[name][variant] = {n: s for n, s in inner.items() if n in layers}
        others = [Site(n, s) for n in state if n not in layers for s in state[n]]
        for sites in self.states.groups(variant.format, layers):
            here = [site for site in sites if site in others]
            for site in (s for s in here if not any(_covers(o, s) for o in here)):
                self._sites[site][variant] = state[site.module][site.slot]
                for reader in sites:
                    if reader.module in layers and _covers(site, reader):
                        self._readers[reader.module].append((variant, site))

    @contextmanager
    def watched(self, samples: int) -> Iterator[dict[Variant, Tensor]]:
        """Watch a pass of so many samples; give the products, which its backward pass fills."""
        self._samples, self._errors = samples, {}
        self._products = {v: torch.zeros(samples) for v in self._all_variants()}
        hooks = [*self._layer_hooks(), *self._site_hooks()]
        try:
            yield self._products
        finally:
            for hook in hooks:
                hook.remove()

    def _all_variants(self) -> list[Variant]:
        return list({v: None for found in self._layers.values() for v in found})

    def _layer_hooks(self) -> Iterator[RemovableHandle]:
        for name, variants in self._layers.items():
            layer = self.states.modules[name]
            yield layer.register_forward_hook(self._after_layer(name, variants), with_kwargs=True)
        for name, sites in self._readers.items():
            layer = self.states.modules[name]
            yield layer.register_forward_pre_hook(self._before_reader(sites))

    def _site_hooks(self) -> Iterator[RemovableHandle]:
        for site, variants in self._sites.items():
            module = self.states.modules[site.module]
            if site.slot == OUTPUT:
                yield module.register_forward_hook(self._at_output(site, variants))
            else:
                before = self._at_argument(site, variants, module)
                yield module.register_forward_pre_hook(before, with_kwargs=True)

    def _after_layer(self, name: str, variants: Mapping[Variant, State]) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            y, *_ = tensors(output)
            started = None if y.requires_grad else y.requires_grad_().clone()
            errors = {}
            for variant, state in variants.items():
                with torch.no_grad():
                    self.states.go(state)
                    changed = type(layer).forward(layer, *args, **kwargs)
                    self.states.go(FLOAT)
                    errors[variant] = tensors(changed)[0].sub_(y.detach())
            self._multiply(y, errors, self.axes.get(name, 0))
            return output if started is None else _with_first(output, started)

        return hook

    def _before_reader(self, sites: list[tuple[Variant, Site]]) -> Callable[..., Any]:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> Any:
            if not args or not args[0].requires_grad:
                return None
            x = args[0].view_as(args[0])
            self._multiply(x, {v: self._errors[v, site] for v, site in sites}, sign=-1)
            return (x, *args[1:])

        return hook

    def _at_argument(
        self, site: Site, variants: Mapping[Variant, Quantizer], module: nn.Module
    ) -> Callable[..., Any]:
        argument = "input" if site.slot == INPUT else site.slot.removesuffix("_quantizer")
        names = list(inspect.signature(float_class(module).forward).parameters)[1:]
        place = names.index(argument)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            x = kwargs[argument] if argument in kwargs else args[place]
            x = x.view_as(x)
            self._quantize(x, site, variants)
            if argument in kwargs:
                return args, {**kwargs, argument: x}
            return (*args[:place], x, *args[place + 1 :]), kwargs

        return hook

    def _at_output(self, site: Site, variants: Mapping[Variant, Quantizer]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            self._quantize(output, site, variants)

        return hook

    def _quantize(self, x: Tensor, site: Site, variants: Mapping[Variant, Quantizer]) -> None:
        with torch.no_grad():
            errors = {v: quantizer(x) - x for v, quantizer in variants.items()}
        self._errors |= {(variant, site): error for variant, error in errors.items()}
        self._multiply(x, errors)

    def _multiply(
        self, tensor: Tensor, errors: Mapping[Variant, Tensor], axis: int = 0, sign: int = 1
    ) -> None:
        """Add the products of a tensor's gradient with errors, when the gradient is there."""

        def hook(gradient: Tensor) -> None:
            rows = gradient.movedim(axis, 0).reshape(self._samples, -1)
            for variant, error in errors.items():
                others = error.movedim(axis, 0).reshape(self._samples, -1)
                self._products[variant] += sign * _row_products(rows, others).cpu()

        if tensor.requires_grad:
            tensor.register_hook(hook)  # type: ignore[no-untyped-call]


def _row_products(rows: Tensor, others: Tensor) -> Tensor:
    """Return the inner product of each row with the other one, ``[N]``."""
    others = others.to(rows.dtype)
    if rows.device.type != "cpu":
        return torch.einsum("nk,nk->n", rows, others)
    # On the CPU half the time of a tensor of all products, and a quarter of einsum's.
    return torch.stack([a.dot(b) for a, b in zip(rows, others, strict=True)])


def _covers(site: Site, other: Site) -> bool:
    """Return whether quantizing one site quantizes what another reads of the same tensor."""
    if site == other:
        return False
    return site.slot == OUTPUT or other.module.startswith(f"{site.module}.")


def _with_first(output: Any, first: Tensor) -> Any:
    """Return an output with another first tensor."""
    return first if isinstance(output, Tensor) else type(output)((first, *output[1:]))
