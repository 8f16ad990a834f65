"""The head of a language model and its cross-entropy in one node, some tokens at a time.

    loss = sum over tokens of cross_entropy(x W^T + bias, labels) / count

The logits of all tokens never exist: each chunk's become their own gradient, which is multiplied by W (and by x, where
W learns) while the forward pass runs. How many labels count stays on the device, so that nothing waits for it and a
CUDA graph can hold the step. Gradients of the head's input in the forward pass: Hsu et al., "Liger kernel" (2024).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fastlora import backends, native, ops
from fastlora.groups import kernels
from fastlora.linear import _autocast

CHUNK = 2**26
"""Logits that are there at once, unless that is fewer than `LEAST` tokens."""
LEAST = 512


@dataclasses.dataclass(frozen=True)
class _Options:
    ignore_index: int
    label_smoothing: float
    softcap: float | None


def chunk_rows(m: int, v: int) -> int:
    """Tokens of a chunk, of M tokens with V logits each: a power of two, or all, but one at least."""
    return min(max(m, 1), max(LEAST, 1 << (max(CHUNK // v, 1).bit_length() - 1)))


def _chunks(m: int, rows: int) -> Iterator[slice]:
    return (slice(first, min(first + rows, m)) for first in range(0, m, rows))


def _on_kernels(x: torch.Tensor) -> bool:
    machine = backends.this_machine()
    if machine.triton is not None or x.dtype not in backends.COMPUTE_DTYPES or ops.must_dispatch(x):
        return False
    return x.is_cuda or machine.triton_interpreted


def _on_extension(x: torch.Tensor, options: _Options) -> bool:
    # On the device "meta" there is nothing to compute.
    if not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16) or options.softcap is not None:
        return False
    return backends.this_machine().native_cpu is None and not ops.must_dispatch(x)


def _plain(
    logits: torch.Tensor, labels: torch.Tensor, loss: torch.Tensor, scale: torch.Tensor, options: _Options, grad: bool
) -> torch.Tensor | None:
    """As the kernel, in PyTorch."""
    wide, cap = logits.to(loss.dtype), options.softcap
    z = wide if cap is None else cap * torch.tanh(wide / cap)
    kept = labels != options.ignore_index
    log_p = F.log_softmax(z, 1)
    eps, v = options.label_smoothing, logits.shape[1]
    known = kept & (labels >= 0) & (labels < v)
    target = torch.where(known, labels, 0)
    each = -(1 - eps) * log_p.gather(1, target[:, None])[:, 0]
    if eps:
        each = each - eps * log_p.mean(1)
    loss.copy_(torch.where(kept, each.masked_fill(~known, float("nan")), 0))
    if not grad:
        return None
    d = log_p.exp_()
    d.scatter_add_(1, target[:, None], torch.full_like(each, -(1 - eps)).mul_(known)[:, None])
    if eps:
        d -= eps / v
    if cap is not None:
        d *= 1 - (z / cap).square_()
    return torch.where(kept[:, None], d * scale, 0).to(logits.dtype)


def _plus_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, summed in the type of total."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, w: Any, bias: Any, labels: Any, count: Any, options: Any, rows: Any) -> Any:
        need_x, need_w, need_bias = ctx.needs_input_grad[:3]
        grad = need_x or need_w or need_bias
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        m, v = x.shape[0], w.shape[0]
        losses = torch.empty(m, dtype=wide, device=x.device)
        inverse = count.to(wide).reciprocal()
        # float16 has no room for probabilities over the count: its gradients are divided by it at the end.
        late = x.dtype == torch.float16
        scale = torch.ones_like(inverse) if late else inverse
        fused = _on_kernels(x)
        softmax: Any = None
        if fused:
            softmax = kernels("cross_entropy").cross_entropy
        elif _on_extension(x, options):
            softmax = native.cross_entropy
        with ops.without_autocast(x.device.type):
            weight = w.to(x.dtype)
            shift = None if bias is None else bias.to(x.dtype)
            buffer = x.new_empty(min(rows, m), v)
            dx = torch.empty_like(x) if need_x else None
            dw = torch.zeros(w.shape, dtype=wide, device=x.device) if need_w else None
            db = torch.zeros(v, dtype=wide, device=x.device) if need_bias else None
            for part in _chunks(m, rows):
                logits: Any = buffer[: part.stop - part.start]
                if shift is None:
                    torch.mm(x[part], weight.T, out=logits)
                else:
                    torch.addmm(shift, x[part], weight.T, out=logits)
                if softmax is not None:
                    softmax(logits, labels[part], losses[part], scale, **dataclasses.asdict(options), gradient=grad)
                elif not x.is_meta:  # without values, nothing beside the buffer, as with the kernel
                    logits = _plain(logits, labels[part], losses[part], scale, options, grad)
                if dx is not None:
                    torch.mm(logits, weight, out=dx[part])
                if dw is not None:
                    _plus_product(dw, logits.T, x[part])
                if db is not None:
                    db += logits.sum(0, dtype=wide)
        ctx.save_for_backward(dx, dw, db, inverse if late else None)
        ctx.kinds, ctx.fused = (x.dtype, w.dtype, None if bias is None else bias.dtype), fused
        return losses.sum() * inverse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Any) -> Any:
        *grads, inverse = ctx.saved_tensors
        factor = dloss if inverse is None else dloss * inverse
        in_place = ops.freed_after_use()
        found = [
            None if grad is None else _scaled(grad, factor, kind, ctx.fused, in_place)
            for grad, kind in zip(grads, ctx.kinds, strict=True)
        ]
        return *found, None, None, None, None


def _scaled(grad: torch.Tensor, factor: torch.Tensor, dtype: Any, fused: bool, in_place: bool) -> torch.Tensor:
    """grad times a number on its device, rounded once, in ``dtype``."""
    if grad.dtype != factor.dtype:
        out = grad if in_place else grad.clone()
        if fused:
            kernels("cross_entropy").rescale(out, factor)
        elif not out.is_meta:
            # PyTorch would round the number to the type of the matrix.
            out.copy_(out.to(factor.dtype) * factor)
        return out.to(dtype)
    return (grad.mul_(factor) if in_place else grad * factor).to(dtype)


def linear_cross_entropy(
    x: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    count: torch.Tensor | float | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> torch.Tensor:
    """The mean cross-entropy of ``x @ weight.T + bias`` against ``labels``, without the logits of all tokens at once.

    x: (..., K). weight: (V, K), of x's type under no autocast. labels: (...), long; those of ``ignore_index`` count
    for nothing, and one that is neither that nor in [0, V) makes the loss NaN. Labels are not shifted.
    count: what the sum is divided by, a number or one on the device; without it how many labels are not ignored.
    softcap: the logits z become ``softcap * tanh(z / softcap)``. chunk: tokens at a time, `chunk_rows` unless given.

    Returns a scalar in float32 (float64 for float64). x, weight and bias may each require gradients; they are computed
    in the forward pass, and cannot be differentiated again. Raises ValueError for shapes or types that do not fit.
    """
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x (..., K) and weight (V, K) do not fit: {tuple(x.shape)} and {tuple(weight.shape)}")
    if labels.shape != x.shape[:-1]:
        raise ValueError(f"labels must be {tuple(x.shape[:-1])}, one for each row of x, got {tuple(labels.shape)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias must be ({weight.shape[0]},), got {tuple(bias.shape)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing}")
    computed = _autocast(x)
    wanted = computed.dtype if x.is_meta or not torch.is_autocast_enabled(x.device.type) else weight.dtype
    if computed.dtype == x.dtype and weight.dtype != wanted:
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}: they must be of one type")
    rows = computed.reshape(-1, x.shape[-1]).contiguous()
    flat = labels.reshape(-1)
    if count is None:
        total = (flat != ignore_index).sum()
    elif isinstance(count, torch.Tensor):
        total = count.to(x.device, non_blocking=True)
    else:
        total = torch.full((), float(count), device=x.device)
    options = _Options(int(ignore_index), float(label_smoothing), None if softcap is None else float(softcap))
    size = chunk or chunk_rows(rows.shape[0], weight.shape[0])
    return _LinearCrossEntropy.apply(rows, weight, bias, flat, total, options, size)
