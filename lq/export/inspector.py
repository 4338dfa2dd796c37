"""Read which kernels an engine is made of, from the inspector's JSON or the build log."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_FORMATS = {
    "float": "fp32",
    "fp32": "fp32",
    "half": "fp16",
    "fp16": "fp16",
    "bf16": "bf16",
    "bfloat16": "bf16",
    "int8": "int8",
    "fp8": "fp8_e4m3",
    "int4": "int4",
}
_TYPE = re.compile(r"\b(float|fp32|half|fp16|bf16|bfloat16|int8|fp8|int4)\b", re.IGNORECASE)
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_MULTIPLIES = re.compile(r"conv|correlation|gemm|matrix|matmul|fully", re.IGNORECASE)


@dataclass(frozen=True)
class BuiltLayer:
    """One layer of an engine: what runs as one kernel, or a few.

    Attributes:
        name: Its name in the engine.
        kind: What the engine calls its kind: ``CaskConvolution``, ``gemm``, ``kgen``.
        inputs: Formats of its inputs, ``"?"`` where the engine does not say.
        outputs: Formats of its outputs.
        onnx: Names of the ONNX nodes that it computes.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    onnx: tuple[str, ...]

    @property
    def multiplies(self) -> bool:
        """Whether it is a convolution or a matrix product."""
        return bool(_MULTIPLIES.search(self.kind))


def parse_inspector(text: str) -> list[BuiltLayer]:
    """Return the layers in the inspector's JSON, of TensorRT 10 or 11.

    TensorRT 11 split a tensor's ``Format/Datatype`` into two fields, and replaced ``Bindings`` by
    ``I/O Tensors``, which are not layers. An engine built without detail has names only.

    Example:
        >>> tensor = '[{"Name": "x", "Format/Datatype": "Row major linear FP16 format"}]'
        >>> layer = f'{{"Name": "fc", "LayerType": "gemm", "Inputs": {tensor}, "Outputs": []}}'
        >>> parse_inspector(f'{{"Layers": [{layer}], "Bindings": ["x"]}}')[0].inputs
        ('fp16',)
    """
    return [_layer(layer) for layer in json.loads(text)["Layers"]]


def _layer(layer: Mapping[str, Any] | str) -> BuiltLayer:
    if isinstance(layer, str):
        return BuiltLayer(layer, "?", (), (), tuple(layer.split(" + ")))
    inputs, outputs = (
        tuple(_format(_datatype(tensor)) for tensor in layer.get(side, ()))
        for side in ("Inputs", "Outputs")
    )
    onnx = _ONNX.findall(layer.get("Metadata") or "")
    return BuiltLayer(layer["Name"], layer.get("LayerType", "?"), inputs, outputs, tuple(onnx))


def _datatype(tensor: Mapping[str, Any]) -> str:
    keys = ("Datatype", "DataType", "Format/Datatype")
    return str(next((tensor[key] for key in keys if key in tensor), ""))


def _format(text: str) -> str:
    found = _TYPE.search(text)
    return _FORMATS[found[1].lower()] if found else "?"


_LOG_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: .*?\], )?Outputs: \[(?P<outputs>.*?)\], TacticName:.*?Metadata: ?(?P<onnx>.*)$",
    re.MULTILINE,
)


def parse_build_log(text: str) -> list[BuiltLayer]:
    """Return the layers that a builder's verbose log lists, one a line.

    The log needs no GPU, which the inspector does.
    """
    return [
        BuiltLayer(
            line["name"],
            line["kind"],
            _log_formats(line["inputs"]),
            _log_formats(line["outputs"]),
            tuple(_ONNX.findall(line["onnx"])),
        )
        for line in _LOG_LAYER.finditer(text)
    ]


def _log_formats(tensors: str) -> tuple[str, ...]:
    return tuple(_format(found) for found in re.findall(r"Datatype: (\w+)", tensors))


def built_formats(layers: Iterable[BuiltLayer], names: Iterable[str]) -> dict[str, str]:
    """Return in which format each ONNX node multiplies in an engine.

    It is the format of the input of the convolution or matrix product that computes the node, and
    ``"?"`` where no single kernel is said to.
    """
    multiply = [layer for layer in layers if layer.multiplies]
    found = {}
    for name in names:
        formats = {layer.inputs[0] for layer in multiply if name in layer.onnx and layer.inputs}
        found[name] = formats.pop() if len(formats) == 1 else "?"
    return found


def fused(layers: Iterable[BuiltLayer]) -> list[list[str]]:
    """Return the groups of ONNX nodes that an engine computes in one kernel."""
    return [list(layer.onnx) for layer in layers if len(layer.onnx) > 1]
