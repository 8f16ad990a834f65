"""dx = dy W + dropout(du A) in one product, and the gradients of the adapters."""

from __future__ import annotations

import torch
import triton.language as tl

from fastlora.dropout import Dropout
from fastlora.kernels import config, lora, split
from fastlora.kernels.decode import check_dtype, weight_arguments, weight_tile, weight_with_rows
from fastlora.kernels.dropout import drop_
from fastlora.kernels.forward import buffered, is_split
from fastlora.kernels.gemm import gemm, projecting_gemm, projects
from fastlora.kernels.launch import jit, on_device, overlaps, with_rows
from fastlora.kernels.tile import add_lora, cast, dot, dropout_arguments, grouped, keep
from fastlora.nf4 import NF4Weight, Weight


@jit(do_not_specialize=["M", "threshold"])
def input_gradient_kernel(
    dy_ptr,  # (M, N), rows stride_dym apart
    w_ptr,  # (N, K), packed or dense
    code_ptr,
    absmax_ptr,
    absmax_q_ptr,
    absmax_scale_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    du_ptr,  # (M, R); None without adapters
    a_ptr,  # (R, K), rows stride_ar apart
    dx_ptr,  # (M, K), rows stride_dxm apart
    seed_ptr,
    threshold,
    gain,
    M,
    N,
    K,
    R,
    stride_dym,
    stride_wn,
    stride_ar,
    stride_dxm,
    DROPOUT: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    K_IS_EVEN: tl.constexpr,
    ROW_STATISTICS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """One (BLOCK_M, BLOCK_K) tile of dx a program, rounded once."""
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    tile_m, tile_k = grouped(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(K, BLOCK_K), GROUP_M)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tile_k * BLOCK_K
    k = k0 + tl.arange(0, BLOCK_K)
    row = m[:, None].to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if DROPOUT:
        # The mask applies to the LoRA term alone: first into the accumulator, which then needs no second one.
        acc = add_lora(acc, du_ptr, a_ptr, m, k, M, K, R, stride_ar, 1, dtype, BLOCK_R)
        acc = tl.where(keep(seed_ptr, threshold, gain, m, k0, BLOCK_K), acc * gain, 0.0)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        dy = tl.load(dy_ptr + row * stride_dym + n[None, :], mask=(m[:, None] < M) & (n[None, :] < N), other=0.0)
        w = weight_tile(
            w_ptr, code_ptr, absmax_ptr, absmax_q_ptr, absmax_scale_ptr, absmax_code_ptr, absmax_offset_ptr,
            n, k0, N, K, stride_wn, dtype, FORMAT, BLOCKSIZE, K_IS_EVEN, ROW_STATISTICS, BLOCK_K,
        )  # fmt: skip
        acc = dot(dy, w, acc)
    if du_ptr is not None and not DROPOUT:
        acc = add_lora(acc, du_ptr, a_ptr, m, k, M, K, R, stride_ar, 1, dtype, BLOCK_R)
    tl.store(dx_ptr + row * stride_dxm + k[None, :], cast(acc, dtype), mask=(m[:, None] < M) & (k[None, :] < K))


def input_gradient(
    dy: torch.Tensor,
    w: Weight,
    du: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    dropout: Dropout | None,
) -> torch.Tensor:
    """dx (M, K) from dy (M, N) and, with adapters, du (M, R) and lora_a (R, K)."""
    dy, w = with_rows(dy), weight_with_rows(w)
    m, k = dy.shape[0], w.shape[1]
    r = 0
    if lora_a is not None:
        lora_a, r = with_rows(lora_a), lora_a.shape[0]
    blocksize = w.blocksize if isinstance(w, NF4Weight) else None
    tiles = config.gemm(m, k, r, dy.dtype, config.Device.of(dy.device), blocksize=blocksize)
    dx = dy.new_empty(m, k)
    with on_device(dy):
        input_gradient_kernel[(config.cdiv(m, tiles.block_m) * config.cdiv(k, tiles.block_k),)](
            dy_ptr=dy,
            du_ptr=du,
            a_ptr=lora_a,
            dx_ptr=dx,
            M=m,
            R=r,
            stride_dym=dy.stride(0),
            stride_ar=0 if lora_a is None else lora_a.stride(0),
            stride_dxm=dx.stride(0),
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            BLOCK_R=tiles.block_r,
            GROUP_M=tiles.group_m,
            **dropout_arguments(None if du is None else dropout),
            **weight_arguments(w, tiles.block_k),
            **tiles.launch(),
        )
    return dx


def backward(
    dy: torch.Tensor,
    x: torch.Tensor | None,
    u: torch.Tensor,
    w: Weight,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scale: float,
    dropout: Dropout | None,
    needs: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """dx (M, K), dA (R, K) and dB (N, R), None where ``needs`` is False, as ``fastlora.reference.backward``.

    dA and dB have their adapter's dtype and are rounded once, from float32. Deterministic.
    Raises TypeError for a type of dy other than float32, float16 and bfloat16, ValueError for tensors off the GPU
    and for a missing x.
    """
    check_dtype(dy.dtype)
    need_dx, need_da, need_db = needs
    da = db = None
    if lora_a is not None and lora_b is not None and lora_a.shape[0] == 0:
        da = torch.zeros_like(lora_a) if need_da else None
        db = torch.zeros_like(lora_b) if need_db else None
        lora_a = lora_b = None
    few = need_dx and is_split(dy, w, r=0 if lora_a is None else lora_a.shape[0], direction="backward")
    if lora_a is None or lora_b is None:
        if few:
            assert isinstance(w, NF4Weight)
            return split.input_gradient(dy, w, None, None, scale, None)[0], da, db
        dense, persistent = buffered(dy, w, r=0, direction="backward") if need_dx else (None, False)
        dx = _input_gradient(dy, w, dense, persistent, None, None, None) if need_dx else None
        return dx, da, db
    if need_da and x is None:
        raise ValueError("the gradient of lora_a needs x, got None")
    if few:
        assert isinstance(w, NF4Weight)
        dx, few_du = split.input_gradient(dy, w, lora_a, lora_b, scale, dropout)
        _, da, db = lora.gradients(dy, x, u, lora_a, lora_b, scale, dropout, (False, need_da, need_db), few_du)
        return dx, da, db
    r = lora_a.shape[0]
    dense, persistent, done, du = None, False, None, None
    if need_dx and dropout is None and dy.shape[0] >= config.PROJECTED_ROWS:
        done = torch.empty(1, dtype=torch.int32, device=dy.device)
    elif (need_dx or need_da) and config.one_pass(r, dy.dtype, config.Device.of(dy.device)) is None:
        # Before W is decoded, which is then still in the cache when the product reads it.
        du = lora.project_dy(dy, lora_b, scale)
    if need_dx:
        dense, persistent = buffered(dy, w, done, r=r, direction="backward")
    if dense is not None and done is not None and persistent:
        a, b = lora_a.to(dy.dtype), lora_b.to(dy.dtype)
        if projects(a.shape[0], dy, dense, a, b):
            both = None
            if need_da and need_db and x is not None:
                both = lora.Gradients(dy, u, x, lora_a, lora_b)
            overlap = both is not None and overlaps(dy)
            dx, _, made = projecting_gemm(dy, dense, b, a, None, scale, done, transposed=False, overlap=overlap)
            if both is not None:
                return dx, *both.run(made, scale, None, overlap=overlap)
            _, da, db = lora.gradients(dy, x, u, lora_a, lora_b, scale, None, (False, need_da, need_db), made)
            return dx, da, db
    if du is None:
        du, da, db = lora.gradients(dy, x, u, lora_a, lora_b, scale, dropout, needs)
    dx = _input_gradient(dy, w, dense, persistent, du, lora_a, dropout) if need_dx else None
    if da is None and db is None:
        _, da, db = lora.gradients(dy, x, u, lora_a, lora_b, scale, dropout, (False, need_da, need_db), du)
    return dx, da, db


def _input_gradient(
    dy: torch.Tensor,
    w: Weight,
    dense: torch.Tensor | None,
    persistent: bool,
    du: torch.Tensor | None,
    lora_a: torch.Tensor | None,
    dropout: Dropout | None,
) -> torch.Tensor:
    """dx (M, K), by the form that `buffered` chose."""
    if dense is None:
        return input_gradient(dy, w, du, lora_a, dropout)
    a = None if lora_a is None else lora_a.to(dy.dtype)
    if persistent and (dropout is None or du is None):
        return gemm(dy, dense, du, a, transposed=False)
    if du is None or a is None:
        return dy @ dense
    dx = du @ a
    return (drop_(dx, dropout) if dropout else dx).addmm_(dy, dense)
