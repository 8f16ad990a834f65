"""The products with a side of R: u = x A^T, du = scale * dy B, dA = du^T dropout(x), dB = scale * dy^T u.

Sums over M or N that need more than one program go through float32 partials, which a second kernel adds in a fixed
order: two runs give the same bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastlora.dropout import Dropout
from fastlora.kernels import config
from fastlora.kernels.launch import jit, on_device, with_rows
from fastlora.kernels.tile import cast, dot, drop, dropout_arguments


@jit(do_not_specialize=["M", "threshold"])
def project_kernel(
    x_ptr,  # (M, K), rows stride_xm apart
    adapter_ptr,  # element (k, r) at k * stride_k + r * stride_r
    out_ptr,  # (M, R), or None
    scaled_ptr,  # (M, R), or None
    seed_ptr,
    threshold,
    gain,
    scale,
    M,
    K,
    R,
    stride_xm,
    stride_k,
    stride_r,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = dropout(x) adapter and scaled = scale * out, each rounded once."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    x_row = x_ptr + m[:, None].to(tl.int64) * stride_xm
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_row + k[None, :], mask=(m[:, None] < M) & (k[None, :] < K), other=0.0)
        if DROPOUT:
            x = drop(x, seed_ptr, threshold, gain, m, k0, BLOCK_K)
        a = tl.load(
            adapter_ptr + k[:, None].to(tl.int64) * stride_k + r[None, :].to(tl.int64) * stride_r,
            mask=(k[:, None] < K) & (r[None, :] < R),
            other=0.0,
        )
        acc = dot(x, cast(a, dtype), acc)
    target = m[:, None].to(tl.int64) * R + r[None, :]
    inside = (m[:, None] < M) & (r[None, :] < R)
    if out_ptr is not None:
        tl.store(out_ptr + target, cast(acc, dtype), mask=inside)
    if scaled_ptr is not None:
        tl.store(scaled_ptr + target, cast(acc * scale, dtype), mask=inside)


@triton.jit
def reduce_rows(
    wide_ptr,
    narrow_ptr,
    out_ptr,
    seed_ptr,
    threshold,
    gain,
    scale,
    tile_w,
    first,
    last,
    WIDE,
    R,
    stride_wide,
    stride_w,
    stride_r,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of scale * wide^T narrow over rows [first, last); the second axis of the grid is R."""
    dtype: tl.constexpr = wide_ptr.dtype.element_ty
    w0 = tile_w * BLOCK_W
    w = w0 + tl.arange(0, BLOCK_W)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_W, BLOCK_R), tl.float32)
    for m0 in range(first, last, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        row = m[:, None].to(tl.int64)
        inside = m[:, None] < last
        wide = tl.load(wide_ptr + row * stride_wide + w[None, :], mask=inside & (w[None, :] < WIDE), other=0.0)
        if DROPOUT:
            wide = drop(wide, seed_ptr, threshold, gain, m, w0, BLOCK_W)
        narrow = tl.load(narrow_ptr + row * R + r[None, :], mask=inside & (r[None, :] < R), other=0.0)
        acc = dot(tl.trans(wide), cast(narrow, dtype), acc)
    target = w[:, None].to(tl.int64) * stride_w + r[None, :].to(tl.int64) * stride_r
    values = cast(acc * scale, out_ptr.dtype.element_ty)
    tl.store(out_ptr + target, values, mask=(w[:, None] < WIDE) & (r[None, :] < R))


@jit(do_not_specialize=["M", "part", "stride_part", "threshold"])
def gradient_kernel(
    wide_ptr,  # (M, WIDE), rows stride_wide apart: dropout(x) or dy
    narrow_ptr,  # (M, R): du or u
    out_ptr,  # part p, element (w, r) at p * stride_part + w * stride_w + r * stride_r
    seed_ptr,
    threshold,
    gain,
    scale,
    M,
    WIDE,
    R,
    part,
    stride_wide,
    stride_part,
    stride_w,
    stride_r,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out = scale * wide^T narrow over rows [p * part, (p + 1) * part) of M; the axes of the grid are WIDE, R, p."""
    first = tl.program_id(2) * part
    reduce_rows(
        wide_ptr, narrow_ptr, out_ptr + tl.program_id(2).to(tl.int64) * stride_part, seed_ptr, threshold, gain, scale,
        tl.program_id(0), first, min(first + part, M), WIDE, R, stride_wide, stride_w, stride_r,
        DROPOUT, BLOCK_M, BLOCK_W, BLOCK_R,
    )  # fmt: skip


@jit(do_not_specialize=["M", "part", "stride_part", "threshold"])
def gradients_kernel(
    dy_ptr,  # (M, N), rows stride_dym apart
    u_ptr,  # (M, R)
    db_ptr,  # part p of (N, R) at p * stride_part
    x_ptr,  # (M, K), rows stride_xm apart
    du_ptr,  # (M, R)
    da_ptr,  # part p of (R, K) at p * stride_part
    seed_ptr,
    threshold,
    gain,
    scale,
    M,
    N,
    K,
    R,
    part,
    stride_dym,
    stride_xm,
    stride_part,
    DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`gradient_kernel` for dB = scale * dy^T u and dA = du^T dropout(x): its first axis has the tiles of N, then K.

    With OVERLAP it runs beside the product that made du. That one allows it no earlier than when all of du is stored
    and everything before it has ended, so all that is read here is there; what is written here was allocated while
    the operands of that product were alive, so it overlaps none of them. One program outlives the product: whatever
    follows this kernel in the stream then follows both.
    """
    first = tl.program_id(2) * part
    last = min(first + part, M)
    offset = tl.program_id(2).to(tl.int64) * stride_part
    tiles_n = tl.cdiv(N, BLOCK_W)
    if tl.program_id(0) < tiles_n:
        reduce_rows(
            dy_ptr, u_ptr, db_ptr + offset, seed_ptr, threshold, gain, scale,
            tl.program_id(0), first, last, N, R, stride_dym, R, 1, False, BLOCK_M, BLOCK_W, BLOCK_R,
        )  # fmt: skip
    else:
        reduce_rows(
            x_ptr, du_ptr, da_ptr + offset, seed_ptr, threshold, gain, 1.0,
            tl.program_id(0) - tiles_n, first, last, K, R, stride_xm, 1, K, DROPOUT, BLOCK_M, BLOCK_W, BLOCK_R,
        )  # fmt: skip
    if OVERLAP and tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        tl.extra.cuda.gdc_wait()


@jit(do_not_specialize=["M", "part", "stride_du"])
def du_db_kernel(
    dy_ptr,  # (M, N), rows stride_dym apart
    u_ptr,  # (M, R)
    b_ptr,  # (N, R), rows stride_bn apart
    du_ptr,  # (parts of N, M, R), parts stride_du apart
    db_ptr,  # (tiles of M, N, R)
    scale,
    M,
    N,
    R,
    part,
    stride_dym,
    stride_bn,
    stride_du,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """du = scale * dy B over one part of N, and scale * dy^T u over one tile of M, from one read of dy."""
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    r = tl.arange(0, BLOCK_R)
    row = m[:, None].to(tl.int64)
    narrow = (m[:, None] < M) & (r[None, :] < R)
    u = cast(tl.load(u_ptr + row * R + r[None, :], mask=narrow, other=0.0), dtype)
    db_part = db_ptr + tl.program_id(0).to(tl.int64) * N * R
    first = tl.program_id(1) * part
    last = min(first + part, N)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for n0 in range(first, last, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        dy = tl.load(dy_ptr + row * stride_dym + n[None, :], mask=(m[:, None] < M) & (n[None, :] < last), other=0.0)
        inside = (n[:, None] < last) & (r[None, :] < R)
        b = tl.load(b_ptr + n[:, None].to(tl.int64) * stride_bn + r[None, :], mask=inside, other=0.0)
        acc = dot(dy, cast(b, dtype), acc)
        db = dot(tl.trans(dy), u, tl.zeros((BLOCK_N, BLOCK_R), tl.float32))
        target = db_part + n[:, None].to(tl.int64) * R + r[None, :]
        tl.store(target, cast(db * scale, db_ptr.dtype.element_ty), mask=inside)
    du_part = du_ptr + tl.program_id(1).to(tl.int64) * stride_du
    tl.store(du_part + row * R + r[None, :], cast(acc * scale, du_ptr.dtype.element_ty), mask=narrow)


@jit(do_not_specialize=["parts", "numel", "inside"])
def add_parts_kernel(parts_ptr, out_ptr, beyond_ptr, parts, numel, inside, BLOCK: tl.constexpr):
    """The sum of (parts, numel) over its first side, first part first: ``inside`` elements to out, the rest beyond."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    part_ptr = parts_ptr + i
    for _ in range(parts):
        acc += tl.load(part_ptr, mask=i < numel, other=0.0)
        part_ptr += numel
    tl.store(out_ptr + i, cast(acc, out_ptr.dtype.element_ty), mask=i < inside)
    if beyond_ptr is not None:
        beyond = (i >= inside) & (i < numel)
        tl.store(beyond_ptr + i - inside, cast(acc, beyond_ptr.dtype.element_ty), mask=beyond)


def _partials(parts: int, out: torch.Tensor) -> torch.Tensor:
    """Where ``parts`` programs write their share of ``out``: ``out`` itself when there is one."""
    return out if parts == 1 else torch.empty(parts, *out.shape, dtype=torch.float32, device=out.device)


def _add_parts(partials: torch.Tensor, out: torch.Tensor, beyond: torch.Tensor | None = None) -> torch.Tensor:
    """Fill ``out``, and ``beyond`` with what follows it in each part, with the sum of the parts."""
    if partials is not out:
        tiles, numel = config.add_parts(), partials[0].numel()
        add_parts_kernel[(config.cdiv(numel, tiles.block_n),)](
            partials, out, beyond, partials.shape[0], numel, out.numel(), BLOCK=tiles.block_n, **tiles.launch()
        )
    return out


def _project(
    x: torch.Tensor, adapter: torch.Tensor, out: torch.Tensor | None, scaled: torch.Tensor, scale: float,
    dropout: Dropout | None,
) -> None:  # fmt: skip
    """``adapter`` is (K, R) in any strides."""
    (m, k), r = x.shape, adapter.shape[1]
    tiles = config.project(m, r, x.dtype, config.Device.of(x.device))
    with on_device(x):
        project_kernel[(config.cdiv(m, tiles.block_m), config.cdiv(r, tiles.block_r))](
            x_ptr=x,
            adapter_ptr=adapter,
            out_ptr=out,
            scaled_ptr=scaled,
            scale=float(scale),
            M=m,
            K=k,
            R=r,
            stride_xm=x.stride(0),
            stride_k=adapter.stride(0),
            stride_r=adapter.stride(1),
            BLOCK_M=tiles.block_m,
            BLOCK_K=tiles.block_k,
            BLOCK_R=tiles.block_r,
            **dropout_arguments(dropout),
            **tiles.launch(),
        )


def project_x(
    x: torch.Tensor, lora_a: torch.Tensor, scale: float, dropout: Dropout | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """u = dropout(x) A^T and scale * u, (M, R) each, for x (M, K) and lora_a (R, K)."""
    u, scaled = (x.new_empty(x.shape[0], lora_a.shape[0]) for _ in range(2))
    _project(with_rows(x), lora_a.T, u, scaled, scale, dropout)
    return u, scaled


def project_dy(dy: torch.Tensor, lora_b: torch.Tensor, scale: float) -> torch.Tensor:
    """du = scale * (dy B), (M, R), for dy (M, N) and lora_b (N, R)."""
    du = dy.new_empty(dy.shape[0], lora_b.shape[1])
    _project(with_rows(dy), lora_b, None, du, scale, None)
    return du


def _gradient(
    wide: torch.Tensor, narrow: torch.Tensor, out: torch.Tensor, stride_w: int, stride_r: int, scale: float,
    dropout: Dropout | None,
) -> torch.Tensor:  # fmt: skip
    wide, narrow = with_rows(wide), narrow.contiguous()
    (m, columns), r = wide.shape, narrow.shape[1]
    device = config.Device.of(wide.device)
    tiles = config.gradient(r, wide.dtype, device)
    grid_w, grid_r = config.cdiv(columns, tiles.block_n), config.cdiv(r, tiles.block_r)
    part = config.split(m, tiles.block_m, grid_w * grid_r, device)
    parts = config.cdiv(m, part)
    partials = _partials(parts, out)
    with on_device(wide):
        gradient_kernel[(grid_w, grid_r, parts)](
            wide_ptr=wide,
            narrow_ptr=narrow,
            out_ptr=partials,
            scale=float(scale),
            M=m,
            WIDE=columns,
            R=r,
            part=part,
            stride_wide=wide.stride(0),
            stride_part=out.numel(),
            stride_w=stride_w,
            stride_r=stride_r,
            BLOCK_M=tiles.block_m,
            BLOCK_W=tiles.block_n,
            BLOCK_R=tiles.block_r,
            **dropout_arguments(dropout),
            **tiles.launch(),
        )
        return _add_parts(partials, out)


def gradient_a(du: torch.Tensor, x: torch.Tensor, dropout: Dropout | None, dtype: torch.dtype) -> torch.Tensor:
    """dA = du^T dropout(x), (R, K) of ``dtype``, for du (M, R) and x (M, K)."""
    da = x.new_empty(du.shape[1], x.shape[1], dtype=dtype)
    return _gradient(x, du, da, 1, x.shape[1], 1.0, dropout)


def gradient_b(dy: torch.Tensor, u: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """dB = scale * (dy^T u), (N, R) of ``dtype``, for dy (M, N) and u (M, R)."""
    db = dy.new_empty(dy.shape[1], u.shape[1], dtype=dtype)
    return _gradient(dy, u, db, u.shape[1], 1, scale, None)


class Gradients:
    """dB = scale * (dy^T u), (N, R), and dA = du^T dropout(x), (R, K), in one pass over both wide matrices.

    All but du is made ready here, before the product that makes du: a launch that overlaps that product must share no
    memory with what it reads, and read nothing that was written by a kernel between the two.
    """

    def __init__(
        self, dy: torch.Tensor, u: torch.Tensor, x: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor
    ) -> None:
        self.dy, self.u, self.x = with_rows(dy), u.contiguous(), with_rows(x)
        (m, n), k, self.r = dy.shape, x.shape[1], lora_a.shape[0]
        device = config.Device.of(dy.device)
        self.tiles = tiles = config.gradient(self.r, dy.dtype, device)
        grid_w, grid_r = (
            config.cdiv(n, tiles.block_n) + config.cdiv(k, tiles.block_n),
            config.cdiv(self.r, tiles.block_r),
        )
        self.part = config.split(m, tiles.block_m, grid_w * grid_r, device)
        self.grid = (grid_w, grid_r, config.cdiv(m, self.part))
        self.da = dy.new_empty(self.r, k, dtype=lora_a.dtype)
        self.db = dy.new_empty(n, self.r, dtype=lora_b.dtype)
        self.numel = self.db.numel() + self.da.numel()
        self.partials = None
        if self.grid[2] > 1:
            self.partials = dy.new_empty(self.grid[2], self.numel, dtype=torch.float32)

    def run(
        self, du: torch.Tensor, scale: float, dropout: Dropout | None, *, overlap: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(dA, dB) for a contiguous du (M, R). ``overlap``: the product that makes du, launched last, may still run."""
        tiles, partials = self.tiles, self.partials
        (m, n), k = self.dy.shape, self.x.shape[1]
        options = tiles.launch() | ({"launch_pdl": True} if overlap else {})
        with on_device(self.dy):
            gradients_kernel[self.grid](
                dy_ptr=self.dy,
                u_ptr=self.u,
                db_ptr=self.db if partials is None else partials,
                x_ptr=self.x,
                du_ptr=du,
                da_ptr=self.da if partials is None else partials[:, self.db.numel() :],
                scale=float(scale),
                M=m,
                N=n,
                K=k,
                R=self.r,
                part=self.part,
                stride_dym=self.dy.stride(0),
                stride_xm=self.x.stride(0),
                stride_part=self.numel,
                BLOCK_M=tiles.block_m,
                BLOCK_W=tiles.block_n,
                BLOCK_R=tiles.block_r,
                OVERLAP=overlap,
                **dropout_arguments(dropout),
                **options,
            )
            if partials is not None:
                _add_parts(partials, self.db, self.da)
        return self.da, self.db


def du_db(dy: torch.Tensor, u: torch.Tensor, lora_b: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """du (M, R) and dB (N, R), from one read of dy where the rank allows it. dB has lora_b's dtype."""
    device = config.Device.of(dy.device)
    r = u.shape[1]
    tiles = config.one_pass(r, dy.dtype, device)
    if tiles is None:
        return project_dy(dy, lora_b, scale), gradient_b(dy, u, scale, lora_b.dtype)
    dy, u, lora_b = with_rows(dy), u.contiguous(), with_rows(lora_b)
    m, n = dy.shape
    tiles_m = config.cdiv(m, tiles.block_m)
    part = config.split(n, tiles.block_n, tiles_m, device)
    parts = config.cdiv(n, part)
    du, db = dy.new_empty(m, r), dy.new_empty(n, r, dtype=lora_b.dtype)
    du_parts, db_parts = _partials(parts, du), _partials(tiles_m, db)
    with on_device(dy):
        du_db_kernel[(tiles_m, parts)](
            dy_ptr=dy,
            u_ptr=u,
            b_ptr=lora_b,
            du_ptr=du_parts,
            db_ptr=db_parts,
            scale=float(scale),
            M=m,
            N=n,
            R=r,
            part=part,
            stride_dym=dy.stride(0),
            stride_bn=lora_b.stride(0),
            stride_du=m * r,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_R=tiles.block_r,
            **tiles.launch(),
        )
        return _add_parts(du_parts, du), _add_parts(db_parts, db)


def gradients(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    u: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    scale: float,
    dropout: Dropout | None,
    needs: tuple[bool, bool, bool],
    du: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(du, dA, dB), those that the gradients in ``needs`` take; ``du`` is given where something else made it."""
    need_dx, need_da, need_db = needs
    da = db = None
    if du is None and (need_dx or need_da):
        one_pass = config.one_pass(lora_a.shape[0], dy.dtype, config.Device.of(dy.device)) is not None
        if need_db and (one_pass or not need_da):
            du, db = du_db(dy, u, lora_b, scale)
            need_db = False
        else:
            du = project_dy(dy, lora_b, scale)
    if need_da and need_db:
        assert x is not None and du is not None
        return du, *Gradients(dy, u, x, lora_a, lora_b).run(du, scale, dropout)
    if need_da:
        assert x is not None and du is not None
        da = gradient_a(du, x, dropout, lora_a.dtype)
    if need_db:
        db = gradient_b(dy, u, scale, lora_b.dtype)
    return du, da, db
