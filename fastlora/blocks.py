"""Several projections of one x as one node, and the gated MLP as one node.

    y_i = x W_i^T + scale_i * (x A_i^T) B_i^T + bias_i                        q, k and v; gate and up
    y   = down(h),  h = act(gate(x)) * up(x)                                  the gated MLP

What the layers would compute one by one, with less of it: every base weight is dequantized in one launch into one
transient buffer, x and each dy are read once for all adapters, and dx is one product instead of a sum of them. The MLP
keeps x, gate(x) and up(x) for its backward pass, and makes h again.

While a compiler, a dispatch mode or a transform looks on, a group is one registered operator, which keeps x alone and
projects it again for the backward pass; the MLP is two of them with the activation, in PyTorch, between.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastlora import activation as plain
from fastlora import backends, groups, native, ops, recomputed
from fastlora.groups import Each, Form, Needs, Projection, Stacked, kernels
from fastlora.linear import _autocast, check_out_dtype, lora_linear
from fastlora.nf4 import QUANT_TYPES

__all__ = ["Projection", "gated_mlp", "lora_linears", "stacks"]

_PER_PROJECTION = 3
"""Tensors of a projection that an autograd node takes: lora_a, lora_b, bias."""


def _tensors(projections: Sequence[Projection]) -> list[torch.Tensor | None]:
    return [t for p in projections for t in (p.lora_a, p.lora_b, p.bias)]


def _needs(flags: Sequence[bool], dx: bool) -> Needs:
    return Needs(dx, tuple(flags[0::_PER_PROJECTION]), tuple(flags[1::_PER_PROJECTION]))


def _interleave(
    das: Sequence[torch.Tensor | None], dbs: Sequence[torch.Tensor | None], dys: Sequence[torch.Tensor],
    projections: Sequence[Projection], flags: Sequence[bool],
) -> list[torch.Tensor | None]:  # fmt: skip
    """The gradients of `_tensors`."""
    grads: list[torch.Tensor | None] = []
    for i, p in enumerate(projections):
        need_bias = flags[_PER_PROJECTION * i + 2] and p.bias is not None
        grads += [das[i], dbs[i], dys[i].sum(0, dtype=p.bias.dtype) if need_bias and p.bias is not None else None]
    return grads


def _refuse_trained_base(projections: Sequence[Projection]) -> None:
    for p in projections:
        ops.refuse_trained_base(isinstance(p.w, torch.Tensor) and p.w.requires_grad)


class _Once(torch.autograd.Function):
    """Gradients that are to be differentiated again, joined to what they depend on: an error says that they cannot."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Any) -> Any:
        return tuple(None if grad is None else grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        ops.no_second_derivative(ctx)


def _once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that cannot be differentiated, and says so when that is tried."""

    @functools.wraps(backward)
    def wrapped(ctx: Any, *dys: Any) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *dys)
        with torch.no_grad():
            grads = backward(ctx, *dys)
        return _Once.apply(len(grads), *grads, *dys, *ctx.saved_tensors)

    return wrapped


class _Group(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Any, projections: Any, out_dtype: Any, form: Any, apart: Any, *tensors: Any) -> Any:
        _refuse_trained_base(projections)
        with ops.without_autocast(x.device.type):
            ys, kept = form.forward(x, projections, out_dtype)
        needs = _needs(ctx.needs_input_grad[5:], ctx.needs_input_grad[0])
        ctx.set_materialize_grads(False)
        ctx.kept = len(kept)
        ctx.save_for_backward(x if any(needs.da) else None, *(kept if any(needs.db) else [None] * len(kept)), *tensors)
        ctx.projections, ctx.form, ctx.dtype = [_without_tensors(p) for p in projections], form, x.dtype
        ctx.rows = x.shape[0]
        apart = apart if any(ctx.needs_input_grad) else ()
        # ``data``: parts of one buffer that are versioned apart, so that a change of one in place leaves the others.
        return tuple(_alone(y) if i in apart else y.data for i, y in enumerate(ys))

    @staticmethod
    @_once
    def backward(ctx: Any, *dys: Any) -> Any:
        x, *rest = ctx.saved_tensors
        kept, tensors = rest[: ctx.kept], rest[ctx.kept :]
        projections = _with_tensors(ctx.projections, tensors)
        flags = ctx.needs_input_grad[5:]
        needs = _needs(flags, ctx.needs_input_grad[0])
        some = next((dy for dy in dys if dy is not None), None)
        if some is None:
            return (None,) * (5 + len(flags))
        parts = [
            some.new_zeros(ctx.rows, p.w.shape[0]) if dy is None else dy for dy, p in zip(dys, projections, strict=True)
        ]
        dx, das, dbs = None, [None] * len(parts), [None] * len(parts)
        if needs.dx or any(needs.da) or any(needs.db):
            with ops.without_autocast(some.device.type):
                dx, das, dbs = ctx.form.backward(parts, x, kept, projections, needs, ctx.dtype)
        return dx, None, None, None, None, *_interleave(das, dbs, parts, projections, flags)


def _alone(y: torch.Tensor) -> torch.Tensor:
    """y in memory of its own."""
    shared = y.untyped_storage().nbytes() > y.numel() * y.element_size()
    return y.clone(memory_format=torch.contiguous_format) if shared else y.data


def _without_tensors(p: Projection) -> Projection:
    """What a node may hold itself; the tensors of the adapters go through ``save_for_backward``."""
    return Projection(p.w, scale=p.scale)


def _with_tensors(projections: Sequence[Projection], tensors: Sequence[Any]) -> list[Projection]:
    parts = (tensors[_PER_PROJECTION * i :] for i in range(len(projections)))
    return [Projection(p.w, part[0], part[1], part[2], p.scale) for p, part in zip(projections, parts, strict=True)]


@dataclasses.dataclass
class _Middle:
    """What the two nodes of a gated MLP hand each other beside tensors that autograd keeps."""

    gate: torch.Tensor | None = None
    up: torch.Tensor | None = None
    kept: Sequence[torch.Tensor | None] = (None,)
    """Of down, from the end of the forward pass."""


class _GatedMLP(torch.autograd.Function):
    """gate and up of x, and the whole backward pass.

    What it returns has no values, only the shape of y: `_Down` makes y of it, keeps nothing, and hands dy back. So
    when a checkpoint computes a block again, what the backward pass needs is complete before down is multiplied, and
    where nothing after the MLP is needed either PyTorch stops there.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Any, middle: Any, inner: Any, down: Any, activation: Any, out_dtype: Any, form: Any, *tensors: Any
    ) -> Any:
        _refuse_trained_base([*inner, down])
        with ops.without_autocast(x.device.type):
            again = None
            if isinstance(form, Stacked) and recomputed.running():
                again = form.adapters(inner, x)
                ys, inner_kept = form.forward(x, inner, None, again, keep=True)
            else:
                ys, inner_kept = form.forward(x, inner, None)
        middle.gate, middle.up = gate, up = _halves(ys)
        if again is not None:
            recomputed.hand_over(gate, again)
        needs = _needs(ctx.needs_input_grad[7:-_PER_PROJECTION], True)
        ctx.save_for_backward(
            x if any(needs.da) else None,
            gate,
            up,
            *(inner_kept if any(needs.db) else [None] * len(inner_kept)),
            *tensors,
        )
        ctx.middle, ctx.kept = middle, len(inner_kept)
        ctx.inner, ctx.down = [_without_tensors(p) for p in inner], _without_tensors(down)
        ctx.activation, ctx.form, ctx.dtype = activation, form, x.dtype
        return x.new_empty((), dtype=out_dtype or x.dtype).expand(x.shape[0], down.w.shape[0])

    @staticmethod
    @_once
    def backward(ctx: Any, dy: Any) -> Any:
        x, gate, up, *rest = ctx.saved_tensors
        inner_kept, tensors = rest[: ctx.kept], rest[ctx.kept :]
        *inner, down = _with_tensors([*ctx.inner, ctx.down], tensors)
        flags = ctx.needs_input_grad[7:]
        inner_flags, down_flags = flags[:-_PER_PROJECTION], flags[-_PER_PROJECTION:]
        inner_needs = _needs(inner_flags, ctx.needs_input_grad[0])
        below = inner_needs.dx or any(inner_flags)
        down_needs = _needs(down_flags, below or down_flags[0] or down_flags[1])
        with ops.without_autocast(dy.device.type):
            dx, inner_grads, down_grads = _mlp_backward(
                dy.to(ctx.dtype), x, gate, up, inner_kept, ctx.middle.kept, inner, down, ctx.activation, ctx.form,
                inner_needs, down_needs, (inner_flags, down_flags),
            )  # fmt: skip
        if ops.freed_after_use():
            ctx.middle.kept = (None,)
        return dx, None, None, None, None, None, None, *inner_grads, *down_grads


