"""Which kernel runs, and why.

A backend answers two questions about a problem: can it be right (``unsupported`` lists the reasons against), and is it
the one to take where nothing was measured (``preferred``). A backend that the user names runs or raises with its
reasons; ``auto`` takes the supported one that `fastlora.tables` holds as the fastest at the nearest measured shape, and
without a measurement the first that is preferred. Selection looks only at sizes, types, at what the machine has and at
the tables; it measures nothing, and can be asked about any machine from any other.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastlora import decoded, eager, native, reference, tables
from fastlora.nf4 import NF4Weight, Weight

COMPUTE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One pass through one layer: all that selection may look at."""

    m: int
    n: int
    k: int
    r: int
    dtype: torch.dtype = torch.bfloat16
    device_type: str = "cuda"
    quant_type: str | None = "nf4"
    """None for a dense base weight."""
    blocksize: int = 64
    nested: bool = True
    direction: str = "forward"
    dropout: bool = False
    captured: bool = False
    """For a CUDA graph, where a launch costs the host nothing: see `fastlora.for_graphs`."""

    def __str__(self) -> str:
        base = "dense" if self.quant_type is None else f"{self.quant_type}/{self.blocksize}"
        base += " nested" if self.quant_type is not None and self.nested else ""
        kind = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.direction} M={self.m} N={self.n} K={self.k} R={self.r}, {kind} on {self.device_type}, {base} base"
            f"{', dropout' if self.dropout else ''}{', for a CUDA graph' if self.captured else ''}"
        )


@dataclasses.dataclass(frozen=True)
class Machine:
    """What is installed and present. A field holds None when the thing works, else the reason why it does not."""

    triton: str | None
    native_cpu: str | None
    native_cuda: str | None
    capability: tuple[int, int] | None
    """Compute capability of the GPU, None without one."""
    triton_interpreted: bool = False
    """Triton kernels run on CPU tensors (TRITON_INTERPRET=1), slowly: for tests."""
    gpu: tables.Device | None = None
    """The GPU as the tables know it. Without one, no table is asked about it; so with the CPU."""
    cpu: tables.Device | None = None
    amx: bool = False
    """The CPU has Intel's matrix extension."""


@functools.cache
def this_machine() -> Machine:
    """The machine this process runs on."""
    triton = None if importlib.util.find_spec("triton") else "triton is not installed (extra: triton)"
    interpreted = triton is None and os.environ.get("TRITON_INTERPRET") == "1"
    capability, gpu = native.gpu(torch.cuda.current_device()) if torch.cuda.is_available() else (None, None)
    vectors = torch.backends.cpu.get_cpu_capability()
    cpu = tables.Device("cpu", vectors, vectors, torch.get_num_threads())
    amx = bool(torch.cpu._is_amx_tile_supported())
    extension = (native.available("cpu"), native.available("cuda"))
    return Machine(triton, *extension, capability, interpreted, gpu, cpu, amx)


def measured_machine(machine: Machine, capability: tuple[int, int]) -> Machine:
    """``machine`` with another GPU in it: the first shipped one of ``capability`` that was measured, or one unknown."""
    wanted = ".".join(map(str, capability))
    known = [table.device for table in tables.shipped().tables]
    gpu = next((device for device in known if device.type == "cuda" and device.capability == wanted), None)
    return dataclasses.replace(machine, capability=capability, gpu=gpu)


def _kernels() -> Any:
    # By name, so that importing this module never imports Triton.
    return importlib.import_module("fastlora.kernels")


def dequantizer(device_type: str, machine: Machine) -> str:
    """Name of what turns a packed weight into a dense one on ``device_type``: triton, native or portable."""
    if device_type == "cuda" and machine.triton is None:
        return "triton"
    reason = machine.native_cuda if device_type == "cuda" else machine.native_cpu
    return "native" if reason is None else "portable"


