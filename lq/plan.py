"""A precision plan: which layer computes in which format."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from lq.export.graph import load_graph
from lq.export.plan import read_layers
from lq.files import write_text
from lq.formats import layer_format, layer_formats
from lq.spec import FLOAT_LAYER, LayerSpec, Recipe
from lq.surgery import quantizable_layers


class PrecisionPlan(Mapping[str, str]):
    """Layers by qualified name, and the format of each; it cannot be changed.

    A format is ``int8``, ``fp8_e4m3``, ``fp16``, ``bf16`` or ``fp32``; ``int4`` for int4 weights
    with float inputs; or two as ``weights/inputs``. Two plans are equal if their layers have the
    same formats, in whatever order.

    Args:
        formats: Layer -> format.

    Raises:
        ValueError: For an unknown format, naming the nearest.

    Example:
        >>> plan = PrecisionPlan({"conv": "int8", "fc": "fp16"})
        >>> plan["fc"], plan
        ('fp16', PrecisionPlan(1 int8, 1 fp16))
    """

    def __init__(self, formats: Mapping[str, str]) -> None:
        self._formats = {
            str(name): layer_format(*layer_formats(format)) for name, format in formats.items()
        }

    def __getitem__(self, layer: str) -> str:
        return self._formats[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._formats)

    def __len__(self) -> int:
        return len(self._formats)

    def __hash__(self) -> int:
        return hash(frozenset(self._formats.items()))

    def __repr__(self) -> str:
        counts = Counter(self.values()).most_common()
        return f"{type(self).__name__}({', '.join(f'{n} {name}' for name, n in counts)})"

    def changed(self, formats: Mapping[str, str]) -> PrecisionPlan:
        """Return the plan with other formats for some layers."""
        return PrecisionPlan({**self._formats, **formats})

    @classmethod
    def of(cls, model: nn.Module | str | Path) -> PrecisionPlan:
        """Return the plan that a model follows, or that the graph in an ``.onnx`` file holds.

        Example:
            >>> import lq
            >>> model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
            >>> recipe = {"rules": [{"name": "1", "format": "skip"}]}
            >>> dict(PrecisionPlan.of(lq.quantize(model, recipe)))
            {'0': 'int8', '1': 'fp32'}
        """
        if not isinstance(model, nn.Module):
            return cls(read_layers(load_graph(model)))
        return cls({name: _format(layer) for name, layer in quantizable_layers(model)[0].items()})

    @classmethod
    def from_yaml(cls, path: str | Path) -> PrecisionPlan:
        """Return the plan in a YAML file, whatever the recipe in it says besides."""
        Recipe.from_yaml(path)  # which says what is wrong with a file
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        if values.get("plan") is None:
            raise ValueError(f"Expected {str(path)!r} to hold a `plan`, but it is another recipe.")
        return cls(values["plan"])

    def to_yaml(self, path: str | Path, base: Recipe | str | Path = "tensorrt_int8") -> None:
        """Write the plan to a YAML file that stands wherever a recipe does.

        Args:
            path: The file.
            base: What layers not in the plan get, and which additions and pooling are quantized;
                kept in the file.
        """
        default = Recipe().to_dict()
        rest = {k: v for k, v in Recipe.parse(base).to_dict().items() if v != default[k]}
        text = yaml.safe_dump({**rest, "plan": self._formats}, sort_keys=False)
        write_text(path, text)


def _format(layer: Any) -> str:
    spec: LayerSpec = getattr(layer, "layer_spec", FLOAT_LAYER)
    return layer_format(spec.weights.format, spec.inputs.format)
