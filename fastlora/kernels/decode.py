"""Device functions: the 4-bit format in registers.

Every product and sum of the format is rounded on its own, so a kernel that calls these must be launched with
``enable_fp_fusion=False``; then it agrees with ``NF4Weight.dequantize`` bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from fastlora.kernels import config
from fastlora.kernels.launch import with_rows
from fastlora.kernels.tile import cast
from fastlora.nf4 import NESTED_BLOCKSIZE, NF4Weight, Weight

_NESTED_BLOCKSIZE = tl.constexpr(NESTED_BLOCKSIZE)


def weight_arguments(w: Weight, block_k: int) -> dict[str, Any]:
    """The arguments by which every kernel takes a base weight (N, K), packed or dense, in tiles of block_k columns."""
    n, k = w.shape
    arguments: dict[str, Any] = {"N": n, "K": k, "K_IS_EVEN": k % 2 == 0}
    if isinstance(w, NF4Weight):
        return arguments | {
            "w_ptr": w.w_packed,
            "code_ptr": w.code,
            "absmax_ptr": w.absmax,
            "absmax_q_ptr": w.absmax_q,
            "absmax_scale_ptr": w.absmax_scale,
            "absmax_code_ptr": w.absmax_code,
            "absmax_offset_ptr": w.absmax_offset,
            "stride_wn": k,
            "FORMAT": "nested" if w.nested else "flat",
            "BLOCKSIZE": w.blocksize,
            "ROW_STATISTICS": config.one_statistic_per_row(k, w.blocksize, block_k),
        }
    absent = ("code_ptr", "absmax_ptr", "absmax_q_ptr", "absmax_scale_ptr", "absmax_code_ptr", "absmax_offset_ptr")
    dense = {"w_ptr": w, "stride_wn": w.stride(0), "FORMAT": "dense", "BLOCKSIZE": 0, "ROW_STATISTICS": False}
    return arguments | dict.fromkeys(absent) | dense


def weight_with_rows(w: Weight) -> Weight:
    """``w`` as the kernels read it: a dense matrix needs contiguous rows."""
    return w if isinstance(w, NF4Weight) else with_rows(w)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise TypeError unless the kernels can compute in ``dtype``."""
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"the Triton kernels compute in float32, float16 or bfloat16, not {dtype}")


@triton.jit
def statistic(
    block,  # any shape, int64
    mask,
    absmax_ptr,
    absmax_q_ptr,
    absmax_scale_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    FORMAT: tl.constexpr,
):
    """The float32 statistics of blocks; zero, or the nested offset, where ``mask`` is false."""
    if FORMAT == "nested":
        q = tl.load(absmax_q_ptr + block, mask=mask, other=0).to(tl.int32)
        group = tl.load(absmax_scale_ptr + block // _NESTED_BLOCKSIZE, mask=mask, other=0.0)
        return tl.load(absmax_code_ptr + q) * group + tl.load(absmax_offset_ptr)
    else:
        return tl.load(absmax_ptr + block, mask=mask, other=0.0)


@triton.jit
def both_nibbles(packed, a, code_ptr, dtype: tl.constexpr):
    """Two values a byte, side by side in the last dimension: (..., C) bytes to (..., 2 C) of ``dtype``."""
    high = tl.load(code_ptr + (packed >> 4).to(tl.int32)) * a
    low = tl.load(code_ptr + (packed & 15).to(tl.int32)) * a
    both = tl.join(high, low).reshape(packed.shape[0], packed.shape[1] * 2)
    # Rounding comes last: Triton 3.6 cannot place a tile in shared memory for a dot straight after a reshape.
    return cast(both, dtype)


@triton.jit
def weight_tile(
    w_ptr,
    code_ptr,
    absmax_ptr,
    absmax_q_ptr,
    absmax_scale_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    n,  # (BLOCK_N,) rows
    k0,  # first column
    N,
    K,
    stride_wn,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    ROW_STATISTICS: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W[n, k0 : k0 + BLOCK_K], (BLOCK_N, BLOCK_K) of ``dtype``; finite outside of the matrix."""
    row = n[:, None].to(tl.int64)
    if FORMAT == "dense":
        k = k0 + tl.arange(0, BLOCK_K)[None, :]
        return cast(tl.load(w_ptr + row * stride_wn + k, mask=(n[:, None] < N) & (k < K), other=0.0), dtype)
    elif K_IS_EVEN:
        # A byte never straddles two rows, and its two elements always share a statistic.
        k = k0 + 2 * tl.arange(0, BLOCK_K // 2)[None, :]
        mask = (n[:, None] < N) & (k < K)
        element = row * K + k
        packed = tl.load(w_ptr + element // 2, mask=mask, other=0)
        if ROW_STATISTICS:
            block = (row * K + k0) // BLOCKSIZE
            inside = n[:, None] < N
        else:
            block = element // BLOCKSIZE
            inside = mask
        a = statistic(
            block, inside, absmax_ptr, absmax_q_ptr, absmax_scale_ptr, absmax_code_ptr, absmax_offset_ptr, FORMAT
        )
        return both_nibbles(packed, a, code_ptr, dtype)
    else:
        k = k0 + tl.arange(0, BLOCK_K)[None, :]
        mask = (n[:, None] < N) & (k < K)
        element = row * K + k
        packed = tl.load(w_ptr + element // 2, mask=mask, other=0).to(tl.int32)
        nibble = tl.where(element % 2 == 0, packed >> 4, packed & 15)
        block = element // BLOCKSIZE
        a = statistic(
            block, mask, absmax_ptr, absmax_q_ptr, absmax_scale_ptr, absmax_code_ptr, absmax_offset_ptr, FORMAT
        )
        return cast(tl.load(code_ptr + nibble) * a, dtype)
