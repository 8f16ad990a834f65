"""The truth: forward and every gradient in plain PyTorch, in the type of the arguments up to float64.

    u  = dropout(x) A^T                                   (M, R)
    y  = x W^T + scale * (u B^T) (+ bias)                 (M, N)
    du = scale * (dy B)                                   (M, R)
    dx = dy W + dropout(du A)                             (M, K)
    dA = du^T dropout(x)                                  (R, K)
    dB = scale * (dy^T u)                                 (N, R)

Every kernel of the package is tested against these lines in float64 on the same packed bytes.
"""

from __future__ import annotations

from typing import Any

import torch

from fastlora.dropout import Dropout
from fastlora.nf4 import NF4Weight, Weight


def dense(w: Weight, dtype: torch.dtype) -> torch.Tensor:
    """The base weight (N, K) as a dense matrix of ``dtype``."""
    return w.dequantize(dtype) if isinstance(w, NF4Weight) else w.to(dtype)


def forward(
    x: torch.Tensor,
    w: Weight,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    dropout: Dropout | None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (M, N), of ``out_dtype`` or x's type, and u (M, R) for x (M, K). Without adapters u has no columns."""
    y = x @ dense(w, x.dtype).T
    u = x.new_empty(x.shape[0], 0)
    if lora_a is not None and lora_b is not None:
        u = (dropout.apply(x) if dropout else x) @ lora_a.to(x.dtype).T
        y = y + scale * (u @ lora_b.to(x.dtype).T)
    y = y if bias is None else y + bias.to(x.dtype)
    return y.to(out_dtype or y.dtype), u


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    u: torch.Tensor,
    w: Weight,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scale: float,
    dropout: Dropout | None,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx (M, K), dA (R, K) and dB (N, R); None where ``needs`` is False. ``x`` may be None if dA is not needed."""
    need_dx, need_da, need_db = needs
    dx = dy @ dense(w, dy.dtype) if need_dx else None
    da = db = None
    if lora_a is not None and lora_b is not None:
        du = scale * (dy @ lora_b.to(dy.dtype))
        if dx is not None:
            dx_lora = du @ lora_a.to(dy.dtype)
            dx = dx + (dropout.apply(dx_lora) if dropout else dx_lora)
        if need_da:
            assert x is not None
            da = (du.T @ (dropout.apply(x) if dropout else x)).to(lora_a.dtype)
        if need_db:
            db = (scale * (dy.T @ u)).to(lora_b.dtype)
    return dx, da, db


class _Linear(torch.autograd.Function):
    """The formulas above as one differentiable node; its backward is plain PyTorch, so it can be derived again."""

    @staticmethod
    def forward(ctx: Any, x: Any, lora_a: Any, lora_b: Any, w: Any, scale: Any, dropout: Any) -> Any:
        ctx.save_for_backward(x, lora_a, lora_b)
        ctx.w, ctx.scale, ctx.dropout = w, scale, dropout
        return forward(x, w, lora_a, lora_b, None, scale, dropout)[0]

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        x, lora_a, lora_b = ctx.saved_tensors
        u = (ctx.dropout.apply(x) if ctx.dropout else x) @ lora_a.T if lora_a is not None else x[:, :0]
        needs = tuple(ctx.needs_input_grad[:3])
        return (*backward(dy, x, u, ctx.w, lora_a, lora_b, ctx.scale, ctx.dropout, needs), None, None, None)


def lora_linear(
    x: torch.Tensor,
    w: Weight,
    lora_a: torch.Tensor | None = None,
    lora_b: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    dropout: Dropout | None = None,
) -> torch.Tensor:
    """Differentiable y (M, N) of x (M, K), to any order. One type for x and both adapters."""
    y = _Linear.apply(x, lora_a, lora_b, w, scale, dropout)
    return y if bias is None else y + bias
