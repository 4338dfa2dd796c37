"""Recipes: which layers of a model get which specs."""

from __future__ import annotations

import dataclasses
import glob
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from lq.files import write_text
from lq.formats import FORMATS, check_format, layer_formats
from lq.gemm import is_small
from lq.messages import check_keys, suggest
from lq.tensor_spec import FLOAT_LAYER, LayerSpec, QuantSpec

__all__ = ["FLOAT_LAYER", "PRESETS", "SKIP", "LayerSpec", "QuantSpec", "Recipe", "Rule"]
SKIP = "skip"
RESIDUAL = ("shortcut", "both")
"""Which inputs of residual additions can be quantized."""


@dataclass(frozen=True)
class Rule:
    """One exception to a recipe's defaults.

    Attributes:
        name: Glob on the layer's qualified name: ``layer1.*.conv1``.
        type: Glob on the class name of the layer or of a class it derives from: ``Linear``.
        format: Format of weights and input together, or ``"skip"`` to leave the layer float.
        weights: Format or spec of the weights alone.
        inputs: Format or spec of the input alone.
    """

    name: str | None = None
    type: str | None = None
    format: str | None = None
    weights: QuantSpec | None = None
    inputs: QuantSpec | None = None

    def __post_init__(self) -> None:
        for key in ("name", "type"):
            if not isinstance(getattr(self, key), (str, type(None))):
                raise ValueError(f"Expected a rule's `{key}` to be text, but got {self}.")
        if self.weights is not None:
            weights = dataclasses.replace(self.weights, narrow=True)
            object.__setattr__(self, "weights", weights)
        if self.name is None and self.type is None:
            raise ValueError(f"Expected a rule to have a `name` or a `type`, but got {self}.")
        alone = self.weights is not None or self.inputs is not None
        if (self.format is None) is not alone:
            raise ValueError(
                "Expected a rule to have either `format` or `weights`/`inputs`, "
                f"but the rule for {self.target} has {'both' if alone else 'neither'}."
            )
        if self.format is not None:
            check_format(self.format, extra=(SKIP,))

    @property
    def target(self) -> str:
        """What the rule matches, as a user would say it."""
        parts = [f"name {self.name!r}"] if self.name is not None else []
        parts += [f"type {self.type!r}"] if self.type is not None else []
        return " and ".join(parts)

    def matches(self, name: str, layer: nn.Module) -> bool:
        """Return whether the rule applies to a layer of that qualified name."""
        if self.name is not None and not fnmatchcase(name, self.name):
            return False
        return self.type is None or any(fnmatchcase(t, self.type) for t in type_names(layer))

    def apply(self, spec: LayerSpec) -> LayerSpec:
        """Return `spec` with this rule's formats."""
        if self.format is None:
            return LayerSpec(self.weights or spec.weights, self.inputs or spec.inputs)
        name = "fp32" if self.format == SKIP else self.format
        return LayerSpec(
            dataclasses.replace(spec.weights, format=name, signed=True),
            dataclasses.replace(
                spec.inputs,
                format=name,
                signed=True,
                symmetric=spec.inputs.symmetric or not FORMATS[name].is_integer,
            ),
        )


def type_names(layer: nn.Module) -> list[str]:
    """Return the class names a rule's `type` may match, most derived first."""
    names = [c.__name__ for c in type(layer).__mro__ if issubclass(c, nn.Module)]
    return [n for n in names if n not in ("Module", "Quantized", "QuantLayer", "QuantSites")]


_WEIGHT_DEFAULTS: dict[str, Any] = {"axis": 0, "narrow": True}


