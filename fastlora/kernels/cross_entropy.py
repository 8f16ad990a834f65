"""The cross-entropy of rows of logits, whose gradient takes the place of the logits.

    z      = logits, or cap * tanh(logits / cap)
    loss   = (1 - eps) * (lse(z) - z[label]) + eps * (lse(z) - mean(z))
    dz     = softmax(z) - (1 - eps) * onehot(label) - eps / V,        times dz / dlogits, times a scale on the device

Everything is computed in float32 and rounded once. The softmax is summed in one pass over a row, each lane with a
maximum of its own; the second pass finds the row in the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels import config
from fastlora.kernels.launch import jit, on_device
from fastlora.kernels.tile import cast

_LOWEST = tl.constexpr(-1e30)
"""Below every logit, but finite: a lane without logits adds nothing."""


@triton.jit
def capped(logits, cap, CAPPED: tl.constexpr):
    """z of float32 logits."""
    if CAPPED:
        return cap * (2.0 * tl.sigmoid(2.0 * (logits / cap)) - 1.0)
    else:
        return logits


@jit()
def cross_entropy_kernel(
    logits_ptr,  # (M, V), rows stride apart; with GRADIENT their gradient: out
    labels_ptr,  # (M,)
    loss_ptr,  # (M,) float32: out
    scale_ptr,  # one float32 that gradients are multiplied by
    V,
    stride,
    ignored,
    smoothing,
    cap,
    GRADIENT: tl.constexpr,
    SMOOTHED: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One row a program. A label that is ignored has no loss and no gradient, one outside of V a loss of NaN."""
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels_ptr + row)
    logits_ptr += row * stride
    lanes = tl.arange(0, BLOCK_V)
    if label == ignored:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            zeros = tl.zeros((BLOCK_V,), tl.float32)
            for first in range(0, V, BLOCK_V):
                v = first + lanes
                tl.store(logits_ptr + v, cast(zeros, dtype), mask=v < V)
    else:
        known = (label >= 0) & (label < V)
        mine = tl.load(logits_ptr + tl.where(known, label, 0)).to(tl.float32)
        most = tl.full((BLOCK_V,), _LOWEST, tl.float32)
        total = tl.zeros((BLOCK_V,), tl.float32)
        plain = tl.zeros((BLOCK_V,), tl.float32)
        for first in range(0, V, BLOCK_V):
            v = first + lanes
            z = capped(tl.load(logits_ptr + v, mask=v < V, other=float("-inf")).to(tl.float32), cap, CAPPED)
            if CAPPED:
                z = tl.where(v < V, z, float("-inf"))
            higher = tl.maximum(most, z)
            total = total * tl.exp(most - higher) + tl.exp(z - higher)
            most = higher
            if SMOOTHED:
                plain += tl.where(v < V, z, 0.0)
        highest = tl.max(most, 0)
        lse = highest + tl.log(tl.sum(total * tl.exp(most - highest), 0))
        loss = lse - capped(mine, cap, CAPPED)
        if SMOOTHED:
            loss = (1.0 - smoothing) * loss + smoothing * (lse - tl.sum(plain, 0) / V)
        tl.store(loss_ptr + row, tl.where(known, loss, float("nan")))
        if GRADIENT:
            tl.debug_barrier()  # no program's threads may write before all of them have read
            scale = tl.load(scale_ptr)
            for first in range(0, V, BLOCK_V):
                v = first + lanes
                z = capped(tl.load(logits_ptr + v, mask=v < V, other=0.0).to(tl.float32), cap, CAPPED)
                d = tl.exp(z - lse) - tl.where(v == label, 1.0 - smoothing, 0.0)
                if SMOOTHED:
                    d -= smoothing / V
                if CAPPED:
                    d *= 1.0 - (z / cap) * (z / cap)
                tl.store(logits_ptr + v, cast(d * scale, dtype), mask=v < V)


@jit()
def rescale_kernel(
    x_ptr,  # (SIZE,): in and out
    factor_ptr,  # one float32
    SIZE,
    BLOCK: tl.constexpr,
):
    """x times a factor on the device, in place; a factor of 1 moves nothing."""
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + i, mask=i < SIZE, other=0.0)
        tl.store(x_ptr + i, cast(x.to(tl.float32) * factor, x_ptr.dtype.element_ty), mask=i < SIZE)


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    loss: torch.Tensor,
    scale: torch.Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    softcap: float | None,
    gradient: bool,
) -> None:
    """The loss (M,) float32 of each row of logits (M, V); with ``gradient`` their gradient, times scale, over them."""
    m, v = logits.shape
    tiles = config.cross_entropy(v)
    with on_device(logits):
        cross_entropy_kernel[(m,)](
            logits,
            labels,
            loss,
            scale,
            v,
            logits.stride(0),
            ignore_index,
            float(label_smoothing),
            1.0 if softcap is None else float(softcap),
            GRADIENT=gradient,
            SMOOTHED=label_smoothing != 0,
            CAPPED=softcap is not None,
            BLOCK_V=tiles.block_n,
            **tiles.launch(),
        )


def rescale(x: torch.Tensor, factor: torch.Tensor) -> None:
    """x, contiguous, times one float32 on its device, in place."""
    tiles = config.rescale()
    with on_device(x):
        rescale_kernel[(config.cdiv(x.numel(), tiles.block_n),)](
            x, factor, x.numel(), BLOCK=tiles.block_n, **tiles.launch()
        )
