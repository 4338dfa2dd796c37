"""What an engine says of its layers, in the words of each version."""

import json

import pytest

from lq.export.inspector import (
    BuiltLayer,
    built_formats,
    fused,
    parse_build_log,
    parse_inspector,
)

# Reconstructed from the TensorRT documentation ("Engine Inspector" of 10.x, "Migrating
# IEngineInspector Usage from TensorRT 10.x to 11.x"): no engine printed them.
METADATA = "[ONNX Layer: conv1]\u001e[ONNX Layer: relu]\u001e[ONNX Layer: conv1.input_quantizer]"
INT8 = "Thirty-two wide channel vectorized row major Int8 format"
FP16 = "Channel major FP16 format where channel % 8 == 0"
VERSION_10 = {
    "Layers": [
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to fc",
            "LayerType": "Reformat",
            "Inputs": [{"Name": "x", "Dimensions": [1, 8], "Format/Datatype": FP16}],
            "Outputs": [{"Name": "y", "Format/Datatype": "Row major linear FP32"}],
            "TacticValue": "0x00000000000003ea",
            "Metadata": "",
        },
        {
            "Name": "conv1 + relu",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Format/Datatype": INT8}],
            "Outputs": [{"Name": "y", "Format/Datatype": INT8}],
            "Metadata": METADATA,
        },
        {
            "Name": "fc",
            "LayerType": "CaskGemmMatrixMultiply",
            "Inputs": [{"Name": "y", "Format/Datatype": "Row major linear FP32"}],
            "Outputs": [{"Name": "z", "Format/Datatype": "N/A due to dynamic shapes"}],
            "Metadata": "[ONNX Layer: fc]",
        },
    ],
    "Bindings": ["x", "z"],
}
VERSION_11 = {
    "Layers": [
        {
            "Name": "conv1 + relu",
            "LayerType": "CaskConvolution",
            "Inputs": [{"Name": "x", "Format": "Channel major format", "Datatype": "Int8"}],
            "Outputs": [{"Name": "y", "Format": "Channel major format", "DataType": "Int8"}],
            "Metadata": METADATA,
        },
        {
            "Name": "fc",
            "LayerType": "gemm",
            "Inputs": [{"Name": "y", "Format": "Row major linear format", "Datatype": "Half"}],
            "Outputs": [{"Name": "z", "Format": "Row major linear format", "Datatype": "Float"}],
            "Metadata": "[ONNX Layer: fc]",
        },
    ],
    "I/O Tensors": [{"Name": "x", "IOMode": "Input", "DataType": "Float", "Location": "Device"}],
}
ONNX = ("conv1", "relu", "conv1.input_quantizer")


def test_version_10() -> None:
    reformat, conv, fc = parse_inspector(json.dumps(VERSION_10))
    assert not reformat.multiplies
    assert conv == BuiltLayer("conv1 + relu", "CaskConvolution", ("int8",), ("int8",), ONNX)
    assert (fc.inputs, fc.outputs) == (("fp32",), ("?",))
    assert (reformat.inputs, reformat.outputs) == (("fp16",), ("fp32",))


def test_version_11() -> None:
    conv, fc = parse_inspector(json.dumps(VERSION_11))
    assert conv == BuiltLayer("conv1 + relu", "CaskConvolution", ("int8",), ("int8",), ONNX)
    assert (fc.inputs, fc.outputs) == (("fp16",), ("fp32",))


@pytest.mark.parametrize("version", [VERSION_10, VERSION_11], ids=["10", "11"])
def test_formats_and_fusion(version) -> None:
    layers = parse_inspector(json.dumps(version))
    formats = built_formats(layers, ["conv1", "fc", "gone"])
    assert formats["conv1"] == "int8"
    assert formats["gone"] == "?"
    assert fused(layers) == [list(ONNX)]


def test_names_alone() -> None:
    """What an engine built with the default verbosity has."""
    (layer,) = parse_inspector(json.dumps({"Layers": ["conv1 + relu"], "Bindings": ["x"]}))
    assert layer.onnx == ("conv1", "relu")
    assert built_formats([layer], ["conv1"]) == {"conv1": "?"}


def test_log_without_layers() -> None:
    assert parse_build_log("Layers:\n\nI/O Tensors:\n Name: x, IOMode: Input") == []
