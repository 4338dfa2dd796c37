"""The ways of quantizing that a comparison tries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lq.calibrators import CALIBRATORS, parse_calibrators
from lq.export.targets import TARGETS
from lq.files import sha256
from lq.formats import layer_formats
from lq.messages import check_keys, suggest
from lq.mixed_precision import PrecisionConstraints
from lq.spec import Recipe

TAKES = {
    "ptq": ("recipe", "calibrator", "repair"),
    "qat": ("recipe", "calibrator", "epochs"),
    "mixed": ("recipe", "calibrator", "constraints", "formats"),
    "file": ("path",),
}
"""Kind -> the settings that it takes."""


@dataclass(frozen=True)
class Method:
    """One way of quantizing.

    Attributes:
        kind: ``ptq`` (calibrate), ``qat`` (calibrate, then train), ``mixed`` (search a mix of
            formats) or ``file`` (what somebody made already).
        recipe: Preset, path of a YAML file, or mapping; that of the comparison, if not given. One
            without integers, such as ``{weights: fp16, inputs: fp16}``, needs no calibration.
        calibrator: How ranges are found: ``max``, ``percentile``, ``entropy``, ``mse`` or ``auto``.
        repair: For ``ptq``, also repair (see ``lq.repair``).
        epochs: For ``qat``, how long to train.
        constraints: For ``mixed``, the limits; at most one point of accuracy lost, if not given.
        formats: For ``mixed``, the formats besides fp32; int8, and fp16 where the target runs it,
            if not given.
        path: For ``file``: an ``.onnx`` file of any tool, an ``.engine``, or a ``.ckpt`` of a
            ``QuantModule``.

    Raises:
        ValueError: For an unknown kind, or a setting that the kind does not take.

    Example:
        >>> Method("ptq", calibrator="mse").to_dict()
        {'kind': 'ptq', 'calibrator': 'mse'}
        >>> Method("ptq", epochs=3)
        Traceback (most recent call last):
        ValueError: Expected settings that kind 'ptq' takes (recipe, calibrator, repair), but got
        `epochs`.
    """

    kind: str
    recipe: str | Path | dict[str, Any] | Recipe | None = None
    calibrator: str = "max"
    repair: bool = False
    epochs: int = 1
    constraints: PrecisionConstraints | None = None
    formats: tuple[str, ...] | None = None
    path: str | Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in TAKES:
            raise ValueError(
                f"Expected `kind` to be a known one, but got {self.kind!r}; "
                f"{suggest(self.kind, TAKES)}"
            )
        for name in self._changed():
            if name not in TAKES[self.kind]:
                raise ValueError(
                    f"Expected settings that kind {self.kind!r} takes "
                    f"({', '.join(TAKES[self.kind])}), but got `{name}`."
                )
        if self.epochs < 1:
            raise ValueError(f"Expected `epochs` to be at least 1, but got {self.epochs}.")
        if self.kind == "file" and self.path is None:
            raise ValueError("Expected a `path` for kind 'file', but got none.")
        parse_calibrators(self.calibrator)
        if self.recipe is not None:
            recipe = Recipe.parse(self.recipe)
            named = isinstance(self.recipe, (str, Path))
            object.__setattr__(self, "recipe", str(self.recipe) if named else recipe.to_dict())
        if self.path is not None:
            object.__setattr__(self, "path", str(self.path))
        if self.formats is not None:
            object.__setattr__(self, "formats", tuple(self.formats))

    def _changed(self) -> dict[str, Any]:
        settings = (f for f in dataclasses.fields(self) if f.name != "kind")
        found = {f.name: (getattr(self, f.name), f.default) for f in settings}
        return {name: value for name, (value, default) in found.items() if value != default}

    def to_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults, as plain values."""
        plain = {**self._changed()}
        if self.constraints is not None:
            plain["constraints"] = dataclasses.asdict(self.constraints)
        return {"kind": self.kind, **plain}

    def identity(self) -> dict[str, Any]:
        """Return what a result of this method depends on, the content of files included."""
        files = [self.path, self.recipe if isinstance(self.recipe, str) else None]
        there = [path for path in files if path is not None and Path(path).is_file()]
        return {**self.to_dict(), "files": [sha256(path) for path in there]}


def default_methods(target: str, trains: bool) -> dict[str, Method]:
    """Return what is compared unless methods are given.

    Args:
        target: What will run the models.
        trains: Whether there is a way to train.
    """
    half = "fp16" in TARGETS[target]
    found = {"FP16": Method("ptq", {"weights": "fp16", "inputs": "fp16"})} if half else {}
    found |= {f"PTQ {name}": Method("ptq", calibrator=name) for name in CALIBRATORS}
    found["PTQ repaired"] = Method("ptq", calibrator="auto", repair=True)
    if trains:
        found["QAT"] = Method("qat", calibrator="auto")
    return {**found, "mixed": Method("mixed", calibrator="auto")}


def formats_of(method: Method, target: str) -> tuple[str, ...]:
    """Return the formats of a mix, besides fp32.

    Raises:
        ValueError: If the target does not run one.
    """
    runs = TARGETS[target]
    formats = method.formats or tuple(format for format in ("int8", "fp16") if format in runs)
    for format in formats:
        if not {*layer_formats(format)} <= runs:
            raise ValueError(
                f"Expected `formats` that {target} runs ({', '.join(sorted(runs))}), but got "
                f"{format!r}."
            )
    return formats


def parse_methods(values: Mapping[str, Any]) -> dict[str, Method]:
    """Return the methods that plain values describe, as a config has them.

    Raises:
        ValueError: For the first that is none, naming it.

    Example:
        >>> parse_methods({"a": {"kind": "ptq", "calibrater": "mse"}})
        Traceback (most recent call last):
        ValueError: Method 'a': Expected known keys in a method, but got 'calibrater'; did you mean
        'calibrator'?
    """
    return {str(name): _parsed(str(name), given) for name, given in values.items()}


def _parsed(name: str, given: Any) -> Method:
    try:
        if not isinstance(given, Mapping) or "kind" not in given:
            raise ValueError(f"Expected a `kind` and its settings, but got {given!r}.")
        settings = dict(given)
        check_keys(settings, [f.name for f in dataclasses.fields(Method)], "a method")
        limits = settings.get("constraints")
        if isinstance(limits, Mapping):
            known = [f.name for f in dataclasses.fields(PrecisionConstraints)]
            check_keys(limits, known, "`constraints`")
            settings["constraints"] = PrecisionConstraints(**limits)
        return Method(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Method {name!r}: {error}") from None
