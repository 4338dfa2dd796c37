"""What a rule finds, and what a rule is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

Check = Callable[[ir.Graph, str], Iterator[tuple[ir.Node, str]]]
"""Yields the nodes that break a rule on a target, each with the reason."""


@dataclass(frozen=True)
class Finding:
    """One place in a graph that costs speed or accuracy.

    Attributes:
        rule: Name of the rule (see ``docs/lint.md``).
        node: Name of the node.
        reason: What is wrong there.
        fix: What to do about it.
    """

    rule: str
    node: str
    reason: str
    fix: str

    def __str__(self) -> str:
        return f"{self.node}: {self.rule}: {self.reason}. Fix: {self.fix}."


@dataclass(frozen=True)
class Rule:
    """One kind of finding.

    Attributes:
        check: Finds it.
        fix: What to do about it.
        rewrite: Does it for a target, where that changes no output; ``None`` where it would.
    """

    check: Check
    fix: str
    rewrite: Callable[[ir.Model, str], object] | None = None


def name_of(node: ir.Node) -> str:
    """Return the name of a node, that of its first output where it has none."""
    return str(node.name or node.outputs[0].name)
