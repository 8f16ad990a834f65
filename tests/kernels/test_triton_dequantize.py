"""The dequantizer against NF4Weight.dequantize, bit for bit."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastlora import kernels
from fastlora.nf4 import BLOCKSIZES, NF4Weight

pytestmark = pytest.mark.usefixtures("poison_empty")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (17, 48), (33, 33), (65, 130), (64, 128), (3, 4097)], ids=str)
def test_bits(shape: tuple[int, int], quant_type: str, nested: bool, dtype: torch.dtype, kernel_device: str) -> None:
    w = NF4Weight.quantize(torch.randn(shape) * 3, quant_type=quant_type, nested=nested).to(kernel_device)
    assert torch.equal(kernels.dequantize(w, dtype), w.dequantize(dtype))


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "flat"])
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_blocksize(blocksize: int, nested: bool, kernel_device: str) -> None:
    w = NF4Weight.quantize(torch.randn(37, 301), blocksize=blocksize, nested=nested).to(kernel_device)
    for dtype in DTYPES:
        assert torch.equal(kernels.dequantize(w, dtype), w.dequantize(dtype))


def test_more_blocks_than_one_group_of_nested_statistics(kernel_device: str) -> None:
    w = NF4Weight.quantize(torch.randn(70, 32 * 9), blocksize=32).to(kernel_device)
    assert w.absmax_scale.numel() > 2
    assert torch.equal(kernels.dequantize(w, torch.float32), w.dequantize(torch.float32))


def test_out_is_written_in_place_and_nothing_beside_it(kernel_device: str) -> None:
    w = NF4Weight.quantize(torch.randn(20, 33)).to(kernel_device)
    buffer = torch.full((22, 40), 7.0, device=kernel_device)
    out = buffer[1:21, 3:36]
    assert kernels.dequantize(w, torch.float32, out) is out
    assert torch.equal(out, w.dequantize(torch.float32))
    out.fill_(7.0)
    assert (buffer == 7.0).all()
    stacked = torch.full((40, 33), 7.0, device=kernel_device)
    kernels.dequantize(w, torch.float32, stacked[20:])
    assert torch.equal(stacked[20:], w.dequantize(torch.float32))
    assert (stacked[:20] == 7.0).all()


def test_refuses_an_out_that_does_not_fit(kernel_device: str) -> None:
    w = NF4Weight.quantize(torch.randn(8, 6)).to(kernel_device)
    for out in (
        torch.empty(8, 7, device=kernel_device),
        torch.empty(8, 6, dtype=torch.float16, device=kernel_device),
        torch.empty(6, 8, device=kernel_device).T,
    ):
        with pytest.raises(ValueError, match="out must be"):
            kernels.dequantize(w, torch.float32, out)
    with pytest.raises(TypeError, match="float64"):
        kernels.dequantize(w, torch.float64)
