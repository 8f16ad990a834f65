"""The fused products and their gradients against the float64 truth."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

pytest.importorskip("triton")

from grids import CASES, DTYPES, Case, check
from tolerance import make_problem

from fastlora import kernels
from fastlora.kernels import config, lora

pytestmark = pytest.mark.usefixtures("poison_empty")

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@DTYPE
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_result(case: Case, dtype: torch.dtype, kernel_device: str) -> None:
    problem = make_problem(case.m, case.n, case.k, case.r, dtype, device=kernel_device, **case.options)
    check(problem)


@pytest.mark.parametrize("needs", list(itertools.product((True, False), repeat=3)), ids=str)
@pytest.mark.parametrize("r", [0, 3])
def test_only_what_is_needed(needs: tuple[bool, bool, bool], r: int, kernel_device: str) -> None:
    problem = make_problem(18, 33, 40, r, dropout_p=0.2, device=kernel_device)
    check(problem, needs)


def test_x_may_be_absent_when_lora_a_is_frozen(kernel_device: str) -> None:
    p = make_problem(18, 33, 40, 3, device=kernel_device)
    _, u = kernels.forward(p.x, p.w, p.lora_a, p.lora_b, None, p.scale, None)
    whole = kernels.backward(p.dy, p.x, u, p.w, p.lora_a, p.lora_b, p.scale, None)
    dx, da, db = kernels.backward(p.dy, None, u, p.w, p.lora_a, p.lora_b, p.scale, None, (True, False, True))
    assert da is None
    assert torch.equal(dx, whole[0])
    assert torch.equal(db, whole[2])
    with pytest.raises(ValueError, match="needs x"):
        kernels.backward(p.dy, None, u, p.w, p.lora_a, p.lora_b, p.scale, None)


@pytest.mark.parametrize("r", [16, 130])
def test_strided_arguments(r: int, kernel_device: str) -> None:
    """Rows of a wider buffer, a transposed adapter and an expanded gradient are read where they lie or copied."""
    p = make_problem(20, 48, 64, r, bias=True, device=kernel_device)

    def columns_of_a_wider_buffer(t: torch.Tensor) -> torch.Tensor:
        nothing = torch.full_like(t, torch.nan)
        return torch.cat((nothing, t, nothing), 1)[:, t.shape[1] : 2 * t.shape[1]]

    x, dy = columns_of_a_wider_buffer(p.x), columns_of_a_wider_buffer(p.dy)
    a, b = p.lora_a.T.contiguous().T, p.lora_b.T.contiguous().T
    bias = torch.stack((p.bias, p.bias), 1)[:, 0]
    assert not any(t.is_contiguous() for t in (x, dy, a, b, bias))
    y, u = kernels.forward(p.x, p.w, p.lora_a, p.lora_b, p.bias, p.scale, None)
    plain = (y, u, *kernels.backward(p.dy, p.x, u, p.w, p.lora_a, p.lora_b, p.scale, None))
    y, u = kernels.forward(x, p.w, a, b, bias, p.scale, None)
    strided = (y, u, *kernels.backward(dy, x, u, p.w, a, b, p.scale, None))
    for one, other in zip(plain, strided, strict=True):
        assert torch.equal(one, other)
    expanded = torch.ones((), device=kernel_device).expand(20, 48)
    one = kernels.backward(expanded, x, u, p.w, a, b, p.scale, None)
    other = kernels.backward(expanded.contiguous(), x, u, p.w, a, b, p.scale, None)
    assert all(torch.equal(i, j) for i, j in zip(one, other, strict=True))


@DTYPE
@pytest.mark.parametrize("r", [3, 16])
def test_one_pass_and_two_passes_agree(
    r: int, dtype: torch.dtype, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """du is the same sum in either kernel when N is one part; dB differs by the order of its sum only."""
    p = make_problem(150, 64, 96, r, dtype, device=kernel_device)
    # Newer GPUs, for which two kernels are chosen, must run the one as well.
    device = dataclasses.replace(config.Device.of(p.x.device), capability=(8, 0))
    tiles = config.one_pass(r, dtype, device)
    assert tiles is not None
    monkeypatch.setattr(config, "one_pass", lambda *args: tiles)
    u = p.x @ p.lora_a.T
    du, db = lora.du_db(p.dy, u, p.lora_b, p.scale)
    torch.testing.assert_close(du, lora.project_dy(p.dy, p.lora_b, p.scale))
    torch.testing.assert_close(db, lora.gradient_b(p.dy, u, p.scale, dtype))


@DTYPE
@pytest.mark.parametrize("sizes", [(18, 33, 40, 3), (150, 130, 40, 16), (1, 64, 40, 8)], ids=str)
def test_one_pass_against_the_truth(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = make_problem(*sizes, dtype, dropout_p=0.2, device=kernel_device)
    tiles = config.one_pass(sizes[3], dtype, config.Device((8, 0), 4))
    assert tiles is not None
    count = 0

    def one_pass(*args: object) -> config.TileConfig:
        nonlocal count
        count += 1
        return tiles

    monkeypatch.setattr(config, "one_pass", one_pass)
    check(problem)
    assert count


@DTYPE
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("sizes", [(1, 33, 40, 3), (300, 130, 40, 16), (700, 40, 200, 130)], ids=str)
def test_both_gradients_in_one_pass(
    sizes: tuple[int, int, int, int], p: float, dtype: torch.dtype, kernel_device: str
) -> None:
    """The same sums as one at a time, in one part or several, each in its adapter's type."""
    problem = make_problem(*sizes, dtype, dropout_p=p, device=kernel_device)
    u, du = (torch.randn(sizes[0], sizes[3], device=kernel_device).to(dtype) for _ in range(2))
    a, b = problem.lora_a.float(), problem.lora_b
    both = lora.Gradients(problem.dy, u, problem.x, a, b)
    da, db = both.run(du, 0.5, problem.dropout)
    assert (da.dtype, db.dtype, da.shape, db.shape) == (torch.float32, b.dtype, a.shape, b.shape)
    # Sums of the same products, split elsewhere: apart by the rounding of sums whose terms largely cancel.
    for actual, alone in (
        (da, lora.gradient_a(du, problem.x, problem.dropout, a.dtype)),
        (db, lora.gradient_b(problem.dy, u, 0.5, b.dtype)),
    ):
        unit = 32 * torch.finfo(actual.dtype).eps
        torch.testing.assert_close(actual, alone, rtol=unit, atol=unit * float(alone.abs().max()))
    assert (both.grid[2] > 1) == (sizes[0] > 64) or kernel_device == "cuda"


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)), ids=str)
@pytest.mark.parametrize("given", [True, False], ids=["du given", "du made"])
def test_only_what_is_needed_of_the_gradients(
    given: bool, needs: tuple[bool, bool, bool], kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "one_pass", lambda *args: None)
    p = make_problem(70, 40, 48, 8, torch.float16, device=kernel_device)
    u = p.x @ p.lora_a.T
    du = lora.project_dy(p.dy, p.lora_b, p.scale)
    x = p.x if needs[1] else None
    got = lora.gradients(p.dy, x, u, p.lora_a, p.lora_b, p.scale, None, needs, du if given else None)
    truth = (du, lora.gradient_a(du, p.x, None, torch.float16), lora.gradient_b(p.dy, u, p.scale, torch.float16))
    wanted = (given or needs[0] or needs[1], needs[1], needs[2])
    for one, other, want in zip(got, truth, wanted, strict=True):
        assert (one is not None) == want
        if one is not None:
            torch.testing.assert_close(one, other)


def test_bfloat16_rounds_to_nearest_even_in_the_interpreter(kernel_device: str) -> None:
    """The interpreter alone would truncate, and would multiply bit patterns."""
    x = torch.full((1, 16), 1.0, dtype=torch.bfloat16, device=kernel_device)
    w = torch.zeros(16, 16, dtype=torch.bfloat16, device=kernel_device)
    w[0, 0], w[0, 1] = 1.0, 2.0**-8  # halfway to the next number, whose mantissa is odd
    w[1, 0], w[1, 1] = 1.0 + 2.0**-7, 2.0**-8  # halfway again, and now the next one is even
    y, _ = kernels.forward(x, w, None, None, None, 1.0, None)
    assert y[0, :2].tolist() == [1.0, 1.0 + 2.0**-6]


def test_refuses_float64() -> None:
    x = torch.zeros(2, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match="float64"):
        kernels.forward(x, x, None, None, None, 1.0, None)
    with pytest.raises(TypeError, match="float64"):
        kernels.backward(x, x, x[:, :0], x, None, None, 1.0, None)
