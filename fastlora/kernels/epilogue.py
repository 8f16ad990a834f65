"""What follows a library product whose float32 sums were kept: the LoRA term, the bias, and the only rounding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.int8 import Factor
from fastlora.kernels import config
from fastlora.kernels.decode import factor_arguments, factor_tile, factor_values, row_scales
from fastlora.kernels.launch import jit, on_device, with_rows
from fastlora.kernels.tile import cast, dot


@jit(do_not_specialize=["M"])
def epilogue_kernel(
    sums_ptr,  # (M, N) float32
    u_ptr,  # (M, R), rows stride_um apart
    b_ptr,  # (N, R), rows stride_bn apart, or packed
    scales_ptr,
    table_ptr,
    bias_ptr,  # (N,), or None
    y_ptr,  # (M, N)
    scale,
    M,
    N,
    R,
    stride_um,
    stride_bn,
    ADAPTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One (BLOCK_M, BLOCK_N) tile of y = sums + scale * (u B^T) + bias a program."""
    dtype: tl.constexpr = u_ptr.dtype.element_ty
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = m[:, None] < M, n[None, :] < N
    target = m[:, None].to(tl.int64) * N + n[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        u = tl.load(u_ptr + m[:, None].to(tl.int64) * stride_um + r[None, :], mask=in_m & (r[None, :] < R), other=0.0)
        if table_ptr is None:
            rows = n[:, None].to(tl.int64) * stride_bn
            b = tl.load(b_ptr + rows + r[None, :], mask=(n[:, None] < N) & (r[None, :] < R), other=0.0)
            b = cast(b, dtype)
        else:
            b = factor_tile(b_ptr, scales_ptr, table_ptr, n, r0, N, R, dtype, ADAPTER, BLOCK_R)
        acc = dot(u, tl.trans(b), acc)
    if ADAPTER == "int8":
        acc *= row_scales(scales_ptr, n, N)[None, :]
    acc = acc * scale + tl.load(sums_ptr + target, mask=in_m & in_n, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + target, cast(acc, y_ptr.dtype.element_ty), mask=in_m & in_n)


def finish(
    sums: torch.Tensor,
    u: torch.Tensor,
    lora_b: Factor,
    bias: torch.Tensor | None,
    scale: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """y (M, N) of ``out_dtype`` from float32 ``sums`` (M, N), u (M, R) and lora_b (N, R)."""
    (m, n), r = sums.shape, u.shape[1]
    u, b = with_rows(u), with_rows(factor_values(lora_b))
    y = sums if out_dtype == sums.dtype else torch.empty(m, n, dtype=out_dtype, device=sums.device)
    tiles = config.epilogue(m, r, u.dtype, config.Device.of(sums.device))
    with on_device(sums):
        epilogue_kernel[(triton.cdiv(n, tiles.block_n), triton.cdiv(m, tiles.block_m))](
            sums_ptr=sums,
            u_ptr=u,
            b_ptr=b,
            bias_ptr=None if bias is None else bias.contiguous(),
            y_ptr=y,
            scale=float(scale),
            M=m,
            N=n,
            R=r,
            stride_um=u.stride(0),
            stride_bn=b.stride(0),
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_R=tiles.block_r,
            **factor_arguments(lora_b),
            **tiles.launch(),
        )
    return y
