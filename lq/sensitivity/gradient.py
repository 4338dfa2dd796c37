"""Estimates all units from one backward pass a batch, to second order.

To second order in the change ``d`` of the outputs their KL divergence is ``1/2 d' F d``, with the
Fisher matrix ``F = diag(p) - p p'`` of the float model's softmax ``p``; to first order in the error
``e`` that a unit makes, ``d = J e``. With random ``v`` for which ``E[v v'] = F``, and ``g = J' v``
from one backward pass, ``KL = 1/2 E[(g . e)^2]``: the squared inner product of the gradient at a
layer's output with the layer's error there. HAWQ-V2 (Dong et al. 2020, section 3) has a trace of
the Hessian from such random vectors; here the error itself is used, not its magnitude alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lq.batches import class_targets, model_inputs, tensors
from lq.ranks import rank, world_size
from lq.samples import count_samples, first_samples
from lq.sensitivity.comparing import COLUMNS, describe
from lq.sensitivity.exact import Call, Variant, output_of
from lq.sensitivity.journal import FLOAT as FLOAT_MODEL
from lq.sensitivity.journal import Journal
from lq.sensitivity.perturbed import Perturbed
from lq.sensitivity.states import FLOAT, States

KL = COLUMNS.index("kl")


class Gradient:
    """Estimates the KL divergence of variants, batch by batch.

    Args:
        states: The model and its states.
        units: Name of a unit -> its layers.
        variants: What to estimate.
        journal: Where values go, and what is there already.

    Attributes:
        progress: Called with the forward passes that were done.
        fallback: Always empty.
        until: Variant -> the last batch that it was to be estimated on.
    """

    def __init__(
        self,
        states: States,
        units: Mapping[str, Sequence[str]],
        variants: Sequence[Variant],
        journal: Journal,
    ) -> None:
        self.states, self.model, self.journal = states, states.model, journal
        self.variants, self.fallback = list(variants), ""
        self.progress: Callable[[float], object] = lambda done: None
        self.until: dict[Variant, int] = {}
        targets = {v: states.state(v.format, units[v.unit], v.part) for v in variants}
        self.perturbed = Perturbed(states, targets)

    def __enter__(self) -> Gradient:
        return self

    def __exit__(self, *_: object) -> None:
        self.states.go(FLOAT)

    def work(self) -> float:
        """Return the forward passes that a batch takes.

        There is one forward, one backward with respect to activations only, and one of all layers
        in each format.
        """
        return 2.0 + len({(v.format, v.part) for v in self.variants})

    def passes(self) -> float:
        """Return the forward passes that all that was to be estimated takes."""
        return self.work() * (1 + max(self.until.values()))

    def probe(self, batch: Any) -> None:
        """Find out which axis of each layer's output the samples are along."""
        shapes: list[dict[str, torch.Size]] = []
        for samples in (1, 2):
            args, kwargs = model_inputs(self.model, first_samples(batch, samples))
            shapes.append({})
            with _output_shapes(self.states.all_layers, shapes[-1]):
                output_of(self.model(*args, **kwargs))
        for name, one in shapes[0].items():
            two = shapes[1].get(name, one)
            grown = [i for i, (a, b) in enumerate(zip(one, two, strict=False)) if b == 2 * a]
            self.perturbed.axes[name] = grown[0] if grown else 0

    def measure(self, index: int, batch: Any, variants: Sequence[Variant]) -> None:
        """Estimate variants on a batch, if it is this rank's and not in the journal."""
        self.until |= dict.fromkeys(variants, index)
        known = all(self.journal.has(v.key, index) for v in variants)
        if index % world_size() != rank() or (known and self.journal.has(FLOAT_MODEL, index)):
            return
        call = model_inputs(self.model, batch)
        output, products = self._products(call, index)
        reference = output.detach()
        target = class_targets(batch, reference)
        for variant in variants:
            values = torch.full((len(reference), len(COLUMNS)), torch.nan)
            values[:, KL] = 0.5 * products[variant].square().float().cpu()
            self.journal.add(variant.key, index, values.numpy())
        self.journal.add(FLOAT_MODEL, index, describe(reference, target).numpy())
        self.progress(self.work())

    def _products(self, call: Call, index: int) -> tuple[Tensor, dict[Variant, Tensor]]:
        """Return the outputs, and for each variant the products ``g . e`` of all samples."""
        with torch.enable_grad(), _frozen(self.model):
            with self.perturbed.watched(count_samples(call)) as products:
                output = output_of(self.model(*call[0], **call[1]))
            if not output.requires_grad:
                raise RuntimeError(
                    "Expected the outputs to depend on the layers by gradients, but they do not; "
                    "take method 'exact'."
                )
            torch.autograd.backward(output, fisher_vector(output.detach(), seed=index))
        return output, products


def fisher_vector(output: Tensor, seed: int) -> Tensor:
    """Return random ``v`` with ``E[v v'] = diag(p) - p p'`` for each sample, ``p = softmax``.

    ``v = sqrt(p) r - p (sqrt(p) . r)`` with ``r`` of independent signs; where there are several
    places, those of a sample share its mean.

    Args:
        output: ``[N, classes, ...]``.
        seed: Of the signs.

    Example:
        >>> fisher_vector(torch.zeros(1, 4), seed=0).sum().abs() < 1e-6
        tensor(True)
    """
    p = output.softmax(1)
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, output.shape, generator=generator).to(output) * 2 - 1
    rooted = p.sqrt() * signs
    v = rooted - p * rooted.sum(1, keepdim=True)
    places = output[0, 0].numel()
    scaled: Tensor = v / places**0.5
    return scaled


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Take gradients of activations only."""
    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_()


@contextmanager
def _output_shapes(
    layers: Mapping[str, nn.Module], shapes: dict[str, torch.Size]
) -> Iterator[None]:
    def note(name: str) -> Callable[..., None]:
        return lambda module, args, output: shapes.__setitem__(name, tensors(output)[0].shape)

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(note(name)).remove)
        yield
