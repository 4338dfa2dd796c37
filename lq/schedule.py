"""What begins when in quantization-aware training."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import nn

from lq.formats import FORMATS
from lq.surgery import quantizers


@dataclass(frozen=True)
class Schedule:
    """The epochs and steps from which something is done, both counted from 0.

    Attributes:
        start_epoch: First epoch with quantization; the ones before train in float.
        start_step: First optimizer step with quantization, where that is later.
        inputs_start_epoch: First epoch in which inputs are quantized; ``None`` with the weights.
        inputs_start_step: First optimizer step in which inputs are, where that is later.
        freeze_scales_epoch: Epoch from which ranges stay as they are.
        freeze_batchnorm_epoch: Epoch from which BatchNorm uses, and keeps, its running statistics.
        bits: Epoch -> bits that integer formats of fewer have from there on, such as
            ``{0: 8, 2: 6, 4: 4}``.

    Raises:
        ValueError: For a negative epoch or step, inputs that start before weights, or bits that do
            not fall or that no integer format has.

    Example:
        >>> schedule = Schedule(start_epoch=1, bits={0: 8, 2: 6, 4: 4})
        >>> [schedule.bits_at(epoch) for epoch in range(6)]
        [8, 8, 6, 6, 4, 4]
        >>> schedule.quantizes_weights(epoch=0, step=100)
        False
    """

    start_epoch: int = 0
    start_step: int = 0
    inputs_start_epoch: int | None = None
    inputs_start_step: int | None = None
    freeze_scales_epoch: int | None = None
    freeze_batchnorm_epoch: int | None = None
    bits: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 0:
                raise ValueError(f"Expected `{name}` to be 0 or more, but got {value}.")
        for name, inputs, weights in (
            ("inputs_start_epoch", self.inputs_start_epoch, self.start_epoch),
            ("inputs_start_step", self.inputs_start_step, self.start_step),
        ):
            if inputs is not None and inputs < weights:
                raise ValueError(
                    f"Expected `{name}` to be at least `{name.removeprefix('inputs_')}`, "
                    f"{weights}, but got {inputs}."
                )
        epochs = sorted(self.bits)
        widths = [self.bits[epoch] for epoch in epochs]
        if any(f"int{bits}" not in FORMATS for bits in widths):
            raise ValueError(
                f"Expected `progressive_bits` to be bits of an integer format, 2 to 8, but got "
                f"{dict(self.bits)}."
            )
        if any(e < 0 for e in epochs) or widths != sorted(set(widths), reverse=True):
            raise ValueError(
                "Expected `progressive_bits` to fall from one epoch to a later one, such as "
                f"{{0: 8, 2: 6, 4: 4}}, but got {dict(self.bits)}."
            )

    @property
    def inputs_start_later(self) -> bool:
        """Whether weights are quantized for a while before inputs are."""
        return self.inputs_start_epoch is not None or self.inputs_start_step is not None

    def quantizes_weights(self, epoch: int, step: int) -> bool:
        """Return whether weights are quantized."""
        return epoch >= self.start_epoch and step >= self.start_step

    def quantizes_inputs(self, epoch: int, step: int) -> bool:
        """Return whether inputs are quantized."""
        later = epoch >= (self.inputs_start_epoch or 0) and step >= (self.inputs_start_step or 0)
        return later and self.quantizes_weights(epoch, step)

    def bits_at(self, epoch: int) -> int | None:
        """Return the fewest bits that an integer format has in an epoch, if that is said."""
        begun = [start for start in self.bits if start <= epoch]
        return self.bits[max(begun)] if begun else None

    def freezes_scales(self, epoch: int) -> bool:
        """Return whether ranges stay as they are."""
        return self.freeze_scales_epoch is not None and epoch >= self.freeze_scales_epoch

    def freezes_batchnorm(self, epoch: int) -> bool:
        """Return whether BatchNorm keeps its running statistics."""
        return self.freeze_batchnorm_epoch is not None and epoch >= self.freeze_batchnorm_epoch

    def check_reached(self, epochs: int | None, steps: int | None) -> None:
        """Raise a ``ValueError`` if training is over before everything has begun.

        But for what freezes: without that, the same model is trained for shorter.

        Args:
            epochs: Epochs of training, ``None`` if not limited.
            steps: Optimizer steps of training, ``None`` if not limited.
        """
        begin_epochs = (
            ("start_epoch", self.start_epoch),
            ("inputs_start_epoch", self.inputs_start_epoch or 0),
            ("progressive_bits", max(self.bits, default=0)),
        )
        begin_steps = (
            ("start_step", self.start_step),
            ("inputs_start_step", self.inputs_start_step or 0),
        )
        _check_below(begin_epochs, epochs, "max_epochs")
        _check_below(begin_steps, steps, "max_steps")

    def check_bits(self, model: nn.Module) -> None:
        """Raise a ``ValueError`` if progressive bits do not end with the model's own formats."""
        specs = [q.spec for q in quantizers(model).values()]
        own = min((s.number_format.bits for s in specs if s.number_format.is_integer), default=0)
        if self.bits and own and min(self.bits.values()) > own:
            raise ValueError(
                "Expected `progressive_bits` to end with the fewest bits of the recipe, "
                f"{own}, but got {dict(self.bits)}: another model would be exported than trained."
            )


def _check_below(begins: Iterable[tuple[str, int]], limit: int | None, what: str) -> None:
    for name, begin in begins:
        if limit is not None and 0 <= limit <= begin and begin > 0:
            raise ValueError(
                f"Expected `{name}` to be below the trainer's {what}, {limit}, but got {begin}: "
                "it would never begin."
            )
