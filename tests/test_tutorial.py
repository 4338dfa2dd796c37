"""The tutorial runs from top to bottom, and what it shows is what it measured."""

import json
import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import lq

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "docs" / "tutorial.ipynb"


def outputs(notebook) -> list:
    return [o for cell in notebook.cells for o in cell.get("outputs", ())]


def pictures(notebook) -> list[int]:
    """Numbers of the cells that show one."""
    cells = enumerate(notebook.cells)
    return [
        i for i, c in cells if any("image/png" in o.get("data", {}) for o in c.get("outputs", ()))
    ]


def text(notebook) -> str:
    shown = [o.get("text") or o.get("data", {}).get("text/markdown", "") for o in outputs(notebook)]
    return "\n".join(shown)


@pytest.fixture(scope="module")
def committed():
    return nbformat.read(NOTEBOOK, 4)


def test_it_is_committed_with_its_outputs(committed) -> None:
    nbformat.validate(committed)
    assert NOTEBOOK.stat().st_size < 1e6
    drawing = [
        i for i, c in enumerate(committed.cells) if c.cell_type == "code" and "plot_" in c.source
    ]
    first, *drawing = drawing  # which imports them
    assert "import" in committed.cells[first].source
    assert set(pictures(committed)) == set(drawing)
    assert not [
        o for o in outputs(committed) if o.output_type == "error" or o.get("name") == "stderr"
    ]
    assert "site-packages" not in text(committed)
    assert committed.cells[1].source.startswith('DATA = "digits"')


def test_it_runs_and_keeps_what_it_measured(committed, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.from_dict({**committed})
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    where = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=where, record_timing=False).execute()
    assert pictures(notebook) == pictures(committed)
    assert not [o for o in outputs(notebook) if o.get("name") == "stderr"]

    folder = tmp_path / "runs" / "tutorial"
    results = json.loads((folder / "results.json").read_text())
    found = lq.Comparison.load(folder / "comparison")
    assert results["comparison"] == json.loads((folder / "comparison/comparison.json").read_text())
    assert {row.name for row in found.measured} >= {"float", "PTQ entropy", "QAT", "mixed"}
    assert not [row.failed for row in found if row.failed]
    assert results["baseline"]["top1"] > 0.95
    assert results["models"]["ResNet-18"]["parameters"] == 11_689_512  # torchvision's documentation
    worst = max(row["drop"] for row in results["ptq"] if row["bits"] == 3)
    assert results["qat"]["drop"] < worst
    compression = found.costs.total("size_mb", {}) / results["mixed_precision"]["size_mb"]
    assert compression >= 5
    shown = text(notebook)
    for row in results["ptq"]:
        assert f"| int{row['bits']} | {row['calibrator']} | {row['top1']:.2%} |" in shown
    for row in found.measured:
        assert row.evaluation is not None
        assert f"{row.evaluation.top1:.2%}" in shown
    assert (folder / "report" / "report.html").is_file()
