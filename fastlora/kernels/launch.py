"""Host side of a launch: the device guard, the layouts that the kernels read, and a launch that costs little Python."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels import config

_NOTHING = contextlib.nullcontext()


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, which is when they accept CPU tensors."""
    return bool(knobs.runtime.interpret)


def _watched() -> bool:
    """Whether something wants to see every launch, or to have other code compiled: hooks, profilers, debugging."""
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if hook is not None and getattr(hook, "calls", True):
            return True
    compilation = knobs.compilation
    return bool(
        runtime.debug
        or compilation.instrumentation_mode
        or getattr(compilation, "fpsan_homomorphic_casts", False)
        or getattr(runtime, "add_stages_inspection_hook", None)
    )


_WORTH_KEEPING = 4096
"""Launches that one kernel remembers before it starts over: enough for every layer of a model."""


def _kind(value: Any) -> Any:
    """What Triton's specialization depends on in a number that is not an int. Raises TypeError for anything else."""
    if type(value) in (float, bool):
        return type(value)
    raise TypeError(f"{type(value).__name__} is no number")


_LAUNCHER = """
def launcher(_slow, _launches, _watched, _kind, _driver):
    def launch(_grid, {parameters}, **_options):
        if _watched():
            return _slow(_grid, ({parameters},), _options, None)
        try:
            _key = ({key}, *_options.values(), *_options)
        except (AttributeError, TypeError):
            return _slow(_grid, ({parameters},), _options, None)
        if not _launches or type(_grid) is not tuple:
            return _slow(_grid, ({parameters},), _options, _key)
        _device = _driver.active.get_current_device()
        _known = _launches.get((_device, _key))
        if _known is None:
            return _slow(_grid, ({parameters},), _options, _key)
        _x, _y, _z = (*_grid, 1, 1)[:3]
        _stream = _driver.active.get_current_stream(_device)
        _known[0](_x, _y, _z, _stream, _known[1], _known[2], None, None, None, {parameters})
    return launch
"""


def _launcher(kernel: Kernel) -> Callable[..., Any]:
    """A function of a grid, the kernel's parameters and its options, written out so that the call binds them once.

    The key that it looks a compiled kernel up by tells apart at least what Triton's specialization tells apart:
    tensors (``..._ptr``) by their type and, where not all of them are aligned, by which are; descriptors (``..._desc``)
    by what `describe` says; integers by their value (only by whether they fit in 32 bits, where they are not
    specialized); constants as they are.
    """
    keys, addresses = [], []
    for p in kernel.params:
        if p.is_constexpr:
            keys.append(p.name)
        elif p.name.endswith("_ptr"):
            keys.append(f"None if {p.name} is None else {p.name}.dtype")
            addresses.append(f"(0 if {p.name} is None else {p.name}.data_ptr())")
        elif p.name.endswith("_desc"):
            keys.append(f"{p.name}.kind")
        else:
            integer = f"{p.name} >> 31" if p.do_not_specialize else p.name
            keys.append(f"{integer} if type({p.name}) is int else None if {p.name} is None else _kind({p.name})")
    if addresses:
        each = ", ".join(f"{address} % 16 == 0" for address in addresses)
        keys.append(f"None if ({' | '.join(addresses)}) % 16 == 0 else ({each},)")
    parameters = ", ".join(p.name for p in kernel.params)
    namespace: dict[str, Any] = {}
    exec(_LAUNCHER.format(parameters=parameters, key=", ".join(keys)), namespace)
    launch: Callable[..., Any] = namespace["launcher"](kernel._slow, kernel._launches, _watched, _kind, driver)
    return launch


class Kernel(JITFunction[Any]):
    """A ``triton.jit`` function whose launches after the first of a kind skip most of Triton's Python.

    Anything unusual takes the ordinary launch: hooks and debugging, a grid that is a function, arguments of other
    types than the kernels here take, a compiler that returned something else than a compiled kernel.
    """

    def __init__(self, fn: Callable[..., Any], **options: Any) -> None:
        super().__init__(fn, **options)
        self._launches: dict[Any, tuple[Any, Any, Any]] = {}
        self._launch = _launcher(self)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        return functools.partial(self._launch, grid)

    def add_pre_run_hook(self, hook: Callable[..., Any]) -> None:
        super().add_pre_run_hook(hook)
        self._launches.clear()

    def _slow(self, grid: Any, values: tuple[Any, ...], options: dict[str, Any], key: Any) -> Any:
        """The ordinary launch; what it compiled is remembered under ``key``, if there is one."""
        compiled = self.run(*values, grid=grid, warmup=False, **options)
        if key is not None and type(compiled) is CompiledKernel and not self.debug and not self.pre_run_hooks:
            if len(self._launches) >= _WORTH_KEEPING:
                self._launches.clear()
            device = driver.active.get_current_device()
            self._launches[device, key] = (compiled.run, compiled.function, compiled.packed_metadata)
        return compiled


def jit(*, do_not_specialize: Sequence[str] = ()) -> Callable[[Callable[..., Any]], Any]:
    """``triton.jit`` for a kernel that the host launches: a `Kernel`, or what the interpreter runs."""

    def decorate(fn: Callable[..., Any]) -> Any:
        if interpreted():
            return triton.jit(do_not_specialize=list(do_not_specialize))(fn)
        return Kernel(fn, do_not_specialize=list(do_not_specialize))

    return decorate


def describe(t: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
    """How the tensor memory accelerator reads or writes ``t`` in tiles of rows x columns.

    The matrix must be aligned as `fastlora.kernels.gemm.unaligned` asks for: nothing is checked again here, which
    takes longer than the rest.
    """
    descriptor: Any = object.__new__(TensorDescriptor)
    descriptor.__dict__ = {
        "base": t,
        "shape": list(t.shape),
        "strides": list(t.stride()),
        "block_shape": [rows, columns],
        "padding": "zero",
        "kind": (t.dtype, rows, columns),
    }
    return descriptor


def on_device(t: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Make ``t``'s device the current one for a launch. Raises ValueError for a tensor that no kernel can read."""
    if t.device.type == "cuda":
        if t.device.index == torch.cuda.current_device():
            return _NOTHING
        return torch.cuda.device(t.device)
    if t.device.type == "cpu" and interpreted():
        return _NOTHING
    raise ValueError(f"the Triton kernels need CUDA tensors (or TRITON_INTERPRET=1 and CPU tensors), got {t.device}")


def overlaps(t: torch.Tensor) -> bool:
    """Whether a kernel on ``t``'s device may begin before the one before it has ended."""
    return not interpreted() and config.Device.of(t.device).capability >= (9, 0)


def with_rows(t: torch.Tensor) -> torch.Tensor:
    """``t`` (rows, columns) itself where each row is contiguous, else a copy."""
    return t if t.stride(1) == 1 else t.contiguous()
