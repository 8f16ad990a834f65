"""The rotary embedding of q and k that are parts of a larger matrix, against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastlora import rotary

pytestmark = pytest.mark.usefixtures("triton_runs")
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-22}
"""What one rounding may change, of the largest part of a sum of two products."""


def formula(q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
    def half(t: torch.Tensor) -> torch.Tensor:
        low, high = t.chunk(2, -1)
        return torch.cat((-high, low), -1)

    return [t * cos[:, None] + half(t) * sin[:, None] for t in (q, k)]


def operands(device: str, dtype: torch.dtype, batch: int, heads: int, key_heads: int, length: int, width: int) -> Any:
    """q and k as views of one (B S, N) with room for v, and that matrix."""
    sizes = [heads * width, key_heads * width, key_heads * width]
    y = torch.randn(batch * length, sum(sizes), device=device).to(dtype).requires_grad_()
    q, k, _ = (part.view(batch, length, -1, width).transpose(1, 2) for part in y.split(sizes, 1))
    return y, q, k


@DTYPES
@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "length", "width", "shared"),
    [(2, 4, 2, 5, 16, True), (1, 3, 1, 7, 12, True), (2, 6, 6, 3, 24, False), (1, 1, 1, 1, 2, True)],
)
def test_like_the_formula(
    device: str, dtype: torch.dtype, batch: int, heads: int, key_heads: int, length: int, width: int, shared: bool
) -> None:
    y, q, k = operands(device, dtype, batch, heads, key_heads, length, width)
    cos, sin = (torch.randn(1 if shared else batch, length, width, device=device).to(dtype) for _ in range(2))
    found = rotary.rotate(q, k, cos, sin)
    wide = [t.detach().double().requires_grad_() for t in (q, k)]
    truth = formula(*wide, cos.double(), sin.double())
    dys = [torch.randn_like(t) for t in found]
    (dy,) = torch.autograd.grad(found, y, dys)
    gradients = torch.autograd.grad(truth, wide, [t.double() for t in dys])
    parts = dy.split([heads * width, key_heads * width, key_heads * width], 1)
    for got, want in zip(found, truth, strict=True):
        assert got.transpose(1, 2).is_contiguous()
        assert (got.double() - want).abs().max() <= UNIT[dtype] * want.abs().max()
    for part, want in zip(parts, gradients, strict=False):
        got = part.view(batch, length, -1, width).transpose(1, 2)
        assert (got.double() - want).abs().max() <= UNIT[dtype] * want.abs().max()
    assert not parts[2].any()


def test_gradients_of_any_strides(device: str) -> None:
    y, q, k = operands(device, torch.float32, 2, 4, 2, 3, 8)
    cos, sin = (torch.randn(1, 3, 8, device=device) for _ in range(2))
    found = rotary.rotate(q, k, cos, sin)
    dys = [torch.randn_like(t) for t in found]
    (want,) = torch.autograd.grad(found, y, dys, retain_graph=True)
    turned = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in dys]
    (got,) = torch.autograd.grad(found, y, turned)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, cos, sin: (q[0], k, cos, sin), "are not"),
        (lambda q, k, cos, sin: (q, k[..., :4], cos, sin), "are not"),
        (lambda q, k, cos, sin: (q, k, cos[..., :4], sin), "are not"),
        (lambda q, k, cos, sin: (q, k, cos.double(), sin), "types"),
        (lambda q, k, cos, sin: (q.double(), k.double(), cos.double(), sin.double()), "float64"),
        (lambda q, k, cos, sin: (q, k, cos.clone().requires_grad_(), sin), "learns"),
    ],
)
def test_what_it_refuses(device: str, change: Any, words: str) -> None:
    _, q, k = operands(device, torch.float32, 2, 4, 2, 3, 8)
    cos, sin = (torch.randn(1, 3, 8, device=device) for _ in range(2))
    with pytest.raises(ValueError, match=words):
        rotary.rotate(*change(q, k, cos, sin))
