import os
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core, and so have its processes
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real images and weights that are not part of the repository."""
    default = Path(__file__).resolve().parents[1] / "../shared/data"
    folder = Path(os.environ.get("LQ_DATA", default)).resolve()
    if not (folder / "weights").is_dir():
        pytest.skip(f"there is no shared data in {folder}; set LQ_DATA")
    return folder