@dataclass(frozen=True)
class Recipe:
    """Which layers get which specs: defaults, then rules in order, the last match winning.

    Attributes:
        weights: Spec of the weights; always with the narrow range.
        inputs: Spec of the inputs.
        rules: Exceptions, each by qualified name and/or type.
        fallback: Format of layers too small for integer tensor cores, which have fewer than 16
            input or output channels per group times kernel size (TensorRT's rule that small GEMMs
            are better left alone; depthwise convolutions are such); ``None`` treats them as all.
        residual: Which inputs of residual additions are quantized: the ``"shortcut"`` alone, so
            that TensorRT fuses the addition into the convolution before it; ``"both"``, as ONNX
            Runtime and OpenVINO want; or ``None``.
        unsigned: Give tensors that are never negative, because a ReLU returns them, codes
            0 ... 255 instead of 0 ... 127, as CPU engines compute with, and TensorRT does not.
        pooling: Quantize what average pooling reads from a ReLU, so that the layer before it
            gives integers.
        first_and_last: Format of the first and the last layer, in the order the model holds them,
            which low bits hurt most; rules come after it. ``None`` treats them as all.
        additions_follow: Give what additions and pooling read the format of the layers around
            them, so that one quantizer serves both, unless a rule names them; a plan does so.
            ``False`` gives them that of `inputs`.

    Raises:
        ValueError: For an unknown key or format, naming the nearest valid spelling.

    Example:
        >>> recipe = Recipe(rules=(Rule(name="fc", format="fp16"),))
        >>> recipe.layer_spec("fc", nn.Linear(64, 10)).weights.format
        'fp16'
        >>> Recipe.from_dict({"inputs": "int9"})
        Traceback (most recent call last):
        ValueError: Expected `format` to be a known number format, but got 'int9'; ...
    """

    weights: QuantSpec = QuantSpec(axis=0, narrow=True)
    inputs: QuantSpec = QuantSpec()
    rules: tuple[Rule, ...] = ()
    fallback: str | None = None
    residual: str | None = "shortcut"
    unsigned: bool = False
    pooling: bool = False
    first_and_last: str | None = None
    additions_follow: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "weights", dataclasses.replace(self.weights, narrow=True))
        for inputs in (self.inputs, *(rule.inputs for rule in self.rules)):
            if inputs is not None and inputs.axis is not None:
                raise ValueError(
                    f"Expected `inputs` to be per tensor (axis=None), but got axis={inputs.axis}: "
                    "engines multiply integers whose input scale is one number."
                )
        if self.first_and_last is not None:
            check_format(self.first_and_last, extra=(SKIP,))
        if self.fallback is not None:
            check_format(self.fallback)
            if FORMATS[self.fallback].needs_scale:
                raise ValueError(
                    f"Expected `fallback` to be fp16, bf16 or fp32, but got {self.fallback!r}."
                )
        for name in ("unsigned", "pooling", "additions_follow"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(
                    f"Expected `{name}` to be true or false, but got {getattr(self, name)!r}."
                )
        if self.residual is not None and self.residual not in RESIDUAL:
            raise ValueError(
                f"Expected `residual` to be shortcut, both or null, but got {self.residual!r}; "
                f"{suggest(self.residual, RESIDUAL)}"
            )

    def of_layers(self, names: Sequence[str]) -> Recipe:
        """Return the recipe for layers of these names, with rules that name first and last.

        Example:
            >>> recipe = PRESETS["w4a4"].of_layers(["conv1", "conv2", "fc"])
            >>> [rule.name for rule in recipe.rules]
            ['conv1', 'fc']
        """
        if self.first_and_last is None:
            return self
        ends = [glob.escape(name) for name in dict.fromkeys((names[0], names[-1]))]
        rules = tuple(Rule(name=name, format=self.first_and_last) for name in ends)
        return dataclasses.replace(self, first_and_last=None, rules=rules + self.rules)

    def layer_spec(self, name: str, layer: nn.Module) -> LayerSpec:
        """Return the specs of one layer by its qualified name."""
        spec = LayerSpec(self.weights, self.inputs)
        if self.fallback is not None and is_small(layer):
            spec = Rule(name=name, format=self.fallback).apply(spec)
        for rule in self.rules:
            if rule.matches(name, layer):
                spec = rule.apply(spec)
        return spec

    def names_type(self, name: str, module: nn.Module) -> bool:
        """Return whether a rule with a `type` applies to a module of that qualified name."""
        return any(rule.type is not None and rule.matches(name, module) for rule in self.rules)

    def check_rules(
        self, layers: Mapping[str, nn.Module], others: Mapping[str, nn.Module] | None = None
    ) -> None:
        """Raise a ``ValueError`` for the first rule that matches none of the modules.

        Args:
            layers: Modules by name; the error gives the nearest spelling of one of them.
            others: Modules besides layers that a rule may name.
        """
        modules = {**layers, **(others or {})}
        types = sorted({n for layer in layers.values() for n in type_names(layer)})
        for rule in self.rules:
            if not any(rule.matches(name, module) for name, module in modules.items()):
                given, valid = (
                    (rule.name, list(layers)) if rule.name is not None else (rule.type, types)
                )
                raise ValueError(
                    f"Expected every rule to match a layer, but {rule.target} matches none; "
                    f"{suggest(given, valid)}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Return the recipe as plain values; ``from_dict`` gives it back."""
        return {
            "weights": _spec_dict(self.weights, _WEIGHT_DEFAULTS),
            "inputs": _spec_dict(self.inputs, {}),
            "rules": [
                {
                    "name": rule.name,
                    "type": rule.type,
                    "format": rule.format,
                    "weights": rule.weights and _spec_dict(rule.weights, _WEIGHT_DEFAULTS),
                    "inputs": rule.inputs and _spec_dict(rule.inputs, {}),
                }
                for rule in self.rules
            ],
            "fallback": self.fallback,
            "residual": self.residual,
            "unsigned": self.unsigned,
            "pooling": self.pooling,
            "first_and_last": self.first_and_last,
            "additions_follow": self.additions_follow,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Recipe:
        """Return the recipe that a mapping of plain values describes."""
        if not isinstance(values, Mapping):
            raise ValueError(f"Expected a recipe to be a mapping, but got {values!r}.")
        check_keys(values, [*(f.name for f in dataclasses.fields(cls)), "plan"], "the recipe")
        if values.get("plan") is not None:
            rest = {key: value for key, value in values.items() if key != "plan"}
            return cls.from_plan(values["plan"], rest)
        rules = values.get("rules") or ()
        if not isinstance(rules, (list, tuple)):
            raise ValueError(f"Expected `rules` to be a list, but got {rules!r}.")
        return cls(
            weights=QuantSpec.parse(values.get("weights", "int8"), "weights", **_WEIGHT_DEFAULTS),
            inputs=QuantSpec.parse(values.get("inputs", "int8"), "inputs"),
            rules=tuple(_parse_rule(rule, i) for i, rule in enumerate(rules)),
            fallback=values.get("fallback"),
            residual=values.get("residual", "shortcut"),
            unsigned=values.get("unsigned", False),
            pooling=values.get("pooling", False),
            first_and_last=values.get("first_and_last"),
            additions_follow=values.get("additions_follow", False),
        )

    @classmethod
    def from_plan(
        cls,
        plan: Mapping[str, str],
        base: Recipe | str | Path | Mapping[str, Any] = "tensorrt_int8",
    ) -> Recipe:
        """Return the recipe that gives each layer of a plan its format, and all else `base`'s.

        Additions and pooling have the format of the layers around them, or their own where the
        plan or `base` names them.

        Args:
            plan: Layer's qualified name -> format, ``weights/inputs``, or ``int4`` for weights
                alone.
            base: What layers not in the plan get, and which additions and pooling are quantized.

        Raises:
            ValueError: If the plan is no such mapping.

        Example:
            >>> recipe = Recipe.from_plan({"conv": "int8", "fc": "int4"})
            >>> spec = recipe.layer_spec("fc", nn.Linear(64, 10))
            >>> spec.weights.format, spec.inputs.format
            ('int4', 'fp32')
        """
        if not isinstance(plan, Mapping):
            raise ValueError(f"Expected `plan` to map layers to formats, but got {plan!r}.")
        base = cls.parse(base)
        rules = tuple(_plan_rule(name, format, base) for name, format in plan.items())
        return dataclasses.replace(base, rules=(*base.rules, *rules), additions_follow=True)

    def to_json(self) -> str:
        """Return the recipe as one line of JSON, as checkpoints carry it."""
        return json.dumps(_without_none(self.to_dict()))

    def to_yaml(self, path: str | Path) -> None:
        """Write the recipe to a YAML file that ``from_yaml`` reads back."""
        text = yaml.safe_dump(_without_none(self.to_dict()), sort_keys=False)
        write_text(path, text)

    @classmethod
    def from_yaml(cls, path: str | Path) -> Recipe:
        """Return the recipe in a YAML file."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"Expected a recipe at {str(path)!r}, but there is no such file."
            )
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            first = " ".join(str(error).split())
            raise ValueError(f"Expected {str(path)!r} to be YAML, but {first}.") from None
        return cls.from_dict({} if values is None else values)

    @classmethod
    def parse(cls, value: Recipe | str | Path | Mapping[str, Any]) -> Recipe:
        """Return the recipe that a preset name, a YAML path or a mapping stands for."""
        if isinstance(value, Recipe):
            return value
        if isinstance(value, Mapping):
            return cls.from_dict(value)
        if str(value) in PRESETS:
            return PRESETS[str(value)]
        if Path(value).suffix in (".yaml", ".yml"):
            return cls.from_yaml(value)
        raise ValueError(
            f"Expected `recipe` to be a preset or the path of a YAML file, but got {str(value)!r}; "
            f"{suggest(value, PRESETS)}"
        )


def _plan_rule(name: Any, format: Any, base: Recipe) -> Rule:
    if not isinstance(format, str):
        raise ValueError(
            f"Expected a plan to give layer {str(name)!r} a format, but got {format!r}."
        )
    weights, inputs = layer_formats(format)
    name = glob.escape(str(name))  # YAML reads the layers of nn.Sequential as numbers
    if weights == inputs:
        return Rule(name=name, format=weights)
    return Rule(
        name=name,
        weights=dataclasses.replace(base.weights, format=weights),
        inputs=dataclasses.replace(base.inputs, format=inputs),
    )


def _parse_rule(values: Any, index: int) -> Rule:
    if isinstance(values, Rule):
        return values
    where = f"rule {index + 1}"
    if not isinstance(values, Mapping):
        raise ValueError(f"Expected {where} to be a mapping, but got {values!r}.")
    check_keys(values, [f.name for f in dataclasses.fields(Rule)], where)
    values = dict(values)
    if isinstance(
        values.get("name"), int
    ):  # a layer of nn.Sequential, which YAML reads as a number
        values["name"] = str(values["name"])
    for key, defaults in (("weights", _WEIGHT_DEFAULTS), ("inputs", {})):
        if values.get(key) is not None:
            values[key] = QuantSpec.parse(values[key], where, **defaults)
    return Rule(**values)


def _spec_dict(spec: QuantSpec, defaults: Mapping[str, Any]) -> str | dict[str, Any]:
    """Return the shortest plain value that parses to `spec`: a format name where that suffices."""
    plain = QuantSpec(spec.format, **defaults)
    changed = {
        f.name: getattr(spec, f.name)
        for f in dataclasses.fields(spec)
        if getattr(spec, f.name) != getattr(plain, f.name)
    }
    return {"format": spec.format, **changed} if changed else spec.format


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        # `axis: null` and `residual: null` say something; other missing values are defaults.
        kept = ("axis", "residual")
        return {k: _without_none(v) for k, v in value.items() if v is not None or k in kept}
    return [_without_none(v) for v in value] if isinstance(value, list) else value


def _low_bits(bits: int) -> Recipe:
    """Return weights and inputs of so many bits with learned scales, but 8 at either end."""
    weights = QuantSpec(f"int{bits}", axis=0, narrow=True, range="lsq")
    inputs = QuantSpec(f"int{bits}", range="lsq")
    return Recipe(weights, inputs, residual=None, unsigned=True, first_and_last="int8")


PRESETS: dict[str, Recipe] = {
    "tensorrt_int8": Recipe(),
    "int8_fp16_fallback": Recipe(fallback="fp16"),
    "weight_only_int8": Recipe(inputs=QuantSpec("fp32")),
    "onnxruntime_int8": Recipe(residual="both", unsigned=True, pooling=True),
    "openvino_int8": Recipe(residual="both", unsigned=True, pooling=True),
    "w4a4": _low_bits(4),
    "w3a3": _low_bits(3),
    "w2a2": _low_bits(2),
}
"""Recipes by name: INT8 everywhere; INT8 with small layers in FP16; INT8 weights, float inputs;
INT8 as CPU engines want it: both inputs of residual additions, what pooling reads, and no sign
where nothing is negative; and low bits to train with, as the literature counts them."""
