"""The rotary embedding of q and k from wherever they lie, see fastlora/rotary.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels import config
from fastlora.kernels.launch import jit, on_device
from fastlora.kernels.tile import cast


@triton.jit
def rotate_heads(
    source_ptr, target_ptr, low_cos, high_cos, low_sin, high_sin, stride_h,
    H: tl.constexpr, D: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, INVERSE: tl.constexpr,
):  # fmt: skip
    """All heads of one token, those of the source ``stride_h`` apart."""
    h, d = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside = (h < H) & (d < D // 2)
    place = source_ptr + h * stride_h + d
    low = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(place + D // 2, mask=inside, other=0.0).to(tl.float32)
    if INVERSE:
        new_low = low * low_cos + high * high_sin
        new_high = high * high_cos - low * low_sin
    else:
        new_low = low * low_cos - high * low_sin
        new_high = high * high_cos + low * high_sin
    target = target_ptr + h * D + d
    dtype: tl.constexpr = target_ptr.dtype.element_ty
    tl.store(target, cast(new_low, dtype), mask=inside)
    tl.store(target + D // 2, cast(new_high, dtype), mask=inside)


@jit(do_not_specialize=["S"])
def rotary_kernel(
    q_ptr,  # (B, HQ, S, D), strides below, the last one 1
    k_ptr,  # (B, HK, S, D), likewise
    q_out_ptr,  # (B, S, HQ, D), contiguous
    k_out_ptr,  # (B, S, HK, D), contiguous
    cos_ptr,  # (B or 1, S, D), strides below, the last one 1
    sin_ptr,  # likewise
    S,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_cb,  # 0 where all of the batch share them
    stride_cs,
    stride_sb,
    stride_ss,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """One token a program."""
    token = tl.program_id(0).to(tl.int64)
    b, s = token // S, token % S
    d = tl.arange(0, BLOCK_D)[None, :]
    inside = d < D // 2
    cos_row, sin_row = cos_ptr + b * stride_cb + s * stride_cs + d, sin_ptr + b * stride_sb + s * stride_ss + d
    low_cos = tl.load(cos_row, mask=inside, other=0.0).to(tl.float32)
    high_cos = tl.load(cos_row + D // 2, mask=inside, other=0.0).to(tl.float32)
    low_sin = tl.load(sin_row, mask=inside, other=0.0).to(tl.float32)
    high_sin = tl.load(sin_row + D // 2, mask=inside, other=0.0).to(tl.float32)
    rotate_heads(
        q_ptr + b * stride_qb + s * stride_qs, q_out_ptr + token * (HQ * D), low_cos, high_cos, low_sin, high_sin,
        stride_qh, HQ, D, BLOCK_Q, BLOCK_D, INVERSE,
    )  # fmt: skip
    rotate_heads(
        k_ptr + b * stride_kb + s * stride_ks, k_out_ptr + token * (HK * D), low_cos, high_cos, low_sin, high_sin,
        stride_kh, HK, D, BLOCK_K, BLOCK_D, INVERSE,
    )  # fmt: skip


def rotate(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, inverse: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, HQ, S, D) and k (B, HK, S, D) rotated, as views of contiguous (B, S, H, D).

    cos and sin: (B or 1, S, D). ``inverse``: the gradients of q and k for those of what `rotate` returns.
    """
    (batch, heads, length, width), key_heads = q.shape, k.shape[1]
    outs = [q.new_empty(batch, length, h, width) for h in (heads, key_heads)]
    strides = [0 if t.shape[0] == 1 else t.stride(0) for t in (cos, sin)]
    with on_device(q):
        rotary_kernel[(batch * length,)](
            q, k, *outs, cos, sin, length, *q.stride()[:3], *k.stride()[:3],
            strides[0], cos.stride(1), strides[1], sin.stride(1),
            HQ=heads, HK=key_heads, D=width,
            BLOCK_Q=config.next_power_of_two(heads), BLOCK_K=config.next_power_of_two(key_heads),
            BLOCK_D=config.next_power_of_two(width // 2), INVERSE=inverse, **config.rotary(heads * width).launch(),
        )  # fmt: skip
    return outs[0].transpose(1, 2), outs[1].transpose(1, 2)
