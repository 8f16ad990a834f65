"""The activation of a gated MLP, h = act(gate) * up, forward and backward, alone or with the adapters that read it.

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
from fastlora.kernels.tile import cast, dot


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


@jit(do_not_specialize=["M"])
def gated_project_kernel(
    gate_ptr,  # (M, N), rows stride_gate apart
    up_ptr,  # (M, N), rows stride_up apart
    h_ptr,  # (M, N), contiguous
    a_ptr,  # (R, N), contiguous
    u_ptr,  # (M, R)
    M,
    N,
    R,
    stride_gate,
    stride_up,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """All columns of BLOCK_M rows of h, and of u = h A^T, a program; the first of the second axis stores h."""
    dtype: tl.constexpr = h_ptr.dtype.element_ty
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    rows = tl.where(tl.program_id(1) == 0, M, 0)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = (m < M) & (n[None, :] < N)
        gate = tl.load(gate_ptr + m * stride_gate + n[None, :], mask=inside, other=0.0)
        up = tl.load(up_ptr + m * stride_up + n[None, :], mask=inside, other=0.0)
        a = tl.load(
            a_ptr + r[None, :].to(tl.int64) * N + n[:, None], mask=(r[None, :] < R) & (n[:, None] < N), other=0.0
        )
        h = product_tile(gate, up, ACTIVATION)
        tl.store(h_ptr + m * N + n[None, :], h, mask=(m < rows) & (n[None, :] < N))
        acc = dot(h, a, acc)
    tl.store(u_ptr + m * R + r[None, :], cast(acc, dtype), mask=(m < M) & (r[None, :] < R))


@jit(do_not_specialize=["M"])
def gated_backward_project_kernel(
    gate_ptr,  # (M, N), rows stride_gate apart
    up_ptr,  # (M, N), rows stride_up apart
    dh_ptr,  # (M, N), contiguous
    dgate_ptr,  # (M, N), rows stride_d apart; may be gate
    dup_ptr,  # (M, N), rows stride_d apart; may be up
    h_ptr,  # (M, N), contiguous; may be dh
    b_gate_ptr,  # (N, S), rows stride_b apart
    b_up_ptr,  # (N, S), rows stride_b apart
    du_gate_ptr,  # (M, S), rows stride_du apart
    du_up_ptr,  # (M, S), rows stride_du apart
    M,
    N,
    S,
    stride_gate,
    stride_up,
    stride_d,
    stride_b,
    stride_du,
    JOINED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """`gated_backward_kernel` of BLOCK_M rows with du = dgate B_gate and du = dup B_up; JOINED: one du, their sum."""
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M))[:, None].to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    acc_gate = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    acc_up = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        inside = (m < M) & (n[None, :] < N)
        gate = tl.load(gate_ptr + m * stride_gate + n[None, :], mask=inside, other=0.0)
        up = tl.load(up_ptr + m * stride_up + n[None, :], mask=inside, other=0.0)
        dh = tl.load(dh_ptr + m * N + n[None, :], mask=inside, other=0.0)
        at = n[:, None].to(tl.int64) * stride_b + r[None, :]
        narrow = (n[:, None] < N) & (r[None, :] < S)
        b_gate = tl.load(b_gate_ptr + at, mask=narrow, other=0.0)
        b_up = tl.load(b_up_ptr + at, mask=narrow, other=0.0)
        dgate, dup, h = gradient_tile(gate, up, dh, ACTIVATION)
        tl.store(dgate_ptr + m * stride_d + n[None, :], dgate, mask=inside)
        tl.store(dup_ptr + m * stride_d + n[None, :], dup, mask=inside)
        tl.store(h_ptr + m * N + n[None, :], h, mask=inside)
        acc_gate = dot(dgate, b_gate, acc_gate)
        if JOINED:
            acc_gate = dot(dup, b_up, acc_gate)
        else:
            acc_up = dot(dup, b_up, acc_up)
    target, mask = m * stride_du + r[None, :], (m < M) & (r[None, :] < S)
    tl.store(du_gate_ptr + target, cast(acc_gate, dtype), mask=mask)
    if not JOINED:
        tl.store(du_up_ptr + target, cast(acc_up, dtype), mask=mask)


WIDEST = 64
"""Rank up to which the backward pass holds the sums of both projections beside its tiles."""


def forward(
    gate: torch.Tensor, up: torch.Tensor, activation: str, lora_a: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """h = act(gate) * up (M, N), and u = h A^T (M, R) where ``lora_a`` (R, N), of gate's type, is given."""
    gate, up = with_rows(gate), with_rows(up)
    m, n = gate.shape
    h = gate.new_empty(m, n)
    with on_device(gate):
        if lora_a is None:
            tiles = config.gated_plain()
            gated_kernel[(triton.cdiv(n, tiles.block_n), triton.cdiv(m, tiles.block_m))](
                gate, up, h, m, n, gate.stride(0), up.stride(0),
                ACTIVATION=activation, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, **tiles.launch(),
            )  # fmt: skip
            return h, None
        r = lora_a.shape[0]
        u = gate.new_empty(m, r)
        tiles = config.gated(m, r, gate.dtype, config.Device.of(gate.device))
        gated_project_kernel[(triton.cdiv(m, tiles.block_m), triton.cdiv(r, tiles.block_r))](
            gate, up, h, lora_a.contiguous(), u, m, n, r, gate.stride(0), up.stride(0),
            ACTIVATION=activation, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_R=tiles.block_r,
            **tiles.launch(),
        )  # fmt: skip
        return h, u


