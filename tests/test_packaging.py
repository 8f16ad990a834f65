"""The package as pip builds it: contents of the wheel, and a pure-Python build that imports and works."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path | None = None, **env: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pure-Python wheel, built from a copy of the sources so that no build output of the checkout gets in."""
    pytest.importorskip("setuptools", minversion="77")
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            (source / name).write_bytes((ROOT / name).read_bytes())
    for path in [*ROOT.glob("fastlora/**/*"), *ROOT.glob("tests/*.py"), *ROOT.glob("csrc/**/*")]:
        if path.is_file() and path.suffix not in (".so", ".pyc") and path.name != "_build_info.txt":
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    readme = source / "README.md"
    if not readme.exists():
        readme.write_text("fastlora\n")
    build = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", output, source)
    run(sys.executable, *build, FASTLORA_BUILD="none")
    (built,) = output.glob("*.whl")
    return built


def test_wheel_contents(wheel: Path) -> None:
    assert re.fullmatch(r"fastlora_kernels-[\w.]+-py3-none-any\.whl", wheel.name)
    names = set(zipfile.ZipFile(wheel).namelist())
    package = {name for name in names if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in package} == {"fastlora"}
    assert {"fastlora/__init__.py", "fastlora/py.typed", "fastlora/native.py"} <= package
    assert not [name for name in package if name.endswith((".so", ".cpp", ".cu", ".h", ".pyc"))]
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("fastlora/**/*.py")}
    assert sources == {name for name in package if name.endswith(".py")}
    tables = {str(path.relative_to(ROOT)) for path in ROOT.glob("fastlora/**/*.json")}
    assert tables == {name for name in package if name.endswith(".json")}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    text = archive.read(name).decode()
    assert "Name: fastlora-kernels\n" in text
    assert "License-Expression: Apache-2.0\n" in text
    required = [line for line in text.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(re.split(r"[^\w-]", line.split(": ")[1])[0] for line in required) == ["numpy", "torch"]


def test_pure_python_install(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        # An editable install of the checkout would lend its extension to any package of the same name.
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
        "import fastlora, torch\n"
        "from fastlora import native\n"
        "from fastlora.nf4 import NF4Weight\n"
        "print(fastlora.__file__)\n"
        "print(native.available('cpu'))\n"
        "print(tuple(NF4Weight.quantize(torch.randn(4, 64)).dequantize().shape))\n"
    )
    lines = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path)).splitlines()
    assert Path(lines[0]).is_relative_to(tmp_path)
    assert lines[1] == "fastlora._C is not built: the package was built with FASTLORA_BUILD=none"
    assert lines[2] == "(4, 64)"


def test_unknown_build_mode() -> None:
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "FASTLORA_BUILD": "gpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "FASTLORA_BUILD must be auto, cpu, cuda or none, got 'gpu'" in done.stderr
