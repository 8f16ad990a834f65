"""The sum of a residual and its norm against the formula in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastlora import norm

pytestmark = pytest.mark.usefixtures("triton_runs")
EPS = 1e-3
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
UNIT = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-21}
"""Half a unit in the last place, of the largest element; in float32 what a sum over a row may err."""


def operands(device: str, dtype: torch.dtype, *shape: int) -> Any:
    """x, a residual and a weight."""
    x, residual = (torch.randn(*shape, device=device).to(dtype).requires_grad_() for _ in range(2))
    return x, residual, (torch.randn(shape[-1], device=device) / 4 + 1).to(dtype)


def formula(x: torch.Tensor, weight: torch.Tensor, offset: float) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * (offset + weight)


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, roundings: int = 1) -> None:
    assert (got.dtype, got.shape) == (dtype, want.shape)
    assert (got.double() - want).abs().max() <= roundings * UNIT[dtype] * want.abs().max()


@DTYPES
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 72), (1, 8), (3, 1000), (1, 2, 4104)], ids=str)
def test_like_the_formula(device: str, dtype: torch.dtype, offset: float, summed: bool, shape: tuple[int, ...]) -> None:
    x, residual, weight = operands(device, dtype, *shape)
    h, y = norm.add_norm(x, weight, EPS, offset, residual if summed else None)
    # The sum is rounded before it is normalized, as in the model.
    true_h = (x + residual if summed else x).detach()
    assert torch.equal(h, true_h)
    wide = true_h.double().requires_grad_()
    true_y = formula(wide, weight.double(), offset)
    close(y, true_y, dtype)
    dh, dy = torch.randn_like(h), torch.randn_like(y)
    leaves = (x, residual) if summed else (x,)
    grads = torch.autograd.grad((h, y), leaves, (dh, dy), retain_graph=True)
    (true,) = torch.autograd.grad(true_y, wide, dy.double(), retain_graph=True)
    for grad in grads:
        close(grad, true + dh.double(), dtype)
    for got in torch.autograd.grad(y, leaves, dy, retain_graph=True):
        close(got, true, dtype, roundings=2)
    for got in torch.autograd.grad(h, leaves, dh):
        assert torch.equal(got, dh)


def test_a_narrower_branch(device: str) -> None:
    """A model that PEFT prepared has a stream in float32, and branches in bfloat16."""
    x, residual, weight = operands(device, torch.float32, 3, 96)
    x = x.detach().to(torch.bfloat16).requires_grad_()
    got = norm.add_norm(x, weight, EPS, residual=residual)
    want = norm.add_norm(x.detach().float().requires_grad_(), weight, EPS, residual=residual)
    dys = [torch.randn_like(t) for t in got]
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)
    dx, dr = torch.autograd.grad(got, (x, residual), dys)
    (wide,) = torch.autograd.grad(want, residual, dys)
    assert torch.equal(dr, wide)
    assert torch.equal(dx, wide.to(torch.bfloat16))


def test_any_strides(device: str) -> None:
    x, residual, weight = operands(device, torch.float32, 6, 4, 32)
    want = norm.add_norm(x, weight, EPS, residual=residual)
    turned = [t.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for t in (x, residual)]
    got = norm.add_norm(turned[0], weight, EPS, residual=turned[1])
    dys = [torch.randn_like(t) for t in want]
    expected = torch.autograd.grad(want, (x, residual), dys)
    spread = [dy.transpose(0, 2).contiguous().transpose(0, 2) for dy in dys]
    for a, b in zip((*got, *torch.autograd.grad(got, turned, spread)), (*want, *expected), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda t: t[..., 8:72].view(2, 5, 4, 16), id="heads"),
        pytest.param(lambda t: t[..., 8:72].view(2, 5, 4, 16).transpose(1, 2), id="heads first"),
        pytest.param(lambda t: t[:, :3, :16], id="some rows"),
        pytest.param(lambda t: t[:1, ::2, :16], id="every other row"),
        pytest.param(lambda t: t[:, :3, :64].view(2, 3, 4, 16)[:, :, ::2], id="every other head"),
        pytest.param(lambda t: t[..., 0:32:2], id="every other element"),
        pytest.param(lambda t: t[0, 0, :16], id="one row"),
    ],
)
def test_rows_of_a_wider_matrix(device: str, view: Any) -> None:
    """As the heads of q beside those of k and v are: read where they lie, with the same results."""
    wide = torch.randn(2, 5, 96, device=device)
    weight = torch.randn(16, device=device)
    x, copied = (t.detach().requires_grad_() for t in (view(wide), view(wide).clone().contiguous()))
    (h, y), want = norm.add_norm(x, weight, EPS), norm.add_norm(copied, weight, EPS)
    assert torch.equal(h, x)
    assert torch.equal(y, want[1])
    dys = torch.randn_like(want[0]), torch.randn_like(want[1])
    for got, of in ((h, y), dys), ((y,), dys[1:]):
        grads = [
            torch.autograd.grad(o, t, of, retain_graph=True)[0] for o, t in ((got, x), (want[-len(got) :], copied))
        ]
        assert grads[0].shape == x.shape
        assert torch.equal(*grads)


def test_large_elements_of_half_precision(device: str) -> None:
    """Squares that float16 cannot hold are summed in float32."""
    x = torch.full((2, 64), 1000.0, device=device, dtype=torch.float16)
    _, y = norm.add_norm(x, torch.ones(64, device=device, dtype=torch.float16), EPS)
    assert torch.equal(y, torch.ones_like(y))


def test_what_is_not_taken(device: str) -> None:
    x, residual, weight = operands(device, torch.float32, 4, 8)
    for reason, arguments in {
        "the weight learns": (x, weight.clone().requires_grad_(), None),
        "do not make one of the sum": (x, weight.to(torch.bfloat16), None),
        "the sum": (x, weight.to(torch.bfloat16), residual.detach().to(torch.bfloat16)),
        "shapes": (x, weight[:4], None),
        "do not fit": (x, weight, residual[:2]),
        "is not a type": (x.detach().double(), weight.double(), None),
        "0 rows of": (x[:0], weight, None),
        "2147483648 rows of": (x[:1].expand(1 << 31, 8), weight, None),
        "the weight is not contiguous": (x, torch.ones(16, device=device)[::2], None),
    }.items():
        assert reason in str(norm.unsupported(*arguments))
        with pytest.raises(ValueError, match=reason):
            norm.add_norm(arguments[0], arguments[1], EPS, residual=arguments[2])


def test_no_second_derivative(device: str) -> None:
    x, residual, weight = operands(device, torch.float32, 2, 8)
    h, y = norm.add_norm(x, weight, EPS, residual=residual)
    (grad,) = torch.autograd.grad(y.square().sum() + h.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
