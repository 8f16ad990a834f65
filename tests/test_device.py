"""What the CUDA launchers find out about a device: host code, which nvcc compiles and which needs no GPU."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CUDA = Path(__file__).parents[1] / "csrc" / "cuda"
COMPILER = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


@pytest.mark.skipif(COMPILER is None, reason="there is no nvcc")
def test_limits_are_those_of_the_code_and_of_the_device(tmp_path: Path) -> None:
    assert COMPILER is not None
    program = tmp_path / "device"
    sources = (CUDA / "device.cu", CUDA / "tests" / "device.cu")
    options = ("-std=c++17", "-arch=sm_80", "--cudart", "none", "-Werror", "all-warnings", "-Xcompiler=-Wall")
    built = subprocess.run([COMPILER, *options, *sources, "-o", program], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
