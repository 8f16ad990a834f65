"""VeRA: frozen random factors that all layers share, with learned vectors between them (Kopiczko et al., "VeRA:
Vector-based Random Matrix Adaptation", 2024).

    y  = x W^T + b * (d * (dropout(x) A^T)) B^T        A (R, K), B (N, R) shared and frozen; b (N,), d (R,) learned

It is LoRA with A and ``B' = b * B * d``, of which A is frozen: the backward pass needs no x, and from G = dB' (N, R),
the accumulators of one product,

    db = rowsum(G * B * d),   dd = columnsum(b * G * B)

dA (R, K) is never made. G is: the same gradients without it need (x A^T * d) B^T, which is (M, N), as many operations
again, and larger than G wherever the tokens M are more than the rank.

A layer smaller than the shared factors takes their first K columns and N rows. They are regenerated from a seed, by the
rule of PEFT, or saved once for all layers.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from fastlora.linear import lora_linear
from fastlora.nf4 import Weight


class _Between(torch.autograd.Function):
    """b * B * d of ``dtype``, which keeps neither of the products that autograd would."""

    @staticmethod
    def forward(ctx: Any, b: torch.Tensor, d: torch.Tensor, shared_b: torch.Tensor, dtype: torch.dtype) -> Any:
        ctx.save_for_backward(b, d, shared_b)
        out = torch.empty(shared_b.shape, dtype=dtype, device=shared_b.device)
        if torch.promote_types(torch.promote_types(b.dtype, d.dtype), shared_b.dtype) == dtype:
            return torch.mul(shared_b, d, out=out).mul_(b[:, None])
        return out.copy_(shared_b * d * b[:, None])

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:
        b, d, shared_b = ctx.saved_tensors
        p = g * shared_b
        db = (p @ d.to(p.dtype)).to(b.dtype) if ctx.needs_input_grad[0] else None
        dd = (b.to(p.dtype) @ p).to(d.dtype) if ctx.needs_input_grad[1] else None
        return db, dd, None, None


def factors(
    b: torch.Tensor, d: torch.Tensor, shared_a: torch.Tensor, shared_b: torch.Tensor, n: int, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """lora_a (R, K) and lora_b (N, R) of a layer with the vectors b (N,) and d (R,), differentiable in these.

    shared_a: (R, at least K); shared_b: (at least N, R). Raises ValueError for shapes that do not fit.
    """
    r = d.shape[0]
    if shared_a.shape[0] < r or shared_b.shape[1] < r:
        raise ValueError(f"rank {r} is more than that of the shared factors, {shared_a.shape[0]}: draw larger ones")
    if shared_a.shape[1] < k or shared_b.shape[0] < n:
        raise ValueError(
            f"a layer ({n}, {k}) needs shared factors of at least {k} columns (A) and {n} rows (B), got "
            f"{shared_a.shape[1]} and {shared_b.shape[0]}: draw them for the largest layer"
        )
    if tuple(b.shape) != (n,):
        raise ValueError(f"b must have shape ({n},), got {tuple(b.shape)}")
    wide = torch.promote_types(b.dtype, d.dtype)
    return shared_a[:r, :k], _Between.apply(b, d, shared_b[:n, :r], wide)


def shared_factors(n: int, k: int, r: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A (R, K) and B (N, R) of ``seed``, float32 on the CPU: Kaiming-uniform, as PEFT draws them.

    n, k: the largest out_features and in_features of the layers. Raises ValueError for a rank below 1.
    """
    if r < 1:
        raise ValueError(f"r must be a positive rank, got {r}")
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for shape in ((r, k), (n, r)):
        bound = math.sqrt(3.0) * (math.sqrt(2) / math.sqrt(shape[1]))
        drawn.append(torch.empty(shape).uniform_(-bound, bound, generator=generator))
    return drawn[0], drawn[1]


def vera_linear(
    x: torch.Tensor,
    w: Weight,
    b: torch.Tensor,
    d: torch.Tensor,
    shared_a: torch.Tensor,
    shared_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> torch.Tensor:
    """y (..., N) of x (..., K) on the frozen base weight w (N, K), with a fused backward for x, b and d.

    Raises ValueError for shapes that do not fit, and as `fastlora.lora_linear` does.
    """
    lora_a, lora_b = factors(b, d, shared_a, shared_b, *w.shape)
    return lora_linear(x, w, lora_a, lora_b, bias, dropout_p=dropout_p, backend=backend)
