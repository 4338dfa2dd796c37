"""Write a model as an ONNX graph with Q/DQ, and prove that it computes what torch computes."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import opset18 as op
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn

from lq.calibration import eval_mode, model_inputs, quantizer_mode
from lq.export import passes
from lq.export.shared import name_shared_quantizers
from lq.export.targets import check_target
from lq.files import written_whole
from lq.functional import FP8_MAX
from lq.quantizer import Mode
from lq.surgery import quantized_layers

if TYPE_CHECKING:
    from lq.parity import ParityReport

log = logging.getLogger(__name__)
OPSET = 18
BF16_OPSET = 22
"""The first opset whose Conv takes bfloat16."""


def export_onnx(
    model: nn.Module,
    sample: Any,
    path: str | Path,
    target: str = "tensorrt",
    batches: Iterable[Any] | None = None,
    dynamic_batch: bool = True,
) -> ParityReport:
    """Export a model to ONNX and check the file against it on real data.

    Quantized layers become QuantizeLinear/DequantizeLinear with weights stored as integers and
    BatchNorm folded into the weight scales; fp16 and bf16 layers become casts. The opset is 18,
    or 22 where a layer is bf16. The model may be on any device and in any mode, and is left as it
    was.

    Args:
        model: A quantized and calibrated model, or a float one.
        sample: One batch: a tensor, an (input, target) pair, or a mapping of keyword arguments.
        path: Where to write the file. A failed export leaves none.
        target: What will run it: ``"tensorrt"``.
        batches: Batches for the parity check; the sample if not given.
        dynamic_batch: Let the first axis of all inputs vary.

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
        graph = trace(model, sample, dynamic_batch)
        ir.save(graph, temporary)
        onnx.checker.check_model(str(temporary), full_check=True)
        report = compare(model, temporary, [sample] if batches is None else batches)
        if not report.passed:
            raise RuntimeError(
                f"The export differs from the model, so {str(path)!r} was not written: "
                f"{report.summary()}."
            )
    log.info("Exported %s: %s", path, report.summary())
    return report


def trace(model: nn.Module, sample: Any, dynamic_batch: bool = True) -> ir.Model:
    """Return a model as an ONNX graph with integer weights and readable names."""
    args, kwargs = model_inputs(model, sample)
    if dynamic_batch:
        args = tuple(_two_or_more(x) for x in args)
        kwargs = {name: _two_or_more(x) for name, x in kwargs.items()}
    with eval_mode(model), quantizer_mode(model, Mode.QUANTIZE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(*args, **kwargs)  # says what is wrong in one line, where an exporter says it in fifty
        program = torch.onnx.export(
            model,
            args,
            kwargs=kwargs,
            dynamo=True,
            optimize=False,  # also fuses layers, which would lose their names
            verbose=False,
            opset_version=BF16_OPSET if _has_bf16(model) else OPSET,
            dynamic_shapes=_dynamic_shapes(args, kwargs) if dynamic_batch else None,
            custom_translation_table={torch.ops.lq.fake_quantize.default: _quantize_dequantize},
        )
    assert program is not None
    graph = program.model.graph
    name_shared_quantizers(graph, model)
    passes.number_calls(graph)
    # Before constants are folded: not every folder rounds to bfloat16 or knows the narrow range.
    passes.fold_weight_casts(graph)
    passes.store_integer_weights(graph)
    _tidy(program.model)
    passes.store_integer_weights(graph)  # and those that folding made constant
    passes.fold_batchnorm(graph)
    passes.remove_unused(graph)
    passes.mark_outputs(graph)
    passes.name_after_modules(graph)
    passes.clear_metadata(graph)
    return program.model


def _tidy(model: ir.Model) -> None:
    """Fold constants, share what is equal, drop what is unused."""
    fold_constants(model)
    ir.passes.Sequential(
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedOpsetsPass(),
    )(model)


def _quantize_dequantize(
    x: Any, scale: Any, qmin: float, qmax: float, axis: int | None = None
) -> Any:
    """Write ``lq::fake_quantize`` as QuantizeLinear and DequantizeLinear."""
    dtype = np.int8 if qmin < 0 else np.uint8
    assert qmax != FP8_MAX
    shape = () if axis is None else (scale.shape[0],)
    zero_point = op.Constant(value=ir.tensor(np.zeros(shape, dtype)))
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


def _has_bf16(model: nn.Module) -> bool:
    specs = (layer.layer_spec.inputs for layer in quantized_layers(model).values())
    return any(spec.format == "bf16" for spec in specs)


def _two_or_more(x: Any) -> Any:
    """Repeat a batch of one: the exporter takes a size of one for a constant."""
    return torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() and x.shape[0] == 1 else x


def _dynamic_shapes(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    batch = torch.export.Dim("batch")

    def shape(x: Any) -> dict[int, Any] | None:
        return {0: batch} if isinstance(x, Tensor) and x.dim() else None

    if kwargs:
        return {name: shape(x) for name, x in kwargs.items()}
    return tuple(shape(x) for x in args)
