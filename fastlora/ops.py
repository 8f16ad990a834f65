"""The operators of fastlora: schemas, fake implementations, CPU and CUDA implementations, autograd.

One opaque node per layer and direction. Kept for backward: x (only if A learns), u (only if B learns), the seed of the
dropout, and references to the weights; never a dense base weight, never a mask.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from fastlora import backends, node, tables
from fastlora.backends import Backend
from fastlora.dropout import Dropout
from fastlora.nf4 import NF4Weight, Weight

LIBRARY = torch.library.Library("fastlora", "DEF")

# A dense base weight has quant_type None and no statistics.
WEIGHT_SCHEMA = (
    "Tensor w, Tensor? absmax, Tensor? absmax_q, Tensor? absmax_scale, Tensor? absmax_code, Tensor? absmax_offset, "
    "SymInt n, SymInt k, int blocksize, str? quant_type"
)
_ADAPTER = "Tensor? lora_a, Tensor? lora_b"
_CONTEXT = "float scale, float dropout_p, Tensor? seed, str backend"
TAGS = (torch.Tag.pt2_compliant_tag,)

LIBRARY.define(
    f"lora_linear(Tensor x, {WEIGHT_SCHEMA}, {_ADAPTER}, Tensor? bias, ScalarType? out_dtype, {_CONTEXT}) "
    "-> (Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.define(
    f"lora_linear_backward(Tensor dy, Tensor? x, Tensor u, {WEIGHT_SCHEMA}, {_ADAPTER}, {_CONTEXT}, "
    "bool need_dx, bool need_da, bool need_db) -> (Tensor, Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.define(f"dequantize({WEIGHT_SCHEMA}, ScalarType dtype) -> Tensor", tags=TAGS)


def weight_args(w: Weight) -> tuple[Any, ...]:
    """The arguments that stand for a base weight in every schema."""
    if isinstance(w, NF4Weight):
        statistics = (w.absmax, w.absmax_q, w.absmax_scale, w.absmax_code, w.absmax_offset)
        return (w.w_packed, *statistics, *w.shape, w.blocksize, w.quant_type)
    return (w, None, None, None, None, None, *w.shape, 0, None)


def weight_from(args: tuple[Any, ...], dtype: torch.dtype) -> Weight:
    """The inverse of ``weight_args``."""
    w, absmax, absmax_q, absmax_scale, absmax_code, absmax_offset, n, k, blocksize, quant_type = args
    if quant_type is None:
        return w
    return NF4Weight(
        w, (n, k), blocksize, quant_type, dtype, absmax, absmax_q, absmax_scale, absmax_code, absmax_offset
    )


_N_WEIGHT = 10


def select(x: torch.Tensor, w: Weight, r: int, direction: str, dropout: bool, backend: str) -> Backend:
    """The backend that computes one direction of a layer; ``backend`` names it, or is "auto"."""
    n, k = w.shape
    format_: tuple[Any, ...] = (None, 0, False)
    if isinstance(w, NF4Weight):
        format_ = (w.quant_type, w.blocksize, w.nested)
    name = node.chosen(
        backend, x.shape[0], n, k, r, x.dtype, x.device.type, *format_, direction, dropout, tables.captured()
    )
    return backends.BACKENDS[name]


@contextlib.contextmanager
def _no_autocast(device_type: str) -> Iterator[None]:
    torch.set_autocast_enabled(device_type, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, True)


_NOTHING = contextlib.nullcontext()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[None]:
    """A scope for products in a type that the caller has chosen: autocast must not choose again inside of it."""
    on = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return _no_autocast(device_type) if on else _NOTHING


def _check(x: torch.Tensor, weight: tuple[Any, ...], lora_a: Any, lora_b: Any, columns: int) -> None:
    n, k = weight[6:8]
    torch._check(
        x.dim() == 2 and x.shape[1] == columns,
        lambda: f"expected a matrix with {columns} columns for a base weight ({n}, {k}), got {tuple(x.shape)}",
    )
    if lora_a is not None:
        torch._check(
            lora_a.dim() == 2 and lora_a.shape[1] == k,
            lambda: f"lora_a must be (R, {k}), got {tuple(lora_a.shape)}",
        )
        torch._check(
            lora_b.dim() == 2 and lora_b.shape[0] == n and lora_b.shape[1] == lora_a.shape[0],
            lambda: f"lora_b must be ({n}, {lora_a.shape[0]}), got {tuple(lora_b.shape)}",
        )


def forward(
    x: torch.Tensor,
    w: Weight,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    scale: float,
    p: float,
    seed: torch.Tensor | None,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (M, N) and u (M, R) of x (M, K) by the chosen backend, below autograd."""
    r = 0 if lora_a is None else lora_a.shape[0]
    if x.shape[0] == 0:
        return x.new_empty(0, w.shape[0], dtype=out_dtype), x.new_empty(0, r)
    dropout = None if seed is None else Dropout(p, seed)
    chosen = select(x, w, r, "forward", dropout is not None, backend)
    with without_autocast(x.device.type):
        return chosen.forward(x.contiguous(), w, lora_a, lora_b, bias, scale, dropout, out_dtype)


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    u: torch.Tensor | None,
    w: Weight,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scale: float,
    p: float,
    seed: torch.Tensor | None,
    backend: str,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx, dA and dB of dy (M, N) by the chosen backend, below autograd; None where ``needs`` is False."""
    if dy.shape[0] == 0:
        zeros = (out.zero_() for out in _empty_grads(dy, w.shape[1], lora_a, lora_b, needs))
        dx, da, db = (zero if need else None for zero, need in zip(zeros, needs, strict=True))
        return dx, da, db
    r = 0 if lora_a is None else lora_a.shape[0]
    dropout = None if seed is None else Dropout(p, seed)
    chosen = select(dy, w, r, "backward", dropout is not None, backend)
    x = None if x is None else x.contiguous()
    with without_autocast(dy.device.type):
        return chosen.backward(dy.contiguous(), x, u, w, lora_a, lora_b, scale, dropout, needs)


def _empty_grads(dy: torch.Tensor, k: Any, lora_a: Any, lora_b: Any, needs: Any) -> list[torch.Tensor]:
    """Outputs of the backward operator; one that is not needed has no elements."""
    need_dx, need_da, need_db = needs
    return [
        dy.new_empty((dy.shape[0], k) if need_dx else 0),
        torch.empty_like(lora_a, memory_format=torch.contiguous_format) if need_da else dy.new_empty(0),
        torch.empty_like(lora_b, memory_format=torch.contiguous_format) if need_db else dy.new_empty(0),
    ]


def _dequantize(*args: Any) -> torch.Tensor:
    weight, dtype = args[:_N_WEIGHT], args[_N_WEIGHT]
    return backends.dense(weight_from(weight, dtype), dtype)


def _forward_operator(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    weight, (lora_a, lora_b, *rest) = args[:_N_WEIGHT], args[_N_WEIGHT:]
    _check(x, weight, lora_a, lora_b, weight[7])
    return forward(x, weight_from(weight, x.dtype), lora_a, lora_b, *rest)


def _backward_operator(dy: torch.Tensor, x: Any, u: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    weight, (lora_a, lora_b, scale, p, seed, backend, *needs) = args[:_N_WEIGHT], args[_N_WEIGHT:]
    _check(dy, weight, lora_a, lora_b, weight[6])
    w = weight_from(weight, dy.dtype)
    grads = backward(dy, x, u, w, lora_a, lora_b, scale, p, seed, backend, (needs[0], needs[1], needs[2]))
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("lora_linear", _forward_operator, _device)
    LIBRARY.impl("lora_linear_backward", _backward_operator, _device)
    LIBRARY.impl("dequantize", _dequantize, _device)


@torch.library.register_fake("fastlora::lora_linear", lib=LIBRARY)
def _(x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    weight, (lora_a, lora_b, _, out_dtype, *_) = args[:_N_WEIGHT], args[_N_WEIGHT:]
    _check(x, weight, lora_a, lora_b, weight[7])
    r = 0 if lora_a is None else lora_a.shape[0]
    return x.new_empty(x.shape[0], weight[6], dtype=out_dtype), x.new_empty(x.shape[0], r)


@torch.library.register_fake("fastlora::lora_linear_backward", lib=LIBRARY)
def _(dy: torch.Tensor, x: Any, u: Any, *args: Any) -> tuple[torch.Tensor, ...]:
    weight, (lora_a, lora_b, *rest) = args[:_N_WEIGHT], args[_N_WEIGHT:]
    _check(dy, weight, lora_a, lora_b, weight[6])
    return tuple(_empty_grads(dy, weight[7], lora_a, lora_b, rest[-3:]))


@torch.library.register_fake("fastlora::dequantize", lib=LIBRARY)
def _(w: torch.Tensor, *args: Any) -> torch.Tensor:
    n, k, _, _, dtype = args[-5:]
    return w.new_empty((n, k), dtype=dtype)


_FORWARD_ARGS = 1 + _N_WEIGHT + 8
_A, _B, _BIAS = 1 + _N_WEIGHT, 2 + _N_WEIGHT, 3 + _N_WEIGHT


def refuse_trained_base(trained: bool) -> None:
    if trained:
        raise RuntimeError("the base weight of a fused LoRA layer is frozen: set requires_grad = False on it")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, lora_a, lora_b, bias = inputs[0], inputs[_A], inputs[_B], inputs[_BIAS]
    weight, seed = inputs[1 : 1 + _N_WEIGHT], inputs[-2]
    refuse_trained_base(ctx.needs_input_grad[1])
    u = output[1]
    ctx.mark_non_differentiable(u)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if ctx.needs_input_grad[_A] else None,
        u if ctx.needs_input_grad[_B] else None,
        *weight[:6],
        lora_a,
        lora_b,
        seed,
    )
    ctx.sizes, ctx.scale, ctx.dropout_p, ctx.backend = weight[6:], inputs[-4], inputs[-3], inputs[-1]
    ctx.dtype = x.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype


def _autograd(ctx: Any, dy: torch.Tensor | None, _: Any) -> tuple[Any, ...]:
    grads: list[Any] = [None] * _FORWARD_ARGS
    if dy is None:
        return tuple(grads)
    x, u, *weight, lora_a, lora_b, seed = ctx.saved_tensors
    needs = [ctx.needs_input_grad[i] for i in (0, _A, _B)]
    if any(needs):
        dy = dy.to(ctx.dtype)
        if u is None:
            u = dy.new_empty(dy.shape[0], 0 if lora_a is None else lora_a.shape[0])
        out = torch.ops.fastlora.lora_linear_backward(
            dy, x, u, *weight, *ctx.sizes, lora_a, lora_b, ctx.scale, ctx.dropout_p, seed, ctx.backend, *needs
        )
        for i, need, grad in zip((0, _A, _B), needs, out, strict=True):
            grads[i] = grad if need else None
    if ctx.needs_input_grad[_BIAS]:
        grads[_BIAS] = dy.sum(0, dtype=ctx.bias_dtype)
    return tuple(grads)


torch.library.register_autograd("fastlora::lora_linear", _autograd, setup_context=_setup_context, lib=LIBRARY)


def no_second_derivative(ctx: Any, *grads: Any) -> Any:
    """The backward of a backward."""
    raise RuntimeError(
        "the backward of a fused LoRA layer cannot be differentiated again; "
        "fastlora.reference.lora_linear computes the same layer with derivatives of any order"
    )


torch.library.register_autograd("fastlora::lora_linear_backward", no_second_derivative, lib=LIBRARY)


def gradients(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    u: torch.Tensor | None,
    w: Weight,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    backend: str,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx, dA and dB of dy (M, N), of the type of x, for the backward of a Function; None where ``needs`` is False."""
    if not torch.is_grad_enabled():
        return backward(dy, x, u, w, lora_a, lora_b, scale, dropout_p, seed, backend, needs)
    # Gradients that are to be differentiated again: the operator says that they cannot be.
    u = dy.new_empty(dy.shape[0], 0) if u is None else u
    context = (scale, dropout_p, seed, backend)
    found = torch.ops.fastlora.lora_linear_backward(dy, x, u, *weight_args(w), lora_a, lora_b, *context, *needs)
    dx, da, db = (grad if need else None for grad, need in zip(found, needs, strict=True))
    return dx, da, db


