"""The package as pip builds it: contents of the wheel, pure-Python builds that work, modes that cannot be met."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

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
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, so that no build output of the checkout gets in."""
    source = tmp_path_factory.mktemp("source")
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
    return source


def build_wheel(source: Path, output: Path, **env: str) -> Path:
    pytest.importorskip("setuptools", minversion="77")
    shutil.rmtree(source / "build", ignore_errors=True)
    build = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", output, source)
    run(sys.executable, *build, **env)
    (built,) = output.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pure-Python wheel."""
    return build_wheel(source, tmp_path_factory.mktemp("wheel"), FASTLORA_BUILD="none")


def run_installed(wheel: Path, folder: Path, code: str) -> list[str]:
    """The lines that ``code`` prints where the wheel, and not the checkout, is the package."""
    zipfile.ZipFile(wheel).extractall(folder)
    # An editable install of the checkout would lend its extension to any package of the same name.
    alone = (
        "import sys; sys.meta_path[:] = [f for f in sys.meta_path if 'Editable' not in getattr(f, '__name__', '')]\n"
    )
    return run(sys.executable, "-c", alone + code, cwd=folder, PYTHONPATH=str(folder)).splitlines()


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
    code = (
        "import fastlora, torch\n"
        "from fastlora import native\n"
        "from fastlora.nf4 import NF4Weight\n"
        "print(fastlora.__file__)\n"
        "print(native.available('cpu'))\n"
        "print(tuple(NF4Weight.quantize(torch.randn(4, 64)).dequantize().shape))\n"
    )
    lines = run_installed(wheel, tmp_path, code)
    assert Path(lines[0]).is_relative_to(tmp_path)
    assert lines[1] == "fastlora._C is not built: the package was built with FASTLORA_BUILD=none"
    assert lines[2] == "(4, 64)"


INFO = "import sys; from fastlora.cli import main; sys.exit(main(['info']))"
"""What `fastlora info` runs."""


def test_without_a_compiler(source: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    environment = {"FASTLORA_BUILD": "auto", "CXX": "", "PATH": str(tmp_path / "bin")}
    built = build_wheel(source, tmp_path / "wheel", **environment)
    assert built.name.endswith("-py3-none-any.whl")
    lines = run_installed(built, tmp_path / "installed", INFO)
    reason = "fastlora._C is not built: there was no C++ compiler at build time (c++ is not on PATH; CXX names another)"
    assert f"extension, cpu   {reason}" in lines
    assert "backend torch      cpu: available" in lines
    assert f"backend cpu        cpu: {reason}" in lines


def test_a_compiler_that_fails(source: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-dumpversion | --version) echo 12.2.0 ;; *) exit 1 ;; esac\n')
    compiler.chmod(0o755)
    command = ("build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path / 'objects'}")
    assert "rror compiling objects" in failure(source, *command, FASTLORA_BUILD="cpu", CXX=str(compiler))
    run(sys.executable, "setup.py", *command, cwd=source, FASTLORA_BUILD="auto", CXX=str(compiler))
    reason = (tmp_path / "fastlora" / "_build_info.txt").read_text()
    assert reason.startswith("the extension did not compile (Error compiling objects")


def with_cuda_torch(source: Path, folder: Path, release: str, code: str, *command: str, **env: str) -> Any:
    """Run code as ``setup.py`` with a torch that says it is of CUDA 12.8, and an nvcc that only knows its release."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    said = f"Cuda compilation tools, release {release}, V{release}.88"
    nvcc.write_text(f'#!/bin/sh\ncase "$*" in *--version) echo "{said}" ;; *) exit 1 ;; esac\n')
    nvcc.chmod(0o755)
    # A CPU build of torch looks for no toolkit.
    code = f"cpp_extension.CUDA_HOME = {str(folder)!r}; torch.version.cuda = '12.8'; {code}"
    code = f"import sys, torch; from torch.utils import cpp_extension; sys.argv = {['setup.py', *command]}; {code}"
    path = os.pathsep.join((str(nvcc.parent), os.environ["PATH"]))
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=source,
        env={**os.environ, "PATH": path, "FASTLORA_BUILD": "auto", **env},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_cuda_code_that_does_not_compile_leaves_the_cpu_code(source: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *-dumpversion | --version) echo 12.2.0; exit ;; esac\n'
        'while [ "$1" ]; do if [ "$1" = -o ]; then touch "$2"; fi; shift; done\n'
    )
    compiler.chmod(0o755)
    command = ("build_ext", f"--build-lib={tmp_path}", f"--build-temp={tmp_path / 'objects'}")
    done = with_cuda_torch(
        source, tmp_path, "12.4", "import runpy; runpy.run_path('setup.py')", *command, CXX=str(compiler)
    )
    assert done.returncode == 0, done.stderr
    reason = (tmp_path / "fastlora" / "_build_info.txt").read_text()
    assert reason.startswith("the CUDA code did not compile (")
    built = sorted(path.name.partition(".")[0] for path in (tmp_path / "fastlora").glob("*.so"))
    assert built == ["_C", "_autograd_" + re.sub(r"\W", "_", torch.__version__.partition("+")[0])]


