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