class _Eager(torch.autograd.Function):
    """The same node without the dispatcher, whose Python takes longer than a small layer does."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, lora_a: Any, lora_b: Any, bias: Any, w: Any, out_dtype: Any, scale: Any, p: Any, seed: Any,
        backend: Any,
    ) -> Any:  # fmt: skip
        refuse_trained_base(isinstance(w, torch.Tensor) and w.requires_grad)
        y, u = forward(x, w, lora_a, lora_b, bias, out_dtype, scale, p, seed, backend)
        _, need_da, need_db, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if need_da else None, u if need_db else None, lora_a, lora_b, seed)
        ctx.w, ctx.scale, ctx.p, ctx.backend, ctx.dtype = w, scale, p, backend, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        x, u, lora_a, lora_b, seed = ctx.saved_tensors
        need_dx, need_da, need_db, need_bias, *_ = ctx.needs_input_grad
        dx = da = db = None
        if need_dx or need_da or need_db:
            dx, da, db = gradients(
                dy.to(ctx.dtype), x, u, ctx.w, lora_a, lora_b, ctx.scale, ctx.p, seed, ctx.backend,
                (need_dx, need_da, need_db),
            )  # fmt: skip
        dbias = dy.sum(0, dtype=ctx.bias_dtype) if need_bias else None
        return dx, da, db, dbias, None, None, None, None, None, None


def freed_after_use() -> bool:
    """Whether the backward pass that runs frees what was kept for it, so that it may be written over."""
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return keeps is not None and not keeps()


def transformed() -> bool:
    """Whether a transform of `torch.func` or forward-mode differentiation is on, which knows none of these nodes."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def looked_at() -> bool:
    """Whether a compiler, a dispatch mode or a transform is to see every operator itself."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode() or transformed()


def must_dispatch(x: torch.Tensor) -> bool:
    """Whether somebody is to see the operator itself: as `looked_at`, or a tensor subclass."""
    return type(x) not in (torch.Tensor, torch.nn.Parameter) or looked_at()


def refuse_tangents(*tensors: torch.Tensor | None) -> None:
    """Raise RuntimeError where forward-mode differentiation goes through an operator, which would lose it silently."""
    if any(t is not None and forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError("a fused LoRA layer has no forward-mode derivative (jvp, jacfwd): use torch.autograd.grad")


def lora_linear(
    x: torch.Tensor,
    w: Weight,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    scale: float,
    dropout_p: float,
    seed: torch.Tensor | None,
    backend: str,
) -> torch.Tensor:
    """y (M, N) for arguments that `fastlora.linear.lora_linear` has checked; x is a matrix (M, K)."""
    if must_dispatch(x):
        refuse_tangents(x, lora_a, lora_b, bias)
        args = (x, *weight_args(w), lora_a, lora_b, bias, out_dtype, scale, dropout_p, seed, backend)
        return torch.ops.fastlora.lora_linear(*args)[0]
    if torch.is_grad_enabled():
        return _Eager.apply(x, lora_a, lora_b, bias, w, out_dtype, scale, dropout_p, seed, backend)
    return forward(x, w, lora_a, lora_b, bias, out_dtype, scale, dropout_p, seed, backend)[0]
