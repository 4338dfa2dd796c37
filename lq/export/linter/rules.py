"""The table of rules. A new rule is a function and a row here."""

from __future__ import annotations

from lq.export import passes
from lq.export.linter import placement_rules, target_rules, weight_rules
from lq.export.linter.finding import Rule

RULES: dict[str, Rule] = {
    "residual": Rule(
        placement_rules.residual,
        "quantize the shortcut before the Add, with the scale of the tensor it forks from, or both "
        "inputs (recipe: `residual: shortcut` for TensorRT, `residual: both` for CPU engines)",
    ),
    "concat": Rule(
        placement_rules.concat,
        "quantize all inputs of the Concat, with one scale",
        lambda model, target: passes.move_quantize_up(model.graph),
    ),
    "concat-scale": Rule(
        placement_rules.concat_scale, "give all inputs of the Concat one quantizer"
    ),
    "extra-pair": Rule(
        placement_rules.extra_pair,
        "remove the pair",
        lambda model, target: passes.remove_requantization(
            model.graph, placement_rules.PAIRS_BEHIND.get(target, ())
        ),
    ),
    "requantized": Rule(placement_rules.requantized, "give both places one scale, or drop one"),
    "two-scales": Rule(placement_rules.two_scales, "let all readers share one quantizer"),
    "before-activation": Rule(
        placement_rules.before_activation,
        "quantize behind the activation",
        lambda model, target: passes.move_activations_before_quantize(model.graph),
    ),
    "after-pad": Rule(
        placement_rules.after_pad,
        "quantize before the Pad",
        lambda model, target: passes.move_quantize_up(model.graph),
    ),
    "float-island": Rule(
        placement_rules.float_island, "quantize its neighbours too, or leave it float"
    ),
    "weight-axis": Rule(
        weight_rules.axis, "give each output channel a scale (axis 1 of ConvTranspose, 0 of Conv)"
    ),
    "per-tensor-weights": Rule(
        weight_rules.per_tensor, "quantize weights per output channel, which costs no time"
    ),
    "float-weights": Rule(
        weight_rules.float_weights,
        "store the codes",
        lambda model, target: passes.store_integer_weights(model.graph, narrow=False),
    ),
    "quantized-bias": Rule(
        weight_rules.quantized_bias,
        "store the bias in float",
        lambda model, target: passes.fold_biases(model.graph),
    ),
    "small-gemm": Rule(weight_rules.small_gemm, "leave the layer in fp16, where it is no slower"),
    "zero-point": Rule(
        target_rules.zero_point, "quantize symmetrically, to signed integers with zero-point 0"
    ),
    "format": Rule(target_rules.formats, "choose a format that the target computes with"),
}
"""Name -> rule, in the order in which rewrites are applied."""
