"""What is swept together: layers, blocks, layers that read one tensor, or groups of one's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lq.dataflow import Dataflow
from lq.gemm import weight_of
from lq.messages import suggest
from lq.placement import INPUT, place
from lq.spec import LayerSpec, Recipe

UNITS = ("layers", "inputs", "blocks")
Units = dict[str, tuple[str, ...]]
"""Name of a unit -> the layers in it."""


def find_units(
    dataflow: Dataflow,
    layers: Mapping[str, nn.Module],
    units: str | Mapping[str, str | Sequence[str]] = "layers",
) -> Units:
    """Return the units of a model, in the order of their first layers.

    Attention and its output projection are always in one unit, since a float attention does not
    call its projection; and so are layers that share a weight, which is stored once.

    Args:
        dataflow: The model.
        layers: Those that are swept, by name.
        units: ``"layers"``, each by itself; ``"inputs"``, layers that read the same tensor
            together; ``"blocks"``, the layers of each innermost module that has several and a
            forward of its own; or name -> globs on layer names.

    Raises:
        ValueError: For another word, a glob that matches nothing, or a layer in two units.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> layers = {"0": model[0], "2": model[2]}
        >>> find_units(Dataflow(model), layers), find_units(Dataflow(model), layers, {"all": "*"})
        ({'0': ('0',), '2': ('2',)}, {'all': ('0', '2')})
    """
    if isinstance(units, Mapping):
        named = {name: _matching(name, globs, layers) for name, globs in units.items()}
        _check_apart(named)
        return _with_tied(
            dict(sorted(named.items(), key=lambda u: list(layers).index(u[1][0]))), layers
        )
    if units not in UNITS:
        raise ValueError(
            f"Expected `units` to be {', '.join(UNITS)} or a mapping, but got {units!r}; "
            f"{suggest(units, UNITS)}"
        )
    group = {"layers": _alone, "inputs": _by_input, "blocks": _by_block}[units]
    return _with_tied(group(dataflow, layers), layers)


def _alone(dataflow: Dataflow, layers: Mapping[str, nn.Module]) -> Units:
    return {name: (name,) for name in layers}


def _by_input(dataflow: Dataflow, layers: Mapping[str, nn.Module]) -> Units:
    recipe = Recipe(residual=None)
    specs = {name: LayerSpec(recipe.weights, recipe.inputs) for name in layers}
    groups = place(dataflow, recipe, specs).groups
    found = [
        tuple(s.module for s in sites if s.slot == INPUT and s.module in layers) for sites in groups
    ]
    together = {name: names for names in found for name in names}
    return {"+".join(together[name]): together[name] for name in layers}


def _by_block(dataflow: Dataflow, layers: Mapping[str, nn.Module]) -> Units:
    """Return layers by the innermost module around them that has several and its own forward."""
    found: dict[str, list[str]] = {}
    for name in layers:
        found.setdefault(_block_of(name, dataflow, layers), []).append(name)
    return {name: tuple(names) for name, names in found.items()}


def _block_of(name: str, dataflow: Dataflow, layers: Mapping[str, nn.Module]) -> str:
    around = name
    while "." in around:
        around = around.rpartition(".")[0]
        module = dataflow.modules.get(around)
        own = module is not None and type(module).forward is not nn.Sequential.forward
        if own and sum(f"{other}.".startswith(f"{around}.") for other in layers) > 1:
            return around
    return name


def _matching(
    name: str, globs: str | Sequence[str], layers: Mapping[str, nn.Module]
) -> tuple[str, ...]:
    globs = [globs] if isinstance(globs, str) else list(globs)
    for pattern in globs:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            raise ValueError(
                f"Expected every unit to match a layer, but {pattern!r} of {name!r} matches none; "
                f"{suggest(pattern, layers)}"
            )
    return tuple(layer for layer in layers if any(fnmatchcase(layer, p) for p in globs))


def _check_apart(units: Units) -> None:
    seen: dict[str, str] = {}
    for name, members in units.items():
        for layer in members:
            if layer in seen:
                raise ValueError(
                    f"Expected every layer in one unit, but {layer!r} is in {seen[layer]!r} and "
                    f"{name!r}; give narrower globs."
                )
            seen[layer] = name


def _with_tied(units: Units, layers: Mapping[str, nn.Module]) -> Units:
    """Return the units with layers that go with another one beside it."""
    leaders = _leaders(layers)
    joined = {}
    for name, members in units.items():
        kept = [m for m in members if m not in leaders]
        kept += [follower for follower, leader in leaders.items() if leader in kept]
        if kept:
            joined[name] = tuple(layer for layer in layers if layer in kept)
    return joined


def _leaders(layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Return layer -> the one that it goes with: attention, or the first with its weight."""
    first: dict[int, str] = {}
    found = {
        f"{name}.out_proj": name
        for name, layer in layers.items()
        if isinstance(layer, nn.MultiheadAttention) and f"{name}.out_proj" in layers
    }
    for name, layer in layers.items():
        owner = first.setdefault(id(weight_of(layer)), name)
        if owner != name:
            found.setdefault(name, owner)
    return found
