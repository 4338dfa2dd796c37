"""Knowledge distillation: a student learns what a float teacher says of the same inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lq.messages import suggest
from lq.surgery import dequantize

Recorded = dict[str, list[Tensor]]
"""What submodules returned, by name, in the order of their calls."""


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
    expected = (_wide(teacher.detach()) / temperature).log_softmax(axis)
    found = (_wide(student) / temperature).log_softmax(axis)
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
    expected = _wide(teacher.detach())
    power = expected.square().sum().clamp_min(torch.finfo(expected.dtype).tiny)
    return (_wide(student) - expected).square().sum() / power


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


class Recorder:
    """Notes what submodules return.

    Args:
        model: The module they are in.
        names: Their qualified names; an empty one is the model itself.

    Raises:
        ValueError: If there is no such submodule, naming the nearest.

    Example:
        >>> recorder = Recorder(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["1"])
        >>> recorder.take()
        {'1': []}
    """

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        present = dict(model.named_modules(remove_duplicate=False))
        for name in names:
            if name not in present:
                raise ValueError(
                    f"Expected `features` to be submodules of {type(model).__name__}, but got "
                    f"{name!r}; {suggest(name, filter(None, present))}"
                )
        self._modules = {name: present[name] for name in names}
        self._outputs: Recorded = {name: [] for name in names}

    def start(self) -> list[Any]:
        """Begin, and return the handles of the hooks."""
        return [m.register_forward_hook(self._note(n)) for n, m in self._modules.items()]

    def take(self) -> Recorded:
        """Return what was noted since the last time."""
        outputs, self._outputs = self._outputs, {name: [] for name in self._modules}
        return outputs

    def _note(self, name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if not isinstance(output, Tensor):
                raise ValueError(
                    f"Expected feature {name!r} to be a module that returns a tensor, but it "
                    f"returned {type(output).__name__}; name another."
                )
            self._outputs[name].append(output)

        return hook


class Distiller:
    """Adds what a teacher has to say to the gradients of somebody else's training step.

    Between ``start`` and ``stop``, each forward of the student that is differentiated runs the
    teacher on the same arguments, once, in eval and inference mode. The gradient of
    ``weight * distillation_loss + feature_weight * sum(feature_loss)`` joins the gradient of the
    student's output and features when the training step goes back through them between
    ``begin_backward`` and ``end_backward``. So neither the loss nor its graph is touched, and a
    backward pass that does not go through the student, as that of another optimizer, gets nothing.

    Args:
        student: What is trained.
        teacher: What it should return; is put into eval mode.
        temperature: Of ``distillation_loss``.
        weight: Of ``distillation_loss``; 0 where the output is no logits.
        features: Submodules of both whose outputs are matched.
        feature_weight: Of each ``feature_loss``.
        class_axis: Axis of the classes in the logits.

    Example:
        >>> student, teacher = nn.Linear(2, 3), nn.Linear(2, 3)
        >>> distiller = Distiller(student, teacher)
        >>> distiller.start()
        >>> loss = student(torch.ones(1, 2)).sum()
        >>> distiller.begin_backward()
        >>> loss.backward()
        >>> distiller.end_backward()
        >>> distiller.stop()
        >>> torch.equal(distiller.take_loss(), distillation_loss(student(torch.ones(1, 2)),
        ...     teacher(torch.ones(1, 2))))
        True
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        temperature: float = 1.0,
        weight: float = 1.0,
        features: Sequence[str] = (),
        feature_weight: float = 1.0,
        class_axis: int = 1,
    ) -> None:
        self.student, self.teacher = student, teacher.eval()
        self.temperature, self.weight, self.feature_weight = temperature, weight, feature_weight
        self.class_axis = class_axis
        self.scale: Callable[[Tensor], Tensor] = lambda loss: loss
        """What the training step does to its own loss before it goes back: the loss scaler's
        factor, the division by accumulated batches."""
        self.skip_outermost = False
        """Whether the outermost call of the student is no forward, but a wrapper's detour."""
        self._found, self._expected = Recorder(student, features), Recorder(teacher, features)
        self._handles: list[Any] = []
        self._calls: list[tuple[Any, Recorded] | None] = []
        self._losses: list[Tensor] = []
        self._backward = False

    def start(self) -> None:
        """Watch the student."""
        self.stop()
        self._handles = [
            self.student.register_forward_pre_hook(self._before(), with_kwargs=True),
            *self._found.start(),  # before ours: the student itself may be a feature
            self.student.register_forward_hook(self._after()),
        ]

    def stop(self) -> None:
        """Watch no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._calls, self._backward = [], [], False
        self._found.take()

    def begin_backward(self) -> None:
        """Let gradients be added: what goes back now is the loss."""
        self._backward = True

    def end_backward(self) -> None:
        """Add no more gradients."""
        self._backward = False

    def take_loss(self) -> Tensor | None:
        """Return the sum of the losses whose gradients were added since the last time, if any."""
        losses, self._losses = self._losses, []
        return torch.stack(losses).sum() if losses else None

    def ask(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Recorded]:
        """Return what the teacher returns, and its features."""
        handles = self._expected.start()
        try:
            with torch.inference_mode():
                output = self.teacher(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
            recorded = self._expected.take()
        return output, recorded

    # Hooks are functions, not methods: a copy of the student must not copy the teacher.
    def _before(self) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            skip = self.skip_outermost and not self._calls
            # What runs during the backward pass is recomputed for a checkpoint.
            if skip or self._backward or not torch.is_grad_enabled():
                self._calls.append(None)
                return
            self._calls.append(self.ask(args, kwargs))
            self._found.take()

        return hook

    def _after(self) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            expected = self._calls.pop() if self._calls else None
            if expected is not None:
                self._compare(output, *expected)

        return hook

    def _compare(self, output: Any, expected: Any, features: Recorded) -> None:
        """Find the gradients of the loss, and have them added where they belong."""
        pairs = _paired(self._found.take(), features)
        if self.weight:
            pairs.append((logits_of(output), logits_of(expected)))
        leaves = [_wide(tensor.detach()).requires_grad_() for tensor, _ in pairs]
        with torch.enable_grad():
            loss = self._loss(leaves, [teacher for _, teacher in pairs])
            gradients = torch.autograd.grad(self.scale(loss), leaves)
        unsaid = [loss.detach()]
        for (tensor, _), gradient in zip(pairs, gradients, strict=True):
            if tensor.requires_grad:
                tensor.register_hook(self._add(gradient, unsaid))  # type: ignore[no-untyped-call]

    def _loss(self, found: list[Tensor], expected: list[Tensor]) -> Tensor:
        pairs = list(zip(found, expected, strict=True))
        loss = found[0].new_zeros(())
        if self.weight:
            logits = pairs.pop()
            loss = self.weight * distillation_loss(*logits, self.temperature, self.class_axis)
        for pair in pairs:
            loss = loss + self.feature_weight * feature_loss(*pair)
        return loss

    def _add(self, gradient: Tensor, unsaid: list[Tensor]) -> Callable[[Tensor], Tensor | None]:
        """Return the hook of one tensor; `unsaid` is the loss, until one of its tensors tells."""
        left = [gradient]

        def hook(own: Tensor) -> Tensor | None:
            # Other differentiation, as of a gradient penalty, is none of ours.
            if not self._backward or not left:
                return None
            if unsaid:
                self._losses.append(unsaid.pop())
            return own + left.pop().to(own.dtype)

        return hook


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


def _paired(found: Recorded, expected: Recorded) -> list[tuple[Tensor, Tensor]]:
    """Return the student's features, each with the teacher's."""
    pairs: list[tuple[Tensor, Tensor]] = []
    for name, tensors in found.items():
        theirs = expected[name]
        if not tensors or len(tensors) != len(theirs):
            raise RuntimeError(
                f"Expected feature {name!r} to run as often in the student as in the teacher, but "
                f"it ran {len(tensors)} and {len(theirs)} times in one forward; name another (what "
                "is inside a compiled or checkpointed module cannot be seen)."
            )
        pairs += zip(tensors, theirs, strict=True)
    return pairs


def _check_shapes(student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"Expected student and teacher to return the same shape, but got {list(student.shape)} "
            f"and {list(teacher.shape)}."
        )


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
