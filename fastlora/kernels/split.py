"""Products of few rows with a packed weight: the bytes of W are read once, and its tiles never leave the chip.

A product of few rows has few tiles, so the reduced side is split among programs as well. Two launches make y or dx:

    partial_kernel   tiles of x W^T (or dy W) over one part of the reduced side, W decoded in registers, and tiles of
                     the narrow product x A^T (or dy B), all as float32 partials
    finish_kernel    the partials added in a fixed order, the narrow product rounded, the LoRA term, the bias, one rounding

Two runs give the same bits. Every call has its own workspace, so streams and captured graphs do not meet in it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.dropout import Dropout
from fastlora.kernels import config
from fastlora.kernels.launch import on_device, with_rows
from fastlora.kernels.tile import cast, dot, drop, dropout_arguments, keep
from fastlora.nf4 import NESTED_BLOCKSIZE, NF4Weight

_NESTED_BLOCKSIZE = tl.constexpr(NESTED_BLOCKSIZE)
_WORD = 8
"""Nibbles of a 32-bit word."""


@triton.jit
def load_words(
    w_ptr,  # (N, words) 32-bit words of eight nibbles
    absmax_ptr,
    absmax_q_ptr,
    absmax_scale_ptr,
    n,  # (BLOCK_N,) rows
    word0,  # first column
    last,  # columns from here on are not read
    N,
    words,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
    STATISTICS: tl.constexpr,
):
    """(BLOCK_N, WORDS) words and their statistics, (BLOCK_N, STATISTICS), as stored: nothing waits for the loads."""
    row = n[:, None].to(tl.int64) * words
    in_n = n[:, None] < N
    column = word0 + tl.arange(0, WORDS)[None, :]
    word = tl.load(w_ptr + row + column, mask=in_n & (column < last), other=0)
    first = word0 + tl.arange(0, STATISTICS)[None, :] * (WORDS // STATISTICS)
    block = (row + first) * 8 // BLOCKSIZE
    inside = in_n & (first < last)
    if FORMAT == "nested":
        q = tl.load(absmax_q_ptr + block, mask=inside, other=0)
        group = tl.load(absmax_scale_ptr + block // _NESTED_BLOCKSIZE, mask=inside, other=0.0)
    else:
        q = tl.load(absmax_ptr + block, mask=inside, other=0.0)
        group = q
    return word, q, group


@triton.jit
def decode_words(
    word,  # (BLOCK_N, WORDS)
    q,  # (BLOCK_N, STATISTICS)
    group,
    code_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
):
    """The matrix (BLOCK_N, 8 * WORDS) of ``dtype``, bit for bit as NF4Weight.dequantize."""
    ROWS: tl.constexpr = word.shape[0]
    WORDS: tl.constexpr = word.shape[1]
    STATISTICS: tl.constexpr = q.shape[1]
    a = q
    if FORMAT == "nested":
        a = tl.load(absmax_code_ptr + q.to(tl.int32)) * group + tl.load(absmax_offset_ptr)
    a = tl.broadcast_to(a[:, :, None], (ROWS, STATISTICS, WORDS // STATISTICS)).reshape(ROWS, WORDS)
    # Bytes in memory order, the high nibble first.
    v0 = tl.load(code_ptr + ((word >> 4) & 15)) * a
    v1 = tl.load(code_ptr + (word & 15)) * a
    v2 = tl.load(code_ptr + ((word >> 12) & 15)) * a
    v3 = tl.load(code_ptr + ((word >> 8) & 15)) * a
    v4 = tl.load(code_ptr + ((word >> 20) & 15)) * a
    v5 = tl.load(code_ptr + ((word >> 16) & 15)) * a
    v6 = tl.load(code_ptr + ((word >> 28) & 15)) * a
    v7 = tl.load(code_ptr + ((word >> 24) & 15)) * a
    # Each join adds the next lower bit of the index as the last dimension.
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    # Rounding comes last: Triton 3.6 cannot place a tile in shared memory for a dot straight after a reshape.
    return cast(tl.join(even, odd).reshape(ROWS, WORDS * 8), dtype)


@triton.jit
def load_rows(x_ptr, m, column, last, M, stride_xm):
    """x[m, column], zero from column ``last`` on."""
    mask = (m[:, None] < M) & (column[None, :] < last)
    return tl.load(x_ptr + m[:, None].to(tl.int64) * stride_xm + column[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["M", "narrow_programs", "threshold"])
def partial_kernel(
    x_ptr,  # (M, K), or (M, N) where it is dy; rows stride_xm apart
    w_ptr,  # (N, words) 32-bit words of eight nibbles
    code_ptr,
    absmax_ptr,
    absmax_q_ptr,
    absmax_scale_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    adapter_ptr,  # A (R, K) or B^T (R, N): element (r, i) at r * stride_r + i * stride_i; None without adapters
    sums_ptr,  # (parts, M, N or K) float32
    narrow_ptr,  # (narrow parts, M, R) float32
    seed_ptr,
    threshold,
    gain,
    M,
    N,
    words,
    R,
    steps,  # of a part
    narrow_steps,
    narrow_programs,
    stride_xm,
    stride_r,
    stride_i,
    TRANSPOSED: tl.constexpr,
    DROPOUT: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    STATISTICS: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One part of a tile of the narrow product, in the first programs, or of x W^T (TRANSPOSED) or dy W."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    WORDS: tl.constexpr = BLOCK_K // 8
    BLOCK: tl.constexpr = BLOCK_K if TRANSPOSED else BLOCK_N
    TILE: tl.constexpr = BLOCK_N if TRANSPOSED else BLOCK_K
    K = words * 8
    reduced = K if TRANSPOSED else N
    side = N if TRANSPOSED else K
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = (pid - (0 if pid < narrow_programs else narrow_programs)) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if pid < narrow_programs:
        if adapter_ptr is not None:
            tiles_r = tl.cdiv(R, BLOCK_R)
            r = pid // tiles_m % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
            p = pid // tiles_m // tiles_r
            adapter_row = adapter_ptr + r[:, None].to(tl.int64) * stride_r
            acc = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
            for step in range(p * narrow_steps, (p + 1) * narrow_steps):
                i = step * BLOCK + tl.arange(0, BLOCK)
                x = load_rows(x_ptr, m, i, reduced, M, stride_xm)
                inside = (r[:, None] < R) & (i[None, :] < reduced)
                adapter = tl.load(adapter_row + i[None, :].to(tl.int64) * stride_i, mask=inside, other=0.0)
                if DROPOUT:
                    x = drop(x, seed_ptr, threshold, gain, m, step * BLOCK, BLOCK)
                acc = dot(cast(adapter, dtype), tl.trans(x), acc)
            target = (p.to(tl.int64) * M + m[None, :]) * R + r[:, None]
            tl.store(narrow_ptr + target, acc, mask=(r[:, None] < R) & (m[None, :] < M))
    else:
        tile = (pid - narrow_programs) // tiles_m
        tiles = tl.cdiv(side, TILE)
        o0 = tile % tiles
        p = tile // tiles
        o = o0 * TILE + tl.arange(0, TILE)
        first, end = p * steps, (p + 1) * steps
        limit = tl.minimum(end * BLOCK, reduced)
        last = limit // 8 if TRANSPOSED else words
        n = o if TRANSPOSED else first * BLOCK + tl.arange(0, BLOCK)
        n_end = N if TRANSPOSED else limit
        word0 = first * WORDS if TRANSPOSED else o0 * WORDS
        x = load_rows(x_ptr, m, first * BLOCK + tl.arange(0, BLOCK), limit, M, stride_xm)
        word, q, group = load_words(
            w_ptr, absmax_ptr, absmax_q_ptr, absmax_scale_ptr, n, word0, last, n_end, words,
            FORMAT, BLOCKSIZE, WORDS, STATISTICS,
        )  # fmt: skip
        acc = tl.zeros((TILE, BLOCK_M) if WEIGHT_FIRST else (BLOCK_M, TILE), tl.float32)
        for step in range(first, end):
            # The next step's loads are under way while this one decodes and multiplies.
            after = step + 1
            if TRANSPOSED:
                next_n, next_word = n, after * WORDS
            else:
                next_n, next_word = after * BLOCK + tl.arange(0, BLOCK), word0
            next_x = load_rows(x_ptr, m, after * BLOCK + tl.arange(0, BLOCK), limit, M, stride_xm)
            next_words, next_q, next_group = load_words(
                w_ptr, absmax_ptr, absmax_q_ptr, absmax_scale_ptr, next_n, next_word, last, n_end, words,
                FORMAT, BLOCKSIZE, WORDS, STATISTICS,
            )  # fmt: skip
            w = decode_words(word, q, group, code_ptr, absmax_code_ptr, absmax_offset_ptr, dtype, FORMAT)
            if WEIGHT_FIRST:
                acc = dot(w if TRANSPOSED else tl.trans(w), tl.trans(x), acc)
            else:
                acc = dot(x, tl.trans(w) if TRANSPOSED else w, acc)
            x, word, q, group = next_x, next_words, next_q, next_group
        if WEIGHT_FIRST:
            target = (p.to(tl.int64) * M + m[None, :]) * side + o[:, None]
            tl.store(sums_ptr + target, acc, mask=(o[:, None] < side) & (m[None, :] < M))
        else:
            target = (p.to(tl.int64) * M + m[:, None]) * side + o[None, :]
            tl.store(sums_ptr + target, acc, mask=(m[:, None] < M) & (o[None, :] < side))


@triton.jit(do_not_specialize=["M", "threshold"])
def finish_kernel(
    sums_ptr,  # (parts, M, COLUMNS) float32
    narrow_ptr,  # (narrow parts, M, R) float32; None without adapters
    u_ptr,  # (M, R)
    adapter_ptr,  # B^T (R, N) or A (R, K): element (r, i) at r * stride_r + i * stride_i
    bias_ptr,  # (COLUMNS,), or None
    y_ptr,  # (M, COLUMNS)
    seed_ptr,
    threshold,
    gain,
    narrow_scale,
    scale,
    M,
    COLUMNS,
    R,
    parts,
    narrow_parts,
    stride_r,
    stride_i,
    DROPOUT: tl.constexpr,
    PARTS: tl.constexpr,
    NARROW_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One (BLOCK_M, BLOCK_N) tile a program of y = sums + scale * dropout(u adapter) + bias, u = narrow_scale * narrow.

    Both are rounded once; the programs of the first columns store u.
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    i0 = tl.program_id(0) * BLOCK_N
    i = i0 + tl.arange(0, BLOCK_N)
    in_m, in_i = m[:, None] < M, i[None, :] < COLUMNS
    target = m[:, None].to(tl.int64) * COLUMNS + i[None, :]
    part = tl.arange(0, PARTS)[:, None, None]
    # All parts at once: their loads do not wait for each other, as those of a loop would.
    sums = tl.load(
        sums_ptr + part.to(tl.int64) * M * COLUMNS + target[None, :, :],
        mask=(part < parts) & (in_m & in_i)[None, :, :], other=0.0,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if narrow_ptr is not None:
        dtype: tl.constexpr = u_ptr.dtype.element_ty
        narrow_part = tl.arange(0, NARROW_PARTS)[:, None, None]
        for r0 in range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            in_r = in_m & (r[None, :] < R)
            row = m[:, None].to(tl.int64) * R + r[None, :]
            narrow = tl.load(
                narrow_ptr + narrow_part.to(tl.int64) * M * R + row[None, :, :],
                mask=(narrow_part < narrow_parts) & in_r[None, :, :], other=0.0,
            )  # fmt: skip
            adapter = tl.load(
                adapter_ptr + r[:, None].to(tl.int64) * stride_r + i[None, :].to(tl.int64) * stride_i,
                mask=(r[:, None] < R) & in_i, other=0.0,
            )  # fmt: skip
            u = cast(tl.sum(narrow, axis=0) * narrow_scale, dtype)
            if i0 == 0:
                tl.store(u_ptr + row, u, mask=in_r)
            acc = dot(u, cast(adapter, dtype), acc)
        if DROPOUT:
            acc = tl.where(keep(seed_ptr, threshold, gain, m, i0, BLOCK_N), acc * gain, 0.0)
        acc *= scale
    acc += tl.sum(sums, axis=0)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + i, mask=i < COLUMNS, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + target, cast(acc, y_ptr.dtype.element_ty), mask=in_m & in_i)


def reads(w: NF4Weight) -> bool:
    """Whether these kernels can read ``w``: whole, aligned words in every row."""
    return w.shape[1] % _WORD == 0 and w.w_packed.data_ptr() % 4 == 0


def _product(
    x: torch.Tensor,
    w: NF4Weight,
    adapters: tuple[torch.Tensor, torch.Tensor] | None,
    bias: torch.Tensor | None,
    scales: tuple[float, float],
    dropouts: tuple[Dropout | None, Dropout | None],
    out_dtype: torch.dtype | None,
    *,
    transposed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T or x W, with the LoRA term, and the narrow product; ``adapters`` are (R, reduced side) and (R, side)."""
    x, (n, k), m = with_rows(x), w.shape, x.shape[0]
    side, reduced = (n, k) if transposed else (k, n)
    r = 0 if adapters is None else adapters[0].shape[0]
    device = config.Device.of(x.device)
    split = config.split_product(m, n, k, r, w.blocksize, device, transposed=transposed)
    tiles, ends = split.tiles, split.finish
    y = x.new_empty(m, side, dtype=out_dtype)
    u = x.new_empty(m, r)
    sums = torch.empty(split.parts * m * side + split.narrow_parts * m * r, dtype=torch.float32, device=x.device)
    narrow = sums[split.parts * m * side :] if r else None
    first, second = adapters or (None, None)
    tiles_m = triton.cdiv(m, tiles.block_m)
    tile = tiles.block_n if transposed else tiles.block_k
    narrow_programs = tiles_m * triton.cdiv(r, tiles.block_r) * split.narrow_parts if r else 0
    with on_device(x):
        partial_kernel[(narrow_programs + tiles_m * triton.cdiv(side, tile) * split.parts,)](
            x_ptr=x,
            w_ptr=w.w_packed.view(torch.int32),
            code_ptr=w.code,
            absmax_ptr=w.absmax,
            absmax_q_ptr=w.absmax_q,
            absmax_scale_ptr=w.absmax_scale,
            absmax_code_ptr=w.absmax_code,
            absmax_offset_ptr=w.absmax_offset,
            adapter_ptr=first,
            sums_ptr=sums,
            narrow_ptr=narrow,
            M=m,
            N=n,
            words=k // _WORD,
            R=r,
            steps=split.steps,
            narrow_steps=split.narrow_steps,
            narrow_programs=narrow_programs,
            stride_xm=x.stride(0),
            stride_r=0 if first is None else first.stride(0),
            stride_i=0 if first is None else first.stride(1),
            TRANSPOSED=transposed,
            FORMAT="nested" if w.nested else "flat",
            BLOCKSIZE=w.blocksize,
            STATISTICS=split.statistics,
            WEIGHT_FIRST=split.weight_first,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            BLOCK_R=tiles.block_r,
            **dropout_arguments(dropouts[0] if r else None),
            **tiles.launch(),
        )
        finish_kernel[(triton.cdiv(side, ends.block_n), triton.cdiv(m, ends.block_m))](
            sums_ptr=sums,
            narrow_ptr=narrow,
            u_ptr=u if r else None,
            adapter_ptr=second,
            bias_ptr=None if bias is None else bias.contiguous(),
            y_ptr=y,
            narrow_scale=float(scales[0]),
            scale=float(scales[1]),
            M=m,
            COLUMNS=side,
            R=r,
            parts=split.parts,
            narrow_parts=split.narrow_parts,
            stride_r=0 if second is None else second.stride(0),
            stride_i=0 if second is None else second.stride(1),
            PARTS=triton.next_power_of_2(split.parts),
            NARROW_PARTS=triton.next_power_of_2(split.narrow_parts),
            BLOCK_M=ends.block_m,
            BLOCK_N=ends.block_n,
            BLOCK_R=ends.block_r,
            **dropout_arguments(dropouts[1] if r else None),
            **ends.launch(),
        )
    return y, u


def linear(
    x: torch.Tensor,
    w: NF4Weight,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    dropout: Dropout | None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (M, N), of ``out_dtype`` or x's type, and u (M, R) for x (M, K) of a 16-bit type and a w that `reads` accepts."""
    adapters = None if lora_a is None or lora_b is None else (lora_a, lora_b.T)
    return _product(x, w, adapters, bias, (1.0, scale), (dropout, None), out_dtype, transposed=True)


def input_gradient(
    dy: torch.Tensor,
    w: NF4Weight,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scale: float,
    dropout: Dropout | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx (M, K) and du (M, R) for dy (M, N) of a 16-bit type and a w that `reads` accepts."""
    adapters = None if lora_a is None or lora_b is None else (lora_b.T, lora_a)
    return _product(dy, w, adapters, None, (scale, 1.0), (None, dropout), None, transposed=False)
