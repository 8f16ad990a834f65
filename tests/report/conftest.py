from __future__ import annotations

from pathlib import Path

import pytest
from run_files import write_run


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with four runs: the best is b."""
    folder = tmp_path / "runs"
    write_run(folder / "a", r=4, end=3.0)
    write_run(folder / "b", r=16, end=1.5)
    write_run(folder / "c", r=4, lr=1e-2, end=2.5, method="dora")
    write_run(folder / "d <&> e", r=8, end=4.0, finished=False)
    return folder
