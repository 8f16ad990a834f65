"""The `torch` backend on a dense base weight: library matrix products, ordered so that the output is rounded once.

On a CPU the LoRA term (and the bias) is written first and the large product accumulates onto it (``addmm_``): only the
small term is rounded on the way. cuBLAS rounds a 16-bit product before it adds, so there its float32 sums are kept
until the LoRA term is in.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

from fastlora import native
from fastlora.dropout import Dropout


@functools.cache
def _ignored(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """What ``addmm`` is given to multiply by beta = 0."""
    return torch.zeros((), dtype=dtype, device=device)


def _mm(a: torch.Tensor, b: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """scale * (a b) in ``dtype``, from an accumulator that is rounded once where PyTorch offers that."""
    if dtype == a.dtype:
        return torch.addmm(_ignored(dtype, a.device), a, b, beta=0, alpha=scale)
    wide = dtype == torch.float32 and a.is_cuda
    product = torch.mm(a, b, out_dtype=torch.float32) if wide else torch.mm(a, b).to(dtype)
    return product if scale == 1 else product.mul_(scale)


def forward(
    x: torch.Tensor,
    w: torch.Tensor,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    dropout: Dropout | None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (M, N) of ``out_dtype`` (default: x's) and u (M, R) for x (M, K) and a dense w (N, K) of x's type."""
    if out_dtype not in (None, x.dtype):
        return _forward_wide(x, w, lora_a, lora_b, bias, scale, dropout, out_dtype)
    bias = None if bias is None else bias.to(x.dtype)
    if lora_a is None or lora_b is None:
        return F.linear(x, w, bias), x.new_empty(x.shape[0], 0)
    if x.is_cuda and x.dtype.itemsize == 2:
        y, u = _forward_wide(x, w, lora_a, lora_b, bias, scale, dropout, torch.float32)
        return y.to(x.dtype), u
    u = _u(x, lora_a, dropout)
    b = lora_b.to(x.dtype).T
    y = _mm(u, b, scale, x.dtype) if bias is None else torch.addmm(bias, u, b, alpha=scale)
    return y.addmm_(x, w.T), u


def _u(x: torch.Tensor, lora_a: torch.Tensor, dropout: Dropout | None) -> torch.Tensor:
    return (native.drop(x, dropout) if dropout else x) @ lora_a.to(x.dtype).T


def _forward_wide(
    x: torch.Tensor,
    w: torch.Tensor,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    dropout: Dropout | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`forward` with products of 16-bit operands whose sums are never rounded to 16 bits."""

    def mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.is_cuda and out_dtype == torch.float32:
            return torch.mm(a, b, out_dtype=out_dtype)
        return torch.mm(a.to(out_dtype), b.to(out_dtype))

    y, u = mm(x, w.T), x.new_empty(x.shape[0], 0)
    if lora_a is not None and lora_b is not None:
        u = _u(x, lora_a, dropout)
        y.add_(mm(u, lora_b.to(x.dtype).T), alpha=scale)
    return (y if bias is None else y.add_(bias)), u


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    u: torch.Tensor,
    w: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scale: float,
    dropout: Dropout | None,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx (M, K), dA (R, K) and dB (N, R); ``w`` may be None where dx is not needed, ``x`` where dA is not."""
    need_dx, need_da, need_db = needs
    dx = da = db = None
    if lora_a is None or lora_b is None:
        return (dy @ w if need_dx and w is not None else None), None, None
    if need_dx or need_da:
        du = _mm(dy, lora_b.to(dy.dtype), scale, dy.dtype)
    if need_dx:
        assert w is not None
        dx = du @ lora_a.to(dy.dtype)
        dx = (native.drop(dx, dropout) if dropout else dx).addmm_(dy, w)
    if need_da:
        assert x is not None
        da = _mm(du.T, native.drop(x, dropout) if dropout else x, 1.0, lora_a.dtype)
    if need_db:
        db = _mm(dy.T, u, scale, lora_b.dtype)
    return dx, da, db
