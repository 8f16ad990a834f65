"""y = x W^T + scale * (u B^T) + bias, one product with W decoded in registers and the LoRA term in its accumulator."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton.language as tl

from fastlora import decoded
from fastlora.dropout import Dropout
from fastlora.kernels import config, lora, split
from fastlora.kernels.decode import check_dtype, weight_arguments, weight_tile, weight_with_rows
from fastlora.kernels.dequantize import dequantize
from fastlora.kernels.epilogue import finish
from fastlora.kernels.gemm import gemm, projecting_gemm, projects, unaligned
from fastlora.kernels.launch import jit, on_device, with_rows
from fastlora.kernels.tile import add_lora, cast, dot, grouped
from fastlora.nf4 import NF4Weight, Weight


@jit(do_not_specialize=["M"])
def linear_kernel(
    x_ptr,  # (M, K), rows stride_xm apart
    w_ptr,  # (N, K), packed or dense
    code_ptr,
    absmax_ptr,
    absmax_q_ptr,
    absmax_scale_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    u_ptr,  # (M, R), scale * u; None without adapters
    b_ptr,  # (N, R), rows stride_bn apart
    bias_ptr,  # (N,), or None
    y_ptr,  # (M, N), rows stride_ym apart
    M,
    N,
    K,
    R,
    stride_xm,
    stride_wn,
    stride_bn,
    stride_ym,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    ROW_STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One (BLOCK_M, BLOCK_N) tile of y a program, rounded once."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    tile_m, tile_n = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = m[:, None].to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)[None, :]
        x = tl.load(x_ptr + row * stride_xm + k, mask=(m[:, None] < M) & (k < K), other=0.0)
        w = weight_tile(
            w_ptr, code_ptr, absmax_ptr, absmax_q_ptr, absmax_scale_ptr, absmax_code_ptr, absmax_offset_ptr,
            n, k0, N, K, stride_wn, dtype, FORMAT, BLOCKSIZE, K_IS_EVEN, ROW_STATISTICS, BLOCK_K,
        )  # fmt: skip
        acc = dot(x, tl.trans(w), acc)
    if u_ptr is not None:
        acc = add_lora(acc, u_ptr, b_ptr, m, n, M, N, R, 1, stride_bn, dtype, BLOCK_R)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + row * stride_ym + n[None, :],
        cast(acc, y_ptr.dtype.element_ty),
        mask=(m[:, None] < M) & (n[None, :] < N),
    )


def linear(
    x: torch.Tensor,
    w: Weight,
    scaled_u: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y (M, N) of ``out_dtype`` from x (M, K) and, with adapters, scale * u (M, R) and lora_b (N, R)."""
    x, w = with_rows(x), weight_with_rows(w)
    (m, k), n = x.shape, w.shape[0]
    r = 0
    if lora_b is not None:
        lora_b, r = with_rows(lora_b), lora_b.shape[1]
    blocksize = w.blocksize if isinstance(w, NF4Weight) else None
    tiles = config.gemm(m, k, r, x.dtype, config.Device.of(x.device), blocksize=blocksize)
    y = x.new_empty(m, n, dtype=out_dtype)
    with on_device(x):
        linear_kernel[(config.cdiv(m, tiles.block_m) * config.cdiv(n, tiles.block_n),)](
            x_ptr=x,
            u_ptr=scaled_u,
            b_ptr=lora_b,
            bias_ptr=None if bias is None else bias.contiguous(),
            y_ptr=y,
            M=m,
            R=r,
            stride_xm=x.stride(0),
            stride_bn=0 if lora_b is None else lora_b.stride(0),
            stride_ym=y.stride(0),
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            BLOCK_R=tiles.block_r,
            GROUP_M=tiles.group_m,
            **weight_arguments(w, tiles.block_k),
            **tiles.launch(),
        )
    return y