@pytest.mark.parametrize(("release", "cuda"), [("12.4", True), ("13.0", False), ("none", False)])
def test_auto_leaves_cuda_code_out_where_nvcc_is_not_of_torchs_version(
    source: Path, tmp_path: Path, release: str, cuda: bool
) -> None:
    code = (
        "import runpy; print(*(source for one in runpy.run_path('setup.py')['extensions'] for source in one.sources))"
    )
    done = with_cuda_torch(source, tmp_path, release, code, "--version")
    assert "csrc/cpu/linear.cpp" in done.stdout, done.stderr
    assert ("csrc/cuda/tiles.cu" in done.stdout) == cuda


@pytest.mark.parametrize(
    ("wanted", "built"),
    [
        ("8.6 9.0;12.0+PTX", "8.6 9.0a;12.0+PTX"),
        ("Ampere;Hopper", "Ampere;9.0a+PTX"),
        ("native", "8.9;9.0a"),
        ("", "8.0;8.6;8.9;9.0a;10.0+PTX"),
    ],
)
def test_the_code_of_9_0_is_built_with_the_instructions_of_9_0_alone(
    source: Path, tmp_path: Path, wanted: str, built: str
) -> None:
    code = (
        "capabilities = [(9, 0), (8, 9), (9, 0)]; torch.cuda.device_count = lambda: 3; "
        "torch.cuda.get_device_capability = lambda i: capabilities[i]; "
        "import os, runpy; runpy.run_path('setup.py'); print('built for', os.environ['TORCH_CUDA_ARCH_LIST'])"
    )
    done = with_cuda_torch(source, tmp_path, "12.8", code, "--version", TORCH_CUDA_ARCH_LIST=wanted)
    assert f"built for {built}\n" in done.stdout, done.stderr


def test_no_pin_keeps_a_cuda_build_of_torch_out() -> None:
    """Each of them needs one version of Triton and of NVIDIA's libraries."""
    pins = [line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()]
    assert "torch" in pins
    assert not [name for name in pins if name == "triton" or name.startswith(("nvidia", "cuda"))]


@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_a_mode_that_cannot_be_met(source: Path, tmp_path: Path, mode: str) -> None:
    (tmp_path / "bin").mkdir()
    error = failure(source, "--version", FASTLORA_BUILD=mode, CXX="", PATH=str(tmp_path / "bin"))
    assert f"FASTLORA_BUILD={mode} cannot be met: there was no C++ compiler" in error


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is built with CUDA")
def test_cuda_needs_a_cuda_torch(source: Path) -> None:
    error = failure(source, "--version", FASTLORA_BUILD="cuda")
    assert "FASTLORA_BUILD=cuda needs nvcc (found" in error
    assert f"and a CUDA torch (found {torch.__version__})" in error


def failure(source: Path, *command: str, **env: str) -> str:
    """What ``setup.py`` says as it fails."""
    done = subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=source,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    return done.stderr + done.stdout


def test_unknown_build_mode(source: Path) -> None:
    assert "FASTLORA_BUILD must be auto, cpu, cuda or none, got 'gpu'" in failure(
        source, "--version", FASTLORA_BUILD="gpu"
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_builds_again_after_a_change_of_any_source() -> None:
    said = run("make", "-pn", "lint", cwd=ROOT)
    (names,) = re.findall(r"^SOURCES := (.*)$", said, re.M)
    wanted = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert set(names.split()) == wanted
