"""Several projections of one x: one stacked weight, one product each way, one pass for all adapters.

The weights W_i (N_i, K) lie one below the other. Their adapters are packed in the type computed in, each to one width:
A is (P S, K) and B is (sum N, P S), block diagonal and multiplied by the scales, where S is the largest rank rounded up
to whole tiles. So u = x A^T is one pass over x, y = x W^T + u B^T one product, du = dy B one pass over dy, and
dx = dy W + du A one product again.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from fastlora import decoded
from fastlora.kernels import config
from fastlora.kernels.decode import check_dtype
from fastlora.kernels.dequantize import dequantize, dequantize_stacked
from fastlora.kernels.gemm import gemm, unaligned
from fastlora.kernels.launch import jit, on_device, with_rows
from fastlora.kernels.lora import _add_parts, _project
from fastlora.kernels.tile import cast, dot
from fastlora.nf4 import NF4Weight, Weight
from fastlora.stacking import as_one

MOST = 4
"""Projections that one launch takes."""
_ONES = (1.0,) * MOST
"""Scales of projections that are not there."""


@triton.jit
def pack_pair(
    a_ptr, b_ptr, a_out_ptr, b_out_ptr, scale, which, row, N, K, R, stride_ar, stride_bn, S, WIDTH, tile, tiles_k,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One tile of A, or of B from the tile ``tiles_k`` on, of projection ``which``, whose first row is ``row``."""
    dtype: tl.constexpr = a_out_ptr.dtype.element_ty
    if tile < tiles_k:
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        for r0 in range(0, S, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            source = r[:, None].to(tl.int64) * stride_ar + k[None, :]
            a = tl.load(a_ptr + source, mask=(r[:, None] < R) & (k[None, :] < K), other=0.0)
            target = (which * S + r[:, None]).to(tl.int64) * K + k[None, :]
            tl.store(a_out_ptr + target, cast(a, dtype), mask=(r[:, None] < S) & (k[None, :] < K))
    else:
        n = (tile - tiles_k) * BLOCK_N + tl.arange(0, BLOCK_N)
        for c0 in range(0, WIDTH, BLOCK_R):
            c = c0 + tl.arange(0, BLOCK_R)
            r = c - which * S
            mine = (r[None, :] >= 0) & (r[None, :] < R)
            source = n[:, None].to(tl.int64) * stride_bn + r[None, :]
            b = tl.load(b_ptr + source, mask=mine & (n[:, None] < N), other=0.0)
            target = (row + n[:, None]).to(tl.int64) * WIDTH + c[None, :]
            inside = (n[:, None] < N) & (c[None, :] < WIDTH)
            tl.store(b_out_ptr + target, cast(b.to(tl.float32) * scale, dtype), mask=inside)


@jit()
def pack_kernel(
    a0_ptr, a1_ptr, a2_ptr, a3_ptr,  # (R_i, K), rows stride_a apart
    b0_ptr, b1_ptr, b2_ptr, b3_ptr,  # (N_i, R_i), rows stride_b apart
    a_ptr,  # (P S, K): out
    b_ptr,  # (sum of N_i, P S): out
    scale0, scale1, scale2, scale3,
    n0, n1, n2, n3,
    r0, r1, r2, r3,
    stride_a0, stride_a1, stride_a2, stride_a3,
    stride_b0, stride_b1, stride_b2, stride_b3,
    K,
    S,
    WIDTH,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Both packed adapters; the second axis of the grid is the projection."""
    tile, which = tl.program_id(0), tl.program_id(1)
    tiles_k = tl.cdiv(K, BLOCK_K)
    if which == 0:
        pack_pair(
            a0_ptr, b0_ptr, a_ptr, b_ptr, scale0, 0, 0, n0, K, r0, stride_a0, stride_b0, S, WIDTH, tile, tiles_k,
            BLOCK_K, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    elif which == 1:
        pack_pair(
            a1_ptr, b1_ptr, a_ptr, b_ptr, scale1, 1, n0, n1, K, r1, stride_a1, stride_b1, S, WIDTH, tile, tiles_k,
            BLOCK_K, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    elif which == 2:
        pack_pair(
            a2_ptr, b2_ptr, a_ptr, b_ptr, scale2, 2, n0 + n1, n2, K, r2, stride_a2, stride_b2, S, WIDTH, tile,
            tiles_k, BLOCK_K, BLOCK_N, BLOCK_R,
        )  # fmt: skip
    else:
        pack_pair(
            a3_ptr, b3_ptr, a_ptr, b_ptr, scale3, 3, n0 + n1 + n2, n3, K, r3, stride_a3, stride_b3, S, WIDTH, tile,
            tiles_k, BLOCK_K, BLOCK_N, BLOCK_R,
        )  # fmt: skip


@triton.jit
def pick(which, v0, v1, v2, v3):
    """The one of four values that belongs to projection ``which``."""
    return tl.where(which == 0, v0, tl.where(which == 1, v1, tl.where(which == 2, v2, v3)))


@jit(do_not_specialize=["M"])
def project_stacked_kernel(
    dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr,  # (M, N_i), rows stride apart, of one type
    b_ptr,  # (sum of N_i, P S), block diagonal
    du_ptr,  # (M, P S)
    copy_ptr,  # (M, sum of N_i): all dy side by side, or None
    M,
    n0, n1, n2, n3,
    S,
    WIDTH,
    stride0, stride1, stride2, stride3,
    stride_copy,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """du = dy B of every projection, and dy in one matrix, from one read; the second axis is the projection."""
    dtype: tl.constexpr = du_ptr.dtype.element_ty
    which = tl.program_id(1)
    row = pick(which, 0, n0, n0 + n1, n0 + n1 + n2)
    size = pick(which, n0, n1, n2, n3)
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = which * S + r
    dy_row = pick(which, dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr)
    dy_row += m[:, None].to(tl.int64) * pick(which, stride0, stride1, stride2, stride3)
    rows = tl.where(tl.program_id(2) == 0, M, 0)  # of the copy: the first tile of R makes it
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for first in range(0, size, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        dy = tl.load(dy_row + n[None, :], mask=(m[:, None] < M) & (n[None, :] < size), other=0.0)
        dy = cast(dy, dtype)
        b = tl.load(
            b_ptr + (row + n[:, None]).to(tl.int64) * WIDTH + column[None, :],
            mask=(n[:, None] < size) & (r[None, :] < S),
            other=0.0,
        )
        acc = dot(dy, b, acc)
        if copy_ptr is not None:
            target = copy_ptr + m[:, None].to(tl.int64) * stride_copy + row + n[None, :]
            tl.store(target, dy, mask=(m[:, None] < rows) & (n[None, :] < size))
    target = du_ptr + m[:, None].to(tl.int64) * WIDTH + column[None, :]
    tl.store(target, cast(acc, dtype), mask=(m[:, None] < M) & (r[None, :] < S))


@jit(do_not_specialize=["M", "part", "stride_part"])
def gradients_stacked_kernel(
    dy_ptr,  # (M, sum of N_i), rows stride_dym apart
    u_ptr,  # (M, P S)
    db_ptr,  # part p of (sum of N_i, S) at p * stride_part
    x_ptr,  # (M, K), rows stride_xm apart
    du_ptr,  # (M, P S)
    da_ptr,  # part p of (P S, K) at p * stride_part
    scale0, scale1, scale2, scale3,
    M,
    n0, n1, n2, n3,
    K,
    S,
    WIDTH,
    tiles_n,
    part,
    stride_dym,
    stride_xm,
    stride_part,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """dB_i = scale_i * dy_i^T u_i and dA = du^T x over rows [p * part, (p + 1) * part) of M.

    The axes of the grid are the tiles of N_0, N_1, ... (``tiles_n`` of them) and then of K; tiles of R; and p.
    """
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    first = tl.program_id(2) * part
    last = min(first + part, M)
    offset = tl.program_id(2).to(tl.int64) * stride_part
    tile = tl.program_id(0)
    if tile < tiles_n:
        t1 = tl.cdiv(n0, BLOCK_W)
        t2 = t1 + tl.cdiv(n1, BLOCK_W)
        t3 = t2 + tl.cdiv(n2, BLOCK_W)
        which = (tile >= t1).to(tl.int32) + (tile >= t2).to(tl.int32) + (tile >= t3).to(tl.int32)
        scale = pick(which, scale0, scale1, scale2, scale3)
        row = pick(which, 0, n0, n0 + n1, n0 + n1 + n2)
        size = pick(which, n0, n1, n2, n3)
        n = (tile - pick(which, 0, t1, t2, t3)) * BLOCK_W + tl.arange(0, BLOCK_W)
        r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        if tl.program_id(1) * BLOCK_R < S:
            acc = tl.zeros((BLOCK_W, BLOCK_R), tl.float32)
            for m0 in range(first, last, BLOCK_M):
                m = m0 + tl.arange(0, BLOCK_M)
                at = m[:, None].to(tl.int64)
                inside = m[:, None] < last
                dy = tl.load(dy_ptr + at * stride_dym + row + n[None, :], mask=inside & (n[None, :] < size), other=0.0)
                u = tl.load(u_ptr + at * WIDTH + which * S + r[None, :], mask=inside & (r[None, :] < S), other=0.0)
                acc = dot(tl.trans(dy), cast(u, dtype), acc)
            target = db_ptr + offset + (row + n[:, None]).to(tl.int64) * S + r[None, :]
            values = cast(acc * scale, db_ptr.dtype.element_ty)
            tl.store(target, values, mask=(n[:, None] < size) & (r[None, :] < S))
    else:
        k = (tile - tiles_n) * BLOCK_W + tl.arange(0, BLOCK_W)
        s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
        if tl.program_id(1) * BLOCK_S < WIDTH:
            acc = tl.zeros((BLOCK_W, BLOCK_S), tl.float32)
            for m0 in range(first, last, BLOCK_M):
                m = m0 + tl.arange(0, BLOCK_M)
                at = m[:, None].to(tl.int64)
                inside = m[:, None] < last
                x = tl.load(x_ptr + at * stride_xm + k[None, :], mask=inside & (k[None, :] < K), other=0.0)
                du = tl.load(du_ptr + at * WIDTH + s[None, :], mask=inside & (s[None, :] < WIDTH), other=0.0)
                acc = dot(tl.trans(x), cast(du, x_ptr.dtype.element_ty), acc)
            target = da_ptr + offset + s[None, :].to(tl.int64) * K + k[:, None]
            values = cast(acc, da_ptr.dtype.element_ty)
            tl.store(target, values, mask=(k[:, None] < K) & (s[None, :] < WIDTH))


class _Layout(NamedTuple):
    """How the adapters of a group are packed."""

    span: int
    """S"""
    width: int
    """P S"""
    grid: tuple[int, int]
    tiles: config.TileConfig


@functools.lru_cache(maxsize=1024)
def _layout(sizes: tuple[int, ...], k: int, rank: int) -> _Layout:
    """For projections to N_i features from K, the largest rank of whose adapters is not 0."""
    block = config.power_of_two(rank, 16, 64)
    span, tiles = config.cdiv(rank, block) * block, config.pack(block)
    grid = config.cdiv(k, tiles.block_k) + config.cdiv(max(sizes), tiles.block_n)
    return _Layout(span, len(sizes) * span, (grid, len(sizes)), tiles)


class Adapters:
    """The adapters of up to `MOST` projections, packed: ``a`` (P S, K) and ``b`` (sum N, P S), see above.

    shapes: (N_i, K) of the base weights. like: any tensor of the type computed in, on their device.
    Without any adapter ``width`` is 0, and ``a`` and ``b`` are None.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[int, int]],
        lora_a: Sequence[torch.Tensor | None],
        lora_b: Sequence[torch.Tensor | None],
        scales: Sequence[float],
        like: torch.Tensor,
    ) -> None:
        k = shapes[0][1]
        self.sizes, self.scales = tuple([n for n, _ in shapes]), tuple(map(float, scales))
        self.ranks = [0 if a is None else a.shape[0] for a in lora_a]
        rank = max(self.ranks)
        self.a: torch.Tensor | None = None
        self.b: torch.Tensor | None = None
        self.dense: torch.Tensor | None = None
        """W (sum N, K), where `forward` was to keep it for `input_gradient`."""
        self.span = self.width = 0
        if not rank:
            return
        self.span, self.width, grid, tiles = _layout(self.sizes, k, rank)
        self.a, self.b = like.new_empty(self.width, k), like.new_empty(sum(self.sizes), self.width)
        # An adapter that is absent has no columns, and a projection no programs: any pointer will do.
        some = self.ranks.index(rank)
        any_a, any_b = lora_a[some], lora_b[some]
        assert any_a is not None
        assert any_b is not None
        full_a = [with_rows(any_a if a is None else a) for a in lora_a]
        full_b = [with_rows(any_b if b is None else b) for b in lora_b]
        missing = MOST - len(self.sizes)
        full_a, full_b, padding = full_a + full_a[:1] * missing, full_b + full_b[:1] * missing, (0,) * missing
        with on_device(like):
            pack_kernel[grid](
                *full_a,
                *full_b,
                self.a,
                self.b,
                *self.scales,
                *_ONES[:missing],
                *self.sizes,
                *padding,
                *self.ranks,
                *padding,
                *[a.stride(0) for a in full_a],
                *[b.stride(0) for b in full_b],
                k,
                self.span,
                self.width,
                BLOCK_K=tiles.block_k,
                BLOCK_N=tiles.block_n,
                BLOCK_R=tiles.block_r,
                **tiles.launch(),
            )