def dequantize(w: NF4Weight, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """The dense matrix (N, K) of a packed weight, by the fastest exact dequantizer of this machine.

    ``out`` (N, K) may have a row stride, as a part of a larger buffer has.
    """
    if dtype in COMPUTE_DTYPES:
        which = dequantizer(w.device.type, this_machine())
        if which == "triton":
            return _kernels().dequantize(w, dtype, out)
        if which == "native":
            return native.dequantize(w, dtype, out)
    matrix = w.dequantize(dtype)
    return matrix if out is None else out.copy_(matrix)


def dense(w: Weight, dtype: torch.dtype) -> torch.Tensor:
    """The base weight (N, K) as a dense matrix of ``dtype``."""
    return dequantize(w, dtype) if isinstance(w, NF4Weight) else w.to(dtype)


def multiplier(weights: Sequence[Weight], dtype: torch.dtype) -> torch.Tensor:
    """The dense matrices (N_i, K) one below the other, (sum of N_i, K), for a product: not to be changed."""
    packed = [w for w in weights if isinstance(w, NF4Weight)]
    kept = decoded.find(packed, dtype) if len(packed) == len(weights) else None
    if kept is not None:
        return kept
    first = weights[0]
    if len(weights) == 1:
        return dense(first, dtype)
    rows = [w.shape[0] for w in weights]
    out = torch.empty(sum(rows), first.shape[1], dtype=dtype, device=first.device)
    for part, w in zip(out.split(rows), weights, strict=True):
        if isinstance(w, NF4Weight):
            dequantize(w, dtype, part)
        else:
            part.copy_(w)
    return out


def _torch_forward(x: torch.Tensor, w: Weight, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return eager.forward(x, multiplier([w], x.dtype), *args)


def _torch_backward(dy: torch.Tensor, x: Any, u: Any, w: Weight, *args: Any) -> Any:
    need_dx = args[-1][0]
    return eager.backward(dy, x, u, multiplier([w], dy.dtype) if need_dx else None, *args)


@dataclasses.dataclass(frozen=True)
class Backend:
    """A way to compute one layer. ``forward`` and ``backward`` have the signatures of `fastlora.reference`."""

    name: str
    what: str
    unsupported: Callable[[Problem, Machine], list[str]]
    preferred: Callable[[Problem, Machine], bool]
    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    backward: Callable[..., tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]]


def _gpu_unsupported(problem: Problem, machine: Machine) -> list[str]:
    """Reasons against any kernel of this package that runs on a GPU only."""
    if problem.device_type != "cuda":
        return []
    if machine.capability is None:
        return ["no CUDA device"]
    if machine.capability < (8, 0):
        return [f"needs compute capability 8.0, this GPU has {'.'.join(map(str, machine.capability))}"]
    return []


def _cuda_unsupported(problem: Problem, machine: Machine) -> list[str]:
    if problem.device_type != "cuda":
        return [f"these kernels run on cuda, not on {problem.device_type}"]
    reasons = [] if machine.native_cuda is None else [machine.native_cuda]
    reasons += _gpu_unsupported(problem, machine)
    if problem.dtype not in (torch.bfloat16, torch.float16):
        reasons.append(f"{problem.dtype} is not a type of these kernels")
    if problem.quant_type is None:
        reasons.append("the base weight is dense")
    return reasons


def _cpu_unsupported(problem: Problem, machine: Machine) -> list[str]:
    if problem.device_type != "cpu":
        return [f"these kernels run on cpu, not on {problem.device_type}"]
    reasons = [] if machine.native_cpu is None else [machine.native_cpu]
    if problem.dtype not in (torch.bfloat16, torch.float32):
        reasons.append(f"{problem.dtype} is not a type of these kernels")
    if problem.quant_type is None:
        reasons.append("the base weight is dense")
    if problem.n * problem.k == 0:
        reasons.append("the base weight has no elements")
    return reasons


def _cpu_preferred(problem: Problem, machine: Machine) -> bool:
    if problem.dtype == torch.bfloat16:
        # oneDNN multiplies bfloat16 by AMX where there is AMX; these kernels were not measured there.
        return not machine.amx
    # A weight this small was measured to be decoded and multiplied by many rows as fast by the library.
    return problem.n * problem.k > 2**14 or problem.m < 256


def _triton_unsupported(problem: Problem, machine: Machine) -> list[str]:
    reasons = [] if machine.triton is None else [machine.triton]
    if problem.device_type != "cuda" and not machine.triton_interpreted:
        reasons.append(f"Triton kernels run on cuda, not on {problem.device_type} (except under TRITON_INTERPRET=1)")
    reasons += _gpu_unsupported(problem, machine)
    if problem.dtype not in COMPUTE_DTYPES:
        reasons.append(f"{problem.dtype} is not a type of these kernels")
    return reasons


_LARGE_OUTPUT = 2**22
"""Elements of y whose three spared passes take as long on an H200 as the launch of a Triton kernel on its host."""


def _long(problem: Problem, machine: Machine) -> bool:
    """Whether Triton's persistent product was measured to be faster than library products. See docs/performance.md."""
    fits = machine.capability is not None and (9, 0) <= machine.capability < (11, 0)
    least = tables.PERSISTENT if problem.captured else tables.PERSISTENT_WITH_LAUNCHES
    return fits and problem.dtype.itemsize == 2 and problem.m * problem.n * problem.k >= least


def _split(problem: Problem) -> bool:
    few = problem.m in tables.SPLIT_ROWS and problem.k % 32 == 0 and problem.quant_type is not None
    return problem.captured and problem.direction == "forward" and few


def _tiled(problem: Problem, machine: Machine) -> bool:
    """Whether C++ decodes the weight in the tiles of a product, which was measured to be faster than `_long`."""
    if machine.gpu is None or machine.capability is None:
        return False
    p = problem
    side = p.n if p.direction == "forward" else p.k
    able = native.forms(p.m, p.n, p.k, p.r, p.blocksize, machine.capability, p.direction)
    return "tile" in able and tables.tiles_gain(p.m, side, machine.gpu.multiprocessors)


def _cuda_preferred(problem: Problem, machine: Machine) -> bool:
    slower = _split(problem) or (_long(problem, machine) and not _tiled(problem, machine))
    return machine.triton is not None or not slower


def _triton_preferred(problem: Problem, machine: Machine) -> bool:
    if problem.device_type != "cuda" or problem.dtype.itemsize != 2:
        return False
    if problem.dropout:
        return True  # in plain PyTorch the replayed mask takes longer than all of the products
    # Its one pass over the sums saves library products a few; a small output is not worth its longer launch.
    large = problem.direction == "forward" and problem.m * problem.n >= _LARGE_OUTPUT
    return large or _long(problem, machine) or _split(problem)


def _torch_unsupported(problem: Problem, machine: Machine) -> list[str]:
    return ["no CUDA device"] if problem.device_type == "cuda" and machine.capability is None else []


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend(
            "cuda",
            "C++ and CUDA: some rows read the packed weight inside the product; many use library products",
            _cuda_unsupported,
            _cuda_preferred,
            native.forward,
            native.backward,
        ),
        Backend(
            "triton",
            "Triton kernels: the LoRA term joins the base product before its only rounding",
            _triton_unsupported,
            _triton_preferred,
            lambda *args: _kernels().forward(*args),
            lambda *args: _kernels().backward(*args),
        ),
        Backend(
            "cpu",
            "C++: panels of the packed weight are decoded into the cache of a core, inside the product",
            _cpu_unsupported,
            _cpu_preferred,
            native.forward,
            native.backward,
        ),
        Backend(
            "torch",
            "dequantize into a transient buffer, then library matrix products",
            _torch_unsupported,
            lambda problem, machine: True,
            _torch_forward,
            _torch_backward,
        ),
        Backend(
            "reference",
            "the formulas in plain PyTorch",
            _torch_unsupported,
            lambda problem, machine: False,
            reference.forward,
            reference.backward,
        ),
    )
}
"""In the order in which ``auto`` asks them."""


