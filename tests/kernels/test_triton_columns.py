"""A factor for each column: the kernels against plain PyTorch in float64, and DoRA through them."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tolerance import DTYPES, assert_close, make_problem

from fastlora import dora
from fastlora.kernels import columns
from fastlora.nf4 import NF4Weight

# Tiles, strips and columns that are full, cut, and single.
SIZES = [(16, 256), (1, 1), (300, 70), (129, 264)]


@pytest.mark.parametrize("terms", ["", "bias", "rest", "bias rest"])
@pytest.mark.parametrize(("m", "n"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled(dtype: torch.dtype, m: int, n: int, terms: str, kernel_device: str, poison_empty: None) -> None:
    z, rest = (torch.randn(m, n, device=kernel_device).to(dtype) for _ in range(2))
    gain, bias = (torch.randn(n, device=kernel_device) for _ in range(2))
    given = (bias if "bias" in terms else None, rest if "rest" in terms else None)
    want, plain = z.double() * gain.double(), z.float() * gain
    if given[0] is not None:
        want, plain = want + bias.double() * (1 - gain.double()), plain + bias * (1 - gain)
    if given[1] is not None:
        want, plain = want + rest.double(), plain + rest
    y = columns.scaled(z, gain, *given)
    assert y.dtype == dtype
    assert_close(y, plain.to(dtype), want, "y")
    assert torch.equal(columns.scaled(z, torch.ones_like(gain), given[0], None), z), "a gain of 1 must change nothing"


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("need_dz", [True, False])
@pytest.mark.parametrize("need_sums", [True, False])
@pytest.mark.parametrize(("m", "n"), SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scaled_gradients(
    dtype: torch.dtype,
    m: int,
    n: int,
    need_sums: bool,
    need_dz: bool,
    biased: bool,
    kernel_device: str,
    poison_empty: None,
) -> None:
    dy, z = (torch.randn(m, n, device=kernel_device).to(dtype) for _ in range(2))
    gain = torch.randn(n, device=kernel_device)
    bias = torch.randn(n, device=kernel_device) if biased else None
    dz, sums = columns.scaled_gradients(dy, z if need_sums else None, gain, bias, need_dz)
    assert (dz is not None, sums is not None) == (need_dz, need_sums)
    if dz is not None:
        assert_close(dz, (dy.float() * gain).to(dtype), dy.double() * gain.double(), "dz")
    if sums is not None:
        shifted = z.float() if bias is None else z.float() - bias
        exact = z.double() if bias is None else z.double() - bias.double()
        assert_close(sums, (dy.float() * shifted).sum(0), (dy.double() * exact).sum(0), "sums")
        again = columns.scaled_gradients(dy, z, gain, bias, need_dz)[1]
        assert again is not None
        assert torch.equal(again, sums)


@pytest.mark.parametrize(("n", "r"), [(32, 16), (70, 3), (1, 1), (40, 33)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_norm(dtype: torch.dtype, n: int, r: int, kernel_device: str, poison_empty: None) -> None:
    a, b, w = (torch.randn(shape, device=kernel_device).to(dtype) for shape in ((r, 50), (n, 2 * r), (n, 50)))
    b = b[:, :r]  # rows that are apart
    b[0] = 0
    magnitude = torch.rand(n, device=kernel_device) + 0.5
    cross, gram, norms = (a.float() @ w.float().T), (a.float() @ a.float().T), w.float().norm(dim=1)
    norm, gain = columns.row_norm(cross, gram, b, norms, magnitude, 0.75)
    want = (w.double() + 0.75 * b.double() @ a.double()).norm(dim=1)
    torch.testing.assert_close(norm.double(), want, rtol=2e-6, atol=0)
    torch.testing.assert_close(gain.double(), magnitude.double() / want, rtol=2e-6, atol=0)
    assert norm[0] == norms[0], "an adapter of zeros must change nothing"


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize(("n", "k", "r"), [(33, 128, 16), (5, 64, 3), (40, 64 * 70, 1)], ids=str)
def test_folded(n: int, k: int, r: int, nested: bool, kernel_device: str, poison_empty: None) -> None:
    w = NF4Weight.quantize(torch.randn(n, k), nested=nested).to(kernel_device)
    a, lora_b = torch.randn(r, k, device=kernel_device), torch.randn(n, 2 * r, device=kernel_device)[:, :r]
    magnitude, norms = torch.randn(n, device=kernel_device), dora.row_norms(w)
    magnitude[0] = 0
    b = lora_b.bfloat16()
    cross, gram = a @ w.dequantize(torch.float32).T, a @ a.T
    norm, gain = columns.row_norm(cross, gram, b, norms, magnitude, 0.75)
    got = columns.folded(cross, gram, b, norms, magnitude, 0.75, w, lora_b, 2.0**-60)
    gain[0] = 2.0**-60
    absmax = w.flat_absmax().view(n, -1) * gain[:, None]
    want = (gain, norm * gain, absmax.view(-1), lora_b * gain[:, None])
    for result, value in zip(got, want, strict=True):
        torch.testing.assert_close(result, value, rtol=1e-6, atol=0)
    ones = columns.folded(cross, gram, torch.zeros_like(b), norms, norms, 0.75, w, lora_b, 2.0**-60)
    assert torch.equal(ones[2], w.flat_absmax()), "an adapter of zeros must change nothing"
    assert torch.equal(ones[3], lora_b)


def test_rows_that_the_adapter_cancels(kernel_device: str) -> None:
    a, b = torch.randn(2, 64, device=kernel_device), torch.randn(16, 2, device=kernel_device)
    w = -(b @ a)
    norm, _ = columns.row_norm(a @ w.T, a @ a.T, b, w.norm(dim=1), torch.ones(16, device=kernel_device), 1.0)
    assert norm.isfinite().all()
    assert (norm < 1e-2).all()


@pytest.mark.parametrize(("dropout_p", "bias"), [(0.0, True), (0.4, True), (0.0, False)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dora(
    dtype: torch.dtype, dropout_p: float, bias: bool, kernel_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same through the kernels as through PyTorch, of the same masks."""
    p = make_problem(20, 72, 64, 5, dtype, bias=bias, scale=0.75)
    magnitude = torch.rand(72) + 0.5
    calls = []
    for name in ("scaled", "scaled_gradients", "row_norm", "folded"):
        real = getattr(columns, name)
        monkeypatch.setattr(columns, name, lambda *args, r=real, n=name: (calls.append(n), r(*args))[1])

    def run(kernels: bool, kind: torch.dtype) -> dict[str, torch.Tensor]:
        q = p.to(kind)
        parts = (q.x, q.lora_a, q.lora_b, magnitude.double() if kind == torch.float64 else magnitude, q.bias)
        leaves = [t.detach().to(kernel_device).requires_grad_() for t in parts if t is not None]
        x, a, b, m, *rest = leaves
        if not kernels:
            monkeypatch.setattr(dora, "_columns", lambda *args: None)
        torch.manual_seed(3)
        y = dora.dora_linear(
            x,
            q.w.to(kernel_device),
            a,
            b,
            m,
            rest[0] if rest else None,
            q.scale,
            dropout_p,
            None,
            "triton" if kernels else "reference",
        )
        y.backward(q.dy.to(kernel_device))
        return {"y": y.detach(), **{name: t.grad for name, t in zip(("dx", "da", "db", "dm", "dbias"), leaves)}}  # noqa: B905

    actual = run(True, dtype)
    folds = not bias and dtype != torch.float16
    assert calls == (["folded", "scaled_gradients"] if folds else ["row_norm", "scaled", "scaled_gradients"])
    calls.clear()
    plain, want = run(False, dtype), run(False, torch.float64)
    assert not calls
    for name, t in want.items():
        assert_close(actual[name], plain[name], t, name)
