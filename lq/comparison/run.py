"""Compare methods of quantizing on the same samples, and go on where a killed run stopped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import RandomSampler
from tqdm.auto import tqdm

from lq.batches import check_batches, check_repeatable
from lq.comparison.kept import check_own
from lq.comparison.lab import Lab
from lq.comparison.making import Maker, TrainFunction
from lq.comparison.method import Method, default_methods
from lq.comparison.result import FLOAT, Comparison
from lq.export.targets import TARGETS
from lq.messages import suggest
from lq.spec import Recipe
from lq.surgery import quantizers
from lq.timing import check_sizes

LONGEST = 80
"""Characters of a method's name, which is that of a folder too."""


def compare(
    model: nn.Module,
    batches: Iterable[Any],
    held_out: Iterable[Any],
    test: Iterable[Any],
    methods: Mapping[str, Method] | None = None,
    folder: str | Path = "comparison",
    recipe: str | Path | Mapping[str, Any] | Recipe | None = None,
    target: str = "onnxruntime",
    train: TrainFunction | None = None,
    training: str = "",
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (0,),
    data: str = "",
    name: str = "",
    progress: bool = True,
) -> Comparison:
    """Quantize a model by several methods, and measure each on the same test samples.

    Every method's model is exported, proved to compute what torch computes, and measured in the
    engine; at the end all files are timed in turn, so that what else goes on in the machine comes
    upon all of them. A method that comes to nothing is a row that says why. Each row is kept in
    `folder` as soon as it is measured; of the same model, data and settings it is not done again.

    Args:
        model: The float model; it stays as it is.
        batches: Calibration batches, in an order that does not change.
        held_out: (input, target) pairs that repairs are judged by and searches choose by.
        test: (input, target) pairs to measure on, which nothing was chosen by.
        methods: Name -> method; ``default_methods`` of the target, if not given.
        folder: Where models, rows and the result are kept.
        recipe: The recipe of methods that name none; that of the target, if not given.
        target: What will run the models: ``onnxruntime``, ``openvino`` or ``tensorrt``.
        train: Trains a quantized model in place for some epochs (for methods of kind ``qat``), and
            returns a row of figures for each: ``train(model, epochs, folder)``.
        training: How `train` trains, in any words: others than before make it train again.
        batch_sizes: Sizes of the batches that are timed.
        threads: Numbers of threads they are timed with; 0 is the engine's own choice.
        data: Name of the data, for reports.
        name: Name of the model, for reports; its class's, if not given.
        progress: Show progress bars.

    Raises:
        ValueError: For an unknown target, a method named ``float``, or data that are empty or can
            be gone through only once.

    Example:
        >>> import tempfile
        >>> from lq.models import digits_cnn
        >>> _ = torch.manual_seed(0)
        >>> x = [(torch.randn(32, 1, 8, 8), torch.randint(10, (32,))) for _ in range(3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = compare(digits_cnn(), x[:1], x[1:2], x[2:], {"max": Method("ptq")}, folder,
        ...                     progress=False)
        >>> [row.name for row in found], found["max"].plan["0"]
        (['float', 'max'], 'int8')
    """
    if target not in TARGETS:
        raise ValueError(
            f"Expected `target` to be one of {', '.join(TARGETS)}, but got {target!r}; "
            f"{suggest(target, TARGETS)}"
        )
    check_sizes(batch_sizes, threads)
    for what, part in ("batches", batches), ("held_out", held_out), ("test", test):
        check_batches(part)
        check_repeatable(part, what)
        if isinstance(getattr(part, "sampler", None), RandomSampler):
            raise ValueError(f"Expected `{what}` in a fixed order, but its loader shuffles.")
        if next(iter(part), None) is None:
            raise ValueError(f"Expected `{what}` to hold at least one batch, but got none.")
    methods = default_methods(target, train is not None) if methods is None else methods
    _check_names(methods)
    if quantizers(model):
        raise ValueError("Expected a float model, but it has quantizers; call lq.dequantize.")
    folder = Path(folder)
    with torch.inference_mode(False):
        recipe = recipe or f"{target}_int8"
        maker = Maker(model, batches, held_out, recipe, target, train, progress)
        lab = Lab(maker, test, folder, training)
        for given in (FLOAT, *methods):
            check_own(lab.folder_of(given))
        rows = [lab.float_row()]
        for pair in tqdm(methods.items(), "Methods", leave=False, disable=not progress):
            rows.append(lab.row(*pair))
        if lab.deployment.is_timed:
            rows = lab.timed(rows, batch_sizes, threads)
        found = lab.result(rows, data, name or type(model).__name__)
    found.save(folder / "comparison.json")
    return found


def _check_names(names: Iterable[str]) -> None:
    """Raise a ``ValueError`` for a name that no folder can have, or that is taken."""
    for name in names:
        if name == FLOAT or not name.strip(".") or len(name) > LONGEST:
            raise ValueError(
                f"Expected another name for a method than {name[:LONGEST]!r}; rename it."
            )
