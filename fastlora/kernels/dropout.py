"""The dropout of a whole matrix, for what a library product made. See fastlora/dropout.py."""

from __future__ import annotations

import torch
import triton.language as tl

from fastlora.dropout import Dropout
from fastlora.kernels import config
from fastlora.kernels.launch import jit, on_device
from fastlora.kernels.tile import drop, dropout_arguments


@jit(do_not_specialize=["M", "threshold"])
def drop_kernel(
    x_ptr,  # (M, K), rows stride_xm apart; in and out
    seed_ptr,
    threshold,
    gain,
    M,
    K,
    stride_xm,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x = dropout(x), one tile a program."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tl.program_id(1) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    place = x_ptr + m[:, None].to(tl.int64) * stride_xm + k[None, :]
    inside = (m[:, None] < M) & (k[None, :] < K)
    x = tl.load(place, mask=inside, other=0.0)
    tl.store(place, drop(x, seed_ptr, threshold, gain, m, k0, BLOCK_K), mask=inside)


def drop_(x: torch.Tensor, dropout: Dropout) -> torch.Tensor:
    """``dropout.apply(x)`` in place, to the bit; x (M, K), its last dimension contiguous. Returns x."""
    m, k = x.shape
    tiles = config.dropout()
    with on_device(x):
        drop_kernel[(config.cdiv(m, tiles.block_m), config.cdiv(k, tiles.block_k))](
            x_ptr=x,
            M=m,
            K=k,
            stride_xm=x.stride(0),
            BLOCK_M=tiles.block_m,
            BLOCK_K=tiles.block_k,
            **dropout_arguments(dropout),
            num_warps=tiles.num_warps,
        )
    return x
