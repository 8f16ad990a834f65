"""DoRA: the rows of W + scale * B A, each brought to a learned length (Liu et al., "DoRA", 2024).

    n  = row norms of W + scale * B A, a constant for the gradients (section 4.3)        (N,)
    y  = (m / n) * (x W^T + scale * (x A^T) B^T) + bias                                  (M, N)
    dm = sum over M of dy * (y - bias) / m

With dropout, x above is dropout(x) and y gets (x - dropout(x)) W^T on top: the base product sees all of x.

A 4-bit weight takes the factors into its statistics, and B takes them as it is: DoRA is then LoRA on diag(m / n) W and
diag(m / n) B, and beyond it costs the norms and one pass over dy and y for dm. Where that cannot be (a dense weight,
dropout, a bias, a compiler that traces), it costs one pass over y, one over dy with what y was before its factors, and
the norms.

Neither W nor B A is ever made in full for the norms:

    n^2 = |W|^2 + 2 scale rowsum((W A^T) * B) + scale^2 rowsum((B (A A^T)) * B)

where |W|^2 is taken once from the packed bytes, and W A^T is the base product of R rows.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from fastlora import backends, ops
from fastlora.linear import _run
from fastlora.nf4 import NF4Weight, Weight, code_table, version

_CHUNK = 1 << 22
"""Bytes or elements handled at once: it bounds the float32 temporaries."""
_NO_GAIN = 2.0**-60
"""What stands for a gain of 0 in the statistics: the row is then nothing beside the others, and its direction, which
the gradient of the magnitude is the product with, survives."""


def row_norms(w: Weight) -> torch.Tensor:
    """(N,): the norm of each row of w (N, K), in float32 (float64 for a float64 weight)."""
    if isinstance(w, torch.Tensor):
        return torch.linalg.vector_norm(w.detach(), dim=1, dtype=_accumulator(w.dtype))
    return torch.ops.fastlora.row_norms(*ops.weight_args(w))


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _packed_row_norms(*args: Any) -> torch.Tensor:
    w = ops.weight_from(args, torch.float32)
    assert isinstance(w, NF4Weight)
    n, k = w.shape
    if k % w.blocksize:  # a block may straddle rows
        step = max(1, _CHUNK // k)
        parts = [w.dequantize(torch.float32, (i, min(i + step, n))).square().sum(1) for i in range(0, n, step)]
        return torch.cat(parts).sqrt()
    code = code_table(w.quant_type, w.device).square()
    byte = torch.arange(256, device=w.device)
    both = code[byte >> 4] + code[byte & 15]
    packed, size = w.w_packed.view(-1), w.blocksize // 2
    step = max(1, _CHUNK // size)
    sums = [both[packed[i * size : (i + step) * size].int()].view(-1, size).sum(1) for i in range(0, w.blocks, step)]
    return (torch.cat(sums) * w.flat_absmax().square()).view(n, -1).sum(1).sqrt()


_LIB = torch.library.Library("fastlora", "FRAGMENT")
_LIB.define(f"row_norms({ops.WEIGHT_SCHEMA}) -> Tensor", tags=ops.TAGS)
for _device in ("CPU", "CUDA"):
    _LIB.impl("row_norms", _packed_row_norms, _device)


@torch.library.register_fake("fastlora::row_norms", lib=_LIB)
def _(w: torch.Tensor, *args: Any) -> torch.Tensor:
    return w.new_empty(args[5], dtype=torch.float32)


def _columns(t: torch.Tensor, backend: str) -> Any:
    """The module of the Triton kernels where they compute what follows; None where PyTorch's own do."""
    if t.dtype == torch.float64 or ops.must_dispatch(t):
        return None
    machine = backends.this_machine()
    if machine.triton is not None or not (t.is_cuda or (backend == "triton" and machine.triton_interpreted)):
        return None
    from fastlora.kernels import columns

    return columns


@torch.no_grad()
def weight_norm(
    w: Weight,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float | torch.Tensor,
    dtype: torch.dtype,
    backend: str = "auto",
    norms: torch.Tensor | None = None,
) -> torch.Tensor:
    """(N,): the norm of each row of w + scale * lora_b lora_a, in float32 or wider.

    dtype: the type that the adapters and the base product have in the layer. norms: `row_norms` of w, where known.
    """
    return _norm_and_gain(w, lora_a, lora_b, None, scale, dtype, backend, norms)[0]


