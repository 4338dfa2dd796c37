"""The documentation site builds without a warning, and leaves nothing public out."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lq
import lq.callbacks
import lq.interop
import lq.plots

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    command += ["-d", str(folder / "doctrees"), str(DOCS), str(folder / "html")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=DOCS.parent)
    assert ran.returncode == 0, ran.stderr
    return folder / "html"


def test_every_page_is_there(site: Path) -> None:
    for page in (*DOCS.glob("*.md"), *DOCS.glob("*.ipynb")):
        assert (site / f"{page.stem}.html").is_file(), page


def test_reference_has_every_public_name(site: Path) -> None:
    ids = set(re.findall(r'id="(lq\.[\w.]+)"', (site / "api.html").read_text()))
    names = [f"lq.{name}" for name in lq.__all__]
    names += [f"lq.callbacks.{name}" for name in lq.callbacks.__all__]
    names += [f"lq.interop.{name}" for name in lq.interop.__all__]
    names += [f"lq.plots.{name}" for name in lq.plots.__all__]
    assert not set(names) - ids


def test_mistakes_are_errors(tmp_path) -> None:
    (tmp_path / "conf.py").write_text((DOCS / "conf.py").read_text())
    (tmp_path / "index.md").write_text("# Page\n\n[nowhere](nowhere.md)\n")
    command = [sys.executable, "-m", "sphinx", "-W", "-q", str(tmp_path), str(tmp_path / "html")]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=DOCS.parent)
    assert ran.returncode != 0
    assert "nowhere" in ran.stderr
