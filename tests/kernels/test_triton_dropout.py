"""The replayed mask of the kernels is that of fastlora.dropout, bit for bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from fastlora.dropout import Dropout
from fastlora.kernels.tile import drop, dropout_arguments


@triton.jit
def drop_kernel(
    x_ptr, out_ptr, seed_ptr, threshold, gain, M, K,
    DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = dropout(x), one tile a program."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tl.program_id(1) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    offset = m[:, None] * K + k[None, :]
    inside = (m[:, None] < M) & (k[None, :] < K)
    x = tl.load(x_ptr + offset, mask=inside, other=0.0)
    tl.store(out_ptr + offset, drop(x, seed_ptr, threshold, gain, m, k0, BLOCK_K), mask=inside)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 + 5, 2**63 - 2, -1])
def test_same_bits(seed: int, p: float, dtype: torch.dtype, kernel_device: str) -> None:
    x = torch.randn(37, 83, device=kernel_device).to(dtype)
    dropout = Dropout(p, torch.tensor([seed], device=kernel_device))
    out = torch.full_like(x, torch.nan)
    arguments = dropout_arguments(dropout)
    drop_kernel[(3, 3)](x, out, M=37, K=83, BLOCK_M=16, BLOCK_K=32, **arguments)
    assert torch.equal(out, dropout.apply(x))
