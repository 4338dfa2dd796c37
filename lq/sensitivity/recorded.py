"""Modules whose calls go through a tape, which records them and may give their outputs again.

Like a quantized layer, such a module is the same object with its class changed to a subclass; it
is for the time of a sweep only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.utils.parametrize import type_before_parametrizations

from lq.layers import Quantized, change_class

_TAPE = "_lq_tape"


class Tape(Protocol):
    """What the calls of modules go through."""

    def call(
        self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        """Return what ``forward(*args, **kwargs)`` returns."""


class Recorded(Quantized):
    """What marks a module whose calls go through a tape; a mixin before its own class."""


@functools.cache
def _recorded_class(cls: type[nn.Module]) -> type[Recorded]:
    own = cls.forward

    @functools.wraps(own)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        tape: Tape | None = vars(self).get(_TAPE)
        if tape is None:  # a part that a slice of a Sequential is made of
            return own(self, *args, **kwargs)
        return tape.call(self, functools.partial(own, self), args, kwargs)

    return type(f"Recorded{cls.__name__}", (Recorded, cls), {"forward": forward})


def record(module: nn.Module, tape: Tape) -> None:
    """Let the calls of one module go through a tape, unless it is scripted."""
    if isinstance(module, torch.jit.ScriptModule) or type(module).forward is nn.Module.forward:
        return
    change_class(module, _recorded_class(type_before_parametrizations(module)))
    vars(module)[_TAPE] = tape


def forget(module: nn.Module) -> Tape | None:
    """Undo ``record``, and return the tape, if there was one."""
    tape: Tape | None = vars(module).pop(_TAPE, None)
    if tape is not None:
        _, below = type_before_parametrizations(module).__bases__
        change_class(module, below)
    return tape
