"""Passes over an exported graph, each one idea; they change the graph in place."""

from lq.export.graph import WEIGHTED, constant, producer
from lq.export.passes.batchnorm import fold_batchnorm
from lq.export.passes.casts import cancel_casts, delay_upcasts, fold_weight_casts
from lq.export.passes.cleanup import fix_reshapes, remove_unused, share_equal, tidy
from lq.export.passes.motion import (
    move_activations_before_quantize,
    move_quantize_up,
    remove_requantization,
)
from lq.export.passes.naming import (
    OUTPUT_OF,
    QUANTIZED_BY,
    clear_metadata,
    mark_outputs,
    name_after_modules,
    number_calls,
)
from lq.export.passes.weights import fold_biases, store_integer_weights

__all__ = [
    "OUTPUT_OF",
    "QUANTIZED_BY",
    "WEIGHTED",
    "cancel_casts",
    "clear_metadata",
    "constant",
    "delay_upcasts",
    "fix_reshapes",
    "fold_batchnorm",
    "fold_biases",
    "fold_weight_casts",
    "mark_outputs",
    "move_activations_before_quantize",
    "move_quantize_up",
    "name_after_modules",
    "number_calls",
    "producer",
    "remove_requantization",
    "remove_unused",
    "share_equal",
    "store_integer_weights",
    "tidy",
]
