"""Launches that skip Triton's Python: they must tell apart whatever Triton compiles apart."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels import launch


def body(x_ptr, y_ptr, M, N, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a kernel takes: pointers that may be absent, integers, a float and a constant."""


def described(x_ptr, y_desc, M, N, scale, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The same with a descriptor."""


class Compiled:
    """Stands in for a compiled kernel; notes its launches."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.function, self.packed_metadata = 17, (4, 1, 0)

    def run(self, *args: Any) -> None:
        self.launches.append(args)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> launch.Kernel:
    """A kernel whose compiler returns `Compiled`, with device 3 current and its stream 5; ``runs`` are its results."""
    active = SimpleNamespace(get_current_device=lambda: 3, get_current_stream=lambda device: 5 if device == 3 else None)
    monkeypatch.setattr(launch, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(launch, "CompiledKernel", Compiled)
    made = launch.Kernel(body, do_not_specialize=["M"])
    made.runs = []

    def run(self: Any, *args: Any, **kwargs: Any) -> Compiled:
        self.runs.append(Compiled())
        return self.runs[-1]

    monkeypatch.setattr(JITFunction, "run", run)
    return made


def test_the_second_launch_runs_what_the_first_compiled(kernel: Any) -> None:
    x, y = torch.zeros(64), torch.zeros(64)
    kernel[(7,)](x, None, 5, N=64, scale=0.5, BLOCK=32, num_warps=4)
    kernel[(7, 2)](x_ptr=y, y_ptr=None, M=6, N=64, scale=2.5, BLOCK=32, num_warps=4)
    assert len(kernel.runs) == 1
    (launched,) = kernel.runs[0].launches
    assert launched[:9] == (7, 2, 1, 5, 17, (4, 1, 0), None, None, None)
    assert launched[9] is y
    assert launched[10:] == (None, 6, 64, 2.5, 32)


@pytest.mark.parametrize(
    "other",
    [
        {"x_ptr": torch.zeros(64, dtype=torch.float16)}, {"x_ptr": torch.zeros(65)[1:]}, {"x_ptr": None},
        {"y_ptr": torch.zeros(64)}, {"M": 2**31}, {"N": 63}, {"N": 1}, {"N": 2**31}, {"scale": 1}, {"N": True},
        {"BLOCK": 16}, {"num_warps": 8}, {"num_stages": 2}, {"launch_pdl": True},
    ],
    ids=str,
)  # fmt: skip
def test_what_compiles_anew(kernel: Any, other: dict[str, Any]) -> None:
    arguments = {"x_ptr": torch.zeros(64), "y_ptr": None, "M": 5, "N": 64, "scale": 0.5, "BLOCK": 32, "num_warps": 4}
    for _ in range(2):
        kernel[(1,)](**arguments)
        kernel[(1,)](**(arguments | other))
    assert len(kernel.runs) == 2
    assert all(len(run.launches) == 1 for run in kernel.runs)


POOL: dict[str, list[Any]] = {
    "x_ptr": [None, torch.zeros(8), torch.zeros(9)[1:], torch.zeros(8).half(), torch.zeros(8).bfloat16(),
              torch.zeros(8, dtype=torch.uint8), torch.nn.Parameter(torch.zeros(8))],
    "y_desc": [launch.describe(torch.zeros(32, 32), 16, 16), launch.describe(torch.zeros(32, 32), 16, 32),
               launch.describe(torch.zeros(32, 32).half(), 16, 16)],
    "M": [0, 1, 5, 16, -1, -16, 2**31 - 1, 2**31, 2**32, -(2**31), -(2**31) - 1, 2.0, True, None],
    "N": [0, 1, 5, 16, -1, -16, 2**31 - 1, 2**31, 2**32, -(2**31), -(2**31) - 1, 1.0, 16.0, True, False, None],
    "scale": [0.0, 1.0, 2.5, 1, 16],
    "BLOCK": [16, 32, 64, "nested", "flat", None],
}  # fmt: skip


@pytest.mark.parametrize("name", POOL)
def test_the_key_tells_apart_what_triton_specializes(name: str) -> None:
    """Any two values that give Triton's binder different specializations have different keys."""
    other = {"y_desc": POOL["y_desc"][0]} if name == "y_desc" else {"y_ptr": None}
    base = {"x_ptr": torch.zeros(8), **other, "M": 3, "N": 7, "scale": 0.5, "BLOCK": 32}
    tells_apart(described if name == "y_desc" else body, [base | {name: value} for value in POOL[name]])


def test_the_key_tells_apart_which_of_two_tensors_is_aligned() -> None:
    tensors = (None, torch.zeros(8), torch.zeros(9)[1:])
    rest = {"M": 3, "N": 7, "scale": 0.5, "BLOCK": 32}
    tells_apart(body, [{"x_ptr": x, "y_ptr": y, **rest} for x in tensors for y in tensors])


def tells_apart(kernel: Any, calls: list[dict[str, Any]]) -> None:
    made: Any = launch.Kernel(kernel, do_not_specialize=["M"])
    made._slow = lambda grid, values, options, key: key
    key_of = launch._launcher(made)
    bind = create_function_from_signature(made.signature, made.params, make_backend(GPUTarget("cuda", 90, 32)))
    seen = [(key_of((1,), **arguments), bind(**arguments)[1]) for arguments in calls]
    distinct = 0
    for (key, specialization), (other_key, other) in itertools.combinations(seen, 2):
        if specialization != other:
            distinct += 1
            assert key != other_key, (specialization, other)
    assert distinct


@pytest.mark.parametrize("how", ["enter hook", "exit hook", "pre-run hook", "debug", "grid"])
def test_whoever_watches_sees_the_ordinary_launch(kernel: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = (torch.zeros(64), None, 5, 64, 0.5, 32)
    kernel[(1,)](*arguments)
    kernel[(1,)](*arguments)
    assert len(kernel.runs) == 1
    grid: Any = (1,)

    def hook(*args: Any, **kwargs: Any) -> None:
        pass

    if how == "enter hook":
        monkeypatch.setattr(knobs.runtime.launch_enter_hook, "calls", [hook])
    elif how == "exit hook":
        monkeypatch.setattr(knobs.runtime.launch_exit_hook, "calls", [hook])
    elif how == "pre-run hook":
        kernel.add_pre_run_hook(hook)
    elif how == "debug":
        monkeypatch.setattr(knobs.runtime, "debug", True)
    else:
        grid = lambda arguments: (1,)  # noqa: E731
    kernel[grid](*arguments)
    kernel[grid](*arguments)
    assert len(kernel.runs) == 3
    assert len(kernel.runs[0].launches) == 1


def test_arguments_that_only_triton_knows_take_the_ordinary_launch(kernel: Any) -> None:
    plain = torch.zeros(32, 32)
    descriptor = TensorDescriptor(plain, [32, 32], [32, 1], [16, 16])
    for _ in range(2):
        kernel[(1,)](descriptor, None, 5, 64, 0.5, 32)
    assert len(kernel.runs) == 2


def test_another_device_has_its_own_code(kernel: Any) -> None:
    arguments = (torch.zeros(64), None, 5, 64, 0.5, 32)
    kernel[(1,)](*arguments)
    launch.driver.active.get_current_device = lambda: 4
    kernel[(1,)](*arguments)
    assert len(kernel.runs) == 2


def test_what_is_remembered_has_a_bound(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_WORTH_KEEPING", 8)
    for n in range(50):
        kernel[(1,)](torch.zeros(64), None, 5, n, 0.5, 32)
        assert len(kernel._launches) <= 8


def test_descriptors_are_what_triton_makes() -> None:
    t = torch.zeros(48, 64).half()[:, 8:40]
    ours, plain = launch.describe(t, 16, 32), TensorDescriptor(t, list(t.shape), list(t.stride()), [16, 32])
    assert ours.base is t
    rest = [field.name for field in dataclasses.fields(plain) if field.name != "base"]
    assert [getattr(ours, name) for name in rest] == [getattr(plain, name) for name in rest]
