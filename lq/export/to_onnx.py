"""Write a model as an ONNX graph with Q/DQ, and prove that it computes what torch computes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnxscript import opset18 as op
from torch import nn

from lq.batches import model_inputs
from lq.export import passes
from lq.export.computed import store_computed_weights
from lq.export.onnxruntime_encoding import ENCODINGS
from lq.export.shapes import check_image_varies, check_other_image, dynamic_shapes, two_or_more
from lq.export.shared import name_shared_quantizers
from lq.export.targets import check_target
from lq.files import written_whole
from lq.functional import FP8_MAX
from lq.modes import eval_mode, quantizer_mode
from lq.quantizer import Mode
from lq.surgery import quantized_layers, quantizers

if TYPE_CHECKING:
    from lq.parity import ParityReport

log = logging.getLogger(__name__)
OPSET = 18
OPSETS = {"fp8_e4m3": 19, "int4": 21, "bf16": 22}
"""The first opset whose QuantizeLinear, or for bf16 whose Conv, takes a format, if not 18."""
CODES = {127: np.int8, 255: np.uint8, 7: ml_dtypes.int4, FP8_MAX: ml_dtypes.float8_e4m3fn}
"""Largest code -> how codes are stored."""


def export_onnx(
    model: nn.Module,
    sample: Any,
    path: str | Path,
    target: str = "tensorrt",
    batches: Iterable[Any] | None = None,
    dynamic_batch: bool = True,
    dynamic_image: bool = False,
) -> ParityReport:
    """Export a model to ONNX and check the file against it on real data.

    Quantized layers become QuantizeLinear/DequantizeLinear with weights stored as integers and
    BatchNorm folded into the weight scales; fp16 and bf16 layers become casts. The opset is 18;
    where a layer is fp8 19, int4 21, bf16 22. The model may be on any device and in any mode, and
    is left as it was.

    Args:
        model: A quantized and calibrated model, or a float one.
        sample: One batch: a tensor, an (input, target) pair, or a mapping of keyword arguments.
        path: Where to write the file. A failed export leaves none.
        target: What will run it: ``"tensorrt"``, or ``"openvino"`` or ``"onnxruntime"``, for which
            the same integers are encoded as their CPU kernels want.
        batches: Batches for the parity check; the sample if not given.
        dynamic_batch: Let the first axis of all inputs vary.
        dynamic_image: Let height and width, the third and fourth axis of all images, vary.

    Returns:
        How far the file agrees with the model (see ``lq.parity``).

    Raises:
        ValueError: If the target cannot run a layer's format, naming the layer.
        RuntimeError: If a quantizer is not calibrated, or file and model disagree.
    """
    from lq.parity import compare  # the one import upwards: an export proves itself

    check_target(model, target)
    _check_float32(model)
    with written_whole(path) as temporary:
        graph = trace(model, sample, dynamic_batch, dynamic_image)
        if target in ENCODINGS:
            ENCODINGS[target](graph.graph)
        ir.save(graph, temporary)
        onnx.checker.check_model(str(temporary), full_check=True)
        report = compare(model, temporary, [sample] if batches is None else batches)
        if not report.passed or (target == "onnxruntime" and not report.fused_passed):
            raise RuntimeError(
                f"The export differs from the model, so {str(path)!r} was not written: "
                f"{report.summary()}."
            )
    log.info("Exported %s: %s", path, report.summary())
    return report


def trace(
    model: nn.Module, sample: Any, dynamic_batch: bool = True, dynamic_image: bool = False
) -> ir.Model:
    """Return a model as an ONNX graph with integer weights and readable names.

    Raises:
        ValueError: If height and width are to vary and the model fixes them.
    """
    args, kwargs = model_inputs(model, sample)
    if dynamic_batch:
        args = tuple(two_or_more(x) for x in args)
        kwargs = {name: two_or_more(x) for name, x in kwargs.items()}
    with eval_mode(model), quantizer_mode(model, Mode.QUANTIZE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(*args, **kwargs)  # says what is wrong in one line, where an exporter says it in fifty
        if dynamic_image:
            check_other_image(model, args, kwargs)
        program = torch.onnx.export(
            model,
            args,
            kwargs=kwargs,
            dynamo=True,
            optimize=False,  # also fuses layers, which would lose their names
            verbose=False,
            opset_version=_opset(model),
            dynamic_shapes=dynamic_shapes(args, kwargs, dynamic_batch, dynamic_image),
            custom_translation_table={torch.ops.lq.fake_quantize.default: _quantize_dequantize},
        )
        assert program is not None
        name_shared_quantizers(program.model.graph, model)
        store_computed_weights(program.model.graph, model)
    if dynamic_image:
        check_image_varies(program.model.graph)
    _rewrite(program.model)
    return program.model


def _rewrite(model: ir.Model) -> None:
    """Turn what the exporter wrote into the graph an engine wants; nothing changes a result."""
    graph = model.graph
    passes.number_calls(graph)
    # Before constants are folded: not every folder rounds to bfloat16 or knows the narrow range.
    passes.fold_weight_casts(graph)
    passes.store_integer_weights(graph)
    passes.tidy(model)
    passes.store_integer_weights(graph)  # and those that folding made constant
    passes.fold_batchnorm(graph)
    passes.fix_reshapes(graph)
    passes.delay_upcasts(graph)
    passes.cancel_casts(graph)
    passes.move_quantize_up(graph)
    passes.remove_requantization(graph)
    passes.remove_unused(graph)
    passes.mark_outputs(graph)
    passes.name_after_modules(graph)
    passes.clear_metadata(graph)


def _quantize_dequantize(
    x: Any, scale: Any, qmin: float, qmax: float, axis: int | None = None, offset: Any = None
) -> Any:
    """Write ``lq::fake_quantize`` as QuantizeLinear and DequantizeLinear."""
    shape = () if axis is None else (scale.shape[0],)
    zero_point = op.Constant(value=ir.tensor(np.zeros(shape, CODES[qmax])))
    if offset is not None:  # of constants, so it is folded to one
        low, high = (op.Constant(value=ir.tensor(np.float32(bound))) for bound in (qmin, qmax))
        code = op.Round(op.Sub(low, op.Div(offset, scale)))
        zero_point = op.Cast(op.Clip(code, low, high), to=ir.DataType.UINT8)
    along = {} if axis is None else {"axis": axis}
    codes = op.QuantizeLinear(x, scale, zero_point, **along)
    return op.DequantizeLinear(codes, scale, zero_point, **along)


def _check_float32(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            raise ValueError(
                f"Expected a float32 model, but {name!r} is {parameter.dtype}; call model.float(), "
                "and choose 16-bit layers with the recipe."
            )


def _opset(model: nn.Module) -> int:
    specs = (layer.layer_spec for layer in quantized_layers(model).values())
    formats = {part.format for spec in specs for part in (spec.weights, spec.inputs)}
    formats |= {quantizer.spec.format for quantizer in quantizers(model).values()}
    return max([OPSET, *(OPSETS[name] for name in formats if name in OPSETS)])
