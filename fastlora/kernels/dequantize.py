"""W = dequantize(w_packed, absmax, code) in one launch, bit for bit as NF4Weight.dequantize."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels import config
from fastlora.kernels.decode import both_nibbles, check_dtype, statistic
from fastlora.kernels.launch import on_device
from fastlora.kernels.tile import cast
from fastlora.nf4 import NF4Weight


@triton.jit
def dequantize_kernel(
    w_ptr,  # (ceil(N K / 2),) bytes
    code_ptr,  # (16,)
    absmax_ptr,
    absmax_q_ptr,
    absmax_scale_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    out_ptr,  # (N, K), rows stride_on apart
    numel,
    K,
    stride_on,
    FORMAT: tl.constexpr,
    CONTIGUOUS: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS blocks of statistics a program."""
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
def dequantize_words_kernel(
    w_ptr,  # (N K / 8,) words of eight nibbles
    code_ptr,  # (16,)
    absmax_ptr,
    absmax_q_ptr,
    absmax_scale_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    out_ptr,  # (N, K), contiguous
    words,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """WORDS words a program. A thread decodes whole words, so that it stores 16 contiguous bytes or more at once."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * WORDS
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


_WORD = 4


def dequantize(w: NF4Weight, dtype: torch.dtype, out: torch.Tensor | None = None) -> torch.Tensor:
    """The dense matrix (N, K) in ``dtype``: float32, float16 or bfloat16.

    ``out``, where given, is written and returned: (N, K) of ``dtype``, whose rows are contiguous but may lie
    any distance apart. Raises TypeError for another type, ValueError for an ``out`` that does not fit.
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
    in_words = w.w_packed.numel() % _WORD == 0 and w.w_packed.data_ptr() % _WORD == 0 and w.numel() % (2 * _WORD) == 0
    if in_words and out.is_contiguous():
        tiles, words = config.dequantize_words(), w.w_packed.numel() // _WORD
        with on_device(out):
            dequantize_words_kernel[(triton.cdiv(words, tiles.block_n),)](
                w.w_packed.view(torch.int32),
                w.code,
                *statistics,
                out,
                words,
                FORMAT=format_,
                BLOCKSIZE=w.blocksize,
                WORDS=tiles.block_n,
                **tiles.launch(),
            )
        return out
    tiles = config.dequantize(w.blocksize)
    with on_device(out):
        dequantize_kernel[(triton.cdiv(w.blocks, tiles.block_n),)](
            w.w_packed,
            w.code,
            *statistics,
            out,
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
