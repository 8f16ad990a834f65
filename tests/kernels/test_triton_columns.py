"""A factor for each column: the kernels against plain PyTorch in float64, and DoRA through them."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from tolerance import DTYPES, assert_close, make_problem

from fastlora import dora
from fastlora.kernels import columns, config
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
        assert_close(sums.sum(0), (dy.float() * shifted).sum(0), (dy.double() * exact).sum(0), "sums")
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("strips", "n", "r"), [(1, 32, 16), (70, 45, 3), (33, 1, 40), (64, 100, 1)], ids=str)
def test_finished(strips: int, n: int, r: int, dtype: torch.dtype, kernel_device: str, poison_empty: None) -> None:
    sums, length, gain = (torch.rand(shape, device=kernel_device) + 0.5 for shape in ((strips, n), n, n))
    db = torch.randn(n, r, device=kernel_device).to(dtype)
    plain_dm, plain_db = (sums.sum(0) / length).to(dtype), (db.float() * gain[:, None]).to(dtype)
    want_dm, want_db = sums.double().sum(0) / length.double(), db.double() * gain.double()[:, None]
    apart = torch.zeros(r, n, dtype=dtype, device=kernel_device).T.copy_(db)
    for given in (db.clone(), apart, None):
        for parts in (sums, None):
            dm, of_b = columns.finished(parts, length, dtype, gain, given if given is None else given.clone())
            assert (dm is None, of_b is None) == (parts is None, given is None)
            if dm is not None:
                assert dm.dtype == dtype
                assert_close(dm, plain_dm, want_dm, "dm")
            if of_b is not None:
                assert of_b.dtype == dtype
                assert_close(of_b, plain_db, want_db, "db")
    own = db.clone()
    assert columns.finished(None, length, dtype, gain, own)[1] is own


def test_strips_leave_enough_programs() -> None:
    h200 = config.Device((9, 0), 132)
    strips = {shape: config.column_sums(*shape, h200)[1] for shape in ((4096, 4096), (4096, 14336), (4096, 1024))}
    assert strips == {(4096, 4096): 128, (4096, 14336): 512, (4096, 1024): 64}
    assert config.column_sums(8192, 4096, h200)[1] == 256


def test_rows_of_a_program_that_folds() -> None:
    h200 = config.Device((9, 0), 132)
    assert [config.folded(n, 16, h200).block_n for n in (1024, 4096, 14336)] == [16, 32, 32]
    for n in (1, 1024, 4096, 14336):
        for r in (1, 16, 33, config.FOLDED_RANK):
            tiles = config.folded(n, r, h200)
            assert tiles.block_k >= 64
            assert tiles.block_r >= r
            assert max(tiles.block_n * tiles.block_k, 2 * tiles.block_r * tiles.block_k) <= 16384


@pytest.mark.parametrize("kind", ["nested", "flat", "fp4"])
@pytest.mark.parametrize(("n", "k", "r"), [(33, 128, 16), (5, 64, 3), (40, 64 * 20, 1), (70, 192, 40)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_folded(dtype: torch.dtype, n: int, k: int, r: int, kind: str, kernel_device: str, poison_empty: None) -> None:
    w = NF4Weight.quantize(
        torch.randn(n, k), nested=kind == "nested", quant_type="fp4" if kind == "fp4" else "nf4", blocksize=64
    ).to(kernel_device)
    # Rows that are apart, and values of which rounding takes a part.
    lora_a = torch.randn(r, 2 * k, device=kernel_device)[:, :k]
    lora_b = torch.randn(n, 2 * r, device=kernel_device)[:, :r]
    magnitude, norms = torch.randn(n, device=kernel_device), dora.row_norms(w)
    magnitude[0] = 0
    a, b = lora_a.to(dtype).double(), lora_b.to(dtype).double()
    assert columns.folds(w, r, dtype)
    got = columns.folded(w, lora_a, lora_b, norms, magnitude, 0.75, dtype, 2.0**-60)
    norm = (
        norms.double().square()
        + 1.5 * ((w.dequantize(dtype).double() @ a.T) * b).sum(1)
        + (0.75**2 * ((b @ (a @ a.T)) * b).sum(1))
    ).sqrt()
    gain = magnitude.double() / norm
    gain[0] = 2.0**-60
    absmax = w.flat_absmax().view(n, -1).double() * gain[:, None]
    want = (gain, norm * gain, absmax.view(-1), lora_b.double() * gain[:, None])
    for result, value in zip(got, want, strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), value, rtol=3e-6, atol=0)
    exact = dora.weight_norm(w, lora_a, lora_b, 0.75, torch.float32, "reference", norms)
    torch.testing.assert_close(got[1][1:] / got[0][1:], exact[1:], rtol=0.02, atol=0)
    ones = columns.folded(w, lora_a, torch.zeros_like(lora_b), norms, norms, 0.75, dtype, 2.0**-60)
    assert torch.equal(ones[2], w.flat_absmax()), "an adapter of zeros must change nothing"
    assert torch.equal(ones[0], torch.ones_like(gain, dtype=torch.float32))
    assert not ones[3].any()
    half = columns.folded(w, lora_a.to(dtype), lora_b.to(dtype), norms, magnitude, 0.75, dtype, 2.0**-60)
    assert half[3].dtype == dtype
    assert torch.equal(half[0], got[0]), "rounded before or inside, the products are of the same operands"


def test_what_is_not_folded(kernel_device: str) -> None:
    w = NF4Weight.quantize(torch.randn(8, 64)).to(kernel_device)
    assert not columns.folds(w, 4, torch.float32)
    assert not columns.folds(w, config.FOLDED_RANK + 1, torch.bfloat16)
    moved = dataclasses.replace(w, w_packed=torch.cat((w.w_packed[:1], w.w_packed))[1:])
    assert not columns.folds(moved, 4, torch.bfloat16)


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
    for name in ("scaled", "scaled_gradients", "finished", "row_norm", "folded"):
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
    first = ["row_norm", "scaled"]
    if not bias and dtype != torch.float16:
        first = ["folded"] if dtype == torch.bfloat16 else ["row_norm"]
    assert calls == [*first, "scaled_gradients", "finished"]
    calls.clear()
    plain, want = run(False, dtype), run(False, torch.float64)
    assert not calls
    for name, t in want.items():
        assert_close(actual[name], plain[name], t, name)