def is_split(x: torch.Tensor, w: Weight, *, r: int, direction: str) -> bool:
    """Whether the product of x and w, or of dy and w, is one of few rows with a packed weight."""
    if not isinstance(w, NF4Weight) or not split.reads(w):
        return False
    return config.form(x.shape[0], *w.shape, x.dtype, x.device, r, direction) == "split"


def buffered(
    x: torch.Tensor, w: Weight, zero: torch.Tensor | None = None, *, r: int, direction: str
) -> tuple[torch.Tensor | None, bool]:
    """The base weight as a dense matrix, in a transient buffer if it is packed and no copy of it is kept, and whether
    `gemm` multiplies by it rather than a library; no matrix where tiles are decoded inside the product. ``zero``, one
    int32, becomes zero."""
    (m, _), (n, k) = x.shape, w.shape
    known = decoded.find([w], x.dtype) if isinstance(w, NF4Weight) else w
    form = config.form(m, n, k, x.dtype, x.device, r, direction, known is None)
    if form == "decode":
        return None, False
    if isinstance(w, NF4Weight) and known is None:
        dense = dequantize(w, x.dtype, zero=zero)
    else:
        assert known is not None
        dense = known.to(x.dtype)
        if zero is not None:
            zero.zero_()
    return dense, form == "persistent" and (n | k) * x.element_size() % 16 == 0 and not unaligned(x, dense)


def forward(
    x: torch.Tensor,
    w: Weight,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    dropout: Dropout | None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (M, N), of ``out_dtype`` or x's type, and u (M, R) for x (M, K), as ``fastlora.reference.forward``.

    Raises TypeError for a type of x other than float32, float16 and bfloat16, ValueError for tensors off the GPU.
    """
    check_dtype(x.dtype)
    done, r = None, 0 if lora_a is None else lora_a.shape[0]
    if is_split(x, w, r=r, direction="forward"):
        assert isinstance(w, NF4Weight)
        a, b = (lora_a, lora_b) if r else (None, None)
        return split.linear(x, w, a, b, bias, scale, dropout, out_dtype)
    projected = None
    if lora_a is not None and dropout is None and r > 0 and x.shape[0] >= config.PROJECTED_ROWS:
        done = torch.empty(1, dtype=torch.int32, device=x.device)
    elif lora_a is not None and r > 0:
        # Before W is decoded, which is then still in the cache when the product reads it.
        projected = lora.project_x(x, lora_a, scale, dropout)
    dense, persistent = buffered(x, w, done, r=r, direction="forward")
    if lora_a is None or lora_b is None or lora_a.shape[0] == 0:
        u = x.new_empty(x.shape[0], 0)
        if dense is None:
            return linear(x, w, None, None, bias, out_dtype), u
        if persistent:
            return gemm(x, dense, None, None, bias, transposed=True, out_dtype=out_dtype), u
        if out_dtype == torch.float32:
            y = torch.mm(x, dense.T, out_dtype=torch.float32)
            return (y if bias is None else y.add_(bias)), u
        return F.linear(x, dense, None if bias is None else bias.to(x.dtype)), u
    if dense is not None and not persistent:
        u, _ = projected or lora.project_x(x, lora_a, scale, dropout)
        sums = torch.mm(x, dense.T, out_dtype=torch.float32)
        return finish(sums, u, lora_b, bias, scale, out_dtype or x.dtype), u
    if dense is not None and done is not None:
        a, b = lora_a.to(x.dtype), lora_b.to(x.dtype)
        if projects(a.shape[0], x, dense, a, b):
            y, u, _ = projecting_gemm(x, dense, a, b, bias, scale, done, transposed=True, out_dtype=out_dtype)
            return y, u
    u, scaled_u = projected or lora.project_x(x, lora_a, scale, dropout)
    if dense is None:
        return linear(x, w, scaled_u, lora_b, bias, out_dtype), u
    return gemm(x, dense, scaled_u, lora_b.to(x.dtype), bias, transposed=True, out_dtype=out_dtype), u
