"""DoRA: the rows of W + scale * B A, each brought to a learned length (Liu et al., "DoRA", 2024).

    n  = row norms of W + scale * B A, a constant for the gradients (section 4.3)        (N,)
    y  = (m / n) * (x W^T + scale * (x A^T) B^T) + bias                                  (M, N)
    dm = sum over M of dy * (y - bias) / m

With dropout, x above is dropout(x) and y gets (x - dropout(x)) W^T on top: the base product sees all of x.

Neither W nor B A is ever made in full for the norms:

    n^2 = |W|^2 + 2 scale rowsum((W A^T) * B) + scale^2 rowsum((B (A A^T)) * B)

where |W|^2 is taken once from the packed bytes, and W A^T is the base product of R rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastlora import ops
from fastlora.linear import _run
from fastlora.nf4 import NF4Weight, Weight, code_table

_CHUNK = 1 << 22
"""Bytes or elements handled at once: it bounds the float32 temporaries."""


def row_squares(w: Weight) -> torch.Tensor:
    """(N,): the sum of squares of each row of w (N, K), in float32 (float64 for a float64 weight)."""
    if isinstance(w, torch.Tensor):
        return torch.linalg.vector_norm(w.detach(), dim=1, dtype=_accumulator(w.dtype)).square()
    return torch.ops.fastlora.row_squares(*ops.weight_args(w))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _packed_row_squares(*args: Any) -> torch.Tensor:
    w = ops._weight(args, torch.float32)
    assert isinstance(w, NF4Weight)
    n, k = w.shape
    if k % w.blocksize:  # a block may straddle rows
        step = max(1, _CHUNK // k)
        parts = [w.dequantize(torch.float32, (i, min(i + step, n))).square().sum(1) for i in range(0, n, step)]
        return torch.cat(parts)
    code = code_table(w.quant_type, w.device).square()
    byte = torch.arange(256, device=w.device)
    both = code[byte >> 4] + code[byte & 15]
    packed, size = w.w_packed.view(-1), w.blocksize // 2
    step = max(1, _CHUNK // size)
    sums = [both[packed[i * size : (i + step) * size].int()].view(-1, size).sum(1) for i in range(0, w.blocks, step)]
    return (torch.cat(sums) * w.flat_absmax().square()).view(n, -1).sum(1)


_LIB = torch.library.Library("fastlora", "FRAGMENT")
_LIB.define(f"row_squares({ops._WEIGHT}) -> Tensor", tags=ops._TAGS)
for _device in ("CPU", "CUDA"):
    _LIB.impl("row_squares", _packed_row_squares, _device)


@torch.library.register_fake("fastlora::row_squares", lib=_LIB)
def _(w: torch.Tensor, *args: Any) -> torch.Tensor:
    return w.new_empty(args[5], dtype=torch.float32)


@torch.no_grad()
def weight_norm(
    w: Weight,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float | torch.Tensor,
    dtype: torch.dtype,
    backend: str = "auto",
    squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """(N,): the norm of each row of w + scale * lora_b lora_a, in float32 or wider.

    dtype: the type that the adapters and the base product have in the layer. squares: `row_squares` of w, where known.
    """
    total = row_squares(w) if squares is None else squares
    wide = _accumulator(dtype)
    a, b = lora_a.to(dtype), lora_b.to(dtype).to(wide)
    out_dtype = wide if wide != dtype else None
    cross = ops.lora_linear(a.contiguous(), w, None, None, None, out_dtype, 1.0, 0.0, None, backend)
    a = a.to(wide)
    with ops._without_autocast(a.device.type):
        inner = cross.T.mul(2 * scale).add(scale * scale * (b @ (a @ a.T)))
    return total.add((inner * b).sum(1)).clamp(min=0).sqrt()


class _Magnitude(torch.autograd.Function):
    """z * magnitude / norm, of the type of z, for z (M, N)."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, magnitude: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, magnitude, norm)
        return torch.mul(z, magnitude / norm, out=torch.empty_like(z))

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        z, magnitude, norm = ctx.saved_tensors
        need_dz, need_magnitude, _ = ctx.needs_input_grad
        dz = torch.mul(dy, magnitude / norm).to(dy.dtype) if need_dz else None
        if not need_magnitude:
            return dz, None, None
        dm = torch.sum(dy * z, 0, dtype=norm.dtype) / norm
        return dz, dm.to(magnitude.dtype), None


def dora_linear(
    x: torch.Tensor,
    w: Weight,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float | torch.Tensor = 1.0,
    dropout_p: float = 0.0,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    squares: torch.Tensor | None = None,
) -> torch.Tensor:
    """y (..., N) of x (..., K) for arguments that fit, computed in the type of x.

    w: (N, K), frozen. lora_a: (R, K), lora_b: (N, R), magnitude: (N,), of any floating type. bias: (N,).
    out_dtype: a wider type of y. squares: `row_squares` of w, where known.
    """
    if lora_a.shape[0] < 1:
        raise ValueError("DoRA needs a rank of 1 or more: there is no direction to learn")
    norm = weight_norm(w, lora_a, lora_b, scale, x.dtype, backend, squares)
    rest = None
    if dropout_p:
        dropped = F.dropout(x, dropout_p)
        rest = _run(x - dropped, w, None, None, bias, 1.0, 0.0, out_dtype, backend)
        x = dropped
    z = _run(x, w, lora_a, lora_b, None, scale, 0.0, out_dtype, backend)
    y = _Magnitude.apply(z.view(-1, z.shape[-1]), magnitude, norm).view(z.shape)
    if rest is not None:
        return rest + y
    return y if bias is None else y + bias.to(y.dtype)
