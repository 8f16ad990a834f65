"""W = dequantize(w_packed, absmax, code) in one launch, bit for bit as NF4Weight.dequantize."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from fastlora.int8 import Int8Matrix
from fastlora.kernels import config
from fastlora.kernels.decode import both_nibbles, check_dtype, statistic, weight_arguments, weight_tile
from fastlora.kernels.launch import jit, on_device, with_rows
from fastlora.kernels.tile import cast, dot
from fastlora.nf4 import NF4Weight


@jit()
def dequantize_kernel(
    w_ptr,  # (ceil(N K / 2),) bytes
    code_ptr,  # (16,)
    absmax_ptr,
    absmax_q_ptr,
    absmax_scale_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    out_ptr,  # (N, K), rows stride_on apart
    zero_ptr,  # one int32 that becomes zero, or None
    numel,
    K,
    stride_on,
    FORMAT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS blocks of statistics a program."""
    if zero_ptr is not None and tl.program_id(0) == 0:
        tl.store(zero_ptr, 0)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    first = block[:, None] * BLOCKSIZE
    element = first + 2 * tl.arange(0, BLOCKSIZE // 2)[None, :]
    packed = tl.load(w_ptr + element // 2, mask=element < numel, other=0)
    a = statistic(
        block, block * BLOCKSIZE < numel,
        absmax_ptr, absmax_q_ptr, absmax_scale_ptr, absmax_code_ptr, absmax_offset_ptr, FORMAT,
    )  # fmt: skip
    values = both_nibbles(packed, a[:, None], code_ptr, dtype)
    target = first + tl.arange(0, BLOCKSIZE)[None, :]
    inside = target < numel
    if not CONTIGUOUS:
        target = target // K * stride_on + target % K
    tl.store(out_ptr + target, values, mask=inside)


@triton.jit
def decode_words(
    w_ptr,  # (words,) of eight nibbles
    code_ptr,  # (16,)
    absmax_ptr,
    absmax_q_ptr,
    absmax_scale_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    out_ptr,  # (8 * words,)
    words,
    program,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """WORDS words. A thread decodes whole words, so that it stores 16 contiguous bytes or more at once."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    first = program.to(tl.int64) * WORDS
    left = tl.minimum(words - first, WORDS).to(tl.int32)
    i = tl.arange(0, WORDS)
    mask = i < left
    word = tl.load(w_ptr + first + i, mask=mask, other=0, eviction_policy="evict_first")
    block = first * 8 // BLOCKSIZE + (first * 8 % BLOCKSIZE + i * 8) // BLOCKSIZE
    a = statistic(block, mask, absmax_ptr, absmax_q_ptr, absmax_scale_ptr, absmax_code_ptr, absmax_offset_ptr, FORMAT)
    # Bytes in memory order, the high nibble first.
    v0 = cast(tl.load(code_ptr + ((word >> 4) & 15)) * a, dtype)
    v1 = cast(tl.load(code_ptr + (word & 15)) * a, dtype)
    v2 = cast(tl.load(code_ptr + ((word >> 12) & 15)) * a, dtype)
    v3 = cast(tl.load(code_ptr + ((word >> 8) & 15)) * a, dtype)
    v4 = cast(tl.load(code_ptr + ((word >> 20) & 15)) * a, dtype)
    v5 = cast(tl.load(code_ptr + ((word >> 16) & 15)) * a, dtype)
    v6 = cast(tl.load(code_ptr + ((word >> 28) & 15)) * a, dtype)
    v7 = cast(tl.load(code_ptr + ((word >> 24) & 15)) * a, dtype)
    # Each join adds the next lower bit of the index as the last dimension.
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    values = tl.join(even, odd).reshape(WORDS * 8)
    j = tl.arange(0, WORDS * 8)
    tl.store(out_ptr + first * 8 + j, values, mask=j < left * 8)


@jit()
def dequantize_words_kernel(
    w_ptr,  # (N K / 8,) words of eight nibbles
    code_ptr,  # (16,)
    absmax_ptr,
    absmax_q_ptr,
    absmax_scale_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    out_ptr,  # (N, K), contiguous
    zero_ptr,  # one int32 that becomes zero, or None
    words,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """WORDS words a program."""
    if zero_ptr is not None and tl.program_id(0) == 0:
        tl.store(zero_ptr, 0)
    decode_words(
        w_ptr, code_ptr, absmax_ptr, absmax_q_ptr, absmax_scale_ptr, absmax_code_ptr, absmax_offset_ptr,
        out_ptr, words, tl.program_id(0), FORMAT, BLOCKSIZE, WORDS,
    )  # fmt: skip


@jit()
def dequantize_stacked_kernel(
    w0_ptr, w1_ptr, w2_ptr, w3_ptr,
    absmax0_ptr, absmax1_ptr, absmax2_ptr, absmax3_ptr,
    absmax_q0_ptr, absmax_q1_ptr, absmax_q2_ptr, absmax_q3_ptr,
    absmax_scale0_ptr, absmax_scale1_ptr, absmax_scale2_ptr, absmax_scale3_ptr,
    absmax_code0_ptr, absmax_code1_ptr, absmax_code2_ptr, absmax_code3_ptr,
    absmax_offset0_ptr, absmax_offset1_ptr, absmax_offset2_ptr, absmax_offset3_ptr,
    code_ptr,
    out_ptr,  # (sum of N, K), contiguous
    words0, words1, words2, words3,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """`dequantize_words_kernel` of up to four weights, one below the other; an absent one has no words."""
    program = tl.program_id(0)
    first1 = tl.cdiv(words0, WORDS)
    first2 = first1 + tl.cdiv(words1, WORDS)
    first3 = first2 + tl.cdiv(words2, WORDS)
    if program < first1:
        decode_words(
            w0_ptr, code_ptr, absmax0_ptr, absmax_q0_ptr, absmax_scale0_ptr, absmax_code0_ptr, absmax_offset0_ptr,
            out_ptr, words0, program, FORMAT, BLOCKSIZE, WORDS,
        )  # fmt: skip
    elif program < first2:
        decode_words(
            w1_ptr, code_ptr, absmax1_ptr, absmax_q1_ptr, absmax_scale1_ptr, absmax_code1_ptr, absmax_offset1_ptr,
            out_ptr + tl.cast(words0, tl.int64) * 8, words1, program - first1, FORMAT, BLOCKSIZE, WORDS,
        )  # fmt: skip
    elif program < first3:
        decode_words(
            w2_ptr, code_ptr, absmax2_ptr, absmax_q2_ptr, absmax_scale2_ptr, absmax_code2_ptr, absmax_offset2_ptr,
            out_ptr + (tl.cast(words0, tl.int64) + words1) * 8, words2, program - first2, FORMAT, BLOCKSIZE, WORDS,
        )  # fmt: skip
    else:
        decode_words(
            w3_ptr, code_ptr, absmax3_ptr, absmax_q3_ptr, absmax_scale3_ptr, absmax_code3_ptr, absmax_offset3_ptr,
            out_ptr + (tl.cast(words0, tl.int64) + words1 + words2) * 8, words3, program - first3,
            FORMAT, BLOCKSIZE, WORDS,
        )  # fmt: skip


@triton.jit
def decode_factor(
    factor_ptr,  # (rows, columns): bytes in 8 bits, or words of eight nibbles
    scales_ptr,  # float32: one a row, or flat statistics
    code_ptr,  # of nibbles, or None
    out_ptr,  # (rows, columns), contiguous
    numel,
    columns,
    program,
    BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """8 * WORDS elements of a packed adapter."""
    if code_ptr is not None:
        decode_words(
            factor_ptr, code_ptr, scales_ptr, None, None, None, None, out_ptr, numel // 8, program,
            "flat", BLOCKSIZE, WORDS,
        )  # fmt: skip
    else:
        first = program.to(tl.int64) * (8 * WORDS)
        i = tl.arange(0, 8 * WORDS)
        mask = i < tl.minimum(numel - first, 8 * WORDS).to(tl.int32)
        row = first // columns + ((first % columns).to(tl.int32) + i) // columns
        values = tl.load(factor_ptr + first + i, mask=mask, other=0).to(tl.float32)
        scales = tl.load(scales_ptr + row, mask=mask, other=0.0)
        tl.store(out_ptr + first + i, cast(values * scales, out_ptr.dtype.element_ty), mask=mask)


@jit()
def dequantize_pair_kernel(
    a_ptr,  # as for decode_factor
    a_scales_ptr,
    a_code_ptr,
    a_out_ptr,
    a_numel,
    a_columns,
    b_ptr,
    b_scales_ptr,
    b_code_ptr,
    b_out_ptr,
    b_numel,
    b_columns,
    A_BLOCKSIZE: tl.constexpr,
    B_BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Two packed adapters: the first programs have the first."""
    program = tl.program_id(0)
    of_a = tl.cdiv(a_numel, 8 * WORDS)
    if program < of_a:
        decode_factor(
            a_ptr, a_scales_ptr, a_code_ptr, a_out_ptr, a_numel, a_columns, program, A_BLOCKSIZE, WORDS
        )  # fmt: skip
    else:
        decode_factor(
            b_ptr, b_scales_ptr, b_code_ptr, b_out_ptr, b_numel, b_columns, program - of_a, B_BLOCKSIZE, WORDS
        )  # fmt: skip


@jit()
def merged_kernel(
    w_ptr,  # (ceil(N K / 2),) bytes
    code_ptr,
    absmax_ptr,
    absmax_q_ptr,
    absmax_scale_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    a_ptr,  # (R, K), rows stride_ar apart
    b_ptr,  # (N, R), rows stride_bn apart
    out_ptr,  # (N, K), contiguous
    scale,
    N,
    K,
    R,
    stride_wn,
    stride_ar,
    stride_bn,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    ROW_STATISTICS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One (BLOCK_N, BLOCK_K) tile of W + scale * (B A) a program, rounded once."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k0 = tl.program_id(0) * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    w = weight_tile(
        w_ptr, code_ptr, absmax_ptr, absmax_q_ptr, absmax_scale_ptr, absmax_code_ptr, absmax_offset_ptr,
        n, k0, N, K, stride_wn, tl.float32, FORMAT, BLOCKSIZE, K_IS_EVEN, ROW_STATISTICS, BLOCK_K,
    )  # fmt: skip
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        b = tl.load(
            b_ptr + n[:, None].to(tl.int64) * stride_bn + r[None, :],
            mask=(n[:, None] < N) & (r[None, :] < R),
            other=0.0,
        )
        a = tl.load(
            a_ptr + r[:, None].to(tl.int64) * stride_ar + k[None, :],
            mask=(r[:, None] < R) & (k[None, :] < K),
            other=0.0,
        )
        acc = dot(b, a, acc)
    tl.store(
        out_ptr + n[:, None].to(tl.int64) * K + k[None, :],
        cast(w + scale * acc, out_ptr.dtype.element_ty),
        mask=(n[:, None] < N) & (k[None, :] < K),
    )


_WORD = 4


def _in_words(w: NF4Weight) -> bool:
    """Whether ``w`` can be read in 32-bit words, none of them in part."""
    return w.w_packed.numel() % _WORD == 0 and w.w_packed.data_ptr() % _WORD == 0 and w.numel() % (2 * _WORD) == 0


def dequantize(
    w: NF4Weight,
    dtype: torch.dtype,
    out: torch.Tensor | None = None,
    *,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """The dense matrix (N, K) in ``dtype``: float32, float16 or bfloat16.

    ``out``, where given, is written and returned: (N, K) of ``dtype``, whose rows are contiguous but may lie
    any distance apart. ``zero``, one int32, is set to zero on the way.
    Raises TypeError for another type, ValueError for an ``out`` that does not fit.
    """
    check_dtype(dtype)
    if out is None:
        out = torch.empty(w.shape, dtype=dtype, device=w.device)
    elif (out.shape, out.dtype, out.device) != (w.shape, dtype, w.device) or (w.shape[1] > 1 and out.stride(1) != 1):
        raise ValueError(
            f"out must be {tuple(w.shape)} of {dtype} on {w.device} with contiguous rows; "
            f"got {tuple(out.shape)}, strides {out.stride()}, {out.dtype}, {out.device}"
        )
    statistics = (w.absmax, w.absmax_q, w.absmax_scale, w.absmax_code, w.absmax_offset)
    format_ = "nested" if w.nested else "flat"
    if _in_words(w) and out.is_contiguous():
        tiles, words = config.dequantize_words(), w.w_packed.numel() // _WORD
        with on_device(out):
            dequantize_words_kernel[(config.cdiv(words, tiles.block_n),)](
                w.w_packed.view(torch.int32),
                w.code,
                *statistics,
                out,
                zero,
                words,
                FORMAT=format_,
                BLOCKSIZE=w.blocksize,
                WORDS=tiles.block_n,
                **tiles.launch(),
            )
        return out
    tiles = config.dequantize(w.blocksize)
    with on_device(out):
        dequantize_kernel[(config.cdiv(w.blocks, tiles.block_n),)](
            w.w_packed,
            w.code,
            *statistics,
            out,
            zero,
            w.numel(),
            w.shape[1],
            out.stride(0),
            FORMAT=format_,
            CONTIGUOUS=out.is_contiguous(),
            BLOCKSIZE=w.blocksize,
            BLOCKS=tiles.block_n,
            **tiles.launch(),
        )
    return out


def _one_launch(factor: Int8Matrix | NF4Weight) -> bool:
    return isinstance(factor, Int8Matrix) or (_in_words(factor) and not factor.nested)


def dequantize_pair(
    lora_a: Int8Matrix | NF4Weight, lora_b: Int8Matrix | NF4Weight, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The dense matrices of two adapters in ``dtype``, from one launch. None where one is in 4 bits with nested
    statistics or elements that are no multiple of eight: that is for `dequantize`."""
    check_dtype(dtype)
    if not (_one_launch(lora_a) and _one_launch(lora_b)):
        return None
    tiles = config.dequantize_words()
    made = [torch.empty(factor.shape, dtype=dtype, device=factor.device) for factor in (lora_a, lora_b)]
    arguments: list[Any] = []
    blocksizes, programs = [], 0
    for factor, out in zip((lora_a, lora_b), made, strict=True):
        if isinstance(factor, Int8Matrix):
            arguments += [factor.values, factor.scales, None]
        else:
            arguments += [factor.w_packed.view(torch.int32), factor.absmax, factor.code]
        arguments += [out, factor.numel(), factor.shape[1]]
        blocksizes.append(0 if isinstance(factor, Int8Matrix) else factor.blocksize)
        programs += config.cdiv(factor.numel(), 8 * tiles.block_n)
    with on_device(made[0]):
        dequantize_pair_kernel[(programs,)](
            *arguments,
            A_BLOCKSIZE=blocksizes[0],
            B_BLOCKSIZE=blocksizes[1],
            WORDS=tiles.block_n,
            **tiles.launch(),
        )
    return made[0], made[1]


_STACKED = 4


class _Part(NamedTuple):
    """Some of stacked weights: those that one launch decodes, or more than one where there are no arguments for it."""

    weights: slice
    rows: int
    words: tuple[int, ...]
    arguments: tuple[torch.Tensor | None, ...] | None
    """The operands of the launch, which are the same in every call."""


class _Stack(NamedTuple):
    """What is to be known of stacked weights, kept with the first of them for the next call."""

    others: tuple[NF4Weight, ...]
    """All but the first, which would otherwise keep itself alive."""
    rows: int
    parts: tuple[_Part, ...]


def _stack_of(weights: Sequence[NF4Weight]) -> _Stack:
    """Raises ValueError for no weights, or weights of different K or devices."""
    if weights:
        known: _Stack | None = weights[0].__dict__.get("_stack")
        if known is not None and known.others == tuple(weights[1:]):
            return known
    if len({(w.shape[1], w.device) for w in weights}) != 1:
        raise ValueError(
            f"stacked weights must have one K and one device, got {[(w.shape, str(w.device)) for w in weights]}"
        )
    alike = len({(w.blocksize, w.quant_type, w.nested) for w in weights}) == 1
    parts = []
    for i in range(0, len(weights), _STACKED):
        group = weights[i : i + _STACKED]
        launch = len(group) > 1 and alike and all(map(_in_words, group))
        words = [w.w_packed.numel() // _WORD for w in group] + [0] * (_STACKED - len(group))
        arguments = _stack_arguments(group) if launch else None
        parts.append(_Part(slice(i, i + len(group)), sum(w.shape[0] for w in group), tuple(words), arguments))
    made = _Stack(tuple(weights[1:]), sum(part.rows for part in parts), tuple(parts))
    weights[0].__dict__["_stack"] = made  # as the node of `fastlora.node`: no part of the weight's value
    return made


def _stack_arguments(weights: Sequence[NF4Weight]) -> tuple[torch.Tensor | None, ...]:
    # An absent weight has no programs: any pointer of the right type will do.
    padded = [*weights, *[weights[0]] * (_STACKED - len(weights))]
    statistics = ("absmax", "absmax_q", "absmax_scale", "absmax_code", "absmax_offset")
    return (
        *(w.w_packed.view(torch.int32) for w in padded),
        *(getattr(w, name) for name in statistics for w in padded),
        weights[0].code,
    )


def dequantize_stacked(
    weights: Sequence[NF4Weight], dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The dense matrices of ``weights``, (N_i, K) each, one below the other: (sum of N_i, K) of ``dtype``.

    One launch for up to four weights of one blocksize and kind. ``out`` as for `dequantize`. Raises ValueError for no
    weights, or weights of different K or devices.
    """
    check_dtype(dtype)
    stack = _stack_of(weights)
    n, k, first = stack.rows, weights[0].shape[1], weights[0]
    if out is None:
        out = torch.empty(n, k, dtype=dtype, device=first.device)
    elif (out.shape, out.dtype, out.device) != ((n, k), dtype, first.device) or (k > 1 and out.stride(1) != 1):
        raise ValueError(
            f"out must be {(n, k)} of {dtype} on {first.device} with contiguous rows; "
            f"got {tuple(out.shape)}, strides {out.stride()}, {out.dtype}, {out.device}"
        )
    row, tiles = 0, config.dequantize_words()
    for part in stack.parts:
        rows = out if part.rows == n else out[row : row + part.rows]
        row += part.rows
        if part.arguments is None or not rows.is_contiguous():
            for w in weights[part.weights]:
                dequantize(w, dtype, rows[: w.shape[0]])
                rows = rows[w.shape[0] :]
            continue
        with on_device(out):
            dequantize_stacked_kernel[(sum(config.cdiv(count, tiles.block_n) for count in part.words),)](
                *part.arguments,
                rows,
                *part.words,
                FORMAT="nested" if first.nested else "flat",
                BLOCKSIZE=first.blocksize,
                WORDS=tiles.block_n,
                **tiles.launch(),
            )
    return out


def dequantize_merged(
    w: NF4Weight, lora_a: torch.Tensor, lora_b: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """W + scale * (B A), (N, K) of ``dtype``, for lora_a (R, K) and lora_b (N, R) of one floating type.

    The sum is rounded once. Small updates are lost in that rounding: half a unit in the last place of a weight is
    more than the whole update of a young adapter.
    """
    check_dtype(dtype)
    if lora_a.dtype != lora_b.dtype:
        raise TypeError(f"the adapters must have one type, got {lora_a.dtype} and {lora_b.dtype}")
    (n, k), r = w.shape, lora_a.shape[0]
    lora_a, lora_b = with_rows(lora_a), with_rows(lora_b)
    out = torch.empty(n, k, dtype=dtype, device=w.device)
    tiles = config.merged(r, w.blocksize)
    with on_device(out):
        merged_kernel[(config.cdiv(k, tiles.block_k), config.cdiv(n, tiles.block_n))](
            a_ptr=lora_a,
            b_ptr=lora_b,
            out_ptr=out,
            scale=float(scale),
            R=r,
            stride_ar=lora_a.stride(0),
            stride_bn=lora_b.stride(0),
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            BLOCK_R=tiles.block_r,
            **weight_arguments(w, tiles.block_k),
            **tiles.launch(),
        )
    return out
