"""Device functions that the matrix products share: the dot, its LoRA term, dropout and the order of the tiles."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from triton import knobs

from fastlora.dropout import Dropout

# NumPy has no bfloat16: the interpreter holds its bit patterns as uint16, multiplies those in a dot, and truncates
# when it converts to it. `dot` and `cast` give it the arithmetic of the hardware.
_INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


def dropout_arguments(dropout: Dropout | None) -> dict[str, Any]:
    """The arguments by which a kernel takes a dropout, or none."""
    if dropout is None:
        return {"seed_ptr": None, "threshold": 0, "gain": 1.0, "DROPOUT": False}
    # The bits of the unsigned threshold in a signed word: the type of the argument never depends on p.
    threshold = dropout.threshold - 2**32 if dropout.threshold >= 2**31 else dropout.threshold
    return {"seed_ptr": dropout.seed, "threshold": threshold, "gain": float(dropout.gain), "DROPOUT": True}


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x rounded to ``dtype``, to the nearest, ties to even."""
    if _INTERPRETED and dtype == tl.bfloat16 and x.dtype != tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a b in float32, exact products (no TF32)."""
    if _INTERPRETED and a.dtype == tl.bfloat16:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def add_lora(
    acc,  # (BLOCK_ROW, BLOCK_COLUMN) float32
    narrow_ptr,  # (M, R): scale * u, or du
    adapter_ptr,  # element (r, column) at r * stride_r + column * stride_column: B^T, or A
    row,
    column,
    M,
    COLUMNS,
    R,
    stride_r,
    stride_column,
    dtype: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """acc + narrow[row] adapter[:, column]."""
    in_row = row[:, None] < M
    in_column = column[None, :] < COLUMNS
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        left = tl.load(
            narrow_ptr + row[:, None].to(tl.int64) * R + r[None, :], mask=in_row & (r[None, :] < R), other=0.0
        )
        right = tl.load(
            adapter_ptr + r[:, None].to(tl.int64) * stride_r + column[None, :].to(tl.int64) * stride_column,
            mask=(r[:, None] < R) & in_column,
            other=0.0,
        )
        acc = dot(cast(left, dtype), cast(right, dtype), acc)
    return acc


@triton.jit
def keep(seed_ptr, threshold, gain, m, k0, BLOCK_K: tl.constexpr):
    """The dropout mask of rows ``m`` and columns k0 .. k0 + BLOCK_K - 1; k0 is a multiple of 4. See dropout.py."""
    BLOCK_M: tl.constexpr = m.shape[0]
    seed = tl.load(seed_ptr)
    c0 = tl.broadcast_to((k0 // 4 + tl.arange(0, BLOCK_K // 4))[None, :], (BLOCK_M, BLOCK_K // 4)).to(tl.uint32)
    c1 = tl.broadcast_to(m[:, None], (BLOCK_M, BLOCK_K // 4)).to(tl.uint32)
    zero = tl.zeros((BLOCK_M, BLOCK_K // 4), tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, c0, c1, zero, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).reshape(BLOCK_M, BLOCK_K)
    return (words >= threshold.to(tl.uint32, bitcast=True)) & (gain > 0)


@triton.jit
def drop(x, seed_ptr, threshold, gain, m, k0, BLOCK_K: tl.constexpr):
    """dropout(x) for a tile of x whose first column is ``k0``, rounded to x's type as PyTorch rounds it."""
    kept = keep(seed_ptr, threshold, gain, m, k0, BLOCK_K)
    return cast(tl.where(kept, x.to(tl.float32) * gain, 0.0), x.dtype)


@triton.jit
def grouped(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile of M, tile of N) of a program: GROUP_M tiles of M per tile of N, so that both operands stay in L2."""
    group = pid // (GROUP_M * tiles_n)
    first = group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    return first + inside % height, inside // height