def stack(weights: Sequence[Weight], dtype: torch.dtype) -> torch.Tensor:
    """The base weights (N_i, K) one below the other, dense, (sum N, K), not to be changed: one launch where all of them
    are packed, none where a copy is kept."""
    packed = [w for w in weights if isinstance(w, NF4Weight)]
    if len(packed) == len(weights):
        kept = decoded.find(packed, dtype)
        if kept is not None:
            return kept
        return dequantize_stacked(packed, dtype) if len(packed) > 1 else dequantize(packed[0], dtype)
    if len(weights) == 1:
        assert isinstance(weights[0], torch.Tensor)
        return weights[0].to(dtype)
    out = torch.empty(sum(w.shape[0] for w in weights), weights[0].shape[1], dtype=dtype, device=weights[0].device)
    row = 0
    for w in weights:
        part = out[row : row + w.shape[0]]
        row += w.shape[0]
        if isinstance(w, NF4Weight):
            dequantize(w, dtype, part)
        else:
            part.copy_(w)
    return out


def project(x: torch.Tensor, adapters: Adapters) -> torch.Tensor:
    """u = x A^T (M, P S)."""
    if adapters.a is None:
        return x.new_empty(x.shape[0], 0)
    u = x.new_empty(x.shape[0], adapters.width)
    _project(with_rows(x), adapters.a.T, None, u, 1.0, None)
    return u


