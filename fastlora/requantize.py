"""A dense matrix in 4 bits with the least squared error, where plain quantization takes each block's largest element.

For each block of weights t with importances h, the scale a and the codes c minimise sum(h * (t - a c)^2). For fixed
codes the best scale is sum(h t c) / sum(h c^2), for a fixed scale each code is the nearest one, so the two alternate,
from several starts. Nested statistics are chosen among the values that 8 bits have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from fastlora.nf4 import NESTED_BLOCKSIZE, NF4Weight, code_table

_STARTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Parts of the block's largest element that the search starts from."""
_ROUNDS = 3
_NEIGHBOURS = 3
"""8-bit codes to either side of the nearest one that a nested statistic may take."""
_CHUNK = 1 << 20


class _Blocks:
    """Blocks (B, blocksize) of the target, their importances, and the codes to choose from."""

    def __init__(self, t: torch.Tensor, h: torch.Tensor | None, quant_type: str) -> None:
        self.t, self.h = t, h
        table = code_table(quant_type, t.device)
        self.order = table.argsort(stable=True)
        self.code = table[self.order]
        self.bounds = (self.code[:-1] + self.code[1:]) / 2

    def nearest(self, a: torch.Tensor) -> torch.Tensor:
        """Indices into the sorted codes for the scales a (B,)."""
        inverse = torch.where(a == 0, 0, 1 / a)
        return torch.bucketize(self.t * inverse[:, None], self.bounds, out_int32=True)

    def error(self, a: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        squares = (self.t - self.code[index] * a[:, None]).square_()
        return (squares if self.h is None else squares.mul_(self.h)).sum(1)

    def best_scale(self, a: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        c = self.code[index]
        weighted = c if self.h is None else c * self.h
        found = (weighted * self.t).sum(1) / (weighted * c).sum(1)
        # A block of zeros, or one without importance (NaN), keeps the scale that it has.
        return torch.where(found > 0, found, a)

    def fit(self) -> torch.Tensor:
        """The scales (B,) with the least error found."""
        peak = self.t.abs().amax(1)
        best, least = peak, self.error(peak, self.nearest(peak))
        for start in _STARTS:
            a = peak * start
            for _ in range(_ROUNDS):
                a = self.best_scale(a, self.nearest(a))
                error = self.error(a, self.nearest(a))
                better = error < least
                best, least = torch.where(better, a, best), torch.where(better, error, least)
        return best


def _chunks(
    w: torch.Tensor, importance: torch.Tensor | None, blocksize: int, quant_type: str
) -> Iterator[tuple[int, _Blocks]]:
    """The first element of each chunk, and its blocks, the last one filled up with zeros."""
    flat, k = w.detach().reshape(-1), w.shape[1]
    step = max(_CHUNK, blocksize)
    for lo in range(0, flat.numel(), step):
        t, h = flat[lo : lo + step].float(), None
        missing = -t.numel() % blocksize
        if importance is not None:
            h = importance[torch.arange(lo, lo + t.numel(), device=w.device) % k]
            h = torch.nn.functional.pad(h, (0, missing)).view(-1, blocksize)
        yield lo, _Blocks(torch.nn.functional.pad(t, (0, missing)).view(-1, blocksize), h, quant_type)


def quantize(
    w: torch.Tensor,
    importance: torch.Tensor | None = None,
    *,
    blocksize: int = 64,
    quant_type: str = "nf4",
    nested: bool = True,
    dtype: torch.dtype | None = None,
) -> NF4Weight:
    """w (N, K) in 4 bits with a small sum of importance[k] * (w[n, k] - result[n, k])^2.

    importance: (K,), not negative; the mean squares of the layer's inputs make it the error of its outputs, of inputs
    that do not correlate. By default all ones. dtype: the type that the result dequantizes to, by default w's.

    Raises ValueError as `NF4Weight.quantize` does, and for an importance of another shape or with negative values.
    """
    plain = NF4Weight.quantize(w, blocksize=blocksize, quant_type=quant_type, nested=False)
    if importance is not None:
        if tuple(importance.shape) != (w.shape[1],) or not bool((importance >= 0).all()):
            raise ValueError(f"importance must be {w.shape[1]} values of 0 or more, got {tuple(importance.shape)}")
        importance = importance.to(w.device, torch.float32)

    def chunks() -> Iterator[tuple[int, _Blocks]]:
        return _chunks(w, importance, blocksize, quant_type)

    absmax = torch.cat([blocks.fit() for _, blocks in chunks()])
    result = dataclasses.replace(plain, absmax=absmax, dtype=dtype or w.dtype)
    if nested:
        result = result.nest()
    packed = torch.empty_like(result.w_packed)
    for lo, blocks in chunks():
        first = lo // blocksize
        a = _choose_nested(result, blocks, first) if nested else absmax[first : first + blocks.t.shape[0]]
        nibble = blocks.order[blocks.nearest(a)].to(torch.uint8).view(-1, 2)
        end = min(lo + blocks.t.numel(), w.numel())
        both = (nibble[:, 0] << 4) | nibble[:, 1]
        packed[lo // 2 : -(-end // 2)] = both[: -(-(end - lo) // 2)]
    return dataclasses.replace(result, w_packed=packed)


def _choose_nested(result: NF4Weight, blocks: _Blocks, first: int) -> torch.Tensor:
    """Write the best 8-bit codes near the nearest ones into ``result``; returns the scales that they stand for."""
    assert result.absmax_q is not None and result.absmax_code is not None
    assert result.absmax_scale is not None and result.absmax_offset is not None
    count = blocks.t.shape[0]
    nearest = result.absmax_q[first : first + count]
    group = torch.arange(first, first + count, device=nearest.device) // NESTED_BLOCKSIZE
    best, scales = nearest, torch.zeros(count, device=nearest.device)
    least = torch.full_like(scales, torch.inf)
    for offset in range(-_NEIGHBOURS, _NEIGHBOURS + 1):
        code = (nearest.int() + offset).clamp(0, 255)
        a = result.absmax_code[code] * result.absmax_scale[group] + result.absmax_offset
        error = blocks.error(a, blocks.nearest(a))
        better = error < least
        best = torch.where(better, code.to(torch.uint8), best)
        scales, least = torch.where(better, a, scales), torch.where(better, error, least)
    nearest.copy_(best)
    return scales