def backward(
    gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor, activation: str, *, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate and dup side by side (M, 2 N), h (M, N)). ``in_place``: over gate and up, which must lie so, and dh."""
    dh = dh.contiguous()
    out, h, (gate, up, dgate, dup) = _targets(gate, up, dh, in_place)
    m, n = gate.shape
    tiles = config.gated_plain()
    with on_device(gate):
        gated_backward_kernel[(triton.cdiv(n, tiles.block_n), triton.cdiv(m, tiles.block_m))](
            gate, up, dh, dgate, dup, h, m, n, gate.stride(0), up.stride(0), dgate.stride(0),
            ACTIVATION=activation, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, **tiles.launch(),
        )  # fmt: skip
    return out, h


def backward_project(
    gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor, activation: str, b: torch.Tensor, parts: int,
    *, in_place: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`backward`, and du (M, parts S) of the projections that made gate and up.

    ``b`` (2 N, parts S): their adapters, block diagonal for ``parts`` = 2 projections, one for a joint one. S is at
    most `WIDEST`.
    """
    dh = dh.contiguous()
    out, h, (gate, up, dgate, dup) = _targets(gate, up, dh, in_place)
    (m, n), s = gate.shape, b.shape[1] // parts
    du = gate.new_empty(m, b.shape[1])
    tiles = config.gated(m, s, gate.dtype, config.Device.of(gate.device))
    last = (parts - 1) * s
    with on_device(gate):
        gated_backward_project_kernel[(triton.cdiv(m, tiles.block_m),)](
            gate, up, dh, dgate, dup, h, b, b[n:, last:], du, du[:, last:], m, n, s,
            gate.stride(0), up.stride(0), dgate.stride(0), b.stride(0), du.stride(0),
            JOINED=parts == 1, ACTIVATION=activation, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n,
            BLOCK_R=tiles.block_r, **tiles.launch(),
        )  # fmt: skip
    return out, du, h


def _targets(
    gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor, in_place: bool
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
    """Where dgate and dup, one matrix, and h go; and gate, up, dgate and dup with contiguous rows."""
    m, n = gate.shape
    if in_place:
        out, h = gate.as_strided((m, 2 * n), (gate.stride(0), 1)), dh
        return out, h, (gate, up, gate, up)
    gate, up = with_rows(gate), with_rows(up)
    out = gate.new_empty(m, 2 * n)
    return out, torch.empty_like(dh), (gate, up, out[:, :n], out[:, n:])
