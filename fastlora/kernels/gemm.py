"""The product of a training step: a dense 16-bit weight, the LoRA term in its accumulator, one rounding.

Persistent programs read their tiles through the tensor memory accelerator (compute capability 9.0 and later) and
multiply the LoRA factors as the last step of a tile: y = x W^T + s B^T + bias with s = scale * u, or dx = dy W + du A.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from fastlora.kernels import config
from fastlora.kernels.launch import on_device
from fastlora.kernels.tile import cast, dot, grouped


@triton.jit(do_not_specialize=["M"])
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
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    """Tiles of y, PROGRAMS apart."""
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
            narrow = narrow_desc.load([m0, r0])
            adapter = adapter_desc.load([n0, r0]).T if TRANSPOSED else adapter_desc.load([r0, n0])
            acc = dot(narrow, adapter, acc)
        if bias_ptr is not None:
            n = n0 + tl.arange(0, BLOCK_N)
            acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        # In two halves: a whole tile would not fit in shared memory beside the pipeline.
        left, right = acc.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1).split()
        y_desc.store([m0, n0], cast(left, y_desc.dtype))
        y_desc.store([m0, n0 + BLOCK_N // 2], cast(right, y_desc.dtype))


_ALIGNMENT = 16
"""Bytes to which the tensor memory accelerator wants rows and addresses aligned."""


def unaligned(*tensors: torch.Tensor) -> bool:
    """Whether any of the matrices has rows that the tensor memory accelerator cannot read."""
    return any(
        t.stride(1) != 1 or t.data_ptr() % _ALIGNMENT or t.stride(0) * t.element_size() % _ALIGNMENT for t in tensors
    )


def gemm(
    x: torch.Tensor,
    w: torch.Tensor,
    narrow: torch.Tensor | None,
    adapter: torch.Tensor | None,
    bias: torch.Tensor | None = None,
    *,
    transposed: bool,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """y = x W^T + narrow adapter^T + bias, (M, N) of ``out_dtype``, for w (N, K), narrow (M, R) and adapter (N, R).

    With ``transposed`` False w is (K, N), adapter (R, N), and neither is transposed: dx = dy W + du A. All matrices
    have one 16-bit type and the alignment that `unaligned` asks for; ranks are padded here to what it needs.
    """
    (m, k), n = x.shape, w.shape[0 if transposed else 1]
    if narrow is not None and adapter is not None:
        r = narrow.shape[1]
        if missing := -r * narrow.element_size() % _ALIGNMENT // narrow.element_size():
            narrow = F.pad(narrow, (0, missing))
            adapter = F.pad(adapter, (0, missing) if transposed else (0, 0, 0, missing))
        # A view into a larger buffer of parameters may start anywhere.
        narrow, adapter = (t.clone() if unaligned(t) else t for t in (narrow.contiguous(), adapter.contiguous()))
        r = narrow.shape[1]
    else:
        narrow, adapter, r = x, w, 0
    y = x.new_empty(m, n, dtype=out_dtype)
    device = config.Device.of(x.device)
    tiles = config.buffer_gemm(r, x.dtype, y.dtype, device)

    def describe(t: torch.Tensor, rows: int, columns: int) -> TensorDescriptor:
        return TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, columns])

    def weight(t: torch.Tensor, block: int) -> TensorDescriptor:
        return describe(t, tiles.block_n, block) if transposed else describe(t, block, tiles.block_n)

    programs = min(device.multiprocessors, triton.cdiv(m, tiles.block_m) * triton.cdiv(n, tiles.block_n))
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
            r,
            TRANSPOSED=transposed,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            BLOCK_R=tiles.block_r,
            GROUP_M=tiles.group_m,
            PROGRAMS=device.multiprocessors,
            **tiles.launch(),
        )
    return y