def measured_class(problem: Problem) -> tables.Class:
    """The problems whose measurements hold for ``problem``."""
    dtype = tables.dtype_class(problem.dtype, problem.device_type)
    return tables.Class(problem.direction, dtype, "dense" if problem.quant_type is None else "packed", problem.r)


def measured(problem: Problem, machine: Machine, known: tables.Tables | None = None) -> tables.Found | None:
    """What the tables (by default, those of this process) hold about ``problem`` on ``machine``."""
    device = machine.gpu if problem.device_type == "cuda" else machine.cpu
    # Dropout changes who is fastest, and no table was measured with it.
    if device is None or problem.dropout:
        return None
    return (known or tables.current()).choice(device, measured_class(problem), problem.m, problem.n, problem.k)


def select(
    problem: Problem, name: str = "auto", machine: Machine | None = None, known: tables.Tables | None = None
) -> Backend:
    """The backend that runs ``problem``. ``known`` are the tables to ask, by default those of this process.

    Raises ValueError for an unknown name and RuntimeError, with every reason, when the named backend (or, for
    ``auto``, each one) does not support the problem.
    """
    machine = machine or this_machine()
    if name != "auto":
        if name not in BACKENDS:
            raise ValueError(f"unknown backend {name!r}; choose from {', '.join(('auto', *BACKENDS))}")
        if reasons := BACKENDS[name].unsupported(problem, machine):
            raise RuntimeError(f"backend {name!r} cannot run {problem}: {'; '.join(reasons)}")
        return BACKENDS[name]
    chosen, _ = _decide(problem, machine, known)
    if chosen is None:
        raise RuntimeError(f"no backend can run {problem}; ask fastlora explain for the reasons")
    return chosen


