"""BatchNorm statistics of the quantized model instead of the float one's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from lq.batches import model_inputs
from lq.modes import eval_mode
from lq.repairs.norms import live_norms
from lq.repairs.running import check_ready


@contextmanager
def _cumulative(norms: Iterable[_BatchNorm]) -> Iterator[None]:
    """Let norms average the statistics of all batches for a while, each with the same weight."""
    momenta = {norm: norm.momentum for norm in norms}
    for norm in momenta:
        norm.reset_running_stats()
        norm.momentum = None
        norm.training = True
    try:
        yield
    finally:
        for norm, momentum in momenta.items():
            norm.momentum = momentum


def reestimate_batchnorm(
    model: nn.Module, batches: Iterable[Any], progress: bool = True
) -> dict[str, str]:
    """Replace the running statistics of all BatchNorm layers by those under quantization.

    ``running_mean = mean of batch means``, ``running_var = mean of batch variances``

    It corrects the mean of each channel and its gain too; but the statistics are those of a few
    batches instead of the whole training, so it pays where quantization moved them far (few bits)
    and may cost elsewhere. If a batch fails, the statistics are as they were.

    Args:
        model: A calibrated model.
        batches: Batches as ``calibrate`` takes them, of at least a few dozen samples.
        progress: Show a progress bar.

    Returns:
        Which layers were left alone, and why: none.

    Raises:
        ValueError: If `batches` is empty, or the model has no BatchNorm with statistics.
        RuntimeError: If the model is not calibrated.

    Source: Sun et al., "Hybrid 8-bit Floating Point Training and Inference for Deep Neural
    Networks", 2019, section 3.1, "BN re-tuning".
    """
    check_ready(model)
    norms = live_norms(model)
    if not norms:
        raise ValueError(
            "Expected a model with BatchNorm layers that keep statistics, but found none; "
            "leave the batchnorm repair out."
        )
    before = {n: {k: b.clone() for k, b in m.named_buffers()} for n, m in norms.items()}
    count = 0
    try:
        with eval_mode(model), _cumulative(norms.values()):
            for batch in tqdm(batches, "Re-estimating", disable=not progress, leave=False):
                args, kwargs = model_inputs(model, batch)
                model(*args, **kwargs)
                count += 1
        if count == 0:
            raise ValueError("Expected `batches` to hold at least one batch, but got none.")
    except BaseException:
        for name, buffers in before.items():
            for key, value in buffers.items():
                norms[name].get_buffer(key).copy_(value)
        raise
    for name, buffers in before.items():  # a count of batches trained on, which these were not
        norms[name].get_buffer("num_batches_tracked").copy_(buffers["num_batches_tracked"])
    return {}
