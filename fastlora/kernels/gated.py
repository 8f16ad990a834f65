"""The activation of a gated MLP, h = act(gate) * up, forward and backward, with the adapters' gradients on the way.

    silu        act(g) = g sigmoid(g)
    gelu        act(g) = g (1 + erf(g / sqrt 2)) / 2
    gelu_tanh   act(g) = g (1 + tanh z) / 2 = g sigmoid(2 z),  z = sqrt(2 / pi) (g + 0.044715 g^3)

Everything is computed in float32 and rounded once. Hendrycks and Gimpel, "Gaussian error linear units" (2016);
Shazeer, "GLU variants improve transformer" (2020).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.kernels import config
from fastlora.kernels.launch import jit, on_device, with_rows
from fastlora.kernels.lora import _add_parts
from fastlora.kernels.tile import cast, dot
from fastlora.stacking import side_by_side


@triton.jit
def activate(g, ACTIVATION: tl.constexpr):
    """(act(g), act'(g)) of float32 g."""
    if ACTIVATION == "silu":
        s = tl.sigmoid(g)
        return g * s, s * (1.0 + g * (1.0 - s))
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        return g * cdf, cdf + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        s = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        slope = 1.5957691216057308 * (1.0 + 0.134145 * g * g)
        return g * s, s + g * s * (1.0 - s) * slope


@triton.jit
def product_tile(gate, up, ACTIVATION: tl.constexpr):
    """h of one tile, in the type of gate."""
    a, _ = activate(gate.to(tl.float32), ACTIVATION)
    return cast(a * up.to(tl.float32), gate.dtype)


@triton.jit
def gradient_tile(gate, up, dh, ACTIVATION: tl.constexpr):
    """(dgate, dup, h) of one tile, in the type of gate."""
    a, slope = activate(gate.to(tl.float32), ACTIVATION)
    wide_up, wide_dh = up.to(tl.float32), dh.to(tl.float32)
    dtype: tl.constexpr = gate.dtype
    return cast(wide_dh * wide_up * slope, dtype), cast(wide_dh * a, dtype), cast(a * wide_up, dtype)


@jit(do_not_specialize=["M"])
def gated_kernel(
    gate_ptr,  # (M, N), rows stride_gate apart
    up_ptr,  # (M, N), rows stride_up apart
    h_ptr,  # (M, N), contiguous
    M,
    N,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of h a program."""
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (m < M) & (n < N)
    gate = tl.load(gate_ptr + m * stride_gate + n, mask=inside, other=0.0)
    up = tl.load(up_ptr + m * stride_up + n, mask=inside, other=0.0)
    tl.store(h_ptr + m * N + n, product_tile(gate, up, ACTIVATION), mask=inside)


@jit(do_not_specialize=["M"])
def gated_backward_kernel(
    gate_ptr,  # (M, N), rows stride_gate apart
    up_ptr,  # (M, N), rows stride_up apart
    dh_ptr,  # (M, N), contiguous
    dgate_ptr,  # (M, N), rows stride_d apart; may be gate
    dup_ptr,  # (M, N), rows stride_d apart; may be up
    h_ptr,  # (M, N), contiguous; may be dh
    M,
    N,
    stride_gate,
    stride_up,
    stride_d,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of dgate, dup and h a program. A program reads all of its tile before it writes."""
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    inside = (m < M) & (n < N)
    gate = tl.load(gate_ptr + m * stride_gate + n, mask=inside, other=0.0)
    up = tl.load(up_ptr + m * stride_up + n, mask=inside, other=0.0)
    dh = tl.load(dh_ptr + m * N + n, mask=inside, other=0.0)
    dgate, dup, h = gradient_tile(gate, up, dh, ACTIVATION)
    tl.store(dgate_ptr + m * stride_d + n, dgate, mask=inside)
    tl.store(dup_ptr + m * stride_d + n, dup, mask=inside)
    tl.store(h_ptr + m * N + n, h, mask=inside)


@jit(do_not_specialize=["M", "part", "stride_part"])
def gated_gradients_kernel(
    gate_ptr,  # (M, N), rows stride_gate apart
    up_ptr,  # (M, N), rows stride_up apart
    dh_ptr,  # (M, N), contiguous
    dgate_ptr,  # (M, N), rows stride_d apart; may be gate
    dup_ptr,  # (M, N), rows stride_d apart; may be up
    u_ptr,  # (M, .), rows stride_u apart: R columns for gate, and from ``column`` on R for up
    du_ptr,  # (M, RD), rows stride_du apart: of down
    db_ptr,  # part p of (2 N, R) at p * stride_part
    da_ptr,  # part p of (RD, N) at p * stride_part
    scale_gate,
    scale_up,
    M,
    N,
    part,
    column,
    stride_gate,
    stride_up,
    stride_d,
    stride_u,
    stride_du,
    stride_part,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    R: tl.constexpr,
    RD: tl.constexpr,
):
    """dgate and dup, and over rows [p * part, (p + 1) * part) what adapters get of them and of h.

    dB_gate = scale * dgate^T u, dB_up likewise, and dA = du^T h of down. A program walks down its columns.
    """
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    first = tl.program_id(1) * part
    last = min(first + part, M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    r, s = tl.arange(0, R)[None, :], tl.arange(0, RD)[None, :]
    db_gate = tl.zeros((BLOCK_N, R), tl.float32)
    db_up = tl.zeros((BLOCK_N, R), tl.float32)
    da = tl.zeros((BLOCK_N, RD), tl.float32)
    for m0 in range(first, last, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        row, below = m[:, None].to(tl.int64), m[:, None] < last
        inside = below & (n[None, :] < N)
        gate = tl.load(gate_ptr + row * stride_gate + n[None, :], mask=inside, other=0.0)
        up = tl.load(up_ptr + row * stride_up + n[None, :], mask=inside, other=0.0)
        dh = tl.load(dh_ptr + row * N + n[None, :], mask=inside, other=0.0)
        u_gate = tl.load(u_ptr + row * stride_u + r, mask=below, other=0.0)
        u_up = tl.load(u_ptr + row * stride_u + column + r, mask=below, other=0.0)
        du = tl.load(du_ptr + row * stride_du + s, mask=below, other=0.0)
        dgate, dup, h = gradient_tile(gate, up, dh, ACTIVATION)
        tl.store(dgate_ptr + row * stride_d + n[None, :], dgate, mask=inside)
        tl.store(dup_ptr + row * stride_d + n[None, :], dup, mask=inside)
        db_gate = dot(tl.trans(dgate), cast(u_gate, dtype), db_gate)
        db_up = dot(tl.trans(dup), cast(u_up, dtype), db_up)
        da = dot(tl.trans(h), cast(du, dtype), da)
    column_inside = n[:, None] < N
    offset = tl.program_id(1).to(tl.int64) * stride_part
    wide = n[:, None].to(tl.int64)
    kind: tl.constexpr = db_ptr.dtype.element_ty
    tl.store(db_ptr + offset + wide * R + r, cast(db_gate * scale_gate, kind), mask=column_inside)
    tl.store(db_ptr + offset + (wide + N) * R + r, cast(db_up * scale_up, kind), mask=column_inside)
    target = da_ptr + offset + s.to(tl.int64) * N + wide
    tl.store(target, cast(da, da_ptr.dtype.element_ty), mask=column_inside)


WIDEST = 32
"""Columns of the factors of an adapter for which `gradients` keeps all of its sums in registers."""


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """h = act(gate) * up (M, N)."""
    gate, up = with_rows(gate), with_rows(up)
    m, n = gate.shape
    h = gate.new_empty(m, n)
    tiles = config.gated()
    with on_device(gate):
        gated_kernel[(config.cdiv(n, tiles.block_n), config.cdiv(m, tiles.block_m))](
            gate, up, h, m, n, gate.stride(0), up.stride(0),
            ACTIVATION=activation, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, **tiles.launch(),
        )  # fmt: skip
    return h


def backward(
    gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor, activation: str, *, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate and dup side by side (M, 2 N), h (M, N)). ``in_place``: over gate and up, which must lie so, and dh."""
    gate, up, dh = with_rows(gate), with_rows(up), dh.contiguous()
    out = side_by_side(gate, up, in_place=in_place)
    dgate, dup = out.chunk(2, 1)
    h = dh if in_place else torch.empty_like(dh)
    m, n = gate.shape
    tiles = config.gated()
    with on_device(gate):
        gated_backward_kernel[(config.cdiv(n, tiles.block_n), config.cdiv(m, tiles.block_m))](
            gate, up, dh, dgate, dup, h, m, n, gate.stride(0), up.stride(0), dgate.stride(0),
            ACTIVATION=activation, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, **tiles.launch(),
        )  # fmt: skip
    return out, h


def gradients(
    gate: torch.Tensor,
    up: torch.Tensor,
    dh: torch.Tensor,
    activation: str,
    u: torch.Tensor,
    scales: tuple[float, float],
    du: torch.Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    *,
    shared: bool = False,
    in_place: bool = False,
    tiles: config.TileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dgate and dup side by side (M, 2 N), dB of gate above that of up (2 N, R), dA of down (RD, N)), from one read.

    u: (M, 2 R), of gate and of up, or where ``shared`` (M, R), of both. du: (M, RD), of down. R and RD are powers of
    two from 16 to `WIDEST`. dtypes: of dB and dA. The sums over rows repeat to the bit. ``in_place`` as for
    `backward`, but dh stays.
    """
    gate, up, dh = with_rows(gate), with_rows(up), dh.contiguous()
    out = side_by_side(gate, up, in_place=in_place)
    dgate, dup = out.chunk(2, 1)
    (m, n), rd = gate.shape, du.shape[1]
    r = u.shape[1] // (1 if shared else 2)
    device = config.Device.of(gate.device)
    tiles = tiles or config.gated_gradients(r + rd, gate.dtype, device)
    grid_n = config.cdiv(n, tiles.block_n)
    part = config.split(m, tiles.block_m, max(1, grid_n // 4), device)
    parts = config.cdiv(m, part)
    db, da = gate.new_empty(2 * n, r, dtype=dtypes[0]), gate.new_empty(rd, n, dtype=dtypes[1])
    numel = db.numel() + da.numel()
    partials = gate.new_empty(parts, numel, dtype=torch.float32) if parts > 1 else None
    with on_device(gate):
        gated_gradients_kernel[(grid_n, parts)](
            gate, up, dh, dgate, dup, u, du,
            db if partials is None else partials,
            da if partials is None else partials[:, db.numel() :],
            *map(float, scales), m, n, part, 0 if shared else r,
            gate.stride(0), up.stride(0), dgate.stride(0), u.stride(0), du.stride(0), numel,
            ACTIVATION=activation, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, R=r, RD=rd, **tiles.launch(),
        )  # fmt: skip
        if partials is not None:
            _add_parts(partials, db, da)
    return out, db, da
