"""The root mean square norm of rows as one autograd node: one launch forward, one backward."""

from __future__ import annotations

from typing import Any

import torch

from fastlora import backends, ops
from fastlora.blocks import _once
from fastlora.groups import kernels

__all__ = ["rms_norm", "unsupported"]


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any, eps: float, offset: int, rounded: bool) -> Any:
        rows = x.reshape(-1, x.shape[-1])
        y, scale = kernels("norm").forward(rows, weight, eps, offset=offset, rounded=rounded)
        ctx.save_for_backward(x, weight, scale)
        ctx.formula = offset, rounded
        return y.view(x.shape)

    @staticmethod
    @_once
    def backward(ctx: Any, dy: Any) -> Any:
        x, weight, scale = ctx.saved_tensors
        (offset, rounded), k = ctx.formula, x.shape[-1]
        dx, dweight = kernels("norm").backward(
            dy.reshape(-1, k), x.reshape(-1, k), weight, scale,
            offset=offset, rounded=rounded, need_dweight=ctx.needs_input_grad[1],
        )  # fmt: skip
        return dx.view(x.shape), None if dweight is None else dweight.to(weight.dtype), None, None, None


def unsupported(x: torch.Tensor, weight: torch.Tensor) -> str | None:
    """Why `rms_norm` does not compute the norm of x (..., K), or None."""
    if ops.must_dispatch(x) or type(weight) not in (torch.Tensor, torch.nn.Parameter):
        return "a compiler, a transform or a subclass of tensors looks on"
    machine = backends.this_machine()
    if machine.triton is not None or not (x.is_cuda or machine.triton_interpreted):
        return "its kernels need Triton and a GPU"
    if x.dtype != weight.dtype or x.device != weight.device:
        return f"its weight is {weight.dtype} on {weight.device}, its input {x.dtype} on {x.device}"
    if x.dtype not in backends.COMPUTE_DTYPES or x.dtype.itemsize != 2:
        return f"{str(x.dtype).removeprefix('torch.')} is not a 16-bit type"
    if x.shape[-1:] != weight.shape or x.shape[-1] > kernels("norm").WIDEST or not x.numel():
        return f"an input {tuple(x.shape)} for a weight {tuple(weight.shape)}"
    return None


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, offset: int = 0, rounded: bool = True
) -> torch.Tensor:
    """``x / sqrt(mean(x^2) + eps) * (offset + weight)`` over the last dimension, computed in float32.

    x: (..., K) and weight: (K,) of one type, for which `unsupported` has no reason. offset: 0, or 1 as in Gemma.
    rounded: whether the normalized x is rounded to its type before it is multiplied, as in Llama and its relatives.
    Keeps x and a float32 for each row. Raises RuntimeError where its gradient is differentiated again.
    """
    y: torch.Tensor = _Norm.apply(x, weight, eps, offset, rounded)
    return y
