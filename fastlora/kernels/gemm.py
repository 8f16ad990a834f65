"""The product of a training step: a dense 16-bit weight, the LoRA term in its accumulator, one rounding.

Persistent programs read their tiles through the tensor memory accelerator (compute capability 9.0 and later) and
multiply the LoRA factors as the last step of a tile: y = x W^T + s B^T + bias with s = scale * u, or dx = dy W + du A.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels import config
from fastlora.kernels.launch import describe, interpreted, jit, on_device
from fastlora.kernels.tile import cast, dot, grouped


@triton.jit
def finish_tile(acc, bias_ptr, y_desc, m0, n0, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add the bias to a tile of y, round it and store it."""
    if bias_ptr is not None:
        n = n0 + tl.arange(0, BLOCK_N)
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    # In two halves: a whole tile would not fit in shared memory beside the pipeline.
    left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
    y_desc.store([m0, n0], cast(left, y_desc.dtype))
    y_desc.store([m0, n0 + BLOCK_N // 2], cast(right, y_desc.dtype))


@jit(do_not_specialize=["M"])
def gemm_kernel(
    x_desc,  # (M, K)
    w_desc,  # (N, K) where TRANSPOSED, else (K, N)
    narrow_desc,  # (M, R)
    adapter_desc,  # (N, R) where TRANSPOSED, else (R, N)
    bias_ptr,  # (N,), or None
    y_desc,  # (M, N)
    M,
    N,
    K,
    R,
    end0,
    end1,
    end2,
    TRANSPOSED: tl.constexpr,
    STACKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Tiles of y, PROGRAMS apart.

    STACKED: up to four weights one below the other, which end at ``end0``, ``end1`` and ``end2``, each with its own R
    columns of both narrow factors; no tile of N belongs to two of them.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    # One loop over the tiles and their steps: the next tile's loads overlap this one's stores.
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        tile_m, tile_n = grouped(tile, tiles_m, tiles_n, GROUP_M)
        m0, n0 = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            x = x_desc.load([m0, k0])
            w = w_desc.load([n0, k0]).T if TRANSPOSED else w_desc.load([k0, n0])
            acc = dot(x, w, acc)
        for r0 in range(0, R, BLOCK_R):
            if STACKED:
                r = r0 + ((n0 >= end0).to(tl.int32) + (n0 >= end1).to(tl.int32) + (n0 >= end2).to(tl.int32)) * R
            else:
                r = r0
            narrow = narrow_desc.load([m0, r])
            adapter = adapter_desc.load([n0, r]).T if TRANSPOSED else adapter_desc.load([r, n0])
            acc = dot(narrow, adapter, acc)
        finish_tile(acc, bias_ptr, y_desc, m0, n0, N, BLOCK_M, BLOCK_N)


@triton.jit
def column_first(tile, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile of M, tile of N): all tiles of the first column of tiles, then the others as `grouped` orders them."""
    rest_m, rest_n = grouped(tile - tiles_m, tiles_m, max(tiles_n - 1, 1), GROUP_M)
    return tl.where(tile < tiles_m, tile, rest_m), tl.where(tile < tiles_m, 0, rest_n + 1)


@jit(do_not_specialize=["M"])
def projecting_gemm_kernel(
    x_desc,  # (M, K)
    w_desc,  # (N, K) where TRANSPOSED, else (K, N)
    project_desc,  # (R, K) where TRANSPOSED, else (K, R)
    adapter_desc,  # (N, R) where TRANSPOSED, else (R, N)
    bias_ptr,  # (N,), or None
    y_desc,  # (M, N)
    narrow_ptr,  # (M, R): out, x projected
    scaled_ptr,  # (M, R): out, scale times that; what joins y
    done_ptr,  # zero: counts the tiles of M whose projection is stored
    scale,
    M,
    N,
    K,
    R,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """`gemm_kernel` that makes its narrow factor itself, from the tiles of x that it reads anyway.

    The first tiles of every program, together at least the first column of tiles, are multiplied by both matrices:
    R more columns beside BLOCK_N, once, instead of another read of x. The tiles of the first column store what the
    later ones, of whatever program, read. Those wait for all of it before they begin. A program stores all of its
    share before it waits, so the wait ends once every program has run its first tiles; the launch is cooperative,
    which makes sure that all of them are on the device together.
    """
    dtype: tl.constexpr = x_desc.dtype
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    first = tl.program_id(0)
    rest = first + tl.cdiv(tiles_m, PROGRAMS) * PROGRAMS
    r = tl.arange(0, BLOCK_R)
    for tile in range(first, min(rest, tiles), PROGRAMS):
        tile_m, tile_n = column_first(tile, tiles_m, tiles_n, GROUP_M)
        m0, n0 = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        narrow = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            x = x_desc.load([m0, k0])
            w = w_desc.load([n0, k0]).T if TRANSPOSED else w_desc.load([k0, n0])
            project = project_desc.load([0, k0]).T if TRANSPOSED else project_desc.load([k0, 0])
            acc = dot(x, w, acc)
            narrow = dot(x, project, narrow)
        scaled = cast(narrow * scale, dtype)
        adapter = adapter_desc.load([n0, 0]).T if TRANSPOSED else adapter_desc.load([0, n0])
        acc = dot(scaled, adapter, acc)
        if tile_n == 0:
            m = m0 + tl.arange(0, BLOCK_M)
            target = m[:, None].to(tl.int64) * R + r[None, :]
            inside = (m[:, None] < M) & (r[None, :] < R)
            tl.store(narrow_ptr + target, cast(narrow, dtype), mask=inside)
            tl.store(scaled_ptr + target, scaled, mask=inside)
            # Every thread's stores come before the count, which whoever acquires it then sees.
            tl.debug_barrier()
            tl.atomic_add(done_ptr, 1, sem="release")
        finish_tile(acc, bias_ptr, y_desc, m0, n0, N, BLOCK_M, BLOCK_N)
    while tl.atomic_add(done_ptr, 0, sem="acquire") < tiles_m:
        pass
    if OVERLAP:
        # Both narrow factors are complete, and so is all that came before this kernel, which waited for it.
        tl.extra.cuda.gdc_launch_dependents()
    for tile in tl.range(rest, tiles, PROGRAMS, flatten=True):
        tile_m, tile_n = column_first(tile, tiles_m, tiles_n, GROUP_M)
        m0, n0 = tile_m * BLOCK_M, tile_n * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            x = x_desc.load([m0, k0])
            w = w_desc.load([n0, k0]).T if TRANSPOSED else w_desc.load([k0, n0])
            acc = dot(x, w, acc)
        m = m0 + tl.arange(0, BLOCK_M)
        scaled = tl.load(
            scaled_ptr + m[:, None].to(tl.int64) * R + r[None, :], mask=(m[:, None] < M) & (r[None, :] < R), other=0.0
        )
        adapter = adapter_desc.load([n0, 0]).T if TRANSPOSED else adapter_desc.load([0, n0])
        acc = dot(scaled, adapter, acc)
        finish_tile(acc, bias_ptr, y_desc, m0, n0, N, BLOCK_M, BLOCK_N)


_ALIGNMENT = 16
"""Bytes to which the tensor memory accelerator wants rows and addresses aligned."""


def unaligned(*tensors: torch.Tensor) -> bool:
    """Whether any of the matrices has rows that the tensor memory accelerator cannot read."""
    for t in tensors:  # asked for every operand of every product: `any` would take as long again
        row, column = t.stride()
        if column != 1 or t.data_ptr() % _ALIGNMENT or row * t.itemsize % _ALIGNMENT:
            return True
    return False


def gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    narrow: torch.Tensor | None,
    adapter: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    *,
    transposed: bool,
    out_dtype: torch.dtype | None = None,
    sizes: Sequence[int] = (),
) -> torch.Tensor:
    """y = x W^T + narrow adapter^T + bias, (M, N) of ``out_dtype``, for w (N, K), narrow (M, R) and adapter (N, R).

    With ``transposed`` False w is (K, N), adapter (R, N), and neither is transposed: dx = dy W + du A. All matrices
    have one 16-bit type and the alignment that `unaligned` asks for; ranks are padded here to what it needs.

    ``sizes`` (transposed only): the rows of the up to four weights that w stacks, where adapter is block diagonal with
    one block for each, all of R / len(sizes) columns: only the blocks are multiplied where the tiles allow it.
    """
    (m, k), n = x.shape, w.shape[0 if transposed else 1]
    if narrow is not None and adapter is not None:
        r = narrow.shape[1]
        if missing := -r * narrow.element_size() % _ALIGNMENT // narrow.element_size():
            narrow = F.pad(narrow, (0, missing))
            adapter = F.pad(adapter, (0, missing) if transposed else (0, 0, 0, missing))
        narrow, adapter = narrow.contiguous(), adapter.contiguous()
        # A view into a larger buffer of parameters may start anywhere.
        narrow = narrow.clone() if unaligned(narrow) else narrow
        adapter = adapter.clone() if unaligned(adapter) else adapter
        r = narrow.shape[1]
    else:
        narrow, adapter, r = x, w, 0
    y = x.new_empty(m, n, dtype=out_dtype)
    device = config.Device.of(x.device)
    # Each projection has its own ranks: a tile meets those of one.
    own = r // max(len(sizes), 1)
    tiles = config.buffer_gemm(m, n, k, own, "forward" if transposed else "backward", x.dtype, y.dtype, device)

    def weight(t: torch.Tensor, block: int) -> TensorDescriptor:
        return describe(t, tiles.block_n, block) if transposed else describe(t, block, tiles.block_n)

    ends = list(itertools.accumulate(sizes))[:-1]
    stacked = bool(ends) and all(end % tiles.block_n == 0 for end in ends)
    end0, end1, end2 = (*ends, n, n, n)[:3]
    programs = min(device.multiprocessors, config.cdiv(m, tiles.block_m) * config.cdiv(n, tiles.block_n))
    with on_device(x):
        gemm_kernel[(programs,)](
            describe(x, tiles.block_m, tiles.block_k),
            weight(w, tiles.block_k),
            describe(narrow, tiles.block_m, tiles.block_r),
            weight(adapter, tiles.block_r),
            None if bias is None else bias.contiguous(),
            describe(y, tiles.block_m, tiles.block_n // 2),
            m,
            n,
            k,
            r // len(sizes) if stacked else r,
            end0,
            end1,
            end2,
            TRANSPOSED=transposed,
            STACKED=stacked,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            BLOCK_R=tiles.block_r,
            GROUP_M=tiles.group_m,
            PROGRAMS=device.multiprocessors,
            **tiles.launch(),
        )
    return y


def projects(r: int, *tensors: torch.Tensor) -> bool:
    """Whether `projecting_gemm` takes a rank and operands: x, W and both adapters, in one 16-bit type."""
    if not 0 < r <= _WIDEST_PROJECTION or unaligned(*tensors) or len({t.dtype for t in tensors}) > 1:
        return False
    # Triton cannot compile two products in one loop for 10.x.
    return interpreted() or (9, 0) <= config.Device.of(tensors[0].device).capability < (10, 0)


_WIDEST_PROJECTION = 32
"""Rank up to which a few tiles with more columns cost less than another read of x."""


def projecting_gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    project: torch.Tensor,
    adapter: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    done: torch.Tensor,
    *,
    transposed: bool,
    out_dtype: torch.dtype | None = None,
    overlap: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(y, u, scale * u) with u = x project^T and y = x W^T + scale * u adapter^T + bias, from one read of x.

    Shapes: x (M, K), w (N, K), project (R, K), adapter (N, R), u (M, R). With ``transposed`` False w is (K, N),
    project (K, R), adapter (R, N), and none of them is transposed. ``done`` is one int32, zero. `projects` says which
    operands are taken. ``overlap``: programs of the kernel that is launched next may start once u is complete.
    """
    (m, k), n, r = x.shape, w.shape[0 if transposed else 1], adapter.shape[1 if transposed else 0]
    y, scaled = x.new_empty(m, n, dtype=out_dtype), x.new_empty(m, r)
    narrow = x.new_empty(m, r)
    device = config.Device.of(x.device)
    tiles = config.buffer_gemm(m, n, k, r, "forward" if transposed else "backward", x.dtype, y.dtype, device)
    # The interpreter runs one program after the other, so none may wait for a later one.
    most = 1 if interpreted() else device.multiprocessors

    def weight(t: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
        return describe(t, rows, columns) if transposed else describe(t, columns, rows)

    programs = min(most, config.cdiv(m, tiles.block_m) * config.cdiv(n, tiles.block_n))
    with on_device(x):
        projecting_gemm_kernel[(programs,)](
            describe(x, tiles.block_m, tiles.block_k),
            weight(w, tiles.block_n, tiles.block_k),
            weight(project, tiles.block_r, tiles.block_k),
            weight(adapter, tiles.block_n, tiles.block_r),
            None if bias is None else bias.contiguous(),
            describe(y, tiles.block_m, tiles.block_n // 2),
            narrow,
            scaled,
            done,
            float(scale),
            m,
            n,
            k,
            r,
            TRANSPOSED=transposed,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            BLOCK_R=tiles.block_r,
            GROUP_M=tiles.group_m,
            PROGRAMS=most,
            OVERLAP=overlap,
            launch_cooperative_grid=True,
            **tiles.launch(),
        )
    return y, narrow, scaled
