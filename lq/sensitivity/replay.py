"""Run a model again, but only from the first module that changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lq.batches import tensors
from lq.costs import layer_macs
from lq.gemm import weight_of
from lq.layers import float_class, is_quantizable
from lq.sensitivity.recorded import forget, record

Key = tuple[nn.Module, int]
"""A module, and which of its calls in a pass."""


class Departure(Exception):
    """A replay that went another way than the recording did."""


@dataclass
class Call:
    """One call of a module in a recorded pass.

    Attributes:
        key: Which.
        end: How many calls had begun when it returned.
        output: What it returned; a copy where that is changed in place later.
        copied: Whether it is a copy, of which a replay must get a copy again.
        known: Whether all of the output can be kept: tensors in tuples, lists and mappings.
        passed_on: Whether the output was not kept, and an empty tensor stands for it.
        versions: How often each tensor in the output had been changed in place.
        given: The arguments, if all are tensors that are kept, and how often each was changed.
    """

    key: Key
    end: int = 0
    output: Any = None
    copied: bool = False
    known: bool = False
    passed_on: bool = False
    versions: list[int] = field(default_factory=list)
    given: list[tuple[Tensor, int]] | None = None

    def give(self) -> Any:
        """Return the output, for a replay."""
        return copied(self.output) if self.copied else self.output

    def is_given(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Return whether arguments are those it was given."""
        if self.given is None or kwargs or len(args) != len(self.given):
            return False
        pairs = zip(args, self.given, strict=True)
        return all(x is kept and x._version == version for x, (kept, version) in pairs)