@torch.no_grad()
def _norm_and_gain(
    w: Weight,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor | None,
    scale: float | torch.Tensor,
    dtype: torch.dtype,
    backend: str,
    norms: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight_norm`, and magnitude (N,), by default all ones, over it."""
    of_w = row_norms(w) if norms is None else norms
    b = lora_b.to(dtype)
    cross, gram = _products(w, lora_a, dtype, backend)
    columns = None if isinstance(scale, torch.Tensor) else _columns(b, backend)
    if columns is not None:
        magnitude = torch.ones_like(of_w) if magnitude is None else magnitude
        return columns.row_norm(cross, gram, b, of_w, magnitude, scale)
    with ops.without_autocast(b.device.type):
        b = b.to(gram.dtype)
        inner = cross.T.mul(2 * scale).add(scale * scale * (b @ gram))
    change = (inner * b).sum(1)
    # Rounding may leave the square of a row that the adapter cancels below zero. A row that it does not change keeps
    # its norm to the bit, so that an untrained adapter changes nothing.
    norm = torch.where(change == 0, of_w, of_w.square().add(change).clamp(min=0).sqrt())
    return norm, (1 if magnitude is None else magnitude) / norm


def _products(w: Weight, lora_a: torch.Tensor, dtype: torch.dtype, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A W^T (R, N) and A A^T (R, R), of operands of ``dtype``, in float32 or wider."""
    wide = _accumulator(dtype)
    a = lora_a.to(dtype).contiguous()
    cross = ops.lora_linear(a, w, None, None, None, wide if wide != dtype else None, 1.0, 0.0, None, backend)
    with ops.without_autocast(a.device.type):
        exact = a.is_cuda and dtype.itemsize == 2
        return cross, torch.mm(a, a.T, out_dtype=wide) if exact else a.to(wide) @ a.T.to(wide)


class _Scaled(torch.autograd.Function):
    """(z - bias) * gain + bias + rest, of the type of z (M, N), rounded once; gain = magnitude / norm."""

    @staticmethod
    def forward(
        ctx: Any,
        z: torch.Tensor,
        magnitude: torch.Tensor,
        bias: torch.Tensor | None,
        rest: torch.Tensor | None,
        norm: torch.Tensor,
        gain: torch.Tensor,
        columns: Any,
    ) -> torch.Tensor:
        ctx.save_for_backward(z if ctx.needs_input_grad[1] else None, norm, gain, bias)
        ctx.columns, ctx.magnitude_dtype = columns, magnitude.dtype
        if columns is not None:
            return columns.scaled(z, gain, bias, rest)
        if bias is None and rest is None:
            return torch.mul(z, gain, out=torch.empty_like(z))
        # So arranged, a gain of 1 leaves z as it is.
        y = z * gain if bias is None else torch.addcmul((1 - gain) * bias, z, gain)
        return (y if rest is None else y + rest).to(z.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        z, norm, gain, bias = ctx.saved_tensors
        need_dz, need_magnitude, need_bias, need_rest = ctx.needs_input_grad[:4]
        dz = dm = dbias = None
        if ctx.columns is not None and (need_dz or need_magnitude):
            dz, sums = ctx.columns.scaled_gradients(dy, z, gain, bias, need_dz)
            dm, _ = ctx.columns.finished(sums, norm, ctx.magnitude_dtype)
        elif ctx.columns is None:
            dz = torch.mul(dy, gain).to(dy.dtype) if need_dz else None
            if need_magnitude:
                sums = torch.sum(dy * (z if bias is None else z - bias), 0, dtype=norm.dtype)
                dm = (sums / norm).to(ctx.magnitude_dtype)
        if need_bias:
            dbias = torch.sum(dy, 0, dtype=norm.dtype).to(bias.dtype)
        return dz, dm, dbias, dy if need_rest else None, None, None, None


@torch.no_grad()
def _fold(
    w: NF4Weight,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor,
    scale: float,
    dtype: torch.dtype,
    backend: str,
    norms: torch.Tensor | None,
    norm: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """gain = magnitude / norm (N,), nowhere 0; gain * norm (N,), the magnitude but for that; the flat statistics of
    diag(gain) w; diag(gain) lora_b in its own type."""
    columns = _columns(lora_b, backend)
    if columns is not None and norm is None and columns.folds(w, lora_a.shape[0], dtype):
        of_w = row_norms(w) if norms is None else norms
        return columns.folded(w, lora_a, lora_b, of_w, magnitude, scale, dtype, _NO_GAIN)
    if norm is None:
        norm, gain = _norm_and_gain(w, lora_a, lora_b, magnitude, scale, dtype, backend, norms)
    else:
        gain = magnitude / norm
    gain = torch.where(gain == 0, _NO_GAIN, gain)
    absmax = (w.flat_absmax().view(w.shape[0], -1) * gain[:, None]).view(-1)
    return gain, gain * norm, absmax, (lora_b * gain[:, None]).to(lora_b.dtype)


def _with(w: NF4Weight, absmax: torch.Tensor) -> NF4Weight:
    return NF4Weight(w.w_packed, w.shape, w.blocksize, w.quant_type, w.dtype, absmax)


def _folds(x: torch.Tensor, w: Weight, bias: torch.Tensor | None, dropout_p: float) -> bool:
    """Whether the factors go into the statistics of w for x (M, K)."""
    return (
        isinstance(w, NF4Weight)
        and bias is None
        and not dropout_p
        and x.dtype in (torch.float32, torch.bfloat16)  # whose range has room for _NO_GAIN
        and w.shape[1] % w.blocksize == 0  # else a block may straddle rows
        and x.shape[0] * w.blocksize >= w.shape[1]  # else there is less of y than there are statistics
        and not ops.must_dispatch(x)
    )


def _watch(y: torch.Tensor) -> None:
    """Let ``y``, the output of `_Folded`, be changed in place, as that of PEFT's layers may be.

    autograd refuses a saved tensor that has changed, but one behind hooks it leaves to them: `_Folded` looks itself.
    """
    node: Any = y.grad_fn
    if node is not None and torch._C._autograd._top_saved_tensors_default_hooks(False) is None:
        node._raw_saved_tensors[-1].register_hooks(_same, _same)


def _same(t: torch.Tensor) -> torch.Tensor:
    return t


class _Folded(torch.autograd.Function):
    """LoRA on diag(gain) w and diag(gain) lora_b, and the gradient of the magnitudes from its output."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        lora_a: torch.Tensor,
        lora_b: torch.Tensor,
        magnitude: torch.Tensor,
        w: NF4Weight,
        folded: tuple[torch.Tensor, ...],
        scale: float,
        out_dtype: torch.dtype | None,
        backend: str,
    ) -> torch.Tensor:
        gain, length, absmax, folded_b = folded
        y, u = ops.forward(x, _with(w, absmax), lora_a, folded_b, None, out_dtype, scale, 0.0, None, backend)
        _, need_a, need_b, need_m, *_ = ctx.needs_input_grad
        kept = y.detach() if need_m else None
        ctx.save_for_backward(
            x if need_a or need_m else None, u if need_b else None, lora_a, folded_b, absmax, gain, length, kept
        )
        ctx.w, ctx.scale, ctx.backend, ctx.dtype, ctx.out_dtype = w, scale, backend, x.dtype, out_dtype
        ctx.version, ctx.magnitude_dtype = version(y), magnitude.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        x, u, lora_a, folded_b, absmax, gain, length, y = ctx.saved_tensors
        need_x, need_a, need_b, need_m, *_ = ctx.needs_input_grad
        w, columns = _with(ctx.w, absmax), _columns(dy, ctx.backend)
        sums = None
        if need_m:
            if version(y) != ctx.version:  # the caller has changed it in place
                y, _ = ops.forward(x, w, lora_a, folded_b, None, ctx.out_dtype, ctx.scale, 0.0, None, ctx.backend)
            if columns is None:
                sums = torch.sum(dy * y, 0, dtype=gain.dtype)
            else:
                sums = columns.scaled_gradients(dy, y, gain, None, False)[1]
        dx, da, db = ops.gradients(
            dy.to(ctx.dtype), x if need_a else None, u, w, lora_a, folded_b, ctx.scale, 0.0, None, ctx.backend,
            (need_x, need_a, need_b),
        )  # fmt: skip
        if columns is not None:
            dm, db = columns.finished(sums, length, ctx.magnitude_dtype, gain, db)
        else:
            dm = None if sums is None else (sums / length).to(ctx.magnitude_dtype)
            db = None if db is None else (db * gain[:, None]).to(db.dtype)
        return dx, da, db, dm, None, None, None, None, None


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
    norms: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
) -> torch.Tensor:
    """y (..., N) of x (..., K) for arguments that fit, computed in the type of x.

    w: (N, K), frozen. lora_a: (R, K), lora_b: (N, R), magnitude: (N,), of any floating type. bias: (N,).
    out_dtype: a wider type of y. norms: `row_norms` of w, where known. norm: `weight_norm`, where known.
    """
    if lora_a.shape[0] < 1:
        raise ValueError("DoRA needs a rank of 1 or more: there is no direction to learn")
    flat = x.reshape(-1, x.shape[-1])
    if _folds(flat, w, bias, dropout_p):
        assert isinstance(w, NF4Weight)
        if isinstance(scale, torch.Tensor):
            lora_b, scale = lora_b * scale, 1.0
        folded = _fold(w, lora_a, lora_b, magnitude, scale, x.dtype, backend, norms, norm)
        y = _Folded.apply(flat, lora_a, lora_b, magnitude, w, folded, scale, out_dtype, backend)
        if magnitude.requires_grad:
            _watch(y)
        return y.view(*x.shape[:-1], w.shape[0])
    if norm is None:
        norm, gain = _norm_and_gain(w, lora_a, lora_b, magnitude, scale, x.dtype, backend, norms)
    else:
        gain = magnitude.detach() / norm
    rest = None
    if dropout_p:
        dropped = F.dropout(x, dropout_p)
        rest = _run(x - dropped, w, None, None, bias, 1.0, 0.0, out_dtype, backend)
        rest = rest.view(-1, rest.shape[-1])
        x, bias = dropped, None
    # The gradient of the bias is taken from y, where it is whole.
    constant = None if bias is None else bias.detach()
    z = _run(x, w, lora_a, lora_b, constant, scale, 0.0, out_dtype, backend)
    flat = z.view(-1, z.shape[-1])
    return _Scaled.apply(flat, magnitude, bias, rest, norm, gain, _columns(flat, backend)).view(z.shape)