def _decide(
    problem: Problem, machine: Machine, known: tables.Tables | None = None
) -> tuple[Backend | None, tables.Found | None]:
    """What ``auto`` takes, and the measurement that says so, None where the built-in rules do."""
    able = {backend.name: backend for backend in BACKENDS.values() if not backend.unsupported(problem, machine)}
    if found := measured(problem, machine, known):
        for candidate in found.times.ranking(problem.captured):
            if backend := able.get(candidate.partition(":")[0]):
                return backend, found
    return next((backend for backend in able.values() if backend.preferred(problem, machine)), None), None


def decision(problem: Problem, machine: Machine, known: tables.Tables) -> str | None:
    """The name of what ``auto`` takes by the tables ``known``, with its form where they name one."""
    chosen, found = _decide(problem, machine, known)
    if chosen is None or found is None:
        return None if chosen is None else chosen.name
    return next(name for name in found.times.ranking(problem.captured) if name.partition(":")[0] == chosen.name)


def explain(problem: Problem, machine: Machine | None = None) -> str:
    """What would run for ``problem``, forward and backward, why each other backend would not, and what says so."""
    machine = machine or this_machine()
    lines = []
    for direction in ("forward", "backward"):
        problem = dataclasses.replace(problem, direction=direction)
        lines.append(str(problem))
        chosen, found = _decide(problem, machine)
        for backend in BACKENDS.values():
            reasons = backend.unsupported(problem, machine)
            if backend is chosen:
                verdict = f"runs: {backend.what}"
            elif reasons:
                verdict = "cannot run: " + "; ".join(reasons)
            elif found is None:
                verdict = "can run when named; not the fastest measured here"
            else:
                names = (name for name in found.times.us if name.partition(":")[0] == backend.name)
                times = ", ".join(f"{found.times.us[name]:.4g} us" for name in names)
                verdict = f"can run when named; {f'measured {times}' if times else 'not measured here'}"
            lines.append(f"  {'->' if backend is chosen else '  '} {backend.name:<10} {verdict}")
        if chosen is not None and chosen.name == "torch" and problem.quant_type is not None:
            lines.append(f"     dequantizer: {dequantizer(problem.device_type, machine)}")
        if chosen is not None:
            lines.append(f"     decided by {found or _without_table(problem, machine)}")
    if problem.device_type == "cuda" and machine.gpu is not None and machine.triton is None:
        lines += [f"skipped tiles: {reason}" for reason in _skipped_tiles(machine.gpu)]
    return "\n".join(lines)


def _without_table(problem: Problem, machine: Machine) -> str:
    if problem.dropout:
        return "the built-in rules: no table is measured with dropout"
    device = machine.gpu if problem.device_type == "cuda" else machine.cpu
    return f"the built-in rules: no table has a shape near this one for {device or 'an unknown device'}"


def _skipped_tiles(gpu: tables.Device) -> list[str]:
    try:
        config, tuned = (importlib.import_module(f"fastlora.kernels.{name}") for name in ("config", "tuned"))
    except ImportError:  # the machine asked about has Triton, this one does not
        return []
    major, minor = (int(part) for part in gpu.capability.split("."))
    return tuned.skipped(config.Device((major, minor), gpu.multiprocessors, name=gpu.name))


def package_version(package: str) -> str:
    """The installed version of a distribution, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def info() -> str:
    """Versions, devices and backends of this machine, with the reason for each one that is missing."""
    machine = this_machine()
    lines = [
        f"python           {platform.python_version()} on {platform.machine()}",
        f"torch            {torch.__version__}",
    ]
    for package in ("fastlora-kernels", "triton", "bitsandbytes", "peft", "transformers", "accelerate", "trl"):
        lines.append(f"{package:<16} {package_version(package)}")
    lines.append(f"cpu              {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            lines.append(f"cuda:{i}           {p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB")
    else:
        built = torch.version.cuda
        lines.append(
            f"cuda             none: {'no device is visible' if built else 'this torch is built without CUDA'}"
        )
    lines.append(f"extension, cpu   {machine.native_cpu or 'loaded: ' + native.capability()}")
    lines.append(f"extension, cuda  {machine.native_cuda or 'loaded'}")
    lines.append(f"autograd in C++  {native.autograd()[1] or 'loaded'}")
    names = [str(table) for table in tables.current().tables]
    lines.append(f"tables           {', '.join(names) or 'none'}; the user's are in {tables.folder()}")
    for device_type in ("cuda", "cpu"):
        lines.append(f"dequantizer      {device_type}: {dequantizer(device_type, machine)}")
        for backend in BACKENDS.values():
            reasons = backend.unsupported(Problem(1, 1, 1, 1, device_type=device_type), machine)
            lines.append(f"backend {backend.name:<10} {device_type}: {'; '.join(reasons) or 'available'}")
    return "\n".join(lines)
