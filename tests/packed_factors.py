"""Adapters in 8 bits and NF4 for tests, and what their products are held to. No test of its own."""

from __future__ import annotations

import torch
from tolerance import Problem, assert_close

from fastlora import reference
from fastlora.int8 import Int8Matrix
from fastlora.nf4 import NF4Weight
from fastlora.packed import Factor

KINDS = ("int8", "nf4")


def packed_of(t: torch.Tensor, kind: str) -> Factor:
    if kind == "nf4":
        return NF4Weight.quantize(t, nested=False)
    # Scales far apart, so that one of another row shows.
    return Int8Matrix.quantize(t * (1 + torch.arange(t.shape[0], device=t.device) % 5)[:, None].to(t.dtype))


def exact(factor: Factor) -> torch.Tensor:
    """The matrix that the stored bits stand for, in float64."""
    if isinstance(factor, Int8Matrix):
        return factor.dequantize(torch.float64)
    return factor.dequantize(torch.float32).double()


def judge(p: Problem, a: Factor, b: Factor, got: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Hold y and u to the tolerance policy; the plain result rounds the factors to the type computed in."""
    wide = p.to(torch.float64)
    truth = reference.forward(wide.x, wide.w, exact(a), exact(b), wide.bias, p.scale, p.dropout)
    dtype = p.x.dtype
    plain = reference.forward(p.x, p.w, a.dequantize(dtype), b.dequantize(dtype), p.bias, p.scale, p.dropout)
    for name, result, rounded, best in zip("yu", got, plain, truth, strict=True):
        assert_close(result, rounded.to(result.dtype), best, name)
