from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lq.spec import FORMATS, PRESETS, LayerSpec, QuantSpec, Recipe, Rule


@pytest.mark.parametrize(
    ("name", "bits", "dtype"),
    [
        *[(f"int{bits}", bits, None) for bits in range(2, 9)],
        ("fp8_e4m3", 8, None),
        ("fp16", 16, torch.float16),
        ("bf16", 16, torch.bfloat16),
        ("fp32", 32, torch.float32),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_formats(name: str, bits: int, dtype: torch.dtype | None) -> None:
    number_format = FORMATS[name]

    assert (number_format.name, number_format.bits, number_format.dtype) == (name, bits, dtype)
    assert number_format.needs_scale is (dtype is None)
    if dtype is not None:
        assert dtype.itemsize * 8 == bits


def test_no_other_formats() -> None:
    assert set(FORMATS) == {*(f"int{b}" for b in range(2, 9)), "fp8_e4m3", "fp16", "bf16", "fp32"}


@pytest.mark.parametrize("bits", range(2, 9), ids=lambda b: f"int{b}")
@pytest.mark.parametrize(
    ("kwargs", "limits"),
    [
        pytest.param({}, lambda b: (-(2 ** (b - 1)), 2 ** (b - 1) - 1), id="signed"),
        pytest.param({"narrow": True}, lambda b: (1 - 2 ** (b - 1), 2 ** (b - 1) - 1), id="narrow"),
        pytest.param({"signed": False}, lambda b: (0, 2**b - 1), id="unsigned"),
    ],
)
def test_ranges(
    bits: int, kwargs: dict[str, Any], limits: Callable[[int], tuple[int, int]]
) -> None:
    spec = QuantSpec(f"int{bits}", **kwargs)

    assert (spec.qmin, spec.qmax) == limits(bits)


def test_float8_range_is_torchs() -> None:
    info = torch.finfo(torch.float8_e4m3fn)

    assert (QuantSpec("fp8_e4m3").qmin, QuantSpec("fp8_e4m3").qmax) == (info.min, info.max)


def test_weights_are_always_narrow() -> None:
    recipe = Recipe(
        weights=QuantSpec("int8", axis=0), rules=(Rule(name="a", weights=QuantSpec("int4")),)
    )

    assert recipe.weights.qmin == -127
    assert recipe.rules[0].weights is not None
    assert recipe.rules[0].weights.qmin == -7
    assert recipe.inputs.qmin == -128


@pytest.mark.parametrize(
    "frozen",
    [
        pytest.param(QuantSpec(), id="QuantSpec"),
        pytest.param(Rule(name="a", format="fp16"), id="Rule"),
        pytest.param(Recipe(), id="Recipe"),
        pytest.param(FORMATS["int8"], id="Format"),
        pytest.param(LayerSpec(QuantSpec(), QuantSpec()), id="LayerSpec"),
    ],
)
def test_frozen_and_hashable(frozen: Any) -> None:
    field = dataclasses.fields(frozen)[0].name

    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(frozen, field, getattr(frozen, field))
    assert hash(frozen) == hash(dataclasses.replace(frozen))


COMPLEX = [
    pytest.param(
        Recipe(
            weights=QuantSpec("int4", axis=None, range="lsq"),
            inputs=QuantSpec("int8", signed=False, range="lsq"),
            rules=(
                Rule(name="head.*", format="skip"),
                Rule(type="Linear", format="fp16"),
                Rule(name="layer?.[0-3]", type="Conv2d", weights=QuantSpec("int2", axis=None)),
                Rule(name="mixed", weights=QuantSpec("int4", axis=0), inputs=QuantSpec("bf16")),
                Rule(name="8", inputs=QuantSpec("fp8_e4m3")),
            ),
            fallback="bf16",
        ),
        id="everything",
    ),
    pytest.param(Recipe(weights=QuantSpec("int8", axis=None)), id="per-tensor-weights"),
    pytest.param(Recipe(weights=QuantSpec("int8", axis=1)), id="other-axis"),
    pytest.param(Recipe(weights=QuantSpec("int8", axis=0, signed=False)), id="unsigned-weights"),
    pytest.param(
        Recipe(weights=QuantSpec("fp8_e4m3", axis=0), inputs=QuantSpec("fp8_e4m3")), id="fp8"
    ),
    pytest.param(Recipe(rules=(Rule(name="é*", format="int4"),)), id="name-outside-ascii"),
    *[pytest.param(recipe, id=name) for name, recipe in PRESETS.items()],
]


@pytest.mark.parametrize("recipe", COMPLEX)
class TestRoundTrip:
    def test_yaml(self, recipe: Recipe, tmp_path: Path) -> None:
        recipe.to_yaml(tmp_path / "recipe.yaml")

        assert Recipe.from_yaml(tmp_path / "recipe.yaml") == recipe
        assert Recipe.parse(tmp_path / "recipe.yaml") == recipe
        assert Recipe.parse(str(tmp_path / "recipe.yaml")) == recipe

    def test_json(self, recipe: Recipe) -> None:
        assert Recipe.from_dict(json.loads(recipe.to_json())) == recipe

    def test_mapping(self, recipe: Recipe) -> None:
        assert Recipe.from_dict(recipe.to_dict()) == recipe
        assert Recipe.parse(recipe.to_dict()) == recipe
        assert Recipe.parse(recipe) is recipe


@pytest.mark.parametrize("name", PRESETS)
def test_presets_by_name(name: str) -> None:
    assert Recipe.parse(name) is PRESETS[name]


def test_axis_null_in_yaml_is_per_tensor(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("weights:\n  format: int8\n  axis: null\n")
    assert Recipe.from_yaml(path).weights.axis is None

    path.write_text("weights:\n  format: int8\n")
    assert Recipe.from_yaml(path).weights.axis == 0

    Recipe(weights=QuantSpec("int8", axis=None)).to_yaml(path)
    assert yaml.safe_load(path.read_text())["weights"]["axis"] is None


@pytest.mark.parametrize("text", ["", "# only a comment\n", "{}\n"], ids=["empty", "comment", "{}"])
def test_an_empty_recipe_is_the_default(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yml"
    path.write_text(text)

    assert Recipe.from_yaml(path) == Recipe()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        pytest.param({"weigths": "int8"}, "'weigths'.*did you mean 'weights'", id="key"),
        pytest.param({"inputs": "int9"}, "'int9'.*did you mean 'int", id="format"),
        pytest.param({"inputs": "fp8"}, "'fp8'.*did you mean 'fp8_e4m3'", id="fp8"),
        pytest.param({"weights": "zzz"}, "'zzz'; choose from int2, .*fp32", id="no-close-format"),
        pytest.param({"fallback": "pf16"}, "'pf16'.*did you mean 'fp16'", id="fallback"),
        pytest.param({"fallback": "int8"}, "`fallback`.*'int8'", id="fallback-int8"),
        pytest.param({"fallback": 3}, "3", id="fallback-number"),
        pytest.param({"inputs": {"fromat": "int8"}}, "inputs.*'fromat'.*'format'", id="spec-key"),
        pytest.param({"inputs": {"axis": 1}}, "`inputs`.*per tensor.*axis=1", id="inputs-axis"),
        pytest.param({"inputs": {"symmetric": False}}, "`symmetric`.*range: lsq", id="asymmetric"),
        pytest.param({"inputs": {"format": "fp16", "signed": False}}, "`signed`", id="unsigned-fp"),
        pytest.param({"weights": {"axis": "0"}}, "`axis`.*'0'", id="axis-string"),
        pytest.param({"weights": {"axis": True}}, "`axis`.*True", id="axis-bool"),
        pytest.param({"weights": 8}, "weights.*8", id="spec-number"),
        pytest.param({"weights": None}, "weights.*None", id="spec-null"),
        pytest.param({"weights": {"format": 8}}, "8", id="format-number"),
        pytest.param({"weights": {"format": ["int8"]}}, "int8", id="format-list"),
        pytest.param({"rules": "fc"}, "`rules`.*list.*'fc'", id="rules-string"),
        pytest.param({"rules": {"name": "fc"}}, "`rules`.*list", id="rules-mapping"),
        pytest.param({"rules": 3}, "`rules`.*3", id="rules-number"),
        pytest.param({"rules": ["fc"]}, "rule 1.*mapping.*'fc'", id="rule-string"),
        pytest.param(
            {"rules": [{"name": "a", "format": "fp16"}, {"nmae": "fc"}]},
            "rule 2.*'nmae'.*'name'",
            id="rule-key",
        ),
        pytest.param({"rules": [{"format": "fp16"}]}, "`name` or a `type`", id="rule-no-target"),
        pytest.param({"rules": [{"name": "fc"}]}, "'fc'.*neither", id="rule-no-format"),
        pytest.param(
            {"rules": [{"name": "fc", "format": "fp16", "weights": "int8"}]}, "both", id="rule-both"
        ),
        pytest.param(
            {"rules": [{"name": "fc", "format": "skpi"}]}, "did you mean 'skip'", id="rule-format"
        ),
        pytest.param(
            {"rules": [{"name": "fc", "inputs": {"format": "int8", "axis": 1}}]},
            "inputs.*per tensor.*axis=1",
            id="rule-inputs-axis",
        ),
        pytest.param({"inputs": {"signed": "no"}}, "`signed`.*'no'", id="signed-string"),
        pytest.param({"inputs": {"range": "lsp"}}, "`range`.*did you mean 'lsq'", id="range"),
        pytest.param(
            {"weights": {"symmetric": False, "range": "lsq"}},
            "`symmetric`",
            id="asymmetric-weights",
        ),
        pytest.param({"inputs": {"narrow": "no"}}, "`narrow`.*'no'", id="narrow-string"),
        pytest.param({"inputs": {"symmetric": "no"}}, "`symmetric`.*'no'", id="symmetric-string"),
        pytest.param({3: "int8"}, "3", id="key-number"),
        pytest.param(["int8"], r"recipe.*mapping.*\['int8'\]", id="list"),
        pytest.param("int8", "mapping.*'int8'", id="string"),
    ],
)
def test_wrong_recipes_say_what_is_wrong(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe.from_dict(values)


def test_a_number_as_name_is_a_layer_of_a_sequential_or_refused() -> None:
    """``name: 0`` in YAML is an int; ``nn.Sequential`` calls its layers 0, 1, ..."""
    layers = {"0": nn.Linear(32, 32), "1": nn.Linear(32, 32)}
    try:
        recipe = Recipe.from_dict({"rules": [{"name": 0, "format": "fp16"}]})
    except ValueError:
        return
    recipe.check_rules(layers)
    assert recipe.layer_spec("0", layers["0"]).inputs.format == "fp16"
    assert recipe.layer_spec("1", layers["1"]).inputs.format == "int8"


@pytest.mark.parametrize(
    "text",
    ["weights: [int8", "a: b: c", "\tweights: int8", "weights: !!python/object:os.system x"],
    ids=["open-list", "two-colons", "tab", "python-object"],
)
def test_malformed_yaml_names_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)

    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        Recipe.from_yaml(path)


def test_binary_file_is_not_yaml(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81" * 10)

    with pytest.raises(ValueError, match=r"recipe\.yaml"):
        Recipe.from_yaml(path)


@pytest.mark.parametrize("parse", [Recipe.from_yaml, Recipe.parse], ids=["from_yaml", "parse"])
def test_missing_file(tmp_path: Path, parse: Callable[[Path], Recipe]) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        parse(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("tensorrt_int", "tensorrt_int8"), ("weight_only", "weight_only_int8")],
    ids=str,
)
def test_unknown_preset_suggests_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}'; did you mean '{nearest}'"):
        Recipe.parse(name)


class MyLinear(nn.Linear):
    pass


LAYERS = {
    "stem": nn.Conv2d(3, 32, 3),
    "body.dw": nn.Conv2d(32, 32, 3, groups=32),
    "body.pw": nn.Conv2d(32, 64, 1),
    "head.fc": MyLinear(64, 32),
    "head.out": nn.Linear(32, 10),
}


def formats(recipe: Recipe) -> dict[str, str]:
    return {n: recipe.layer_spec(n, layer).inputs.format for n, layer in LAYERS.items()}


@pytest.mark.parametrize(
    ("rule", "matched"),
    [
        pytest.param(Rule(name="stem", format="fp16"), {"stem"}, id="name"),
        pytest.param(Rule(name="body.*", format="fp16"), {"body.dw", "body.pw"}, id="glob"),
        pytest.param(Rule(name="*.?w", format="fp16"), {"body.dw", "body.pw"}, id="question-mark"),
        pytest.param(Rule(type="MyLinear", format="fp16"), {"head.fc"}, id="class"),
        pytest.param(Rule(type="Linear", format="fp16"), {"head.fc", "head.out"}, id="base-class"),
        pytest.param(
            Rule(type="Conv*", format="fp16"), {"stem", "body.dw", "body.pw"}, id="class-glob"
        ),
        pytest.param(
            Rule(name="body.*", type="Conv2d", format="fp16"), {"body.dw", "body.pw"}, id="both"
        ),
        pytest.param(Rule(name="STEM*", format="fp16"), set(), id="case-matters"),
        pytest.param(Rule(name="head", format="fp16"), set(), id="no-prefix-match"),
        pytest.param(Rule(type="Module", format="fp16"), set(), id="Module-is-no-type"),
        pytest.param(Rule(name="body.*", type="Linear", format="fp16"), set(), id="both-differ"),
    ],
)
def test_rules_match(rule: Rule, matched: set[str]) -> None:
    recipe = Recipe(rules=(rule,))

    assert {n for n, f in formats(recipe).items() if f == "fp16"} == matched
    if matched:
        recipe.check_rules(LAYERS)
    else:
        with pytest.raises(ValueError, match="matches none"):
            recipe.check_rules(LAYERS)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        pytest.param(
            Rule(name="body.pv", format="fp16"), "'body.pv'.*did you mean 'body.pw'", id="name"
        ),
        pytest.param(
            Rule(type="Linaer", format="fp16"), "'Linaer'.*did you mean '.*Linear'", id="type"
        ),
        pytest.param(
            Rule(name="zzz", format="fp16"), "'zzz'.*choose from stem, body.dw", id="far-off"
        ),
        pytest.param(
            Rule(name="stem", type="Linear", format="fp16"), "'stem'.*and type 'Linear'", id="both"
        ),
    ],
)
def test_a_rule_that_matches_nothing_suggests_the_nearest(rule: Rule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recipe(rules=(Rule(name="*", format="int8"), rule)).check_rules(LAYERS)


def test_last_rule_wins() -> None:
    rules = (
        Rule(name="*", format="fp16"),
        Rule(type="Linear", format="bf16"),
        Rule(name="head.out", format="skip"),
    )

    assert formats(Recipe(rules=rules)) == {
        "stem": "fp16",
        "body.dw": "fp16",
        "body.pw": "fp16",
        "head.fc": "bf16",
        "head.out": "fp32",
    }
    assert set(formats(Recipe(rules=rules[::-1])).values()) == {"fp16"}


def test_rules_for_weights_and_inputs_add_up() -> None:
    recipe = Recipe(
        rules=(
            Rule(name="stem", weights=QuantSpec("int4", axis=0)),
            Rule(name="stem", inputs=QuantSpec("int8", signed=False)),
        )
    )
    spec = recipe.layer_spec("stem", LAYERS["stem"])

    assert spec.weights == QuantSpec("int4", axis=0, narrow=True)
    assert spec.inputs == QuantSpec("int8", signed=False)


def test_a_format_keeps_the_axis_and_drops_the_sign() -> None:
    recipe = Recipe(inputs=QuantSpec(signed=False), rules=(Rule(name="stem", format="fp8_e4m3"),))
    spec = recipe.layer_spec("stem", LAYERS["stem"])

    assert spec.weights == QuantSpec("fp8_e4m3", axis=0, narrow=True)
    assert spec.inputs == QuantSpec("fp8_e4m3")


def test_a_layer_computes_in_one_float_format() -> None:
    with pytest.raises(ValueError, match=r"'fp16'.*'int8'.*one format"):
        Recipe(rules=(Rule(name="stem", weights=QuantSpec("fp16")),)).layer_spec(
            "stem", LAYERS["stem"]
        )


@pytest.mark.parametrize(
    ("layer", "small"),
    [
        pytest.param(nn.Linear(16, 16), False, id="linear-16-16"),
        pytest.param(nn.Linear(15, 64), True, id="linear-few-inputs"),
        pytest.param(nn.Linear(64, 15), True, id="linear-few-outputs"),
        pytest.param(nn.Conv2d(3, 32, 3), False, id="stem-27-inputs"),
        pytest.param(nn.Conv2d(3, 32, 1), True, id="pointwise-3-inputs"),
        pytest.param(nn.Conv2d(32, 32, 3, groups=32), True, id="depthwise"),
        pytest.param(nn.Conv2d(32, 64, 3, groups=32), True, id="depthwise-multiplier"),
        pytest.param(nn.Conv2d(64, 64, 3, groups=4), False, id="grouped-16-each"),
        pytest.param(nn.Conv2d(64, 32, 3, groups=4), True, id="grouped-8-outputs-each"),
        pytest.param(nn.Conv1d(4, 16, 4), False, id="conv1d-16-inputs"),
        pytest.param(nn.Conv3d(1, 16, 3), False, id="conv3d-27-inputs"),
        pytest.param(nn.ConvTranspose2d(64, 16, 2), False, id="transposed"),
        pytest.param(nn.ConvTranspose2d(16, 8, 2), True, id="transposed-few-outputs"),
        pytest.param(nn.ConvTranspose2d(32, 32, 3, groups=32), True, id="transposed-depthwise"),
        pytest.param(nn.ConvTranspose2d(32, 64, 2, groups=4), False, id="transposed-grouped"),
    ],
)
def test_fallback_takes_small_layers(layer: nn.Module, small: bool) -> None:
    assert Recipe(fallback="fp16").layer_spec("x", layer).inputs.format == (
        "fp16" if small else "int8"
    )
    assert Recipe().layer_spec("x", layer).inputs.format == "int8"


def test_rules_win_over_the_fallback() -> None:
    recipe = Recipe(fallback="fp16", rules=(Rule(name="body.dw", format="int8"),))

    assert formats(recipe) == {
        "stem": "int8",
        "body.dw": "int8",
        "body.pw": "int8",
        "head.fc": "int8",
        "head.out": "fp16",
    }
