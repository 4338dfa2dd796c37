"""What recipes, plans, sweeps, ranges and comparisons say."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lq.inspection.result import Inspection
from lq.plan import PrecisionPlan
from lq.ranges import Ranges
from lq.sensitivity import Sensitivity
from lq.spec import Recipe, Rule


def inspect_yaml(path: Path) -> Inspection:
    """Return what a recipe or a plan says."""
    recipe = Recipe.from_yaml(path)
    if not path.read_text(encoding="utf-8").strip():
        raise ValueError(f"Expected {str(path)!r} to hold a recipe or a plan, but it is empty.")
    try:
        plan = PrecisionPlan.from_yaml(path)
    except ValueError:
        return Inspection(str(path), "recipe", _recipe(recipe), [_rule(r) for r in recipe.rules])
    facts = {"layers": dict(Counter(plan.values()).most_common()), **_recipe(recipe)}
    rows = [{"layer": layer, "format": format} for layer, format in plan.items()]
    return Inspection(str(path), "plan", facts, rows)


def _recipe(recipe: Recipe) -> dict[str, Any]:
    plain = recipe.to_dict()
    weights, inputs = plain.pop("weights"), plain.pop("inputs")
    del plain["rules"]
    return {"weights": _words(weights), "inputs": _words(inputs), **plain}


def _words(spec: str | dict[str, Any]) -> str:
    if isinstance(spec, str):
        return spec
    return ", ".join(v if k == "format" else f"{k}: {v}" for k, v in spec.items())


def _rule(rule: Rule) -> dict[str, Any]:
    return {
        "name": rule.name,
        "type": rule.type,
        "format": rule.format,
        "weights": rule.weights and rule.weights.format,
        "inputs": rule.inputs and rule.inputs.format,
    }


def inspect_json(path: Path) -> Inspection:
    """Return what a sweep, a file of ranges or a comparison says."""
    try:
        keys = json.loads(path.read_text(encoding="utf-8")).keys()
    except (ValueError, AttributeError, RecursionError):
        raise ValueError(
            f"Expected {str(path)!r} to be a JSON file of lq, but it is no JSON object."
        ) from None
    if "ranges" in keys:
        return _ranges(path)
    if "found" in keys:
        return _sensitivity(path)
    if "explanation" in keys:
        return _comparison(path)
    raise ValueError(
        f"Expected {str(path)!r} to be a sweep, ranges or a comparison of lq, but it has the keys "
        f"{', '.join(list(keys)[:5]) or 'of neither'}; of an engine's sidecar name the engine."
    )


def _ranges(path: Path) -> Inspection:
    ranges = Ranges.load(path)
    facts = {"calibrator": ranges.calibrator, "model": ranges.model[:16], "data": ranges.data[:16]}
    rows = []
    for name, found in ranges.found.items():
        amax = found.amax
        ends = [float(amax.min()), float(amax.max())] if amax.dim() else float(amax)
        rows.append({"quantizer": name, "amax": ends, "calibrator": found.calibrator})
    return Inspection(str(path), "ranges", facts, rows)


def _sensitivity(path: Path) -> Inspection:
    found = Sensitivity.from_json(path)
    facts = {
        "method": found.method,
        "metric": found.metric,
        "samples": found.n,
        "float top-1": found.top1,
        "formats": ", ".join(found.formats),
    }
    rows = [
        {
            "unit": row.layer,
            "format": row.format,
            "part": row.part,
            "top-1 drop": row.top1_drop,
            "loss": row.loss_increase,
            "kl": row.kl,
            "SQNR dB": row.sqnr_db,
        }
        for format in found.formats
        for row in found.ranked(format)
    ]
    return Inspection(str(path), "sensitivity", facts, rows)


def _comparison(path: Path) -> Inspection:
    from lq.comparison import Comparison  # which imports every engine

    found = Comparison.load(path)
    facts = {
        "model": found.model,
        "parameters": found.parameters,
        "data": found.data,
        "samples": found.n,
        "target": found.target,
        "on": found.hardware,
    }
    rows = [dict(zip(found.header(), found.cells(row), strict=True)) for row in found.measured]
    return Inspection(str(path), "comparison", facts, rows)