class Replay:
    """Records a pass of a model module by module, and runs it again from where it changes.

    What completed before the first changed module began has the same result again, and so has
    what is given the very tensors it was given before; the rest is computed. No tracing: a model
    may call modules several times and in an order that depends on the data. What it may not do is
    draw random numbers, or keep something from one pass to the next; ``lq.sensitivity.exact``
    looks for that.

    Args:
        model: In eval mode; without gradients while it runs.
        passed_on: Modules whose output is of no use once the next module's is there; it is not
            kept, and a replay gives that module an empty tensor instead.

    Attributes:
        calls: Those of the recorded pass, in the order they began.
        macs: Multiply-accumulates of layers that were computed in the last run.
    """

    def __init__(self, model: nn.Module, passed_on: Iterable[str] = ()) -> None:
        self.model, self._passed_on = model, set(passed_on)
        self.calls: list[Call] = []
        self.macs = 0
        self._names = {module: name for name, module in model.named_modules()}
        self._modules = dict(model.named_modules())
        self._fragile: set[Key] = set()
        self._copy_inputs = True
        self._recording = False
        self._next, self._start = 0, 0
        self._seen: Counter[nn.Module] = Counter()
        self._kept: set[int] = set()
        self._first: dict[nn.Module, Call] = {}
        self._affected: set[str] | None = None

    def __enter__(self) -> Replay:
        try:
            for module in self._modules.values():
                record(module, self)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        for module in self._modules.values():
            forget(module)

    def clear(self) -> None:
        """Forget the recorded pass, and free its tensors."""
        self.calls = []
        self._seen.clear()
        self._kept.clear()
        self._first.clear()

    def record(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model as it is now, keep what every module returns, and return the output.

        A pass in which a kept tensor was changed in place is recorded again, with a copy of it.

        Raises:
            RuntimeError: If the model changes its inputs in place, and did not in its first pass.
        """
        while True:
            self.clear()
            given = self._given(args, kwargs)
            before = _versions([*given])
            output = self._recorded(*given)
            if _versions([*given]) == before:
                self._copy_inputs = False
            elif not self._copy_inputs:
                raise RuntimeError(
                    "Expected a model that changes its inputs in place in every pass, or in none, "
                    "but it does so in some; give it a copy."
                )
            if not self.spoilt():
                return output

    def _recorded(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._recording, self.macs = True, 0
        self._keep([args, kwargs])
        try:
            return self.model(*args, **kwargs)
        finally:
            self._recording = False

    def _given(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the inputs of a run: a copy, unless they are known not to be changed."""
        return (copied(args), copied(kwargs)) if self._copy_inputs else (args, kwargs)

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the whole model, without looking at the recording."""
        self.macs = 0
        args, kwargs = self._given(args, kwargs)
        return self.model(*args, **kwargs)

    def start(self, changed: Iterable[str]) -> int:
        """Return the number of the first recorded call that some changed modules affect.

        One that was not called does not matter, unless a module of torch is around it, which may
        have computed without its parts and may call them when they have changed.
        """
        first: dict[str, int] = {}
        for i, call in enumerate(self.calls):
            first.setdefault(self._names[call.key[0]], i)
        return min(self._first_affected(name, first) for name in changed)

    def _first_affected(self, name: str, first: Mapping[str, int]) -> int:
        called = name in first
        while name and name not in first:
            name = name.rpartition(".")[0]
        fused = float_class(self._modules[name]).__module__.startswith("torch.nn.")
        return first.get(name, 0) if called or fused else len(self.calls)

    def replay(self, changed: Iterable[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the model with some modules changed since the recording, and return the output.

        Raises:
            Departure: If the model goes another way before it reaches the first of them.
        """
        changed = list(changed)
        self._next, self._start = 0, self.start(changed)
        self._affected = {part for name in changed for part in around(name)}
        try:
            return self.run(args, kwargs)
        finally:
            self._start, self._affected = 0, None

    def spoilt(self) -> bool:
        """Return whether a kept tensor was changed in place, which calls for a new recording."""
        changed = {c.key for c in self.calls if not c.copied and _versions(c.output) != c.versions}
        self._fragile |= changed
        return bool(changed)

    def call(
        self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Stand between a module's call and its forward."""
        if self._recording:
            return self._record(module, forward, args, kwargs)
        if self._next < self._start:
            call = self.calls[self._next]
            if call.key[0] is not module:
                raise Departure(f"{self._names[module]!r} ran before {self._names[call.key[0]]!r}")
            if call.end <= self._start and call.known:
                self._next = call.end
                return call.give()
            self._next += 1
        elif self._affected is not None and self._names[module] not in self._affected:
            only = self._only_call(module)
            if only is not None and only.is_given(args, kwargs):
                return only.give()
        return self._computed(module, forward, args, kwargs)

    def _only_call(self, module: nn.Module) -> Call | None:
        """Return the recorded call of a module that was called once, if its output was kept."""
        if self._seen[module] != 1:
            return None
        call = self._first[module]
        return call if call.known and not call.passed_on else None

    def _computed(
        self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        output = forward(*args, **kwargs)
        if is_quantizable(module) and weight_of(module) is not None and (found := tensors(output)):
            macs = layer_macs(module, tensors([*args, *kwargs.values()]), found[0])
            # An attention does not call the projection behind it, which has a third of its weights.
            self.macs += macs * 4 // 3 if isinstance(module, nn.MultiheadAttention) else macs
        return output

    def _record(
        self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        call = Call((module, self._seen[module]))
        if not kwargs and all(id(x) in self._kept for x in args):
            call.given = [(x, x._version) for x in args]
        self._seen[module] += 1
        self._first.setdefault(module, call)
        self.calls.append(call)
        output = self._computed(module, forward, args, kwargs)
        call.end, call.known = len(self.calls), _is_known(output)
        call.passed_on = isinstance(output, Tensor) and self._names[module] in self._passed_on
        if call.passed_on:
            call.output = output.new_empty(()).expand(output.shape)
        elif call.known:
            inference = any(t.is_inference() for t in tensors(output))  # has no version
            call.copied = inference or call.key in self._fragile
            call.output = copied(output) if call.copied else output
            self._keep([] if call.copied else output)
        call.versions = [] if call.copied else _versions(call.output)
        return output

    def _keep(self, output: Any) -> None:
        self._kept |= {id(t) for t in tensors(output) if not t.is_inference()}


def around(name: str) -> list[str]:
    """Return the names of a module and of all modules around it.

    Example:
        >>> around("layer1.0.conv1")
        ['', 'layer1', 'layer1.0', 'layer1.0.conv1']
    """
    parts = name.split(".")
    return list(dict.fromkeys(["", *(".".join(parts[: i + 1]) for i in range(len(parts)))]))


def _versions(output: Any) -> list[int]:
    return [t._version for t in tensors(output) if not t.is_inference()]


def _is_known(output: Any) -> bool:
    if isinstance(output, Mapping):
        return all(map(_is_known, output.values()))
    if isinstance(output, (list, tuple)):
        return all(map(_is_known, output))
    return output is None or isinstance(output, (Tensor, bool, int, float, str))


def copied(output: Any) -> Any:
    """Return a copy that shares no tensor; other values, which cannot change, as they are."""
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, Mapping):
        values: Any = {key: copied(value) for key, value in output.items()}
        cls: Any = type(output)
        return values if cls is dict else cls(values)
    if isinstance(output, (list, tuple)):
        parts = [copied(value) for value in output]
        named = hasattr(output, "_fields")  # a namedtuple takes its values one by one
        return type(output)(*parts) if named else type(output)(parts)
    return output
