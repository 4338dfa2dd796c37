"""Knowledge distillation: a student learns what a float teacher says of the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lq.surgery import dequantize


def distillation_loss(
    student: Tensor, teacher: Tensor, temperature: float = 1.0, axis: int = 1
) -> Tensor:
    """Return how far the student's class probabilities are from the teacher's.

    ``loss = T^2 KL(softmax(teacher / T) || softmax(student / T))``

    The sum over classes, the mean over everything else; ``T^2`` keeps the size of the gradient
    the same whatever the temperature. Half precision is computed in float32.

    Source: Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.

    Args:
        student: Logits ``[N, C, ...]``.
        teacher: Logits of the same shape; no gradient reaches them.
        temperature: ``T``; above 1 the smaller probabilities count for more.
        axis: Axis of the classes.

    Raises:
        ValueError: If the shapes differ, or there are fewer than two classes.

    Example:
        >>> loss = distillation_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        >>> round(float(loss), 4)
        0.3278
    """
    _check_shapes(student, teacher)
    if student.dim() <= axis or student.shape[axis] < 2:
        raise ValueError(
            f"Expected logits of at least two classes along axis {axis}, but got shape "
            f"{list(student.shape)}; match outputs that are no classes as features, with weight=0."
        )
    expected = (wide(teacher.detach()) / temperature).log_softmax(axis)
    found = (wide(student) / temperature).log_softmax(axis)
    divergence = (expected.exp() * (expected - found)).sum(axis)
    return temperature**2 * divergence.mean()


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the squared distance of features, as a share of the teacher's power.

    ``loss = sum((student - teacher)^2) / sum(teacher^2)``

    Source: the hint loss of Romero et al. 2015, "FitNets: Hints for Thin Deep Nets", equation 3,
    normalised so that layers of any size and scale weigh the same.

    Args:
        student: Tensor of any shape.
        teacher: Tensor of the same shape; no gradient reaches it.

    Raises:
        ValueError: If the shapes differ.

    Example:
        >>> float(feature_loss(torch.tensor([3.0, 5.0]), torch.tensor([3.0, 4.0])))
        0.03999999910593033
    """
    _check_shapes(student, teacher)
    expected = wide(teacher.detach())
    power = expected.square().sum().clamp_min(torch.finfo(expected.dtype).tiny)
    return (wide(student) - expected).square().sum() / power


def float_copy(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
    """Return a float copy of a model, quantized or not, for use as a teacher.

    Args:
        model: Stays as it is.
        weights: State of the copy; the model's own if not given.

    Raises:
        ValueError: If the weights do not fit, naming the first misfit.

    Example:
        >>> from lq import quantize
        >>> float_copy(quantize(nn.Linear(16, 4), "tensorrt_int8"))
        Linear(in_features=16, out_features=4, bias=True)
    """
    copied = dequantize(copy.deepcopy(model))
    if weights is not None:
        try:
            copied.load_state_dict(weights)
        except RuntimeError as error:
            misfit = str(error).strip().splitlines()[-1].strip()
            raise ValueError(
                f"Expected float weights of {type(copied).__name__}, but: {misfit[:300]}"
            ) from None
    return copied.eval()


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a model returned: the tensor itself, or its ``logits``.

    Raises:
        ValueError: If it is or has no such tensor.

    Example:
        >>> logits_of({"logits": torch.tensor([1.0])})
        tensor([1.])
    """
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    output = getattr(output, "logits", output)
    if isinstance(output, Tensor):
        return output
    raise ValueError(
        "Expected the model to return its logits, as a tensor or under the name `logits`, but got "
        f"{type(output).__name__}; name the `module` that returns them, or match `features` with "
        "weight=0."
    )


def _check_shapes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"Expected student and teacher to return the same shape, but got {list(student.shape)} "
            f"and {list(teacher.shape)}."
        )


def wide(x: Tensor) -> Tensor:
    """Return a tensor in float32, or in its own type if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