class _Down(torch.autograd.Function):
    """The rest of the forward pass of a gated MLP."""

    @staticmethod
    def forward(ctx: Any, shape: Any, middle: Any, down: Any, activation: Any, out_dtype: Any, form: Any) -> Any:
        gate, up = middle.gate, middle.up
        middle.gate = middle.up = None
        with ops.without_autocast(gate.device.type):
            if isinstance(form, Stacked):
                adapters = form.adapters([down], gate)
                h, u = _activated(gate, up, activation, adapters)
                (y,), kept = form.forward(h, [down], out_dtype, adapters, u)
            else:
                compute = kernels("gated").forward if _on_kernels(gate) else plain.forward
                (y,), kept = form.forward(compute(gate, up, activation), [down], out_dtype)
        if ctx.needs_input_grad[0] and down.lora_b is not None and down.lora_b.requires_grad:
            middle.kept = kept
        return y.data

    @staticmethod
    def backward(ctx: Any, dy: Any) -> Any:
        return dy, None, None, None, None, None


def _on_kernels(x: torch.Tensor) -> bool:
    """Whether the activation is a Triton kernel where the products are not."""
    return x.is_cuda and x.dtype in backends.COMPUTE_DTYPES and backends.this_machine().triton is None


def _activated(
    gate: torch.Tensor, up: torch.Tensor, activation: str, adapters: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """h, and u of down with these packed adapters where the same pass makes it."""
    if native.gates(gate, up, adapters.span):
        return native.gated_forward(gate, up, activation, adapters.a)
    return kernels("gated").forward(gate, up, activation), None


def _halves(ys: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """gate and up of two projections, or of one that makes both side by side."""
    if len(ys) == 2:
        return ys[0], ys[1]
    gate, up = ys[0].chunk(2, dim=1)
    return gate, up


def _mlp_backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    gate: torch.Tensor,
    up: torch.Tensor,
    inner_kept: Sequence[Any],
    down_kept: Sequence[Any],
    inner: Sequence[Projection],
    down: Projection,
    activation: str,
    form: Form,
    inner_needs: Needs,
    down_needs: Needs,
    flags: tuple[Sequence[bool], Sequence[bool]],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """dx, and the gradients of the tensors of gate and up, and of down."""
    dtype = dy.dtype
    first = Needs(True, (False,), (False,))
    if isinstance(form, Stacked):
        stacked, gated = kernels("stacked"), kernels("gated")
        adapters, inner_adapters = form.adapters([down], dy), recomputed.take(gate) or form.adapters(inner, dy)
        of_down = form.kinds([down])
        dy, du, db_down = form.output_side(
            [dy], down_kept[0] if down_needs.db[0] else None, adapters, of_down[1], dtype
        )
        dh = stacked.input_gradient(dy, du, [down.w], adapters)
        in_place = ops.freed_after_use() and groups.as_one([gate, up]) is not None
        last = Needs(False, down_needs.da, (down_needs.db[0] and db_down is None,))
        together, known = _together(inner_adapters, adapters, inner_needs, down_needs), None
        if together:
            kinds = form.kinds(inner)[1], of_down[0]
            scales = inner_adapters.scales[0], inner_adapters.scales[-1]
            u, shared = inner_kept[0], len(inner) == 1
            if native.gates(gate, up, inner_adapters.span, adapters.span):
                d, inner_du, db, da = native.gated_gradients(
                    gate, up, dh, activation, u, scales, du, inner_adapters.b, kinds, shared=shared, in_place=in_place
                )
                known = d, inner_du
            else:
                d, db, da = gated.gradients(
                    gate, up, dh, activation, u, scales, du, kinds, shared=shared, in_place=in_place
                )
            last = dataclasses.replace(last, da=(False,))
            inner_needs = dataclasses.replace(inner_needs, db=(False,) * len(inner))
            h = None
        else:
            d, h = gated.backward(gate, up, dh, activation, in_place=in_place)
        _, das, dbs = form.backward([dy], h, down_kept, [down], last, dtype, adapters, (dy, du))
        del dh, h
        parts = groups.columns(d, groups.sizes(inner))
        dx, inner_das, inner_dbs = form.backward(parts, x, inner_kept, inner, inner_needs, dtype, inner_adapters, known)
        if db_down is not None:
            dbs = form.gradients_b(db_down, adapters, [down])
        if together:
            das = form.gradients_a(da, adapters, [down])
            inner_dbs = form.gradients_b(db, inner_adapters, inner)
    else:
        dh, _, _ = form.backward([dy], None, down_kept, [down], first, dtype)
        assert dh is not None
        if _on_kernels(dy):
            d, h = kernels("gated").backward(gate, up, dh, activation)
            parts = groups.columns(d, groups.sizes(inner))
        else:
            dgate, dup, h = plain.backward(gate, up, dh, activation)
            parts = [dgate, dup] if len(inner) == 2 else [torch.cat((dgate, dup), 1)]
        das, dbs = [None], [None]
        if down_needs.da[0] or down_needs.db[0]:
            last = Needs(False, down_needs.da, down_needs.db)
            _, das, dbs = form.backward([dy], h, down_kept, [down], last, dtype)
        dx, inner_das, inner_dbs = form.backward(parts, x, inner_kept, inner, inner_needs, dtype)
    inner_grads = _interleave(inner_das, inner_dbs, parts, inner, flags[0])
    return dx, inner_grads, _interleave(das, dbs, [dy], [down], flags[1])


def _together(inner: Any, down: Any, inner_needs: Needs, down_needs: Needs) -> bool:
    """Whether the pass over the activation makes dB of gate and up and dA of down as well, of packed adapters."""
    widest = kernels("gated").WIDEST
    fits = 0 < inner.span <= widest and 0 < down.span <= widest
    return fits and all(inner_needs.db) and down_needs.da[0]


# -- the registered operator ---------------------------------------------------------------------------------------

_OPERANDS = "Tensor[] w, Tensor?[] statistics, SymInt[] shapes, int[] formats, Tensor[] adapters"
"""For each projection: its weight, five statistics of a packed one, (N, K), (blocksize, place in `_QUANT_TYPES`), and
lora_a, lora_b and bias. Autograd takes no list with gaps: an absent one is a vector without elements."""
_QUANT_TYPES = (None, *QUANT_TYPES)
_STATISTICS = 5
_LIB = ops.LIBRARY
_LIB.define(f"lora_linears(Tensor x, {_OPERANDS}, ScalarType? out_dtype, str backend) -> Tensor", tags=ops.TAGS)
_LIB.define(
    f"lora_linears_backward(Tensor dy, Tensor x, {_OPERANDS}, str backend, bool need_dx, bool[] needs) "
    "-> (Tensor, Tensor[])",
    tags=ops.TAGS,
)


def _operator(
    x: torch.Tensor, projections: Sequence[Projection], out_dtype: torch.dtype | None, backend: str
) -> torch.Tensor:
    """y (..., sum of N_i) by the registered operator."""
    ops.refuse_tangents(x, *(t for p in projections for t in (p.lora_a, p.lora_b, p.bias)))
    rows = x.reshape(-1, x.shape[-1])
    args = [ops.weight_args(p.w) for p in projections]
    adapters: list[torch.Tensor] = []
    absent = x.new_empty(0)
    for p in projections:
        # A number that reaches an opaque operator would be a constant of a compiled graph: see `linear._run`.
        scaled = None if p.lora_b is None else p.lora_b * p.scale
        adapters += [absent if t is None else t for t in (p.lora_a, scaled, p.bias)]
    y = torch.ops.fastlora.lora_linears(
        rows,
        [weight[0] for weight in args],
        [t for weight in args for t in weight[1 : 1 + _STATISTICS]],
        [side for p in projections for side in p.w.shape],
        [number for weight in args for number in (weight[-2], _QUANT_TYPES.index(weight[-1]))],
        adapters,
        out_dtype,
        backend,
    )
    return y.view(*x.shape[:-1], y.shape[1])


def _given(operands: Sequence[Any], dtype: torch.dtype) -> list[Projection]:
    """The projections of an operator's `_OPERANDS`."""
    w, statistics, shapes, formats, adapters = operands
    found = []
    for i, weight in enumerate(w):
        blocksize, kind = formats[2 * i], _QUANT_TYPES[formats[2 * i + 1]]
        args = (*statistics[_STATISTICS * i :][:_STATISTICS], *shapes[2 * i : 2 * i + 2], blocksize, kind)
        lora_a, lora_b, bias = (None if _is_absent(t) else t for t in adapters[_PER_PROJECTION * i :][:_PER_PROJECTION])
        found.append(Projection(ops.weight_from((weight, *args), dtype), lora_a, lora_b, bias))
    return found


def _is_absent(t: torch.Tensor) -> bool:
    return t.dim() == 1 and t.shape[0] == 0


def _width(shapes: Sequence[Any]) -> Any:
    return sum(shapes[0::2])


def _operator_forward(x: torch.Tensor, *args: Any) -> torch.Tensor:
    *operands, out_dtype, backend = args
    projections = _given(operands, x.dtype)
    if x.shape[0] == 0:
        return x.new_empty(0, _width(operands[2]), dtype=out_dtype)
    x = x.contiguous()
    with ops.without_autocast(x.device.type):
        ys, _ = groups.form(x, projections, backend).forward(x, projections, out_dtype)
    whole = groups.as_one(ys)
    return torch.cat(ys, 1) if whole is None else whole


def _operator_backward(dy: torch.Tensor, x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    *operands, backend, need_dx, needs = args
    projections = _given(operands, x.dtype)
    dx, grads = _empty_grads(x, operands[4], need_dx, needs)
    if x.shape[0] == 0:
        return dx, [grad.zero_() for grad in grads]
    x = x.contiguous()
    wanted = Needs(need_dx, tuple(needs[0::2]), tuple(needs[1::2]))
    form = groups.form(x, projections, backend)
    with ops.without_autocast(x.device.type):
        # Without dB nothing reads them.
        kept = form.project(x, projections) if any(wanted.db) else [x] * len(projections)
        parts = groups.columns(dy, groups.sizes(projections))
        made, das, dbs = form.backward(parts, x, kept, projections, wanted, x.dtype)
    found = [grad for pair in zip(das, dbs, strict=True) for grad in pair]
    return dx if made is None else made, [
        empty if grad is None else grad for grad, empty in zip(found, grads, strict=True)
    ]


def _empty_grads(
    x: torch.Tensor, adapters: Sequence[Any], need_dx: bool, needs: Sequence[bool]
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Outputs of the backward operator; one that is not needed has no elements."""
    factors = [t for i, t in enumerate(adapters) if i % _PER_PROJECTION < 2]
    grads = [
        torch.empty_like(t, memory_format=torch.contiguous_format) if need else x.new_empty(0)
        for t, need in zip(factors, needs, strict=True)
    ]
    return x.new_empty(x.shape if need_dx else 0), grads


for _device in ("CPU", "CUDA"):
    _LIB.impl("lora_linears", _operator_forward, _device)
    _LIB.impl("lora_linears_backward", _operator_backward, _device)


@torch.library.register_fake("fastlora::lora_linears", lib=_LIB)
def _(x: torch.Tensor, *args: Any) -> torch.Tensor:
    return x.new_empty(x.shape[0], _width(args[2]), dtype=args[5])


@torch.library.register_fake("fastlora::lora_linears_backward", lib=_LIB)
def _(dy: torch.Tensor, x: torch.Tensor, *args: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return _empty_grads(x, args[4], *args[-2:])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, w, statistics, shapes, formats, adapters, _, backend = inputs
    ops.refuse_trained_base(any(t.requires_grad for t in w))
    ctx.save_for_backward(x, *w, *statistics, *adapters)
    ctx.shapes, ctx.formats, ctx.backend, ctx.dtype = shapes, formats, backend, x.dtype


def _autograd(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
    x, *tensors = ctx.saved_tensors
    p = len(ctx.formats) // 2
    w, statistics, adapters = tensors[:p], tensors[p : p + _STATISTICS * p], tensors[p + _STATISTICS * p :]
    flags = ctx.needs_input_grad[5]
    need_dx, needs = ctx.needs_input_grad[0], [flag for i, flag in enumerate(flags) if i % _PER_PROJECTION < 2]
    dx, grads = None, [None] * len(needs)
    if need_dx or any(needs):
        dx, grads = torch.ops.fastlora.lora_linears_backward(
            dy.to(ctx.dtype), x, w, statistics, ctx.shapes, ctx.formats, adapters, ctx.backend, need_dx, needs
        )
    biases = zip(dy.split(ctx.shapes[0::2], dim=1), adapters[2::_PER_PROJECTION], strict=True)
    found: list[Any] = []
    for i, (part, bias) in enumerate(biases):
        found += [grad if need else None for grad, need in zip(grads[2 * i :][:2], needs[2 * i :][:2], strict=True)]
        need_bias = flags[_PER_PROJECTION * i + 2] and not _is_absent(bias)
        found.append(part.sum(0, dtype=bias.dtype) if need_bias else None)
    return dx if need_dx else None, [None] * p, None, None, None, found, None, None


torch.library.register_autograd("fastlora::lora_linears", _autograd, setup_context=_setup_context, lib=_LIB)
torch.library.register_autograd("fastlora::lora_linears_backward", ops.no_second_derivative, lib=_LIB)


def _check(x: torch.Tensor, projections: Sequence[Projection], k: int) -> None:
    if not projections:
        raise ValueError("a group needs at least one projection")
    if x.dim() == 0 or x.shape[-1] != k:
        raise ValueError(f"the last dimension of x must be in_features = {k}, got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"x must be floating-point, got {x.dtype}")
    for i, p in enumerate(projections):
        n = p.w.shape[0]
        if p.w.shape[1] != projections[0].w.shape[1]:
            raise ValueError(f"projection {i} has in_features {p.w.shape[1]}, the first {projections[0].w.shape[1]}")
        for name, t in (("x", x), ("lora_a", p.lora_a), ("lora_b", p.lora_b), ("bias", p.bias)):
            if t is not None and t.device != p.w.device:
                raise ValueError(f"{name} is on {t.device}, the base weight of projection {i} on {p.w.device}")
        if (p.lora_a is None) != (p.lora_b is None):
            raise ValueError(f"projection {i}: give both lora_a and lora_b, or neither")
        if p.lora_a is not None and p.lora_b is not None:
            r = p.lora_a.shape[0]
            if tuple(p.lora_a.shape) != (r, p.w.shape[1]) or tuple(p.lora_b.shape) != (n, r):
                raise ValueError(
                    f"projection {i}: for a base weight {tuple(p.w.shape)} the adapters must be "
                    f"lora_a (R, {p.w.shape[1]}) and lora_b ({n}, R); "
                    f"got {tuple(p.lora_a.shape)} and {tuple(p.lora_b.shape)}"
                )
        if p.bias is not None and tuple(p.bias.shape) != (n,):
            raise ValueError(f"projection {i}: bias must have shape ({n},), got {tuple(p.bias.shape)}")


def stacks(x: torch.Tensor, projections: Sequence[Projection], backend: str = "auto") -> bool:
    """Whether `lora_linears` would compute the projections of x (..., K) together, rather than one by one."""
    if ops.must_dispatch(x) or x.numel() == 0:
        return False
    return not isinstance(groups.form(x.reshape(-1, x.shape[-1]), projections, backend), Each)


def lora_linears(
    x: torch.Tensor,
    projections: Sequence[Projection],
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
    apart: Sequence[int] = (),
) -> tuple[torch.Tensor, ...]:
    """``[x W_i^T + scale_i * (x A_i^T) B_i^T + bias_i]`` for projections that share x, as one node.

    x: (..., K), any strides. projections: one or more, each with its own base weight (N_i, K), packed or dense, its own
    adapter of any rank or none, and its own bias. The types are those of `fastlora.lora_linear`, ``out_dtype`` too.
    backend: as there; "triton" and "auto" stack the weights where that was measured to be faster, "torch" always.

    apart: places of those whose result, where a gradient is wanted, is to have memory of its own: what keeps it for a
    backward pass then does not keep the others with it.

    Returns one (..., N_i) for each, parts of one buffer where the weights are stacked. Raises ValueError for
    shapes, types or devices that do not fit, RuntimeError when the named backend cannot run.
    """
    _check(x, projections, projections[0].w.shape[1] if projections else 0)
    x = _autocast(x)
    check_out_dtype(out_dtype, x.dtype)
    if ops.must_dispatch(x):
        return tuple(_operator(x, projections, out_dtype, backend).split(groups.sizes(projections), dim=-1))
    if x.numel() == 0:
        return tuple(
            lora_linear(x, p.w, p.lora_a, p.lora_b, p.bias, scale=p.scale, out_dtype=out_dtype, backend=backend)
            for p in projections
        )
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    form = groups.form(rows, projections, backend)
    apart = apart if torch.is_grad_enabled() else ()  # a node cannot see that from inside
    ys = _Group.apply(rows, projections, out_dtype, form, apart, *_tensors(projections))
    return tuple(y.view(*x.shape[:-1], y.shape[1]) for y in ys)


def gated_mlp(
    x: torch.Tensor,
    inner: Sequence[Projection],
    down: Projection,
    activation: str = "silu",
    *,
    out_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """``down(act(gate(x)) * up(x))`` as one node that keeps x, gate(x) and up(x).

    x: (..., K). inner: the projections gate and up, (I, K) each, or one (2 I, K) that makes both, gate first.
    down: (K', I). activation: one of `fastlora.activation.ACTIVATIONS`. Everything inside is computed and kept in the
    type of x (under autocast: in its type); the others as for `lora_linears`.

    Returns (..., K'). Raises ValueError for shapes, types or devices that do not fit.
    """
    if activation not in plain.ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; choose from {', '.join(plain.ACTIVATIONS)}")
    _check(x, inner, inner[0].w.shape[1] if inner else 0)
    made = groups.sizes(inner)
    halves = made if len(made) == 2 else [size // 2 for size in made * 2]
    if len(made) > 2 or halves != [down.w.shape[1]] * 2 or (len(made) == 1 and made[0] % 2):
        raise ValueError(
            f"down takes {down.w.shape[1]} features; gate and up must make as many each, in one projection or two, "
            f"got {made}"
        )
    _check(x.new_empty(0, down.w.shape[1]), [down], down.w.shape[1])
    x = _autocast(x)
    check_out_dtype(out_dtype, x.dtype)
    if ops.must_dispatch(x) or x.numel() == 0:
        gate, up = _operator(x, inner, None, backend).chunk(2, dim=-1)
        return _operator(plain.forward(gate, up, activation), [down], out_dtype, backend)
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    form = groups.form(rows, inner, backend)
    if isinstance(form, Stacked) and not isinstance(_down_form(rows, down, backend), Stacked):
        form = Each(backend)
    middle, tensors = _Middle(), _tensors([*inner, down])
    shape = _GatedMLP.apply(rows, middle, tuple(inner), down, activation, out_dtype, form, *tensors)
    y = _Down.apply(shape, middle, down, activation, out_dtype, form)
    return y.view(*x.shape[:-1], y.shape[1])


def _down_form(rows: torch.Tensor, down: Projection, backend: str) -> Form:
    # Only the sizes of what it multiplies count.
    return groups.form(rows.new_empty(1).expand(rows.shape[0], down.w.shape[1]), [down], backend)
