"""What each target can run, checked before any work is lost."""

from __future__ import annotations

from torch import nn

from lq.spec import QuantSpec
from lq.surgery import quantized_layers

TARGETS: dict[str, frozenset[str]] = {
    "tensorrt": frozenset({"int8", "fp16", "bf16", "fp32"}),
    "onnxruntime": frozenset({"int8", "fp16", "bf16", "fp32"}),
    "openvino": frozenset({"int8", "fp32"}),
}
"""Target -> formats of weights and inputs it runs. A new target is a row here."""


def check_target(model: nn.Module, target: str) -> None:
    """Raise a ``ValueError`` naming the first layer whose format a target cannot run."""
    if target not in TARGETS:
        raise ValueError(
            f"Expected `target` to be one of {', '.join(TARGETS)}, but got {target!r}."
        )
    for name, layer in quantized_layers(model).items():
        for part, spec in (
            ("weights", layer.layer_spec.weights),
            ("inputs", layer.layer_spec.inputs),
        ):
            reason = _refusal(spec, target)
            if reason:
                raise ValueError(
                    f"{target} cannot run layer {name!r}: its {part} are {reason}. Give it another "
                    f"format with a recipe rule (name: {name!r})."
                )


def _refusal(spec: QuantSpec, target: str) -> str | None:
    if spec.format not in TARGETS[target]:
        return f"{spec.format}, and it runs {', '.join(sorted(TARGETS[target]))}"
    if not spec.signed:
        return "unsigned, and it runs signed integers with zero-point 0"
    return None
