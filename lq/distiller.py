"""A teacher beside somebody else's training step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lq.distillation import distillation_loss, feature_loss, logits_of, wide
from lq.messages import suggest

Recorded = dict[str, list[Tensor]]
"""What submodules returned, by name, in the order of their calls."""


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
        leaves = [wide(tensor.detach()).requires_grad_() for tensor, _ in pairs]
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
