"""A factor for each column, as DoRA has one: the output, its gradient with the sums of columns, and the norms of rows.

    scaled              y = (z - bias) * gain + bias + rest                       one read of z, one write
    scaled_gradients    dz = dy * gain and the column sums of dy * (z - bias)     one read of dy and z, one write
    finished            what follows from those sums: the gradient of the magnitude, and dB of B times its factors
    row_norm            norms of the rows of W + scale * B A from what is (R, N) or smaller
    folded              the same from W and A, and the factors put into the statistics of a 4-bit W and into B

Two runs give the same bits: column sums are taken of strips of rows, whose float32 partials are added in one order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels import config
from fastlora.kernels.decode import statistic
from fastlora.kernels.launch import jit, on_device, with_rows
from fastlora.kernels.split import GROUP, decode_groups, load_groups, load_rows, permute, reads
from fastlora.kernels.tile import cast, dot
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


@jit(do_not_specialize=["strips"])
def finished_kernel(
    sums_ptr,  # (strips, N) float32, or None
    length_ptr,  # (N,) float32
    gain_ptr,  # (N,) float32
    dm_ptr,  # (N,)
    db_ptr,  # (N, R), or None
    strips,
    N,
    R,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dm = sum of the strips / length, and dB *= gain in place, for BLOCK_N columns a program."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    if sums_ptr is not None:
        sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for s0 in range(0, strips, BLOCK_M):
            s = s0 + tl.arange(0, BLOCK_M)
            mask = (s[:, None] < strips) & (n[None, :] < N)
            sums += tl.load(sums_ptr + s[:, None].to(tl.int64) * N + n[None, :], mask=mask, other=0.0)
        dm = tl.sum(sums, 0) / tl.load(length_ptr + n, mask=n < N, other=1.0)
        tl.store(dm_ptr + n, cast(dm, dm_ptr.dtype.element_ty), mask=n < N)
    if db_ptr is not None:
        gain = tl.load(gain_ptr + n, mask=n < N, other=0.0)
        for r0 in range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            target = db_ptr + n[:, None].to(tl.int64) * R + r[None, :]
            inside = (n[:, None] < N) & (r[None, :] < R)
            db = tl.load(target, mask=inside, other=0.0).to(tl.float32) * gain[:, None]
            tl.store(target, cast(db, db_ptr.dtype.element_ty), mask=inside)


@triton.jit
def changed_norm(of_w, change):
    """The norms of rows whose squares change by ``change``."""
    # Rounding may leave the square of a row that the adapter cancels below zero; one that it leaves alone is exact.
    return tl.where(change == 0, of_w, tl.sqrt(tl.maximum(of_w * of_w + change, 0.0)))


@jit()
def row_norm_kernel(
    cross_ptr,  # (R, N) float32: A W^T
    gram_ptr,  # (R, R) float32: A A^T
    b_ptr,  # (N, R), rows stride_bn apart
    norms_ptr,  # (N,) float32: of the rows of W
    magnitude_ptr,  # (N,)
    norm_ptr,  # (N,) float32
    gain_ptr,  # (N,) float32
    scale,
    N,
    R,
    stride_bn,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """norm and gain = magnitude / norm of BLOCK_N rows a program."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    in_n = n < N
    rows = b_ptr + n.to(tl.int64) * stride_bn
    b = tl.load(rows[:, None] + r[None, :], mask=in_n[:, None] & (r[None, :] < R), other=0.0).to(tl.float32)
    change = tl.zeros((BLOCK_N,), tl.float32)
    for i in range(R):
        gram = tl.load(gram_ptr + i * R + r, mask=r < R, other=0.0)
        cross = tl.load(cross_ptr + i * N + n, mask=in_n, other=0.0)
        of_row = tl.load(rows + i, mask=in_n, other=0.0).to(tl.float32)
        change += of_row * (2 * scale * cross + scale * scale * tl.sum(b * gram[None, :], 1))
    norm = changed_norm(tl.load(norms_ptr + n, mask=in_n, other=1.0), change)
    magnitude = tl.load(magnitude_ptr + n, mask=in_n, other=0.0).to(tl.float32)
    tl.store(norm_ptr + n, norm, mask=in_n)
    tl.store(gain_ptr + n, magnitude / norm, mask=in_n)


