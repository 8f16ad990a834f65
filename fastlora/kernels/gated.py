"""The activation of a gated MLP, h = act(gate) * up, forward and backward.

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
from fastlora.kernels.tile import cast


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


def forward(gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
    """h = act(gate) * up (M, N)."""
    gate, up = with_rows(gate), with_rows(up)
    m, n = gate.shape
    h = gate.new_empty(m, n)
    tiles = config.gated()
    with on_device(gate):
        gated_kernel[(triton.cdiv(n, tiles.block_n), triton.cdiv(m, tiles.block_m))](
            gate, up, h, m, n, gate.stride(0), up.stride(0),
            ACTIVATION=activation, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, **tiles.launch(),
        )  # fmt: skip
    return h


def backward(
    gate: torch.Tensor, up: torch.Tensor, dh: torch.Tensor, activation: str, *, in_place: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dgate and dup side by side (M, 2 N), h (M, N)). ``in_place``: over gate and up, which must lie so, and dh."""
    dh = dh.contiguous()
    out, h, (gate, up, dgate, dup) = _targets(gate, up, dh, in_place)
    m, n = gate.shape
    tiles = config.gated()
    with on_device(gate):
        gated_backward_kernel[(triton.cdiv(n, tiles.block_n), triton.cdiv(m, tiles.block_m))](
            gate, up, dh, dgate, dup, h, m, n, gate.stride(0), up.stride(0), dgate.stride(0),
            ACTIVATION=activation, BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, **tiles.launch(),
        )  # fmt: skip
    return out, h


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
