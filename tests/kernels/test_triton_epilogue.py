"""The pass that adds the LoRA term and the bias to float32 sums and rounds once."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from grids import DTYPES, HAS_CUDA
from tolerance import assert_close

from fastlora.kernels.epilogue import finish

pytestmark = pytest.mark.usefixtures("poison_empty")

DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)

# M, N, R. Tiles are 16 or 64 by 128, and up to 64 of R.
SMALL = [(1, 1, 1), (16, 128, 16), (17, 129, 5), (5, 300, 80), (130, 140, 3)]
LARGE = [(1000, 4096, 16), (4097, 1030, 17), (515, 1027, 1024)]
SIZES = SMALL + LARGE if HAS_CUDA else SMALL


def operands(
    m: int, n: int, r: int, dtype: torch.dtype, device: str, adapter: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(sums, u, lora_b), with elements of about 1 in both terms."""
    sums, u, b = torch.randn(m, n), torch.randn(m, r), torch.randn(n, r) * r**-0.5
    return sums.to(device), u.to(device, dtype), b.to(device, adapter or dtype)


def hold(
    actual: torch.Tensor, sums: torch.Tensor, u: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> None:
    """Judge ``actual`` by the tolerance policy: the plain result rounds the LoRA term, the sums and each addition."""

    def result(dtype: torch.dtype) -> torch.Tensor:
        y = sums.to(dtype) + scale * (u.to(dtype) @ b.to(dtype).T)
        return y if bias is None else y + bias.to(dtype)

    assert_close(actual, result(actual.dtype), result(torch.float64))


@DTYPE
@pytest.mark.parametrize("wide", [False, True], ids=["own type", "float32"])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_the_truth(
    size: tuple[int, int, int], bias: torch.dtype | None, wide: bool, dtype: torch.dtype, kernel_device: str
) -> None:
    sums, u, b = operands(*size, dtype, kernel_device)
    added = None if bias is None else torch.randn(size[1]).to(kernel_device, bias)
    out_dtype = torch.float32 if wide else dtype
    before = sums.clone()
    y = finish(sums, u, b, added, -0.7, out_dtype)
    assert y.dtype == out_dtype
    hold(y, before, u, b, added, -0.7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_adapters_are_rounded_to_the_type_computed_in(dtype: torch.dtype, kernel_device: str) -> None:
    sums, u, b = operands(33, 140, 20, dtype, kernel_device, torch.float32)
    y = finish(sums.clone(), u, b, None, 2.0, dtype)
    assert torch.equal(y, finish(sums.clone(), u, b.to(dtype), None, 2.0, dtype))
    hold(y, sums, u, b.to(dtype), None, 2.0)


def test_float32_results_take_the_place_of_the_sums(kernel_device: str) -> None:
    sums, u, b = operands(20, 40, 8, torch.float16, kernel_device)
    assert finish(sums, u, b, None, 1.0, torch.float32) is sums
    before = sums.clone()
    y = finish(sums, u, b, None, 1.0, torch.float16)
    assert y is not sums
    assert torch.equal(sums, before)


def test_one_rounding(kernel_device: str) -> None:
    """Sum, LoRA term and bias are each too small to move 1 in bfloat16, and together they do."""
    sums = torch.full((4, 8), 1.0 + 2.0**-9, device=kernel_device)
    u, b = (torch.zeros(rows, 8, dtype=torch.bfloat16, device=kernel_device) for rows in (4, 8))
    u[:, 0], b[:, 0] = 2.0**-9, 2.0
    bias = torch.full((8,), 2.0**-12, device=kernel_device)
    assert (finish(sums, u, b, bias, 0.5, torch.bfloat16) == 1.0 + 2.0**-7).all()
    assert (finish(sums, u, b, None, 0.5, torch.bfloat16) == 1.0).all()  # halfway, to the even neighbour


def test_strided_arguments(kernel_device: str) -> None:
    sums, u, b = operands(20, 140, 16, torch.float16, kernel_device)
    bias = torch.randn(140, device=kernel_device)
    expected = finish(sums, u, b, bias, 0.5, torch.float16)

    def columns_of_a_wider_buffer(t: torch.Tensor) -> torch.Tensor:
        nothing = torch.full_like(t, torch.nan)
        return torch.cat((nothing, t, nothing), 1)[:, t.shape[1] : 2 * t.shape[1]]

    doubled = torch.stack((bias, bias), 1)[:, 0]
    for change in (columns_of_a_wider_buffer, lambda t: t.T.contiguous().T):
        strided = [change(t) for t in (u, b)]
        assert not any(t.is_contiguous() for t in strided)
        assert torch.equal(finish(sums, *strided, doubled, 0.5, torch.float16), expected)
