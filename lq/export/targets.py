"""What each target can run, checked before any work is lost."""

from __future__ import annotations

from torch import nn

from lq.sites import QuantSites
from lq.spec import LayerSpec, QuantSpec
from lq.surgery import quantized_layers, quantizers

TARGETS: dict[str, frozenset[str]] = {
    "tensorrt": frozenset({"int8", "int4", "fp8_e4m3", "fp16", "bf16", "fp32"}),
    "onnxruntime": frozenset({"int8", "int4", "fp16", "bf16", "fp32"}),
    "openvino": frozenset({"int8", "fp32"}),
}
"""Target -> formats it runs. A new target is a row here."""
UNSIGNED = frozenset({"onnxruntime", "openvino"})
"""Targets that run inputs without a sign."""
STORED_ONLY = frozenset({"int4"})
"""Formats of weights that are dequantized before they are multiplied."""


def check_target(model: nn.Module, target: str) -> None:
    """Raise a ``ValueError`` naming the first layer or quantizer that a target cannot run as is."""
    if target not in TARGETS:
        raise ValueError(
            f"Expected `target` to be one of {', '.join(TARGETS)}, but got {target!r}."
        )
    for name, quantizer in quantizers(model).items():
        if quantizer.grid is not quantizer.spec:
            raise ValueError(
                f"Expected quantizer {name!r} to have the bits of its format, "
                f"{quantizer.spec.format}, but it has {quantizer.bits} for now: progressive bits "
                "have not come to their end; export after training."
            )
    for name, layer in quantized_layers(model).items():
        spec = layer.layer_spec
        for part, reason in (
            ("weights", _refusal(spec.weights, target) or _mixture(spec)),
            ("inputs", _refusal(layer.input_quantizer.spec, target, UNSIGNED)),
        ):
            if reason:
                raise ValueError(
                    f"{target} cannot run layer {name!r}: its {part} are {reason}. Give it another "
                    f"format with a recipe rule (name: {name!r})."
                )
    for name, placed in _placed(model).items():
        reason = _refusal(placed, target, UNSIGNED)
        if placed.format in STORED_ONLY:
            reason = f"{placed.format}, a format for weights alone"
        if reason:
            raise ValueError(
                f"{target} cannot run quantizer {name!r}: it is {reason}. Give its module another "
                "format with a recipe rule."
            )


def _placed(model: nn.Module) -> dict[str, QuantSpec]:
    """Return the specs of the quantizers that are no layer's, such as those of additions."""
    return {
        f"{name}.{slot}".lstrip("."): getattr(module, slot).spec
        for name, module in model.named_modules()
        if isinstance(module, QuantSites)
        for slot in module.quantizer_slots
    }


def _refusal(spec: QuantSpec, target: str, unsigned: frozenset[str] = frozenset()) -> str | None:
    if spec.format not in TARGETS[target]:
        return f"{spec.format}, and it runs {', '.join(sorted(TARGETS[target]))}"
    if spec.qmin == 0 and target not in unsigned:
        kind = "unsigned" if spec.symmetric else "asymmetric"
        return f"{kind}, and it runs signed integers with zero-point 0"
    return None


def _mixture(spec: LayerSpec) -> str | None:
    weights, inputs = spec.weights.format, spec.inputs.format
    if (weights == inputs and weights not in STORED_ONLY) or not spec.inputs.needs_scale:
        return None
    if inputs in STORED_ONLY:
        return f"{weights} and its inputs {inputs}, a format for weights alone"
    return f"{weights} and its inputs {inputs}, which are not multiplied with each other"
