"""Stand-ins for pytorch-quantization, which cannot be installed any more.

They do what its published source does (NVIDIA/TensorRT, tools/pytorch-quantization, 2.1.3), as far
as a conversion can see it: names of classes, attributes, submodules and keys, shapes of ranges,
defaults, and the arithmetic of fake quantization on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Clip(nn.Module):
    def __init__(self, amax: float) -> None:
        super().__init__()
        self.clip_value_min = nn.Parameter(torch.tensor(-amax))
        self.clip_value_max = nn.Parameter(torch.tensor(amax))


class TensorQuantizer(nn.Module):
    def __init__(
        self,
        num_bits: Any = 8,
        axis: Any = None,
        unsigned: bool = False,
        narrow_range: bool = False,
        learn_amax: bool = False,
        scale_amax: float | None = None,
        disabled: bool = False,
    ) -> None:
        super().__init__()
        self._num_bits, self._axis, self._unsigned = num_bits, axis, unsigned
        self._narrow_range, self._learn_amax = narrow_range, learn_amax
        self._scale_amax, self._disabled = scale_amax, disabled
        self._fake_quant, self._if_quant, self._if_calib = True, True, False
        if learn_amax:
            self.clip = Clip(1.0)

    def calibrate(self, x: Tensor) -> None:
        """What the max calibrator finds: the other axes stay, of length 1."""
        if self._learn_amax:
            self.clip.clip_value_min.data.fill_(-0.9 * x.abs().max())
            self.clip.clip_value_max.data.fill_(0.8 * x.abs().max())
            return
        other = [i for i in range(x.dim()) if i != self._axis]
        amax = x.abs().amax(other, keepdim=True) if self._axis is not None else x.abs().max()
        before = getattr(self, "_amax", torch.zeros(()))
        self.register_buffer("_amax", torch.maximum(before, amax.detach()))

    def forward(self, x: Tensor) -> Tensor:
        if self._disabled:
            return x
        if self._if_calib:
            self.calibrate(x)
            return x
        if self._learn_amax:
            low, high = self.clip.clip_value_min, self.clip.clip_value_max
            x, amax = x.clamp(low, high), torch.maximum(-low, high).detach()
        else:
            amax = self._amax * (1.0 if self._scale_amax is None else self._scale_amax)
        bound = 2.0 ** (self._num_bits - 1 + int(self._unsigned)) - 1.0
        low = 0.0 if self._unsigned else -bound if self._narrow_range else -bound - 1
        scale = bound / amax
        return torch.clamp((x * scale).round(), low, bound) / scale


class _Mixin:
    def quantizers(self: Any, inputs: dict | None, weights: dict | None) -> None:
        self._input_quantizer = TensorQuantizer(**(inputs or {}))
        self._weight_quantizer = TensorQuantizer(**({"axis": 0} | (weights or {})))


class _QuantConv(nn.modules.conv._ConvNd, _Mixin):
    """Theirs derive from ``_ConvNd``, not from the classes for 1, 2 and 3 dimensions."""

    dims: int

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        quant_desc_input: dict | None = None,
        quant_desc_weight: dict | None = None,
    ) -> None:
        kernels, strides, paddings = ((n,) * self.dims for n in (kernel, stride, padding))
        one, zero = (1,) * self.dims, (0,) * self.dims
        super().__init__(
            inputs, outputs, kernels, strides, paddings, one, self.transposes, zero, groups, True,
            "zeros",
        )  # fmt: skip
        self.quantizers(quant_desc_input, quant_desc_weight)

    transposes = False

    def forward(self, input: Tensor) -> Tensor:
        x, weight = self._input_quantizer(input), self._weight_quantizer(self.weight)
        rest = (self.bias, self.stride, self.padding)
        if self.transposes:
            function = getattr(F, f"conv_transpose{self.dims}d")
            return function(x, weight, *rest, self.output_padding, self.groups, self.dilation)
        function = getattr(F, f"conv{self.dims}d")
        return function(x, weight, *rest, self.dilation, self.groups)


class QuantLinear(nn.Linear, _Mixin):
    def __init__(
        self,
        inputs: int,
        outputs: int,
        quant_desc_input: dict | None = None,
        quant_desc_weight: dict | None = None,
    ) -> None:
        super().__init__(inputs, outputs)
        self.quantizers(quant_desc_input, quant_desc_weight)

    def forward(self, input: Tensor) -> Tensor:
        x, weight = self._input_quantizer(input), self._weight_quantizer(self.weight)
        return F.linear(x, weight, self.bias)


def _pool(base: type) -> type:
    class Made(base):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._input_quantizer = TensorQuantizer()

        def forward(self, input: Tensor) -> Tensor:
            return super().forward(self._input_quantizer(input))

    Made.__name__ = f"Quant{base.__name__}"
    return Made


QUANT: dict[str, Any] = {"Linear": QuantLinear}
for _n in (1, 2, 3):
    for _kind in ("Max", "Avg", "AdaptiveAvg"):
        QUANT[f"{_kind}Pool{_n}d"] = _pool(getattr(nn, f"{_kind}Pool{_n}d"))
    for _name, _transposes in ((f"Conv{_n}d", False), (f"ConvTranspose{_n}d", True)):
        _namespace = {"dims": _n, "transposes": _transposes}
        QUANT[_name] = type(f"Quant{_name}", (_QuantConv,), _namespace)


def collect(model: nn.Module, *inputs: Tensor) -> None:
    """Calibrate a model as their examples do: collect, then load the ranges."""
    found = [m for m in model.modules() if isinstance(m, TensorQuantizer)]
    for quantizer in found:
        quantizer._if_calib = True
    with torch.no_grad():
        model(*inputs)
    for quantizer in found:
        quantizer._if_calib = False
