"""Measures units by running the model: each batch is recorded once, and every change replayed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lq.batches import class_targets, model_inputs, tensors
from lq.ranks import rank, world_size
from lq.samples import first_samples
from lq.sensitivity.comparing import compare, describe
from lq.sensitivity.journal import FLOAT as FLOAT_MODEL
from lq.sensitivity.journal import Journal
from lq.sensitivity.passed import passed_on
from lq.sensitivity.replay import Departure, Replay
from lq.sensitivity.states import FLOAT, State, States

log = logging.getLogger(__name__)
Call = tuple[tuple[Any, ...], dict[str, Any]]
PROBE = 2
"""Samples on which replays are compared with whole passes before they are relied on."""


@dataclass(frozen=True)
class Variant:
    """One changed model.

    Attributes:
        format: Number format.
        part: What of the layers is in it.
        unit: Name of the unit that is in it, or left float; empty for all units.
        left_float: Whether the unit is left float and all others are in the format.
    """

    format: str
    part: str = "both"
    unit: str = ""
    left_float: bool = False

    @property
    def key(self) -> str:
        """Its name in a journal."""
        kind = "all" if not self.unit else "left float" if self.left_float else "only"
        return f"{kind}:{self.format}:{self.part}:{self.unit}"

    @property
    def base(self) -> str:
        """The format of all that it does not change."""
        return "" if self.unit and not self.left_float else self.format


class Exact:
    """Measures variants of a model, batch by batch.

    Args:
        states: The model and its states.
        units: Name of a unit -> its layers.
        variants: What to measure.
        journal: Where values go, and what is there already.

    Attributes:
        progress: Called with the forward passes that were done.
        fallback: Why whole passes are run instead of replays; empty where they are not.
        costs: Variant -> forward passes that it takes, by multiply-accumulates.
        until: Variant -> the last batch that it was to be measured on.
    """

    def __init__(
        self,
        states: States,
        units: Mapping[str, Sequence[str]],
        variants: Sequence[Variant],
        journal: Journal,
    ) -> None:
        self.states, self.units, self.journal = states, units, journal
        self.progress: Callable[[float], object] = lambda done: None
        self.variants = list(variants)
        self.bases: dict[str, State] = {"": FLOAT}
        for format in {v.base: None for v in variants if v.base}:
            self.bases[format] = states.state(format, states.layers, alone=False)
        self._targets = {v: self._state(v) for v in variants}
        changeable = {name for target in self._targets.values() for name in target}
        self.replay = Replay(states.model, passed_on(states.dataflow, changeable))
        self.model = states.model
        self.fallback = ""
        self.costs: dict[Variant, float] = {}
        self.until: dict[Variant, int] = {}

    def _state(self, variant: Variant) -> State:
        if not variant.unit:
            return self.bases[variant.format]
        members = self.units[variant.unit]
        if variant.left_float:
            members = [name for name in self.states.layers if name not in members]
        return self.states.state(variant.format, members, variant.part, not variant.left_float)

    def __enter__(self) -> Exact:
        self.replay.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self.states.go(FLOAT)
        self.replay.__exit__()

    def probe(self, batch: Any) -> None:
        """Find out from a few samples what variants cost, and whether replays can be relied on."""
        call: Call = first_samples(model_inputs(self.states.model, batch), PROBE)
        for base, state in self.bases.items():
            self.states.go(state)
            recorded = output_of(self.replay.record(*call))
            if not same(recorded, output_of(self.replay.run(*call))):
                self._fall_back("the model gives other outputs when it is run again")
            total = self.replay.macs
            macs = {v: self._probe_one(v, call) for v in self.variants if v.base == base}
            # A float pass of torch's fused transformer layers calls none of their parts.
            total = max(total, *macs.values(), 1)
            self.costs |= {variant: found / total for variant, found in macs.items()}
        self.states.go(FLOAT)
        if self.fallback:
            self.costs = {v: 1.0 if v.unit else 0.0 for v in self.variants}

    def _probe_one(self, variant: Variant, call: Call) -> int:
        """Compare a replay with a whole pass; return its multiply-accumulates."""
        changed = self.states.changed(self._targets[variant])
        if not changed or self.fallback:
            return 0
        base = self.states.now
        self.states.go(self._targets[variant])
        macs = 0
        try:
            replayed = output_of(self.replay.replay(changed, *call)).clone()
            macs = self.replay.macs
            if not same(replayed, output_of(self.replay.run(*call))):
                self._fall_back(
                    f"{variant.unit!r} changes the outputs otherwise in a replay than in a whole "
                    "pass: the model keeps something from one pass to the next"
                )
        except Departure as error:
            self._fall_back(f"the order of modules changes from run to run: {error}")
        self.states.go(base)
        if self.replay.spoilt():
            self.replay.record(*call)
        return macs

    def _fall_back(self, reason: str) -> None:
        if not self.fallback:
            self.fallback = reason
            log.warning("Whole passes are run for each unit, since %s.", reason)

    def measure(self, index: int, batch: Any, variants: Sequence[Variant]) -> None:
        """Measure variants on a batch, those of this rank that are not in the journal."""
        self.until |= dict.fromkeys(variants, index)
        mine = list(variants)[rank() :: world_size()]
        todo = [v for v in mine if not self.journal.has(v.key, index)]
        if not todo and self.journal.has(FLOAT_MODEL, index):
            return
        call = model_inputs(self.states.model, batch)
        reference = self._base("", call, any(v.base == "" for v in todo))
        target = class_targets(batch, reference)
        if not self.journal.has(FLOAT_MODEL, index):
            self.journal.add(FLOAT_MODEL, index, describe(reference, target).numpy())
        for base in self.bases:
            here = [v for v in todo if v.base == base]
            output = self._base(base, call, True) if base and here else reference
            for variant in here:
                if variant.unit:
                    output = self._changed(variant, call)
                values = compare(reference, output, target)
                self.journal.add(variant.key, index, values.numpy())
        self.replay.clear()
        self.states.go(FLOAT)

    def _base(self, base: str, call: Call, replayed: bool) -> Tensor:
        """Put the model into a base state and run it; recorded where variants are replayed."""
        self.states.go(self.bases[base])
        run = self.replay.record if replayed and not self.fallback else self.replay.run
        output = output_of(run(*call))
        self.progress(1.0)
        return output.clone()

    def _changed(self, variant: Variant, call: Call) -> Tensor:
        base, target = self.bases[variant.base], self._targets[variant]
        changed = self.states.changed(target)
        self.states.go(target)
        output = self._output(changed, call)
        self.progress(self.costs[variant])
        self.states.go(base)
        if not self.fallback and self.replay.spoilt():
            self.replay.record(*call)
        return output

    def _output(self, changed: Iterable[str], call: Call) -> Tensor:
        if not self.fallback:
            try:
                return output_of(self.replay.replay(changed, *call))
            except Departure as error:
                self._fall_back(f"the order of modules changes from run to run: {error}")
        return output_of(self.replay.run(*call))

    def work(self) -> float:
        """Return the forward passes that all variants take of a batch, recorded ones too."""
        return len(self.bases) + sum(self.costs.values())

    def passes(self) -> float:
        """Return the forward passes that all that was to be measured takes."""
        recorded = {(v.base, i) for v, last in self.until.items() for i in range(last + 1)}
        return len(recorded) + sum(self.costs[v] * (last + 1) for v, last in self.until.items())


def output_of(output: Any) -> Tensor:
    """Return the first tensor of a model's output.

    Raises:
        ValueError: If there is none with samples and classes.
    """
    found = tensors(output)
    if not found or found[0].dim() < 2 or not found[0].is_floating_point():
        kind = f"a {found[0].dim()}-d tensor" if found else type(output).__name__
        raise ValueError(
            f"Expected the model to return floats [N, classes, ...], but got {kind}; wrap it in a "
            "module that returns its logits."
        )
    return found[0]


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two outputs are equal to the last bit, NaN where the other is."""
    return torch.equal(one.nan_to_num(), other.nan_to_num())