def project_gradients(
    dys: Sequence[torch.Tensor], adapters: Adapters, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """All of dy as one matrix (M, sum N) of ``dtype``, and du = dy B (M, P S), from one read."""
    m, n = dys[0].shape[0], sum(adapters.sizes)
    dy = as_one(dys)
    fits = dy is not None and dy.dtype == dtype and not unaligned(dy)
    if adapters.b is None:
        joined = dy if fits and dy is not None else torch.cat([part.to(dtype) for part in dys], 1)
        return joined, joined.new_empty(m, 0)
    copy = None if fits else torch.empty(m, n, dtype=dtype, device=dys[0].device)
    alike = len({part.dtype for part in dys}) == 1
    dys = [with_rows(part if alike else part.to(dtype)) for part in dys]
    du = torch.empty(m, adapters.width, dtype=dtype, device=dys[0].device)
    p = len(dys)
    tiles = config.project(m * p, adapters.span, dtype, config.Device.of(du.device))
    full, padding = [*dys, *(dys[0] for _ in range(MOST - p))], (0,) * (MOST - p)
    with on_device(du):
        project_stacked_kernel[(config.cdiv(m, tiles.block_m), p, config.cdiv(adapters.span, tiles.block_r))](
            *full,
            adapters.b,
            du,
            copy,
            m,
            *adapters.sizes,
            *padding,
            adapters.span,
            adapters.width,
            *(part.stride(0) for part in full),
            n,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_k,
            BLOCK_R=tiles.block_r,
            **tiles.launch(),
        )
    if copy is None:
        assert dy is not None
        return dy, du
    return copy, du


def gradients(
    dy: torch.Tensor,
    u: torch.Tensor | None,
    x: torch.Tensor | None,
    du: torch.Tensor,
    adapters: Adapters,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """dA (P S, K) and dB (sum N, S), of the types given, in one pass: no dA without x, no dB without u. Repeatable."""
    m, n = dy.shape
    k = 0 if x is None else x.shape[1]
    device = config.Device.of(dy.device)
    tiles = config.gradient(adapters.width, dy.dtype, device)
    block_r = min(config.power_of_two(adapters.span, 16, 64), tiles.block_r)
    tiles_n = 0 if u is None else sum(config.cdiv(size, tiles.block_n) for size in adapters.sizes)
    grid_w = tiles_n + config.cdiv(k, tiles.block_n)
    grid_r = max(config.cdiv(adapters.span, block_r), config.cdiv(adapters.width, tiles.block_r) if k else 1)
    part = config.split(m, tiles.block_m, grid_w * grid_r, device)
    parts = config.cdiv(m, part)
    db = dy.new_empty(n, adapters.span, dtype=dtype_b) if u is not None else None
    da = dy.new_empty(adapters.width, k, dtype=dtype_a) if x is not None else None
    numel_b = 0 if db is None else db.numel()
    numel = numel_b + (0 if da is None else da.numel())
    partials = dy.new_empty(parts, numel, dtype=torch.float32) if parts > 1 else None
    wide, padding = dy if x is None else with_rows(x), (0,) * (MOST - len(adapters.sizes))
    with on_device(dy):
        gradients_stacked_kernel[(grid_w, grid_r, parts)](
            dy,
            du if u is None else u,
            (db if db is not None else da) if partials is None else partials,
            wide,
            du,
            (da if da is not None else db) if partials is None else partials[:, numel_b:],
            *adapters.scales,
            *_ONES[: len(padding)],
            m,
            *adapters.sizes,
            *padding,
            k,
            adapters.span,
            adapters.width,
            tiles_n,
            part,
            dy.stride(0),
            wide.stride(0),
            numel,
            BLOCK_M=tiles.block_m,
            BLOCK_W=tiles.block_n,
            BLOCK_R=block_r,
            BLOCK_S=tiles.block_r,
            **tiles.launch(),
        )
        if partials is not None:
            first, second = (db, da) if db is not None else (da, None)
            assert first is not None
            _add_parts(partials, first, second)
    return da, db


def unsupported(x: torch.Tensor, weights: Sequence[Weight]) -> str | None:
    """Why `forward` and `backward` cannot compute these projections of x (M, K), or None."""
    if len(weights) > MOST:
        return f"more than {MOST} projections"
    if x.dtype.itemsize != 2:
        return f"{x.dtype} is not a 16-bit type"
    if x.shape[1] % 8 or any(w.shape[0] % 8 for w in weights):
        return "sizes are not multiples of 8"
    return None


def forward(
    x: torch.Tensor,
    weights: Sequence[Weight],
    adapters: Adapters,
    biases: Sequence[torch.Tensor | None],
    out_dtype: torch.dtype | None = None,
    u: torch.Tensor | None = None,
    *,
    keep: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (M, sum N), of ``out_dtype`` or x's type, and u (M, P S), for x (M, K).

    u: given where something else made it. keep: leave W in ``adapters.dense``.
    """
    check_dtype(x.dtype)
    x = x.clone() if unaligned(x) else x
    u = project(x, adapters) if u is None else u
    # After the pass over x: the product then finds W in the cache.
    dense = stack(weights, x.dtype)
    dense = dense.clone() if unaligned(dense) else dense
    adapters.dense = dense if keep else None
    narrow, b = (u, adapters.b) if adapters.width else (None, None)
    y = gemm(
        x,
        dense,
        narrow,
        b,
        _bias(biases, adapters.sizes, x),
        transposed=True,
        out_dtype=out_dtype,
        sizes=adapters.sizes if adapters.width else (),
    )
    return y, u


def _bias(biases: Sequence[torch.Tensor | None], sizes: Sequence[int], x: torch.Tensor) -> torch.Tensor | None:
    given = [bias for bias in biases if bias is not None]
    if not given:
        return None
    if len(biases) == 1:
        return given[0]
    dtype = given[0].dtype if len({bias.dtype for bias in given}) == 1 else torch.float32
    zeros = (x.new_zeros(size, dtype=dtype) for size in sizes)
    return torch.cat([zero if bias is None else bias.to(dtype) for bias, zero in zip(biases, zeros, strict=True)])


def input_gradient(dy: torch.Tensor, du: torch.Tensor, weights: Sequence[Weight], adapters: Adapters) -> torch.Tensor:
    """dx = dy W + du A (M, K) for dy (M, sum N) and du (M, P S): one product for all projections.

    W is taken out of ``adapters.dense`` where `forward` left it.
    """
    dense, adapters.dense = adapters.dense, None
    if dense is None:
        dense = stack(weights, dy.dtype)
    dense = dense.clone() if unaligned(dense) else dense
    narrow, a = (du, adapters.a) if adapters.width else (None, None)
    return gemm(dy, dense, narrow, a, transposed=False)


def backward(
    dy: torch.Tensor,
    du: torch.Tensor,
    x: torch.Tensor | None,
    u: torch.Tensor | None,
    weights: Sequence[Weight],
    adapters: Adapters,
    dtypes: tuple[torch.dtype, torch.dtype],
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, list[torch.Tensor | None], list[torch.Tensor | None]]:
    """dx (M, K), and dA_i (R_i, K) and dB_i (N_i, R_i) of ``dtypes``, for dy (M, sum N) and du (M, P S).

    None where not needed.
    """
    need_dx, need_da, need_db = needs
    dx = input_gradient(dy, du, weights, adapters) if need_dx else None
    p = len(adapters.sizes)
    das: list[torch.Tensor | None] = [None] * p
    dbs: list[torch.Tensor | None] = [None] * p
    need_da, need_db = need_da and adapters.width > 0, need_db and adapters.width > 0
    if need_da or need_db:
        da, db = gradients(dy, u if need_db else None, x if need_da else None, du, adapters, *dtypes)
        das = das if da is None else apart_a(da, adapters)
        dbs = dbs if db is None else apart_b(db, adapters)
    return dx, das, dbs


def apart_a(da: torch.Tensor, adapters: Adapters) -> list[torch.Tensor | None]:
    """dA_i (R_i, K) of dA (P S, K), None where there is no adapter."""
    starts = range(0, adapters.width, adapters.span)
    return [da[i : i + r] if r else None for i, r in zip(starts, adapters.ranks, strict=True)]


def apart_b(db: torch.Tensor, adapters: Adapters) -> list[torch.Tensor | None]:
    """dB_i (N_i, R_i) of dB (sum N, S), None where there is no adapter."""
    rows = [0, *itertools.accumulate(adapters.sizes)]
    return [db[rows[i] : rows[i + 1], :r].contiguous() if r else None for i, r in enumerate(adapters.ranks)]
