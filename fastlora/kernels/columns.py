"""A factor for each column, as DoRA has one: the output, its gradient with the sums of columns, and the norms of rows.

    scaled              y = (z - bias) * gain + bias + rest                       one read of z, one write
    scaled_gradients    dz = dy * gain and the column sums of dy * (z - bias)     one read of dy and z, one write
    row_norm            norms of the rows of W + scale * B A from what is (R, N) or smaller
    folded              the same, and the factors put into the statistics of a 4-bit W and into B

Two runs give the same bits: column sums are taken of strips of rows, whose float32 partials are added in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels import config
from fastlora.kernels.decode import statistic
from fastlora.kernels.launch import jit, on_device, with_rows
from fastlora.kernels.tile import cast
from fastlora.nf4 import NF4Weight


@jit(do_not_specialize=["M"])
def scaled_kernel(
    z_ptr,  # (M, N)
    gain_ptr,  # (N,) float32
    bias_ptr,  # (N,), or None
    rest_ptr,  # (M, N), or None
    y_ptr,  # (M, N)
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One (BLOCK_M, BLOCK_N) tile of y = (z - bias) * gain + bias + rest a program, rounded once."""
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (m[:, None] < M) & (n[None, :] < N)
    target = m[:, None].to(tl.int64) * N + n[None, :]
    gain = tl.load(gain_ptr + n, mask=n < N, other=0.0)
    y = tl.load(z_ptr + target, mask=inside, other=0.0).to(tl.float32) * gain[None, :]
    if bias_ptr is not None:
        # So arranged, a gain of 1 leaves z as it is.
        y += (tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32) * (1 - gain))[None, :]
    if rest_ptr is not None:
        y += tl.load(rest_ptr + target, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + target, cast(y, y_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["M"])
def scaled_gradients_kernel(
    dy_ptr,  # (M, N)
    z_ptr,  # (M, N), or None
    gain_ptr,  # (N,) float32
    bias_ptr,  # (N,), or None
    dz_ptr,  # (M, N), or None
    sums_ptr,  # (strips, N) float32: of dy * (z - bias), unless z is None
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIP: tl.constexpr,
):
    """BLOCK_N columns of a strip of rows a program."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    gain = tl.load(gain_ptr + n, mask=n < N, other=0.0)
    # Rows meet once, after the last: a sum over them in every step would have the threads wait for each other.
    products = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    bias = tl.zeros((BLOCK_N,), tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
    for m0 in range(0, STRIP, BLOCK_M):
        m = tl.program_id(1) * STRIP + m0 + tl.arange(0, BLOCK_M)
        inside = (m[:, None] < M) & (n[None, :] < N)
        target = m[:, None].to(tl.int64) * N + n[None, :]
        dy = tl.load(dy_ptr + target, mask=inside, other=0.0).to(tl.float32)
        if z_ptr is not None:
            z = tl.load(z_ptr + target, mask=inside, other=0.0).to(tl.float32)
            products += dy * (z - bias[None, :])
        if dz_ptr is not None:
            tl.store(dz_ptr + target, cast(dy * gain[None, :], dz_ptr.dtype.element_ty), mask=inside)
    if z_ptr is not None:
        tl.store(sums_ptr + tl.program_id(1).to(tl.int64) * N + n, tl.sum(products, 0), mask=n < N)


@jit()
def row_norm_kernel(
    cross_ptr,  # (R, N) float32: A W^T
    gram_ptr,  # (R, R) float32: A A^T
    b_ptr,  # (N, R), rows stride_bn apart
    norms_ptr,  # (N,) float32: of the rows of W
    magnitude_ptr,  # (N,)
    norm_ptr,  # (N,) float32; with a weight gain * norm
    gain_ptr,  # (N,) float32
    absmax_ptr,  # statistics of W, PER_ROW a row; None, as is all that follows, without a weight
    absmax_q_ptr,
    absmax_scale_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    whole_b_ptr,  # (N, R), rows stride_wbn apart: B before it was rounded to the type computed in
    folded_absmax_ptr,  # (N * PER_ROW,) float32
    folded_b_ptr,  # (N, R)
    scale,
    no_gain,  # what stands for a gain of 0
    N,
    R,
    stride_bn,
    stride_wbn,
    FORMAT: tl.constexpr,
    PER_ROW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """norm and gain = magnitude / norm of BLOCK_N rows a program, and with a weight what the gains make of it."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    in_n = n < N
    rows = b_ptr + n.to(tl.int64) * stride_bn
    b = tl.load(rows[:, None] + r[None, :], mask=in_n[:, None] & (r[None, :] < R), other=0.0).to(tl.float32)
    of_w = tl.load(norms_ptr + n, mask=in_n, other=0.0)
    change = tl.zeros((BLOCK_N,), tl.float32)
    for i in range(R):
        gram = tl.load(gram_ptr + i * R + r, mask=r < R, other=0.0)
        cross = tl.load(cross_ptr + i * N + n, mask=in_n, other=0.0)
        of_row = tl.load(rows + i, mask=in_n, other=0.0).to(tl.float32)
        change += of_row * (2 * scale * cross + scale * scale * tl.sum(b * gram[None, :], 1))
    # Rounding may leave the square of a row that the adapter cancels below zero; one that it leaves alone is exact.
    norm = tl.where(change == 0, of_w, tl.sqrt(tl.maximum(of_w * of_w + change, 0.0)))
    magnitude = tl.load(magnitude_ptr + n, mask=in_n, other=0.0).to(tl.float32)
    gain = magnitude / norm
    if folded_absmax_ptr is not None:
        gain = tl.where(gain == 0, no_gain, gain)
        norm *= gain
        whole = tl.load(
            whole_b_ptr + n.to(tl.int64)[:, None] * stride_wbn + r[None, :],
            mask=in_n[:, None] & (r[None, :] < R),
            other=0.0,
        )
        tl.store(
            folded_b_ptr + n.to(tl.int64)[:, None] * R + r[None, :],
            cast(whole.to(tl.float32) * gain[:, None], folded_b_ptr.dtype.element_ty),
            mask=in_n[:, None] & (r[None, :] < R),
        )
        for s0 in range(0, PER_ROW, BLOCK_S):
            s = s0 + tl.arange(0, BLOCK_S)
            mask = in_n[:, None] & (s[None, :] < PER_ROW)
            block = n.to(tl.int64)[:, None] * PER_ROW + s[None, :]
            a = statistic(
                block, mask, absmax_ptr, absmax_q_ptr, absmax_scale_ptr, absmax_code_ptr, absmax_offset_ptr, FORMAT
            )
            tl.store(folded_absmax_ptr + block, a * gain[:, None], mask=mask)
    tl.store(norm_ptr + n, norm, mask=in_n)
    tl.store(gain_ptr + n, gain, mask=in_n)


def _grid(m: int, n: int, rows: int) -> tuple[int, int]:
    return triton.cdiv(n, config.columns().block_n), triton.cdiv(m, rows)


def scaled(z: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None, rest: torch.Tensor | None) -> torch.Tensor:
    """(z - bias) * gain + bias + rest of the type of z (M, N), for gain and bias (N,) and rest (M, N)."""
    tiles, (m, n) = config.columns(), z.shape
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    with on_device(z):
        scaled_kernel[_grid(m, n, tiles.block_m)](
            z.contiguous(),
            gain,
            None if bias is None else bias.contiguous(),
            None if rest is None else rest.contiguous(),
            y,
            m,
            n,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            num_warps=tiles.num_warps,
        )
    return y


def scaled_gradients(
    dy: torch.Tensor, z: torch.Tensor | None, gain: torch.Tensor, bias: torch.Tensor | None, need_dz: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dz = dy * gain of the type of dy (M, N), where needed, and the column sums (N,) of
    dy * (z - bias), where z is given."""
    tiles, (m, n) = config.columns(), dy.shape
    dz = torch.empty_like(dy, memory_format=torch.contiguous_format) if need_dz else None
    columns, strips = _grid(m, n, config.COLUMN_STRIP)
    sums = None if z is None else torch.empty(strips, n, dtype=torch.float32, device=dy.device)
    with on_device(dy):
        scaled_gradients_kernel[columns, strips](
            dy.contiguous(),
            None if z is None else z.contiguous(),
            gain,
            None if bias is None else bias.contiguous(),
            dz,
            sums,
            m,
            n,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            STRIP=config.COLUMN_STRIP,
            num_warps=tiles.num_warps,
        )
    return dz, None if sums is None else sums.sum(0)


def row_norm(
    cross: torch.Tensor,
    gram: torch.Tensor,
    b: torch.Tensor,
    norms: torch.Tensor,
    magnitude: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(N,) norms of the rows of W + scale * B A, and magnitude / norm, in float32.

    cross: A W^T (R, N), gram: A A^T (R, R), norms: those of the rows of W (N,), all float32.
    b: (N, R) and magnitude: (N,), of any floating type.
    """
    norm, gain, _, _ = _row_norm(cross, gram, b, norms, magnitude, scale, None, None, 0.0)
    return norm, gain


def folded(
    cross: torch.Tensor,
    gram: torch.Tensor,
    b: torch.Tensor,
    norms: torch.Tensor,
    magnitude: torch.Tensor,
    scale: float,
    w: NF4Weight,
    lora_b: torch.Tensor,
    no_gain: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of gain = magnitude / norm, or ``no_gain`` where that is 0: gain (N,), gain * norm (N,), the flat statistics of
    diag(gain) w, and diag(gain) lora_b in its own type.

    The arguments of `row_norm`, whose ``b`` is lora_b (N, R) in the type computed in, and w (N, K), of which no block
    straddles rows.
    """
    norm, gain, absmax, folded_b = _row_norm(cross, gram, b, norms, magnitude, scale, w, lora_b, no_gain)
    assert absmax is not None and folded_b is not None
    return gain, norm, absmax, folded_b


def _row_norm(
    cross: torch.Tensor,
    gram: torch.Tensor,
    b: torch.Tensor,
    norms: torch.Tensor,
    magnitude: torch.Tensor,
    scale: float,
    w: NF4Weight | None,
    lora_b: torch.Tensor | None,
    no_gain: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    n, r = b.shape
    b = with_rows(b)
    norm, gain = (torch.empty(n, dtype=torch.float32, device=b.device) for _ in range(2))
    per_row, absmax, folded_b = 0, None, None
    if w is not None and lora_b is not None:
        per_row, lora_b = w.shape[1] // w.blocksize, with_rows(lora_b)
        absmax = torch.empty(w.blocks, dtype=torch.float32, device=b.device)
        folded_b = torch.empty(n, r, dtype=lora_b.dtype, device=b.device)
    with on_device(b):
        row_norm_kernel[(triton.cdiv(n, config.ROW_NORMS),)](
            cross.contiguous(),
            gram.contiguous(),
            b,
            norms,
            magnitude.contiguous(),
            norm,
            gain,
            None if w is None else w.absmax,
            None if w is None else w.absmax_q,
            None if w is None else w.absmax_scale,
            None if w is None else w.absmax_code,
            None if w is None else w.absmax_offset,
            lora_b,
            absmax,
            folded_b,
            float(scale),
            no_gain,
            n,
            r,
            b.stride(0),
            0 if lora_b is None else lora_b.stride(0),
            FORMAT="nested" if w is not None and w.nested else "flat",
            PER_ROW=per_row,
            BLOCK_N=config.ROW_NORMS,
            BLOCK_R=triton.next_power_of_2(r),
            BLOCK_S=min(64, triton.next_power_of_2(max(per_row, 1))),
            num_warps=4,
            enable_fp_fusion=False,  # statistics as the format rounds them
        )
    return norm, gain, absmax, folded_b
