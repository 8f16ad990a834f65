"""How the kernel for one and two rows divides its work: host code, which needs no GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "csrc" / "cuda" / "tests" / "stream_plan.cpp"
COMPILER = shutil.which("c++")


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")
def test_every_plan_covers_the_product_and_fits(tmp_path: Path) -> None:
    assert COMPILER is not None
    program = tmp_path / "stream_plan"
    subprocess.run([COMPILER, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", SOURCE, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) > 1000
