"""Products of few rows with a packed weight: the bytes of W are read once, and its tiles never leave the chip.

A product of few rows has few tiles, so the reduced side is split among programs as well. Two launches make y or dx:

    partial_kernel   tiles of x W^T (or dy W) over one part of the reduced side, W decoded in registers, and tiles of
                     the narrow product x A^T (or dy B), all as float32 partials
    finish_kernel    the partials added in a fixed order, the LoRA term, the bias, one rounding

Two runs give the same bits. Every call has its own workspace, so streams and captured graphs do not meet in it.
"""

from __future__ import annotations

import functools
import struct

import torch
import triton
import triton.language as tl

from fastlora.dropout import Dropout
from fastlora.int8 import Int8Matrix
from fastlora.kernels import config
from fastlora.kernels.launch import interpreted, jit, on_device, with_rows
from fastlora.kernels.tile import cast, dot, drop, dropout_arguments, keep
from fastlora.nf4 import CODES, NESTED_BLOCKSIZE, NF4Weight

_NESTED_BLOCKSIZE = tl.constexpr(NESTED_BLOCKSIZE)
GROUP = 32
"""Elements that are decoded together, the smallest block of statistics."""


@triton.jit
def load_groups(
    w_ptr,  # (N, groups, 4) 32-bit words of eight nibbles
    absmax_ptr,
    absmax_q_ptr,
    absmax_scale_ptr,
    n,  # (BLOCK_N,) rows
    group0,  # first column
    last,  # columns from here on are not read
    N,
    groups,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """(BLOCK_N * GROUPS, 4) words and what their statistics are made of: nothing waits for these loads.

    A group is 32 elements, the smallest block of statistics, so all of it shares one.
    """
    ROWS: tl.constexpr = n.shape[0]
    row = tl.broadcast_to(n[:, None], (ROWS, GROUPS)).reshape(ROWS * GROUPS)
    column = tl.broadcast_to(tl.arange(0, GROUPS)[None, :], (ROWS, GROUPS)).reshape(ROWS * GROUPS) + group0
    mask = (row < N) & (column < last)
    group = row.to(tl.int64) * groups + column
    words = tl.load(w_ptr + group[:, None] * 4 + tl.arange(0, 4)[None, :], mask=mask[:, None], other=0)
    block = group // (BLOCKSIZE // 32)
    if FORMAT == "nested":
        q = tl.load(absmax_q_ptr + block, mask=mask, other=0)
        base = tl.load(absmax_scale_ptr + block // _NESTED_BLOCKSIZE, mask=mask, other=0.0)
    else:
        q = tl.load(absmax_ptr + block, mask=mask, other=0.0)
        base = q
    return words, q, base


@triton.jit
def eight(word, a, code_ptr):
    """The elements of words, in float32, a dimension a bit of their index, the lowest last."""
    # Bytes in memory order, the high nibble first.
    v0 = tl.load(code_ptr + ((word >> 4) & 15)) * a
    v1 = tl.load(code_ptr + (word & 15)) * a
    v2 = tl.load(code_ptr + ((word >> 12) & 15)) * a
    v3 = tl.load(code_ptr + ((word >> 8) & 15)) * a
    v4 = tl.load(code_ptr + ((word >> 20) & 15)) * a
    v5 = tl.load(code_ptr + ((word >> 16) & 15)) * a
    v6 = tl.load(code_ptr + ((word >> 28) & 15)) * a
    v7 = tl.load(code_ptr + ((word >> 24) & 15)) * a
    # Each join adds the next lower bit of the index as the last dimension.
    return tl.join(tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(tl.join(v1, v5), tl.join(v3, v7)))


@triton.jit
def join8(v0, v1, v2, v3, v4, v5, v6, v7):
    """The same of eight tensors in the order of their index."""
    return tl.join(tl.join(tl.join(v0, v4), tl.join(v2, v6)), tl.join(tl.join(v1, v5), tl.join(v3, v7)))


@triton.jit
def decode_groups(
    words,  # (BLOCK_N * GROUPS, 4)
    q,  # (BLOCK_N * GROUPS,)
    base,
    code_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    dtype: tl.constexpr,
    FORMAT: tl.constexpr,
    PERMUTE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """The matrix (BLOCK_N, 32 * GROUPS) of ``dtype``, bit for bit as NF4Weight.dequantize."""
    a = q
    if FORMAT == "nested":
        a = tl.load(absmax_code_ptr + q.to(tl.int32)) * base + tl.load(absmax_offset_ptr)
    even, odd = tl.split(words.reshape(words.shape[0], 2, 2))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    COLUMNS: tl.constexpr = words.shape[0] // ROWS * 32
    if PERMUTE != "":
        (
            a0, a1, a2, a3, a4, a5, a6, a7, b0, b1, b2, b3, b4, b5, b6, b7,
            c0, c1, c2, c3, c4, c5, c6, c7, d0, d1, d2, d3, d4, d5, d6, d7,
        ) = tl.inline_asm_elementwise(
            PERMUTE, _PERMUTE_CONSTRAINTS, [a, w0, w1, w2, w3],
            dtype=(
                tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
                tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
                tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
                tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
            ),
            is_pure=True, pack=1,
        )  # fmt: skip
        first = join8(a0, a1, a2, a3, a4, a5, a6, a7)
        second = join8(b0, b1, b2, b3, b4, b5, b6, b7)
        third = join8(c0, c1, c2, c3, c4, c5, c6, c7)
        fourth = join8(d0, d1, d2, d3, d4, d5, d6, d7)
    else:
        first, second = eight(w0, a, code_ptr), eight(w1, a, code_ptr)
        third, fourth = eight(w2, a, code_ptr), eight(w3, a, code_ptr)
    # The number of a word comes before the bits of the index of an element in it.
    left = tl.join(first, third).permute(0, 4, 1, 2, 3)
    right = tl.join(second, fourth).permute(0, 4, 1, 2, 3)
    both = tl.join(left, right).permute(0, 1, 5, 2, 3, 4)
    # Rounding comes last: Triton 3.6 cannot place a tile in shared memory for a dot straight after a reshape.
    both = both.reshape(ROWS, COLUMNS)
    return cast(both, dtype) if PERMUTE == "" else both.to(dtype, bitcast=True)


def permute_source(quant_type: str, dtype: torch.dtype) -> str:
    """PTX that decodes a group: $0 to $31 elements of a 16-bit ``dtype``, $32 the statistic, $33 to $36 the words.

    The sixteen products of the statistic are rounded once for the whole group and kept as four registers of low and
    four of high bytes; a byte permutation then looks up four elements at a time.
    """
    kind = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}[dtype]
    lines = [".reg .f32 t<16>;", ".reg .b32 p<8>, l<4>, h<4>, m, q, x<2>, y<2>, z<2>;"]
    for i, value in enumerate(CODES[quant_type]):
        lines.append(f"mul.rn.f32 t{i}, $32, 0f{struct.pack('>f', value).hex()};")
    for i in range(8):
        lines.append(f"cvt.rn.{kind}.f32 p{i}, t{2 * i + 1}, t{2 * i};")
    for i in range(4):
        lines.append(f"prmt.b32 l{i}, p{2 * i}, p{2 * i + 1}, 0x6420;")
        lines.append(f"prmt.b32 h{i}, p{2 * i}, p{2 * i + 1}, 0x7531;")
    for word in range(4):
        # Three bits of a nibble choose among eight bytes, the fourth chooses between two such choices.
        lines += [f"and.b32 m, ${33 + word}, 0x77777777;", f"shr.u32 q, ${33 + word}, 1;"]
        lines += ["lop3.b32 q, q, 0x44444444, 0x32103210, 0xea;"]
        for half in range(2):
            if half:
                lines += ["shr.u32 m, m, 16;", "shr.u32 q, q, 16;"]
            for i, plane in enumerate("lh"):
                lines.append(f"prmt.b32 x{i}, {plane}0, {plane}1, m;")
                lines.append(f"prmt.b32 y{i}, {plane}2, {plane}3, m;")
                lines.append(f"prmt.b32 z{i}, x{i}, y{i}, q;")
            for pair, order in enumerate(("0x4051", "0x6273")):
                element = 8 * word + 4 * half + 2 * pair
                lines.append(f"prmt.b32 x0, z0, z1, {order};")
                lines.append(f"mov.b32 {{${element}, ${element + 1}}}, x0;")
    return "{\n" + "\n".join(lines) + "\n}"


_PERMUTE_CONSTRAINTS = tl.constexpr(",".join(["=h"] * 32 + ["r"] * 5))


@functools.cache
def permute(quant_type: str, dtype: torch.dtype, wanted: bool = True) -> str:
    """`permute_source` where it is wanted and the target understands it, else nothing."""
    portable = not wanted or interpreted() or torch.version.hip is not None
    return "" if portable else permute_source(quant_type, dtype)


@triton.jit
def load_rows(x_ptr, m, column, last, M, stride_xm):
    """x[m, column], zero from column ``last`` on."""
    mask = (m[:, None] < M) & (column[None, :] < last)
    return tl.load(x_ptr + m[:, None].to(tl.int64) * stride_xm + column[None, :], mask=mask, other=0.0)


@jit(do_not_specialize=["M", "narrow_programs", "threshold"])
def partial_kernel(
    x_ptr,  # (M, K), or (M, N) where it is dy; rows stride_xm apart
    w_ptr,  # (N, groups, 4) 32-bit words of eight nibbles
    code_ptr,
    absmax_ptr,
    absmax_q_ptr,
    absmax_scale_ptr,
    absmax_code_ptr,
    absmax_offset_ptr,
    adapter_ptr,  # A (R, K) or B^T (R, N): element (r, i) at r * stride_r + i * stride_i; None without adapters
    scales_ptr,  # (R,) float32 of an A in 8 bits, or None
    sums_ptr,  # (parts, M, N or K) float32
    narrow_ptr,  # (narrow parts, M, R) float32
    seed_ptr,
    threshold,
    gain,
    M,
    N,
    groups,
    R,
    steps,  # of a part
    narrow_steps,
    narrow_programs,
    stride_xm,
    stride_r,
    stride_i,
    TRANSPOSED: tl.constexpr,
    DROPOUT: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCKSIZE: tl.constexpr,
    PERMUTE: tl.constexpr,
    OVERLAP: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One part of a tile of the narrow product, in the first programs, or of x W^T (TRANSPOSED) or dy W."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    GROUPS: tl.constexpr = BLOCK_K // 32
    BLOCK: tl.constexpr = BLOCK_K if TRANSPOSED else BLOCK_N
    TILE: tl.constexpr = BLOCK_N if TRANSPOSED else BLOCK_K
    K = groups * 32
    reduced = K if TRANSPOSED else N
    side = N if TRANSPOSED else K
    if OVERLAP:
        tl.extra.cuda.gdc_launch_dependents()
    pid = tl.program_id(0)
    tiles_m = tl.cdiv(M, BLOCK_M)
    if pid < narrow_programs:
        m = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        if adapter_ptr is not None:
            tiles_r = tl.cdiv(R, BLOCK_R)
            r = pid // tiles_m % tiles_r * BLOCK_R + tl.arange(0, BLOCK_R)
            p = pid // tiles_m // tiles_r
            adapter_row = adapter_ptr + r[:, None].to(tl.int64) * stride_r
            narrow = tl.zeros((BLOCK_R, BLOCK_M), tl.float32)
            for step in range(p * narrow_steps, (p + 1) * narrow_steps):
                i = step * BLOCK + tl.arange(0, BLOCK)
                rows = load_rows(x_ptr, m, i, reduced, M, stride_xm)
                inside = (r[:, None] < R) & (i[None, :] < reduced)
                adapter = tl.load(adapter_row + i[None, :].to(tl.int64) * stride_i, mask=inside, other=0.0)
                if DROPOUT:
                    rows = drop(rows, seed_ptr, threshold, gain, m, step * BLOCK, BLOCK)
                narrow = dot(cast(adapter, dtype), tl.trans(rows), narrow)
            if scales_ptr is not None:
                narrow *= tl.load(scales_ptr + r, mask=r < R, other=0.0)[:, None]
            narrow_target = (p.to(tl.int64) * M + m[None, :]) * R + r[:, None]
            tl.store(narrow_ptr + narrow_target, narrow, mask=(r[:, None] < R) & (m[None, :] < M))
    else:
        pid -= narrow_programs
        m = pid % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
        tile = pid // tiles_m
        tiles = tl.cdiv(side, TILE)
        o0 = tile % tiles
        p = tile // tiles
        o = o0 * TILE + tl.arange(0, TILE)
        first, end = p * steps, (p + 1) * steps
        limit = tl.minimum(end * BLOCK, reduced)
        last = limit // 32 if TRANSPOSED else groups
        n = o if TRANSPOSED else first * BLOCK + tl.arange(0, BLOCK)
        n_end = N if TRANSPOSED else limit
        group0 = first * GROUPS if TRANSPOSED else o0 * GROUPS
        x = load_rows(x_ptr, m, first * BLOCK + tl.arange(0, BLOCK), limit, M, stride_xm)
        word, q, base = load_groups(
            w_ptr, absmax_ptr, absmax_q_ptr, absmax_scale_ptr, n, group0, last, n_end, groups,
            FORMAT, BLOCKSIZE, GROUPS,
        )  # fmt: skip
        acc = tl.zeros((TILE, BLOCK_M) if WEIGHT_FIRST else (BLOCK_M, TILE), tl.float32)
        for step in range(first, end):
            # The next step's loads are under way while this one decodes and multiplies.
            after = step + 1
            if TRANSPOSED:
                next_n, next_group = n, after * GROUPS
            else:
                next_n, next_group = after * BLOCK + tl.arange(0, BLOCK), group0
            next_x = load_rows(x_ptr, m, after * BLOCK + tl.arange(0, BLOCK), limit, M, stride_xm)
            next_word, next_q, next_base = load_groups(
                w_ptr, absmax_ptr, absmax_q_ptr, absmax_scale_ptr, next_n, next_group, last, n_end, groups,
                FORMAT, BLOCKSIZE, GROUPS,
            )  # fmt: skip
            w = decode_groups(
                word, q, base, code_ptr, absmax_code_ptr, absmax_offset_ptr, dtype, FORMAT, PERMUTE, BLOCK_N
            )
            if WEIGHT_FIRST:
                acc = dot(w if TRANSPOSED else tl.trans(w), tl.trans(x), acc)
            else:
                acc = dot(x, tl.trans(w) if TRANSPOSED else w, acc)
            x, word, q, base = next_x, next_word, next_q, next_base
        if WEIGHT_FIRST:
            target = (p.to(tl.int64) * M + m[None, :]) * side + o[:, None]
            tl.store(sums_ptr + target, acc, mask=(o[:, None] < side) & (m[None, :] < M))
        else:
            target = (p.to(tl.int64) * M + m[:, None]) * side + o[None, :]
            tl.store(sums_ptr + target, acc, mask=(m[:, None] < M) & (o[None, :] < side))


@jit(do_not_specialize=["M", "threshold"])
def finish_kernel(
    sums_ptr,  # (parts, M, COLUMNS) float32
    narrow_ptr,  # (narrow parts, M, R) float32; None without adapters
    u_ptr,  # (M, R)
    adapter_ptr,  # B^T (R, N) or A (R, K): element (r, i) at r * stride_r + i * stride_i
    scales_ptr,  # (COLUMNS,) float32 of a B in 8 bits, or None
    bias_ptr,  # (COLUMNS,), or None
    y_ptr,  # (M, COLUMNS)
    seed_ptr,
    threshold,
    gain,
    narrow_scale,
    scale,
    M,
    COLUMNS,
    R,
    stride_r,
    stride_i,
    DROPOUT: tl.constexpr,
    OVERLAP: tl.constexpr,
    PARTS: tl.constexpr,
    NARROW_PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One (BLOCK_M, BLOCK_N) tile a program of y = sums + scale * dropout(u adapter) + bias, u = narrow_scale * narrow.

    Both are rounded once; the programs of the first columns store u.
    """
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    i0 = tl.program_id(0) * BLOCK_N
    i = i0 + tl.arange(0, BLOCK_N)
    in_m, in_i = m[:, None] < M, i[None, :] < COLUMNS
    target = m[:, None].to(tl.int64) * COLUMNS + i[None, :]
    if OVERLAP:
        # These programs are on the chip while the last of those before them finish.
        tl.extra.cuda.gdc_wait()
    sums = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    # Unrolled: the loads of the parts do not wait for each other.
    for p in tl.static_range(PARTS):
        part_ptr = sums_ptr + tl.full((), p, tl.int64) * M * COLUMNS
        sums += tl.load(part_ptr + target, mask=in_m & in_i, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if narrow_ptr is not None:
        dtype: tl.constexpr = u_ptr.dtype.element_ty
        for r0 in range(0, R, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            in_r = in_m & (r[None, :] < R)
            row = m[:, None].to(tl.int64) * R + r[None, :]
            narrow = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for p in tl.static_range(NARROW_PARTS):
                part_ptr = narrow_ptr + tl.full((), p, tl.int64) * M * R
                narrow += tl.load(part_ptr + row, mask=in_r, other=0.0)
            adapter = tl.load(
                adapter_ptr + r[:, None].to(tl.int64) * stride_r + i[None, :].to(tl.int64) * stride_i,
                mask=(r[:, None] < R) & in_i, other=0.0,
            )  # fmt: skip
            u = cast(narrow * narrow_scale, dtype)
            if i0 == 0:
                tl.store(u_ptr + row, u, mask=in_r)
            acc = dot(u, cast(adapter, dtype), acc)
        if scales_ptr is not None:
            acc *= tl.load(scales_ptr + i, mask=i < COLUMNS, other=0.0)[None, :]
        if DROPOUT:
            acc = tl.where(keep(seed_ptr, threshold, gain, m, i0, BLOCK_N), acc * gain, 0.0)
        acc *= scale
    acc += sums
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + i, mask=i < COLUMNS, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + target, cast(acc, y_ptr.dtype.element_ty), mask=in_m & in_i)


def reads(w: NF4Weight) -> bool:
    """Whether these kernels can read ``w``: whole groups in every row, aligned words."""
    return w.shape[1] % GROUP == 0 and w.w_packed.data_ptr() % 4 == 0


def _product(
    x: torch.Tensor,
    w: NF4Weight,
    adapters: tuple[torch.Tensor, torch.Tensor] | None,
    of_rows: tuple[torch.Tensor | None, torch.Tensor | None],
    bias: torch.Tensor | None,
    scales: tuple[float, float],
    dropouts: tuple[Dropout | None, Dropout | None],
    out_dtype: torch.dtype | None,
    *,
    transposed: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x W^T or x W, with the LoRA term, and the narrow product.

    ``adapters`` are (R, reduced side) and (R, side); ``of_rows``, (R,) and (side,), multiply the columns of the narrow
    product and of the LoRA term.
    """
    x, (n, k), m = with_rows(x), w.shape, x.shape[0]
    side = n if transposed else k
    r = 0 if adapters is None else adapters[0].shape[0]
    device = config.Device.of(x.device)
    split = config.split_product(m, n, k, r, device, transposed=transposed)
    tiles, ends = split.tiles, split.finish
    y = x.new_empty(m, side, dtype=out_dtype)
    u = x.new_empty(m, r)
    # Aligned whatever M, or the kernels would be compiled once more.
    behind = config.cdiv(split.parts * m * side, 4) * 4
    sums = torch.empty(behind + split.narrow_parts * m * r, dtype=torch.float32, device=x.device)
    narrow = sums[behind:] if r else None
    first, second = adapters or (None, None)
    tiles_m = config.cdiv(m, tiles.block_m)
    tile = tiles.block_n if transposed else tiles.block_k
    narrow_programs = tiles_m * config.cdiv(r, tiles.block_r) * split.narrow_parts if r else 0
    with on_device(x):
        partial_kernel[(narrow_programs + tiles_m * config.cdiv(side, tile) * split.parts,)](
            x_ptr=x,
            w_ptr=w.w_packed.view(torch.int32),
            code_ptr=w.code,
            absmax_ptr=w.absmax,
            absmax_q_ptr=w.absmax_q,
            absmax_scale_ptr=w.absmax_scale,
            absmax_code_ptr=w.absmax_code,
            absmax_offset_ptr=w.absmax_offset,
            adapter_ptr=first,
            scales_ptr=of_rows[0],
            sums_ptr=sums,
            narrow_ptr=narrow,
            M=m,
            N=n,
            groups=k // GROUP,
            R=r,
            steps=split.steps,
            narrow_steps=split.narrow_steps,
            narrow_programs=narrow_programs,
            stride_xm=x.stride(0),
            stride_r=0 if first is None else first.stride(0),
            stride_i=0 if first is None else first.stride(1),
            TRANSPOSED=transposed,
            FORMAT="nested" if w.nested else "flat",
            BLOCKSIZE=w.blocksize,
            PERMUTE=permute(w.quant_type, x.dtype, split.permute),
            OVERLAP=split.overlap,
            WEIGHT_FIRST=split.weight_first,
            BLOCK_M=tiles.block_m,
            BLOCK_N=tiles.block_n,
            BLOCK_K=tiles.block_k,
            BLOCK_R=tiles.block_r,
            **dropout_arguments(dropouts[0] if r else None),
            **tiles.launch(),
        )
        finish_kernel[(config.cdiv(side, ends.block_n), config.cdiv(m, ends.block_m))](
            sums_ptr=sums,
            narrow_ptr=narrow,
            u_ptr=u if r else None,
            adapter_ptr=second,
            scales_ptr=of_rows[1],
            bias_ptr=None if bias is None else bias.contiguous(),
            y_ptr=y,
            narrow_scale=float(scales[0]),
            scale=float(scales[1]),
            M=m,
            COLUMNS=side,
            R=r,
            stride_r=0 if second is None else second.stride(0),
            stride_i=0 if second is None else second.stride(1),
            OVERLAP=split.overlap,
            PARTS=split.parts,
            NARROW_PARTS=split.narrow_parts,
            BLOCK_M=ends.block_m,
            BLOCK_N=ends.block_n,
            BLOCK_R=ends.block_r,
            **dropout_arguments(dropouts[1] if r else None),
            **ends.launch(),
            **({"launch_pdl": True} if split.overlap else {}),
        )
    return y, u


def linear(
    x: torch.Tensor,
    w: NF4Weight,
    lora_a: torch.Tensor | Int8Matrix | None,
    lora_b: torch.Tensor | Int8Matrix | None,
    bias: torch.Tensor | None,
    scale: float,
    dropout: Dropout | None,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y (M, N), of ``out_dtype`` or x's type, and u (M, R) for x (M, K) of a 16-bit type; `reads` must accept w.

    Adapters in 8 bits are multiplied as they are; the scales of A's rows then multiply u, those of B's the LoRA term.
    """
    a, of_a = (lora_a.values, lora_a.scales) if isinstance(lora_a, Int8Matrix) else (lora_a, None)
    b, of_b = (lora_b.values, lora_b.scales) if isinstance(lora_b, Int8Matrix) else (lora_b, None)
    adapters = None if a is None or b is None else (a, b.T)
    return _product(x, w, adapters, (of_a, of_b), bias, (1.0, scale), (dropout, None), out_dtype, transposed=True)


def input_gradient(
    dy: torch.Tensor,
    w: NF4Weight,
    lora_a: torch.Tensor | None,
    lora_b: torch.Tensor | None,
    scale: float,
    dropout: Dropout | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx (M, K) and du (M, R) for dy (M, N) of a 16-bit type; `reads` must accept w."""
    adapters = None if lora_a is None or lora_b is None else (lora_b.T, lora_a)
    return _product(dy, w, adapters, (None, None), None, (scale, 1.0), (None, dropout), None, transposed=False)