@jit()
def folded_kernel(
    a_ptr,  # (R, K), rows stride_ar apart
    b_ptr,  # (N, R), rows stride_bn apart
    w_ptr,  # (N, groups, 4) 32-bit words of eight nibbles
    code_ptr,
    absmax_ptr,
    absmax_q_ptr,
    absmax_scale_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    norms_ptr,  # (N,) float32: of the rows of W
    magnitude_ptr,  # (N,)
    gain_ptr,  # (N,) float32
    length_ptr,  # (N,) float32
    folded_absmax_ptr,  # (N, statistics of a row) float32
    folded_b_ptr,  # (N, R)
    scale,
    no_gain,  # what stands for a gain of 0
    N,
    groups,
    R,
    stride_ar,
    stride_bn,
    DTYPE: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    PERMUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """gain = magnitude / norm, length = gain * norm, and what the gains make of W and B, of BLOCK_N rows a program.

    A W^T and A A^T are taken of operands rounded to DTYPE. Every program makes A A^T again from the A that it reads
    anyway: one of 16 x 16 costs less than the launch that would make it once.
    """
    GROUPS: tl.constexpr = BLOCK_K // 32
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    K = groups * 32
    a = load_rows(a_ptr, r, tl.arange(0, BLOCK_K), K, R, stride_ar)
    word, q, base = load_groups(
        w_ptr, absmax_ptr, absmax_q_ptr, absmax_scale_ptr, n, 0, groups, N, groups, FORMAT, BLOCKSIZE, GROUPS
    )
    cross = tl.zeros((BLOCK_R, BLOCK_N), tl.float32)
    gram = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for step in range(tl.cdiv(K, BLOCK_K)):
        # The next step's loads are under way while this one decodes and multiplies.
        after = step + 1
        next_a = load_rows(a_ptr, r, after * BLOCK_K + tl.arange(0, BLOCK_K), K, R, stride_ar)
        next_word, next_q, next_base = load_groups(
            w_ptr, absmax_ptr, absmax_q_ptr, absmax_scale_ptr, n, after * GROUPS, groups, N, groups,
            FORMAT, BLOCKSIZE, GROUPS,
        )  # fmt: skip
        w = decode_groups(word, q, base, code_ptr, absmax_code_ptr, absmax_offset_ptr, DTYPE, FORMAT, PERMUTE, BLOCK_N)
        rows = cast(a, DTYPE)
        cross = dot(rows, tl.trans(w), cross)
        gram = dot(rows, tl.trans(rows), gram)
        a, word, q, base = next_a, next_word, next_q, next_base

    in_n = n < N
    inside = (r[:, None] < R) & in_n[None, :]
    whole = tl.load(b_ptr + n[None, :].to(tl.int64) * stride_bn + r[:, None], mask=inside, other=0.0)
    b = cast(whole, DTYPE).to(tl.float32)
    squared = dot(gram, b, tl.zeros((BLOCK_R, BLOCK_N), tl.float32))
    change = tl.sum(b * (2 * scale * cross + scale * scale * squared), 0)
    norm = changed_norm(tl.load(norms_ptr + n, mask=in_n, other=1.0), change)
    gain = tl.load(magnitude_ptr + n, mask=in_n, other=0.0).to(tl.float32) / norm
    gain = tl.where(gain == 0, no_gain, gain)
    tl.store(gain_ptr + n, gain, mask=in_n)
    tl.store(length_ptr + n, norm * gain, mask=in_n)
    tl.store(
        folded_b_ptr + n[None, :].to(tl.int64) * R + r[:, None],
        cast(whole.to(tl.float32) * gain[None, :], folded_b_ptr.dtype.element_ty),
        mask=inside,
    )
    per_row = K // BLOCKSIZE
    for s0 in range(0, per_row, BLOCK_S):
        s = s0 + tl.arange(0, BLOCK_S)
        mask = in_n[:, None] & (s[None, :] < per_row)
        block = n.to(tl.int64)[:, None] * per_row + s[None, :]
        absmax = statistic(
            block, mask, absmax_ptr, absmax_q_ptr, absmax_scale_ptr, absmax_code_ptr, absmax_offset_ptr, FORMAT
        )
        tl.store(folded_absmax_ptr + block, absmax * gain[:, None], mask=mask)


def scaled(z: torch.Tensor, gain: torch.Tensor, bias: torch.Tensor | None, rest: torch.Tensor | None) -> torch.Tensor:
    """(z - bias) * gain + bias + rest of the type of z (M, N), for gain and bias (N,) and rest (M, N)."""
    tiles, (m, n) = config.columns(), z.shape
    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    with on_device(z):
        scaled_kernel[config.cdiv(n, tiles.block_n), config.cdiv(m, tiles.block_m)](
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
    """dz = dy * gain of the type of dy (M, N), where needed, and the column sums of dy * (z - bias) over each strip of
    rows, (strips, N), where z is given."""
    m, n = dy.shape
    tiles, strip = config.column_sums(m, n, config.Device.of(dy.device))
    dz = torch.empty_like(dy, memory_format=torch.contiguous_format) if need_dz else None
    strips = config.cdiv(m, strip)
    sums = None if z is None else torch.empty(strips, n, dtype=torch.float32, device=dy.device)
    with on_device(dy):
        scaled_gradients_kernel[config.cdiv(n, tiles.block_n), strips](
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
            STRIP=strip,
            num_warps=tiles.num_warps,
        )
    return dz, sums


def finished(
    sums: torch.Tensor | None,
    length: torch.Tensor,
    dtype: torch.dtype,
    gain: torch.Tensor | None = None,
    db: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The column sums that `scaled_gradients` left in strips, over ``length`` (N,), in ``dtype``; and db (N, R) times
    gain (N,), in place where its elements lie in one row. What is not given is None."""
    n, r = length.numel(), 0
    dm = None if sums is None else torch.empty(n, dtype=dtype, device=length.device)
    if db is not None:
        db, r = db.contiguous(), db.shape[1]
    if dm is None and db is None:
        return None, None
    tiles = config.finished()
    with on_device(length):
        finished_kernel[(config.cdiv(n, tiles.block_n),)](
            sums,
            length,
            gain,
            dm,
            db,
            0 if sums is None else sums.shape[0],
            n,
            r,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_R=tiles.block_r,
            num_warps=tiles.num_warps,
        )
    return dm, db


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
    n, r = b.shape
    b = with_rows(b)
    norm, gain = (torch.empty(n, dtype=torch.float32, device=b.device) for _ in range(2))
    with on_device(b):
        row_norm_kernel[(config.cdiv(n, config.ROW_NORMS),)](
            cross.contiguous(),
            gram.contiguous(),
            b,
            norms,
            magnitude.contiguous(),
            norm,
            gain,
            float(scale),
            n,
            r,
            b.stride(0),
            BLOCK_N=config.ROW_NORMS,
            BLOCK_R=config.next_power_of_two(r),
            num_warps=4,
        )
    return norm, gain


_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def folds(w: NF4Weight, r: int, dtype: torch.dtype) -> bool:
    """Whether `folded` computes this: in 16 bits, of ranks whose A A^T fits into registers."""
    if dtype not in _DTYPES or not reads(w) or r > config.FOLDED_RANK:
        return False
    return dtype != torch.bfloat16 or config.Device.of(w.device).capability >= (8, 0)


def folded(
    w: NF4Weight,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    norms: torch.Tensor,
    magnitude: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
    no_gain: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of gain = magnitude / norm, or ``no_gain`` where that is 0: gain (N,), gain * norm (N,), the flat statistics of
    diag(gain) w, and diag(gain) lora_b in its own type.

    norm is that of the rows of w + scale * lora_b lora_a, from products of operands of ``dtype``. w: (N, K), of which
    no block straddles rows; `folds` must accept it. norms: those of its rows (N,), float32. lora_a: (R, K),
    lora_b: (N, R), magnitude: (N,), of any floating type.
    """
    (n, k), r = w.shape, lora_a.shape[0]
    lora_a, lora_b = with_rows(lora_a), with_rows(lora_b)
    gain, length = (torch.empty(n, dtype=torch.float32, device=w.device) for _ in range(2))
    absmax = torch.empty(w.blocks, dtype=torch.float32, device=w.device)
    folded_b = torch.empty(n, r, dtype=lora_b.dtype, device=w.device)
    tiles = config.folded(n, r, config.Device.of(w.device))
    with on_device(w.w_packed):
        folded_kernel[(config.cdiv(n, tiles.block_n),)](
            lora_a,
            lora_b,
            w.w_packed.view(torch.int32),
            w.code,
            w.absmax,
            w.absmax_q,
            w.absmax_scale,
            w.absmax_code,
            w.absmax_offset,
            norms,
            magnitude.contiguous(),
            gain,
            length,
            absmax,
            folded_b,
            float(scale),
            no_gain,
            n,
            k // GROUP,
            r,
            lora_a.stride(0),
            lora_b.stride(0),
            DTYPE=_DTYPES[dtype],
            FORMAT="nested" if w.nested else "flat",
            BLOCKSIZE=w.blocksize,
            PERMUTE=permute(w.quant_type, dtype),
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            BLOCK_R=tiles.block_r,
            BLOCK_S=min(64, config.next_power_of_two(k // w.blocksize)),
            **tiles.launch(),
        )
    return gain, length, absmax, folded_b
