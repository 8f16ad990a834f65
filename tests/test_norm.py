"""The root mean square norm as an autograd node."""

from __future__ import annotations

import pytest
import torch
from tolerance import assert_close

pytest.importorskip("triton")

from fastlora import norm

EPS = 1e-5
K = 64
FORMULAS = pytest.mark.parametrize(("offset", "rounded"), [(0, True), (0, False), (1, False)])


@pytest.fixture(autouse=True)
def _one_way(device: str) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton is compiled, not interpreted")


def plain(x: torch.Tensor, weight: torch.Tensor, offset: int, rounded: bool) -> torch.Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return n.to(x.dtype) * (offset + weight) if rounded else (n * (offset + weight.to(wide.dtype))).to(x.dtype)


def problem(dtype: torch.dtype, device: str) -> list[torch.Tensor]:
    """x, the weight and the gradient of y."""
    x, weight = torch.randn(3, 4, K), 1 + 0.2 * torch.randn(K)
    made = [t.to(device, dtype) for t in (x, weight, torch.randn(3, 4, K))]
    return [*(t.requires_grad_() for t in made[:2]), made[2]]


@FORMULAS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("laid", ["contiguous", "transposed"])
def test_node(laid: str, dtype: torch.dtype, offset: int, rounded: bool, device: str) -> None:
    x, weight, dy = problem(dtype, device)
    results = []
    for kind in (None, torch.float64, dtype):
        leaves = [t.detach().to(kind or dtype).requires_grad_() for t in (x, weight)]
        given, gradient = leaves[0], dy.to(kind or dtype)
        if laid == "transposed":
            given, gradient = given.transpose(0, 1), gradient.transpose(0, 1)
        if kind is None:
            y = norm.rms_norm(given, leaves[1], EPS, offset=offset, rounded=rounded)
        else:
            y = plain(given, leaves[1], offset, rounded)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, gradient)])
    for name, got, true, usual in zip(("y", "dx", "dweight"), *results, strict=True):
        assert_close(got, usual, true, name)


def test_only_what_is_needed(device: str) -> None:
    x, weight, dy = problem(torch.float16, device)
    want = torch.autograd.grad(norm.rms_norm(x, weight, EPS), [x, weight], dy)
    frozen = weight.detach()
    y = norm.rms_norm(x, frozen, EPS)
    assert torch.equal(torch.autograd.grad(y, x, dy)[0], want[0])
    y = norm.rms_norm(x.detach(), weight, EPS)
    assert torch.equal(torch.autograd.grad(y, weight, dy)[0], want[1])
    assert not norm.rms_norm(x.detach(), frozen, EPS).requires_grad


def test_what_is_kept(device: str) -> None:
    x, weight, _ = problem(torch.float16, device)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm.rms_norm(x, weight, EPS)
    more = [t for t in kept if t.data_ptr() not in (x.data_ptr(), weight.data_ptr())]
    assert [(t.dtype, t.numel()) for t in more] == [(torch.float32, 12)]


def test_x_that_changed_is_noticed(device: str) -> None:
    x, weight, dy = problem(torch.float16, device)
    x = x * 1
    y = norm.rms_norm(x, weight, EPS)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy)


def test_second_derivatives_are_refused(device: str) -> None:
    x, weight, dy = problem(torch.float16, device)
    (dx,) = torch.autograd.grad(norm.rms_norm(x, weight, EPS), x, dy, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        dx.sum().backward()


@pytest.mark.parametrize("kind", ["float32", "weight", "nothing", "wide", "length", "meta"])
def test_unsupported(kind: str, device: str) -> None:
    x, weight, _ = problem(torch.float16, device)
    assert norm.unsupported(x, weight) is None
    reason, match = {
        "float32": lambda: (norm.unsupported(x.float(), weight.float()), "16-bit"),
        "weight": lambda: (norm.unsupported(x, weight.float()), "its weight is torch.float32"),
        "nothing": lambda: (norm.unsupported(x[:0], weight), "an input"),
        "wide": lambda: (norm.unsupported(x.new_empty(1, 32768), x.new_empty(32768)), "an input"),
        "length": lambda: (norm.unsupported(x[..., :32], weight), "an input"),
        "meta": lambda: (norm.unsupported(x.to("meta"), weight), "on meta"),
    }[kind]()
    assert reason is not None
    assert match in reason


def test_compilers_and_transforms_see_the_model_s_own(device: str) -> None:
    x, weight, _ = problem(torch.float16, device)
    seen: list[str | None] = []

    def look(t: torch.Tensor) -> torch.Tensor:
        seen.append(norm.unsupported(t, weight))
        return t

    torch.func.vmap(look)(x)
    assert seen == ["a compiler, a transform or a subclass of tensors looks on"]
