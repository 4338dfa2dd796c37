"""Run a torch model as an engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from lq.batches import tensors
from lq.engines.base import Runner
from lq.modes import eval_mode
from lq.quantizer import Mode
from lq.surgery import quantizers


class TorchRunner(Runner):
    """A torch model in eval mode, without gradients; it is left in the mode it was.

    Its size is that of its parameters and buffers as they are in memory: fake-quantized weights
    are floats, so quantizing does not shrink it; exporting does.

    Args:
        model: The model.
        threads: Threads of the processor, over ``many_runs``; 0 for as many as torch has.
    """

    def __init__(self, model: nn.Module, threads: int = 0) -> None:
        self.model, self.threads = model, threads
        self.simulates = any(q.mode is Mode.QUANTIZE for q in quantizers(model).values())
        self.name = "torch, fake-quant" if self.simulates else "torch"
        held = [*model.parameters(), *model.buffers()]
        self.size_mb = self.weights_mb = sum(t.numel() * t.element_size() for t in held) / 1e6
        self._in_eval_mode = False

    @contextmanager
    def many_runs(self) -> Iterator[None]:
        """Keep the model in eval mode over many runs."""
        before = torch.get_num_threads()
        with eval_mode(self.model):
            self._in_eval_mode = True
            torch.set_num_threads(self.threads or before)
            try:
                yield
            finally:
                torch.set_num_threads(before)
                self._in_eval_mode = False

    def run(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """Return all outputs for one batch."""
        with nullcontext() if self._in_eval_mode else eval_mode(self.model):
            return tensors(self.model(*args, **kwargs))
