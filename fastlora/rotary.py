"""The rotary embedding of q and k that are parts of a larger matrix, without copies.

    [x1, x2] -> [x1 cos1 - x2 sin1, x2 cos2 + x1 sin2]        the halves of a head

q, k and v of a group are views of one buffer (`fastlora.blocks.lora_linears`). Kernels that want them contiguous copy q
and k first; here they are read where they lie and written once. Su et al., "RoFormer" (2021); halves as in GPT-NeoX.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastlora import backends, ops
from fastlora.groups import kernels


def unsupported(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> str | None:
    """Why `rotate` does not take these operands, or None."""
    machine = backends.this_machine()
    if machine.triton is not None:
        return machine.triton
    if not q.is_cuda and not machine.triton_interpreted:
        return "Triton kernels run on cuda"
    if any(ops.must_dispatch(t) for t in (q, k, cos, sin)):
        return "somebody is to see PyTorch's operators"
    if q.dim() != 4 or k.dim() != 4 or q.shape[0::2] != k.shape[0::2] or q.shape[3] != k.shape[3] or not q.numel():
        return f"q {tuple(q.shape)} and k {tuple(k.shape)} are not (B, H, S, D) of one B, S and D"
    batch, _, length, width = q.shape
    if width % 2 or any(t.shape not in ((batch, length, width), (1, length, width)) for t in (cos, sin)):
        return f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} are not (B or 1, S, D) of an even D"
    if any(t.dtype != q.dtype or t.device != q.device or t.stride(-1) != 1 for t in (q, k, cos, sin)):
        return "types, devices or the last strides differ"
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"{q.dtype} is not a type of these kernels"
    if cos.requires_grad or sin.requires_grad:
        return "cos or sin learns"
    return None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
        ctx.save_for_backward(cos, sin)
        return kernels("rotary").rotate(q, k, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dq: torch.Tensor, dk: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        dq, dk = (t if t.stride(-1) == 1 else t.contiguous() for t in (dq, dk))
        return (*kernels("rotary").rotate(dq, dk, cos, sin, inverse=True), None, None)


def rotated(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What `rotate` returns, or None where `unsupported` says why not."""
    if unsupported(q, k, cos, sin) is not None:
        return None
    out: tuple[torch.Tensor, torch.Tensor] = _Rotary.apply(q, k, cos, sin)
    return out


def rotate(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """q (B, HQ, S, D) and k (B, HK, S, D), of any strides but the last, rotated by cos and sin (B or 1, S, D).

    Computed in float32 and rounded once. Raises ValueError where `unsupported` says why.
    """
    out = rotated(q, k, cos, sin)
    if out is None:
        raise ValueError(unsupported(q, k, cos, sin))
    return out
