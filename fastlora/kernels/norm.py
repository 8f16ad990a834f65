"""Root mean square norms of rows.

    n  = x / sqrt(mean(x^2) + eps)          over the columns of a row
    y  = n * (offset + weight)
    dx = (g - n * mean(g n)) / sqrt(mean(x^2) + eps),  g = dy * (offset + weight)

Everything is computed in float32. Zhang and Sennrich, "Root mean square layer normalization" (2019).
"""

from __future__ import annotations

import torch
import triton.language as tl

from fastlora.kernels import config
from fastlora.kernels.launch import jit, on_device, with_rows
from fastlora.kernels.tile import cast

WIDEST = 16384
"""Columns of which a program keeps a whole row in registers."""


@jit(do_not_specialize=["M"])
def rms_norm_kernel(
    x_ptr,  # (M, K), rows stride_x apart
    weight_ptr,  # (K,)
    y_ptr,  # (M, K), contiguous: out
    scale_ptr,  # (M,) float32: out, 1 / sqrt(mean + eps)
    M,
    K,
    stride_x,
    eps,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row a program."""
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < K
    x = tl.load(x_ptr + row * stride_x + k, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / K + eps)
    weight = tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32)
    n = x * scale
    if ROUNDED:
        n = cast(n, dtype).to(tl.float32)
    tl.store(y_ptr + row * K + k, cast(n * (weight + OFFSET), dtype), mask=inside)
    tl.store(scale_ptr + row, scale)


@jit(do_not_specialize=["M"])
def rms_norm_backward_kernel(
    dy_ptr,  # (M, K), rows stride_dy apart
    x_ptr,  # (M, K), rows stride_x apart
    weight_ptr,  # (K,)
    scale_ptr,  # (M,) float32
    dx_ptr,  # (M, K), contiguous: out
    dweight_ptr,  # (programs, K) float32: out, or None
    M,
    K,
    stride_dy,
    stride_x,
    OFFSET: tl.constexpr,
    ROUNDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Rows as many apart as there are programs."""
    dtype: tl.constexpr = dx_ptr.dtype.element_ty
    k = tl.arange(0, BLOCK)
    inside = k < K
    weight = tl.load(weight_ptr + k, mask=inside, other=0.0).to(tl.float32) + OFFSET
    dweight = tl.zeros((BLOCK,), tl.float32)
    for at in range(tl.program_id(0), M, tl.num_programs(0)):
        row = tl.cast(at, tl.int64)
        dy = tl.load(dy_ptr + row * stride_dy + k, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + row * stride_x + k, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        n, g = x * scale, dy * weight
        dx = (g - n * (tl.sum(g * n, 0) / K)) * scale
        if dweight_ptr is not None:
            if ROUNDED:
                n = cast(n, dtype).to(tl.float32)
            dweight += dy * n
        tl.store(dx_ptr + row * K + k, cast(dx, dtype), mask=inside)
    if dweight_ptr is not None:
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * K + k, dweight, mask=inside)


def forward(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: int = 0, rounded: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (M, K) and the factors of the rows (M,) in float32, for x (M, K) and weight (K,).

    offset: 0 or 1. rounded: whether n is rounded to the type of x before it is multiplied.
    """
    x = with_rows(x)
    m, k = x.shape
    y, scale = x.new_empty(m, k), x.new_empty(m, dtype=torch.float32)
    tiles = config.norm(k)
    with on_device(x):
        rms_norm_kernel[(m,)](
            x, weight, y, scale, m, k, x.stride(0), float(eps),
            OFFSET=offset, ROUNDED=rounded, BLOCK=tiles.block_n, **tiles.launch(),
        )  # fmt: skip
    return y, scale


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    *,
    offset: int = 0,
    rounded: bool = True,
    need_dweight: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dx (M, K), and dweight (K,) in float32 where it is needed. Repeatable."""
    dy, x = with_rows(dy), with_rows(x)
    m, k = dy.shape
    dx = dy.new_empty(m, k)
    tiles = config.norm(k)
    programs, dweight = m, None
    if need_dweight:
        programs = min(m, 4 * config.Device.of(dy.device).multiprocessors)
        dweight = dy.new_empty(programs, k, dtype=torch.float32)
    with on_device(dy):
        rms_norm_backward_kernel[(programs,)](
            dy, x, weight, scale, dx, dweight, m, k, dy.stride(0), x.stride(0),
            OFFSET=offset, ROUNDED=rounded, BLOCK=tiles.block_n, **tiles.launch(),
        )  # fmt: skip
    return dx, None if dweight is None else dweight.sum(0)
