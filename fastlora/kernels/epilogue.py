"""What follows a library product whose float32 sums were kept: the LoRA term, the bias, and the only rounding."""

from __future__ import annotations

import torch
import triton.language as tl

from fastlora.kernels import config
from fastlora.kernels.launch import jit, on_device, with_rows
from fastlora.kernels.tile import cast, dot


@jit(do_not_specialize=["M"])
def epilogue_kernel(
    sums_ptr,  # (M, N) float32
    u_ptr,  # (M, R), rows stride_um apart
    b_ptr,  # (N, R), rows stride_bn apart
    bias_ptr,  # (N,), or None
    y_ptr,  # (M, N)
    scale,
    M,
    N,
    R,
    stride_um,
    stride_bn,
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
        rows = n[:, None].to(tl.int64) * stride_bn
        b = tl.load(b_ptr + rows + r[None, :], mask=(n[:, None] < N) & (r[None, :] < R), other=0.0)
        acc = dot(u, tl.trans(cast(b, dtype)), acc)
    acc = acc * scale + tl.load(sums_ptr + target, mask=in_m & in_n, other=0.0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + target, cast(acc, y_ptr.dtype.element_ty), mask=in_m & in_n)


def finish(
    sums: torch.Tensor,
    u: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """y (M, N) of ``out_dtype`` from float32 ``sums`` (M, N), u (M, R) and lora_b (N, R) of any floating type."""
    (m, n), r = sums.shape, u.shape[1]
    u, lora_b = with_rows(u), with_rows(lora_b)
    y = sums if out_dtype == sums.dtype else torch.empty(m, n, dtype=out_dtype, device=sums.device)
    tiles = config.epilogue(m, r, u.dtype, config.Device.of(sums.device))
    with on_device(sums):
        epilogue_kernel[(config.cdiv(n, tiles.block_n), config.cdiv(m, tiles.block_m))](
            sums,
            u,
            lora_b,
            None if bias is None else bias.contiguous(),
            y,
            float(scale),
            m,
            n,
            r,
            u.stride(0),
            lora_b.stride(0),
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_R=tiles.block_r,
            **tiles.launch(),
        )
    return y
