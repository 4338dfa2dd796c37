"""Run a torch model as an engine."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lq.calibration import eval_mode
from lq.engines.base import Runner, tensors
from lq.quantizer import Mode
from lq.surgery import quantizers


class TorchRunner(Runner):
    """A torch model in eval mode, without gradients; it is left in the mode it was.

    Its size is that of its parameters and buffers as they are in memory: fake-quantized weights
    are floats, so quantizing does not shrink it; exporting does.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.name = "torch, fake-quant" if self.simulates else "torch"
        held = [*model.parameters(), *model.buffers()]
        self.size_mb = sum(t.numel() * t.element_size() for t in held) / 1e6

    @property
    def simulates(self) -> bool:
        """Whether integers are simulated in float, so that speed says nothing about INT8."""
        return any(q.mode is Mode.QUANTIZE for q in quantizers(self.model).values())

    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return all outputs for one batch."""
        with eval_mode(self.model):
            return tensors(self.model(*args, **kwargs))
