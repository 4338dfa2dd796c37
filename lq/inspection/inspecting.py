"""Say what a file holds, whatever kind of file it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lq.inspection.checkpoint import inspect_checkpoint
from lq.inspection.graph import inspect_engine, inspect_graph
from lq.inspection.result import Inspection
from lq.inspection.text import inspect_json, inspect_yaml

_READERS: dict[str, Callable[[Path], Inspection]] = {
    **dict.fromkeys((".ckpt", ".pth", ".pt", ".safetensors"), inspect_checkpoint),
    ".onnx": inspect_graph,
    ".engine": inspect_engine,
    **dict.fromkeys((".yaml", ".yml"), inspect_yaml),
    ".json": inspect_json,
}


def inspect(path: str | Path) -> Inspection:
    """Say which formats, ranges and sizes a file holds, and what in it is not calibrated.

    Checkpoints and weights (``.ckpt``, ``.pth``, ``.pt``, ``.safetensors``), ONNX files of any
    tool, engines by the sidecar beside them, recipes and plans (``.yaml``), sweeps, ranges and
    comparisons (``.json``). Nothing in the file is executed, and no model is built: of a
    checkpoint, the kinds of layers are told from the shapes of their weights.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or of no kind that is known.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "recipe.yaml"
        ...     _ = path.write_text("{inputs: fp16, weights: fp16}")
        ...     inspect(path).facts["inputs"]
        'fp16'
    """
    path = Path(path)
    if not path.is_file():
        what = "a directory" if path.is_dir() else "no file"
        raise FileNotFoundError(f"Expected a file at {str(path)!r}, but there is {what}.")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise ValueError(
            f"Expected a file that ends in {', '.join(_READERS)}, but got {str(path)!r}."
        )
    return reader(path)
