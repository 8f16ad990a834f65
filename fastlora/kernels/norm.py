"""The sum of a residual and its root mean square norm, see fastlora/norm.py: a program has some rows."""

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl

from fastlora.kernels import config
from fastlora.kernels.launch import jit, on_device
from fastlora.kernels.tile import cast


@triton.jit
def start(row, inner, stride_outer, stride_inner):
    """Where a row of x begins."""
    # There are fewer than 2^31 rows, and a division of 64-bit integers is a hundred instructions.
    return (row // inner).to(tl.int64) * stride_outer + (row % inner).to(tl.int64) * stride_inner


@triton.jit
def weights(w_ptr, k, inside, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The weight for every row, read for each: one row of it would have a layout of its own, to which all others are
    moved by way of shared memory."""
    return tl.load(w_ptr + tl.broadcast_to(k, (ROWS, BLOCK)), mask=inside, other=0.0).to(tl.float32)


@jit(do_not_specialize=["M"])
def norm_kernel(
    x_ptr,  # (M, K): rows of K elements side by side, `inner` of them one stride apart, and these groups another
    residual_ptr,  # (M, K), contiguous, as all that follow, or None
    w_ptr,  # (K,)
    h_ptr,  # (M, K): out, residual + x; None without a residual
    y_ptr,  # (M, K): out, the norm of that
    rstd_ptr,  # (M,) float32: out
    eps,
    offset,
    M,
    K,
    inner,
    stride_outer,
    stride_inner,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, BLOCK)[None, :]
    inside = (row < M) & (k < K)
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + start(row, inner, stride_outer, stride_inner) + k, mask=inside, other=0.0).to(tl.float32)
    row = row.to(tl.int64)
    if residual_ptr is not None:
        # What is normalized is what the next layers add to.
        h = cast(x + tl.load(residual_ptr + row * K + k, mask=inside, other=0.0).to(tl.float32), dtype)
        tl.store(h_ptr + row * K + k, h, mask=inside)
        x = h.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1, keep_dims=True) / K + eps)
    w = weights(w_ptr, k, inside, ROWS, BLOCK) + offset
    tl.store(y_ptr + row * K + k, cast(x * rstd * w, dtype), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < M)


@jit(do_not_specialize=["M"])
def norm_backward_kernel(
    dy_ptr,  # (M, K), contiguous
    dh_ptr,  # (M, K), contiguous, or None
    h_ptr,  # (M, K), as x of the forward pass
    w_ptr,  # (K,)
    rstd_ptr,  # (M,)
    dx_ptr,  # (M, K), contiguous: out
    offset,
    M,
    K,
    inner,
    stride_outer,
    stride_inner,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    k = tl.arange(0, BLOCK)[None, :]
    inside = (row < M) & (k < K)
    h = tl.load(h_ptr + start(row, inner, stride_outer, stride_inner) + k, mask=inside, other=0.0).to(tl.float32)
    row = row.to(tl.int64)
    dy = tl.load(dy_ptr + row * K + k, mask=inside, other=0.0).to(tl.float32)
    w = weights(w_ptr, k, inside, ROWS, BLOCK) + offset
    rstd = tl.load(rstd_ptr + row, mask=row < M, other=0.0)
    normal, dn = h * rstd, dy * w
    dx = rstd * (dn - normal * (tl.sum(dn * normal, 1, keep_dims=True) / K))
    if dh_ptr is not None:
        dx += tl.load(dh_ptr + row * K + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * K + k, cast(dx, dx_ptr.dtype.element_ty), mask=inside)


def _places(x: torch.Tensor) -> tuple[int, int, int] | None:
    """Where the rows of x lie: how many are one stride apart, the stride between these groups, and that one; None where
    it takes more strides to say."""
    k = x.shape[-1]
    if x.is_contiguous():
        return 1, k, 0
    if x.stride(-1) != 1 or x.dim() < 2:
        return None
    outer = [(size, stride) for size, stride in zip(x.shape[:-2], x.stride(), strict=False) if size > 1]
    if any(stride != size * below for (_, stride), (size, below) in itertools.pairwise(outer)):
        return None
    return x.shape[-2], outer[-1][1] if outer else 0, x.stride(-2)


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h = residual + x, its norm, both of the residual's type, and the inverse deviations (M,).

    x and residual: (..., K); weight: (K,), contiguous. Without a residual h is x, or a contiguous copy of it.
    """
    places = _places(x)
    if places is None:
        x = x.contiguous()
        places = 1, x.shape[-1], 0
    k = x.shape[-1]
    m, tiles = x.numel() // k, config.norm(k)
    if residual is not None:
        residual = residual.contiguous()
    h = x if residual is None else torch.empty_like(residual)
    y, rstd = x.new_empty(x.shape, dtype=h.dtype), x.new_empty(m, dtype=torch.float32)
    with on_device(x):
        norm_kernel[(config.cdiv(m, tiles.block_m),)](
            x, residual, weight, None if residual is None else h, y, rstd, float(eps), float(offset), m, k, *places,
            ROWS=tiles.block_m, BLOCK=tiles.block_n, **tiles.launch(),
        )  # fmt: skip
    return h, y, rstd


def backward(
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    h: torch.Tensor,
    weight: torch.Tensor,
    rstd: torch.Tensor,
    offset: float,
) -> torch.Tensor:
    """The gradient of x and of the residual, of the shape of h, which `forward` gave, for those of its results, which
    are contiguous."""
    places = _places(h)
    assert places is not None
    k = h.shape[-1]
    m, tiles = h.numel() // k, config.norm(k)
    dx = h.new_empty(h.shape)
    with on_device(h):
        norm_backward_kernel[(config.cdiv(m, tiles.block_m),)](
            dy, dh, h, weight, rstd, dx, float(offset), m, k, *places,
            ROWS=tiles.block_m, BLOCK=tiles.block_n, **tiles.launch(),
        )  # fmt: skip
    return dx
