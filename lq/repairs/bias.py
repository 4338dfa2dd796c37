"""Bias correction: take the mean error out of each output channel."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm.auto import tqdm

from lq.layers import QuantLayer
from lq.repairs.norms import following_norms
from lq.repairs.running import bypassed_copy, check_ready, hooks, outputs
from lq.surgery import quantized_layers


def channel_mean(layer: nn.Module, output: Tensor) -> Tensor:
    """Return the mean of each output channel of a layer, ``[C]``."""
    axis = -1 - len(getattr(layer, "kernel_size", ()))  # of a Linear the last
    return output.detach().float().movedim(axis, 0).flatten(1).mean(1)


def shift(layer: QuantLayer, norm: _BatchNorm | None, by: Tensor) -> None:
    """Add a constant to each output channel of a layer, in its bias or in the BatchNorm after it.

    ``bias += by``, or where there is none, ``running_mean -= by``
    """
    bias: Any = layer.bias
    if bias is not None:
        bias.data += by.to(bias.dtype)
    elif norm is not None and norm.running_mean is not None:
        norm.running_mean -= by.to(norm.running_mean.dtype)


class _Correction:
    """Corrects each layer's output within a pass, and adds up what that took.

    A layer that is shown a batch sees the layers before it corrected on that batch, so one pass
    corrects all of them in sequence without keeping activations.
    """

    def __init__(self, layers: dict[str, QuantLayer]) -> None:
        self.layers = layers
        self.wanted: dict[str, Tensor] = {}
        self.errors: dict[str, Tensor] = {}
        self.batches = 0

    def want(self, name: str, layer: nn.Module, _args: Any, output: Tensor) -> None:
        """Note the means that the float model has on this batch."""
        self.wanted[name] = channel_mean(layer, output)

    def correct(self, name: str, layer: nn.Module, _args: Any, output: Tensor) -> Tensor:
        """Return the quantized output with the float means."""
        error = channel_mean(layer, output) - self.wanted[name]
        self.errors[name] = self.errors[name] + error if name in self.errors else error
        spatial = [1] * len(getattr(layer, "kernel_size", ()))
        return output - error.to(output.dtype).view(-1, *spatial)

    def run(self, model: nn.Module, reference: nn.Module, batch: Any) -> None:
        """Go through one batch with both models."""
        floats = dict(reference.named_modules())
        with hooks(floats[n].register_forward_hook(partial(self.want, n)) for n in self.layers):
            outputs(reference, batch)
        with hooks(
            layer.register_forward_hook(partial(self.correct, n))
            for n, layer in self.layers.items()
        ):
            outputs(model, batch)
        self.batches += 1

    def finish(self, norms: dict[str, _BatchNorm]) -> None:
        """Make the corrections part of the model."""
        for name, error in self.errors.items():
            shift(self.layers[name], norms.get(name), -error / self.batches)


def correct_biases(
    model: nn.Module,
    batches: Iterable[Any],
    reference: nn.Module | None = None,
    progress: bool = True,
) -> dict[str, str]:
    """Give each output channel of each quantized layer the mean it has in float, in place.

    ``bias -= E[quantized output] - E[float output]``

    Rounding shifts the mean of a channel, above all in depthwise layers, whose few weights do not
    average out; the shift is then amplified by all that follows. Layers are corrected in
    sequence: each sees those before it corrected on the same batch, which takes one pass of both
    models. A layer without a bias is corrected in the BatchNorm that follows it; one with
    neither is left alone.

    Args:
        model: A calibrated model.
        batches: Batches as ``calibrate`` takes them; larger ones give steadier means.
        reference: The float model to follow, with the same layer names; `model` in float if None.
        progress: Show a progress bar.

    Returns:
        Which layers were left alone, and why.

    Raises:
        ValueError: If `batches` is empty, or nothing is quantized.
        RuntimeError: If the model is not calibrated.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
    Correction", 2019, section 4.2 and appendix D (empirical).

    Example:
        >>> import lq, torch
        >>> model = lq.quantize(nn.Sequential(nn.Linear(1, 1)), "tensorrt_int8")
        >>> _ = model[0].weight.data.fill_(1.0), model[0].bias.data.zero_()
        >>> data = [torch.tensor([[1.27], [0.003]])]
        >>> _ = lq.calibrate(model, data, progress=False)
        >>> correct_biases(model, data, progress=False)
        {}
        >>> round(model[0].bias.item(), 4)
        0.0015
    """
    check_ready(model)
    reference = bypassed_copy(model) if reference is None else reference
    correction: _Correction | None = None
    norms: dict[str, _BatchNorm] = {}
    left: dict[str, str] = {}
    for batch in tqdm(batches, "Correcting biases", disable=not progress, leave=False):
        if correction is None:
            norms, left = following_norms(model, batch)
            layers = {n: m for n, m in quantized_layers(model).items() if n not in left}
            correction = _Correction(layers)
        correction.run(model, reference, batch)
    if correction is None:
        raise ValueError("Expected `batches` to hold at least one batch, but got none.")
    correction.finish(norms)
    return left
