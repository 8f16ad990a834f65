"""The sum of a residual, and its root mean square norm, in one node.

    h = residual + x,  y = h / sqrt(mean(h^2) + eps) * (offset + w)

A decoder layer reads h twice: in the norm, and where it adds to it again. As one node both gradients are summed in the
backward pass of the norm, and the sum of the forward pass is made where it is normalized. Zhang and Sennrich, "Root
Mean Square Layer Normalization" (2019); offset 1 as in Gemma.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastlora import backends, ops
from fastlora.groups import kernels

WIDEST = 1 << 15
"""Elements of a row that a program holds."""
MOST = 1 << 31
"""Rows, which the kernels count in 32 bits."""


def unsupported(x: torch.Tensor, weight: torch.Tensor, residual: torch.Tensor | None = None) -> str | None:
    """Why `add_norm` does not take these operands, or None."""
    operands = [t for t in (x, weight, residual) if t is not None]
    machine = backends.this_machine()
    if machine.triton is not None:
        return machine.triton
    if not x.is_cuda and not machine.triton_interpreted:
        return "Triton kernels run on cuda"
    if any(ops.must_dispatch(t) for t in operands):
        return "somebody is to see PyTorch's operators"
    if weight.requires_grad:
        return "the weight learns"
    stream = x if residual is None else residual
    if any(t.dtype not in (torch.float16, torch.bfloat16, torch.float32) for t in operands):
        return f"one of {[t.dtype for t in operands]} is not a type of these kernels"
    if weight.dtype != stream.dtype or torch.promote_types(x.dtype, stream.dtype) != stream.dtype:
        return f"types {[t.dtype for t in operands]} do not make one of the sum"
    if any(t.device != x.device for t in operands):
        return "devices differ"
    if not x.dim() or weight.shape != x.shape[-1:] or (residual is not None and residual.shape != x.shape):
        return f"shapes {[tuple(t.shape) for t in operands]} do not fit"
    if not 0 < x.shape[-1] <= WIDEST or not 0 < x.numel() // x.shape[-1] < MOST:
        return f"{x.shape[:-1].numel()} rows of {x.shape[-1]} elements"
    if not weight.is_contiguous():
        return "the weight is not contiguous"
    return None


def _order(x: torch.Tensor) -> tuple[int, ...] | None:
    """The dimensions of x by their strides, the last one last, where they are in another order: heads before tokens,
    of a matrix that has tokens before heads."""
    if x.is_contiguous():
        return None
    last, strides = x.dim() - 1, x.stride()
    order = (*sorted(range(last), key=lambda i: -strides[i]), last)
    return None if order == tuple(range(last + 1)) else order


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, residual: Any, weight: torch.Tensor, eps: float, offset: float) -> Any:
        ctx.set_materialize_grads(False)
        order = None if residual is not None else _order(x)
        rows = x if order is None else x.permute(order)
        h, y, rstd = kernels("norm").forward(rows, residual, weight, eps, offset)
        ctx.save_for_backward(h, weight, rstd)
        ctx.offset, ctx.summed, ctx.order = offset, residual is not None, order
        if order is not None:
            y = y.permute(_inverse(order))
        # Detached: x itself would come out as one of several views, which nothing may change in place.
        return x.detach() if residual is None else h, y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dh: torch.Tensor | None, dy: torch.Tensor | None) -> Any:
        h, weight, rstd = ctx.saved_tensors
        if dy is not None:
            order = range(dy.dim()) if ctx.order is None else ctx.order
            dh = None if dh is None else dh.permute(*order).contiguous()
            dh = kernels("norm").backward(dy.permute(*order).contiguous(), dh, h, weight, rstd, ctx.offset)
            dh = dh if ctx.order is None else dh.permute(_inverse(ctx.order))
        return dh, dh if ctx.summed else None, None, None, None


def added(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What `add_norm` returns, or None where `unsupported` says why not."""
    if unsupported(x, weight, residual) is not None:
        return None
    out: tuple[torch.Tensor, torch.Tensor] = _AddNorm.apply(x, residual, weight, eps, offset)
    return out


def add_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0, residual: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """h = residual + x, or x itself without a residual, and its norm, of the shape of x.

    x, residual: (..., K); weight: (K,), frozen. All have one type, which is that of the results; only x may be
    narrower than the residual. The norm is computed in float32 and rounded once. Raises ValueError where `unsupported`
    says why.
    """
    out = added(x, weight, eps, offset, residual)
    if out is None:
        raise ValueError(unsupported(x, weight, residual))
    return out
