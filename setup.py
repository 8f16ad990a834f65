"""Builds the optional extensions; everything else is in pyproject.toml.

fastlora._C has the kernels, for every torch from 2.10 on and every Python; fastlora._autograd_<torch> has the autograd
node, for the torch and the Python that build it, and is left out where it does not compile.

FASTLORA_BUILD = auto (default) | cpu | cuda | none. ``auto`` builds what the machine can build, leaves out the CUDA
code or the whole extension when that fails, and records why; ``cpu`` and ``cuda`` fail instead. Whether CUDA code is
built depends on nvcc being of torch's own CUDA version, never on a GPU being present. torch must be importable, so
build without isolation: ``pip install --no-build-isolation .``
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from glob import glob
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_py import build_py

MODE = os.environ.get("FASTLORA_BUILD", "auto")
if MODE not in ("auto", "cpu", "cuda", "none"):
    raise SystemExit(f"FASTLORA_BUILD must be auto, cpu, cuda or none, got {MODE!r}")
REASON_FILE = "_build_info.txt"


def record(command: Command, in_place: bool, reason: str) -> None:
    """Leave the reason that there is no extension, or none of its CUDA code, where fastlora.native reads it; no reason
    removes it."""
    root = Path(__file__).parent if in_place else Path(command.build_lib)
    path = root / "fastlora" / REASON_FILE
    path.unlink(missing_ok=True)
    if reason:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(reason + "\n", encoding="utf-8")
        command.announce(f"fastlora: left out: {reason}", level=4)


def missing_compiler() -> str:
    """The C++ compiler that the build would call, if it is not there."""
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    return "" if os.name != "posix" or shutil.which(command[0]) else command[0]


def cuda_major(nvcc: str) -> str:
    """The major version of the CUDA toolkit of a compiler; empty where it does not say."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+)\.", said)
    return found[1] if found else ""


def architectures() -> str:
    """The list of compute capabilities that torch is to build for."""
    import torch

    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    if wanted == "native":
        visible = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        wanted = ";".join(f"{major}.{minor}" for major, minor in sorted(visible))
    # torch would read an empty list as "native".
    wanted = wanted or "8.0;8.6;8.9;9.0;10.0+PTX"
    # The tensor core products of 9.0 need the instructions of that architecture alone.
    return re.sub(r"9\.0a?", "9.0a", wanted.replace("Hopper", "9.0+PTX"))


def did_not_compile(what: str, error: Exception) -> str:
    message = " ".join(str(error).split())[:400]
    return f"the {what} did not compile ({message}): pip install -v shows the compiler's own words"


def plan() -> tuple[list, dict, str]:
    """Extensions, commands, and the reason when there are none."""
    if MODE == "none":
        return [], {}, "the package was built with FASTLORA_BUILD=none"
    if compiler := missing_compiler():
        reason = f"there was no C++ compiler at build time ({compiler} is not on PATH; CXX names another)"
        if MODE != "auto":
            raise SystemExit(f"FASTLORA_BUILD={MODE} cannot be met: {reason}")
        return [], {}, reason
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
    except ImportError as error:
        if MODE != "auto":
            raise SystemExit(
                f"FASTLORA_BUILD={MODE} needs torch at build time ({error}): pass --no-build-isolation"
            ) from error
        return [], {}, "torch was not importable at build time; install with: pip install --no-build-isolation ."
    nvcc = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")))
    with_cuda, without = MODE == "cuda", ""
    if MODE == "auto" and nvcc and torch.version.cuda is not None:
        # torch refuses the compiler of another major version; the CPU code needs none.
        with_cuda = (major := cuda_major(nvcc)) == torch.version.cuda.partition(".")[0]
        without = "" if with_cuda else f"{nvcc} is of CUDA {major or '?'}, and torch of {torch.version.cuda}"
    if with_cuda and (not nvcc or torch.version.cuda is None):
        raise SystemExit(f"FASTLORA_BUILD=cuda needs nvcc (found {nvcc}) and a CUDA torch (found {torch.__version__})")
    if with_cuda:
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures()

    # The name says which torch may load it: see fastlora.native.autograd.
    node = CppExtension(
        "fastlora._autograd_" + re.sub(r"\W", "_", torch.__version__.partition("+")[0]),
        ["csrc/autograd.cpp"],
        extra_compile_args=["-O2", "-g0", "-fvisibility=hidden", "-Wall"],
    )

    class build_ext(BuildExtension):
        def run(self) -> None:
            self.in_place = bool(self.inplace or getattr(self, "editable_mode", False))
            super().run()

        def build_extensions(self) -> None:
            reason = without
            try:
                super().build_extensions()
            except Exception as error:
                if MODE != "auto":
                    raise
                reason = did_not_compile("CUDA code" if with_cuda else "extension", error)
                if with_cuda:
                    # In place: setuptools has said more of it by now.
                    vars(extension).update(vars(kernels(False)))
                    try:
                        super().build_extensions()
                    except Exception as error:
                        reason = did_not_compile("extension", error)
                for one in self.extensions:
                    one.optional = True
            record(self, self.in_place, reason)

        def build_extension(self, one: Extension) -> None:
            try:
                super().build_extension(one)
            except Exception as error:
                if one is not node:
                    raise
                one.optional = True
                self.announce(f"fastlora: without the autograd node in C++: {error}", level=4)

    def kernels(cuda: bool) -> Extension:
        stable_abi = ["-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        no_contraction = ["-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wno-maybe-uninitialized"]
        define = ["-DFASTLORA_WITH_CUDA", "-DUSE_CUDA"] if cuda else []
        return (CUDAExtension if cuda else CppExtension)(
            "fastlora._C",
            ["csrc/bindings.cpp", *sorted(glob("csrc/cpu/*.cpp")), *(sorted(glob("csrc/cuda/*.cu")) if cuda else ())],
            depends=[*glob("csrc/*.h"), *glob("csrc/*/*.h"), *glob("csrc/cpu/*.inl"), *glob("csrc/cuda/*.cuh")],
            extra_compile_args={
                "cxx": [*stable_abi, *no_contraction, *define],
                "nvcc": ["-std=c++17", "-O3", "-Xcompiler=-fvisibility=hidden", *define],
            },
            py_limited_api=True,
        )

    extension = kernels(with_cuda)
    return [extension, node], {"build_ext": build_ext}, ""


extensions, commands, no_extension = plan()


class build_python(build_py):
    def run(self) -> None:
        super().run()
        record(self, bool(getattr(self, "editable_mode", False)), no_extension)


setup(
    ext_modules=extensions,
    cmdclass={**commands, "build_py": build_python},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if extensions else {},
)
