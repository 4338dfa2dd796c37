"""The arguments that ``QuantizationAwareTraining`` had in Lightning 1.9, in today's words."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning.pytorch.utilities import rank_zero_deprecation
from torch import nn
from typing_extensions import TypedDict

from lq.messages import suggest
from lq.spec import Recipe

_PER_TENSOR = {"format": "int8", "axis": None}
_RECIPES: dict[str, str | dict[str, Any]] = {
    **dict.fromkeys(("fbgemm", "x86", "onednn"), "onnxruntime_int8"),
    "qnnpack": {"weights": _PER_TENSOR, "residual": "both", "unsigned": True, "pooling": True},
}
"""Kernels of torch -> the recipe for engines that compute so."""
_DEFAULTS = {"calibrator": "max", "calibration_batches": 16}
_OBSERVERS = ("average", "histogram")
_STAGES = ("train", "validate", "test", "predict")


class FormerArguments(TypedDict, total=False):
    """What could be said to the callback in Lightning 1.9."""

    qconfig: Any
    observer_type: Any
    collect_quantization: Any
    modules_to_fuse: Any
    input_compatible: Any
    quantize_on_fit_end: Any
    observer_enabled_stages: Any


@dataclasses.dataclass
class Settings:
    """What can be said to it today, as far as a former argument says it."""

    recipe: str | dict[str, Any]
    calibrator: str
    calibration_batches: int
    fused: list[str] = dataclasses.field(default_factory=list)


def translate(former: Mapping[str, Any], settings: Settings) -> Settings:
    """Return today's settings for former arguments, telling of each how it is spelled now.

    Raises:
        TypeError: For an argument that there never was.
        ValueError: For a value that there never was, or that means what is not done any more.
    """
    for name in former:
        if name not in _TRANSLATIONS:
            raise TypeError(
                f"QuantizationAwareTraining has no argument {name!r}; "
                f"{suggest(name, (*_TRANSLATIONS, 'recipe', 'module', 'calibrator'))}"
            )
    # In an order of its own, whatever that of a config: one builds on what another says.
    for name, value in ((n, former[n]) for n in _TRANSLATIONS if n in former):
        now = _TRANSLATIONS[name](value, settings)
        rank_zero_deprecation(
            f"`{name}={value!r}` of Lightning 1.9's QuantizationAwareTraining is now {now}."
        )
    return settings


def check_fused(model: nn.Module, names: Sequence[str]) -> None:
    """Raise a ``ValueError`` for the first of the modules to fuse that a model has not."""
    present = dict(model.named_modules())
    for name in names:
        if name not in present:
            raise ValueError(
                f"Expected `modules_to_fuse` to name modules of {type(model).__name__}, but got "
                f"{name!r}; {suggest(name, [n for n in present if n])}"
            )


def _qconfig(value: Any, settings: Settings) -> str:
    if not isinstance(value, str) or value not in _RECIPES:
        raise ValueError(
            f"Expected `qconfig` to be one of {', '.join(_RECIPES)}, but got {value!r}; say in a "
            "`recipe` which layers get which formats."
        )
    if settings.recipe != "tensorrt_int8":
        raise ValueError(f"Expected `recipe` or `qconfig`, but got both; leave out {value!r}.")
    settings.recipe = _RECIPES[value]
    return f"`recipe={settings.recipe!r}`"


def _check_alone(former: str, value: Any, now: str, settings: Settings) -> None:
    """Raise a ``ValueError`` where the same is said in today's words too."""
    given = getattr(settings, now)
    if given != _DEFAULTS[now]:
        raise ValueError(
            f"Expected `{now}` or `{former}`, but got both, {given!r} and {value!r}; leave out "
            f"`{former}`."
        )


def _observer_type(value: Any, settings: Settings) -> str:
    if value not in _OBSERVERS:
        raise ValueError(f"Expected `observer_type` to be average or histogram, but got {value!r}.")
    if value == "histogram":
        _check_alone("observer_type", value, "calibrator", settings)
        settings.calibrator = "mse"
        return "`calibrator='mse'`"
    recipe = Recipe.parse(settings.recipe)
    inputs, weights = (
        dataclasses.replace(spec, range="moving_average")
        for spec in (recipe.inputs, recipe.weights)
    )
    settings.recipe = dataclasses.replace(recipe, inputs=inputs, weights=weights).to_dict()
    return "a recipe with `range: moving_average` for `inputs` and `weights`"


def _collect_quantization(value: Any, settings: Settings) -> str:
    if callable(value):
        raise ValueError(
            "Expected `collect_quantization` to be a number of batches, but got a function, which "
            "is not called any more; use `calibration_batches` and `start_epoch` or `start_step`."
        )
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise ValueError(
            f"Expected `collect_quantization` to be a number of batches, but got {value!r}; use "
            "`calibration_batches`."
        )
    if value is None:
        return "`calibration_batches`, and nothing where all is as it comes"
    if value < 1:
        raise ValueError(f"Expected `collect_quantization` to be at least 1, but got {value}.")
    _check_alone("collect_quantization", value, "calibration_batches", settings)
    settings.calibration_batches = value
    return f"`calibration_batches={value}`"


def _modules_to_fuse(value: Any, settings: Settings) -> str:
    if value is not None and not isinstance(value, Iterable):
        raise ValueError(f"Expected `modules_to_fuse` to be lists of names, but got {value!r}.")
    groups = [[group] if isinstance(group, str) else list(group) for group in value or ()]
    settings.fused = [name for group in groups for name in group]
    return "nothing: layer, BatchNorm and activation are fused when exporting, without being named"


def _input_compatible(value: Any, settings: Settings) -> str:
    if value is not True:
        raise ValueError(
            f"Expected `input_compatible` to be True, but got {value!r}: a model takes float "
            "inputs and quantizes them itself; it has no `quant` and `dequant` to call."
        )
    return "nothing: a model always takes float inputs"


def _quantize_on_fit_end(value: Any, settings: Settings) -> str:
    if value is not False:
        raise ValueError(
            f"Expected `quantize_on_fit_end` to be False, but got {value!r}: a model is never "
            "converted in place; list Export('model.onnx') behind this callback, which writes the "
            "integers to a file."
        )
    return "nothing: the model stays as it trained, and the callback Export writes the integers"


def _observer_enabled_stages(value: Any, settings: Settings) -> str:
    if not isinstance(value, Iterable):
        raise ValueError(
            f"Expected `observer_enabled_stages` to be names of stages, but got {value!r}."
        )
    stages = [value] if isinstance(value, str) else list(value)
    for stage in stages:
        if stage not in _STAGES:
            raise ValueError(
                f"Expected `observer_enabled_stages` to be among {', '.join(_STAGES)}, but got "
                f"{stage!r}."
            )
    if stages != ["train"]:
        raise ValueError(
            f"Expected `observer_enabled_stages` to be ('train',), but got {value!r}: ranges come "
            "from training data alone, and are needed; the callback Calibration finds them where "
            "nothing is trained."
        )
    return "nothing: ranges come from training data alone"


_TRANSLATIONS = {
    "qconfig": _qconfig,
    "observer_type": _observer_type,
    "collect_quantization": _collect_quantization,
    "modules_to_fuse": _modules_to_fuse,
    "input_compatible": _input_compatible,
    "quantize_on_fit_end": _quantize_on_fit_end,
    "observer_enabled_stages": _observer_enabled_stages,
}
"""Former argument -> what says it today; each tells the words."""
