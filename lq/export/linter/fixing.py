"""Apply the rewrites that change no output, and prove that they changed none."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from lq.export import passes
from lq.export.linter.finding import Finding
from lq.export.linter.linting import lint, read
from lq.export.linter.rules import RULES
from lq.files import written_whole

FREE_SIZE = 32
"""Size of image axes that vary, where the outputs are compared."""


def fix(path: str | Path, output: str | Path, target: str = "tensorrt") -> list[Finding]:
    """Write a copy of an ONNX file with all safe fixes, and return what is left to find.

    Only exact rewrites are applied, and file and copy must give the same outputs, bit for bit,
    in ONNX Runtime with its own rewrites off.

    Args:
        path: An ONNX file.
        output: Where to write the copy.
        target: What will run it (see ``lint``).

    Raises:
        RuntimeError: If outputs differ; no file is written then.
    """
    before, after = read(path), read(path)
    rewrite(after, target)
    _check_same(before, after, Path(path))
    with written_whole(output) as temporary:
        ir.save(after, temporary)
    return lint(output, target)


def rewrite(model: ir.Model, target: str) -> None:
    """Apply the rewrites of the rules that find something, in place."""
    passes.share_equal(model)  # pairs that double another one
    for rule in RULES.values():
        if rule.rewrite is not None and any(rule.check(model.graph, target)):
            rule.rewrite(model, target)
    passes.remove_unused(model.graph)


def _check_same(before: ir.Model, after: ir.Model, path: Path) -> None:
    from lq.engines.onnxruntime_runner import OnnxRuntimeRunner  # a fix proves itself

    feeds = {str(value.name): _sample(value) for value in before.graph.inputs}
    first, second = (
        OnnxRuntimeRunner.from_graph(model, optimize=False).run(**feeds)
        for model in (before, after)
    )
    if not all(torch.equal(a, b) for a, b in zip(first, second, strict=True)):
        raise RuntimeError(
            f"The fixed graph computes something else than {str(path)!r}, so it was not written; "
            "please report this as a bug."
        )


def _sample(value: ir.Value) -> Tensor:
    shape = value.shape if value.shape is not None else ir.Shape([])
    sizes = [
        size if isinstance(size, int) else 2 if axis < 2 else FREE_SIZE
        for axis, size in enumerate(shape)
    ]
    generator = torch.Generator().manual_seed(0)
    if value.dtype is not None and value.dtype.is_integer():
        return torch.randint(0, 2, sizes, generator=generator)
    return torch.randn(sizes, generator=generator)
