"""A dense matrix in 4 bits with the least squared error, where plain quantization takes each block's largest element.

For each block of weights t with importances h, the scale a and the codes c minimise sum(h * (t - a c)^2). For fixed
codes the best scale is sum(h t c) / sum(h c^2), for a fixed scale each code is the nearest one, so the two alternate,
from several starts. Nested statistics are chosen among the values that 8 bits have.

Where the second moments H of the inputs are known, what is to be small is trace(E H E^T) of the error E: columns are
rounded one after the other, and the error of each is made up for by those that are still to come (Frantar et al.,
"GPTQ", 2022; the feedback is that of a Cholesky factor of H^-1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from fastlora.nf4 import NESTED_BLOCKSIZE, NF4Weight, code_table

_STARTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Parts of the block's largest element that the search starts from."""
_ROUNDS = 3
_CELLS = 2048
"""Parts of [0, 1] that are looked up instead of searched for."""
_NEIGHBOURS = 3
"""8-bit codes to either side of the nearest one that a nested statistic may take."""
_CHUNK = 1 << 20
_DAMPING = 0.01
"""Part of the mean of H's diagonal that is added to it: few samples say nothing of most directions."""


class _Blocks:
    """Blocks (B, blocksize) of the target, their importances, and the codes to choose from."""

    def __init__(self, t: torch.Tensor, h: torch.Tensor | None, quant_type: str) -> None:
        self.t, self.h = t, h
        table = code_table(quant_type, t.device)
        self.order = table.argsort(stable=True)
        self.code = table[self.order]
        self.bounds = (self.code[:-1] + self.code[1:]) / 2
        self.cells = torch.bucketize(torch.arange(-_CELLS, _CELLS + 1, device=t.device) / _CELLS, self.bounds)

    def nearest(self, a: torch.Tensor) -> torch.Tensor:
        """Indices into the sorted codes for the scales a (B,)."""
        return torch.bucketize(self.t * _inverse(a)[:, None], self.bounds, out_int32=True)

    def near(self, a: torch.Tensor) -> torch.Tensor:
        """`nearest` but for values within a cell of a bound: several times as fast, and as good to compare scales."""
        cell = (self.t * (_inverse(a) * _CELLS)[:, None]).clamp_(-_CELLS, _CELLS).add_(_CELLS)
        return self.cells[cell.int()]

    def error(self, a: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        squares = (self.t - self.code[index] * a[:, None]).square_()
        return (squares if self.h is None else squares.mul_(self.h)).sum(1)

    def best_scale(self, a: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        c = self.code[index]
        weighted = c if self.h is None else c * self.h
        found = (weighted * self.t).sum(1) / (weighted * c).sum(1)
        # A block of zeros, or one without importance (NaN), keeps the scale that it has.
        return torch.where(found > 0, found, a)

    def fit(self, known: torch.Tensor | None = None) -> torch.Tensor:
        """The scales (B,) with the least error found; the search starts from those ``known``, if any."""
        peak = self.t.abs().amax(1)
        index = self.near(peak)
        best, least = peak, self.error(peak, index)
        for a in [peak * start for start in _STARTS] if known is None else [known]:
            index = self.near(a)
            for _ in range(_ROUNDS):
                a = self.best_scale(a, index)
                index = self.near(a)
                error = self.error(a, index)
                better = error < least
                best, least = torch.where(better, a, best), torch.where(better, error, least)
        return best


def _inverse(a: torch.Tensor) -> torch.Tensor:
    return torch.where(a == 0, 0, 1 / a)


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
    """w (N, K) in 4 bits with a small error E = w - result.

    importance: what E is measured with; by default sum(E^2). (K,), not negative: sum(importance[k] * E[n, k]^2), the
    error of the layer's outputs for inputs of these mean squares that do not correlate. (K, K), symmetric and positive
    semidefinite: trace(E importance E^T), the same for inputs x with E[x x^T] = importance, which needs some four such
    matrices of memory. dtype: the type that the result dequantizes to, by default w's.

    Raises ValueError as `NF4Weight.quantize` does, and for an importance of another shape, with negative values or
    values that are not finite.
    """
    plain = NF4Weight.quantize(w, blocksize=blocksize, quant_type=quant_type, nested=False)
    moments = None
    if importance is not None:
        k = w.shape[1]
        importance = importance.detach().to(w.device, torch.float32)
        if importance.shape not in ((k,), (k, k)):
            raise ValueError(f"importance must be {k} values of 0 or more, or {k} x {k}, got {tuple(importance.shape)}")
        if importance.dim() == 2:
            moments, importance = importance, importance.diagonal()
        if not bool((importance >= 0).all() and importance.isfinite().all()):
            raise ValueError(f"importance must be {k} values of 0 or more, all finite")

    def chunks() -> Iterator[tuple[int, _Blocks]]:
        return _chunks(w, importance, blocksize, quant_type)

    absmax = torch.cat([blocks.fit() for _, blocks in chunks()])
    result = dataclasses.replace(plain, absmax=absmax, dtype=dtype or w.dtype)
    if nested:
        result = result.nest()
    if moments is not None and bool(moments.any()):
        return _sweep(w, result, moments)
    packed = torch.empty_like(result.w_packed)
    for lo, blocks in chunks():
        first = lo // blocksize
        a = absmax[first : first + blocks.t.shape[0]]
        if nested:
            a = _choose_nested(result, blocks, torch.arange(first, first + blocks.t.shape[0], device=w.device))
        nibble = blocks.order[blocks.nearest(a)].to(torch.uint8)
        end = min(lo + blocks.t.numel(), w.numel())
        packed[lo // 2 : -(-end // 2)] = _pack(nibble)[: -(-(end - lo) // 2)]
    return dataclasses.replace(result, w_packed=packed)


def _pack(nibble: torch.Tensor) -> torch.Tensor:
    nibble = nibble.view(-1, 2)
    return (nibble[:, 0] << 4) | nibble[:, 1]


def _choose_nested(
    result: NF4Weight, blocks: _Blocks, where: torch.Tensor, start: torch.Tensor | None = None
) -> torch.Tensor:
    """Write the best 8-bit codes of the blocks ``where`` into ``result``; returns the scales that they stand for.

    They are looked for near the codes that are there, or near the scales ``start``.
    """
    assert result.absmax_q is not None and result.absmax_code is not None
    assert result.absmax_scale is not None and result.absmax_offset is not None
    group = result.absmax_scale[where // NESTED_BLOCKSIZE]
    nearest = result.absmax_q[where].int()
    if start is not None:
        bounds = (result.absmax_code[:-1] + result.absmax_code[1:]) / 2
        nearest = torch.bucketize((start - result.absmax_offset) / group, bounds, out_int32=True)
    best, scales = nearest, torch.zeros_like(group)
    least = torch.full_like(scales, torch.inf)
    for offset in range(-_NEIGHBOURS, _NEIGHBOURS + 1):
        code = (nearest + offset).clamp(0, 255)
        a = result.absmax_code[code] * group + result.absmax_offset
        error = blocks.error(a, blocks.near(a))
        better = error < least
        best = torch.where(better, code, best)
        scales, least = torch.where(better, a, scales), torch.where(better, error, least)
    result.absmax_q[where] = best.to(torch.uint8)
    return scales


def _feedback(moments: torch.Tensor) -> torch.Tensor:
    """The upper triangle U of H^-1 = U^T U, of the damped second moments H (K, K)."""
    h = moments / moments.diagonal().mean()
    h.diagonal().add_(_DAMPING)
    # float64: H may have a condition number that float32 does not.
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h.double())), upper=True).float()


@torch.no_grad()
def _sweep(w: torch.Tensor, result: NF4Weight, moments: torch.Tensor) -> NF4Weight:
    """The codes, and where a block is a part of a row its statistic as well, one group of columns after the other."""
    n, k = w.shape
    size = result.blocksize
    aligned = k % size == 0
    # Groups of columns in order of what they weigh: what is rounded first has the most left to make up for it.
    weigh = torch.nn.functional.pad(moments.diagonal(), (0, -k % size)).view(-1, size).sum(1)
    groups = [range(g * size, min((g + 1) * size, k)) for g in weigh.argsort(descending=True, stable=True).tolist()]
    order = torch.tensor([column for group in groups for column in group], device=w.device)
    feedback = _feedback(moments[order][:, order])
    left = w.detach().float()[:, order].contiguous()
    nibbles = torch.empty(n * k + n * k % 2, dtype=torch.uint8, device=w.device)
    nibbles[-1] = 0
    matrix = nibbles[: n * k].view(n, k)
    code = _Blocks(left, None, result.quant_type)
    statistics = result.flat_absmax()
    begin = 0
    for group in groups:
        end = begin + len(group)
        if aligned:
            weights = feedback.diagonal()[begin:end].reciprocal().square()
            block = _Blocks(left[:, begin:end], weights.expand(n, -1), result.quant_type)
            where = torch.arange(n, device=w.device) * (k // size) + group[0] // size
            a = block.fit(statistics[where])
            if result.nested:
                a = _choose_nested(result, block, where, a)
            else:
                assert result.absmax is not None
                result.absmax[where] = a
            scales = a[:, None].expand(-1, end - begin)
        else:
            elements = torch.arange(n, device=w.device)[:, None] * k + torch.tensor(group, device=w.device)
            scales = statistics[elements // size]
        inverse = _inverse(scales)
        errors = torch.empty(n, end - begin, device=w.device)
        for i in range(end - begin):
            t = left[:, begin + i]
            index = torch.bucketize(t * inverse[:, i], code.bounds, out_int32=True)
            matrix[:, group[i]] = code.order[index].to(torch.uint8)
            error = (t - code.code[index] * scales[:, i]) / feedback[begin + i, begin + i]
            left[:, begin + i : end].addr_(error, feedback[begin + i, begin + i : end], alpha=-1)
            errors[:, i] = error
        left[:, end:].addmm_(errors, feedback[begin:end, end:], alpha=-1)
        begin = end
    return dataclasses.replace(result, w_packed=_pack(nibbles))
