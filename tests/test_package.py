"""The package as a whole: public names, layout, direction of imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lq
import lq.callbacks

try:
    import tomllib
except ImportError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
LEVELS = [
    {
        *("attention", "functional", "files", "formats", "gemm", "messages", "ranks", "tracing"),
        *("paired", "outcome", "timing", "peak_memory", "tables", "toolkits"),
    },
    {"tensor_spec"},
    {"spec"},
    {"histogram", "observers", "calibrators", "quantizer"},
    {"requantize"},
    {"layers"},
    {"sites", "dataflow", "rectified", "residual", "placement"},
    {"state", "surgery", "modes", "batches", "samples", "checkpoint", "qat"},
    {
        *("digest", "ranges", "scoring", "collector", "calibration", "costs"),
        *("distillation", "distiller", "latent", "oscillation", "stabilizer"),
        *("quantizer_health", "quantizer_watch"),
    },
    {"schedule", "quantized_training"},
    {"repairs"},
    {"sensitivity"},
    {"export"},
    {"engines"},
    {
        *("agreement", "parity", "layer_parity", "evaluation"),
        *("curve", "convergence", "distribution", "rounding"),
        *("plan", "latency", "mixed_precision", "interop"),
    },
    {"datasets"},
    {"models", "restore"},
    {"comparison"},
    {"inspection"},
    {"plots"},
    {"report"},
    {"data", "module"},
    {"callbacks"},
    {"cli", "__main__"},
]
LIGHTNING = {"module", "data", "callbacks", "cli"}
# An export proves itself, so it calls what stands above it.
UPWARDS = {("export", "parity"), ("export", "engines")}


def sources() -> list[Path]:
    """All files, those of the callbacks by their place in the repository."""
    own = [p for p in (ROOT / "lq").rglob("*.py") if "callbacks" not in p.parts]
    return sorted([*own, *(ROOT / "callbacks").glob("*.py")])


def unit(path: Path) -> str:
    """The part of the package a file belongs to: a folder, or the file itself."""
    if path.parent.name == "callbacks":
        return "callbacks"
    return path.relative_to(ROOT / "lq").with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            if node.module == "lq":
                found |= {f"lq.{alias.name}" for alias in node.names}
    return found


def level(name: str) -> int:
    return next(i for i, names in enumerate(LEVELS) if name in names)


def test_public_names() -> None:
    assert lq.__all__ == sorted(lq.__all__)
    assert set(lq.__all__) == {
        "Comparison",
        "DriftMonitor",
        "Method",
        "compare",
        "Mode",
        "PrecisionConstraints",
        "PrecisionPlan",
        "QuantModule",
        "QuantSpec",
        "Quantizer",
        "Recipe",
        "Rule",
        "accuracy_guard",
        "build_engine",
        "calibrate",
        "calibration_curve",
        "count_costs",
        "dequantize",
        "evaluate",
        "export_onnx",
        "find_ranges",
        "inspect",
        "lint",
        "load_from_checkpoint",
        "measure_latency",
        "open_engine",
        "pareto_front",
        "parity",
        "quantize",
        "repair",
        "search",
        "sweep",
        "tensor_histograms",
        "verified_search",
        "weight_error",
    }
    for name in lq.__all__:
        assert callable(getattr(lq, name)), name
    assert set(lq.callbacks.__all__) == {
        "Calibration",
        "Distillation",
        "EngineComparison",
        "Export",
        "MixedPrecision",
        "OscillationControl",
        "QuantizationAwareTraining",
        "QuantizerMonitor",
        "SensitivitySweep",
    }


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="quantise"):
        _ = lq.quantise


@pytest.mark.parametrize("path", sources(), ids=lambda p: f"{unit(p)}-{p.stem}")
def test_imports_point_one_way(path: Path) -> None:
    here = unit(path)
    if here == "__init__":
        return
    for module in imports(path):
        parts = module.split(".")
        if parts[0] == "lq" and len(parts) > 1 and parts[1] != here:
            allowed = level(parts[1]) <= level(here) or (here, parts[1]) in UPWARDS
            assert allowed, f"{path.name} imports {module}"
        assert parts[0] != "lightning" or here in LIGHTNING, f"{path.name} imports lightning"


def test_import_is_light() -> None:
    heavy = ["lightning", "onnx", "onnxscript", "onnxruntime", "matplotlib", "sklearn"]
    heavy += ["tensorrt", "tensorrt_rtx"]
    code = f"import sys, lq; print([m for m in {heavy} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


def test_packages_are_those_on_disk() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    on_disk = {"lq.callbacks"} | {
        ".".join(file.parent.relative_to(ROOT).parts)
        for file in (ROOT / "lq").rglob("__init__.py")
        if file.parent.name != "callbacks"
    }
    assert set(listed) == on_disk


def test_version_is_the_distributions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == lq.__version__
    assert f"## {lq.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_callbacks_refuse_another_name() -> None:
    code = "import sys; sys.path.insert(0, '.'); import callbacks"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "Import these callbacks as lq.callbacks" in ran.stderr
