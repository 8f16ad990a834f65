"""Quantization with the least error, against plain quantization of the same matrix."""

from __future__ import annotations

import pytest
import torch

from fastlora import requantize
from fastlora.nf4 import NF4Weight


def error(w: torch.Tensor, q: NF4Weight, importance: torch.Tensor | None = None) -> float:
    squares = (w.double() - q.dequantize(torch.float64)).square()
    return (squares if importance is None else squares * importance).sum().item()


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "blocksize"), [((96, 128), 64), ((300, 256), 32), ((7, 33), 64)])
def test_the_error_is_smaller(
    shape: tuple[int, int], blocksize: int, quant_type: str, nested: bool, weighted: bool
) -> None:
    w = torch.randn(shape)
    importance = torch.rand(shape[1]).square() if weighted else None
    options = {"blocksize": blocksize, "quant_type": quant_type, "nested": nested}
    plain = NF4Weight.quantize(w, **options)
    ours = requantize.quantize(w, importance, **options).check()
    assert (ours.shape, ours.blocksize, ours.quant_type, ours.nested) == (shape, blocksize, quant_type, nested)
    assert error(w, ours, importance) < 0.97 * error(w, plain, importance)


def test_no_block_is_worse() -> None:
    w = torch.randn(64, 128)
    plain, ours = NF4Weight.quantize(w, nested=False), requantize.quantize(w, nested=False)

    def errors(q: NF4Weight) -> torch.Tensor:
        return (w - q.dequantize(torch.float32)).square().view(-1, 64).sum(1)

    assert (errors(ours) <= errors(plain) * (1 + 1e-5)).all()


def test_nested_statistics_are_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    w = torch.randn(300, 256)
    searched = error(w, requantize.quantize(w))
    monkeypatch.setattr(requantize, "_NEIGHBOURS", 0)
    assert searched < 0.999 * error(w, requantize.quantize(w))


def test_calibration_spends_the_error_where_it_does_not_matter() -> None:
    w, x = torch.randn(64, 128), torch.randn(512, 128) * torch.logspace(-2, 0, 128)
    moments = x.square().mean(0)

    def output_error(q: NF4Weight) -> float:
        return (x @ (w - q.dequantize(torch.float32)).T).square().mean().item()

    plain, weighted = requantize.quantize(w), requantize.quantize(w, moments)
    assert output_error(weighted) < 0.9 * output_error(plain)


def test_what_4_bits_can_hold_stays() -> None:
    exact = NF4Weight.quantize(torch.randn(32, 64), nested=False).dequantize(torch.float32)
    torch.testing.assert_close(requantize.quantize(exact, nested=False).dequantize(torch.float32), exact)


def test_zeros_and_unimportant_blocks() -> None:
    w = torch.randn(4, 128)
    w[0] = 0
    importance = torch.cat((torch.zeros(64), torch.ones(64)))
    for nested in (False, True):
        q = requantize.quantize(w, importance, nested=nested).dequantize(torch.float32)
        assert q.isfinite().all()
    assert (requantize.quantize(w, nested=False).dequantize(torch.float32)[0] == 0).all()


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    w, importance = torch.randn(40, 96), torch.rand(96)
    whole = requantize.quantize(w, importance)
    monkeypatch.setattr(requantize, "_CHUNK", 1024)
    parts = requantize.quantize(w, importance)
    assert all(torch.equal(a, parts.tensors()[name]) for name, a in whole.tensors().items())


@pytest.mark.parametrize("importance", [torch.ones(3), -torch.ones(64)], ids=["shape", "negative"])
def test_bad_importance(importance: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="importance must be 64 values of 0 or more"):
        requantize.quantize(torch.randn(2, 64), importance)


def moments(k: int, samples: int = 400) -> torch.Tensor:
    """Of inputs that correlate, as those of real layers do."""
    x = torch.randn(samples, 8) @ torch.randn(8, k) + 0.2 * torch.randn(samples, k)
    return x.T @ x / samples


def output_error(w: torch.Tensor, q: NF4Weight, h: torch.Tensor) -> float:
    difference = w.double() - q.dequantize(torch.float64)
    return (difference @ h.double() * difference).sum().item()


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize(("shape", "blocksize"), [((96, 128), 64), ((40, 256), 32), ((7, 33), 64), ((6, 96), 64)])
def test_later_columns_make_up_for_earlier_ones(
    shape: tuple[int, int], blocksize: int, quant_type: str, nested: bool
) -> None:
    w, h = torch.randn(shape), moments(shape[1])
    options = {"blocksize": blocksize, "quant_type": quant_type, "nested": nested}
    apart = requantize.quantize(w, h.diagonal(), **options)
    ours = requantize.quantize(w, h, **options).check()
    assert (ours.shape, ours.blocksize, ours.quant_type, ours.nested) == (shape, blocksize, quant_type, nested)
    assert output_error(w, ours, h) < 0.5 * output_error(w, apart, h)


def test_inputs_that_do_not_correlate_leave_nothing_to_make_up_for() -> None:
    w, h = torch.randn(16, 128), torch.linspace(0.5, 2, 128)
    together = requantize.quantize(w, torch.diag(h), nested=False).dequantize(torch.float32)
    apart = requantize.quantize(w, h, nested=False).dequantize(torch.float32)
    torch.testing.assert_close(
        (w - together).square().mul(h).sum(), (w - apart).square().mul(h).sum(), rtol=0.01, atol=0
    )


def test_a_small_change_survives_in_the_directions_that_weigh_more() -> None:
    """A change below half a step of every code: rounding each weight for itself undoes it."""
    base = NF4Weight.quantize(torch.randn(64, 256)).dequantize(torch.float32)
    a = torch.randn(4, 256)
    change = 0.002 * torch.randn(64, 4) @ a
    left = []
    for importance in (None, torch.eye(256) + 100 * a.T @ a):
        lost = base + change - requantize.quantize(base + change, importance).dequantize(torch.float32)
        left.append((lost @ a.T).square().sum() / (change @ a.T).square().sum())
    assert left[0] > 0.8
    assert left[1] < 0.2


@pytest.mark.parametrize("what", ["none", "one sample", "zeros"])
def test_moments_of_too_few_samples(what: str) -> None:
    w, x = torch.randn(16, 128), torch.randn(1, 128)
    w[:, 64:] *= what != "zeros"
    h = torch.zeros(128, 128) if what == "none" else x.T @ x
    h[64:] *= what != "zeros"
    h[:, 64:] *= what != "zeros"
    for nested in (False, True):
        assert requantize.quantize(w, h, nested=nested).dequantize(torch.float32).isfinite().all()


def test_moments_must_be_numbers() -> None:
    with pytest.raises(ValueError, match="finite"):
        requantize.quantize(torch.randn(2, 64), torch.full((64, 64), torch.nan))
