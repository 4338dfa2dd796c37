"""Every snippet of README and docs runs, and every command in them exists."""

import re
from pathlib import Path

import pytest
import yaml

import lq
from lq import calibrators, engines, layers

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def snippets() -> list[object]:
    return [
        # The page on migration runs what other toolkits say, which they warn of.
        pytest.param(
            code,
            id=f"{page.stem}-{i}",
            marks=[pytest.mark.filterwarnings("ignore")] * (page.stem == "migration"),
        )
        for page in PAGES
        for i, code in enumerate(blocks(page, "python"))
    ]


@pytest.fixture
def registries(monkeypatch) -> None:
    """What a snippet registers is forgotten again."""
    tables = ((calibrators, "CALIBRATORS"), (layers, "QUANT_CLASSES"), (engines, "ONNX_ENGINES"))
    for module, name in tables:
        monkeypatch.setattr(module, name, dict(getattr(module, name)))


@pytest.mark.parametrize("code", snippets())
@pytest.mark.usefixtures("registries")
def test_snippet_runs(code: str, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "snippet", "exec"), {"__name__": "snippet"})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_recipes_and_links(page: Path) -> None:
    for text in blocks(page, "yaml"):
        lq.Recipe.from_dict(yaml.safe_load(text))
    for link in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert "://" in link or (page.parent / link).exists(), link
    for config in re.findall(r"configs/\w+\.yaml", page.read_text()):
        assert (ROOT / config).is_file(), config


def test_readme_has_two_complete_commands() -> None:
    section = (ROOT / "README.md").read_text().split("## Get started")[1].split("\n## ")[0]
    commands = re.findall(r"^```bash\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    assert len(commands) == 2
    assert all(command.count("\n") == 1 for command in commands)
    assert "lq fit" in commands[0]
    assert "pytest" in commands[1]
    assert commands[1].strip() in (ROOT / ".ci/run").read_text()
