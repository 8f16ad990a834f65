"""The sum of a residual and its root mean square norm, see fastlora/norm.py: a program has a row."""

from __future__ import annotations

import torch
import triton.language as tl

from fastlora.kernels import config
from fastlora.kernels.launch import jit, on_device
from fastlora.kernels.tile import cast


@jit()
def norm_kernel(
    x_ptr,  # (M, K), contiguous, as all that follow
    residual_ptr,  # (M, K), or None
    w_ptr,  # (K,)
    h_ptr,  # (M, K): out, residual + x; None without a residual
    y_ptr,  # (M, K): out, the norm of that
    rstd_ptr,  # (M,) float32: out
    eps,
    offset,
    K,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < K
    dtype: tl.constexpr = y_ptr.dtype.element_ty
    x = tl.load(x_ptr + row * K + k, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        # What is normalized is what the next layers add to.
        h = cast(x + tl.load(residual_ptr + row * K + k, mask=inside, other=0.0).to(tl.float32), dtype)
        tl.store(h_ptr + row * K + k, h, mask=inside)
        x = h.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / K + eps)
    w = tl.load(w_ptr + k, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(y_ptr + row * K + k, cast(x * rstd * w, dtype), mask=inside)
    tl.store(rstd_ptr + row, rstd)


@jit()
def norm_backward_kernel(
    dy_ptr,  # (M, K), contiguous, as all that follow
    dh_ptr,  # (M, K), or None
    h_ptr,  # (M, K)
    w_ptr,  # (K,)
    rstd_ptr,  # (M,)
    dx_ptr,  # (M, K): out
    offset,
    K,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK)
    inside = k < K
    dy = tl.load(dy_ptr + row * K + k, mask=inside, other=0.0).to(tl.float32)
    h = tl.load(h_ptr + row * K + k, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + k, mask=inside, other=0.0).to(tl.float32) + offset
    rstd = tl.load(rstd_ptr + row)
    normal, dn = h * rstd, dy * w
    dx = rstd * (dn - normal * (tl.sum(dn * normal, 0) / K))
    if dh_ptr is not None:
        dx += tl.load(dh_ptr + row * K + k, mask=inside, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row * K + k, cast(dx, dx_ptr.dtype.element_ty), mask=inside)


def forward(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, offset: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """h = residual + x (x itself without one), its norm, both of the residual's type, and the inverse deviations (M,).

    x and residual: (..., K), contiguous; weight: (K,).
    """
    k = x.shape[-1]
    m, tiles = x.numel() // k, config.norm(k)
    h = x if residual is None else torch.empty_like(residual)
    y, rstd = torch.empty_like(h), x.new_empty(m, dtype=torch.float32)
    with on_device(x):
        norm_kernel[(m,)](
            x, residual, weight, None if residual is None else h, y, rstd, float(eps), float(offset), k,
            BLOCK=tiles.block_n, **tiles.launch(),
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
    """The gradient of x and of the residual, of the shape of h, for the gradients of both results of `forward`."""
    k = h.shape[-1]
    dx, tiles = torch.empty_like(h), config.norm(k)
    with on_device(h):
        norm_backward_kernel[(h.numel() // k,)](
            dy, dh, h, weight, rstd, dx, float(offset), k, BLOCK=tiles.block_n, **tiles.launch()
        )  # fmt: skip
    return dx
